"""What a defense took stands on its cells' pages, on its own page and beside its means, and only where it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from page_reader import Page, Tag, figures, read
from synthetic import cell_row, measurement, write_run

from sleeperbench.leaderboard import names
from sleeperbench.leaderboard.build import build
from sleeperbench.leaderboard.entries import _libraries

TOOK = {0: (12.0, 10.0, 100), 1: (64.0, 60.0, 900), 2: (22.0, 20.0, 300)}
"""Seed -> wall seconds, processor seconds and images forward of ft."""
PLUGINS = [{"kind": "defense", "id": "ft", "title": "FT", "info": {"kind": "repair"}}]


def cells(costs: bool) -> tuple[list[Any], list[Any]]:
    made, rows = [], []
    for seed, (wall, cpu, forwards) in TOOK.items():
        made.append(cell_row("badnets", 0.1, "none", seed, c_acc=0.95, o_asr=0.99))
        cell = cell_row("badnets", 0.1, "ft", seed, c_acc=0.94, o_asr=0.02, p_asr=0.5)
        made.append(cell)
        rows.append(measurement(cell, "c_acc", value=0.94))
        if not costs:
            continue
        took = {"seconds": wall, "cpu_seconds": cpu, "peak_mb": 700.0, "forwards": forwards, "backwards": 50}
        rows.append(measurement(cell, "cost_forwards", value=float(forwards), evaluator="cost", **took, queries=7))
        # A part of it is another figure and must not take its place.
        part = took | {"seconds": 1e6, "cpu_seconds": 1e6, "forwards": 10**9}
        rows.append(
            measurement(cell, "cost_forwards", value=1e9, evaluator="cost", qualifier="phase=run", **part, task_key="p")
        )
    return made, rows


def built(folder: Path, costs: bool) -> dict[str, Page]:
    site = build([write_run(folder / "run", *cells(costs), PLUGINS)], folder / "site").parent
    return {p.relative_to(site).as_posix(): read(p) for p in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    return built(tmp_path_factory.mktemp("cost"), True)


def line(pages: dict[str, Page], defense: str) -> Tag:
    rows = [r for r in pages["tracks.html"].by_id("board-1").all("tr") if r.all("td")]
    return next(r for r in rows if r.all("th")[0].text.startswith(defense))


def test_beside_the_means_stands_the_median_and_not_the_mean(pages: dict[str, Page]) -> None:
    field = figures(line(pages, "ft"))["cpu_seconds"]
    assert float(field.attrs["data-order"]) == 20.0
    assert field.text.split() == ["20", "357", "images"]  # 300 forward, 50 backward, 7 asked about
    assert "22 s of wall time" in field.attrs["title"]
    assert "empty" in figures(line(pages, "none"))["cpu_seconds"].attrs["class"]


def test_the_defenses_page_has_the_medians_of_its_cells(pages: dict[str, Page]) -> None:
    (row,) = [r for r in pages[f"defenses/{names.file_name('ft')}.html"].by_id("took").all("tr") if r.all("td")]
    assert [t.text for t in row.all("td")] == ["ft", "3", "22", "20", "700", "300", "50", "7"]


def test_a_cells_page_has_its_own(pages: dict[str, Page]) -> None:
    page = pages[f"cells/{names.digest12('digits/small_resnet/badnets@0.1/ft/s1')}.html"]
    said = "64 s (60 s of processor time), 700 MB at most, 900 images forward, 50 backward, 7 asked about"
    assert said in page.text
    undefended = pages[f"cells/{names.digest12('digits/small_resnet/badnets@0.1/none/s1')}.html"]
    assert "not measured: evaluator cost is not in the suite" in undefended.text


def test_no_column_and_no_table_where_nobody_measured_it(tmp_path: Path) -> None:
    plain = built(tmp_path, False)
    assert "cpu_seconds" not in figures(line(plain, "ft"))
    assert "What it takes" not in plain[f"defenses/{names.file_name('ft')}.html"].text


def test_libraries_are_named_once_and_not_as_json(pages: dict[str, Page]) -> None:
    page = pages[f"cells/{names.digest12('digits/small_resnet/badnets@0.1/ft/s1')}.html"]
    assert "torch 2" in page.text
    assert '{"torch"' not in page.text


@pytest.mark.parametrize("env", ["", "no json", "[1]", '{"a": '])
def test_an_odd_environment_is_shown_as_it_is(env: str) -> None:
    assert _libraries(env) == env
