from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq
import pytest
import synthetic
from page_reader import Page, Tag, read
from synthetic import HOSTILE_DEFENSE, JS_LINK

from sleeperbench.errors import BadInput
from sleeperbench.leaderboard import names
from sleeperbench.leaderboard.build import CSP, build
from sleeperbench.leaderboard.pages import PER_PAGE
from sleeperbench.leaderboard.tables import load
from sleeperbench.schema import CELLS, HEADLINE_METRICS, MEASUREMENTS, arrow


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def board_rows(page: Page) -> list[Tag]:
    return [r for r in page.by_id("board").all("tr") if "data-cell" in r.attrs]


def figures(row: Tag) -> dict[str, Tag]:
    return {t.attrs["data-metric"]: t for t in row.all("td") if "data-metric" in t.attrs}


def test_all_promised_pages_are_there(site: Path, hostile_run: Path) -> None:
    have = set(files(site))
    wanted = ["index", "table", "heatmap", "compare", "protocol", "submit", "changelog"]
    assert {f"{p}.html" for p in wanted} <= have
    assert {f"downloads/{t}.{e}" for t in ("cells", "measurements") for e in ("parquet", "csv")} <= have
    assert {"cite.bib", "defenses/unlearn-ft.html", "attacks/blended.html", "datasets/digits.html"} <= have
    assert {f"metrics/{m}.html" for m in (*HEADLINE_METRICS, "det_tpr")} <= have
    for cell in load([hostile_run]).cells:
        assert f"cells/{names.digest12(cell['cell'])}.html" in have


def test_two_builds_are_equal_to_the_byte(site: Path, hostile_run: Path, tmp_path: Path) -> None:
    build([hostile_run], tmp_path / "again")
    assert files(tmp_path / "again") == files(site)


def test_pages_are_well_formed(pages: dict[str, Page]) -> None:
    assert {name: p.wrong for name, p in pages.items() if p.wrong} == {}
    for name, p in pages.items():
        ids = [t.attrs["id"] for t in p.tags if "id" in t.attrs]
        assert len(ids) == len(set(ids)), name
        assert len(p.root.all("h1")) == len(p.root.all("main")) == 1, name


def test_hostile_text_is_inert(pages: dict[str, Page]) -> None:
    shown = 0
    for name, page in pages.items():
        scripts = [t for t in page.tags if t.name == "script"]
        assert len(scripts) == 1, name
        assert re.fullmatch(r"(\.\./)?assets/board\.[0-9a-f]{8}\.js", scripts[0].attrs["src"])
        assert scripts[0].text == ""
        for t in page.tags:
            assert t.name not in ("style", "iframe", "object", "embed", "form", "base"), name
            assert not [a for a in t.attrs if a.startswith("on") or a in ("style", "srcdoc", "action")], (name, t)
            for a in ("href", "src"):
                assert not re.match(r"\s*(javascript|data|vbscript):", t.attrs.get(a, ""), re.IGNORECASE), (name, t)
        shown += page.root.text.count("<script>alert(1)</script>")
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u0007]", page.text), name
    assert shown > 50, "the strings are there to be read"


def test_every_page_has_the_policy_before_anything_is_loaded(pages: dict[str, Page]) -> None:
    for page in pages.values():
        metas = [t for t in page.tags if t.attrs.get("http-equiv") == "Content-Security-Policy"]
        assert [t.attrs["content"] for t in metas] == [CSP]
        first_load = min(i for i, t in enumerate(page.tags) if t.name in ("link", "script", "img"))
        assert page.tags.index(metas[0]) < first_load
    assert "'unsafe" not in CSP
    assert CSP.startswith("default-src 'none';")


def test_nothing_is_loaded_from_another_host_and_every_link_resolves(pages: dict[str, Page], site: Path) -> None:
    outside = set()
    for name, page in pages.items():
        for t in page.tags:
            for a in ("href", "src"):
                target = t.attrs.get(a)
                if target is None:
                    continue
                parts = urlsplit(target)
                if parts.scheme or parts.netloc:
                    assert t.name == "a", (name, target)
                    assert parts.scheme == "https"
                    assert "noopener" in t.attrs["rel"]
                    outside.add(target)
                elif parts.path:
                    assert (site / name).parent.joinpath(unquote(parts.path)).resolve().is_file(), (name, target)
                else:
                    assert any(x.attrs.get("id") == parts.fragment for x in page.tags), (name, target)
    assert outside == {"https://example.org/badnets", "https://ok.example.org/a?b=1&c=2"}


def test_a_link_that_is_refused_is_still_shown(pages: dict[str, Page]) -> None:
    assert JS_LINK in pages[f"defenses/{names.file_name(HOSTILE_DEFENSE)}.html"].root.text


def test_style_and_script_ask_no_other_host(site: Path) -> None:
    for asset in (site / "assets").iterdir():
        text = asset.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "//" not in re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE).replace("://", "//")
        assert asset.name.split(".")[1] == hashlib.sha256(asset.read_bytes()).hexdigest()[:8]
        for word in ("eval(", "innerHTML", "new Function", "@import", "url(", "fetch(", "document.write"):
            assert word not in text


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
            assert f"{m['count']} of {m['total']} images" in td.attrs["title"]
            seen += 1
    assert seen > 100


def test_every_empty_figure_says_why(pages: dict[str, Page], hostile_run: Path) -> None:
    cells = {names.clean(c["cell"]): c for c in load([hostile_run]).cells}
    empty = 0
    for row in board_rows(pages["table.html"]):
        reasons = cells[row.attrs["data-cell"]]["reasons"]
        for metric, td in figures(row).items():
            if td.attrs["data-order"]:
                continue
            empty += 1
            word, _, detail = reasons[metric].partition(":")
            assert td.text == word.replace("_", " ")[:28]
            assert word.replace("_", " ") in td.attrs["title"]
            assert names.clean(detail.strip()) in td.attrs["title"]
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
    defenses = ["none", "clean_model", *[f"d{i}" for i in range(30)]]
    cells, rows = synthetic.tables(3, ["badnets", "wanet", "sig"], defenses, 6)
    out = build([synthetic.write_run(tmp_path / "r", cells, rows)], tmp_path / "s").parent
    counts, seen = [], set()
    for name in ("table.html", "table-2.html", "table-3.html"):
        page = read(out / name)
        found = board_rows(page)
        counts.append(len(found))
        seen |= {r.attrs["data-cell"] for r in found}
        assert not page.wrong
        assert [a.attrs["href"] for a in page.root.all("a") if a.text.startswith("Page ")] == [
            "table.html",
            "table-2.html",
            "table-3.html",
        ]
    assert counts == [PER_PAGE, PER_PAGE, len(cells) - 2 * PER_PAGE]
    assert len(seen) == len(cells)
    assert not (out / "table-4.html").exists()


def test_a_cell_page_has_all_its_measurements_and_how_to_repeat_it(pages: dict[str, Page], hostile_run: Path) -> None:
    results = load([hostile_run])
    for cell in results.cells[:20]:
        page = pages[f"cells/{names.digest12(cell['cell'])}.html"]
        rows = page.by_id("measured").all("tbody")[0].all("tr")
        assert len(rows) == len(results.measured(cell["cell"]))
        command = next(t.text for t in page.root.all("code") if t.text.startswith("sleeperbench run"))
        words = shlex.split(command)
        assert words[:3] == ["sleeperbench", "run", "quick"]
        assert re.sub(r"\[(.)\]", r"\1", words[words.index("--only") + 1]) == cell["cell"]


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


def test_the_suites_secret_is_not_published(site: Path) -> None:
    assert not [n for n, data in files(site).items() if b"do-not-show-this" in data]


def test_downloads_hold_the_tables(site: Path, hostile_run: Path) -> None:
    for name, columns, keys in (
        ("cells", CELLS, ["cell"]),
        ("measurements", MEASUREMENTS, ["cell", "task_key", "metric", "qualifier"]),
    ):
        mine = pq.read_table(site / "downloads" / f"{name}.parquet")
        order = [(k, "ascending") for k in keys]
        assert mine.schema.equals(arrow(columns), check_metadata=True)
        assert mine.sort_by(order).equals(pq.read_table(hostile_run / f"{name}.parquet").sort_by(order))
        assert mine.schema.metadata[b"sleeperbench.schema"] == b"1"
        with (site / "downloads" / f"{name}.csv").open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert len(rows) == len(mine)
        assert list(rows[0]) == mine.column_names
    with (site / "downloads" / "cells.csv").open(newline="", encoding="utf-8") as f:
        assert [r["attack_params"] for r in csv.DictReader(f) if "calc" in r["attack_params"]] == [
            "'=cmd|' /C calc'!A0"
        ]


def test_the_bibliography_has_every_entry_once(site: Path) -> None:
    text = (site / "cite.bib").read_text()
    assert text.count("@misc{sleeperbench,") == text.count("@misc{b}") == 1


def test_the_manifest_lists_every_file(site: Path) -> None:
    lines = [line.split("  ") for line in (site / "SHA256SUMS").read_text().splitlines()]
    have = {n: hashlib.sha256(d).hexdigest() for n, d in files(site).items() if n != "SHA256SUMS"}
    assert {n: d for d, n in lines} == have


def test_a_smaller_site_leaves_no_page_of_the_larger_one(tmp_path: Path) -> None:
    large = synthetic.write_run(tmp_path / "l", *synthetic.tables(1, ["badnets", "sig"], ["none", "ft"], 1))
    small = synthetic.write_run(tmp_path / "s", *synthetic.tables(1, ["badnets"], ["none", "ft"], 1))
    build([large], tmp_path / "out")
    (tmp_path / "out" / "CNAME").write_text("mine")
    build([small], tmp_path / "out")
    build([small], tmp_path / "fresh")
    kept = files(tmp_path / "out")
    assert kept.pop("CNAME") == b"mine"
    assert kept == files(tmp_path / "fresh")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "r", *synthetic.tables(1, ["badnets"], ["none"], 1))
    (tmp_path / "victim").write_text("here")
    (tmp_path / "out").mkdir()
    lines = [f"{'0' * 64}  {p}\n" for p in ("../victim", f"{tmp_path}/victim", "a/../../victim")]
    (tmp_path / "out" / "SHA256SUMS").write_text("".join(lines))
    build([run], tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "here"


def test_someone_elses_index_is_not_overwritten(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "r", *synthetic.tables(1, ["badnets"], ["none"], 1))
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(BadInput, match="did not write"):
        build([run], tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"


def test_a_run_without_cells_gives_a_site(tmp_path: Path) -> None:
    page = read(build([synthetic.write_run(tmp_path / "r", [], [])], tmp_path / "s"))
    assert "The runs hold no cells." in page.root.text
    assert not page.wrong


def test_neither_torch_nor_matplotlib_is_imported(hostile_run: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys; from sleeperbench.cli import main;"
        f"code = main(['site', '--results', {str(hostile_run)!r}, '--out', {str(tmp_path / 's')!r}]);"
        "print(json.dumps([code, [m for m in ('torch', 'matplotlib', 'sklearn') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    site_line, report = done.stdout.splitlines()
    assert json.loads(report) == [0, []]
    assert site_line == f"site: {(tmp_path / 's' / 'index.html').resolve()}"
