"""What a defense took is the sum over its tasks, and its rows carry the defense's own time."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from sleeperbench.contracts.access import Access
from sleeperbench.contracts.context import Cost
from sleeperbench.contracts.defense import Outcome
from sleeperbench.engine import artifacts, rows
from sleeperbench.engine.task import Task
from sleeperbench.evaluators.cost import SpentOnDefense
from sleeperbench.testing.stage import BASE, NUMERICS, PLANTED, stage


def found(**spent: Cost) -> dict[tuple[str, str], float | None]:
    case: Any = SimpleNamespace(spent=spent)
    return {(m.metric, m.qualifier): m.value for m in SpentOnDefense().measure(case).rows}


def test_the_sum_and_each_phase() -> None:
    run, wrapped = Cost(forwards=100, backwards=40, queries=0), Cost(forwards=7, backwards=2, queries=30)
    assert found(run=run, wrapped=wrapped, score=Cost(forwards=1)) == {
        ("cost_forwards", ""): 108,
        ("cost_forwards", "phase=run"): 100,
        ("cost_forwards", "phase=wrapped"): 7,
        ("cost_forwards", "phase=score"): 1,
        ("cost_backwards", ""): 42,
        ("cost_backwards", "phase=run"): 40,
        ("cost_backwards", "phase=wrapped"): 2,
        ("cost_backwards", "phase=score"): 0,
        ("cost_queries", ""): 30,
        ("cost_queries", "phase=run"): 0,
        ("cost_queries", "phase=wrapped"): 30,
        ("cost_queries", "phase=score"): 0,
    }


def kept(name: str, cost: dict[str, int], seconds: float, peak: float) -> str:
    """An artifact of the stage whose task took this."""
    at = stage(BASE)
    with at.store.scratch() as folder:
        artifacts.write_outcome(folder, Outcome())
        result = {"cost": cost, "seconds": seconds, "cpu_seconds": seconds / 2, "peak_mb": peak, "device": "cpu"}
        at.store.commit(name, folder, task={"inputs": {}}, env={}, result=result)
    return name


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """The rows of a wrapped input detector, measured by the engine's own worker."""
    at = stage(BASE)
    inputs = {
        "attack": at.attacked,
        "defense": kept("a" * 64, {"forwards": 10, "backwards": 20, "queries": 0}, 3.0, 100.0),
        "wrapped": kept("b" * 64, {"forwards": 1, "backwards": 0, "queries": 5}, 30.0, 700.0),
        "answer": kept("c" * 64, {"forwards": 200, "backwards": 0, "queries": 0}, 300.0, 50.0),
    }
    needs = asdict(SpentOnDefense.NEEDS)
    recipe = at.task("x", Access(), {}, None).params["recipe"]
    task = Task(
        kind="evaluate",
        name="cost",
        version=1,
        params={"method": {}, "needs": needs, "data": {}, "recipe": recipe, "defended": True},
        seed=0,
        numerics=NUMERICS,
        inputs=inputs,
    )
    values = {"cost": "sleeperbench.evaluators.cost:SpentOnDefense", "planted": PLANTED}
    at.run(task, values, at.cases / "log")
    manifest = at.store.manifest(task.key)
    findings = artifacts.read_json(at.store.fetch(task.key) / "findings.json")
    cell: Any = SimpleNamespace(is_control=False, identity={}, attack_key="", defense_key="")
    evaluation: Any = SimpleNamespace(evaluator="cost", needs=SimpleNamespace(scope="cell"))
    return rows.measured(cell, evaluation, findings, manifest, {})


def test_the_engine_hands_over_what_the_tasks_counted(measured: list[dict[str, Any]]) -> None:
    values = {(r["metric"], r["qualifier"]): r["value"] for r in measured}
    assert values["cost_forwards", ""] == 211
    assert values["cost_forwards", "phase=score"] == 200
    assert values["cost_backwards", "phase=run"] == values["cost_backwards", ""] == 20
    assert values["cost_queries", "phase=wrapped"] == 5


def test_the_rows_carry_the_defenses_time_and_not_the_evaluators(measured: list[dict[str, Any]]) -> None:
    for row in measured:
        assert (row["seconds"], row["cpu_seconds"], row["peak_mb"]) == (333.0, 166.5, 700.0)
        assert (row["forwards"], row["backwards"], row["queries"]) == (211, 20, 5)
