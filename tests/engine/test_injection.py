"""A backdoor tuned into a clean model: [train] inject = "finetune", through the work of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sleeperbench.contracts import ModelSpec
from sleeperbench.data.load import load as load_data
from sleeperbench.engine import artifacts
from sleeperbench.engine.plan import Dataset, Planner
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.store import Store
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


def test_a_backdoor_is_tuned_into_a_clean_model(
    make_suite: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    plan = Planner(make_suite(defenses=["none"], rates=[0.2], tail=TAIL), registry, {"digits": digits}).build()
    (task,) = [t for t in plan.tasks.values() if t.name == "badnets"]
    start = plan.tasks[task.inputs["start"]]
    work = Work(Store(tmp_path / "store"), torch.device("cpu"), lambda folder, log, seconds: {})
    for t in (start, task):
        work.run(t, {t.name: registry.get("attack", t.name).value}, tmp_path / "log")
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
