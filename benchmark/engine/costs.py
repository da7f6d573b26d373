"""What tasks cost before: seconds, processor seconds and memory per kind, plugin, data set and architecture.

Learnt from every task that a run computes and kept in `STORE/costs.json`, so that all runs on a store know it. It
decides what is started first and what a dry run and the time left say. No figure depends on it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from sleeperbench.engine.graph import Plan
from sleeperbench.engine.store import write_atomic
from sleeperbench.engine.task import Task

PRIOR = {"attack": 60.0, "prepare": 60.0, "defense": 30.0, "answer": 10.0, "evaluate": 5.0}
"""Seconds assumed while nothing of the kind has run: only their order matters."""
WINDOW = 8
"""A mean forgets: each new task weighs at least one part in so many."""
_FIELDS = ("seconds", "cpu_seconds", "peak_mb")


class Costs:
    """Means of what tasks cost.

    Args:
        folder: Folder of the store; without `costs.json` nothing is known.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "costs.json"
        self.means: dict[str, dict[str, float]] = {}
        self.fresh = False
        """Whether a place was learnt for the first time since it was last asked about."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(self.file.read_bytes())
            self.means = {str(k): {f: float(v[f]) for f in (*_FIELDS, "n")} for k, v in found.items()}

    @staticmethod
    def place(plan: Plan, task: Task) -> str:
        """What costs are learnt by: `kind plugin dataset arch`, and the plugin's version."""
        attack = plan.tasks.get(task.inputs.get("attack", ""), task)
        arch = attack.params.get("spec", {}).get("arch", "any")
        return f"{task.kind} {task.name} {task.params['data']['name']} {arch} v{task.version}"

    def learn(self, plan: Plan, task: Task, result: dict[str, Any]) -> None:
        """Take in what one task cost."""
        place = self.place(plan, task)
        if place not in self.means:
            self.fresh = True
            self.means[place] = dict.fromkeys((*_FIELDS, "n"), 0.0)
        mean = self.means[place]
        mean["n"] += 1
        for name in ("seconds", "cpu_seconds"):
            mean[name] += (float(result[name]) - mean[name]) / min(mean["n"], WINDOW)
        mean["peak_mb"] = max(mean["peak_mb"], float(result["peak_mb"]))

    def known(self, plan: Plan, task: Task) -> dict[str, float] | None:
        """What tasks of this place cost, or None."""
        return self.means.get(self.place(plan, task))

    def guess(self, plan: Plan, task: Task) -> float:
        """Seconds of wall time to expect."""
        known = self.known(plan, task)
        return known["seconds"] if known else PRIOR[task.kind]

    def save(self) -> None:
        """Keep what was learnt; a store that cannot be written keeps nothing."""
        with contextlib.suppress(OSError):
            write_atomic(self.file, json.dumps(self.means, indent=1, sort_keys=True).encode())
