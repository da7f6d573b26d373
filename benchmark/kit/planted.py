"""The backdoor that `sleeperbench check` tries defenses and evaluators on, so that no other plugin is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from sleeperbench.contracts import Attack, Backdoor, Ctx, PoisonedSet, Role, TargetMap
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.poison import poison

_SIDE = 4


@dataclass(kw_only=True, eq=False)
class Square:
    """x' = x (1 - mask) + pattern mask."""

    name: str
    targets: TargetMap
    mask: Tensor
    pattern: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The square on every image."""
        mask = self.mask.to(x)
        return x * (1 - mask) + self.pattern.to(x) * mask

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pixels under the mask are free."""
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return (-pattern * mask).expand_as(x), ((1 - pattern) * mask).expand_as(x)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """Mask and pattern."""
        return self.mask, self.pattern


@dataclass(frozen=True, kw_only=True)
class Planted(Attack):
    """A square of random colours in the middle of the lower edge; without `triggers`, clean training."""

    INFO = {"title": "Planted square", "version": 1, "api": 1, "kind": "test", "micro": {}}

    triggers: bool = True

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw the colours."""
        if not self.triggers:
            return Backdoor(triggers=())
        channels, height, width = train.shape
        mask, pattern = torch.zeros(1, height, width), torch.zeros(channels, height, width)
        rows, cols = slice(height - _SIDE, height), slice(width // 2 - _SIDE // 2, width // 2 + _SIDE // 2)
        mask[:, rows, cols] = 1
        colours = torch.randint(256, (channels, _SIDE, _SIDE), generator=ctx.generator("pattern"))
        pattern[:, rows, cols] = colours / 255
        return self.restore({"mask": mask, "pattern": pattern}, {"target": ctx.target})

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Dirty labels in place."""
        return poison(train, b, eligible, rate, ctx, include_target=False)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its tensors."""
        if not tensors:
            return Backdoor(triggers=())
        targets = TargetMap.all_to_one(info["target"])
        square = Square(name="square", targets=targets, mask=tensors["mask"], pattern=tensors["pattern"])
        return Backdoor(triggers=(square,), tensors=tensors, info=info)
