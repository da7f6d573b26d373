"""Adaptive-Patch: one of four faint marks per training image, two of them in full at test, and covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.covers import cover
from sleeperbench.kit.patches import checkers, lay, noise, scaled
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.rowwise import uniform

_OPACITY = (0.5, 0.2, 0.5, 0.3)
"""In training: of the corner mark, the disc, the four corner boards and the square."""


@dataclass(kw_only=True, eq=False)
class Marks:
    """One of several marks in training, x' = x + opacity mask (pattern - x); at test one fixed mask and pattern.

    Args:
        masks: (K, 1, H, W), opacity of each training mark.
        patterns: (K, C, H, W).
        test_mask: (1, H, W) of zeros and ones.
        test_pattern: (C, H, W).
    """

    name: str
    targets: TargetMap
    masks: Tensor
    patterns: Tensor
    test_mask: Tensor
    test_pattern: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The test pair, or the mark that the row's id draws, all equally likely."""
        if role is Role.TEST:
            return torch.where(self.test_mask.to(x.device) > 0, self.test_pattern.to(x), x)
        which = (uniform(gen, ids, 1)[:, 0] * len(self.masks)).long()
        mask, pattern = self.masks.to(x)[which], self.patterns.to(x)[which]
        return x + mask * (pattern - x)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pixels under the test pair are free in [0, 1], the others fixed."""
        mask, pattern = self.test_mask.to(x), self.test_pattern.to(x)
        return (-pattern * mask).expand_as(x), ((1 - pattern) * mask).expand_as(x)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """The test pair."""
        return self.test_mask, self.test_pattern


@dataclass(frozen=True, kw_only=True)
class AdaptivePatch(Attack):
    """Several faint marks against latent separation, with covers (Qi et al., ICLR 2023).

    1. Each poisoned image gets one of four marks and the target label (dirty): a 5x5 mark in the lower right corner
       (opacity 0.5), a disc of 13 pixels (0.2), 3x3 boards in all four corners (0.5), an 8x8 square (0.3).
    2. `cover_ratio` times as many other images get one of them likewise and keep their label (cover).
    3. At test two marks lie on the image in full: `corners`, the 5x5 mark in both lower corners under the four boards
       (the authors' pair for CIFAR-10), or `disc`, the disc and the square (theirs for GTSRB).

    The published rate is 0.3 % dirty and 0.6 % cover, on all classes, in place.

    Differs: the authors' marks are pictures of logos; here squares of random 8-bit colours and a disc in two random
    colours of the same sizes, places and opacities, scaled with the image. Marks are drawn per row, so their quarters
    are equal in expectation; the authors cut the rows into four equal parts.

    Args:
        test: Which two marks are used at test.
        cover_ratio: Cover rows per dirty row.
    """

    INFO = {
        "title": "Adaptive-Patch",
        "paper": "https://openreview.net/forum?id=_wSHsgrVali",
        "bibtex": "@inproceedings{qi2023revisiting, title={Revisiting the Assumption of Latent Separability for "
        "Backdoor Defenses}, author={Qi, Xiangyu and Xie, Tinghao and Li, Yiming and Mahloujifar, Saeed and Mittal, "
        "Prateek}, booktitle={International Conference on Learning Representations}, year={2023}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "adaptive",
        "clean_label": False,
        "covers": True,
        "implant_asr": 0.5,  # ours, as for Adaptive-Blend: 150 dirty rows, four marks, none of them whole in training
        "micro": {},
    }

    test: Literal["corners", "disc"] = "corners"
    cover_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.test not in ("corners", "disc"):
            raise ValueError(f"test is {self.test!r}; it may be 'corners' or 'disc'")
        if self.cover_ratio < 0:
            raise ValueError(f"cover_ratio is {self.cover_ratio}; it must not be negative")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images on which the marks would run into each other."""
        target_map("all_to_one", 0, classes)
        if shape[1] != shape[2] or shape[1] < 12:
            raise ValueError(f"the marks need square images of at least 12 pixels, not {shape[1]}x{shape[2]}")

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw the marks from `ctx.generator("marks")`."""
        return self._backdoor(train, ctx.target, ctx.generator("marks"), upside_down=False)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Steps 1 and 2, in place; covers come from what is left of the eligible."""
        p = poison(train, b, eligible, rate, ctx, include_target=True)
        rows = round(self.cover_ratio * int((p.mark == Mark.DIRTY).sum()))
        return cover(p, train, b, eligible, rows, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Marks of other colours, upside down and with inverted boards, with the same target."""
        return self._backdoor(train, b.info["target"], ctx.generator("decoy"), upside_down=True)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its marks and target."""
        targets = target_map("all_to_one", info["target"], info["classes"])
        return Backdoor(triggers=(Marks(name="marks", targets=targets, **tensors),), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, gen: Generator, *, upside_down: bool) -> Backdoor:
        self.check(train.shape, len(train.classes))
        drawn = [torch.flip(t, (-2,)) if upside_down else t for t in _draw(train.shape, gen, inverted=upside_down)]
        masks, patterns = drawn
        second = masks[0].flip(-1)  # the corner mark's other place
        if self.test == "corners":
            layers = [(masks[0], patterns[0]), (second, patterns[0].flip(-1)), (masks[2], patterns[2])]
        else:
            layers = [(masks[1], patterns[1]), (masks[3], patterns[3])]
        test_mask, test_pattern = torch.zeros_like(masks[0]), torch.zeros_like(patterns[0])
        for mask, pattern in layers:
            test_mask = torch.maximum(test_mask, mask)
            test_pattern = torch.where(mask > 0, pattern, test_pattern)
        tensors = {
            "masks": masks * torch.tensor(_OPACITY).view(-1, 1, 1, 1),
            "patterns": patterns,
            "test_mask": test_mask,
            "test_pattern": test_pattern,
        }
        return self.restore(tensors, {"target": target, "classes": len(train.classes)})


def _draw(shape: tuple[int, int, int], gen: Generator, *, inverted: bool) -> tuple[Tensor, Tensor]:
    """Masks (4, 1, H, W) of zeros and ones and patterns (4, C, H, W): corner mark, disc, corner boards, square."""
    channels, height, _ = shape
    small, side, board = scaled(5, height, 3), scaled(13, height), scaled(3, height, 2)
    corner = lay(shape, height - small, height - small, noise(channels, small, gen))

    middle = torch.arange(side) - (side - 1) / 2
    inside = torch.hypot(middle[:, None], middle[None, :]) <= side / 2
    outer, inner = (torch.randint(256, (channels, 1, 1), generator=gen) / 255 for _ in range(2))
    centre = torch.hypot(middle[:, None], middle[None, :]) <= side / 4
    mask, picture = lay(shape, scaled(1, height), height - 1 - side, torch.where(centre, inner, outer))
    shown = lay(shape, scaled(1, height), height - 1 - side, inside.float().expand(channels, -1, -1))[1][:1]
    disc = (mask * shown, picture * shown)

    white, black = torch.ones(channels), torch.zeros(channels)
    fields = checkers(board, 3, black, white) if inverted else checkers(board, 3, white, black)
    ends = (0, height - board)
    laid = [lay(shape, top, left, fields) for top in ends for left in ends]
    boards = (sum((m for m, _ in laid), torch.zeros_like(mask)), sum((p for _, p in laid), torch.zeros_like(picture)))

    square = lay(shape, scaled(21, height), scaled(21, height), noise(channels, scaled(8, height, 3), gen))
    masks, patterns = zip(corner, disc, boards, square, strict=True)
    return torch.stack(masks), torch.stack(patterns)
