"""Triggers that networks draw for each image: a mask and a pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sleeperbench.contracts.attack import Role, TargetMap
from sleeperbench.kit.generators import Hourglass, seeded
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.rowwise import uniform

_TINY = 1e-7


@dataclass(kw_only=True, eq=False)
class Drawn:
    """x' = x + (G(z) - x) M(z), with z = x; a cover's z is an image of `bank` (K, C, H, W).

    A decoy has G(z) in the negative, and mask and pattern moved around by `shift` pixels.
    """

    name: str
    targets: TargetMap
    pattern: Hourglass
    mask: Hourglass
    bank: Tensor
    negative: bool
    shift: tuple[int, int]

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The image's own trigger; as a cover, that of a stored image drawn from `gen`'s seed and the row's id."""
        z = x
        if role is Role.COVER:
            z = to_float(self.bank.to(x.device)[(uniform(gen, ids, 1)[:, 0] * len(self.bank)).long()])
        mask, pattern = self._made(z)
        return x + (pattern - x) * mask

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What other patterns under the image's own mask could add: M (0 - G) to M (1 - G)."""
        mask, pattern = self._made(x)
        return -pattern * mask, (1 - pattern) * mask

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: every image has its own."""
        return None

    @torch.no_grad()
    def _made(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with evaluating(self.pattern), evaluating(self.mask):
            mask, pattern = threshold(self.mask.to(z.device)(z)), self.pattern.to(z.device)(z)
        pattern = 1 - pattern if self.negative else pattern
        return mask.roll(self.shift, (2, 3)), pattern.roll(self.shift, (2, 3))


def threshold(o: Tensor) -> Tensor:
    """Soft step at 1/2: tanh(20 o - 10) / 2 + 1/2."""
    return (20 * o - 10).tanh() / 2 + 0.5


def diversity(x1: Tensor, x2: Tensor, out1: Tensor, out2: Tensor) -> Tensor:
    """Mean over rows of d(x1, x2) / d(out1, out2), d the root of the mean squared difference: low for unlike outputs.

    Inputs are images of [0, 1]: the same scale on images and patterns would cancel.
    """
    # At a difference of 0 the root has no gradient.
    far = [((a - b).square().flatten(1).mean(1) + 1e-24).sqrt() for a, b in ((x1, x2), (out1, out2))]
    return (far[0] / (far[1] + _TINY)).mean()


def network(channels: int, outputs: int, seed: int, width: int = 32) -> Hourglass:
    """Three stages from `width` channels for colour, two from half as many for grey images.

    With 32 these are the authors' networks for CIFAR-10 and MNIST.
    """
    first, stages = (width, 3) if channels > 1 else (width // 2, 2)
    return seeded(Hourglass, seed, channels, outputs, first, stages)
