"""The table of all cells: in pages for readers without scripts, and packed in one script for those with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from sleeperbench.leaderboard import packed, words
from sleeperbench.leaderboard.entries import Page
from sleeperbench.leaderboard.paging import files, size
from sleeperbench.leaderboard.views import Row, Views

PER_PAGE = 250
PAGE_BYTES = 280_000
"""What the rows of a page may take; a page is to stay under 300 kB."""


def _weight(row: Row) -> int:
    """About how many bytes a row takes on a page, on the safe side."""
    c = row.cell
    named = 2 * size(c["defense"]) + 2 * size(c["attack"]) + 2 * size(c["cell"]) + size(c["dataset"]) + size(c["arch"])
    linked = len(row.attack_href) + len(row.defense_href) + len(row.dataset_href)
    state = size(row.short) + 2 * size(c["status"]) + sum(30 + 2 * size(b) for b, _ in row.badges)
    figures = sum(37 + len(f.metric) + len(f.order) + size(f.text) for f in row.figures)
    extra = sum(14 * f.empty + (20 + len(f.note) if f.note else 0) for f in row.figures)
    return 520 + named + linked + state + figures + extra


def _cut(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in parts that each make a page of at most PER_PAGE rows and PAGE_BYTES bytes."""
    parts: list[list[Row]] = [[]]
    room = PAGE_BYTES
    for r in rows:
        weight = _weight(r)
        if parts[-1] and (weight > room or len(parts[-1]) == PER_PAGE):
            parts.append([])
            room = PAGE_BYTES
        parts[-1].append(r)
        room -= weight
    return parts


def tables(views: Views, write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """All cells, at most PER_PAGE to a page."""
    data = packed.script(packed.cells(views))
    source = f"data/cells.{hashlib.sha256(data).hexdigest()[:8]}.js"
    write(source, data)
    parts = _cut(views.rows)
    names = files("table", len(parts))
    for i, part in enumerate(parts):
        near = sorted({0, *range(max(0, i - 5), min(len(parts), i + 6)), len(parts) - 1})
        said = {f.text for r in part for f in r.figures if f.empty} | {b for r in part for b, _ in r.badges}
        yield (
            names[i],
            "table.html.j2",
            {
                "rows": part,
                "number": i + 1,
                "pages": [(n + 1, names[n]) for n in near],
                "count": len(parts),
                "all_rows": len(views.rows),
                "source": source,
                "said": [(w, words.MEANINGS[w]) for w in sorted(said) if w in words.MEANINGS],
            },
        )
