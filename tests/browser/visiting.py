"""What the tests in a browser share: a built site of made-up tables, and a watch on what its pages do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "leaderboard"))
import synthetic
from playwright.sync_api import Page

ATTACKS = ["none", "badnets", "wanet", "weakling", "blended~a1b2c3"]
DEFENSES = ["none", "clean_model", "exact_purification", "ft", "anp", "unlearn:ft", "strip", "abl"]
ROWS_A_PAGE = 60
"""Fewer than the site's own, so that a small board has several pages."""


@dataclass
class Board:
    """A built site and the cells that it shows."""

    folder: Path
    cells: list[dict[str, Any]]

    def url(self, path: str) -> str:
        file, _, fragment = path.partition("#")
        return (self.folder / file).as_uri() + (f"#{fragment}" if fragment else "")

    def kinds(self) -> list[str]:
        """Pages of every kind: all at the top (of numbered ones the first two), of each folder least and most."""
        top = sorted(p.name for p in self.folder.glob("*.html"))
        chosen = [n for n in top if not re.search(r"-\d+\.html$", n) or n.endswith("-2.html")]
        for folder in sorted(p for p in self.folder.iterdir() if p.is_dir()):
            by_size = sorted(folder.glob("*.html"), key=lambda p: (p.stat().st_size, p.name))
            chosen += sorted({p.relative_to(self.folder).as_posix() for p in by_size[:1] + by_size[-1:]})
        return chosen


def run_folder(folder: Path) -> Path:
    """Two data sets, every status, hostile strings."""
    cells, rows = synthetic.tables(11, ATTACKS, [*DEFENSES, synthetic.HOSTILE_DEFENSE], 3)

    def elsewhere(row: dict[str, Any]) -> dict[str, Any]:
        name = row["cell"].replace("digits/", "gtsrb/", 1)
        return row | {"dataset": "gtsrb", "arch": "preact_resnet18", "cell": name}

    more, more_rows = synthetic.tables(12, ATTACKS, DEFENSES, 1)
    cells += [elsewhere(c) for c in more]
    rows += [elsewhere(r) for r in more_rows]
    synthetic.write_run(folder, cells, rows, synthetic.hostile_plugins(), {"suite": {"name": "quick"}, "exit": 0})
    for cell in cells[:2] + [c for c in cells if c["attack"] == "badnets" and c["defense"] == "ft"]:
        synthetic.write_media(folder, cell["cell"])
    return folder


@dataclass
class Watch:
    """What a page did that a page from disk must not do."""

    site: str
    wrong: list[str] = field(default_factory=list)

    def attach(self, page: Page) -> None:
        page.on("console", lambda m: m.type in ("error", "warning") and self.wrong.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.wrong.append(f"uncaught: {e}"))
        page.on("dialog", lambda d: (self.wrong.append(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", lambda r: self._asked(r.url))
        page.on("requestfailed", lambda r: self._failed(r.url, r.failure or ""))

    def _failed(self, url: str, why: str) -> None:
        # A page that is left stops what it was loading; a download ends its own request.
        if why != "net::ERR_ABORTED":
            self.wrong.append(f"not loaded: {url}: {why}")

    def _asked(self, url: str) -> None:
        if not url.startswith((self.site + "/", f"blob:{self.site[:7]}", "blob:null/")):
            self.wrong.append(f"asked for {url}")


Open = Callable[..., Page]
