"""Renews the pictures of the site in docs/images from a run: `python docs/screenshots.py [RUN]` (default runs/quick).

Needs chromium and the extra `dev`. Every page is taken in light, in dark and on a phone; the cell is the one whose
backdoor is most asleep (largest P-ASR minus O-ASR, the model not ruined), the defense is that cell's.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyarrow.parquet as pq
from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent / "images"
LIMIT = 200_000
LOOKS: dict[str, dict[str, Any]] = {
    "": {"viewport": {"width": 1200, "height": 1000}, "color_scheme": "light"},
    "-dark": {"viewport": {"width": 1200, "height": 1000}, "color_scheme": "dark"},
    "-phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light", "device_scale_factor": 2},
}


SHOWN = {"overview": "svg.chart", "table": "#board", "heatmap": "table.heat", "compare": "#compare-result"}
"""What a phone is scrolled to: its screen holds less than the words above it."""


def pages(site: Path) -> dict[str, str]:
    """Name of the picture and address within the site."""
    cells = pq.read_table(site / "downloads" / "cells.parquet").to_pylist()
    woken = [c for c in cells if c["status"] == "ok" and c["p_asr"] is not None and c["o_asr"] is not None]
    woken = [c for c in woken if c["access"] not in ("none", "T4") and "collapsed" not in (c["flag"] or "")]
    if not woken:
        sys.exit(f"{site} has no defended cell with P-ASR: give a run with RA")
    asleep = max(woken, key=lambda c: (c["p_asr"] - c["o_asr"], c["cell"]))
    others = [d for d in sorted({c["defense"] for c in woken}) if d != asleep["defense"]]
    chosen = urlencode([("defense", d) for d in [asleep["defense"], *others[:2]]])
    digest = hashlib.sha256(asleep["cell"].encode()).hexdigest()[:12]
    defense = asleep["defense"].replace(":", "-")
    return {
        "overview": "index.html",
        "table": "table.html",
        "heatmap": "heatmap.html",
        "compare": f"compare.html#{chosen}",
        "cell": f"cells/{digest}.html",
        "defense": f"defenses/{defense}.html",
    }


def small(png: bytes) -> bytes:
    """The picture with a palette, with fewer colours until it is small enough."""
    for colours in (256, 128, 64, 32):
        out = io.BytesIO()
        picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        picture.save(out, "PNG", optimize=True)
        if out.tell() < LIMIT:
            return out.getvalue()
    sys.exit(f"a picture stays above {LIMIT} bytes: take a smaller part of the page")


def main(run: Path) -> None:
    """One picture per page and look."""
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("no chromium here: install it (Debian: apt-get install chromium), then run this again")
    site = run / "site"
    if not (site / "index.html").is_file():
        sys.exit(f"{site} holds no site: sleeperbench site --results {run} --out {site}")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser)
        for look, options in LOOKS.items():
            context = chromium.new_context(**options)
            page = context.new_page()
            for name, path in pages(site).items():
                file, _, state = path.partition("#")
                page.goto((site / file).absolute().as_uri() + (f"#{state}" if state else ""))
                if page.locator("#board[data-source]").count():
                    page.locator("#board[data-ready]").wait_for()
                if look == "-phone" and name in SHOWN and page.locator(SHOWN[name]).count():
                    page.locator(SHOWN[name]).first.evaluate("e => e.scrollIntoView()")
                target = IMAGES / f"{name}{look}.png"
                target.write_bytes(small(page.screenshot()))
                print(f"{target} {target.stat().st_size} bytes")
            context.close()
        chromium.close()


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    main(Path(sys.argv[1] if len(sys.argv) == 2 else "runs/quick"))
