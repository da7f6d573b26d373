"""What evaluators are told of a model's origin, and what wrappers and oracles get beside the usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import samples
import torch

from sleeperbench.contracts import NotApplicable, Outcome
from sleeperbench.contracts.access import Access
from sleeperbench.engine import artifacts
from sleeperbench.engine.outcomes import Failed, checked
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
