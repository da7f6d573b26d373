"""Two to five defenses held against each other, as a visitor chooses them."""

from __future__ import annotations

import math
import re
from typing import Any

from playwright.sync_api import Page, expect
from visiting import Board, Open


def open_compare(visit: Open, state: str = "") -> Page:
    page = visit("compare.html" + (f"#{state}" if state else ""))
    page.locator("#compare").wait_for()
    return page


def box(page: Page, name: str) -> Any:
    return page.locator(f"#compare-choice input[data-defense='{name}']")


def percent(text: str) -> float:
    found = re.search(r"-?\d+\.\d+", text.replace("\u2212", "-"))
    assert found, text
    return float(found[0])


def headings(page: Page, table: str) -> list[str]:
    return [t.strip() for t in page.locator(f"#{table} thead th").all_inner_texts()]


def test_two_defenses_are_compared_on_the_same_models(visit: Open) -> None:
    page = open_compare(visit)
    expect(page.locator("#compare-said")).to_contain_text("choose at least 2")
    assert page.locator("#compare-result table").count() == 0
    box(page, "anp").check()
    box(page, "ft").check()
    pair = page.locator("#compared tbody tr")
    expect(pair).to_have_count(1)
    difference = percent(pair.locator("td").nth(1).inner_text())
    # The table of single models must give the same difference: the mean over attacks of means over seeds.
    gaps: dict[str, list[float]] = {}
    for row in page.locator("#compared-units tbody tr").all():
        attack, fields = row.locator("th").inner_text(), row.locator("td").all_inner_texts()
        if any("no score" in f for f in fields):
            continue
        first, second, gap = map(percent, fields[1:4])
        assert math.isclose(second - first, gap, abs_tol=0.11)
        gaps.setdefault(attack, []).append(first - second)
    assert len(gaps) > 1
    means = [sum(g) / len(g) for g in gaps.values()]
    assert math.isclose(sum(means) / len(means), difference, abs_tol=0.11)
    models = sum(len(g) for g in gaps.values())
    assert int(pair.locator("td").nth(2).inner_text()) == models
    assert sum(int(pair.locator("td").nth(k).inner_text()) for k in (3, 4, 5)) == models


def test_five_are_the_most_and_all_their_pairs_are_shown(visit: Open) -> None:
    page = open_compare(visit)
    inputs = page.locator("#compare-choice input")
    assert inputs.count() >= 5
    for k in range(5):
        inputs.nth(k).check()
    expect(page.locator("#compared tbody tr")).to_have_count(10)
    assert page.locator("#compare-choice input:checked").count() == 5
    assert page.locator("#compare-choice input:not(:checked):not(:disabled)").count() == 0
    assert len(headings(page, "compared-means")) == 6
    diagram = page.locator("#compare-result svg.chart")
    assert diagram.locator("a title").count() == 5
    ranks = [percent(t.split("rank")[1]) for t in diagram.locator("a title").all_text_contents()]
    assert math.isclose(sum(ranks), 15, abs_tol=0.05)
    inputs.nth(0).uncheck()
    expect(page.locator("#compared tbody tr")).to_have_count(6)
    assert page.locator("#compare-choice input:disabled").count() == 0


def test_a_link_holds_the_choice(visit: Open) -> None:
    page = open_compare(visit)
    box(page, "unlearn:ft").check()
    box(page, "anp").check()
    there = open_compare(visit, page.evaluate("location.hash").lstrip("#"))
    assert there.locator("#compare-result").inner_text() == page.locator("#compare-result").inner_text()
    assert sorted(i.get_attribute("data-defense") or "" for i in there.locator("input:checked").all()) == [
        "anp",
        "unlearn:ft",
    ]


def test_the_keyboard_chooses_and_keeps_its_place(visit: Open) -> None:
    page = open_compare(visit)
    box(page, "anp").focus()
    page.keyboard.press("Space")
    expect(box(page, "anp")).to_be_checked()
    assert page.evaluate("document.activeElement.dataset.defense") == "anp"


def test_a_compared_model_leads_to_its_cell(visit: Open, board: Board) -> None:
    page = open_compare(visit, "defense=anp&defense=ft")
    row = page.locator("#compared-units tbody tr", has=page.locator("td a")).first
    attack = row.locator("th").inner_text()
    row.locator("td a").first.click()
    expect(page.locator("h1")).to_contain_text("anp")
    expect(page.locator("h1")).to_contain_text(attack.split("@")[0].split(" ")[0])


def test_a_foreign_choice_is_left_out(visit: Open) -> None:
    page = open_compare(visit, "board=99&defense=%3Cscript%3E&defense=anp")
    expect(page.locator("#compare-said")).to_contain_text("1 chosen")
