"""Where marks, lines and labels of a picture go; templates draw them as SVG with classes and no style."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sleeperbench.leaderboard import words

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 62, 130, 16, 52
HIGHEST = 12
"""Where the top of a picture leaves room for a label's letters."""
LETTER = 7
"""About how wide a letter of a label is, on the safe side."""
ROOM = 70
"""What a picture of marks is wider than others, for whole names of marks at its right end."""
LOOKS = 6
"""Colours of series; further ones begin again."""


@dataclass(frozen=True)
class Axis:
    """One axis: its range, name and ticks."""

    name: str
    low: float
    high: float
    share: bool
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Point:
    """What a mark stands for, ruined models where `collapsed`; the intervals are (low, high), equal without one."""

    name: str
    href: str
    kind: str
    x: float
    y: float
    x_span: tuple[float, float]
    y_span: tuple[float, float]
    title: str
    collapsed: bool = False


@dataclass(frozen=True)
class Mark:
    """A mark in picture coordinates with its label."""

    point: Point
    label: str
    x: float
    y: float
    x0: float
    x1: float
    y0: float
    y1: float
    label_x: float
    label_y: float


@dataclass(frozen=True)
class Scatter:
    """A picture of marks."""

    x_axis: Axis
    y_axis: Axis
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]

    @property
    def collapsed(self) -> bool:
        """Whether any mark is of ruined models."""
        return any(m.point.collapsed for m in self.marks)


@dataclass(frozen=True)
class Line:
    """A series as `points` of a polyline, with its band as a polygon (empty without one) and a mark per value.

    One of marks alone has no polyline.
    """

    label: str
    points: str
    band: str
    dots: tuple[tuple[float, float, str], ...]
    values: tuple[tuple[str, str, str], ...]


class Rule(NamedTuple):
    """A threshold: where it crosses the axis of values, and its words."""

    at: float
    text: str


@dataclass(frozen=True)
class Lines:
    """A picture of curves."""

    x_name: str
    y_name: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    rule: Rule | None = None


class Bar(NamedTuple):
    """A bar from `x0`, `width` long, its top at `y`, with its whisker from `low` to `high`; `look` is its colour."""

    group: str
    label: str
    look: int
    x0: float
    width: float
    y: float
    low: float
    high: float
    text: str
    between: str
    title: str


@dataclass(frozen=True)
class Bars:
    """A picture of bars, a group of them per name, below each other."""

    x_name: str
    y_name: str
    x_ticks: tuple[tuple[float, str], ...]
    names: tuple[tuple[float, str], ...]
    bars: tuple[Bar, ...]
    legend: tuple[str, ...]
    height: int
    rule: Rule | None = None


@dataclass(frozen=True)
class Series:
    """One curve; `low` and `high` are empty or as long as `x`, which holds names where the series is one of bars.

    Of a `scattered` one only the marks are drawn, unjoined.
    """

    label: str
    x: tuple[Any, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    scattered: bool = False


def axis(name: str, values: Sequence[float], *, share: bool, full: bool = False) -> Axis:
    """An axis that holds all values with round ticks; `full` makes it span at least 0 to 1."""
    low, high = min(values), max(values)
    if full:
        low, high = min(low, 0.0), max(high, 1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        pad = max(0.5, 1e-3 * abs(high))
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = []
    for i in range(first, last + 1):
        value = round(i * step, 12)
        ticks.append((value, f"{100 * value:g} %" if share else f"{value:g}"))
    return Axis(name, round(first * step, 12), round(last * step, 12), share, tuple(ticks))


def _x(a: Axis, value: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - a.low) / (a.high - a.low), 1)


def _y(a: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - a.low) / (a.high - a.low), 1)


def spread(wanted: Sequence[tuple[float, float, float]]) -> list[float]:
    """Heights of labels: as near to where they are wanted as 13 units between those that share a column allow.

    None is moved above `HIGHEST`, where the picture ends.

    Args:
        wanted: (left end, height of the line that it stands on, width) of each.
    """
    placed: list[tuple[float, float, float]] = []
    heights = [0.0] * len(wanted)
    for i in sorted(range(len(wanted)), key=lambda i: (-wanted[i][1], wanted[i][0], i)):
        x, at, wide = wanted[i]
        near = [py for px, py, other in placed if x < px + other and px < x + wide]
        moves = (at + way * step for step in itertools.count() for way in (-1, 1))
        y = next(m for m in moves if m >= min(at, HIGHEST) and all(abs(m - py) >= 13 for py in near))
        placed.append((x, y, wide))
        heights[i] = round(y, 1)
    return heights


def short(name: str) -> str:
    """A name as far as there is room for it beside a mark or a bar."""
    return name if len(name) <= 27 else name[:24] + "..."


def scatter(points: Sequence[Point], x_name: str, y_name: str, *, y_share: bool) -> Scatter | None:
    """Marks with whiskers on two axes that hold them all; None without points."""
    if not points:
        return None
    xa = axis(x_name, [v for p in points for v in (p.x, *p.x_span)], share=True, full=True)
    ya = axis(y_name, [v for p in points for v in (p.y, *p.y_span)], share=y_share, full=True)
    at = [(_x(xa, p.x), _y(ya, p.y)) for p in points]
    labels = [short(p.name) for p in points]
    heights = spread([(x + 10, y + 4, LETTER * len(t)) for (x, y), t in zip(at, labels, strict=True)])
    marks = []
    for p, label, (x, y), height in zip(points, labels, at, heights, strict=True):
        (x0, x1), (y0, y1) = (_x(xa, v) for v in p.x_span), (_y(ya, v) for v in p.y_span)
        marks.append(Mark(p, label, x, y, x0, x1, y0, y1, x + 10, height))
    return Scatter(
        xa, ya, tuple((_x(xa, v), t) for v, t in xa.ticks), tuple((_y(ya, v), t) for v, t in ya.ticks), tuple(marks)
    )


def lines(series: Sequence[Series], x_name: str, y_name: str, threshold: float | None = None) -> Lines:
    """Curves and scattered marks on common axes; bands where a series has `low` and `high`."""
    xa = axis(x_name, [v for s in series for v in s.x], share=False)
    ya = axis(y_name, [*_given(threshold), *(v for s in series for v in (*s.y, *s.low, *s.high))], share=False)
    drawn = []
    for s in series:
        places = [(_x(xa, x), _y(ya, y)) for x, y in zip(s.x, s.y, strict=True)]
        words_ = [(words.number(x, False), words.number(y, False)) for x, y in zip(s.x, s.y, strict=True)]
        titles = [f"{s.label}: {x}, {y}" if s.label else f"{x}, {y}" for x, y in words_]
        edge = [(_x(xa, x), _y(ya, v)) for x, v in zip(s.x, s.low, strict=True)] if s.low else []
        edge += [(_x(xa, x), _y(ya, v)) for x, v in reversed(list(zip(s.x, s.high, strict=True)))] if s.high else []
        spans = [words.span(a, b, False) for a, b in zip(s.low, s.high, strict=True)] or [""] * len(s.x)
        drawn.append(
            Line(
                s.label,
                "" if s.scattered else " ".join(f"{x},{y}" for x, y in places),
                " ".join(f"{x},{y}" for x, y in edge),
                tuple((x, y, t) for (x, y), t in zip(places, titles, strict=True))
                if s.scattered or len(places) <= 60
                else (),
                tuple((x, y, t) for (x, y), t in zip(words_, spans, strict=True)),
            )
        )
    return Lines(
        x_name,
        y_name,
        tuple((_x(xa, v), t) for v, t in xa.ticks),
        tuple((_y(ya, v), t) for v, t in ya.ticks),
        tuple(drawn),
        None if threshold is None else Rule(_y(ya, threshold), _threshold(threshold)),
    )


def _given(threshold: float | None) -> tuple[float, ...]:
    return () if threshold is None else (threshold,)


def _threshold(value: float) -> str:
    return f"threshold {words.number(value, False)}"


def bars(series: Sequence[Series], x_name: str, y_name: str, threshold: float | None = None) -> Bars:
    """Bars on a common axis that holds 0: a group per name in the order of first mention, a bar per series in it."""
    groups = {name: i for i, name in enumerate(dict.fromkeys(name for s in series for name in s.x))}
    values = [v for s in series for v in (*s.y, *s.low, *s.high)]
    axis_ = axis(y_name, [0.0, *_given(threshold), *values], share=False)
    thick = 16 if len(series) == 1 else 10
    step = thick * len(series) + 10
    top, zero = TOP + 4, _x(axis_, 0.0)
    drawn = []
    for k, s in enumerate(series):
        ends = list(zip(s.low, s.high, strict=True)) or [(v, v) for v in s.y]
        for name, value, (low, high) in zip(s.x, s.y, ends, strict=True):
            x = _x(axis_, value)
            y = float(top + groups[name] * step + k * thick + 1)
            text, between, whisker = words.number(value, False), "", (x, x)
            title = f"{name}, {s.label}: {text}" if s.label else f"{name}: {text}"
            if s.low:
                between, whisker = words.span(low, high, False), (_x(axis_, low), _x(axis_, high))
                title += f" ({between})"
            left, width = min(x, zero), round(abs(x - zero), 1)
            drawn.append(Bar(name, s.label, k % LOOKS, left, width, y, *whisker, text, between, title))
    return Bars(
        x_name,
        y_name,
        tuple((_x(axis_, v), t) for v, t in axis_.ticks),
        tuple((top + i * step + thick * len(series) / 2 + 4, short(name)) for name, i in groups.items()),
        tuple(drawn),
        tuple(s.label for s in series),
        top + step * len(groups) + BOTTOM,
        None if threshold is None else Rule(_x(axis_, threshold), _threshold(threshold)),
    )


@dataclass(frozen=True)
class Rank:
    """A defense on the line of average ranks: its place there, and its label at one side."""

    name: str
    href: str
    title: str
    x: float
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Ranks:
    """A critical-difference diagram; `bars` join defenses whose ranks are nearer than the critical difference."""

    ticks: tuple[tuple[float, str], ...]
    marks: tuple[Rank, ...]
    bars: tuple[tuple[float, float, float], ...]
    rule: tuple[float, float, str]
    height: int


class Tile(NamedTuple):
    """A square whose area is a share of its field's, centred at (x, y), and the share in words below it."""

    x: float
    y: float
    side: float
    text: str
    text_y: float
    href: str
    title: str


@dataclass(frozen=True)
class Matrix:
    """Shares by two names; `rows` and `columns` are (place, name, page)."""

    rows: tuple[tuple[float, str, str], ...]
    columns: tuple[tuple[float, str, str], ...]
    tiles: tuple[Tile, ...]
    right: float
    bottom: float
    height: int


ASIDE, ABOVE, FIELD = 170, 96, 46
"""Room for the names of a matrix's rows and columns, and the height of its fields."""


def matrix(
    rows: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str]],
    shares: Mapping[tuple[str, str], tuple[float, str, str]],
) -> Matrix:
    """A field per row and column, empty where nothing is known.

    Args:
        rows: (name, page), from above.
        columns: (name, page), from the left.
        shares: (row, column) -> (share in [0, 1], page, words about it).
    """
    wide = min(64.0, (WIDTH - ASIDE - 90) / max(1, len(columns)))
    across = [(round(ASIDE + wide * (i + 0.5), 1), *c) for i, c in enumerate(columns)]
    down = [(float(ABOVE + FIELD * i + FIELD / 2), *r) for i, r in enumerate(rows)]
    full = min(wide - 6, FIELD - 18)
    tiles = tuple(
        Tile(
            x,
            y - 6,
            round(full * math.sqrt(min(1.0, max(0.0, found[0]))), 1),
            f"{100 * found[0]:.0f}",
            y + 18,
            *found[1:],
        )
        for y, row, _ in down
        for x, column, _ in across
        if (found := shares.get((row, column))) is not None
    )
    bottom = float(ABOVE + FIELD * len(rows))
    return Matrix(tuple(down), tuple(across), tiles, round(ASIDE + wide * len(columns), 1), bottom, int(bottom) + 14)


SIDE = 170
"""Room for labels at each side of a line of ranks."""
RANK_LINE = 58
"""Height of the line of ranks."""


def ranks(given: Sequence[tuple[str, str, float]], cd: float) -> Ranks | None:
    """Average ranks of defenses as (name, page, rank) on a line from 1 at the left, as Demsar (2006) draws them."""
    if len(given) < 2:
        return None
    k = len(given)
    order = sorted(given, key=lambda g: (g[2], g[0]))

    def at(rank: float) -> float:
        return round(SIDE + (WIDTH - 2 * SIDE) * (rank - 1) / (k - 1), 1)

    bars: list[tuple[float, float, float]] = []
    last = -1
    for i in range(k):
        j = max(n for n in range(i, k) if order[n][2] - order[i][2] <= cd)
        if j > max(i, last):
            bars.append((at(order[i][2]) - 3, at(order[j][2]) + 3, RANK_LINE + 9.0 + 6 * (len(bars) % 6)))
            last = j
    below = RANK_LINE + 30 + 6 * min(len(bars), 6)
    half = (k + 1) // 2
    marks = []
    for i, (name, link, rank) in enumerate(order):
        left = i < half
        y = below + 17 * (i if left else k - 1 - i)
        title = f"{name}: average rank {rank:.2f} of {k}"
        marks.append(
            Rank(
                name,
                link,
                title,
                at(rank),
                SIDE - 10.0 if left else WIDTH - SIDE + 10.0,
                float(y),
                "end" if left else "start",
            )
        )
    step = max(1, round(k / 12))
    ticks = tuple((at(r), str(r)) for r in range(1, k + 1) if (r - 1) % step == 0 or r == k)
    shown = min(cd, k - 1)
    rule = (at(1), at(1 + shown), f"critical difference {cd:.2f}")
    return Ranks(ticks, tuple(marks), tuple(bars), rule, below + 17 * half + 6)
