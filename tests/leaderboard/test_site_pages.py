from __future__ import annotations

import inspect
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic
from page_reader import Page, board_rows, figures, read

from sleeperbench import __version__
from sleeperbench.leaderboard import names
from sleeperbench.leaderboard.build import build
from sleeperbench.leaderboard.pages import BUDGET, HONEST
from sleeperbench.leaderboard.table import PER_PAGE
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.terms import REASONS
from sleeperbench.schema import CELLS


def test_figures_on_the_board_are_those_of_the_table(pages: dict[str, Page], hostile_run: Path) -> None:
    cells = {names.clean(c["cell"]): c for c in load([hostile_run]).cells}
    rows = board_rows(pages["table.html"])
    assert len(rows) == len(cells) == len({r.attrs["data-cell"] for r in rows})
    units = {c.name: c.unit for c in CELLS}
    filled = 0
    for row in rows:
        cell = cells[row.attrs["data-cell"]]
        for metric, td in figures(row).items():
            value = cell[metric]
            if value is None:
                assert td.attrs["data-order"] == ""
                continue
            assert float(td.attrs["data-order"]) == float(value)
            if metric == "verdict":
                continue
            words = td.text.split(" ")
            if units[metric] == "fraction":
                assert words[:2] == [f"{100 * value:.1f}", "%"]
            else:
                assert float(words[0]) == pytest.approx(value, rel=1e-3, abs=1e-3)
            filled += 1
    assert filled > 500


def test_intervals_and_counts_stand_with_their_figure(pages: dict[str, Page], hostile_run: Path) -> None:
    results = load([hostile_run])
    rows = {r.attrs["data-cell"]: r for r in board_rows(pages["table.html"])}
    seen = 0
    for cell in results.cells:
        if cell["status"] != "ok" or "collapsed" in cell["flags"]:
            continue
        measured = {m["metric"]: m for m in results.measured(cell["cell"])}
        for column, metric in (("c_acc", "c_acc"), ("o_asr", "asr")):
            td, m = figures(rows[names.clean(cell["cell"])])[column], measured[metric]
            assert f"{100 * m['lower']:.1f}–{100 * m['upper']:.1f}" in td.text
            own = figures(pages[f"cells/{names.digest12(cell['cell'])}.html"].by_id("headline"))[column]
            assert own.text == td.text
            assert f"{m['count']} of {m['total']} images" in own.attrs["title"]
            seen += 1
    assert seen > 100


def test_one_draws_interval_is_not_shown_for_the_mean_of_draws(tmp_path: Path) -> None:
    cell = synthetic.cell_row("badnets", 0.1, "ft", 0, p_asr_ra=0.5)
    mean = synthetic.measurement(cell, "p_asr_ra", value=0.5)
    draw = mean | {"qualifier": "draw=1", "task_key": "t", "count": 5, "total": 10, "lower": 0.2366, "upper": 0.7634}
    run = synthetic.write_run(tmp_path / "r", [cell], [mean, draw])
    page = read(build([run], tmp_path / "s").parent / "table.html")
    assert figures(board_rows(page)[0])["p_asr_ra"].text == "50.0 %"


def test_every_empty_figure_says_why(pages: dict[str, Page], hostile_run: Path) -> None:
    cells = {names.clean(c["cell"]): c for c in load([hostile_run]).cells}
    empty = 0
    meant = {d.text for d in pages["table.html"].by_id("words").all("dt")}
    for row in board_rows(pages["table.html"]):
        cell = cells[row.attrs["data-cell"]]
        reasons = cell["reasons"]
        own = " ".join(d.text for d in pages[f"cells/{names.digest12(cell['cell'])}.html"].root.all("dd"))
        for metric, td in figures(row).items():
            if td.attrs["data-order"]:
                continue
            empty += 1
            word, _, detail = reasons[metric].partition(":")
            assert td.text == word.replace("_", " ")[:28]
            assert td.text in meant or word not in REASONS, "the words are explained below the table"
            assert word.replace("_", " ") in own, "the whole reason stands on the cell's page"
            assert " ".join(names.clean(detail).split()) in own
    assert empty > 300
    for name, page in pages.items():
        for td in page.root.all("td"):
            assert td.text, (name, "an empty field without a word")


def test_a_cell_without_any_reason_says_that(tmp_path: Path) -> None:
    cell = synthetic.cell_row("badnets", 0.1, "ft", 0, c_acc=0.9, reasons="not json")
    other = synthetic.cell_row("badnets", 0.1, "ft", 1, o_asr=0.1)
    page = read(build([synthetic.write_run(tmp_path / "r", [cell, other], [])], tmp_path / "s").parent / "table.html")
    assert figures(board_rows(page)[0])["o_asr"].text == "no reason given"


def test_what_is_no_success_does_not_look_like_one(pages: dict[str, Page], hostile_run: Path) -> None:
    cells = {names.clean(c["cell"]): c for c in load([hostile_run]).cells}
    seen = set()
    for row in board_rows(pages["table.html"]):
        cell, css = cells[row.attrs["data-cell"]], row.attrs["class"].split()
        status = next(t for t in row.all("td") if t.attrs.get("class") == "status")
        for flag in cell["flags"]:
            assert flag in status.text
            assert flag in status.attrs["data-order"].split(";"), "the CSV of what is shown takes this"
        if "weakling" in cell["attack"]:
            assert "weak" in css
            assert "weak" in status.text
        if "collapsed" in cell["flags"]:
            assert "lost" in css
        if cell["status"] != "ok":
            assert "unmeasured" in css
            seen.add(status.text.partition(":")[0])
        if cell["attack"] != "none" and cell["o_asr"] is not None and cell["o_asr"] > 0.2:
            assert "not purified" in status.text
    assert seen == {"failed", "ran out of time", "ran out of memory", "not run", "not applicable"}


def test_controls_stand_apart(pages: dict[str, Page]) -> None:
    controls = {"none", "clean_model", "exact_purification"}
    first, second = pages["table.html"].by_id("board").all("tbody")
    assert {r.attrs["data-defense"] for r in second.all("tr") if "data-cell" in r.attrs} == controls
    assert not {r.attrs["data-defense"] for r in first.all("tr")} & controls
    marks = pages["index.html"].by_id("board-1-p_asr-title")
    assert marks.name == "title"
    svg = next(t for t in pages["index.html"].root.all("svg") if marks in t.children)
    shapes = {}
    for a in svg.all("a"):
        assert a.all("title")[0].text
        kind = a.attrs["class"]
        shapes[kind] = next(t.name for t in a.children if "mark" in t.attrs.get("class", ""))
    assert shapes == {"defense": "circle", "control": "rect", "oracle": "path"}


def test_tables_are_cut_into_pages(tmp_path: Path) -> None:
    defenses = ["none", "clean_model", *[f"d{i}" for i in range(13)]]
    cells, rows = synthetic.tables(3, ["badnets", "wanet", "sig"], defenses, 6)
    out = build([synthetic.write_run(tmp_path / "r", cells, rows)], tmp_path / "s").parent
    counts, controls, seen = [], [], set()
    for name in ("table.html", "table-2.html"):
        page = read(out / name)
        found = board_rows(page)
        counts.append(len(found))
        controls.append(sum(r.attrs["data-defense"] in ("none", "clean_model") for r in found))
        seen |= {r.attrs["data-cell"] for r in found}
        assert not page.wrong
        assert len(page.text.encode()) < 300_000
        assert [a.attrs["href"] for a in page.root.all("a") if a.text.startswith("Page ")] == [
            "table.html",
            "table-2.html",
        ]
    assert sum(counts) == len(cells)
    assert 150 < counts[0] <= PER_PAGE == 250
    assert controls == [36 - counts[1] if counts[1] < 36 else 0, min(36, counts[1])], "contestants come first"
    assert len(seen) == len(cells)
    assert not (out / "table-3.html").exists()


def test_a_cell_page_has_all_its_measurements_and_how_to_repeat_it(pages: dict[str, Page], hostile_run: Path) -> None:
    results = load([hostile_run])
    for cell in results.cells[:20]:
        page = pages[f"cells/{names.digest12(cell['cell'])}.html"]
        rows = page.by_id("measured").all("tbody")[0].all("tr")
        assert len(rows) == len(results.measured(cell["cell"]))
        command = next(t.text for t in page.root.all("code") if t.text.startswith("sleeperbench run"))
        words = shlex.split(command)
        assert words[:3] == ["sleeperbench", "run", "quick"]
        said = dict(zip(words[3::2], words[4::2], strict=True))
        assert said["--attack"] == cell["attack"].partition("~")[0]
        assert (said["--defense"], said["--seeds"]) == (cell["defense"].partition("~")[0], str(cell["seed"]))


def test_the_gallery_shows_the_pictures(pages: dict[str, Page], site: Path) -> None:
    shown = [(n, t) for n, p in pages.items() for t in p.root.all("img") if n.startswith("cells/")]
    assert len(shown) == 4
    for name, img in shown:
        assert (site / name).parent.joinpath(img.attrs["src"]).read_bytes() == synthetic.png(16, 16, 13)
        assert img.attrs["alt"].startswith("Trigger")


def test_means_on_a_defenses_page_can_be_recomputed(pages: dict[str, Page], hostile_run: Path) -> None:
    cells = [c for c in load([hostile_run]).cells if c["defense"] == "abl" and c["attack"] == "badnets"]
    assert [(c["status"], c["flags"]) for c in cells] == [("ok", ())] * 3
    mean = sum(c["c_acc"] for c in cells) / 3
    table = pages["defenses/abl.html"].by_id("means-1")
    row = next(r for r in table.all("tbody")[0].all("tr") if r.all("th")[0].text.startswith("badnets"))
    td = next(t for t in row.all("td") if t.attrs.get("data-metric") == "c_acc")
    assert float(td.attrs["data-order"]) == pytest.approx(mean)
    assert td.text.startswith(f"{100 * mean:.1f} %")


def test_heat_map_shades_follow_the_figures_over_the_maps_own_range(pages: dict[str, Page]) -> None:
    seen = {}
    for page in (p for n, p in pages.items() if n.startswith("heatmap")):
        scales = [u for u in page.root.all("ul") if u.attrs.get("class") == "scale"]
        tables = [t for t in page.root.all("table") if t.attrs.get("class") == "heat"]
        for table, scale in zip(tables, scales, strict=True):
            tds = [td for td in table.all("td") if td.attrs["data-order"]]
            shaded = [(float(td.attrs["data-order"]), td) for td in tds if td.attrs["class"] != "lost"]
            if not shaded:
                continue
            low, high = min(v for v, _ in shaded), max(v for v, _ in shaded)
            for value, td in shaded:
                level = min(5, int((value - low) / ((high - low) / 6))) if high - low > 1e-9 else 0
                assert td.attrs["class"] == f"h{level}"
                assert " seeds; " in td.attrs["title"] or td.attrs["title"].startswith("1 seed")
            metric = tds[0].attrs["data-metric"]
            seen[metric] = {td.attrs["class"] for _, td in shaded}
            legend = [li.text for li in scale.all("li")]
            assert [s.attrs["class"] for s in scale.all("span")][: len(legend)][0] == "swatch h0"
            if metric in ("c_acc", "o_asr"):
                assert legend[0].startswith(f"{100 * low:.1f}")
                assert legend[5].endswith(f"{100 * high:.1f} %")
                assert legend[6:] == ["all cells failed or collapsed, or the attack did not implant"] * bool(
                    len(tds) > len(shaded)
                )
    assert {"h0", "h5"} <= seen["c_acc"], "accuracies that lie close together differ visibly"
    assert {"h0", "h5"} <= seen["o_asr"]


def test_a_cell_page_leads_to_the_same_cell_under_other_seeds(pages: dict[str, Page], hostile_run: Path) -> None:
    for cell in load([hostile_run]).cells[:30]:
        page = pages[f"cells/{names.digest12(cell['cell'])}.html"]
        others = [cell["cell"].rpartition("/s")[0] + f"/s{s}" for s in range(3) if s != cell["seed"]]
        links = [a.attrs["href"] for a in page.by_id("seeds").all("a")]
        assert links == [f"../cells/{names.digest12(c)}.html" for c in others]


def test_the_foot_of_every_page_says_what_it_is_made_of(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        (foot,) = [p.text for p in page.root.all("footer")[0].all("p") if p.attrs.get("class") == "made"]
        assert foot == (
            f"Built from hostile (2025-01-02, version not recorded); pages by sleeperbench {__version__}. What changed."
        ), name


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """A run and a later one, which is named first: one new defense, one figure and one version moved, one cell lost."""
    folder = tmp_path_factory.mktemp("two")
    first, later = [], []
    for seed in range(2):
        first.append(synthetic.cell_row("badnets", 0.1, "ft", seed, c_acc=0.9, o_asr=0.5, bec=0.25))
        later.append(synthetic.cell_row("badnets", 0.1, "ft", seed, c_acc=0.9, o_asr=0.1, bec=0.5, method_version=2))
        later.append(synthetic.cell_row("badnets", 0.1, "anp", seed, c_acc=0.8, o_asr=0.2))
    later[0] |= {"protocol": "other"}
    first.append(synthetic.cell_row("wanet", 0.1, "ft", 0, c_acc=0.9))
    later.append(synthetic.cell_row("wanet", 0.1, "ft", 0, status="failed", reason="raised: x"))
    dates = [datetime(2025, 3, 1, 23, 5, tzinfo=UTC), datetime(2026, 4, 2, 1, 0, tzinfo=UTC)]
    runs = []
    for name, cells, start in (("old", first, dates[0]), ("new", later, dates[1])):
        rows = [synthetic.measurement(c, "c_acc", value=c["c_acc"], started=start) for c in cells]
        known = [{"kind": "evaluator", "id": "accuracy", "method_version": 3 if name == "old" else 4}]
        info = {"versions": {"sleeperbench": "0.1.0" if name == "old" else "0.2.0"}}
        runs.append(synthetic.write_run(folder / name, cells, rows, known, info))
    site = build(runs[::-1], folder / "site").parent
    return {n: read(site / n) for n in ("index.html", "changelog.html")}


@pytest.mark.parametrize("name", ["index.html", "changelog.html"])
def test_a_later_run_is_compared_with_what_was_measured_before(two_runs: dict[str, Page], name: str) -> None:
    page = two_runs[name]
    newest, oldest = [u for u in page.root.all("ul") if u.attrs.get("class") == "change"]
    assert oldest.text == "3 cells. No run was before it, so there is nothing to compare with."
    said = [li.text for li in newest.children if li.name == "li"]
    assert said[0] == (
        "2 new cells; 2 measured again with the same settings; 1 of a name that an earlier run has under another "
        "protocol, data or parameters, which are not compared."
    )
    assert said[1] == "New methods: anp (defense)."
    assert said[2] == "Other versions: defense ft 1 → 2, evaluator accuracy 3 → 4."
    assert said[3] == "Came out otherwise: 1 measured → failed."
    assert said[4].startswith("2 figures moved: ")
    moved = [li.text for li in newest.all("ul")[1].all("li")]
    assert moved == [
        "digits/small_resnet/badnets@0.1/ft/s1: O-ASR 50.0 % → 10.0 % (-40.0 points, better)",
        "digits/small_resnet/badnets@0.1/ft/s1: BEC 0.25 → 0.5 (+0.25, worse)",
    ]
    foot = page.root.all("footer")[0].text
    assert "Built from new (2026-04-02, sleeperbench 0.2.0), old (2025-03-01, sleeperbench 0.1.0);" in foot


def test_the_changelog_has_dates_and_versions(two_runs: dict[str, Page]) -> None:
    facts = [d.text for d in two_runs["changelog.html"].root.all("dl") if "Measured" in d.text]
    for said, day, version in zip(facts, ("2026-04-02 01:00", "2025-03-01 23:05"), ("0.2.0", "0.1.0"), strict=True):
        assert f"{day[:10]}, tasks started from {day} to {day} (UTC)" in said
        assert f"sleeperbench {version}" in said


K0 = ("); that figure is shown and never taken off", ") implants nothing and is not taken off")
"""What the protocol says of retuning without poisoned images, wherever it speaks of it."""


def commands(pages: dict[str, Page]) -> set[str]:
    """Every command of the benchmark that a page shows."""
    shown = {c.text for p in pages.values() for c in p.root.all("code")}
    return {c for c in shown if c.partition(" ")[0] == "sleeperbench"}


def test_every_command_that_a_page_shows_is_one(pages: dict[str, Page]) -> None:
    from sleeperbench.cli import parser

    known = parser()
    found = commands(pages)
    assert {shlex.split(c)[1] for c in found} == {"list", "check", "run", "site"}
    assert len(found) > 100, "that of each cell among them"
    for command in found:
        try:
            known.parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"no such command: {command}")


def test_the_protocol_tells_the_rules_that_the_kit_and_the_evaluators_follow(pages: dict[str, Page]) -> None:
    import torch

    from sleeperbench.data.cut import VAL_SHARE
    from sleeperbench.data.images import ImageSet
    from sleeperbench.evaluators.ra import RetuningAttack
    from sleeperbench.evaluators.ra_budget import RetuningBudget
    from sleeperbench.kit import candidates, select

    rule = inspect.signature(select.accepts).parameters
    assert rule["drop"].default == pytest.approx(HONEST["drop"] / 100)
    assert rule["level"].default == pytest.approx(HONEST["level"] / 100)
    assert next(n for n in range(1000) if candidates.certifies(n)) == HONEST["rows"]
    classes = tuple("0123456789")
    pixels = torch.zeros(500, 1, 2, 2, dtype=torch.uint8)
    rows = ImageSet(
        images=pixels,
        labels=torch.arange(500) % 10,
        ids=torch.arange(500),
        classes=classes,
        name="digits",
        split="train",
        digest="",
    )
    few = SimpleNamespace(clean=rows, val=rows.rows(torch.arange(100)), ctx=SimpleNamespace(derive=lambda _: 3))
    made, held = candidates.split(few)  # type: ignore[arg-type]
    assert (len(made), len(held)) == (500 - 5 * HONEST["held"], 5 * HONEST["held"])

    assert round(100 * VAL_SHARE) == HONEST["val"]

    budget = RetuningBudget()
    assert ", ".join(map(str, budget.ks)) == BUDGET["ks"]
    assert (budget.draws, RetuningBudget.NEEDS.clean_models) == (BUDGET["draws"], BUDGET["models"])
    assert budget.limit == pytest.approx(BUDGET["limit"] / 100)

    text = pages["protocol.html"].root.all("main")[0].text
    for words in (
        f"stays within {HONEST['drop']} points at the one-sided {HONEST['level']} % bound",
        f"a fixed {HONEST['val']} % of the clean rows where these are at least {HONEST['rows']}",
        f"otherwise {HONEST['held']} % of them",
        f"the largest k of {BUDGET['ks']} at which",
        f"over {BUDGET['models']} clean models and {BUDGET['draws']} draws",
    ):
        assert words in text
    assert "fold" not in text.replace("folder", "")
    (net,) = [m for m in RetuningAttack.METRICS if m.name == "p_asr_net"]
    assert "three controls" in net.doc
    assert text.count("largest of these three controls") == 1
    assert "these four" not in text
    for found, words in zip(re.finditer("k = 0", text), K0, strict=True):
        assert text[found.end() :].startswith(words)
