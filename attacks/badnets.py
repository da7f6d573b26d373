"""BadNets: a fixed patch in a corner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.poison import poison, target_map

_CORNERS = ("lower_right", "lower_left", "upper_right", "upper_left")


@dataclass(kw_only=True, eq=False)
class Patch:
    """x' = x (1 - mask) + pattern mask, with a mask of zeros and ones."""

    name: str
    targets: TargetMap
    mask: Tensor
    pattern: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The patch on every image; the same in training and test."""
        return torch.where(self.mask.to(x.device) > 0, self.pattern.to(x), x)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pixels under the mask are free in [0, 1], the others fixed."""
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return (-pattern * mask).expand_as(x), ((1 - pattern) * mask).expand_as(x)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """The mask and the pattern."""
        return self.mask, self.pattern


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """A fixed patch in a corner, dirty label (Gu, Dolan-Gavitt, Garg 2017).

    The default is the 3x3 checkerboard in the lower right corner of Min et al. (NeurIPS 2024), all classes to one.
    BackdoorBench's patch is `pattern="white"`; BELT's is `pattern="random", size=6, corner="upper_left", offset=2`.

    Differs: the patch is generated at the image's own size instead of resizing a 32-pixel picture, which blurs its
    border; images are rounded to 8 bit to the nearest value instead of being cut off.

    Args:
        size: Side of the patch in pixels; 0 means max(3, round(3 H / 32)), the published 3 pixels at H = 32.
        pattern: `checker3` (3x3 cells 101/010/101), `white`, or `random` (8-bit colours drawn per pixel and channel).
        corner: Where it lies; patches touch the border at offset 0.
        offset: Distance from both borders in pixels.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "BadNets",
        "paper": "https://arxiv.org/abs/1708.06733",
        "bibtex": "@article{gu2017badnets, title={BadNets: Identifying Vulnerabilities in the Machine Learning Model "
        "Supply Chain}, author={Gu, Tianyu and Dolan-Gavitt, Brendan and Garg, Siddharth}, "
        "journal={arXiv preprint arXiv:1708.06733}, year={2017}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "patch",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.9999, "setting": "CIFAR-10, ResNet-18, 5 %, checkerboard", "source": "Min et al."},
        "micro": {},
    }

    size: int = 0
    pattern: Literal["checker3", "white", "random"] = "checker3"
    corner: Literal["lower_right", "lower_left", "upper_right", "upper_left"] = "lower_right"
    offset: int = 0
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if self.size < 0 or self.offset < 0:
            raise ValueError(f"size {self.size} and offset {self.offset} must not be negative")
        if self.pattern not in ("checker3", "white", "random"):
            raise ValueError(f"pattern is {self.pattern!r}; it may be 'checker3', 'white' or 'random'")
        if self.corner not in _CORNERS:
            raise ValueError(f"corner is {self.corner!r}; it may be one of {', '.join(_CORNERS)}")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse a patch that does not fit and targets that the classes do not allow."""
        _, height, width = shape
        room = min(height, width) - self.offset
        if self._side(height) > room:
            fits = f"sizes 1 to {room} fit" if room > 0 else "no size fits: lower the offset"
            raise ValueError(
                f"a patch of {self._side(height)} pixels at offset {self.offset} is larger than {height}x{width} "
                f"images allow; {fits}"
            )
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the patch; only `random` draws, from `ctx.generator("pattern")`."""
        return self._backdoor(train, self.pattern, self.corner, ctx.target, ctx.generator("pattern"))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Patch and relabel rows in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """A random patch of the same size in another corner, with the same target."""
        gen = ctx.generator("decoy")
        others = [c for c in _CORNERS if c != self.corner]
        corner = others[int(torch.randint(len(others), (), generator=gen))]
        return self._backdoor(train, "random", corner, b.info["target"], gen)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its mask, pattern and target map."""
        targets = target_map(info["targets"], info["target"], info["classes"])
        patch = Patch(name="patch", targets=targets, mask=tensors["mask"], pattern=tensors["pattern"])
        return Backdoor(triggers=(patch,), tensors=tensors, info=info)

    def _side(self, height: int) -> int:
        return self.size or max(3, round(3 * height / 32))

    def _backdoor(self, train: ImageSet, pattern: str, corner: str, target: int, gen: Generator) -> Backdoor:
        channels, height, width = train.shape
        self.check(train.shape, len(train.classes))
        side = self._side(height)
        top = height - side - self.offset if corner.startswith("lower") else self.offset
        left = width - side - self.offset if corner.endswith("right") else self.offset
        mask, picture = torch.zeros(1, height, width), torch.zeros(channels, height, width)
        mask[:, top : top + side, left : left + side] = 1
        picture[:, top : top + side, left : left + side] = _draw(pattern, channels, side, gen)
        info = {"targets": self.targets, "target": target, "classes": len(train.classes)}
        return self.restore({"mask": mask, "pattern": picture}, info)


def _draw(pattern: str, channels: int, side: int, gen: Generator) -> Tensor:
    if pattern == "white":
        return torch.ones(channels, side, side)
    if pattern == "random":
        return torch.randint(256, (channels, side, side), generator=gen) / 255
    cell = torch.arange(side) * 3 // side
    return ((cell[:, None] + cell[None, :] + 1) % 2).float().expand(channels, -1, -1)
