"""Pictures and curves of a cell: checked before they are shown, since a bundle's media folder is foreign."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleeperbench.leaderboard import terms, words
from sleeperbench.leaderboard.charts import Bars, Lines, Series, bars, lines

LARGEST = 8_000_000
MOST_VALUES = 5000
MOST_BARS = 200
MOST_SERIES = 40
LARGEST_VALUE = 1e30
NOT_ORDERED = frozenset({"draw", "trigger", "seed", "label", "class", "source", "model", "image"})
"""What numbers only tell apart: keys of qualifiers, and names of axes, there also as `image id`."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\.png")


@dataclass(frozen=True)
class Picture:
    """A picture with its page-relative file, its size on the page, and whether it is blown up by whole pixels."""

    file: str
    title: str
    caption: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True)
class Curve:
    """A titled picture of curves or of bars.

    Args:
        title: What it shows.
        chart: Where its marks go.
        source: Who drew it, as `evaluator-name`.
        measured: Drawn from measurements, whose table holds its values.
    """

    title: str
    chart: Lines | Bars
    source: str = ""
    measured: bool = False

    @property
    def barred(self) -> bool:
        """Whether it is a picture of bars."""
        return isinstance(self.chart, Bars)

    @property
    def weight(self) -> int:
        """About how many bytes it takes on a page, on the safe side."""
        c = self.chart
        if isinstance(c, Bars):
            return 4000 + 420 * len(c.bars) + _keys(c.legend)
        points = sum(len(s.points) + len(s.band) + sum(90 + 6 * len(t) for _, _, t in s.dots) for s in c.lines)
        listed = 0 if self.measured else sum(200 * len(s.values) for s in c.lines)
        return 4000 + points + listed + _keys([s.label for s in c.lines])


def _keys(labels: Sequence[str]) -> int:
    """About how many bytes a legend takes, on the safe side."""
    return sum(320 + 6 * len(t) for t in labels)


@dataclass(frozen=True)
class Facts:
    """What an evaluator recorded beside its figures, as (name, value) pairs."""

    name: str
    pairs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Media:
    """What a cell page shows besides its figures; `notes` name what was left out and why."""

    pictures: tuple[Picture, ...] = ()
    curves: tuple[Curve, ...] = ()
    facts: tuple[Facts, ...] = ()
    notes: tuple[str, ...] = ()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Numbers of a JSON list; None where it holds anything else."""
    if not isinstance(value, list) or len(value) > MOST_VALUES:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= LARGEST_VALUE for v in value):
        return None
    return tuple(float(v) for v in value)


def _names(value: Any) -> tuple[str, ...] | None:
    """Names of a JSON list, each once, such as those of layers; None where it holds anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_BARS or not all(isinstance(v, str) for v in value):
        return None
    return tuple(value) if len(set(value)) == len(value) else None


def _series(raw: Any) -> Series | None:
    if not isinstance(raw, dict):
        return None
    names = _names(raw.get("x"))
    x: tuple[Any, ...] | None = names or _numbers(raw.get("x"))
    y = _numbers(raw.get("y"))
    low, high = _numbers(raw.get("low") or []), _numbers(raw.get("high") or [])
    if not x or y is None or low is None or high is None or len(x) != len(y):
        return None
    if len(low) != len(high) or len(low) not in (0, len(x)):
        return None
    return Series(_text(raw.get("label")), x, y, low, high, scattered=raw.get("points") is True and names is None)


def _curve(raw: Any) -> Curve | None:
    if not isinstance(raw, dict):
        return None
    series = [_series(s) for s in _list(raw.get("series"))]
    good = [s for s in series if s is not None]
    named = {isinstance(s.x[0], str) for s in good}
    if not good or len(good) < len(series) or len(series) > MOST_SERIES or len(named) > 1:
        return None
    name = _text(raw.get("name"))
    title = _text(raw.get("title")) or name
    if re.fullmatch(r"(.*-)?roc", name):
        title = f"ROC curve. {title}"
    rule = _numbers([raw.get("threshold")])
    x_label, y_label, cut = _text(raw.get("x_label")), _text(raw.get("y_label")), rule[0] if rule else None
    if named == {True}:
        return Curve(title, bars(good, x_label, y_label, cut), name)
    if _at_one_x(good):
        at = f"{x_label or 'x'} {words.number(good[0].x[0], False)}"
        return Curve(f"{title}, {at}", bars([_upright(good, at)], "series", y_label, cut), name)
    if x_label.removesuffix(" id") in NOT_ORDERED:
        good = [replace(s, scattered=True) for s in good]
    return Curve(title, lines(good, x_label, y_label, cut), name)


def _at_one_x(series: Sequence[Series]) -> bool:
    """Whether all there is stands at one number, where an axis would say nothing, and can be told apart by labels."""
    at_one = {(len(s.x), s.x[0]) for s in series} == {(1, series[0].x[0])}
    return at_one and len({s.label for s in series}) == len(series) and len({bool(s.low) for s in series}) == 1


def _upright(series: Sequence[Series], at: str) -> Series:
    """Series of one value each as a single one, whose names are their labels."""
    names, values = tuple(s.label or at for s in series), tuple(s.y[0] for s in series)
    low, high = tuple(v for s in series for v in s.low), tuple(v for s in series for v in s.high)
    return Series("", names, values, low, high)


def measured_curves(rows: Iterable[Mapping[str, Any]], drawn: Sequence[Curve]) -> list[Curve]:
    """Pictures of figures that differ in one part of their qualifier: bars by layer, curves by a number.

    Args:
        rows: Measurements of one cell.
        drawn: Curves that evaluators recorded; what such an evaluator measures by a number is in its own curve.
    """
    found: dict[tuple[str, str, str, str], dict[Any, Mapping[str, Any]]] = {}
    for m in rows:
        value = m["value"]
        if value is None or not abs(value) <= LARGEST_VALUE or "=" not in (m["qualifier"] or ""):
            continue
        parts = [p.partition("=")[::2] for p in m["qualifier"].split(";")]
        for i, (key, text) in enumerate(parts):
            at: Any = text if key == "layer" else _number(text)
            if at is not None and key not in NOT_ORDERED:
                rest = ";".join(f"{k}={v}" for k, v in (*parts[:i], *parts[i + 1 :]))
                found.setdefault((m["evaluator"] or "", m["metric"] or "", key, rest), {})[at] = m
    own = {c.source.rpartition("-")[0] for c in drawn}
    pictures: dict[tuple[str, str, str], list[Series]] = {}
    for (evaluator, metric, key, rest), by in found.items():
        if len(by) < (2 if key == "layer" else 3) or (key != "layer" and evaluator in own):
            continue
        x = sorted(by, key=_natural)[:MOST_BARS] if key == "layer" else sorted(by)
        y = tuple(float(by[v]["value"]) for v in x)
        ends = [(by[v]["lower"], by[v]["upper"]) for v in x]
        whole = all(_finite(a) and _finite(b) for a, b in ends)
        low, high = (tuple(a for a, _ in ends), tuple(b for _, b in ends)) if whole else ((), ())
        pictures.setdefault((evaluator, metric, key), []).append(
            Series(rest or words.label(metric), tuple(x), y, low, high)
        )
    made = []
    for (evaluator, metric, key), series in pictures.items():
        draw = bars if key == "layer" else lines
        title = f"{words.label(metric)} by {key}"
        made.append(Curve(title, draw(series[:MOST_SERIES], key, words.label(metric)), f"{evaluator}-{metric}", True))
    return made


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts `layer2` before `layer10`."""
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in re.split(r"([0-9]{1,9})", name)]


def _finite(value: Any) -> bool:
    return value is not None and abs(value) <= LARGEST_VALUE


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST_VALUE else None


def _facts(raw: dict[str, Any]) -> Facts:
    pairs = ((str(k), json.dumps(v, ensure_ascii=False)[:MOST_VALUES]) for k, v in sorted(raw.items()) if k != "name")
    return Facts(_text(raw.get("name")), tuple((k, text, terms.FACTS.get(k, "")) for k, text in pairs))


def _picture(folder: Path, raw: Any, write: Callable[[str, bytes], None]) -> Picture | str:
    """The picture, copied under its content's digest, or why it is left out."""
    name = _text(raw.get("file")) if isinstance(raw, dict) else ""
    path = folder / name
    if not _NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
        return f"a picture is missing, or is no plain file ending in .png: {name[:80]}"
    if path.stat().st_size > LARGEST:
        return f"{name} is larger than {LARGEST // 1_000_000} MB"
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 33:
        return f"{name} is not a PNG"
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= 8192 and 0 < height <= 8192):
        return f"{name} is {width} by {height} pixels"
    target = f"media/{folder.name}/{hashlib.sha256(data).hexdigest()[:16]}.png"
    write(target, data)
    times = min(12, max(1, 384 // max(width, height)))
    return Picture(target, *_words(raw), width * times, height * times, times > 1)


def _words(raw: dict[str, Any]) -> tuple[str, str]:
    """A picture's title and caption; where they only repeat a name that we know, what such a picture shows.

    A caption that repeats any other title is left with who made the picture.
    """
    title, caption = _text(raw.get("title")), _text(raw.get("caption"))
    maker = re.fullmatch(rf"{re.escape(title)}, by ([A-Za-z0-9_./-]+)", caption)
    if title in terms.PICTURES and (not caption or maker):
        return terms.PICTURES[title]
    return (title, f"By {maker[1]}.") if maker else (title, caption)


def load(drawn: tuple[Path, str] | None, write: Callable[[str, bytes], None]) -> Media:
    """Pictures and curves of a cell; `write` takes a path in the site and the bytes of each picture shown.

    Args:
        drawn: The folder, and the cell as its run names it (`Results.drawn`).
        write: See above.
    """
    if drawn is None:
        return Media()
    folder, cell = drawn
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Media()
    except (OSError, ValueError, RecursionError):
        return Media(notes=("the list of pictures and curves cannot be read",))
    if not isinstance(index, dict) or index.get("cell") != cell:
        return Media(notes=("the list of pictures and curves is of another cell",))
    pictures: list[Picture] = []
    curves: list[Curve] = []
    facts: list[Facts] = []
    notes: list[str] = []
    for raw in _list(index.get("pictures")):
        made = _picture(folder, raw, write)
        if isinstance(made, str):
            notes.append(made)
        else:
            pictures.append(made)
    for raw in _list(index.get("curves")):
        curve = _curve(raw)
        if isinstance(raw, dict) and "series" not in raw:
            facts.append(_facts(raw))
        elif curve is None:
            notes.append("a curve is left out: its series are not lists of finite numbers of one length")
        else:
            curves.append(curve)
    return Media(tuple(pictures), tuple(curves), tuple(facts), tuple(notes))
