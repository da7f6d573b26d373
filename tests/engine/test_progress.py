"""What progress lines call a task."""

from __future__ import annotations

from typing import Any

from sleeperbench.engine.progress import names


def test_an_inverter_on_a_repaired_model_is_no_control(make_plan: Any) -> None:
    plan = make_plan(evaluators=["reinversion"], defenses=["unlearn:neural_cleanse"])
    (cell,) = [c for c in plan.cells if c.attack_group and not c.is_control]
    (anew,) = [plan.tasks[e.key].inputs["anew"] for e in cell.evaluations]
    assert names(plan)[anew] == "neural_cleanse on what unlearn:neural_cleanse made"
