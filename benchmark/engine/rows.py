"""From findings to tables: identity, intervals, reasons, flags; nothing here computes a metric from images."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sleeperbench.engine.plan import Cell, Evaluation
from sleeperbench.engine.store import write_atomic
from sleeperbench.engine.task import canonical, digest
from sleeperbench.errors import BadInput
from sleeperbench.schema import CELLS, HEADLINE_METRICS, KEY, MEASUREMENTS, SCHEMA_VERSION, Column, arrow

NOT_PURIFIED = 0.20
ROUNDING = 1e-9
"""A difference of shares that equals a bar must not exceed it by the last bit."""
R_ACC_SHARE = 0.5
_WORST = ("failed", "timeout", "out_of_memory", "not_run")
"""Statuses that a cell takes from any of its rows, the worst first."""


def wilson(count: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) without trials."""
    if total == 0:
        return 0.0, 1.0
    p, n = count / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if count == 0 else centre - half), (1.0 if count == total else centre + half)


def measured(
    cell: Cell, evaluation: Evaluation, findings: Any, manifest: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of one evaluator on one cell.

    Args:
        cell: Where it was measured.
        evaluation: By which evaluator.
        findings: The artifact's `findings.json`.
        manifest: The artifact's manifest: task, environment, result.
        facts: `rate_actual`, `flag`, `dist`, `dist_version` of the row.
    """
    result, task = manifest["result"], manifest["task"]
    stage = "attacked" if cell.is_control else "defended"
    used = result.get("spent", result)  # evaluator `cost` measures the defense, and so do these columns of its rows
    rows = []
    for m in findings["rows"]:
        value = m["value"]
        bad = m["reason"].startswith("nan") or (value is not None and not math.isfinite(value))
        share = m["count"] is not None and m["total"] is not None and value is not None and not bad
        lower, upper = wilson(m["count"], m["total"]) if share else (None, None)
        reason = "nan: the figure is not finite" if bad else m["reason"]
        rows.append(
            _row(cell, evaluation, facts)
            | {
                "stage": m["stage"] or stage,
                "metric": m["metric"],
                "qualifier": m["qualifier"],
                "value": None if bad else value,
                "count": m["count"],
                "total": m["total"],
                "lower": lower,
                "upper": upper,
                "status": "failed" if bad else "not_applicable" if value is None else "ok",
                "reason": reason,
                "seconds": used["seconds"],
                "cpu_seconds": used["cpu_seconds"],
                "peak_mb": used["peak_mb"],
                **{k: used["cost"][k] for k in ("forwards", "backwards", "queries")},
                "device": used["device"],
                "threads": task["numerics"]["threads"],
                "precision": task["numerics"]["precision"],
                "method_version": task["version"],
                "env": canonical(manifest["env"]),
                "task_key": manifest["key"],
                "started": result["started"],
            }
        )
    return rows


def missing(
    cell: Cell, evaluation: Evaluation, metrics: Iterable[str], status: str, reason: str, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows that say why an evaluator has no figures on a cell."""
    key = evaluation.key or digest(["no task", cell.name, evaluation.evaluator])
    return [
        _row(cell, evaluation, facts)
        | {"stage": "attacked" if cell.is_control else "defended", "metric": m, "qualifier": "", "status": status}
        | {"reason": reason, "task_key": key}
        for m in metrics
    ]


def _row(cell: Cell, evaluation: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    blank: dict[str, Any] = {c.name: ("" if c.type == "str" else None) for c in MEASUREMENTS}
    return (
        blank
        | cell.identity
        | {"scope": evaluation.needs.scope, "evaluator": evaluation.evaluator, "attack_key": cell.attack_key}
        | {"defense_key": cell.defense_key}
        | dict(facts)
    )


def save(run: Path, key: str, rows: list[dict[str, Any]]) -> None:
    """Write `RUN/rows/<key>.json`, not synced: a file lost to a power cut is made again from the store."""
    write_atomic(run / "rows" / f"{key}.json", json.dumps(rows, sort_keys=True).encode(), sync=False)


def load_all(run: Path) -> list[dict[str, Any]]:
    """All rows of a run folder; a file that cannot be read counts as absent and is written anew by the next run."""
    names = {c.name for c in MEASUREMENTS}
    rows: list[dict[str, Any]] = []
    for file in sorted((run / "rows").glob("*.json")):
        try:
            found = json.loads(file.read_bytes())
            if all(names <= r.keys() for r in found):
                rows += found
        except (ValueError, TypeError, AttributeError):
            continue
    return rows


def supersede(rows: Iterable[dict[str, Any]], planned: set[str]) -> list[dict[str, Any]]:
    """One row per (cell, evaluator, metric, qualifier): those of tasks in `planned` win over older ones."""
    settled = {(r["cell"], r["evaluator"]) for r in rows if r["task_key"] in planned}
    return [r for r in rows if r["task_key"] in planned or (r["cell"], r["evaluator"]) not in settled]


def drop_superseded(run: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Remove the files of rows that stand in no table any more, so that `merge` cannot bring them back."""
    standing = {r["task_key"] for r in rows}
    for file in (run / "rows").glob("*.json"):
        if file.stem not in standing:
            file.unlink()


def cells_table(rows: list[dict[str, Any]], collapse_points: float = 10) -> list[dict[str, Any]]:
    """One line per cell with its headline figures and the reason of each that is missing; a zoo is no cell."""
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for r in (r for r in rows if r["scope"] != "zoo"):
        by_cell.setdefault(r["cell"], []).append(r)
    heads = {name: _headline(name, group) for name, group in by_cell.items()}
    for line in heads.values():
        _relate(line, heads, collapse_points)
    return [heads[name] for name in sorted(heads)]


def flags_of(group: Iterable[Mapping[str, Any]]) -> set[str]:
    """Flags of a cell with these rows: those of any row, but `reduced` only where all are.

    An evaluator below its effort marks its own rows alone, a method all rows of its cells.
    """
    each = [{f for f in r["flag"].split(";") if f} for r in group]
    return set().union(*each) - ({"reduced"} - set.intersection(*each))


def _headline(name: str, group: list[dict[str, Any]]) -> dict[str, Any]:
    first = group[0]
    line: dict[str, Any] = {c.name: first.get(c.name, "" if c.type == "str" else None) for c in CELLS}
    for metric in HEADLINE_METRICS:
        line[metric] = None
    reasons: dict[str, str] = {}
    for r in group:
        if r["metric"] == "p_asr_qra_net" and not r["qualifier"]:
            line["_qra_net"] = r["value"] if r["status"] == "ok" else None
        if r["qualifier"] or r["metric"] not in HEADLINE_METRICS:
            continue
        if r["status"] == "ok":
            line[r["metric"]] = r["value"]
            reasons.pop(r["metric"], None)
        elif line[r["metric"]] is None:
            reasons[r["metric"]] = r["reason"] or r["status"]
    bad = sorted((r for r in group if r["status"] in _WORST), key=lambda r: _WORST.index(r["status"]))
    ok = [r for r in group if r["status"] == "ok"]
    line["status"] = "ok" if ok and not bad else bad[0]["status"] if bad else "not_applicable"
    line["reason"] = bad[0]["reason"] if bad else "" if ok else group[0]["reason"]
    line["flag"] = ";".join(sorted(flags_of(group)))
    line["seconds"] = sum({r["task_key"]: r["seconds"] or 0.0 for r in group}.values())
    line["method_version"] = first.get("defense_version")
    score, flagged = line["det_score"], [r for r in group if r["metric"] == "det_flag" and r["status"] == "ok"]
    line["verdict"] = bool(flagged[0]["value"]) if score is not None and flagged else None
    line["_reasons"] = reasons
    return line


def _relate(line: dict[str, Any], heads: Mapping[str, dict[str, Any]], collapse_points: float) -> None:
    """Columns that compare a cell with the undefended one and with the controls."""
    parts = line["cell"].split("/")
    own = "/".join(parts[:-2])
    attacked = heads.get("/".join([own, "none", parts[-1]]), {})
    control = heads.get("/".join([own, "clean_model", parts[-1]]), {})
    reasons: dict[str, str] = line.pop("_reasons")
    line["c_acc_attacked"], line["asr_attacked"] = attacked.get("c_acc"), attacked.get("asr")
    line["o_asr"] = line["asr"]
    probes = {p: line[f"p_asr_{p}"] for p in ("ra", "qra") if line[f"p_asr_{p}"] is not None}
    qra_net = line.pop("_qra_net", None)
    if "qra" in probes and line["p_asr_net"] is not None:  # of both probes, or of none
        line["p_asr_net"] = None if qra_net is None else max(line["p_asr_net"], qra_net)
        reasons.setdefault("p_asr_net", "control_missing: of p_asr_qra")
    if probes:
        line["p_asr"], line["p_asr_set"] = max(probes.values()), ";".join(sorted(probes))
    else:
        reasons.setdefault("p_asr", reasons.get("p_asr_ra", "not_run: no re-activation evaluator in the suite"))
    if None not in (line["o_asr"], line["p_asr_net"], line["asr_attacked"], line["c_acc"], line["c_acc_attacked"]):
        gain = max(0.0, line["asr_attacked"] - max(line["o_asr"], line["p_asr_net"]))
        line["p_der"] = (1 + gain - max(0.0, line["c_acc_attacked"] - line["c_acc"])) / 2
    flags = {f for f in line["flag"].split(";") if f}
    if _collapsed(line, control, collapse_points):
        flags.add("collapsed")
    line["flag"] = ";".join(sorted(flags))
    for metric in HEADLINE_METRICS:
        if line[metric] is None:
            source = {"o_asr": "asr", "asr_attacked": "asr", "p_der": "p_asr_net", "c_acc_attacked": "c_acc"}
            why = reasons.get(metric) or reasons.get(source.get(metric, ""), "")
            reasons[metric] = why or line["reason"] or "not_run: no evaluator of the suite measures it"
        else:
            reasons.pop(metric, None)
    line["reasons"] = canonical(reasons)


def _collapsed(line: Mapping[str, Any], control: Mapping[str, Any], points: float) -> bool:
    """C-Acc fell by more than `points`, or triggered images go neither to the attacker nor to their true class.

    The second means: purified, yet robust accuracy is below half of what a clean model reaches on the same images.
    A backdoor that still answers takes robust accuracy away too, but that is `not_purified`, not a collapse.
    """
    if line["defense"].split("~")[0] in ("none", "clean_model"):
        return False
    c, before = line["c_acc"], line["c_acc_attacked"]
    if c is not None and before is not None and before - c > points / 100 + ROUNDING:
        return True
    r, reach, asr = line["r_acc"], control.get("r_acc"), line["asr"]
    if r is None or reach is None or asr is None or asr > NOT_PURIFIED:
        return False
    return r < R_ACC_SHARE * reach


def write_tables(run: Path, rows: list[dict[str, Any]], collapse_points: float = 10) -> None:
    """Write measurements.parquet and cells.parquet, sorted, so that equal rows give equal tables."""
    lines = cells_table(rows, collapse_points)
    ordered = sorted(rows, key=lambda r: (r["cell"], r["evaluator"], r["metric"], r["qualifier"], r["task_key"]))
    _write(run / "measurements.parquet", MEASUREMENTS, ordered)
    _write(run / "cells.parquet", CELLS, lines)


def _write(path: Path, columns: tuple[Column, ...], rows: list[dict[str, Any]]) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    def value(c: Column, r: Mapping[str, Any]) -> Any:
        v = r.get(c.name)
        if c.type == "timestamp" and v is not None:
            return dt.datetime.fromtimestamp(v, dt.UTC)
        return v

    table = pa.Table.from_pydict({c.name: [value(c, r) for r in rows] for c in columns}, schema=arrow(columns))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy")
    write_atomic(path, buffer.getvalue())


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet table of ours.

    Raises:
        BadInput: missing, unreadable or of another schema version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as e:
        raise BadInput(f"cannot read the table {path}: {e}; run the suite again, or name another run folder") from e
    version = (table.schema.metadata or {}).get(b"sleeperbench.schema", b"none").decode()
    if version != SCHEMA_VERSION:
        raise BadInput(f"{path} has schema {version}, this version reads {SCHEMA_VERSION}; run the suite again")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def unique(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Rows with every key once (the first wins), and how many were dropped."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    dropped = 0
    for r in rows:
        k = (r["cell"], *(r[c] for c in KEY))
        dropped += k in seen
        seen.setdefault(k, r)
    return list(seen.values()), dropped
