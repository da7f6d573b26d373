"""The gate of every attack: did it implant? Decided over all seeds, before any defense runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeperbench.engine.plan import Plan
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import ROUNDING
from sleeperbench.schema import implant_bar

FIGURES = ("asr", "c_acc")
GATED = "attack_did_not_implant"
"""Reason of what a closed gate stops."""


class Gate:
    """Learns figures as rows arrive and decides each attack group (data set / architecture / attack @ rate)."""

    def __init__(self, plan: Plan, registry: Registry) -> None:
        self.suite = plan.suite
        self.figures: dict[tuple[str, str], float | None] = {}
        self.groups: dict[str, list[tuple[str, str]]] = {}
        self._asked: dict[str, tuple[list[Mapping[str, Any]], Mapping[str, Any], float]] = {}
        metrics = {m.name for e in plan.suite.evaluators for m in registry.get("evaluator", e.id).blueprint.metrics}
        clean_cells = {c.name for c in plan.cells}
        for cell in plan.cells:
            if cell.is_control and cell.attack_group:
                clean = cell.clean_cell if cell.clean_cell in clean_cells else ""
                self.groups.setdefault(cell.attack_group, []).append((cell.name, clean))
                task = plan.tasks[cell.attack_key]
                infos = [p.blueprint.info for p in registry.chain("attack", task.name)]
                self._asked[cell.attack_group] = infos, task.params["method"], cell.identity["rate"]
        self.measures = "asr" in metrics
        self.deciders = _deciders(plan, registry, self.groups)
        self._verdicts: dict[str, str | None] = {}
        self._told: set[str] = set()
        self._groups_of: dict[str, set[str]] = {}
        for group, cells in self.groups.items():
            for name in {c for pair in cells for c in pair} - {""}:
                self._groups_of.setdefault(name, set()).add(group)

    def learn(self, rows: list[dict[str, Any]]) -> None:
        """Take in the figures of some rows."""
        for r in rows:
            if r["metric"] in FIGURES and not r["qualifier"]:
                self.figures[r["cell"], r["metric"]] = r["value"]
                for group in self._groups_of.get(r["cell"], ()):
                    self._verdicts.pop(group, None)

    def bar(self, group: str, clean: float | None = None) -> float:
        """The mean ASR that the group has to reach, given the mean C-Acc of clean models; see `implant_bar`."""
        return implant_bar(*self._asked[group], self.suite.gate, clean)

    def _verdict(self, group: str) -> str | None:
        """None while undecided, an empty string when implanted, else why not."""
        if group not in self._verdicts:
            self._verdicts[group] = self._judge(group)
        return self._verdicts[group]

    def _judge(self, group: str) -> str | None:
        if not self.measures:
            return ""
        cells = self.groups[group]
        asr = [self.figures.get((c, "asr"), _UNKNOWN) for c, _ in cells]
        acc = [self.figures.get((c, "c_acc"), _UNKNOWN) for c, _ in cells]
        clean = [self.figures.get((c, "c_acc"), _UNKNOWN) for _, c in cells if c]
        if any(v is _UNKNOWN for v in (*asr, *acc, *clean)):
            return None
        known = [v for v in asr if isinstance(v, float | int)]
        if not known:
            return "no seed has a figure"
        mean = sum(known) / len(known)
        a, c = [v for v in acc if isinstance(v, float | int)], [v for v in clean if isinstance(v, float | int)]
        bar = self.bar(group, sum(c) / len(c) if c else None)
        if mean < bar - ROUNDING:
            return f"mean ASR {mean:.3f} is below {bar:.3g}"
        if a and c and sum(c) / len(c) - sum(a) / len(a) > self.suite.gate["clean_drop_points"] / 100 + ROUNDING:
            return f"mean C-Acc lies {100 * (sum(c) / len(c) - sum(a) / len(a)):.1f} points below clean models"
        return ""

    def open(self, group: str) -> bool:
        """Whether the group's defenses may run."""
        return self._verdict(group) == ""

    def decided(self) -> list[str]:
        """Groups that were decided since this was last asked."""
        new = [g for g in self.groups if g not in self._told and self._verdict(g) is not None]
        self._told.update(new)
        return new

    def closed(self) -> list[str]:
        """Groups that are decided and did not implant."""
        return [g for g in self.groups if self._verdict(g)]

    def why(self, group: str) -> str:
        """Why the group did not implant, or an empty string."""
        return self._verdict(group) or ""


def deciding(evaluator: str, registry: Registry) -> bool:
    """Whether an evaluator's figures decide gates."""
    return any(m.name in FIGURES for m in registry.get("evaluator", evaluator).blueprint.metrics)


def _deciders(plan: Plan, registry: Registry, groups: dict[str, list[tuple[str, str]]]) -> dict[str, list[str]]:
    """Group -> the evaluations that decide it."""
    by_cell = {
        c.name: [e.key for e in c.evaluations if e.key and deciding(e.evaluator, registry)]
        for c in plan.cells
        if c.is_control
    }
    return {
        group: sorted({k for pair in cells for name in pair if name for k in by_cell.get(name, ())})
        for group, cells in groups.items()
    }


_UNKNOWN = object()
