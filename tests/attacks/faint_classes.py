"""A task on which faint signals can be learnt: low-contrast images whose classes are fainter still.

On the digits a small net finds the class at a glance and has no use for a clean-label signal, nor eyes for one of a few
grey levels.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import samples
import torch

from sleeperbench import Attack, ImageSet, Role
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.poison import render
from sleeperbench.kit.train import fit

CLASSES = 4
SPEC = replace(samples.SPEC, classes=CLASSES, shape=(3, 16, 16), norm=((0.5,) * 3, (0.1,) * 3))
RECIPE = replace(samples.RECIPE, epochs=8)


@functools.cache
def rows(split: str) -> ImageSet:
    """Grey 128 with noise of deviation 8 levels; each class adds a smooth picture of deviation 1."""
    gen = torch.Generator().manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.randn(CLASSES, 3, 4, 4, generator=gen), size=16, mode="bicubic")
    pictures *= 1 / pictures.std((1, 2, 3), keepdim=True)
    gen.manual_seed({"train": 1, "test": 2}[split])
    labels = torch.arange(400) % CLASSES
    pixels = 128 + pictures[labels] + 8 * torch.randn(400, 3, 16, 16, generator=gen)
    return samples.images(pixels.round().clamp(0, 255).to(torch.uint8), labels, CLASSES)


@functools.cache
def clean_net() -> Classifier:
    net = build(SPEC, 1)
    fit(net, rows("train"), RECIPE, samples.ctx(1))
    return net


def success(attack: Attack, rate: float) -> tuple[float, float]:
    """Success rates of a net trained on the poisoned set and of a clean net, towards class 2."""
    train, c = rows("train"), samples.ctx(5, 2)
    b = attack.prepare(train, c)
    everyone = torch.ones(len(train), dtype=torch.bool)
    poisoned = attack.poison(train, b, everyone, rate, c)
    net = build(SPEC, 2)
    fit(net, poisoned.data, RECIPE, samples.ctx(2))
    found = render(rows("test"), b, Role.TEST, c)
    assert found is not None
    asr, clean = (float((answers(n, found.data.images, c) == found.targets).float().mean()) for n in (net, clean_net()))
    return asr, clean
