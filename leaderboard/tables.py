"""Run folders in, one set of results out: the tables, what is known of the plugins, and which run a cell is from."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sleeperbench.errors import BadInput
from sleeperbench.leaderboard.names import digest12, plugin_id
from sleeperbench.leaderboard.tracks import MEASURED, answer, judge
from sleeperbench.schema import CELLS, MEASUREMENTS, SCHEMA_VERSION, Column, arrow

BLOCK = 8192
"""Measurement rows that are turned into Python's at a time."""
OF_CELL = frozenset({c.name for c in CELLS} - {"status", "reason", "flag", "seconds", "method_version"})
"""Columns of measurements that say of which cell they are."""
CELL_ORDER = ("suite", "dataset", "arch", "attack", "rate", "defense", "seed", "cell")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        name: The folder's.
        path: Where it is.
        info: Its run.json.
        cells: All its rows of cells.parquet, those included that another run's stand for.
        versions: (kind, id) -> version of the method, from its plugins.json, and of defenses from its cells.
        began: When its first task started, `YYYY-MM-DD HH:MM` in UTC; empty where no row has a date.
        ended: When its last task started.
    """

    name: str
    path: Path
    info: Mapping[str, Any]
    cells: pa.Table
    versions: Mapping[tuple[str, str], Any]
    began: str
    ended: str


@dataclass(frozen=True)
class Results:
    """The merged tables of all runs.

    Args:
        cells: Rows of cells.parquet, sorted; `reasons` is parsed, `flags` holds the parts of `flag`, `kind` is the
            defense's in plugins.json, `control` whether that calls it one, `judges` says whether it leaves the model as
            it is, and metrics without a column there are added from the measurements.
        cells_table: The same rows as they were read, under the names that they have here.
        measurements: All rows of measurements.parquet, sorted by cell.
        spans: Cell -> (first row, number of rows) in `measurements`.
        plugins: (kind, id) -> its entry in plugins.json.
        runs: In the order given.
        owner: Cell, or name of what was measured over many models -> the run its figures are from.
        alone: Name here -> name in its run's tables and media, of what two suites call alike.
        notes: What a reader must know about the merge.
    """

    cells: list[dict[str, Any]]
    cells_table: pa.Table
    measurements: pa.Table
    spans: Mapping[str, tuple[int, int]]
    plugins: Mapping[tuple[str, str], Mapping[str, Any]]
    runs: tuple[Run, ...]
    owner: Mapping[str, Run]
    alone: Mapping[str, str]
    notes: tuple[str, ...]
    _block: list[Any] = field(default_factory=lambda: [0, []], repr=False)

    @cached_property
    def _media(self) -> Mapping[Path, frozenset[str]]:
        """Run folder -> its folders of media; one listing instead of a look for each cell."""
        return {run.path: frozenset(p.name for p in (run.path / "media").glob("*")) for run in self.runs}

    def drawn(self, cell: str) -> tuple[Path, str] | None:
        """The folder of the media of a cell, or of what was measured over many models, and its name in its run."""
        run, name = self.owner[cell].path, self.alone.get(cell, cell)
        folder = digest12(name)
        return (run / "media" / folder, name) if folder in self._media[run] else None

    @cached_property
    def _shown(self) -> pa.Table:
        """The measurements without the columns that their cell has too, and without the time of day."""
        names = [c.name for c in MEASUREMENTS if c.name not in OF_CELL and c.type != "timestamp"]
        return self.measurements.select(names)

    def measured(self, cell: str) -> list[dict[str, Any]]:
        """The measurement rows of one cell, by evaluator, metric and qualifier; quick where cells come in order."""
        start, length = self.spans.get(cell, (0, 0))
        first, rows = self._block
        if not first <= start <= start + length <= first + len(rows):
            first, rows = start, plain(self._shown.slice(start, max(length, BLOCK)))
            self._block[:] = first, rows
        return rows[start - first : start - first + length]


def plain(table: pa.Table) -> list[dict[str, Any]]:
    """A table's rows, as `to_pylist` gives them in four times the time."""
    columns = []
    for column in table.columns:
        if pa.types.is_string(column.type):
            columns.append(column.to_numpy().tolist())
        elif pa.types.is_timestamp(column.type) or pa.types.is_boolean(column.type):
            columns.append(column.to_pylist())
        else:
            values = pc.fill_null(column, 0).to_numpy().tolist()
            if column.null_count:
                valid = pc.is_valid(column).to_pylist()
                values = [v if ok else None for v, ok in zip(values, valid, strict=True)]
            columns.append(values)
    names = table.column_names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _table(path: Path, columns: tuple[Column, ...]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as e:
        raise BadInput(
            f"no {path.name} in {path.parent}: give a run folder, as `sleeperbench run SUITE --out DIR` leaves it"
        ) from e
    except (OSError, pa.ArrowException) as e:
        raise BadInput(f"cannot read {path}: {str(e).splitlines()[0]}; run the suite again to write it anew") from e
    version = (table.schema.metadata or {}).get(b"sleeperbench.schema", b"none").decode(errors="replace")
    if version != SCHEMA_VERSION:
        raise BadInput(
            f"{path} has table schema {version}, this sleeperbench reads {SCHEMA_VERSION}: "
            "render it with the version that wrote it, or run the suite again"
        )
    wanted = arrow(columns)
    missing = [n for n in wanted.names if n not in table.column_names]
    if missing:
        raise BadInput(f"{path} lacks the column {', '.join(missing)}: run the suite again to write it anew")
    try:
        table = table.select(wanted.names).cast(wanted)
    except (pa.ArrowException, ValueError) as e:
        raise BadInput(f"{path} has a column of another type: {str(e).splitlines()[0]}") from e
    at = wanted.get_field_index("cell")
    return table.set_column(at, wanted.field(at), pc.fill_null(table["cell"], ""))


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"cannot read {path}: {e}; it must be JSON as `sleeperbench run` writes it") from e


def _plugins(folder: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(kind, id) -> its entry in the plugins.json of a run."""
    raw = _json(folder / "plugins.json", [])
    entries = raw.get("plugins", []) if isinstance(raw, dict) else raw
    if not isinstance(entries, list):
        raise BadInput(f"{folder / 'plugins.json'} must hold a list of plugins")
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in entries:
        if isinstance(entry, dict) and all(isinstance(entry.get(k), str) for k in ("kind", "id")):
            found.setdefault((entry["kind"].removesuffix("s"), entry["id"]), entry)
    return found


def _minute(moment: pa.Scalar) -> str:
    """A moment as `YYYY-MM-DD HH:MM`; empty where there is none, or none that a calendar has."""
    try:
        found = moment.as_py()
    except (OverflowError, ValueError):
        return ""
    return found.isoformat(" ", "minutes")[:16] if found else ""


def _run(folder: Path, cells: pa.Table, rows: pa.Table, plugins: Mapping[tuple[str, str], Mapping[str, Any]]) -> Run:
    """A run with its dates and the versions of its methods."""
    info = _json(folder / "run.json", {})
    used = {*zip(cells["defense"].to_pylist(), cells["method_version"].to_pylist(), strict=True)}
    versions: dict[tuple[str, str], Any] = {
        ("defense", plugin_id(d)): v for d, v in sorted((d or "", v) for d, v in used if v is not None)
    }
    versions |= {key: v for key, e in plugins.items() if (v := e.get("method_version")) is not None}
    ends = pc.min_max(rows["started"])
    return Run(
        folder.resolve().name,
        folder,
        info if isinstance(info, dict) else {},
        cells,
        versions,
        _minute(ends["min"]),
        _minute(ends["max"]),
    )


def _merged(run: Run, mine: Mapping[tuple[str, str], Any], known: dict[tuple[str, str], Any], notes: list[str]) -> None:
    """Add a run's plugins to those of the runs before it; a note where their versions differ."""
    for key, entry in mine.items():
        first = known.setdefault(key, entry)
        old, new = first.get("method_version"), entry.get("method_version")
        if old != new:
            notes.append(f"{key[0]} {key[1]} is of version {old} in one run and of version {new} in run {run.name}.")


def _mend(row: dict[str, Any]) -> dict[str, Any]:
    """A cell's row with its reasons parsed, its flags as a tuple, and None where a figure is not finite."""
    odd = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    try:
        reasons = json.loads(row["reasons"] or "{}")
    except (ValueError, RecursionError):
        reasons = {}
    row["reasons"] = {str(k): str(v) for k, v in reasons.items()} if isinstance(reasons, dict) else {}
    for name in odd:
        row["reasons"].setdefault(name, f"nan: the table holds {row[name]!r}")
        row[name] = None
    row["flags"] = tuple(f for f in (row["flag"] or "").split(";") if f)
    row["status"] = row["status"] or "not_run"
    for column in CELLS:
        if column.type == "str" and row[column.name] is None:
            row[column.name] = ""
    return row


def _cells(
    table: pa.Table, rows: pa.Table, plugins: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of cells with all that tables and means are made of."""
    cells = [_mend(row) for row in plain(table)]
    for row in cells:
        info = plugins.get(("defense", plugin_id(row["defense"])), {}).get("info")
        row["kind"] = str(info.get("kind", "")) if isinstance(info, dict) else ""
        row["control"] = isinstance(info, dict) and info.get("control") is True
        row["judges"] = judge(row)
    unqualified = pc.and_(pc.equal(rows["scope"], "cell"), pc.equal(pc.fill_null(rows["qualifier"], ""), ""))
    wanted = pc.and_(unqualified, pc.is_in(rows["metric"], value_set=pa.array(MEASURED)))
    answer(cells, plain(rows.filter(wanted).select(["cell", "metric", "value", "status", "reason"])))
    return cells


def _own_names(table: pa.Table, home: dict[str, str], alone: dict[str, str]) -> pa.Table:
    """The table with `NAME of SUITE` for what another suite called NAME first.

    Adds to `home` which suite has a name, and to `alone` what the new names stand for.
    """
    pairs = table.select(["cell", "suite"]).group_by(["cell", "suite"]).aggregate([]).to_pylist()
    new = {}
    for cell, suite in sorted((p["cell"], p["suite"] or "") for p in pairs):
        if home.setdefault(cell, suite) != suite:
            new[cell, suite] = f"{cell} of {suite or 'a suite without a name'}"
            alone[new[cell, suite]] = cell
    if not new:
        return table
    keys = zip(table["cell"].to_pylist(), table["suite"].to_pylist(), strict=True)
    names = [new.get((cell, suite or ""), cell) for cell, suite in keys]
    at = table.schema.get_field_index("cell")
    return table.set_column(at, table.schema.field(at), pa.array(names, pa.string()))


def load(folders: Sequence[Path]) -> Results:
    """Read and merge run folders; where two hold the same cell of one suite, the first is kept and a note says so.

    Cells of the same name in two suites are two cells: the later one is called `NAME of SUITE`.

    Raises:
        BadInput: a table is missing, unreadable or of another schema version, or a JSON file is damaged.
    """
    if not folders:
        raise BadInput("no run folder given: name at least one, as `sleeperbench run SUITE --out DIR` leaves it")
    runs, notes = [], []
    plugins: dict[tuple[str, str], Mapping[str, Any]] = {}
    owner: dict[str, Run] = {}
    cell_parts, row_parts = [], []
    home: dict[str, str] = {}
    alone: dict[str, str] = {}
    taken: set[str] = set()
    measured: set[str] = set()
    for folder in folders:
        cells = _own_names(_table(folder / "cells.parquet", CELLS), home, alone)
        rows = _own_names(_table(folder / "measurements.parquet", MEASUREMENTS), home, alone)
        entries = _plugins(folder)
        run = _run(folder, cells, rows, entries)
        names = cells["cell"].to_pylist()
        cells = cells.filter(pa.array([c not in taken for c in names], pa.bool_()))
        if doubled := len(names) - len(cells):
            notes.append(
                f"{doubled} cells of run {run.name} stand in an earlier run too; the earlier figures are kept."
            )
        if others := sum(c in alone for c in cells["cell"].to_pylist()):
            notes.append(
                f"{others} cells of run {run.name} are called as cells of another suite in an earlier run; "
                "here the name of their own suite stands behind theirs."
            )
        taken |= {*names}
        owner |= dict.fromkeys(cells["cell"].to_pylist(), run)
        # Rows of an attack or zoo may name a cell that no cells table holds: the first run that measured it counts.
        mine = {c for c in rows["cell"].unique().to_pylist() if c not in measured and owner.setdefault(c, run) is run}
        measured |= mine
        row_parts.append(rows.filter(pc.is_in(rows["cell"], value_set=pa.array(sorted(mine), pa.string()))))
        cell_parts.append(cells)
        _merged(run, entries, plugins, notes)
        runs.append(run)
    cells = pa.concat_tables(cell_parts).sort_by([(c, "ascending") for c in CELL_ORDER])
    order = ("cell", "stage", "evaluator", "metric", "qualifier", "task_key")
    rows = pa.concat_tables(row_parts).sort_by([(c, "ascending") for c in order]).combine_chunks()
    spans: dict[str, tuple[int, int]] = {}
    first = 0
    for cell, found in itertools.groupby(rows["cell"].to_pylist()):
        length = sum(1 for _ in found)
        spans[cell] = (first, length)
        first += length
    return Results(
        cells=_cells(cells, rows, plugins),
        cells_table=cells,
        measurements=rows,
        spans=spans,
        plugins=dict(sorted(plugins.items())),
        runs=tuple(runs),
        owner=owner,
        alone=alone,
        notes=tuple(notes),
    )
