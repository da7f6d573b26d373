from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import synthetic
from page_reader import Page, board_rows, figures, read

from sleeperbench.leaderboard import names
from sleeperbench.leaderboard.build import build
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


def test_heat_map_shades_follow_the_figures(pages: dict[str, Page]) -> None:
    seen = set()
    for table in pages["heatmap.html"].root.all("table"):
        for td in table.all("td"):
            if td.attrs["data-metric"] == "o_asr" and td.attrs["data-order"]:
                value = float(td.attrs["data-order"])
                assert td.attrs["class"] == f"h{min(5, int(value * 6))}"
                seen.add(td.attrs["class"])
    assert len(seen) >= 3
