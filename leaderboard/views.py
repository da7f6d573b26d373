"""What templates show: rows of cells, tables of means, and the figures over many models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sleeperbench.leaderboard import about, terms, words
from sleeperbench.leaderboard.names import digest12, file_name, plugin_id
from sleeperbench.leaderboard.summary import (
    BOARD,
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
from sleeperbench.leaderboard.tracks import METRICS, NOTHING, judge
from sleeperbench.leaderboard.words import Shown

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
        nothing = mean.metric in NOTHING
        note += f"; {mean.as_none} as {'nothing' if nothing else 'none'}"
        what = "as an answer that says nothing" if nothing else "with the undefended model's figure"
        title += f"; {mean.as_none} failed or collapsed cells count {what}"
    return Shown(mean.metric, words.number(e.value, share), repr(e.value), title, note)


class Views:
    """Everything that pages share, worked out once from the results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.units, self.docs = about.declared(results.plugins)
        self.boards = boards(results.cells)
        self.metrics = [m for m in METRICS if any(c[m] is not None for c in results.cells)]
        self.verdicts = any(c["verdict"] is not None for c in results.cells)

    @cached_property
    def zoo(self) -> Mapping[tuple[str, ...], Sequence[Mapping[str, Any]]]:
        """(board's key, defense) -> what was measured over many models."""
        rows = self.results.measurements
        found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for m in rows.filter(pc.equal(rows["scope"], "zoo")).to_pylist():
            key = tuple(m[n] or "" for n in (*BOARD, "defense"))
            found.setdefault(key, []).append(m)
        return found

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
        return self.flags(flags + ["judges"] * judge(cell))

    @staticmethod
    def flags(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Flags as badges with their meaning."""
        return tuple((f.replace("_", " "), terms.FLAG_WORDS.get(f, "")) for f in names)

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
            what = "they count as an answer that says nothing" if count["judged"] else "they count as undefended"
            badges.append((f"{count['failed'] + count['collapsed']} failed or collapsed", what))
        if count["not_purified"]:
            badges.append((f"{count['not_purified']} not purified", terms.FLAG_WORDS["not_purified"]))
        figures = tuple(mean_shown(m, self.share(m.metric)) for m in means)
        kind = role(cells[0]) if cells else "defense"
        return MeanRow(name, link, kind, tuple(badges), len(covered), len(asked), count, figures)

    def by_track(
        self, board: Board, metrics: Sequence[str], defenses: Sequence[str]
    ) -> list[tuple[str, list[MeanRow]]]:
        """(access class, lines of those of `defenses` that are in it) for the access classes of a board."""
        groups: dict[str, list[MeanRow]] = {}
        for d in defenses:
            cells = board.of_defense[d]
            line = self.mean_row(board, d, href("defenses", d), attacked(cells), metrics)
            groups.setdefault(track(cells[0]), []).append(line)
        return [(TRACKS.get(t, f"access {t or 'not recorded'}"), lines) for t, lines in groups.items()]
