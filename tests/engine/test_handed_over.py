"""What evaluators are told of a model's origin, and what wrappers and oracles get beside the usual."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import samples
import torch

from sleeperbench.contracts import NotApplicable, Outcome
from sleeperbench.contracts.access import Access
from sleeperbench.engine import artifacts
from sleeperbench.engine.known import Known
from sleeperbench.engine.outcomes import Failed, checked
from sleeperbench.engine.run import Options, Run
from sleeperbench.engine.task import Task
from sleeperbench.engine.work import Work
from sleeperbench.kit.planted import Planted
from sleeperbench.testing.stage import BASE, COST, PLANTED, stage

ORIGIN = {"none": True, "ft": True, "anp": True, "clean_model": False, "scratch_on_clean": False, "abl": False}


def test_bec_is_told_which_models_descend_from_the_attacked_one(make_plan: Any) -> None:
    plan = make_plan(evaluators=["bec"], defenses=[*ORIGIN, "retrain:spectral", "distil_fresh"])
    told = {
        c.identity["defense"]: plan.tasks[e.key].params["descends"]
        for c in plan.cells
        for e in c.evaluations
        if e.evaluator == "bec" and c.attack_group and e.key
    }
    assert told == ORIGIN | {"retrain:spectral": False, "distil_fresh": False}


def test_the_twin_has_the_same_attack_and_another_training(make_plan: Any) -> None:
    plan = make_plan(evaluators=["bec"], defenses=["none"])
    (cell,) = [c for c in plan.cells if c.attack_group]
    (bec,) = [e for e in cell.evaluations if e.evaluator == "bec"]
    own, twin = plan.tasks[cell.attack_key], plan.tasks[plan.tasks[bec.key].inputs["twin"]]
    assert (own.seed, own.inputs) == (twin.seed, twin.inputs)
    assert {k for k in own.params if own.params[k] != twin.params[k]} == {"replica"}


def test_a_second_run_of_a_defense_has_another_seed_and_the_same_inputs(make_plan: Any) -> None:
    defenses = ["none", "ft", "strip", "retrain:spectral"]
    plan = make_plan(evaluators=["accuracy", "accident"], defenses=defenses)
    seconds = {}
    for cell in plan.cells:
        accident, inputs = (plan.tasks[e.key].inputs if e.key else {} for e in cell.evaluations[::-1])
        assert "again" not in inputs
        if "again" in accident:
            seconds[cell.identity["attack"], cell.identity["defense"]] = cell.defense_key, accident["again"]
    # Not where nothing was defended, no trigger is there to wake, or the defense only judges.
    assert set(seconds) == {("badnets", "ft"), ("badnets", "retrain:spectral")}
    own, again = (plan.tasks[k] for k in seconds["badnets", "ft"])
    assert own.seed != again.seed and replace(again, seed=own.seed) == own
    own, again = (plan.tasks[k] for k in seconds["badnets", "retrain:spectral"])
    wrapped = [plan.tasks[t.inputs["inner"]] for t in (own, again)]
    assert replace(again, seed=own.seed, inputs=own.inputs) == own and own.inputs["attack"] == again.inputs["attack"]
    assert wrapped[0].seed != wrapped[1].seed and replace(wrapped[1], seed=wrapped[0].seed) == wrapped[0]
    # No other evaluator's key knows of it, so that what is in a store stays.
    asked = {t.name for t in plan.tasks.values() if t.kind == "evaluate" and "again" in t.params["needs"]}
    assert asked == {"accident"}


def test_all_that_ask_for_a_second_run_share_it(make_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Known.needs
    monkeypatch.setattr(Known, "needs", lambda self, v: replace(needs(self, v), again=v.id in ("accident", "bec")))
    plan = make_plan(evaluators=["accident", "bec"], defenses=["ft"])
    (cell,) = [c for c in plan.cells if c.attack_group and not c.is_control]
    first, second = (plan.tasks[e.key].inputs["again"] for e in cell.evaluations)
    assert first == second != cell.defense_key


def test_a_second_run_that_failed_gives_the_rows_its_reason(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(evaluators=["accuracy", "accident"], defenses=["ft"])
    options = Options(out=tmp_path, store=str(tmp_path / "store"), devices=["cpu"], quiet=True)
    (tmp_path / "rows").mkdir()
    run = Run(plan=plan, registry=registry, options=options, text="")
    run.resume()
    (cell,) = [c for c in plan.cells if c.attack_group and not c.is_control]
    accuracy, accident = (e.key for e in cell.evaluations)
    run.fail(plan.tasks[accident].inputs["again"], "timeout", "after 600 s")
    assert accuracy not in run.ledger.rows
    (said,) = {(r["status"], r["reason"]) for r in run.ledger.rows[accident]}
    assert said[0] == "not_run" and said[1].startswith("input_failed: defense ") and said[1].endswith("after 600 s")


def test_what_a_closed_gate_stops_says_so_through_its_controls(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(evaluators=["accuracy", "ra"], defenses=["none", "clean_model", "ft"])
    options = Options(out=tmp_path, store=str(tmp_path / "store"), devices=["cpu"], quiet=True)
    (tmp_path / "rows").mkdir()
    run = Run(plan=plan, registry=registry, options=options, text="")
    run.resume()
    cells = {c.identity["defense"]: c for c in plan.cells if c.attack_group}
    why = "attack_did_not_implant: mean ASR 0.438 is below 0.9"
    run.fail(cells["clean_model"].defense_key, "not_run", why)
    for defense in ("none", "clean_model", "ft"):
        (ra,) = (e.key for e in cells[defense].evaluations if e.evaluator == "ra")
        assert {(r["status"], r["reason"]) for r in run.ledger.rows[ra]} == {("not_run", why)}


def test_the_planner_names_every_task_that_a_defense_consists_of(make_plan: Any) -> None:
    plan = make_plan(evaluators=["cost"], defenses=["none", "strip", "unlearn:neural_cleanse"])
    seen = {}
    for cell in plan.cells:
        (e,) = cell.evaluations
        inputs = plan.tasks[e.key].inputs
        seen[cell.identity["attack"], cell.identity["defense"]] = set(inputs) - {"attack", "defense"}
        if "wrapped" in inputs:
            assert plan.tasks[inputs["wrapped"]].name == "neural_cleanse"
    assert seen == {
        ("none", "none"): set(),
        ("none", "strip"): set(),
        ("none", "unlearn:neural_cleanse"): {"wrapped"},
        ("badnets", "none"): set(),
        ("badnets", "strip"): {"answer"},
        ("badnets", "unlearn:neural_cleanse"): {"wrapped"},
    }


def staged(access: Access, inner: Outcome | None = None) -> Any:
    at = stage(BASE)
    return at.case(at.staged(at.task("probe", access, {}, inner), PLANTED))


def test_an_oracle_that_sees_the_training_set_is_told_its_marks_row_by_row() -> None:
    at = stage(BASE)
    case = staged(Access(model="none", clean=0, train=True, oracle=True))
    original = artifacts.read_set(at.store.fetch(at.attacked), at.micro.train)
    dirty = {image.numpy().tobytes() for image in original.data.images[original.mark == 1]}
    assert [image.numpy().tobytes() in dirty for image in case.train.images] == (case.marks == 1).tolist()
    assert int((case.marks == 1).sum()) == int((original.mark == 1).sum()) > 0


@pytest.mark.parametrize("access", [Access(train=True), Access(oracle=True)])
def test_nobody_else_is_told_marks(access: Access) -> None:
    with pytest.raises(AttributeError, match="marks is not declared"):
        _ = staged(access).marks


def test_a_wrapper_of_cost_is_told_the_cost() -> None:
    case = staged(Access(inner="cost"), Outcome())
    assert vars(case.spent) == COST
    with pytest.raises(AttributeError, match="spent is not declared"):
        _ = staged(Access(inner="keep"), Outcome()).spent


class Declining(Planted):
    """Declines while it prepares."""

    def prepare(self, train: Any, ctx: Any) -> Any:
        raise NotApplicable("needs_colour: grey images have no hue")


def test_an_attack_may_decline(tmp_path: Path) -> None:
    at = stage(BASE)
    given = at.store.manifest(at.attacked)["task"]
    task = Task(**{k: given[k] for k in ("kind", "version", "params", "seed", "numerics")}, name="declining")
    with pytest.raises(Failed, match="needs_colour") as e:
        Work.run(at, task, {"declining": f"{__name__}:Declining"}, tmp_path / "log")
    assert e.value.status == "not_applicable"
    assert not at.store.has(task.key)
    assert torch.is_grad_enabled()


def test_a_threshold_for_inputs_is_read_back_and_is_finite(tmp_path: Path) -> None:
    for alarm in (None, 0.0, -1.25):
        folder = tmp_path / f"{alarm}"
        folder.mkdir()
        artifacts.write_outcome(folder, Outcome(alarm=alarm))
        assert repr(artifacts.read_outcome(folder).alarm) == repr(alarm)
        checked(Outcome(alarm=alarm), samples.SPEC, {}, tmp_path)
    for alarm in (float("inf"), float("nan")):
        with pytest.raises(Failed, match="a figure of the answer is not finite"):
            checked(Outcome(alarm=alarm), samples.SPEC, {}, tmp_path)


def test_an_inverter_runs_once_more_on_the_model_that_was_repaired_with_its_triggers(
    make_plan: Any, registry: Any
) -> None:
    defenses = ["none", "ft", "neural_cleanse", "unlearn:neural_cleanse", "retrain:spectral", "refine:neural_cleanse"]
    plan = make_plan(evaluators=["inversion", "reinversion"], defenses=[*defenses, "unlearn:refine:neural_cleanse"])
    anew: dict[tuple[str, str], Any] = {}
    for cell in plan.cells:
        inversion, reinversion = (plan.tasks[e.key].inputs for e in cell.evaluations)
        assert "anew" not in inversion
        if "anew" in reinversion:
            anew[cell.identity["attack"], cell.identity["defense"]] = cell, plan.tasks[reinversion["anew"]]
    wrappers = ("unlearn:neural_cleanse", "unlearn:refine:neural_cleanse")
    assert set(anew) == {(attack, wrapper) for attack in ("none", "badnets") for wrapper in wrappers}
    for cell, task in anew.values():
        first = plan.tasks[plan.tasks[cell.defense_key].inputs["inner"]]
        assert task.inputs["attack"] == cell.defense_key, "the repaired model in the attacked one's place"
        unlike = {"attack": first.inputs["attack"]} | (
            {"inner": first.inputs["inner"]} if "inner" in task.inputs else {}
        )
        assert replace(task, inputs={**task.inputs, **unlike}) == first
        if "inner" in task.inputs:
            assert plan.tasks[task.inputs["inner"]].inputs["attack"] == cell.defense_key
    # What the triggers come from must need no training set, and no true trigger; a repair finds none.
    known = Known(registry)
    names = ("unlearn:beatrix", "unlearn:unlearn:neural_cleanse", "retrain:spectral", "refine:neural_cleanse", "ft")
    assert known.unlearns(wrappers[0]) and not any(known.unlearns(name) for name in names)
    # No other evaluator's key knows of it.
    asked = {t.name for t in plan.tasks.values() if t.kind == "evaluate" and "anew" in t.params["needs"]}
    assert asked == {"reinversion"}
