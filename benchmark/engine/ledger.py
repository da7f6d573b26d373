"""The rows of a run: read once, kept in memory, and a task's file written anew when they change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sleeperbench.engine import rows
from sleeperbench.engine.gate import GATED
from sleeperbench.engine.graph import Cell, Evaluation, Plan, Zoo
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.store import Store

Row = dict[str, Any]


class Ledger:
    """Which evaluations have their rows, and which rows.

    Args:
        plan: The graph.
        registry: Where plugins' metadata comes from.
        store: Where findings come from.
        out: The run folder.
        learn: Told of all rows that count, as they come.
    """

    def __init__(
        self, plan: Plan, registry: Registry, store: Store, out: Path, learn: Callable[[list[Row]], object]
    ) -> None:
        self.plan, self.registry, self.store, self.out, self.learn = plan, registry, store, out, learn
        self.rows: dict[str, list[Row]] = {}
        for r in rows.load_all(out):
            self.rows.setdefault(r["task_key"], []).append(r)
        self.settled: set[str] = set()
        """Evaluate keys whose rows are those of this plan."""
        self.uses: dict[str, list[tuple[Cell, Evaluation]]] = {}
        for cell in plan.cells:
            for e in cell.evaluations:
                if e.key:
                    self.uses.setdefault(e.key, []).append((cell, e))

    def saved(self, key: str) -> list[Row] | None:
        """Rows of an earlier run that still count: all cells are there, and no gate decided them."""
        found = self.rows.get(key, [])
        have = {r["cell"] for r in found}
        # Also what waited in vain for a gated task says so, behind `input_failed`.
        gated = any(GATED in r["reason"] for r in found)
        whole = bool(found) and {c.name for c, _ in self.uses[key]} <= have
        return found if whole and not gated else None

    def take(self, key: str) -> bool:
        """Settle a task with the rows that are saved; False when there are none."""
        found = self.saved(key)
        if found is None:
            return False
        self.settled.add(key)
        self.learn(found)
        return True

    def settle(self, key: str) -> None:
        """Make the rows of an evaluation from its artifact.

        Raises:
            Damaged: the artifact is.
        """
        folder = self.store.fetch(key)
        manifest = self.store.manifest(key)
        findings = json.loads((folder / "findings.json").read_bytes())
        found: list[Row] = []
        rate = {"rate_actual": manifest["result"]["rate_actual"]}
        for cell, e in self.uses[key]:
            found += rows.measured(cell, e, findings, manifest, self._facts(cell, e) | rate)
        self._keep(key, found)

    def missing(self, uses: Iterable[tuple[Cell, Evaluation]], status: str, reason: str) -> None:
        """Write the rows that say why evaluations have no figures."""
        by_key: dict[str, list[Row]] = {}
        for cell, e in uses:
            metrics = [m.name for m in self.registry.get("evaluator", e.evaluator).blueprint.metrics]
            made = rows.missing(cell, e, metrics, status, reason, self._facts(cell, e))
            by_key.setdefault(made[0]["task_key"], []).extend(made)
        for key, made in by_key.items():
            self._keep(key, made)

    def add(self, zoo: Zoo, key: str) -> None:
        """A zoo's task is known now; an empty key says that it has none."""
        self.uses.pop(zoo.evaluation.key, None)
        zoo.evaluation.key = key
        if key:
            self.uses[key] = [(zoo.line, zoo.evaluation)]

    def _keep(self, key: str, found: list[Row]) -> None:
        self.settled.add(key)
        if self.rows.get(key) != found:
            self.rows[key] = found
            rows.save(self.out, key, found)
        self.learn(found)

    def _facts(self, cell: Cell, e: Evaluation) -> dict[str, Any]:
        """What every row of a cell carries beside its figure."""
        plugin = self.registry.get("evaluator", e.evaluator)
        tasks = self.plan.tasks
        flags = set()
        attack, defense = tasks.get(cell.attack_key), tasks.get(cell.defense_key)
        if attack and defense and attack.params.get("snapshot") == "declared" and self._trains(defense.name):
            flags.add("snapshot")
        zoo = [k for r, k in tasks[e.key].inputs.items() if r.startswith("zoo.")] if e.key in tasks else []
        if any(self._reduced(key) for key in (cell.attack_key, cell.defense_key, e.key, *zoo) if key in tasks):
            flags.add("reduced")
        named = {f"{tasks[k].kind}.{tasks[k].name}" for k in (cell.attack_key, cell.defense_key) if k in tasks}
        if named & set(self.plan.suite.tuned):
            flags.add("tuned")
        facts: dict[str, Any] = {"flag": ";".join(sorted(flags))}
        facts |= {"dist": plugin.dist, "dist_version": plugin.dist_version, "defense_version": None}
        if cell.defense_key in tasks:
            facts["defense_version"] = tasks[cell.defense_key].version
        return facts

    def _trains(self, defense: str) -> bool:
        """Whether a defense, or what it wraps, reads the training set."""
        chain = [p.blueprint.access for p in self.registry.chain("defense", defense)]
        return any(a is not None and a.train for a in chain)

    def _reduced(self, key: str) -> bool:
        """Whether a method, what it wraps, or an evaluator that it reads, runs below the default of INFO's `effort`."""
        task = self.plan.tasks[key]
        params = task.params["method"]
        for plugin in self.registry.chain(task.of, task.name):
            b = plugin.blueprint
            given = ((params[n], b.fields[n].default) for n in b.info.get("effort", ()))
            # None leaves it to the method how much it does.
            if any(value is not None and _most(value) < _most(normal) for value, normal in given):
                return True
            # A wrapped attack's parameters lie in the wrapper's task, a wrapped defense has a task of its own.
            if "inner" not in params:
                break
            params = params["inner"]
        told = [k for r, k in task.inputs.items() if r == "inner" or r.startswith("evaluator.")]
        return any(self._reduced(k) for k in told)


def _most(effort: Any) -> Any:
    """An effort as one number: of a tuple of them the largest."""
    return max(effort) if isinstance(effort, list | tuple) else effort
