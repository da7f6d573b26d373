"""Text as it goes into pages: cleaned, escaped, and the lines and fields of which pages have hundreds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from markupsafe import Markup, escape

from sleeperbench.leaderboard.names import clean
from sleeperbench.leaderboard.words import Shown


@lru_cache(maxsize=2**17)
def text(value: str) -> str:
    """A text, cleaned and escaped."""
    return str(escape(clean(value)))


def shown(value: Any) -> str:
    """What a template prints for a value: cleaned and escaped, unless it is markup already."""
    if type(value) is str:
        return text(value)
    return str(value.__html__()) if hasattr(value, "__html__") else text(str(value))


def _filled(value: Any) -> Any:
    kind = type(value)
    return text(value) if kind is str else value if kind is float or kind is int else shown(value)


def lines(pattern: str, rows: Iterable[Sequence[Any]]) -> Markup:
    """A table's lines, or a picture's marks: a template's own `pattern` with `{0}`, `{1}`, ... filled in for each.

    A line costs one call in place of one per text. What fills the pattern is cleaned and escaped as everywhere.
    """
    form = str(pattern).format
    return Markup("".join([form(*map(_filled, row)) for row in rows]))


def inside(f: Shown) -> Markup:
    """What stands in a figure's field: its text and, smaller, its note."""
    return Markup(f"{text(f.text)} <small>{text(f.note)}</small>" if f.note else text(f.text))


def figure_fields(figures: Iterable[Shown]) -> Markup:
    """The fields of figures of a cell's line in a table of cells."""
    made = []
    for f in figures:
        css = ' class="empty"' if f.empty else ""
        made.append(f'<td{css} data-metric="{text(f.metric)}" data-order="{text(f.order)}">{inside(f)}</td>')
    return Markup("".join(made))
