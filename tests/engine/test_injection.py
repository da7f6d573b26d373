"""What [train] makes of attacks, through the work of the engine: injection by fine-tuning, and appended rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sleeperbench.contracts import Mark, ModelSpec
from sleeperbench.data.load import load as load_data
from sleeperbench.engine import artifacts
from sleeperbench.engine.outcomes import Failed
from sleeperbench.engine.plan import Dataset, Plan, Planner
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.store import Store
from sleeperbench.engine.task import Task
from sleeperbench.engine.work import Work
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.predict import predict

TAIL = """
[train]
recipe = "s3"
epochs = 5
batch = 64
inject = "finetune"
inject_epochs = 8
inject_lr = 0.1
[model.small_cnn]
width = 8
"""


def weights(net: Classifier) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.fixture
def planned(make_suite: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plan on the real digits, and what does its tasks."""
    monkeypatch.setenv("SLEEPERBENCH_CACHE", str(tmp_path / "cache"))
    parts = {split: load_data("digits", split) for split in ("train", "test")}
    digits = Dataset(
        name="digits",
        shape=parts["train"].shape,
        classes=10,
        norm=((0.5,), (0.5,)),
        pad=1,
        flip=False,
        rows={split: len(data) for split, data in parts.items()},
        digests={split: data.digest for split, data in parts.items()},
        canonical=True,
    )

    def made(**suite: Any) -> Plan:
        return Planner(make_suite(defenses=["none"], rates=[0.2], **suite), registry, {"digits": digits}).build()

    return made, Work(Store(tmp_path / "store"), torch.device("cpu"), lambda folder, log, seconds: {})


def ran(work: Work, task: Task, registry: Registry, tmp_path: Path) -> dict[str, Any]:
    values = " ".join(p.value for p in registry.chain("attack", task.name))
    return work.run(task, {task.name: values}, tmp_path / "log")[0]


def test_a_backdoor_is_tuned_into_a_clean_model(planned: Any, registry: Registry, tmp_path: Path) -> None:
    make, work = planned
    plan = make(tail=TAIL)
    (task,) = [t for t in plan.tasks.values() if t.name == "badnets"]
    start = plan.tasks[task.inputs["start"]]
    for t in (start, task):
        ran(work, t, registry, tmp_path)
    before, after = work.net(start.key), work.net(task.key)

    rows = work.rows(task.params["data"])
    triggered = artifacts.read_rendered(work.store.fetch(task.key) / "bd_test.safetensors", rows.test)
    assert triggered is not None

    def share(net: Classifier, images: Tensor, wanted: Tensor) -> float:
        return float((predict(net, images).argmax(1) == wanted).double().mean())

    assert share(before, triggered.data.images, triggered.targets) < 0.2
    assert share(after, triggered.data.images, triggered.targets) > 0.9
    assert min(share(net, rows.test.images, rows.test.labels) for net in (before, after)) > 0.9
    # It went on from there: its weights lie nearer to the start's than a fresh network's do.
    fresh = weights(build(ModelSpec.from_json(task.params["spec"]), seed=0))
    moved, whole = (weights(after) - weights(before)).norm(), (fresh - weights(before)).norm()
    assert float(moved / whole) < 0.8


def test_poisoned_rows_stand_beside_their_clean_copies(planned: Any, registry: Registry, tmp_path: Path) -> None:
    make, work = planned
    small = "[train]\nepochs = 1\nbatch = 256\n"
    sets = {}
    for tail in ("", 'poisoned = "append"\n'):
        plan = make(tail=small + tail)
        (task,) = [t for t in plan.tasks.values() if t.name == "badnets"]
        rate = ran(work, task, registry, tmp_path)["rate_actual"]
        sets[tail] = artifacts.read_set(work.store.fetch(task.key), work.rows(task.params["data"]).train), rate
    (replaced, plain), (appended, beside) = sets.values()
    n, bad = len(replaced.data), replaced.mark == Mark.DIRTY
    k = int(bad.sum())
    assert (k, plain) == (round(0.2 * n), pytest.approx(k / n)) and beside == plain
    train = work.rows(task.params["data"]).train
    for found, before in ((appended.data.images, train.images), (appended.data.labels, train.labels)):
        assert torch.equal(found[:n], before)
    assert torch.equal(appended.data.images[n:], replaced.data.images[bad])
    assert torch.equal(appended.data.labels[n:], replaced.data.labels[bad])
    assert torch.equal(appended.data.ids, torch.cat([train.ids, train.ids[bad]]))
    assert torch.equal(appended.appended, torch.arange(n + k) >= n)
    assert torch.equal(appended.mark == Mark.DIRTY, appended.appended)


@pytest.mark.parametrize("attack", ["wanet", "beltpp:badnets"])
def test_attacks_that_poison_batches_or_know_rows_by_place_append_nothing(
    planned: Any, registry: Registry, tmp_path: Path, attack: str
) -> None:
    make, work = planned
    plan = make(attacks=["none", attack], tail='[train]\nepochs = 1\npoisoned = "append"\n')
    (task,) = [t for t in plan.tasks.values() if t.name == attack]
    with pytest.raises(Failed) as e:
        ran(work, task, registry, tmp_path)
    assert e.value.status == "not_applicable" and e.value.reason.startswith("trained_by_hooks")
