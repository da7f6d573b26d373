"""What a run would do and cost, judged by what such tasks cost before."""

from __future__ import annotations

from typing import Any

from sleeperbench.engine.costs import Costs
from sleeperbench.engine.graph import Plan
from sleeperbench.engine.store import NoStore, Store


def estimate(plan: Plan, store: str) -> dict[str, Any]:
    """Cells, tasks, what is cached, what cannot run, and core-seconds and memory as far as they are known.

    `core_seconds` and `peak_mb` count the tasks whose place (kind, plugin, data set, architecture) has run on this
    store before; `unknown` names the places that have not. Both are null when nothing is known.
    """
    tasks = dict(plan.tasks)
    for zoo in plan.zoos:
        if (whole := zoo.task()) is not None:
            tasks[whole.key] = whole
    try:
        found = Store(store, create=False)
        missing = [t for k, t in tasks.items() if not found.has(k)]
        costs = Costs(found.root)
    except NoStore:
        missing, costs = list(tasks.values()), None
    known, unknown = [], set()
    for task in missing:
        cost = costs.known(plan, task) if costs else None
        if cost:
            known.append(cost)
        else:
            unknown.add(Costs.place(plan, task))
    blocked = []
    for cell in plan.cells:
        if cell.blocked:
            status, _, reason = cell.blocked.partition(" ")
            blocked.append({"cell": cell.name, "status": status, "reason": reason})
    nothing = bool(missing) and not known
    return {
        "cells": len(plan.cells),
        "tasks": len(tasks),
        "cached": len(tasks) - len(missing),
        "to_run": len(missing),
        "blocked": blocked,
        "core_seconds": None if nothing else sum(c["cpu_seconds"] for c in known),
        "peak_mb": None if nothing else max((c["peak_mb"] for c in known), default=0.0),
        "unknown": sorted(unknown),
    }
