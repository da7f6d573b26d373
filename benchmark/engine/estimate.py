"""What a run would do and cost, judged by what tasks of the same kind cost before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleeperbench.engine.plan import Plan


def estimate(plan: Plan, store: Path, out: Path) -> dict[str, Any]:
    """Cells, tasks, what is cached, what cannot run, and core-seconds where the run folder's journal knows them."""
    past = _past(out)
    missing = [t for k, t in plan.tasks.items() if not (store / k[:2] / k / "manifest.json").is_file()]
    costs = [past.get((t.kind, t.name)) for t in missing]
    known = all(c is not None for c in costs)
    blocked = []
    for cell in plan.cells:
        if cell.blocked:
            status, _, reason = cell.blocked.partition(" ")
            blocked.append({"cell": cell.name, "status": status, "reason": reason})
    return {
        "cells": len(plan.cells),
        "tasks": len(plan.tasks),
        "cached": len(plan.tasks) - len(missing),
        "to_run": len(missing),
        "blocked": blocked,
        "core_seconds": sum(c["cpu_seconds"] for c in costs if c) if known else None,
        "peak_mb": max((c["peak_mb"] for c in costs if c), default=None) if known else None,
    }


def _past(out: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Mean cost per kind and plugin, from the journal of the run folder."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    try:
        lines = (out / "tasks.jsonl").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            result = entry["result"]
            found.setdefault((entry["kind"], entry["plugin"]), []).append(
                {"cpu_seconds": float(result["cpu_seconds"]), "peak_mb": float(result["peak_mb"])}
            )
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a kill, or a task without a result
    return {
        k: {
            "cpu_seconds": sum(c["cpu_seconds"] for c in v) / len(v),
            "peak_mb": max(c["peak_mb"] for c in v),
        }
        for k, v in found.items()
    }
