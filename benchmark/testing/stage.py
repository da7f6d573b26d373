"""Micro cases: the engine's own staging over a small made-up data set, in a store that is thrown away."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sleeperbench.contracts.access import Access
from sleeperbench.contracts.context import Cost, Ctx, Recipe, derive
from sleeperbench.contracts.defense import Outcome
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.data.cut import cut
from sleeperbench.data.images import ImageSet
from sleeperbench.engine import artifacts
from sleeperbench.engine.child import open_case
from sleeperbench.engine.evaluation import opened
from sleeperbench.engine.outcomes import checked
from sleeperbench.engine.store import Store
from sleeperbench.engine.task import Task, digest
from sleeperbench.engine.work import Leased, Rows, Work
from sleeperbench.engine.worker import ForkServer
from sleeperbench.testing.nets import ARCHS, register

SIDE = 16
TARGET = 1
RATE = 0.1
"""What attacks are asked for."""
PLANTED_RATE = 0.2
"""What the staged model was trained with: with so few rows a lower rate implants nothing."""
CLEAN = 120
"""Clean rows of the base case: the honest rule needs 114 to accept a model that lost nothing (kit/select.py)."""
COST = {"forwards": 2000, "backwards": 1000, "queries": 0}
"""What the stage says that a wrapped defense spent."""
PLANTED = "sleeperbench.kit.planted:Planted"
RECIPE = Recipe(epochs=30, lr=0.1, batch=32, pad=1, flip=False)
NUMERICS = {"precision": "fp32", "threads": 1, "deterministic": True}
PATIENCE = 300
"""Seconds to wait for a model that another process trains, which takes it a few."""
shared: Path | None = None
"""A folder in which processes of one run of tests, which have the same code, find each other's trained models; None:
each process trains its own."""


@dataclass(frozen=True)
class Variant:
    """A micro case: architecture (a name of `ARCHS`), image channels, classes."""

    arch: str = "micro_bn"
    channels: int = 3
    classes: int = 10

    def __str__(self) -> str:
        return f"{self.arch}, {self.channels} x {SIDE} x {SIDE}, {self.classes} classes"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, SIDE, SIDE

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The classifier's spec."""
        arch, args = ARCHS[self.arch]
        norm = ((0.5,) * self.channels, (0.25,) * self.channels)
        return ModelSpec(arch=arch, classes=self.classes, shape=self.shape, norm=norm, args=args)


BASE = Variant()


class Stage(Work):
    """The engine's worker on micro rows; staged models and folders are kept as long as this object."""

    def __init__(self, variant: Variant) -> None:
        register()
        folder = Path(tempfile.mkdtemp(prefix="sleeperbench-check-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        store = shared / f"{variant.arch}-{variant.channels}x{variant.classes}" if shared else folder / "store"
        super().__init__(Store(store), torch.device("cpu"), _no_fork)
        self.cases, self.variant = folder / "cases", variant
        self.cases.mkdir()
        self.micro = micro_rows(variant)

    def rows(self, data: Mapping[str, Any]) -> Rows:
        """The micro rows, whatever the task's parameters say."""
        return self.micro

    def place(self) -> Path:
        """A new folder that lives as long as the stage."""
        return Path(tempfile.mkdtemp(dir=self.cases))

    # ---- artifacts -------------------------------------------------------------------------------------------------
    def classifier(self, replica: int, *, triggers: bool, arch: str = "") -> str:
        """Key of a trained classifier: attacked by the planted square, or clean."""
        variant = replace(self.variant, arch=arch) if arch else self.variant
        params = {
            "method": {"triggers": triggers},
            "data": {},
            "recipe": asdict(RECIPE),
            "target": TARGET,
            "rate": PLANTED_RATE,
            "replica": replica,
            "spec": variant.spec.to_json(),
            "curves": False,
        }
        task = Task(kind="attack", name="planted", version=1, params=params, seed=11, numerics=NUMERICS)
        end = time.monotonic() + PATIENCE
        while not self.store.has(task.key):
            try:
                self.run(task, {"planted": PLANTED}, self.cases / "log")
            except Leased:  # another process trains it
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        return task.key

    @functools.cached_property
    def attacked(self) -> str:
        """Key of the attacked model."""
        return self.classifier(0, triggers=True)

    def clean(self, replica: int) -> str:
        """Key of an independent clean model."""
        return self.classifier(replica, triggers=False)

    @functools.cached_property
    def unattacked(self) -> Stage:
        """The same rows and folders with a clean model in the attacked one's place."""
        at = copy.copy(self)
        at.attacked = self.clean(0)
        return at

    def kept(self, name: str, inputs: Mapping[str, str], write: Callable[[Path], Any]) -> str:
        """Key of an artifact of the stage's own, written once."""
        key = digest([name, dict(inputs)])
        if not self.store.has(key):
            with self.store.scratch() as folder:
                write(folder)
                self.store.commit(
                    key,
                    folder,
                    task={"inputs": dict(inputs)},
                    env={},
                    result={"rate_actual": PLANTED_RATE, "cost": COST},
                )
        return key

    # ---- attack ----------------------------------------------------------------------------------------------------
    @functools.cached_property
    def attackable(self) -> tuple[ImageSet, torch.Tensor]:
        """Training rows as with `clean_source = training`: (rows, bool (N,)), of which the pool's are not eligible."""
        rows = self.micro
        index = torch.isin(rows.source.ids, torch.cat([rows.train.ids, rows.pool.ids]))
        train = rows.source.rows(index)
        return train, torch.isin(train.ids, rows.train.ids)

    def ctx(self, seed: int, clean_models: int = 0) -> Ctx:
        """The context of an attack."""
        models = tuple(self.model(self.clean(i)) for i in range(clean_models))
        return Ctx(seed=seed, target=TARGET, recipe=RECIPE, scratch=self.place(), clean_models=models)

    # ---- defense ---------------------------------------------------------------------------------------------------
    def task(self, name: str, access: Access, params: Mapping[str, Any], inner: Outcome | None) -> Task:
        """A defense's task on the attacked model, with what its access needs."""
        inputs = {"attack": self.attacked}
        inputs |= {f"reference{i}": self.clean(100 + i) for i in range(access.references)}
        if access.oracle:
            inputs["oracle"] = self.attacked
        if inner is not None:
            about = {"attack": self.attacked, "around": digest([name, dict(params)])}
            inputs["inner"] = self.kept("inner", about, lambda folder: artifacts.write_outcome(folder, inner))
        return Task(
            kind="defense",
            name=name,
            version=1,
            params={
                "method": dict(params),
                "access": asdict(access),
                "spec": self.variant.spec.to_json(),
                "data": {"cut": {"seed": 0, "clean": len(self.micro.pool)}},
                "recipe": asdict(RECIPE),
            },
            seed=12,
            numerics=NUMERICS,
            inputs=inputs,
            role="view",
            timeout=60,
        )

    def staged(self, task: Task, value: str) -> tuple[Path, dict[str, Any]]:
        """A folder with exactly what the defense declared, and its description."""
        folder = self.place()
        about = self._stage(task, {task.name: value, "planted": PLANTED}, folder)
        desk = self.desk(folder, about["access"], self.attacked)
        if desk is not None:
            weakref.finalize(self, desk.close)
        return folder, about

    def case(self, staged: tuple[Path, dict[str, Any]]) -> Any:
        """The case in that folder, as the engine's child opens it."""
        return open_case(*staged)

    def child(self, folder: Path, seconds: float, memory: int) -> dict[str, Any]:
        """Run a staged folder in a fork server's child, limited to `seconds` and bytes; returns what it used.

        Raises:
            engine.work.Failed: with the status and reason that a row would show.
        """
        self.fork, self.server.memory = self.server, memory
        try:
            return self._child(folder, self.cases / "log", seconds)[1]
        finally:
            self.fork = _no_fork

    @functools.cached_property
    def server(self) -> ForkServer:
        """The fork server, which ends with this process."""
        return ForkServer("process", memory=0, cuda=False, share=1.0, hidden=[])

    def judge(self, outcome: Outcome, task: Task, folder: Path) -> None:
        """The engine's own checks of an answer.

        Raises:
            engine.work.Failed: with the reason that a row would show.
        """
        checked(outcome, self.variant.spec, task.params["access"], folder)

    # ---- evaluator -------------------------------------------------------------------------------------------------
    def evaluation(self, task: Task) -> Any:
        """What an evaluator is handed."""
        return opened(self, task, {"planted": PLANTED}, self.place(), Cost())


@functools.cache
def stage(variant: Variant) -> Stage:
    """The one stage of a micro case in this process."""
    return Stage(variant)


@functools.cache
def micro_rows(variant: Variant) -> Rows:
    """Noisy copies of one smooth picture per class, cut like any data set."""
    k = variant.classes
    n, n_test, clean = max(200, 10 * k), max(80, 2 * k), max(40, 2 * k)
    if variant == BASE:  # elsewhere methods show what they do with fewer clean rows than a choice takes
        n, clean = 320, CLEAN
    gen = torch.Generator().manual_seed(derive(0, "micro", variant.channels, k))
    pictures = torch.rand(k, variant.channels, 4, 4, generator=gen)
    pictures = torch.nn.functional.interpolate(pictures, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    labels = torch.arange(n + n_test) % k
    labels = labels[torch.randperm(len(labels), generator=gen)]
    noise = 0.1 * torch.randn(len(labels), *variant.shape, generator=gen)
    pixels = ((pictures[labels] + noise).clamp(0, 1) * 255).round().to(torch.uint8)

    def part(split: str, rows: slice) -> ImageSet:
        x, y = pixels[rows].clone(), labels[rows].clone()
        names = tuple(f"class {i}" for i in range(k))
        about: dict[str, Any] = {"classes": names, "name": "micro", "split": split, "digest": "micro"}
        return ImageSet(images=x, labels=y, ids=torch.arange(len(y)), **about)

    source = part("train", slice(0, n))
    c = cut(source.labels, seed=0, clean=clean, classes=k)
    train = source.rows(c.rest.sort().values)
    return Rows(
        train=train,
        eligible=torch.ones(len(train), dtype=torch.bool),
        pool=source.rows(c.pool),
        probe=source.rows(c.probe),
        test=part("test", slice(n, None)),
        source=source,
    )


def _no_fork(folder: Path, log: Path, seconds: float) -> dict[str, Any]:
    raise AssertionError("a stage forks nothing unless it was given a fork server")
