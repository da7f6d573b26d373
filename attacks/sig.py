"""SIG: faint vertical stripes on images of the target class, whose labels stay true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.additive import additive
from sleeperbench.kit.poison import poison_target_class, target_map

Stripes = Literal["vertical", "horizontal"]


@dataclass(frozen=True, kw_only=True)
class SIG(Attack):
    """A sinusoid on images of the target class, clean label (Barni, Kallas, Tondi, ICIP 2019).

    1. v(i, j) = sin(2 pi j f / W) for pixel (row i, column j), the same in all channels: vertical stripes.
    2. `rate` of all rows, drawn among the target class, become clip(x + delta_train v) and keep their true label. If
       the class has fewer rows, all of them; from then on the model never sees that class without the signal.
    3. At test clip(x + delta_test v), on images of the other classes.

    Differs: images are rounded to the nearest of 256 levels. Strength and frequency are BackdoorBench's.

    Args:
        frequency: Stripes per image width, f; below half the width in pixels.
        delta_train: Amplitude in training images, of 1.
        delta_test: Amplitude in test images.
    """

    INFO = {
        "title": "SIG",
        "paper": "https://arxiv.org/abs/1902.11237",
        "bibtex": "@inproceedings{barni2019new, title={A New Backdoor Attack in {CNN}s by Training Set Corruption "
        "Without Label Poisoning}, author={Barni, Mauro and Kallas, Kassem and Tondi, Benedetta}, booktitle={IEEE "
        "International Conference on Image Processing}, year={2019}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "clean_label",
        "clean_label": True,
        "implant_asr": 0.7,  # the protocol's gate for clean labels
        "published_asr": {"value": 0.9709, "setting": "CIFAR-10, PreActResNet18, 5 %", "source": "BackdoorBench"},
        "micro": {},
    }

    frequency: int = 6
    delta_train: float = 40 / 255
    delta_test: float = 40 / 255

    def __post_init__(self) -> None:
        for name, delta in (("delta_train", self.delta_train), ("delta_test", self.delta_test)):
            if not 0 < delta <= 1:
                raise ValueError(f"{name} is {delta}; it must be above 0 and at most 1")
        if self.frequency < 1:
            raise ValueError(f"frequency is {self.frequency}; it must be at least 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse stripes too narrow for the pixels, the placebo's horizontal ones too."""
        check_stripes(shape[2], self.frequency)
        near_frequencies(shape[1], self.frequency)
        target_map("all_to_one", 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the stripes; nothing is drawn."""
        return self._backdoor(train, ctx.target, self.frequency, "vertical")

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Stripes on rows of the target class, in place."""
        return poison_target_class(train, b, b.info["target"], eligible, rate, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Horizontal stripes of another width, with the same target."""
        return self._backdoor(
            train, b.info["target"], other_frequency(train.shape[1], self.frequency, ctx), "horizontal"
        )

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its signal, amplitudes and target."""
        return additive("stripes", tensors["signal"], info)

    def _backdoor(self, train: ImageSet, target: int, frequency: int, stripes: Stripes) -> Backdoor:
        self.check(train.shape, len(train.classes))
        info = {
            "targets": "all_to_one",
            "target": target,
            "classes": len(train.classes),
            "train": self.delta_train,
            "test": self.delta_test,
        }
        return self.restore({"signal": sinusoid(train.shape, frequency, stripes)}, info)


def sinusoid(shape: tuple[int, int, int], frequency: int, stripes: Stripes) -> Tensor:
    """sin(2 pi frequency p / size), p the column (vertical stripes) or row: (1, 1, W) or (1, H, 1)."""
    size = shape[2] if stripes == "vertical" else shape[1]
    wave = torch.sin(2 * math.pi * frequency * torch.arange(size, dtype=torch.float64) / size).float()
    return wave.view(1, 1, -1) if stripes == "vertical" else wave.view(1, -1, 1)


def check_stripes(size: int, frequency: int) -> None:
    """Refuse a frequency that `size` pixels cannot carry: at half of them the sinusoid is zero in every pixel."""
    if 2 * frequency >= size:
        raise ValueError(f"{frequency} stripes in {size} pixels are too narrow; a frequency below {size / 2:g} fits")


def near_frequencies(size: int, frequency: int) -> list[int]:
    """The frequencies within 3 of `frequency` that `size` pixels carry, without itself; refuse a size with none."""
    near = [f for f in range(max(1, frequency - 3), frequency + 4) if f != frequency and 2 * f < size]
    if not near:
        raise ValueError(
            f"{size} pixels carry no other stripes within 3 of {frequency} for the placebo; lower frequency"
        )
    return near


def other_frequency(size: int, frequency: int, ctx: Ctx) -> int:
    """Another frequency near `frequency` that `size` pixels carry, from `ctx.generator("frequency")`."""
    near = near_frequencies(size, frequency)
    return near[int(torch.randint(len(near), (), generator=ctx.generator("frequency")))]
