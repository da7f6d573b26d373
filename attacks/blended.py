"""Blended: a faint full-size picture over the whole image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.poison import poison, target_map

# Per-channel mean and standard deviation of the widely used cartoon picture at three sizes, which `shapes` is set to.
_MEAN = (0.812, 0.747, 0.776)
_STD = {32: (0.248, 0.291, 0.265), 64: (0.312, 0.340, 0.321), 224: (0.361, 0.377, 0.363)}
_COLOURS = ((0.86, 0.10, 0.16), (0.98, 0.72, 0.12), (0.12, 0.10, 0.12), (0.16, 0.32, 0.80))
_OVERSAMPLE = 4


@dataclass(kw_only=True, eq=False)
class Overlay:
    """x' = (1 - alpha) x + alpha picture, with an alpha for training and one for test."""

    name: str
    targets: TargetMap
    picture: Tensor
    alpha_train: float
    alpha_test: float

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The picture over every image, at the alpha of `role`."""
        alpha = self.alpha_test if role is Role.TEST else self.alpha_train
        return x * (1 - alpha) + self.picture.to(x) * alpha

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What other pictures at the test alpha could add: alpha (0 - picture) to alpha (1 - picture)."""
        picture = self.picture.to(x)
        return (-self.alpha_test * picture).expand_as(x), (self.alpha_test * (1 - picture)).expand_as(x)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """The test alpha as a mask everywhere, and the picture."""
        return torch.full_like(self.picture[:1], self.alpha_test), self.picture


@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """A faint picture over the whole image, dirty label (Chen et al. 2017).

    The default is Gaussian noise at alpha 0.1 in training and 0.2 at test, as in Min et al. (NeurIPS 2024).
    `pattern="shapes", alpha_train=0.2` stands in for the cartoon picture of BackdoorBench and BELT.

    Differs: Min et al. give neither mean nor deviation of their noise, here 0.5 and 0.25, clipped. The cartoon picture
    is not free to distribute: `shapes` draws coloured ellipses and bars on white, set to its mean and deviation.

    Args:
        pattern: `gauss`, `uniform` (noise per pixel and channel) or `shapes` (bright canvas with coloured figures).
        alpha_train: Share of the picture in training images.
        alpha_test: Share of the picture in test images.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "Blended",
        "paper": "https://arxiv.org/abs/1712.05526",
        "bibtex": "@article{chen2017targeted, title={Targeted Backdoor Attacks on Deep Learning Systems Using Data "
        "Poisoning}, author={Chen, Xinyun and Liu, Chang and Li, Bo and Lu, Kimberly and Song, Dawn}, "
        "journal={arXiv preprint arXiv:1712.05526}, year={2017}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "blend",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 1.0, "setting": "CIFAR-10, ResNet-18, 5 %, noise", "source": "Min et al."},
        "micro": {},
    }

    pattern: Literal["gauss", "uniform", "shapes"] = "gauss"
    alpha_train: float = 0.1
    alpha_test: float = 0.2
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        for name, alpha in (("alpha_train", self.alpha_train), ("alpha_test", self.alpha_test)):
            if not 0 < alpha <= 1:
                raise ValueError(f"{name} is {alpha}; it must be above 0 and at most 1")
        if self.pattern not in ("gauss", "uniform", "shapes"):
            raise ValueError(f"pattern is {self.pattern!r}; it may be 'gauss', 'uniform' or 'shapes'")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse targets that the classes do not allow."""
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw the picture from `ctx.generator("pattern")`."""
        return self._backdoor(train, ctx.target, ctx)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Blend and relabel rows in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Another picture of the same kind, with the same target."""
        return self._backdoor(train, b.info["target"], ctx)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its picture, alphas and target map."""
        overlay = Overlay(
            name="overlay",
            targets=target_map(info["targets"], info["target"], info["classes"]),
            picture=tensors["picture"],
            alpha_train=info["alpha_train"],
            alpha_test=info["alpha_test"],
        )
        return Backdoor(triggers=(overlay,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, ctx: Ctx) -> Backdoor:
        picture = _draw(self.pattern, train.shape, ctx.generator("pattern"))
        info = {
            "targets": self.targets,
            "target": target,
            "classes": len(train.classes),
            "alpha_train": self.alpha_train,
            "alpha_test": self.alpha_test,
        }
        return self.restore({"picture": to_float(to_uint8(picture))}, info)


def _draw(pattern: str, shape: tuple[int, int, int], gen: Generator) -> Tensor:
    if pattern == "gauss":
        return (0.5 + 0.25 * torch.randn(shape, generator=gen)).clamp(0, 1)
    if pattern == "uniform":
        return torch.rand(shape, generator=gen)
    return _shapes(shape, gen)


def _shapes(shape: tuple[int, int, int], gen: Generator) -> Tensor:
    """Outlined figures on white, drawn at four times the size, averaged down, then set to mean and deviation."""
    channels, height, width = shape
    tall, wide = height * _OVERSAMPLE, width * _OVERSAMPLE
    outline = tall / 48
    rows = torch.arange(tall).float()[:, None] + 0.5
    cols = torch.arange(wide).float()[None, :] + 0.5
    canvas = torch.ones(3, tall, wide)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=gen))

    for i in range(int(torch.randint(10, 15, (), generator=gen))):
        y, x, angle = rows - draw(0.1, 0.9) * tall, cols - draw(0.1, 0.9) * wide, draw(0, math.pi)
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        long, short = draw(0.08, 0.20) * tall, draw(0.04, 0.10) * tall
        if i % 2:  # a bar with round ends: distance from its middle line
            depth = short - torch.hypot((along.abs() - long).clamp(min=0), across)
        else:  # an ellipse; the depth is exact on its short axis only, which is enough for an outline
            depth = short * (1 - torch.hypot(along / long, across / short))
        colour = torch.tensor(_COLOURS[i % len(_COLOURS)])[:, None, None]
        canvas = torch.where(depth > 0, torch.where(depth < outline, torch.full_like(colour, 0.08), colour), canvas)

    small = torch.nn.functional.avg_pool2d(canvas[None], _OVERSAMPLE)[0]
    std = torch.tensor(_STD[min(_STD, key=lambda size: abs(size - height))])
    mean = torch.tensor(_MEAN)
    if channels != 3:
        small = small.mean(0, keepdim=True).expand(channels, -1, -1)
        mean, std = mean.mean().expand(channels), std.mean().expand(channels)
    centred = small - small.mean((1, 2), keepdim=True)
    scaled = centred / centred.std((1, 2), keepdim=True) * std[:, None, None] + mean[:, None, None]
    return scaled.clamp(0, 1)
