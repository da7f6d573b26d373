"""Triggers that show only a part of themselves on rows which keep their label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sleeperbench.contracts.attack import Role, TargetMap, Trigger
from sleeperbench.contracts.context import derive
from sleeperbench.kit.pixels import to_uint8
from sleeperbench.kit.rowwise import uniform

_NUMBERS = 2**24
"""Random numbers drawn at a time, which bounds the memory of large images."""


@dataclass(kw_only=True, eq=False)
class Fuzzy:
    """Another trigger, whose covers lack a part of it, or show it under noise or resampled.

    Args:
        plain: The other trigger.
        cover: `mask`, `noise` or `sampling`; the last two need a trigger with a `range`.
        mask_rate: Share of the changed positions that a cover lacks under `mask`.
        noise: Standard deviation of `noise`, relative to the range of each pixel.
    """

    plain: Trigger
    cover: str
    mask_rate: float
    noise: float

    @property
    def name(self) -> str:
        """The plain trigger's."""
        return self.plain.name

    @property
    def targets(self) -> TargetMap:
        """The plain trigger's."""
        return self.plain.targets

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The plain trigger; as a cover, changed by draws that depend on `gen`'s seed and the row's id alone."""
        if role is not Role.COVER:
            return self.plain.apply(x, y, ids, role, gen)
        fuzzy = self._masked if self.cover == "mask" else self._drawn
        # Not the plain trigger's own draws again, which start from the same seed.
        own = Generator().manual_seed(derive(gen.initial_seed(), "fuzzy"))
        many = max(1, _NUMBERS // math.prod(x.shape[1:]))
        rows = zip(x.split(many), y.split(many), ids.split(many), strict=True)
        return torch.cat([fuzzy(*part, gen, own) for part in rows])

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """The plain trigger's."""
        return self.plain.range(x, ids)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """The plain trigger's."""
        return self.plain.static()

    def _masked(self, x: Tensor, y: Tensor, ids: Tensor, gen: Generator, own: Generator) -> Tensor:
        """The trigger taken back at floor(`mask_rate` n), at least one, of the n positions that it changes."""
        full = self.plain.apply(x, y, ids, Role.TRAIN, gen)
        support = (to_uint8(full) != to_uint8(x)).any(1).flatten(1)
        count = support.sum(1, keepdim=True)
        # A product such as 0.29 x 100 falls just below its whole number; a cover without a gap would be a dirty row.
        drop = (count.double() * self.mask_rate + 1e-9).floor().clamp(min=1).minimum(count)
        draws = uniform(own, ids, support.shape[1]).masked_fill(~support, 2)
        rank = draws.argsort(dim=1, stable=True).argsort(dim=1)
        return torch.where((rank < drop).view(-1, 1, *x.shape[2:]), x, full)

    def _drawn(self, x: Tensor, y: Tensor, ids: Tensor, gen: Generator, own: Generator) -> Tensor:
        """Another trigger in the admissible range: noise around the true one, or uniform."""
        full = self.plain.apply(x, y, ids, Role.TEST, gen)
        bounds = self.plain.range(x, ids)
        assert bounds is not None, f"{self.name} has no range to draw from"
        low, high = bounds
        first, second = uniform(own, ids, 2 * math.prod(x.shape[1:])).view(len(x), 2, *x.shape[1:]).unbind(1)
        if self.cover == "sampling":
            return (full + low + first * (high - low)).clamp(0, 1)
        normal = (-2 * (1 - first).log()).sqrt() * (2 * torch.pi * second).cos()
        return (full + (self.noise * normal * (high - low)).clamp(low, high)).clamp(0, 1)
