"""The table of all cells as a visitor uses it: sort, facets, search, links, columns, files, keyboard, no script."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from playwright.sync_api import Page, expect
from visiting import ROWS_A_PAGE, Board, Open

FACETS = ["Data set", "Architecture", "Attack", "Rate", "Defense", "Access", "Status"]


def open_table(visit: Open, state: str = "", **options: Any) -> Page:
    page = visit("table.html" + (f"#{state}" if state else ""), **options)
    page.locator("#board[data-ready]").wait_for()
    return page


def names(page: Page) -> list[str]:
    """Names of the cells on the page, in their order."""
    return page.locator("#board tbody tr[data-cell]").evaluate_all("rows => rows.map((r) => r.dataset.cell)")


def every_name(page: Page) -> list[str]:
    """The same over all pages of what is shown."""
    found = names(page)
    while page.locator("#pager .next:not([aria-disabled])").is_visible():
        page.get_by_role("link", name="Next").click()
        found += names(page)
    return found


def figures(page: Page, metric: str) -> list[str]:
    return page.locator(f"#board tbody td[data-metric={metric}]").evaluate_all("all => all.map((t) => t.dataset.order)")


def sort_button(page: Page, metric: str) -> Any:
    return page.locator(f"#board thead th[data-metric={metric}]").get_by_role("button")


def facet_of(page: Page, name: str) -> Any:
    return page.get_by_role("combobox", name=re.compile(f"^{name}"))


def search_of(page: Page) -> Any:
    return page.get_by_role("searchbox", name="Search")


def choose(page: Page, facet: str, value: str) -> None:
    facet_of(page, facet).select_option(f"={value}")


def saved(page: Page, button: str) -> str:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    return Path(download.value.path()).read_text(encoding="utf-8")


def shown(page: Page) -> int:
    text = page.locator("#shown").inner_text()
    found = re.search(r"\d+", text)
    assert found, text
    return int(found[0])


def every_column(board: Board) -> int:
    return (board.folder / "table.html").read_text(encoding="utf-8").count('<th scope="col"')


def usual_columns(board: Board) -> int:
    """Columns that are shown at first."""
    hidden = (board.folder / "table.html").read_text(encoding="utf-8").count('data-off="true"')
    assert hidden > 0
    return every_column(board) - hidden


def is_contestant(cell: dict[str, Any]) -> bool:
    return cell["defense"] not in ("none", "clean_model", "exact_purification")


def is_void(cell: dict[str, Any]) -> bool:
    """Its attack did not implant, or its defense ruined the model: whatever it measures is no success."""
    return "weak" in cell["flag"] or "collapsed" in cell["flag"]


def test_the_page_stands_as_made_until_something_is_chosen(visit: Open, board: Board) -> None:
    page = open_table(visit)
    made = visit("table.html", java_script_enabled=False)
    assert names(page) == [unquote(n) for n in names(made)] != []
    assert len(names(page)) == ROWS_A_PAGE
    assert shown(page) == len(board.cells)
    expect(page.locator("#static-pages")).to_be_visible()
    expect(page.locator("#pager")).to_be_hidden()
    fields = page.locator("#board tbody tr[data-cell]").first.locator("th:visible, td:visible")
    expect(fields).to_have_count(usual_columns(board))
    assert page.locator("#board tbody tr").filter(has_not_text=re.compile(r"against|Controls")).count() == 0
    sort_button(page, "c_acc").click()
    expect(page.locator("#static-pages")).to_be_hidden()
    expect(page.locator("#pager")).to_be_visible()
    assert 0 < len(names(page)) < ROWS_A_PAGE


def test_controls_stand_under_a_heading_of_their_own(visit: Open, board: Board) -> None:
    page = open_table(visit, "attack=badnets&dataset=gtsrb")
    order = {c["cell"]: c for c in board.cells}
    contestants = page.locator("#board tbody:not(.controls) tr[data-cell]").all()
    others = page.locator("#board tbody.controls tr[data-cell]").all()
    assert all(is_contestant(order[r.get_attribute("data-cell") or ""]) for r in contestants)
    assert not any(is_contestant(order[r.get_attribute("data-cell") or ""]) for r in others)
    assert len(contestants) > 2
    assert len(others) == 3
    heading = page.locator("#board tbody.controls tr").first.locator("th[scope=rowgroup]")
    expect(heading).to_have_text("Controls and oracles: not contestants")
    assert heading.get_attribute("colspan") == str(usual_columns(board))
    choose(page, "Defense", "ft")
    expect(page.locator("#board tbody.controls")).to_have_count(0)


def test_how_many_rows_are_shown_is_said_aloud(visit: Open, board: Board) -> None:
    page = open_table(visit)
    line = page.get_by_role("status")
    expect(line).to_have_attribute("aria-live", "polite")
    choose(page, "Data set", "digits")
    wanted = sum(c["dataset"] == "digits" for c in board.cells)
    expect(line).to_have_text(f"{wanted} of {len(board.cells)} cells, here 1 to 25")
    page.get_by_role("link", name="Page 2").click()
    expect(line).to_have_text(f"{wanted} of {len(board.cells)} cells, here 26 to 50")
    assert page.evaluate("document.activeElement.textContent") == "2"
    expect(page.get_by_role("link", name="Page 2")).to_have_attribute("aria-current", "page")


def test_a_link_in_a_heading_leads_to_its_metric_and_sorts_nothing(visit: Open) -> None:
    page = open_table(visit)
    page.locator("#board th[data-metric=c_acc] a").click()
    page.wait_for_url("**/metrics/c_acc.html")
    page.go_back()
    page.locator("#board[data-ready]").wait_for()
    assert page.evaluate("location.hash") == ""
    page.locator("#board th[data-metric=c_acc] a").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/metrics/c_acc.html")


def test_a_click_sorts_all_cells_by_a_figure(visit: Open, board: Board) -> None:
    page = open_table(visit)
    sort_button(page, "c_acc").click()
    expect(page.locator("#board th[data-metric=c_acc]")).to_have_attribute("aria-sort", "descending")
    best = max(c["c_acc"] for c in board.cells if c["c_acc"] is not None and is_contestant(c) and not is_void(c))
    first = [float(v) for v in figures(page, "c_acc") if v]
    assert first[0] == best
    assert first == sorted(first, reverse=True)
    sort_button(page, "c_acc").click()
    expect(page.locator("#board th[data-metric=c_acc]")).to_have_attribute("aria-sort", "ascending")
    order = {c["cell"]: c for c in board.cells}
    everything = every_name(page)
    assert sorted(everything) == sorted(order)
    # Contestants come before controls, and empty fields last in either order.
    groups = [[order[n] for n in everything if is_contestant(order[n]) is kind] for kind in (True, False)]
    assert [is_contestant(order[n]) for n in everything] == sorted(map(is_contestant, board.cells), reverse=True)
    for group in groups:
        values = [c["c_acc"] for c in group]
        numbers = [v for v in values if v is not None]
        assert values[len(numbers) :] == [None] * (len(values) - len(numbers))
        # What is no success comes after what is one, though a ruined model's ASR is the lowest of all.
        real = [c["c_acc"] for c in group[: len(numbers)] if not is_void(c)]
        void = [c["c_acc"] for c in group[: len(numbers)] if is_void(c)]
        assert numbers == sorted(real) + sorted(void)
        assert real
    assert any(is_void(c) and c["c_acc"] is not None for c in groups[0])


def test_ruined_models_never_lead_the_attack_success(visit: Open, board: Board) -> None:
    order = {c["cell"]: c for c in board.cells}
    page = open_table(visit, "sort=o_asr:up")
    filled = [order[n] for n in every_name(page) if is_contestant(order[n]) and order[n]["o_asr"] is not None]
    void = [is_void(c) for c in filled]
    assert void == sorted(void)
    assert min(c["o_asr"] for c in filled if is_void(c)) < min(c["o_asr"] for c in filled if not is_void(c))


def test_words_sort_too(visit: Open) -> None:
    page = open_table(visit, "dataset=gtsrb")
    page.locator("#board thead th", has_text="Defense against attack").get_by_role("button").click()
    expect(page.locator("#board thead th").first).to_have_attribute("aria-sort", "ascending")
    contestants = page.locator("#board tbody:not(.controls) tr[data-cell]")
    shown = contestants.evaluate_all("r => r.map((x) => x.dataset.defense)")
    assert shown == sorted(shown)
    assert len(set(shown)) > 1


HOLDS: dict[tuple[str, str], Callable[[dict[str, Any]], bool]] = {
    ("Data set", "gtsrb"): lambda c: c["dataset"] == "gtsrb",
    ("Architecture", "small_resnet"): lambda c: c["arch"] == "small_resnet",
    ("Attack", "wanet"): lambda c: c["attack"] == "wanet",
    ("Rate", "no rate"): lambda c: c["rate"] is None,
    ("Defense", "unlearn:ft"): lambda c: c["defense"] == "unlearn:ft",
    ("Access", "T4"): lambda c: c["access"] == "T4",
}


def test_a_facet_keeps_what_it_names(visit: Open, board: Board) -> None:
    page = open_table(visit)
    for (facet, value), holds in HOLDS.items():
        choose(page, facet, value)
        wanted = sorted(c["cell"] for c in board.cells if holds(c))
        assert 0 < len(wanted) < len(board.cells)
        assert sorted(every_name(page)) == wanted
        assert shown(page) == len(wanted)
        page.get_by_role("button", name="Clear").click()


def test_facets_and_search_narrow_together_and_clear_undoes_them(visit: Open, board: Board) -> None:
    page = open_table(visit)
    for facet in FACETS:
        expect(facet_of(page, facet)).to_be_visible()
    choose(page, "Attack", "badnets")
    choose(page, "Data set", "digits")
    search_of(page).fill("UNLEARN s2")
    wanted = [
        c["cell"]
        for c in board.cells
        if (c["attack"], c["dataset"], c["defense"], c["seed"]) == ("badnets", "digits", "unlearn:ft", 2)
    ]
    expect(page.locator("#board tbody tr[data-cell]")).to_have_count(len(wanted))
    assert names(page) == wanted
    page.get_by_role("button", name="Clear").click()
    assert shown(page) == len(board.cells)
    assert search_of(page).input_value() == ""


def test_nothing_found_is_said(visit: Open) -> None:
    page = open_table(visit)
    search_of(page).fill("no such cell")
    expect(page.locator("#shown")).to_contain_text("0 of")
    expect(page.locator("#board tbody")).to_contain_text("No cell")


def test_a_link_shows_the_same_view_elsewhere(visit: Open) -> None:
    page = open_table(visit)
    choose(page, "Attack", "blended~a1b2c3")
    search_of(page).fill("digits")
    sort_button(page, "bec").click()
    page.locator("details.columns > summary").click()
    page.locator("#column-list").get_by_label("Architecture").uncheck()
    page.wait_for_url(re.compile("#.*q=digits.*columns="))
    there = visit("table.html" + page.evaluate("location.hash"))
    there.locator("#board[data-ready]").wait_for()
    assert names(there) == names(page) != []
    assert facet_of(there, "Attack").input_value() == "=blended~a1b2c3"
    assert search_of(there).input_value() == "digits"
    expect(there.locator("#board th[data-metric=bec]")).to_have_attribute("aria-sort", "descending")
    expect(there.locator("#board thead th", has_text="Architecture")).to_have_count(0)
    # Going back within the page follows the address as well.
    there.evaluate("location.hash = 'attack=wanet'")
    expect(there.locator("#board tbody tr[data-cell]").first).to_have_attribute("data-attack", "wanet")


def test_a_broken_link_shows_everything(visit: Open, board: Board) -> None:
    page = open_table(visit, "attack=%3Cscript%3E&sort=nothing:down&columns=none&page=0&q=")
    assert names(page)
    assert page.locator("#board thead th").count() == usual_columns(board)
    assert page.locator("#board thead th[data-off]").count() == 0


def test_columns_can_be_chosen(visit: Open, board: Board) -> None:
    page = open_table(visit)
    heads = page.locator("#board thead th")
    assert heads.count() == usual_columns(board)
    page.locator("details.columns > summary").click()
    page.get_by_role("button", name="Main columns").click()
    main = [h.inner_text() for h in heads.all()]
    assert 9 < len(main) < every_column(board)
    widths = page.locator("#board tbody tr[data-cell]").evaluate_all("r => r.map((x) => x.cells.length)")
    assert set(widths) == {len(main)}
    page.locator("#column-list").get_by_label("Seed").uncheck()
    expect(heads.filter(has_text="Seed")).to_have_count(0)
    assert "Seed" not in saved(page, "CSV of what is shown").splitlines()[0].title()
    page.get_by_role("button", name="All columns").click()
    expect(heads).to_have_count(every_column(board))
    assert page.locator("#board tbody tr[data-cell] td a[href^='defenses/']").count() > 0
    page.get_by_role("button", name="Usual columns").click()
    expect(heads.filter(has_text="Seed")).to_be_visible()
    assert heads.count() == usual_columns(board) < every_column(board)


def test_the_first_figures_are_in_view_at_1200_pixels(visit: Open) -> None:
    for state in ("", "sort=c_acc:down"):
        page = open_table(visit, state, viewport={"width": 1200, "height": 900})
        for metric in ("c_acc", "asr", "p_asr"):
            box = page.locator(f"#board thead th[data-metric={metric}]").bounding_box()
            assert box
            assert box["x"] + box["width"] <= 1200, metric
        assert page.locator("#board tbody th[scope=row]").first.inner_text().count(" against ") == 1


def test_the_csv_is_the_table_that_is_shown(visit: Open, board: Board) -> None:
    page = open_table(visit, "dataset=digits")
    choose(page, "Defense", "anp")
    sort_button(page, "p_asr").click()
    rows = list(csv.DictReader(io.StringIO(saved(page, "CSV of what is shown"), newline="")))
    cells = {c["cell"]: c for c in board.cells}
    assert [r["cell"] for r in rows] == every_name(page)
    assert {r["cell"] for r in rows} == {
        c["cell"] for c in board.cells if c["dataset"] == "digits" and c["defense"] == "anp"
    }
    metrics = page.locator("#board thead th[data-metric]").evaluate_all(
        "all => all.filter((t) => t.offsetParent).map((t) => t.dataset.metric)"
    )
    figures = 0
    for row in rows:
        cell = cells[row["cell"]]
        for name in ("dataset", "arch", "attack", "defense", "access"):
            assert row[name] == cell[name]
        assert int(row["seed"]) == cell["seed"]
        assert (float(row["rate"]) if row["rate"] else None) == cell["rate"]
        assert row["status"].startswith(cell["status"])
        for metric in metrics:
            if cell[metric] is None:
                assert row[metric] == ""
                assert f"{metric}: " in row["empty_because"]
            else:
                assert math.isclose(float(row[metric]), float(cell[metric]), rel_tol=1e-12)
                figures += 1
        if cell["c_acc"] is not None and row["c_acc_low"]:
            assert float(row["c_acc_low"]) <= cell["c_acc"] <= float(row["c_acc_high"])
    assert figures > 20


def test_hostile_text_stays_text_in_the_table_and_in_its_csv(visit: Open, board: Board) -> None:
    page = open_table(visit, "q=%3Cscript%3E")
    hostile = sorted(c["cell"] for c in board.cells if "<script>" in c["defense"])
    assert sorted(every_name(page)) == hostile != []
    assert page.locator("#board script, #board img").count() == 0
    rows = list(csv.DictReader(io.StringIO(saved(page, "CSV of what is shown"), newline="")))
    assert {r["defense"] for r in rows} == {c["defense"] for c in board.cells if "<script>" in c["defense"]}


def test_bibtex_is_of_what_is_shown(visit: Open) -> None:
    page = open_table(visit)
    choose(page, "Attack", "badnets")
    choose(page, "Defense", "anp")
    with_badnets = saved(page, "BibTeX of what is shown")
    assert "@misc{sleeperbench" in with_badnets
    assert "@misc{b}" in with_badnets
    choose(page, "Attack", "wanet")
    assert "@misc{b}" not in saved(page, "BibTeX of what is shown")


def test_the_keyboard_reaches_a_heading_and_sorts(visit: Open) -> None:
    page = open_table(visit)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('th[data-metric=c_acc] [role=button]')"):
            break
    else:
        raise AssertionError("Tab never came to the button of C-Acc")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    before = figures(page, "c_acc")
    page.keyboard.press("Enter")
    expect(page.locator("#board th[data-metric=c_acc]")).to_have_attribute("aria-sort", "descending")
    after = [float(v) for v in figures(page, "c_acc") if v]
    assert after == sorted(after, reverse=True)
    assert figures(page, "c_acc") != before
    assert page.evaluate("document.activeElement.closest('th')?.dataset.metric") == "c_acc"
    page.keyboard.press("Space")
    expect(page.locator("#board th[data-metric=c_acc]")).to_have_attribute("aria-sort", "ascending")


def test_every_row_leads_to_its_cell(visit: Open, board: Board) -> None:
    page = open_table(visit, "attack=badnets&defense=ft&dataset=gtsrb")
    name = names(page)[0]
    page.locator("#board tbody tr[data-cell] th a").first.click()
    expect(page.locator("h1")).to_contain_text("ft")
    expect(page.locator("main code").first).to_have_text(name)


def test_without_script_the_pages_hold_every_cell(visit: Open, board: Board) -> None:
    page = visit("table.html", java_script_enabled=False)
    expect(page.locator("#filters")).to_be_hidden()
    expect(page.locator("#pager")).to_be_hidden()
    seen = []
    while True:
        here = page.locator("#board tbody tr[data-cell]")
        assert 0 < here.count() <= ROWS_A_PAGE
        seen += [unquote(r.get_attribute("data-cell") or "") for r in here.all()]
        assert page.locator("#board tbody td.empty").filter(has_not_text=re.compile(r"\w")).count() == 0
        following = page.locator("#static-pages a[aria-current] >> xpath=../following-sibling::li[1]/a")
        if not following.count():
            break
        with page.expect_navigation():
            following.click()
    assert sorted(seen) == sorted(c["cell"] for c in board.cells)
    assert len(seen) > 2 * ROWS_A_PAGE
