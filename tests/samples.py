"""Small real things that tests share: digits in four disjoint parts, tiny trained models, nets that read a pixel."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sleeperbench import Attack, Backdoor, ImageSet, ModelSpec, PoisonedSet, Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import Ctx, Recipe, Rendered
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.poison import render
from sleeperbench.kit.predict import predict
from sleeperbench.kit.train import fit

RECIPE = Recipe(epochs=12, lr=0.1, pad=1, flip=False, batch=64)
SPEC = ModelSpec(arch="small_cnn", classes=10, shape=(1, 16, 16), norm=((0.5,), (0.5,)), args={"width": 8})


def ctx(seed: int = 0, target: int = 0) -> Ctx:
    return Ctx(seed=seed, recipe=RECIPE, scratch=Path("."), target=target)


def images(pixels: Tensor, labels: list[int] | Tensor, classes: int = 10) -> ImageSet:
    """An image set of these uint8 pixels with ids 100, 101, ..."""
    labels = torch.as_tensor(labels)
    return ImageSet(
        images=pixels,
        labels=labels,
        ids=torch.arange(len(labels)) + 100,
        classes=tuple(str(i) for i in range(classes)),
        name="sample",
        split="train",
        digest="",
    )


def random_images(n: int, shape: tuple[int, int, int] = (3, 16, 16), classes: int = 10, seed: int = 0) -> ImageSet:
    gen = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, *shape), generator=gen, dtype=torch.uint8)
    return images(pixels, torch.randint(classes, (n,), generator=gen), classes)


@functools.cache
def digits() -> dict[str, ImageSet]:
    """scikit-learn's digits, each pixel doubled to 16x16: train 1000, pool 150, probe 250, test 397 rows."""
    raw = load_digits()
    pixels = torch.from_numpy((raw.images * (255 / 16)).round().astype(np.uint8))[:, None]
    pixels = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    whole = images(pixels, torch.from_numpy(raw.target.astype(np.int64)))
    cuts = {"train": (0, 1000), "pool": (1000, 1150), "probe": (1150, 1400), "test": (1400, 1797)}
    return {name: whole.rows(torch.arange(*cut)) for name, cut in cuts.items()}


@functools.cache
def clean_net(seed: int = 1) -> Classifier:
    net = build(SPEC, seed)
    fit(net, digits()["train"], RECIPE, ctx(seed))
    return net


@functools.cache
def badnets() -> Backdoor:
    return BadNets().prepare(digits()["train"], ctx(5))


@functools.cache
def badnets_net() -> Classifier:
    train = digits()["train"]
    poisoned = BadNets().poison(train, badnets(), torch.ones(len(train), dtype=torch.bool), 0.1, ctx(5))
    net = build(SPEC, 2)
    fit(net, poisoned.data, RECIPE, ctx(2))
    return net


@functools.cache
def badnets_rendered(part: str, role: Role) -> Rendered:
    found = render(digits()[part], badnets(), role, ctx(5))
    assert found is not None
    return found


class ReadsPixel(nn.Module):
    """Answers the class that stands in the first pixel, 0..classes-1; a value beyond gives NaN."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        value = (x[:, 0, 0, 0] * 255).round().long()
        logits = torch.eye(self.classes)[value.clamp(max=self.classes - 1)]
        return torch.where((value < self.classes)[:, None], logits, torch.full_like(logits, torch.nan))


def answering(answer: list[int], labels: list[int], classes: int = 10) -> ImageSet:
    """Images for which `ReadsPixel` answers so."""
    pixels = torch.zeros(len(answer), 1, 16, 16, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.as_tensor(answer, dtype=torch.uint8)
    return images(pixels, labels, classes)


def rendered(answer: list[int], labels: list[int], targets: list[int], trigger_id: list[int] | None = None) -> Rendered:
    """Triggered images for which `ReadsPixel` answers so."""
    data = answering(answer, labels)
    return Rendered(
        data=data,
        clean=replace(data, images=torch.zeros_like(data.images)),
        targets=torch.as_tensor(targets),
        trigger_id=torch.as_tensor(trigger_id or [0] * len(targets)),
    )


def judged(method: Any, case: Any) -> Any:
    """The outcome of a defense that prepares, both phases."""
    case.prepared = method.prepare(case)
    return method.run(case)


# ---- for tests of what a whole method does ---------------------------------------------------------------------------
def sized(data: ImageSet, side: int) -> ImageSet:
    """Digits of 16x16 pixels, or at their own 8x8."""
    return replace(data, images=data.images[:, :, :: 16 // side, :: 16 // side].contiguous())


DIGITS_NORM = ((0.3,), (0.38,))
"""Mean and deviation of the digits' pixels."""


def wide(width: int, side: int) -> ModelSpec:
    """A net for digits; at 16x16 pixels it is normalised by their own mean and deviation."""
    norm = DIGITS_NORM if side == 16 else SPEC.norm
    return replace(SPEC, shape=(1, side, side), norm=norm, args={"width": width})


@functools.cache
def planted(attack: Attack, rows: int, rate: float, side: int) -> tuple[PoisonedSet, Rendered]:
    """The first `rows` training digits with target 0, and the triggered test images."""
    train = sized(digits()["train"].rows(torch.arange(rows)), side)
    backdoor = attack.prepare(train, ctx(5))
    poisoned = attack.poison(train, backdoor, torch.ones(rows, dtype=torch.bool), rate, ctx(5))
    found = render(sized(digits()["test"], side), backdoor, Role.TEST, ctx(5))
    assert found is not None
    return poisoned, found


@functools.cache
def trained(attack: Attack, rows: int, rate: float, side: int, width: int = 8, epochs: int = 12) -> Classifier:
    """Plain training on `planted` rows."""
    net = build(wide(width, side), 2)
    fit(net, planted(attack, rows, rate, side)[0].data, replace(RECIPE, epochs=epochs), ctx(2))
    return net


def implanted(attack: Attack, rate: float) -> tuple[float, float, float]:
    """Of a net trained through the attack's hooks: ASR, covers that keep their label, and a clean net's ASR."""
    train, test, c = digits()["train"], digits()["test"], ctx(5)
    b = attack.prepare(train, c)
    net = build(SPEC, 2)
    fit(net, train, c.recipe, c, hooks=attack.hooks(train, b, torch.ones(len(train)) > 0, rate, c))
    own, covers = render(test, b, Role.TEST, c), render(test, b, Role.COVER, c)
    assert own is not None and covers is not None

    def share(n: nn.Module, seen: Rendered, wanted: Tensor) -> float:
        return float((predict(n, seen.data.images).argmax(1) == wanted).float().mean())

    return share(net, own, own.targets), share(net, covers, covers.data.labels), share(clean_net(), own, own.targets)
