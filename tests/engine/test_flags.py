"""The flag `reduced`: a method, what it wraps, or the evaluator, on less than its published effort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sleeperbench.engine.ledger import Ledger
from sleeperbench.engine.rows import flags_of
from sleeperbench.engine.store import Store


@pytest.mark.parametrize(
    ("attack", "defense", "tail", "reduced"),
    [
        ("badnets", "unlearn:neural_cleanse", "", False),
        ("badnets", "unlearn:neural_cleanse", '[defense."unlearn:neural_cleanse"]\nepochs = 3', True),
        ("badnets", "unlearn:neural_cleanse", '[defense."unlearn:neural_cleanse"]\nsteps = 3', True),
        ("badnets", "unlearn:neural_cleanse", "[defense.neural_cleanse]\nepochs = 3", False),  # another cell's
        ("badnets", "refine:retrain:ct", '[defense."refine:retrain:ct"]\npretrain_epochs = 1', True),
        ("badnets", "ft", "[defense.ft]\nsteps = 3", True),
        ("badnets", "pam", '[defense.pam]\npreset = "reduced"', True),
        ("lc", "none", "", False),
        ("belt:lc", "none", "", False),
        ("belt:lc", "none", '[attack."belt:lc"]\nsteps = 1', True),
    ],
)
def test_less_than_published(
    make_plan: Any, registry: Any, tmp_path: Path, attack: str, defense: str, tail: str, reduced: bool
) -> None:
    plan = make_plan(attacks=[attack], defenses=["none", defense] if defense != "none" else ["none"], tail=tail)
    ledger = Ledger(plan, registry, Store(tmp_path / "store"), tmp_path, lambda rows: None)
    cell = next(c for c in plan.cells if c.name.split("/")[2].startswith(attack) and f"/{defense}" in c.name)
    assert ("reduced" in ledger._facts(cell, cell.evaluations[0])["flag"]) is reduced


@pytest.mark.parametrize(("rounds", "reduced"), [("3", True), ("5", False), ('"none"', False)])
def test_an_effort_left_to_the_method_is_not_less(
    make_plan: Any, registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: str, reduced: bool
) -> None:
    monkeypatch.setitem(registry.get("defense", "i_bau").blueprint.info, "effort", ["rounds"])  # int | None
    plan = make_plan(defenses=["none", "i_bau"], tail=f"[defense.i_bau]\nrounds = {rounds}")
    ledger = Ledger(plan, registry, Store(tmp_path / "store"), tmp_path, lambda rows: None)
    cell = next(c for c in plan.cells if "/i_bau" in c.name)
    assert ("reduced" in ledger._facts(cell, cell.evaluations[0])["flag"]) is reduced


def test_an_evaluator_of_fewer_draws_marks_its_own_rows_alone(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(evaluators=["accuracy", "ra", "wake", "qra"], tail="[evaluator.ra]\ndraws = 1")
    ledger = Ledger(plan, registry, Store(tmp_path / "store"), tmp_path, lambda rows: None)
    for cell in plan.cells:
        flags = {e.evaluator: ledger._facts(cell, e)["flag"] for e in cell.evaluations if e.key in plan.tasks}
        reads_it = {"ra", "qra"} & set(flags)
        assert {name for name, flag in flags.items() if "reduced" in flag} == reads_it, cell.name


@pytest.mark.parametrize(
    ("queries", "reduced"), [("[1000]", True), ("[2000, 5000]", True), ("[7000]", False), ("[500, 8000]", False)]
)
def test_of_several_efforts_the_largest_counts(
    make_plan: Any, registry: Any, tmp_path: Path, queries: str, reduced: bool
) -> None:
    plan = make_plan(evaluators=["accuracy", "bba"], tail=f"[evaluator.bba]\nqueries = {queries}")
    ledger = Ledger(plan, registry, Store(tmp_path / "store"), tmp_path, lambda rows: None)
    cell = next(c for c in plan.cells if any(e.evaluator == "bba" and e.key in plan.tasks for e in c.evaluations))
    flags = {e.evaluator: ledger._facts(cell, e)["flag"] for e in cell.evaluations if e.key in plan.tasks}
    assert ("reduced" in flags["bba"]) is reduced


def test_a_cell_is_reduced_where_its_method_is() -> None:
    def row(*flags: str) -> dict[str, str]:
        return {"flag": ";".join(flags)}

    assert flags_of([row("reduced", "tuned"), row("tuned"), row()]) == {"tuned"}
    assert flags_of([row("reduced"), row("reduced", "weak")]) == {"reduced", "weak"}
