"""What evaluators see of the training rows that an attack poisoned."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Mark, PoisonedSet
from sleeperbench.engine import artifacts
from sleeperbench.engine.task import Task
from sleeperbench.evaluators.stealth import Stealth
from sleeperbench.kit.covers import append
from sleeperbench.testing.stage import BASE, NUMERICS, RECIPE, TARGET, stage

TRAIN = replace(
    samples.random_images(60, (1, 8, 8)), ids=torch.randperm(60, generator=torch.Generator().manual_seed(1)) + 5
)
DIRTY, COVER = torch.tensor([2, 11, 12, 40]), torch.tensor([0, 3, 20])
LC = {"epochs": 1, "inner_steps": 2, "steps": 10}


def poisoned() -> PoisonedSet:
    p = PoisonedSet.clean(replace(TRAIN, images=TRAIN.images.clone(), labels=TRAIN.labels.clone()))
    p.mark[DIRTY], p.mark[COVER] = Mark.DIRTY, Mark.COVER
    p.trigger_id[DIRTY] = torch.tensor([0, 1, 1, 0])
    for rows in (DIRTY, COVER):
        p.data.images[rows] = 255 - p.data.images[rows]
    p.data.labels[DIRTY] = (TRAIN.labels[DIRTY] + 1) % 10
    return p


@pytest.mark.parametrize("beside", [False, True])
def test_they_are_read_beside_their_originals_and_without_covers(tmp_path: Path, beside: bool) -> None:
    p = append(poisoned(), TRAIN) if beside else poisoned()
    artifacts.write_set(tmp_path, p)
    found = artifacts.read_poisoned(tmp_path, TRAIN)
    assert found is not None and len(found) == 4
    assert torch.equal(found.data.images, 255 - TRAIN.images[DIRTY])
    assert torch.equal(found.clean.images, TRAIN.images[DIRTY])
    for rows in (found.data, found.clean):
        assert torch.equal(rows.ids, TRAIN.ids[DIRTY]) and torch.equal(rows.labels, TRAIN.labels[DIRTY])
    assert torch.equal(found.targets, (TRAIN.labels[DIRTY] + 1) % 10)
    assert found.trigger_id.tolist() == [0, 1, 1, 0]


def test_there_are_none_where_none_is_marked_or_no_set_was_kept(tmp_path: Path) -> None:
    assert artifacts.read_poisoned(tmp_path, TRAIN) is None
    covers = poisoned()
    covers.mark[DIRTY] = Mark.CLEAN
    for p in (PoisonedSet.clean(TRAIN), covers):
        artifacts.write_set(tmp_path, p)
        assert artifacts.read_poisoned(tmp_path, TRAIN) is None


@pytest.fixture(scope="module")
def attacked() -> Any:
    """A staged model attacked by lc: the stage, the artifact's key and what stealth is handed."""
    at = stage(BASE)
    given = at.store.manifest(at.attacked)["task"]
    params = given["params"] | {"method": LC, "rate": 0.05}
    same = {k: given[k] for k in ("kind", "version", "seed", "numerics")}
    task = Task(name="lc", params=params, inputs={"clean0": at.clean(0)}, **same)
    at.run(task, {"lc": "sleeperbench.attacks.lc:LabelConsistent"}, at.cases / "log")
    return at, task.key


def stealth(key: str) -> Task:
    needs = asdict(Stealth.NEEDS)
    params = {"method": {}, "needs": needs, "data": {}, "recipe": asdict(RECIPE), "defended": False}
    return Task(
        kind="evaluate", name="stealth", version=4, params=params, seed=13, numerics=NUMERICS, inputs={"attack": key}
    )


def test_what_an_attack_does_to_single_training_images_is_among_them(attacked: Any) -> None:
    at, key = attacked
    case = at.evaluation(stealth(key))
    rows, train = case.bd_train, at.micro.train
    trained_on = artifacts.read_set(at.store.fetch(key), train)
    dirty = trained_on.mark == Mark.DIRTY
    assert len(rows) == int(dirty.sum()) == round(0.05 * len(train)) > 0
    assert torch.equal(rows.data.ids, trained_on.data.ids[dirty])
    assert torch.equal(rows.data.images, trained_on.data.images[dirty])
    where = {int(i): n for n, i in enumerate(train.ids)}
    assert torch.equal(rows.clean.images, train.images[[where[int(i)] for i in rows.clean.ids]])
    assert set(rows.targets.tolist()) == set(rows.clean.labels.tolist()) == {TARGET}
    # Test images change in the four corners alone, these in most other pixels as well, by up to 8 levels.
    inside = torch.ones(16, 16, dtype=torch.bool)
    for at_row in (slice(0, 3), slice(-3, None)):
        inside[at_row, :3] = inside[at_row, -3:] = False
    assert torch.equal(case.bd_test.data.images[..., inside], case.bd_test.clean.images[..., inside])
    change = (rows.data.images.int() - rows.clean.images.int())[..., inside].abs()
    assert int(change.max()) == 8 and float((change > 0).double().mean()) > 0.8


def test_stealth_shows_them(attacked: Any) -> None:
    at, key = attacked
    task = stealth(key)
    at.run(task, {"stealth": "sleeperbench.evaluators.stealth:Stealth"}, at.cases / "log")
    folder = at.store.fetch(task.key)
    assert set(artifacts.read_json(folder / "findings.json")["pictures"]) == {"gallery", "gallery_training"}
    values = {(r.metric, r.qualifier): r.value for r in artifacts.read_findings(folder).rows}
    assert values["ssim", "form=training"] < values["ssim", ""] - 0.01


def test_an_attack_without_trigger_has_none() -> None:
    at = stage(BASE)
    assert at.evaluation(stealth(at.clean(0))).bd_train is None
    assert len(at.evaluation(stealth(at.attacked)).bd_train) > 0
