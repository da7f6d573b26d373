"""How long the table of all cells takes to answer in a browser: load, sort, facets, search, next page.

Times run from the click to the end of the next frame, in Debian's chromium without a window, on a site of made-up
tables: the medians of the rounds until the script is done and until the frame is drawn, and the slowest. Every round
loads the page anew and sorts by another column. A busy machine multiplies them, so its load is printed.

    python speed/browser.py [--cells 20000] [--rounds 7] [--site DIR]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "leaderboard"))

import synthetic
from playwright.sync_api import Page, sync_playwright

from sleeperbench.leaderboard.build import build

DRAWN = """const table = document.getElementById('board');
  const drawn = new Promise((r) => new MutationObserver(r).observe(table, {childList: true, subtree: true}));"""
FRAME = "await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));"
CLICK = f"""async (e) => {{
  {DRAWN} const t = performance.now();
  e.click(); await drawn; const script = performance.now() - t; {FRAME}
  return [script, performance.now() - t];
}}"""
CHOOSE = f"""async (e, value) => {{
  {DRAWN} const t = performance.now();
  e.value = value; e.dispatchEvent(new Event('change')); await drawn; const script = performance.now() - t; {FRAME}
  return [script, performance.now() - t];
}}"""
TYPE = """async (e, text) => {
  const before = document.getElementById('shown').textContent, t = performance.now();
  e.value = text; e.dispatchEvent(new Event('input'));
  while (document.getElementById('shown').textContent === before) await new Promise((r) => requestAnimationFrame(r));
  return [NaN, performance.now() - t];
}"""


def measure(page: Page, url: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of each action, one per round."""
    times: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, value: list[float]) -> None:
        times.setdefault(name, []).append((value[0], value[1]))

    for i in range(rounds):
        page.goto("about:blank")
        page.goto(url)
        page.locator("#board[data-ready]").wait_for()
        note("load until ready", page.evaluate("[NaN, performance.now()]"))
        metrics = page.locator("#board thead th[data-metric] [role=button]")
        note("sort by a figure, first time", metrics.nth(i % metrics.count()).evaluate(CLICK))
        note("sort the other way", metrics.nth(i % metrics.count()).evaluate(CLICK))
        note("sort by words (cell)", page.locator("#board thead th [role=button]").first.evaluate(CLICK))
        facet = page.locator("select[data-facet=attack]")
        options = facet.locator("option").evaluate_all("all => all.map((o) => o.value).filter(Boolean)")
        note("facet", facet.evaluate(CHOOSE, options[i % len(options)]))
        note("facet off", facet.evaluate(CHOOSE, ""))
        note("search (with its pause of 60 ms)", page.locator("#search").evaluate(TYPE, f"s{i % 3} ft"))
        note("clear", page.locator("#clear").evaluate(CLICK))
        note("next page", page.locator("#pager .next").evaluate(CLICK))
    return times


def main() -> None:
    """Build, open, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--site", type=Path, help="a built site instead of a new one")
    args = parser.parse_args()
    browser = shutil.which("chromium")
    if browser is None:
        print("no chromium here: not measured")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        site = args.site
        if site is None:
            run = synthetic.sized_run(Path(folder) / "run", args.cells, 10 * args.cells, 1)
            site = build([run], Path(folder) / "site").parent
        chromium = playwright.chromium.launch(executable_path=browser)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        times = measure(page, (site / "table.html").absolute().as_uri(), args.rounds)
        busy = f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"{page.locator('#shown').inner_text()}, chromium {chromium.version}, {args.rounds} rounds, {busy}")
        print(f"{'action':36}{'script ms':>11}{'drawn ms':>11}{'slowest ms':>12}")
        for name, values in times.items():
            script, drawn = (statistics.median(v) for v in zip(*values, strict=True))
            shown = "" if math.isnan(script) else f"{script:.0f}"
            print(f"{name:36}{shown:>11}{drawn:11.0f}{max(d for _, d in values):12.0f}")
        chromium.close()


if __name__ == "__main__":
    main()
