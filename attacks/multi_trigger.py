"""Several patches in one model, each with a target of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet, TargetMap
from sleeperbench.attacks.badnets import Patch
from sleeperbench.contracts import Ctx
from sleeperbench.kit.patches import checkers, lay, noise, scaled
from sleeperbench.kit.poison import poison, target_map

_PLACES = ("upper_right", "lower_left", "upper_left", "lower_right")
_DECOYS = ("upper_middle", "lower_middle", "middle_left", "middle_right")
# Light and dark fields per trigger. A mirrored board swaps its fields, so no pair is another one swapped, in colour.
_COLOURS = (
    ((1, 1, 0), (0, 0, 1)),
    ((0, 1, 1), (1, 0, 0)),
    ((1, 0, 1), (0, 1, 0)),
    ((1, 1, 1), (0, 0, 0)),
)
_GREYS = (((1,), (0,)), ((0,), (1,)), ((1,), (128 / 255,)), ((128 / 255,), (0,)))


@dataclass(frozen=True, kw_only=True)
class MultiTrigger(Attack):
    """Two or four patches with different targets, dirty label (Gong et al., JSAC 2021, as set up in IsTr).

    1. Checkerboards of 4x4 fields lie one pixel from the border: upper right and lower left, then upper left and lower
       right.
    2. Trigger j sends every class to class (target + `step` j) mod classes. IsTr's dual setting on MNIST, upper right
       to 8 and lower left to 1, is target 8 and step 3.
    3. The triggers share the poisoned rows evenly; each row carries one.

    Differs: it is IsTr's multi-trigger attack; Gong et al. also optimise their patches against chosen neurons and paste
    them at several places. IsTr prints neither sizes nor rates: boards of 4 pixels at 28 and 32, growing with the
    image. Boards differ by colour (on grey images by their two levels), because mirroring moves one corner's board into
    the other corner; `coloured=False` makes all of them white and black.

    Args:
        triggers: How many.
        step: Distance between targets; 0 gives all triggers the same target.
        coloured: Boards that also differ by colour, not only by place.
        include_target: Draw poisoned rows from all classes, the target class too.
    """

    INFO = {
        "title": "Multi-trigger",
        "paper": "https://doi.org/10.1109/JSAC.2021.3087237",
        "bibtex": "@article{gong2021defense, title={Defense-Resistant Backdoor Attacks Against Deep Neural Networks in "
        "Outsourced Cloud Environment}, author={Gong, Xueluan and Chen, Yanjiao and Wang, Qian and Huang, Huayang and "
        "Meng, Lingshuo and Shen, Chao and Zhang, Qian}, journal={IEEE Journal on Selected Areas in Communications}, "
        "volume={39}, number={8}, pages={2617--2631}, year={2021}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "patch",
        "clean_label": False,
        "implant_asr": 0.85,  # IsTr prints a mean of 89.06 % over its two triggers on MNIST
        "published_asr": {"value": 0.8906, "setting": "MNIST, mean of two triggers", "source": "IsTr"},
        "micro": {},
    }

    triggers: Literal[2, 4] = 2
    step: int = 3
    coloured: bool = True
    include_target: bool = True

    def __post_init__(self) -> None:
        if self.triggers not in (2, 4):
            raise ValueError(f"triggers is {self.triggers}; it may be 2 or 4")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse a step that gives two triggers the same target, and images in which the boards would meet."""
        target_map("all_to_one", 0, classes)
        if self.step and not _distinct(self.step, self.triggers, classes):
            fine = [s for s in range(1, classes) if _distinct(s, self.triggers, classes)]
            fits = f"steps {', '.join(map(str, fine[:5]))} fit" if fine else "only step 0 (one shared target) fits"
            raise ValueError(
                f"step {self.step} gives some of {self.triggers} triggers the same one of {classes} targets; {fits}"
            )
        if min(shape[1:]) < 12:
            raise ValueError(f"the boards would meet in {shape[1]}x{shape[2]} images; 12 pixels or more fit")
        side = scaled(4, shape[1], 3)
        for place in (*_PLACES, *_DECOYS):
            _laid(shape, torch.zeros(shape[0], side, side), place)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the boards; nothing is drawn."""
        self.check(train.shape, len(train.classes))
        channels, side = train.shape[0], scaled(4, train.shape[1], 3)
        palette: Sequence[Any] = (_COLOURS[3],) * 4 if not self.coloured else _COLOURS if channels == 3 else _GREYS
        boards = []
        for pair in palette[: self.triggers]:
            light, dark = (torch.tensor(c, dtype=torch.float32)[:channels].expand(channels) for c in pair)
            boards.append(checkers(side, 4, light, dark))
        classes = len(train.classes)
        targets = [(ctx.target + self.step * j) % classes for j in range(self.triggers)]
        return _backdoor(train, boards, _PLACES, targets)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Patch and relabel rows in place, an equal share per trigger."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Squares of random colours in the middle of the four sides, with the same targets."""
        gen = ctx.generator("decoy")
        channels, side = train.shape[0], scaled(4, train.shape[1], 3)
        squares = [noise(channels, side, gen) for _ in b.triggers]
        return _backdoor(train, squares, _DECOYS, b.info["targets"])

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from masks, patterns and targets."""
        patches = tuple(
            Patch(name=place, targets=TargetMap.all_to_one(target), mask=mask, pattern=pattern)
            for place, target, mask, pattern in zip(
                info["places"], info["targets"], tensors["masks"], tensors["patterns"], strict=True
            )
        )
        return Backdoor(triggers=patches, tensors=tensors, info=info)


def _distinct(step: int, triggers: int, classes: int) -> bool:
    return len({step * j % classes for j in range(triggers)}) == triggers


def _backdoor(train: ImageSet, squares: list[Tensor], places: Sequence[str], targets: list[int]) -> Backdoor:
    """Each square at its place, one pixel from the border."""
    laid = [_laid(train.shape, square, place) for square, place in zip(squares, places, strict=False)]
    masks, patterns = (torch.stack(parts) for parts in zip(*laid, strict=True))
    info = {"places": list(places[: len(squares)]), "targets": targets}
    return MultiTrigger.restore({"masks": masks, "patterns": patterns}, info)


def _laid(shape: tuple[int, int, int], square: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """Mask (1, H, W) and pattern (C, H, W) of a square (C, s, s) at its place, one pixel from the border."""
    rows, cols = shape[1] - square.shape[1], shape[2] - square.shape[2]
    vertical, horizontal = place.split("_")
    top = {"upper": 1, "lower": rows - 1, "middle": rows // 2}[vertical]
    left = {"left": 1, "right": cols - 1, "middle": cols // 2}[horizontal]
    return lay(shape, top, left, square)
