"""Triggers that add one fixed signal to every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from sleeperbench.contracts.attack import Backdoor, Role, TargetMap
from sleeperbench.kit.poison import target_map


@dataclass(kw_only=True, eq=False)
class Additive:
    """x' = clip(x + strength signal, 0, 1), with a strength for training and one for test.

    Args:
        name: Shown on pictures and pages.
        targets: Which label it asks for.
        signal: float32, broadcasts with (C, H, W).
        train: Strength in training images and covers.
        test: Strength in test images.
    """

    name: str
    targets: TargetMap
    signal: Tensor
    train: float
    test: float

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The signal on every image, at the strength of `role`."""
        strength = self.test if role is Role.TEST else self.train
        return (x + strength * self.signal.to(x)).clamp(0, 1)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What signals of any form could reach that change no pixel by more than this one's test peak."""
        peak = abs(self.test) * float(self.signal.abs().max())
        there = (x + self.test * self.signal.to(x)).clamp(0, 1)
        low, high = (x - peak).clamp(min=0) - there, (x + peak).clamp(max=1) - there
        return low.clamp(max=0), high.clamp(min=0)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: a sum is no blend of a mask and a pattern."""
        return None


def additive(name: str, signal: Tensor, info: Mapping[str, Any]) -> Backdoor:
    """A backdoor of one additive trigger.

    Args:
        name: The trigger's.
        signal: float32, broadcasts with (C, H, W); it is all that `tensors` holds, as `signal`.
        info: `targets`, `target` and `classes` as `target_map` takes them, strengths `train` and `test`.
    """
    targets = target_map(info["targets"], info["target"], info["classes"])
    trigger = Additive(name=name, targets=targets, signal=signal, train=info["train"], test=info["test"])
    return Backdoor(triggers=(trigger,), tensors={"signal": signal}, info=dict(info))
