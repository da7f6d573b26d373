"""LF: a smooth, faint bump of colour, without high frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.additive import additive
from sleeperbench.kit.poison import poison, target_map

# The published pattern at 32 pixels is max(0, height g - floor) grey levels in red, green and blue, with g a Gaussian.
_HEIGHT = (19.6, 0.0, 53.2)
_FLOOR = (1.0, 0.0, 2.1)
_PEAK = 53.2 - 2.1
_CENTRE = 14 / 32  # of the image's size; the middle of pixel 13.5 at 32
_SIGMA = 11.5 / 32


@dataclass(frozen=True, kw_only=True)
class LF(Attack):
    """A universal low-frequency addition, dirty label (Zeng, Park, Mao, Jia, ICCV 2021).

    1. The signal v is a bump in red and blue: per channel max(0, h g - c), with g the Gaussian of deviation 11.5 / 32
       of the image around a place just above and left of the middle. It reaches from 0 to `amplitude`.
    2. `rate` of all rows become clip(x + v) and get the wanted label; the same signal at test.

    Differs: the authors search v for a given classifier by repeated targeted DeepFool and a Gaussian low-pass. Here v
    is a closed form fitted to the pattern that this search left in BackdoorBench for CIFAR-10 and PreActResNet18 (root
    mean square difference 0.4 grey levels in red and 0.75 in blue at 32 pixels), scaled to the image's size: it needs
    no surrogate and is the same for every architecture. Grey images get the blue channel's bump.

    Args:
        amplitude: Largest value added, of 1.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "LF",
        "paper": "https://arxiv.org/abs/2104.03413",
        "bibtex": "@inproceedings{zeng2021rethinking, title={Rethinking the Backdoor Attacks' Triggers: A Frequency "
        "Perspective}, author={Zeng, Yi and Park, Won and Mao, Z. Morley and Jia, Ruoxi}, booktitle={IEEE/CVF "
        "International Conference on Computer Vision}, year={2021}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "frequency",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.9803, "setting": "CIFAR-10, PreActResNet18, 5 %", "source": "BackdoorBench"},
        "micro": {},
    }

    amplitude: float = 0.2
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.amplitude <= 1:
            raise ValueError(f"amplitude is {self.amplitude}; it must be above 0 and at most 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse targets that the classes do not allow, and images of neither one nor three channels."""
        if shape[0] not in (1, 3):
            raise ValueError(f"the bump is made for 1 or 3 channels, not {shape[0]}")
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the bump; nothing is drawn."""
        return self._backdoor(train, ctx.target, (_CENTRE, _CENTRE), torch.arange(3))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Add the bump and relabel rows in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """A bump around one of the corners, with its colours exchanged, with the same target."""
        gen = ctx.generator("decoy")
        top, left = torch.randint(2, (2,), generator=gen).tolist()
        turn = int(torch.randint(1, 3, (), generator=gen))
        return self._backdoor(train, b.info["target"], (float(top), float(left)), torch.arange(3).roll(turn))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its signal, amplitude and target map."""
        return additive("bump", tensors["signal"], info)

    def _backdoor(self, train: ImageSet, target: int, centre: tuple[float, float], colours: Tensor) -> Backdoor:
        channels, height, width = train.shape
        self.check(train.shape, len(train.classes))
        away = [(torch.arange(n) + 0.5) / n - c for n, c in zip((height, width), centre, strict=True)]
        g = torch.exp(-(away[0][:, None] ** 2 + away[1] ** 2) / (2 * _SIGMA**2))
        tall, floor = torch.tensor(_HEIGHT)[:, None, None], torch.tensor(_FLOOR)[:, None, None]
        bump = (tall * g - floor).clamp(min=0) / _PEAK
        signal = bump[colours] if channels == 3 else bump[2:]
        info = {
            "targets": self.targets,
            "target": target,
            "classes": len(train.classes),
            "train": self.amplitude,
            "test": self.amplitude,
        }
        return self.restore({"signal": signal.clone()}, info)
