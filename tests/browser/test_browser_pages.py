"""Every kind of page: quiet, alone, valid, accessible in light and dark, fit for phone, paper and no script at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from justhtml import JustHTML
from playwright.sync_api import Browser, Page, expect
from visiting import Board, Open, Watch

VENDOR = Path(__file__).parent / "vendor"
AXE = (VENDOR / "axe.min.js").read_text(encoding="utf-8")
PHONE = {"width": 360, "height": 740}
OPEN_ALL = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
BROKEN = """async (all) => {
  const bad = [];
  for (const i of all) { i.loading = 'eager'; await i.decode().catch(() => bad.push(i.src)); }
  return bad;
}"""
OWN = "all => all.map((e) => e.src || e.href || e.tagName).filter((u) => !String(u).startsWith('file:'))"
ADDRESSES = "all => all.map((a) => a.href.baseVal ?? a.href)"
OVER = """w => [...document.querySelectorAll('main *, header *, footer *')]
  .filter((e) => !e.closest('.scroll') && e.getBoundingClientRect().right > w + 1)
  .map((e) => e.outerHTML.slice(0, 120)).slice(0, 3)"""


@dataclass
class Seen:
    """What one page showed when it was opened."""

    headings: int = 0
    broken: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    axe: list[str] = field(default_factory=list)
    width: int = 0
    over: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def serious(page: Page, *rules: str) -> list[str]:
    """axe's serious and critical faults of a page as it stands."""
    options = {"resultTypes": ["violations"], "elementRef": False, "preload": False}
    found = page.evaluate(
        "o => axe.run(document, o).then((r) => r.violations)", options | ({"runOnly": rules} if rules else {})
    )
    return [
        f"{v['id']} ({v['impact']}): {v['nodes'][0]['target']} {v['nodes'][0]['failureSummary']}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@pytest.fixture(scope="module")
def tour(chromium: Browser, board: Board) -> dict[str, Seen]:
    """Every kind of page opened once, in one go: light, dark, then as narrow as a phone."""
    watch, found = Watch(board.folder.as_uri()), {}
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    watch.attach(page)
    for path in board.kinds():
        seen = found[path] = Seen()
        # Tables of cells are opened narrowed: what axe looks at is alike in every row.
        page.goto(board.url(path + ("#attack=badnets&q=s0" if path.startswith("table") else "")))
        if path.startswith("table"):
            page.locator("#board[data-ready]").wait_for()
        page.evaluate(OPEN_ALL)
        seen.headings = page.locator("h1").count()
        seen.broken = page.locator("img").evaluate_all(BROKEN)
        seen.foreign = page.locator("[src], link[href], form, iframe, object").evaluate_all(OWN)
        seen.links = [str(a) for a in page.locator("a[href]").evaluate_all(ADDRESSES)]
        page.evaluate(AXE)
        seen.axe = [f"light: {f}" for f in serious(page)]
        page.emulate_media(color_scheme="dark")
        seen.axe += [f"dark: {f}" for f in serious(page, "color-contrast")]
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(PHONE)
        seen.width = page.evaluate("document.documentElement.scrollWidth")
        seen.over = page.evaluate(OVER, PHONE["width"])
        page.set_viewport_size({"width": 1280, "height": 900})
        seen.wrong, watch.wrong = watch.wrong, []
    context.close()
    return found


def test_the_kinds_are_all_there(board: Board) -> None:
    kinds = board.kinds()
    assert {"index.html", "table.html", "table-2.html", "heatmap.html", "compare.html", "protocol.html"} <= set(kinds)
    assert {"submit.html", "changelog.html"} <= set(kinds)
    for folder in ("attacks", "cells", "datasets", "defenses", "metrics"):
        assert any(k.startswith(f"{folder}/") for k in kinds)


def test_no_kind_fails_or_asks_for_more_than_its_own(tour: dict[str, Seen]) -> None:
    assert {p: s.wrong for p, s in tour.items() if s.wrong} == {}
    assert {p: s.broken for p, s in tour.items() if s.broken} == {}
    # What a style sheet or script would fetch later: no address of another host where one could be fetched from.
    assert {p: s.foreign for p, s in tour.items() if s.foreign} == {}
    assert {p for p, s in tour.items() if s.headings != 1} == set()


def test_axe_finds_no_serious_fault_in_light_or_dark(tour: dict[str, Seen]) -> None:
    assert {p: s.axe for p, s in tour.items() if s.axe} == {}


def test_a_phone_scrolls_down_only(tour: dict[str, Seen]) -> None:
    assert {p: (s.width, s.over) for p, s in tour.items() if s.width > PHONE["width"]} == {}
    assert {p: s.over for p, s in tour.items() if s.over} == {}


def test_links_within_the_site_lead_somewhere(tour: dict[str, Seen], board: Board) -> None:
    root, dead, followed = board.folder.as_uri() + "/", [], 0
    for path, seen in tour.items():
        for address in set(seen.links):
            if address.startswith("https://"):
                continue
            file = address.partition("#")[0]
            relative = not address.startswith(("file:", "http:", "javascript:", "data:"))
            target = (board.folder / path).parent / file if relative else board.folder / file.removeprefix(root)
            followed += 1
            if not (file.startswith(root) or relative) or not target.is_file():
                dead.append((path, address))
    assert dead == []
    assert followed > 500


def test_axe_sees_a_serious_fault(visit: Open) -> None:
    page = visit("submit.html")
    page.evaluate("document.body.append(document.createElement('button'))")
    page.evaluate(AXE)
    assert any(f.startswith("button-name") for f in serious(page))


def test_pages_parse_strictly(board: Board) -> None:
    faults = {}
    for path in board.kinds():
        if found := JustHTML((board.folder / path).read_text(encoding="utf-8"), collect_errors=True).errors:
            faults[path] = [str(e) for e in found]
    assert faults == {}
    assert JustHTML("<!doctype html><title>x</title><p>x</div>", collect_errors=True).errors


def test_pages_satisfy_the_nu_checker(board: Board) -> None:
    jar = os.environ.get("SLEEPERBENCH_VNU", "")
    if not jar or shutil.which("java") is None:
        pytest.skip("allowed: no Nu HTML checker: SLEEPERBENCH_VNU names no vnu.jar, or there is no java")
    command = ["java", "-Xss4m", "-jar", jar, "--errors-only", "--format", "json", "--exit-zero-always"]
    files = [str(board.folder / k) for k in board.kinds()]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stderr or done.stdout)["messages"]
    assert [f"{Path(m['url']).name}:{m.get('lastLine')}: {m['message']}" for m in found] == []


def each(page: Page, board: Board, paths: list[str]) -> Iterator[str]:
    """The page at one address after the other."""
    for path in paths:
        page.goto(board.url(path))
        yield path


def luminance(page: Page, selector: str, what: str) -> float:
    """Relative luminance of a computed colour."""
    text = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
    parts = [float(p) / 255 for p in re.findall(r"[\d.]+", text)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_dark_is_dark_and_light_is_light(visit: Open) -> None:
    page = visit("index.html", color_scheme="dark")
    assert luminance(page, "body", "backgroundColor") < 0.05
    assert luminance(page, "body", "color") > 0.6
    page.emulate_media(color_scheme="light")
    assert luminance(page, "body", "backgroundColor") > 0.9
    assert luminance(page, "body", "color") < 0.1


def test_the_theme_can_be_chosen_and_stays(visit: Open, board: Board) -> None:
    page = visit("index.html", color_scheme="light")
    button = page.get_by_role("button", name="Theme")
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.inner_text(), round(luminance(page, "body", "backgroundColor"), 1)))
    assert {("Theme: dark", 0.0), ("Theme: light", 1.0), ("Theme: auto", 1.0)} == set(seen)
    while button.inner_text() != "Theme: dark":
        button.click()
    page.goto(board.url("table.html"))
    assert luminance(page, "body", "backgroundColor") < 0.05
    assert page.get_by_role("button", name="Theme").inner_text() == "Theme: dark"


def test_paper_is_white_and_has_no_controls(visit: Open, board: Board) -> None:
    page = visit("table.html", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    for path in each(page, board, ["index.html", "table.html", "compare.html", "heatmap.html"]):
        assert luminance(page, "body", "backgroundColor") > 0.9, path
        assert luminance(page, "body", "color") < 0.1, path
        assert page.locator("main button:visible, main select:visible, main input:visible").count() == 0, path
        assert page.locator("header nav").first.is_hidden(), path
        # A table that scrolls on a screen would be cut off on paper.
        cut = page.locator(".scroll").evaluate_all("all => all.map((e) => getComputedStyle(e).overflowX)")
        assert set(cut) <= {"visible"}, path
    assert page.pdf().startswith(b"%PDF")


def test_every_kind_reads_without_script(visit: Open, board: Board) -> None:
    page = visit("index.html", java_script_enabled=False)
    kinds = {re.sub(r"^(\w+)/.*", r"\1", k): k for k in board.kinds()}
    for path in each(page, board, list(kinds.values())):
        assert len(page.locator("main").inner_text()) > 150, path
        # What only a script can do is not offered.
        assert page.locator("button:visible, select:visible, input:visible").count() == 0, path


def test_the_tab_key_follows_the_page(visit: Open) -> None:
    page = visit("index.html")
    stops = []
    for _ in range(12):
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate(
                "(() => { const e = document.activeElement, b = e.getBoundingClientRect();"
                " return [e.textContent.trim(), getComputedStyle(e).outlineStyle, b.width > 0 && b.left >= 0]; })()"
            )
        )
    assert stops[0][0] == "Skip to the content"
    assert all(outline != "none" and seen for _, outline, seen in stops)
    words = [w for w, _, _ in stops]
    assert words.index("Overview") < words.index("Table") < words.index("Protocol")


def test_a_mark_of_the_picture_leads_to_its_defense(visit: Open, board: Board) -> None:
    page = visit("index.html")
    marks = page.locator("main svg.chart a:has(title)")
    assert marks.count() > 3
    mark = marks.filter(has=page.locator("title", has_text="unlearn:ft")).first
    mark.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/defenses/unlearn-ft.html")
    expect(page.locator("main")).to_contain_text("unlearn:ft")


@pytest.mark.parametrize(("dataset", "seeds"), [("gtsrb", 1), ("digits", 3)])
def test_a_field_of_the_heat_map_leads_to_its_cells(visit: Open, dataset: str, seeds: int) -> None:
    page = visit("heatmap.html")
    table = page.locator("section", has=page.locator("h2", has_text=dataset)).locator("table.heat").first
    row = table.locator("tbody tr", has=page.locator("th", has_text="wanet")).first
    column = table.locator("thead th").evaluate_all("all => all.findIndex((t) => t.textContent.trim() === 'anp')")
    row.locator("th, td").nth(column).locator("a").click()
    if seeds > 1:
        # A mean over seeds has no one cell: its row on the defense's page leads to each.
        assert re.search(r"/defenses/anp\.html#", page.url)
        links = page.locator("tr:target a[href*='cells/']")
        expect(links).to_have_count(seeds)
        expect(page.locator("tr:target")).to_contain_text("wanet")
        links.first.click()
    assert re.search(r"/cells/[0-9a-f]{12}\.html$", page.url)
    expect(page.locator("h1")).to_contain_text("anp")
    expect(page.locator("h1")).to_contain_text("wanet")
    expect(page.locator("main code").first).to_contain_text(f"{dataset}/")


def test_hostile_text_is_text(visit: Open, board: Board) -> None:
    page = visit("index.html")
    hostile = sorted(p for p in (board.folder / "defenses").glob("evil*.html"))
    assert hostile
    for path in each(page, board, [f"defenses/{p.name}" for p in hostile] + ["changelog.html", "index.html"]):
        assert page.locator("main script, main [onerror]").count() == 0, path
        assert page.locator("a[href^='javascript:' i]").count() == 0, path
        if path.startswith("defenses/"):
            assert "<script>alert(1)</script>" in page.locator("main").inner_text()
