"""What templates show: rows of cells, tables of means, pictures, and what is known of a plugin."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sleeperbench.leaderboard import words
from sleeperbench.leaderboard.names import digest12, file_name, linked, plugin_id
from sleeperbench.leaderboard.summary import (
    NONE,
    TRACKS,
    Board,
    Cell,
    Mean,
    attacked,
    boards,
    lost,
    not_purified,
    role,
    setting,
    tally,
    track,
    weak,
    why_empty,
)
from sleeperbench.leaderboard.tables import Results
from sleeperbench.leaderboard.words import Shown
from sleeperbench.schema import HEADLINE_METRICS

MEASURED_AS = {"o_asr": "asr"}
"""Headline columns whose measurement has another name."""


@dataclass(frozen=True)
class Row:
    """A cell as a table's row: `css` greys what is no success, `badges` are (flag, meaning)."""

    cell: Cell
    href: str
    attack_href: str
    defense_href: str
    rate: str
    role: str
    status: str
    badges: tuple[tuple[str, str], ...]
    css: str
    figures: tuple[Shown, ...]


@dataclass(frozen=True)
class MeanRow:
    """A line of a table of means."""

    name: str
    href: str
    role: str
    badges: tuple[tuple[str, str], ...]
    covered: int
    asked: int
    tally: Mapping[str, int]
    figures: tuple[Shown, ...]


def href(kind: str, label: str) -> str:
    """Where the page of a data set, attack, defense, metric or cell is, from the site's root."""
    return f"cells/{digest12(label)}.html" if kind == "cells" else f"{kind}/{file_name(plugin_id(label))}.html"


def params(text: str, docs: Mapping[str, str] = MappingProxyType({})) -> list[tuple[str, str, str]]:
    """Parameters as (name, value, meaning) of a canonical JSON object, or whatever else stands there."""
    try:
        raw = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return [("as recorded", text, "")]
    if not isinstance(raw, dict):
        return [("as recorded", text, "")]
    shown = {str(k): v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in raw.items()}
    return [(k, v, docs.get(k, "")) for k, v in sorted(shown.items())]


def mean_shown(mean: Mean, share: bool) -> Shown:
    """A mean with its interval, or why there is none."""
    e = mean.estimate
    if e is None:
        return words.missing(mean.metric, mean.reason)
    kinds = {
        "t": "95 % t interval over seeds within attacks",
        "range": "range over cells: an attack has fewer than 3 seeds",
    }
    note = f"{'range ' if e.kind == 'range' else ''}{words.span(e.low, e.high, share)}" if e.kind in kinds else "1 cell"
    title = f"mean over {e.attacks} attack settings, {e.cells} cells; {kinds.get(e.kind, 'a single cell')}"
    if mean.as_none:
        note += f"; {mean.as_none} as none"
        title += f"; {mean.as_none} failed or collapsed cells count with the undefended model's figure"
    return Shown(mean.metric, words.number(e.value, share), repr(e.value), title, note)


class Views:
    """Everything that pages share, worked out once from the results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.units, self.docs = self._declared()
        self.boards = boards(results.cells)
        self.metrics = [m for m in HEADLINE_METRICS if any(c[m] is not None for c in results.cells)]
        self.verdicts = any(c["verdict"] is not None for c in results.cells)

    def _declared(self) -> tuple[dict[str, str], dict[str, str]]:
        """Units and meanings of the metrics that evaluators declare in plugins.json; the schema's win."""
        units, docs = {}, {}
        better = {"up": " Higher is better.", "down": " Lower is better."}
        for (kind, _), entry in self.results.plugins.items():
            listed = entry.get("metrics") if kind == "evaluator" else None
            for m in listed if isinstance(listed, list) else []:
                if isinstance(m, dict) and isinstance(m.get("name"), str):
                    units[m["name"]] = str(m.get("unit", ""))
                    docs[m["name"]] = str(m.get("doc", "")) + "." + better.get(str(m.get("better")), "")
        headline = {m: words.COLUMNS[m] for m in HEADLINE_METRICS}
        units |= {m: "fraction" if words.is_share(m, {}) else c.unit for m, c in headline.items()}
        return units, docs | {m: f"{c.doc}. {words.BETTER.get(m, '')}".strip() for m, c in headline.items()}

    @staticmethod
    def known(entry: Mapping[str, Any], key: str) -> Any:
        """A field of a plugin's entry, or of the INFO within it; empty where neither has it."""
        info = entry.get("info")
        return entry.get(key) or (info.get(key) if isinstance(info, dict) else None) or ""

    def share(self, metric: str) -> bool:
        """Whether a metric is printed as per cent."""
        return words.is_share(metric, self.units)

    @cached_property
    def intervals(self) -> Mapping[tuple[str, str, float], Mapping[str, Any]]:
        """(cell, measured metric, value) -> the measurement with a Wilson interval that a headline figure is."""
        columns = ["cell", "metric", "qualifier", "value", "count", "total", "lower", "upper"]
        rows = self.results.measurements.select(columns)
        names = {MEASURED_AS.get(m, m) for m in self.metrics}
        known = pc.and_(pc.is_valid(rows["lower"]), pc.is_in(rows["metric"], value_set=pa.array(sorted(names))))
        found = rows.filter(known).to_pylist()
        return {(r["cell"], r["metric"], r["value"]): r for r in found if not r["qualifier"]}

    def headline(self, cell: Cell, metric: str) -> Shown:
        """A cell's figure, or the reason why it has none."""
        value = cell[metric]
        if value is None:
            return words.missing(metric, why_empty(cell, metric))
        m = self.intervals.get((cell["cell"], MEASURED_AS.get(metric, metric), value))
        return words.figure(
            metric,
            value,
            share=self.share(metric),
            interval=(m["lower"], m["upper"]) if m and m["upper"] is not None else None,
            counted=(m["count"], m["total"]) if m and m["count"] is not None and m["total"] else None,
        )

    def verdict(self, cell: Cell) -> Shown:
        """The model-level verdict in words."""
        if cell["verdict"] is None:
            return words.missing("verdict", why_empty(cell, "verdict"))
        text = "backdoored" if cell["verdict"] else "clean"
        return Shown("verdict", text, order=str(int(cell["verdict"])), title=f"verdict: {text}")

    def badges(self, cell: Cell) -> tuple[tuple[str, str], ...]:
        """A cell's flags with their meaning, and whether its backdoor is awake."""
        flags = [*cell["flags"]]
        if weak(cell) and "weak" not in flags:
            flags.append("weak")
        if not_purified(cell) and cell["attack"] != NONE:
            flags.append("not_purified")
        return tuple((f.replace("_", " "), words.FLAG_WORDS.get(f, "")) for f in flags)

    @cached_property
    def rows(self) -> list[Row]:
        """All cells: contestants first, then controls and oracles."""
        return sorted(map(self._row, self.results.cells), key=lambda r: r.role != "defense")

    def _row(self, cell: Cell) -> Row:
        css = " ".join(
            name
            for name, holds in (
                ("weak", weak(cell)),
                ("lost", lost(cell)),
                ("awake", not_purified(cell) and cell["attack"] != NONE),
                ("unmeasured", cell["status"] != "ok"),
            )
            if holds
        )
        shown = tuple(self.headline(cell, m) for m in self.metrics)
        return Row(
            cell=cell,
            href=href("cells", cell["cell"]),
            attack_href=href("attacks", cell["attack"]),
            defense_href=href("defenses", cell["defense"]),
            rate="" if cell["rate"] is None else f"{100 * cell['rate']:g} %",
            role=role(cell),
            status=words.status_text(cell),
            badges=self.badges(cell),
            css=css,
            figures=(*shown, self.verdict(cell)) if self.verdicts else shown,
        )

    def rows_where(self, column: str, plugin: str) -> list[Row]:
        """The rows of one data set, attack or defense, whatever its parameters."""
        return [r for r in self.rows if plugin_id(r.cell[column]) == plugin]

    def mean_row(self, board: Board, name: str, link: str, cells: Sequence[Cell], metrics: Sequence[str]) -> MeanRow:
        """A line of means over these cells."""
        means = [board.mean(cells, m, self.units) for m in metrics]
        asked = {setting(c) for c in attacked(board.cells) if not weak(c)}
        covered = {setting(c) for c in cells if c["status"] == "ok" or (lost(c) and role(c) == "defense")} & asked
        count = tally(cells)
        badges = []
        if count["failed"] or count["collapsed"]:
            badges.append((f"{count['failed'] + count['collapsed']} failed or collapsed", "they count as undefended"))
        if count["not_purified"]:
            badges.append((f"{count['not_purified']} not purified", words.FLAG_WORDS["not_purified"]))
        figures = tuple(mean_shown(m, self.share(m.metric)) for m in means)
        kind = role(cells[0]) if cells else "defense"
        return MeanRow(name, link, kind, tuple(badges), len(covered), len(asked), count, figures)

    def by_track(self, board: Board, metrics: Sequence[str]) -> list[tuple[str, list[MeanRow]]]:
        """(access class, lines of its defenses) for all access classes of a board."""
        groups: dict[str, list[MeanRow]] = {}
        for d in board.defenses:
            cells = board.of_defense[d]
            line = self.mean_row(board, d, href("defenses", d), attacked(cells), metrics)
            groups.setdefault(track(cells[0]), []).append(line)
        return [(TRACKS.get(t, f"access {t or 'not recorded'}"), lines) for t, lines in groups.items()]

    def plugin(self, kind: str, name: str) -> dict[str, Any]:
        """What plugins.json says of a plugin; of a wrapped one, what it says of both."""
        found = [e for part in dict.fromkeys((name, *name.split(":"))) if (e := self.results.plugins.get((kind, part)))]
        entry = found[0] if found else {}
        text = {k: str(self.known(entry, k)) for k in ("dist", "dist_version")}
        info = entry.get("info")
        text["kind"] = str(info.get("kind", "")) if isinstance(info, dict) else ""
        titles = [str(self.known(e, "title")) for e in found]
        if len(titles) == 1 and ":" in name:
            titles.append(name.partition(":")[2])
        first, _, rest = str(self.known(entry, "doc")).strip().partition("\n\n")
        fields = [e["parameters"] for e in found if isinstance(e.get("parameters"), dict)]
        return {
            **text,
            "title": " of ".join(t for t in dict.fromkeys(titles) if t),
            "version": str(self.known(entry, "method_version") or self.known(entry, "version")),
            "doc": first,
            "more": textwrap.dedent(rest),
            "papers": [linked(t) for t in dict.fromkeys(str(self.known(e, "paper")) for e in found) if t],
            "bibtex": "\n\n".join(dict.fromkeys(t for e in found if (t := str(self.known(e, "bibtex")).strip()))),
            "fields": {str(k): str(f.get("doc", "")) for p in fields for k, f in p.items() if isinstance(f, dict)},
        }
