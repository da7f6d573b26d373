"""Pages that stay small: sections of tables, cut between sections and within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from typing import Any

from sleeperbench.leaderboard.views import MeanRow
from sleeperbench.leaderboard.words import Shown

ROOM = 255_000
"""Bytes that the sections of a page may take; a page is to stay under 300 kB."""


@dataclass(frozen=True)
class Section:
    """A part of a page: a table with `lines` that take `weights` bytes, or a picture.

    Args:
        group: What the section is of, such as a board's place; a page prints the group's heading where it changes.
        kind: Which macro draws it.
        id: Its element's id; a section that is cut gets `-2`, `-3`, ... on the pages that go on.
        head: Whatever else the macro shows.
        fixed: Bytes that it takes beside its lines.
    """

    group: int
    kind: str
    id: str
    head: Any
    lines: Sequence[Any] = ()
    weights: Sequence[int] = ()
    fixed: int = 1200
    part: int = 1


def cut(sections: Sequence[Section], room: int = ROOM) -> list[list[Section]]:
    """Sections in order, on as many pages as they need; a table goes on where a page is full."""
    pages: list[list[Section]] = [[]]
    left = room
    for s in sections:
        start, part = 0, 1
        while True:
            if pages[-1] and s.fixed + sum(s.weights[start : start + 1]) > left:
                pages.append([])
                left = room
            end, left = start, left - s.fixed
            while end < len(s.lines) and (end == start or s.weights[end] <= left):
                left -= s.weights[end]
                end += 1
            whole = start == 0 and end == len(s.lines)
            lines = s.lines if whole else s.lines[start:end]
            pages[-1].append(replace(s, lines=lines, part=part, id=s.id if part == 1 else f"{s.id}-{part}"))
            start, part = end, part + 1
            if start >= len(s.lines):
                break
    return pages


def files(name: str, count: int) -> list[str]:
    """File names of the pages of `name`: `name.html`, `name-2.html`, ..."""
    return [f"{name}.html" if i == 0 else f"{name}-{i + 1}.html" for i in range(count)]


@lru_cache(maxsize=100_000)
def size(text: str) -> int:
    """Bytes of a text on a page."""
    return len(escape(text).encode("utf-8", "replace"))


def figure(f: Shown) -> int:
    """About how many bytes a figure's field takes, on the safe side."""
    return 130 + len(f.metric) + len(f.order) + size(f.title) * (2 if f.empty else 1) + size(f.text) + size(f.note)


def mean_row(line: MeanRow) -> int:
    """About how many bytes a line of means takes."""
    named = 420 + 2 * size(line.name) + len(line.href) + sum(60 + size(a) + size(b) for a, b in line.badges)
    return named + sum(map(figure, (*line.figures, line.took)))
