"""What templates show: rows of cells, tables of means, and the figures over many models."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sleeperbench.leaderboard import about, charts, terms, words
from sleeperbench.leaderboard.names import digest12, file_name, plugin_id
from sleeperbench.leaderboard.stats import Estimate
from sleeperbench.leaderboard.summary import (
    BOARD,
    NONE,
    TRACKS,
    Board,
    Cell,
    Mean,
    attacked,
    benign,
    boards,
    lost,
    measured,
    not_purified,
    role,
    setting,
    tally,
    track,
    trains,
    weak,
    why_empty,
)
from sleeperbench.leaderboard.tables import Results, plain
from sleeperbench.leaderboard.tracks import LEADING, METRICS, NOTHING, judge
from sleeperbench.leaderboard.words import Shown

TOOK = ("seconds", "cpu_seconds", "peak_mb", "forwards", "backwards", "queries")
"""What a defense took, as the rows of evaluator `cost` carry it."""
ASIDE = ("psnr", "ssim", "linf", "silhouette", "cover_acc")
"""What is measured of an attack, or of its cover images, and has no column in the tables of cells."""
CARRIED = {"p_asr_qra": "on", "asr_tba": "source"}
"""Metrics of perturbations that are tried on other models, and the part of a qualifier that names the other one."""
MOST_CARRIED = 16
"""Most names at a side of a picture of these."""
MEASURED_AS = {"o_asr": "asr"}
"""Headline columns whose measurement has another name."""


@dataclass(frozen=True, slots=True)
class Row:
    """A cell as a table's row: `css` greys what is no success, `badges` are (flag, meaning)."""

    cell: Cell
    href: str
    dataset_href: str
    attack_href: str
    defense_href: str
    rate: str
    role: str
    status: str
    short: str
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
    took: Shown


@dataclass(frozen=True, slots=True)
class Head:
    """A column of figures: its metric, heading, page and meaning."""

    metric: str
    label: str
    href: str
    doc: str


@lru_cache(maxsize=200_000)
def href(kind: str, label: str) -> str:
    """Where the page of a data set, attack, defense, metric or cell is, from the site's root."""
    return f"cells/{digest12(label)}.html" if kind == "cells" else f"{kind}/{file_name(plugin_id(label))}.html"


INTERVALS = {
    "t": "95 % t interval over seeds within attacks",
    "range": "range over cells: an attack has fewer than 3 seeds",
}
"""What the ends of an estimate are."""


def estimate_note(e: Estimate, share: bool) -> str:
    """The second line of a mean: its interval, its range, or that it is one cell."""
    if e.kind not in INTERVALS:
        return "1 cell"
    return f"{'range ' if e.kind == 'range' else ''}{words.span(e.low, e.high, share)}"


def void_words(mean: Mean) -> tuple[str, str]:
    """Why a mean or cells of it are no success, and whose figure these count with: in a few words, and in full."""
    if mean.weak:
        return "weak", f"{terms.FLAG_WORDS['weak']}, so this is what was measured and enters no mean over attacks"
    nothing = mean.metric in NOTHING
    what = "as an answer that says nothing" if nothing else "with the undefended model's figure"
    brief, full = [], []
    if mean.as_none:
        brief.append(f"{mean.as_none} as {'nothing' if nothing else 'none'}")
        full.append(f"{mean.as_none} failed or collapsed cells count {what}")
    if mean.ruined:
        brief.append(f"{mean.ruined} collapsed")
        full.append(f"{mean.ruined} collapsed cells count with their own figure")
    return "; ".join(brief), "; ".join(full)


def mean_shown(mean: Mean, share: bool) -> Shown:
    """A mean with its interval, or why there is none."""
    e = mean.estimate
    if e is None:
        return words.missing(mean.metric, mean.reason)
    note = estimate_note(e, share)
    title = f"mean over {e.attacks} attack settings, {e.cells} cells; {INTERVALS.get(e.kind, 'a single cell')}"
    brief, full = void_words(mean)
    note += f"; {brief}" if brief else ""
    title += f"; {full}" if full else ""
    return Shown(mean.metric, words.number(e.value, share), repr(e.value), title, note)


class Views:
    """Everything that pages share, worked out once from the results."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._heads: dict[str, Head] = {}
        self._same: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._shares: dict[str, bool] = {}
        self._fields: dict[tuple[Any, ...], Mean | None] = {}
        self._overall: dict[tuple[Any, ...], Mean] = {}
        self.contests: dict[tuple[str, ...], Any] = {}
        self._plugins: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._params: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
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

    @cached_property
    def aside(self) -> Mapping[tuple[str, str], tuple[float | None, str]]:
        """(cell, metric of `ASIDE`) -> its value, or None and why there is none."""
        rows = self.results.measurements.select(["cell", "metric", "qualifier", "value", "status", "reason"])
        rows = rows.filter(pc.is_in(rows["metric"], value_set=pa.array(ASIDE)))
        found = {}
        for r in plain(rows):
            if not r["qualifier"]:
                known = r["value"] is not None and abs(r["value"]) < 1e30
                found[r["cell"], r["metric"]] = (r["value"], "") if known else (None, r["reason"] or r["status"] or "")
        return found

    def with_aside(self, cell: Cell, metric: str) -> Cell:
        """A cell with its figure of any metric, also of one that cells have no column for."""
        if metric not in ASIDE:
            return cell
        value, reason = self.aside.get((cell["cell"], metric), (None, ""))
        return {**cell, metric: value, "reasons": {**cell["reasons"], metric: reason}}

    @cached_property
    def costs(self) -> Mapping[str, Mapping[str, float]]:
        """Cell -> what its defense took, where evaluator `cost` measured it."""
        rows = self.results.measurements
        whole = pc.and_(pc.equal(rows["metric"], "cost_forwards"), pc.equal(pc.fill_null(rows["qualifier"], ""), ""))
        known = rows.filter(pc.and_(whole, pc.is_valid(rows["value"]))).select(["cell", *TOOK])
        return {r["cell"]: r for r in plain(known) if None not in r.values()}

    def medians(self, cells: Sequence[Cell]) -> tuple[int, Mapping[str, float]]:
        """Of how many cells it is known what the defense took, and the median of each part."""
        known = [self.costs[c["cell"]] for c in cells if c["cell"] in self.costs]
        return len(known), {k: statistics.median(r[k] for r in known) for k in TOOK if known}

    def took(self, cells: Sequence[Cell]) -> Shown:
        """What a defense took on a model: processor seconds, and beneath them its work in images."""
        n, half = self.medians(cells)
        if not n:
            return words.missing("cpu_seconds", "not_run: no evaluator of the suite measures it")
        images = {"forward": half["forwards"], "backward": half["backwards"], "asked about": half["queries"]}
        title = f"median of {n} cells; {words.number(half['seconds'], False)} s of wall time; images: "
        title += ", ".join(f"{v:,.0f} {k}" for k, v in images.items())
        note = f"{sum(images.values()):,.0f} images"
        return Shown("cpu_seconds", words.number(half["cpu_seconds"], False), repr(half["cpu_seconds"]), title, note)

    def share(self, metric: str) -> bool:
        """Whether a metric is printed as per cent."""
        if metric not in self._shares:
            self._shares[metric] = words.is_share(metric, self.units)
        return self._shares[metric]

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """The columns of figures that a table of cells has, in order."""
        made = [Head(m, words.label(m), href("metrics", m), self.docs.get(m, "")) for m in self.metrics]
        verdict = Head("verdict", "Verdict", "protocol.html", "Flagged as backdoored.")
        return (*made, verdict) if self.verdicts else tuple(made)

    def head(self, metric: str) -> Head:
        """Name and page of any metric."""
        if metric not in self._heads:
            self._heads[metric] = Head(metric, words.label(metric), href("metrics", metric), self.docs.get(metric, ""))
        return self._heads[metric]

    def same(self, answers: tuple[Any, ...]) -> tuple[Any, ...]:
        """The answers, the same object whenever they are the same."""
        return self._same.setdefault(answers, answers)

    def plugin(self, kind: str, name: str) -> Mapping[str, Any]:
        """What is known of a plugin."""
        if (kind, name) not in self._plugins:
            self._plugins[kind, name] = about.plugin(self.results.plugins, kind, name)
        return self._plugins[kind, name]

    def params(self, kind: str, cell: Cell) -> list[tuple[str, str, str]]:
        """Parameters of a cell's attack or defense as (name, value, meaning)."""
        return self.params_of(kind, plugin_id(cell[kind]), cell[f"{kind}_params"])

    def params_of(self, kind: str, name: str, text: str) -> list[tuple[str, str, str]]:
        """Parameters of a plugin as (name, value, meaning)."""
        key = kind, name, text
        if key not in self._params:
            self._params[key] = about.params(key[2], self.plugin(kind, key[1])["fields"])
        return self._params[key]

    @cached_property
    def intervals(self) -> Mapping[tuple[str, str, float], Mapping[str, Any]]:
        """(cell, measured metric, value) -> the measurement with a Wilson interval that a headline figure is."""
        columns = ["cell", "metric", "qualifier", "value", "count", "total", "lower", "upper"]
        rows = self.results.measurements.select(columns)
        names = {MEASURED_AS.get(m, m) for m in self.metrics}
        known = pc.and_(pc.is_valid(rows["lower"]), pc.is_in(rows["metric"], value_set=pa.array(sorted(names))))
        found = plain(rows.filter(known))
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
        if not_purified(cell) and not benign(cell):
            flags.append("not_purified")
        return self.flags(flags + ["judges"] * judge(cell))

    @staticmethod
    def flags(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Flags as badges with their meaning."""
        return tuple((f.replace("_", " "), terms.FLAG_WORDS.get(f, "")) for f in names)

    @cached_property
    def _carried(self) -> Mapping[tuple[str, str], Mapping[str, float]]:
        """(metric, cell) -> name of another model, empty for the cell's own -> success of a perturbation."""
        table = self.results.measurements.select(["cell", "metric", "qualifier", "value"])
        wanted = pc.is_in(table["metric"], value_set=pa.array([*CARRIED]))
        found: dict[tuple[str, str], dict[str, float]] = {}
        for m in table.filter(pc.and_(wanted, pc.is_valid(table["value"]))).to_pylist():
            key, _, name = (m["qualifier"] or "").partition("=")
            if key in ("", CARRIED[m["metric"]]) and ";" not in name and 0 <= m["value"] <= 1:
                found.setdefault((m["metric"], m["cell"]), {})[name] = m["value"]
        return found

    def transfers(self, row: Row, siblings: Sequence[Row]) -> list[tuple[str, str, charts.Matrix]]:
        """(id, metric, picture) of what perturbations of one model of an attack do to the others.

        Drawn where two models or more have such figures, on their pages and on that of the undefended model.

        Args:
            row: The cell whose page it is.
            siblings: All cells of its attacked model.
        """
        made = []
        for metric, key in CARRIED.items():
            shares: dict[tuple[str, str], tuple[float, str, str]] = {}
            measuring = set()
            for r in siblings:
                own = r.cell["defense"]
                for name, value in self._carried.get((metric, r.cell["cell"]), {}).items():
                    if not name and key == "source":
                        continue  # of all sources together
                    if name:
                        measuring.add(own)
                    source, to = (own, name or own) if key == "on" else (name, own)
                    what = f"learnt on {source}, tried on {to}: {words.label(metric)} {words.number(value, True)}"
                    shares[source, to] = value, r.href, what
            pages = {r.cell["defense"]: r.href for r in siblings}
            sources, targets = (sorted({pair[i] for pair in shares})[:MOST_CARRIED] for i in (0, 1))
            if len(measuring) < 2 or row.cell["defense"] not in {*measuring, NONE}:
                continue
            rows, columns = (
                [(n, pages.get(n) or href("defenses", n.partition("@")[0])) for n in x] for x in (sources, targets)
            )
            made.append((f"carried-{key}", metric, charts.matrix(rows, columns, shares)))
        return made

    @cached_property
    def rows(self) -> list[Row]:
        """All cells: contestants first, then controls and oracles."""
        return sorted(map(self._row, self.results.cells), key=lambda r: r.role != "defense")

    @cached_property
    def off(self) -> frozenset[str]:
        """Columns of the table of cells that are hidden at first: all rows say the same, or the row's heading says it.

        Access follows from the defense. The figures that readers look for first are never hidden.
        """
        said = {"access", "attack", "defense"}
        if len(self.rows) > 1:
            one: dict[str, set[Any]] = {c: {r.cell[c] for r in self.rows} for c in ("dataset", "arch", "seed")}
            one |= {"rate": {r.rate for r in self.rows}, "status": {(r.short, r.badges) for r in self.rows}}
            for i, m in enumerate(h.metric for h in self.heads):
                figures = {r.figures[i].order for r in self.rows if not r.figures[i].empty}
                one[m] = figures if m not in LEADING else {0, 1}
            said |= {c for c, values in one.items() if len(values) == 1}
        return frozenset(said)

    def _row(self, cell: Cell) -> Row:
        css = " ".join(
            name
            for name, holds in (
                ("weak", weak(cell)),
                ("lost", lost(cell)),
                ("awake", not_purified(cell) and not benign(cell)),
                ("unmeasured", cell["status"] != "ok"),
            )
            if holds
        )
        shown = tuple(self.headline(cell, m) for m in self.metrics)
        return Row(
            cell=cell,
            href=href("cells", cell["cell"]),
            dataset_href=href("datasets", cell["dataset"]),
            attack_href=href("attacks", cell["attack"]),
            defense_href=href("defenses", cell["defense"]),
            rate="" if cell["rate"] is None else f"{100 * cell['rate']:g} %",
            role=role(cell),
            status=words.status_text(cell),
            short=words.status_short(cell),
            badges=self.badges(cell),
            css=css,
            figures=(*shown, self.verdict(cell)) if self.verdicts else shown,
        )

    def rows_where(self, column: str, plugin: str) -> list[Row]:
        """The rows of one data set, attack or defense, whatever its parameters."""
        return [r for r in self.rows if plugin_id(r.cell[column]) == plugin]

    def field(self, board: Board, attack: str, defense: str, metric: str) -> Mean | None:
        """The mean over seeds of one attack setting and defense; None where the board has no such cell.

        Of an attack that did not implant it is what was measured, and says so: it enters no mean over attacks.
        """
        key = board.key, attack, defense, metric
        if key not in self._fields:
            cells = board.of_field.get((attack, defense))
            if cells and all(map(weak, cells)):
                self._fields[key] = replace(measured(cells, metric, self.units), weak=True)
            else:
                self._fields[key] = board.mean(cells, metric, self.units) if cells else None
        return self._fields[key]

    def overall(self, board: Board, defense: str, metric: str) -> Mean:
        """A defense's mean over all attacks of a board."""
        key = board.key, defense, metric
        if key not in self._overall:
            self._overall[key] = board.mean(attacked(board.of_defense[defense]), metric, self.units)
        return self._overall[key]

    def drawn(self, cells: Sequence[Cell], metric: str) -> Mean:
        """The mean that a picture shows of cells of one defense: what was measured where the attack implanted.

        What a ranking counts a ruined model with is no measurement: a picture of it would show an undefended model.
        """
        some = [c for c in cells if not weak(c)]
        return measured(some, metric, self.units) if some else Mean(metric, None, 0, "attack_did_not_implant")

    def mean_row(
        self,
        board: Board,
        name: str,
        link: str,
        cells: Sequence[Cell],
        metrics: Sequence[str],
        known: Sequence[Mean] | None = None,
    ) -> MeanRow:
        """A line of means over these cells; `known` are the means where they were worked out before."""
        means = known if known is not None else [board.mean(cells, m, self.units) for m in metrics]
        asked = board.asked
        covered = {setting(c) for c in cells if c["status"] == "ok" or (lost(c) and role(c) == "defense")} & asked
        count = tally(cells)
        badges = []
        if count["failed"] or count["collapsed"]:
            what = (
                "they count as an answer that says nothing"
                if count["judged"]
                else "they count as undefended, or as they are where that is worse"
            )
            badges.append((f"{count['failed'] + count['collapsed']} failed or collapsed", what))
        if count["not_purified"]:
            badges.append((f"{count['not_purified']} not purified", terms.FLAG_WORDS["not_purified"]))
        figures = tuple(mean_shown(m, self.share(m.metric)) for m in means)
        kind = role(cells[0]) if cells else "defense"
        took = self.took(cells)
        return MeanRow(name, link, kind, tuple(badges), len(covered), len(asked), count, figures, took)

    def by_track(
        self, board: Board, metrics: Sequence[str], defenses: Sequence[str]
    ) -> list[tuple[str, list[MeanRow]]]:
        """(track and access class, lines of those of `defenses` that are in it) for the access classes of a board."""
        groups: dict[tuple[bool, str], list[MeanRow]] = {}
        for d in defenses:
            cells = board.of_defense[d]
            known = [self.overall(board, d, m) for m in metrics]
            line = self.mean_row(board, d, href("defenses", d), attacked(cells), metrics, known)
            groups.setdefault((track(cells[0]) != "control" and trains(cells[0]), track(cells[0])), []).append(line)
        titles = {
            k: TRACKS.get(k[1], f"access {k[1] or 'not recorded'}")
            if k[1] == "control"
            else f"{'In-training' if k[0] else 'Repair'}, {TRACKS.get(k[1], 'access ' + (k[1] or 'not recorded'))}"
            for k in groups
        }
        order = sorted(groups, key=lambda k: (k[1] == "control", k[0]))
        return [(titles[k], groups[k]) for k in order]
