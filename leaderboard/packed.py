"""All cells in one script, packed for the table's own script: words once with an index per row, figures as counts.

A page opened from disk may not read files, but it may run a script of the site; so the cells are one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from sleeperbench.leaderboard import words
from sleeperbench.leaderboard.about import BIBTEX, known
from sleeperbench.leaderboard.names import clean, plugin_id
from sleeperbench.leaderboard.summary import Cell
from sleeperbench.leaderboard.views import MEASURED_AS, Row, Views, href

Json = dict[str, Any]

IDENTITY = ("cell", "dataset", "arch", "attack", "rate", "defense", "access", "seed", "status")
MAIN = (
    *("c_acc", "asr", "asr_attacked", "o_asr", "p_asr", "der", "p_asr_net", "bec", "p_der"),
    *("det_score", "verdict", "input_tpr_fpr1", "reasr_net"),
)
"""The metrics that `Main columns` shows."""


class _Words:
    """Distinct values in the order of their first mention, and the index of each row's."""

    def __init__(self) -> None:
        self.index: dict[Hashable, int] = {}
        self.at: list[int] = []

    def add(self, value: Hashable) -> None:
        self.at.append(self.index.setdefault(value, len(self.index)))

    @property
    def values(self) -> list[Any]:
        return list(self.index)


def _runs(values: Iterable[int]) -> list[int]:
    """Value, length, value, length, ... of equal neighbours."""
    packed: list[int] = []
    for v in values:
        if packed and packed[-2] == v:
            packed[-1] += 1
        else:
            packed += [v, 1]
    return packed


def _tenths(value: float) -> int:
    """A share as tenths of a per cent, rounded as it is printed."""
    return round(float(f"{100 * value:.1f}") * 10)


def _figures(views: Views, metric: str, rows: Sequence[Row], reasons: dict[tuple[str, str], int]) -> Json:
    """One column: `runs` of reasons (-1 where there is a figure), then what belongs to the figures alone."""
    share, verdict = metric != "verdict" and views.share(metric), metric == "verdict"
    name, intervals = MEASURED_AS.get(metric, metric), views.intervals
    runs: list[int] = []
    x: list[Any] = []
    totals: list[int] = []
    ends: list[tuple[int, int] | None] = []
    texts: list[str] = []
    notes: list[str] = []
    place = next(i for i, head in enumerate(views.heads) if head.metric == metric)
    for r in rows:
        value, shown = r.cell[metric], r.figures[place]
        if value is None:
            runs.append(reasons.setdefault((shown.text, shown.title), len(reasons)))
            continue
        runs.append(-1)
        m = None if verdict else intervals.get((r.cell["cell"], name, value))
        counted = m is not None and m["count"] is not None and m["total"] and m["count"] / m["total"] == value
        x.append(m["count"] if m is not None and counted else int(value) if verdict else value)
        totals.append(m["total"] if m is not None and counted else 0)
        ends.append((_tenths(m["lower"]), _tenths(m["upper"])) if share and m and shown.note else None)
        texts.append(shown.text)
        notes.append(shown.note)
    head = views.heads[place]
    column: Json = {"name": metric, "label": head.label, "runs": _runs(runs), "x": x, "total": _runs(totals)}
    if not share or not all(map(math.isfinite, x)):
        column["text"] = texts
        if any(notes):
            column["note"] = notes
    elif any(ends):
        column |= {"low": [e and e[0] for e in ends], "high": [e and e[1] for e in ends]}
    return column


def _bibtex(views: Views, kind: str, label: str) -> list[str]:
    """BibTeX of a plugin; of a wrapped one, of both."""
    name = plugin_id(label)
    entries = [views.results.plugins.get((kind, part), {}) for part in dict.fromkeys((name, *name.split(":")))]
    return [text for e in entries if (text := clean(str(known(e, "bibtex"))).strip())]


def _name(cell: Cell) -> str:
    """The name that a cell has when nothing is odd about it."""
    plain = (cell["dataset"], cell["arch"], f"{cell['attack']}@{cell['rate'] or 0:g}", cell["defense"])
    return "/".join(map(clean, plain)) + f"/s{cell['seed']}"


def _rank(values: Sequence[Any]) -> list[int | None]:
    """The place of each value in their order; equal ones share one, and what is None has none."""
    order = {v: i for i, v in enumerate(sorted({v for v in values if v is not None}))}
    return [order.get(v) for v in values]


def cells(views: Views) -> Json:
    """All rows of the table of cells, in its order, as the table's script reads them."""
    rows = views.rows
    columns = ("dataset", "arch", "attack", "defense", "access")
    text: Json = {}
    for c in columns:
        found = _Words()
        for r in rows:
            found.add(r.cell[c])
        shown = [clean(v) for v in found.values]
        text[c] = {"values": shown, "rank": _rank(shown), "at": found.at}
        if c in ("dataset", "attack", "defense"):
            text[c] |= {"hrefs": [href(f"{c}s", v) for v in found.values]}
            text[c] |= {"bibtex": [_bibtex(views, c, v) for v in found.values]}
    for c in ("rate", "seed"):
        found = _Words()
        for r in rows:
            found.add(r.cell[c])
        text[c] = {"values": found.values, "raw": found.values, "rank": _rank(found.values), "at": found.at}
    text["rate"] |= {
        "values": ["no rate" if v is None else f"{100 * v:g} %" for v in text["rate"]["raw"]],
        "plain": [f"{v or 0:g}" for v in text["rate"]["raw"]],
    }
    roles, states = _Words(), _Words()
    for r in rows:
        roles.add("" if r.role == "defense" else r.role)
        states.add((r.cell["status"], r.short, tuple(b for b, _ in r.badges), r.css))
    raw = [clean(";".join((status, *badges))) for status, _, badges, _ in states.values]
    text["role"] = {"values": roles.values, "at": roles.at}
    text["status"] = {
        "values": [clean("; ".join((short, *badges))) for _, short, badges, _ in states.values],
        "words": [clean(short) for _, short, _, _ in states.values],
        "badges": [[clean(b) for b in badges] for _, _, badges, _ in states.values],
        "css": [css for _, _, _, css in states.values],
        "void": [int(not {"weak", "lost"}.isdisjoint(css.split())) for _, _, _, css in states.values],
        "raw": raw,
        "rank": _rank(raw),
        "at": states.at,
    }
    names = [clean(r.cell["cell"]) for r in rows]
    reasons: dict[tuple[str, str], int] = {}
    metrics = [_figures(views, head.metric, rows, reasons) for head in views.heads]
    return {
        "rows": len(rows),
        "contestants": sum(r.role == "defense" for r in rows),
        "pages": "".join(r.href[6:-5] for r in rows),
        "names": {str(i): n for i, (n, r) in enumerate(zip(names, rows, strict=True)) if n != _name(r.cell)},
        "off": sorted(views.off),
        "main": [c for c in IDENTITY if c not in views.off] + [h.metric for h in views.heads if h.metric in MAIN],
        "text": text,
        "metrics": metrics,
        "reasons": [[clean(word), clean(title)] for word, title in reasons],
        "meanings": {"none": "every field holds a figure"}
        | {word: words.MEANINGS[word] for word, _ in reasons if word in words.MEANINGS},
        "bibtex": BIBTEX,
    }


def script(packed: Json) -> bytes:
    """The packed cells as a script that sets them; a string that is parsed is read sooner than a literal."""
    text = json.dumps(packed, separators=(",", ":"), allow_nan=False)
    text = text.replace("\\", "\\\\").replace("'", "\\u0027").replace("<", "\\u003c")
    return f"window.sleeperbenchCells = JSON.parse('{text}');\n".encode("ascii")
