"""What a defense shows of how it came to its answer: its own curves and pictures, and its scores of inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeperbench import EvalCase, Evaluator, Findings, Measurement, Metric, Needs
from sleeperbench.kit.predict import spread

_MOST = 12
"""Most curves, and most pictures, of one defense."""
_SERIES, _POINTS, _WORDS, _LARGEST = 12, 200, 200, 1e30
"""Most series of a curve, values of a series, letters of a text, and the largest number."""
_FACTS, _LETTERS = 40, 1000
"""Most values of `chosen` that are told, and their letters."""
_DRAWN = frozenset({"curves", "pictures", "name", "series"})
"""Names of `chosen` that are not told: the first two are drawn, the others would make a curve of what is told."""
_BINS = 40
"""Intervals of the histogram of scores."""
_ROWS, _COLUMNS, _SIDE, _GAP = 12, 6, 512, 2
"""Most rows and columns of a picture, its largest tile's side, and the pixels between tiles."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Refused(ValueError):
    """What a defense gave is not of the form that is drawn; says why."""


@dataclass(frozen=True, kw_only=True)
class Evidence(Evaluator):
    """Draws what a defense put into its answer to be drawn; it measures nothing, and no method is known to it by name.

    1. Each of `chosen["curves"]`, name -> curve in the form of `Findings.curves`. With `"inputs": [i, j]` the clean and
       the triggered inputs of the second phase are marks in it, at statistics i and j that `score` gave beside scores.
    2. Each of `chosen["pictures"]`, name -> {"title", "columns": [[words, tensor], ...], "rows"?: [words, ...]}: a row
       of tiles per entry of the named tensors of `state`, (R, H, W) or (R, C, H, W) with equal R, a column per tensor.
       Numbers are drawn from 0, black, to the largest of their tile, white, and truth values as black and white.
    3. Of a defense with a second phase: how often it gives each score to clean and to triggered inputs, and where its
       own threshold lies, if it has one.
    4. Short values of the rest of `chosen`, as they are.

    What has another form is not drawn; `left-out` says what it lacks.
    """

    INFO = {
        "title": "Evidence",
        "paper": "",
        "bibtex": "",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {},
    }
    NEEDS = Needs(outcome=("verdict", "scores"), trigger="none")
    METRICS = (
        Metric(
            name="evidence",
            unit="",
            low=0.0,
            high=24.0,
            better="none",
            doc="Curves and pictures that the defense shows of how it came to its answer",
        ),
    )

    def measure(self, case: EvalCase) -> Findings:
        """The number of curves and pictures drawn, and these."""
        chosen, state = case.outcome.chosen, case.outcome.state
        tensors = {} if state is None else state[0]
        asked = None
        if case.beside is not None and case.asked is not None:
            asked = {"clean inputs": case.beside[~case.asked], "triggered": case.beside[case.asked]}
        curves, bad = _each(chosen.get("curves", {}), lambda raw: curve(raw, asked))
        pictures, worse = _each(chosen.get("pictures", {}), lambda raw: sheet(raw, tensors))
        count = len(curves) + len(pictures)
        drawn = dict(curves)
        if case.answers is not None and case.asked is not None:
            drawn["input-scores"] = histogram(case.answers[case.asked], case.answers[~case.asked], case.outcome.alarm)
        if told := _told(chosen):
            drawn["chosen"] = told
        if bad or worse:
            drawn["left-out"] = {"refused": bad | worse}
        row = Measurement(metric="evidence", value=float(count))
        if not count:
            row = Measurement(metric="evidence", value=None, reason="no_evidence")
        return Findings(rows=(row,), curves=drawn, pictures=dict(pictures.values()))


def _told(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The short values of `chosen` as they are, without what is drawn and without names that mean something here."""
    short = {k: v for k, v in chosen.items() if k not in _DRAWN and len(json.dumps(v)) <= _LETTERS}
    return dict(list(short.items())[:_FACTS])


def _each(given: Any, make: Callable[[Any], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What `make` gives for every named entry, and why it gave nothing."""
    if not isinstance(given, Mapping) or len(given) > _MOST:
        return {}, {"all": f"not a mapping of at most {_MOST} names"}
    made, refused = {}, {}
    for name, raw in given.items():
        try:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise Refused("a name is made of lower-case letters, digits and _")
            made[name] = make(raw)
        except Refused as e:
            refused[str(name)[:40]] = str(e)
    return made, refused


def curve(raw: Any, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """A curve in the form of `Findings.curves`, made anew of its known parts alone.

    Args:
        raw: What the defense gave.
        inputs: Statistics (N, S) of inputs asked about, by name; a curve with `inputs` shows them where there are any.

    Raises:
        Refused: it has another form, or is larger than what is drawn.
    """
    if not isinstance(raw, Mapping):
        raise Refused("not a mapping")
    made: dict[str, Any] = {key: _words(raw.get(key, ""), key) for key in ("title", "x_label", "y_label")}
    if not made["title"]:
        raise Refused("it has no title")
    series = raw.get("series")
    if not isinstance(series, list | tuple) or not 0 < len(series) <= _SERIES:
        raise Refused(f"series is no list of 1 to {_SERIES}")
    made["series"] = [_series(s) for s in series]
    named = {isinstance(s["x"][0], str) for s in made["series"]}
    if len(named) > 1:
        raise Refused("x holds names in one series and numbers in another")
    if "inputs" in raw:
        made["series"] += _inputs(raw["inputs"], inputs or {}, named == {True})
    if "threshold" in raw:
        (made["threshold"],) = _numbers([raw["threshold"]], "threshold")
    return made


def _series(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise Refused("a series is no mapping")
    x = raw.get("x")
    words = isinstance(x, list | tuple) and any(isinstance(v, str) for v in x)
    made: dict[str, Any] = {
        "label": _words(raw.get("label", ""), "label"),
        "x": [_words(v, "x") for v in x or ()] if words else _numbers(x, "x"),
        "y": _numbers(raw.get("y"), "y"),
    }
    if not 0 < len(made["x"]) == len(made["y"]) <= _POINTS:
        raise Refused(f"x and y are not both 1 to {_POINTS} values")
    if words and len(set(made["x"])) < len(made["x"]):
        raise Refused("a name in x occurs twice")
    if "low" in raw or "high" in raw:
        made |= {end: _numbers(raw.get(end), end) for end in ("low", "high")}
        if not len(made["low"]) == len(made["high"]) == len(made["x"]):
            raise Refused("low and high are not both as long as x")
    if raw.get("points") is True and not words:
        made["points"] = True
    return made


def _inputs(columns: Any, inputs: Mapping[str, Tensor], named: bool) -> list[dict[str, Any]]:
    """Inputs as series of marks, evenly thinned."""
    pair = isinstance(columns, list | tuple) and len(columns) == 2 and all(type(i) is int and i >= 0 for i in columns)
    if not pair or named:
        raise Refused("inputs is no pair of numbers of statistics, or x holds names")
    if any(max(columns) >= t.shape[1] for t in inputs.values()):
        raise Refused("inputs names a statistic that score() does not give")
    made = []
    for label, table in inputs.items():
        x, y = table[spread(len(table), _POINTS)][:, columns].T.tolist()
        made.append({"label": label, "x": x, "y": y, "points": True})
    return made


def _numbers(given: Any, what: str) -> list[float]:
    if not isinstance(given, list | tuple):
        raise Refused(f"{what} is no list")
    for v in given:
        if not isinstance(v, int | float) or isinstance(v, bool) or not abs(v) <= _LARGEST:
            raise Refused(f"{what} holds something else than numbers of at most {_LARGEST:g}")
    return [float(v) for v in given]


def _words(given: Any, what: str) -> str:
    if not isinstance(given, str) or len(given) > _WORDS:
        raise Refused(f"{what} is no text of at most {_WORDS} letters")
    return given


def sheet(raw: Any, tensors: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """A picture's title with what its rows and columns are, and the picture, uint8 (1 or 3, height, width).

    Raises:
        Refused: it has another form, names no tensor, or is larger than what is drawn.
    """
    if not isinstance(raw, Mapping):
        raise Refused("not a mapping")
    columns, rows = raw.get("columns"), raw.get("rows", ())
    if not isinstance(columns, list | tuple) or not 0 < len(columns) <= _COLUMNS:
        raise Refused(f"columns is no list of 1 to {_COLUMNS}")
    if not all(isinstance(c, list | tuple) and len(c) == 2 and isinstance(c[1], str) for c in columns):
        raise Refused("a column is no pair of words and a tensor's name")
    named = [(_words(words, "columns"), _tiles(tensors, name)) for words, name in columns]
    r, _, height, width = named[0][1].shape
    if any((len(t), *t.shape[2:]) != (r, height, width) for _, t in named):
        raise Refused("the tensors have unlike shapes")
    if not isinstance(rows, list | tuple) or len(rows) not in (0, r):
        raise Refused(f"rows is no list of {r} texts")
    title = _words(raw.get("title", ""), "title") + f". Columns: {', '.join(words for words, _ in named)}."
    if rows:
        title += f" Rows: {', '.join(_words(w, 'rows') for w in rows)}."
    channels = max(t.shape[1] for _, t in named)
    canvas = torch.full(
        (channels, r * (height + _GAP) - _GAP, len(named) * (width + _GAP) - _GAP), 128, dtype=torch.uint8
    )
    for j, (_, tiles) in enumerate(named):
        for i, tile in enumerate(tiles):
            top, left = i * (height + _GAP), j * (width + _GAP)
            canvas[:, top : top + height, left : left + width] = tile
    return title, canvas


def _tiles(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor's entries as uint8 (R, 1 or 3, H, W)."""
    if name not in tensors:
        raise Refused(f"the state has no tensor {name[:40]}")
    t = tensors[name]
    t = t[:, None] if t.dim() == 3 else t
    if t.dim() != 4 or t.shape[1] not in (1, 3) or not 0 < len(t) <= _ROWS or not 0 < max(t.shape[2:]) <= _SIDE:
        raise Refused(f"tensor {name} is not (R, H, W) or (R, 1 or 3, H, W), R up to {_ROWS}, sides up to {_SIDE}")
    if t.dtype == torch.uint8:
        return t
    t = t.double()
    if not bool(t.isfinite().all()):
        raise Refused(f"tensor {name} is not finite")
    most = t.flatten(1).amax(1).clamp_min(1e-12)[:, None, None, None]
    return (t.clamp_min(0) / most * 255).round().to(torch.uint8)


def histogram(triggered: Tensor, clean: Tensor, alarm: float | None) -> dict[str, Any]:
    """Share of clean and of triggered inputs by score, as a curve; equal intervals from the lowest to the highest.

    Args:
        triggered: Their scores, (N,).
        clean: Theirs, (M,).
        alarm: The method's own threshold, an upright line from 0 to the largest share.
    """
    both = torch.cat([triggered, clean]).double()
    low, high = float(both.min()), float(both.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / _BINS
    x = [low + (i + 0.5) * width for i in range(_BINS)]
    series = []
    for label, scores in (("clean", clean), ("triggered", triggered)):
        place = ((scores.double() - low) / width).long().clamp(0, _BINS - 1)
        counts = torch.bincount(place, minlength=_BINS).double() / max(1, len(scores))
        series.append({"label": label, "x": x, "y": counts.tolist()})
    if alarm is not None and abs(alarm) <= _LARGEST:
        top = max(max(s["y"]) for s in series)
        series.append({"label": "the method's own threshold", "x": [alarm, alarm], "y": [0.0, top]})
    title = f"Scores of {len(triggered)} triggered and {len(clean)} clean inputs; larger is more suspicious"
    return {"title": title, "x_label": "score", "y_label": "share of inputs", "series": series}
