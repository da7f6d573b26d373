"""Adaptive-Blend: half of a picture's blocks in training, the whole picture at test, and covers with true labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role
from sleeperbench.attacks.blended import Blended, Overlay
from sleeperbench.contracts import Ctx
from sleeperbench.kit.covers import cover
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.rowwise import uniform


@dataclass(kw_only=True, eq=False)
class Mosaic(Overlay):
    """In training x' = x + alpha K (picture - x), with `kept` of `pieces` blocks per image in K; at test all."""

    pieces: int
    kept: int

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The whole picture at test, else the blocks that the row's id draws."""
        if role is Role.TEST:
            return super().apply(x, y, ids, role, gen)
        return x + self.alpha_train * self.blocks(ids, gen, x.shape[2], x.shape[3]).to(x) * (self.picture.to(x) - x)

    def blocks(self, ids: Tensor, gen: Generator, height: int, width: int) -> Tensor:
        """K, (N, 1, H, W) of zeros and ones: exactly `kept` blocks each, every choice equally likely."""
        side = math.isqrt(self.pieces)
        rank = uniform(gen, ids, self.pieces).argsort(dim=1, stable=True).argsort(dim=1)
        keep = (rank < self.kept).view(-1, 1, side, side)
        rows = torch.arange(height, device=ids.device) * side // height
        cols = torch.arange(width, device=ids.device) * side // width
        return keep[:, :, rows][..., cols]


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(Attack):
    """Blended against latent separation: weak in training, whole at test, with covers (Qi et al., ICLR 2023).

    1. The picture is cut into `pieces` blocks. Each poisoned image gets a random half of them, drawn once, at
       `alpha_train`, and the target label (dirty).
    2. `cover_ratio` times as many other images get blocks in the same way and keep their label (cover).
    3. At test the whole picture lies over the image at `alpha_test`.

    The published rate is 0.3 % dirty and as much cover, on all classes, in place.

    Differs: the cartoon picture is not free to distribute, its stand-in is `shapes` of attack `blended`. The training
    alpha is that of the authors' toolbox for CIFAR-10 (0.15); their first code has 0.2 as its default.

    Args:
        pattern: The picture: `shapes`, or noise, `gauss` or `uniform`.
        alpha_train: Share of the picture inside its blocks, in training.
        alpha_test: Share of the picture at test.
        pieces: Blocks of the whole picture, a square number.
        mask_rate: Share of the blocks that each training image lacks.
        cover_ratio: Cover rows per dirty row.
    """

    INFO = {
        "title": "Adaptive-Blend",
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
        "implant_asr": 0.5,  # ours: with 150 dirty rows its success varies between seeds and stays well below 1
        "micro": {},
    }

    pattern: Literal["shapes", "gauss", "uniform"] = "shapes"
    alpha_train: float = 0.15
    alpha_test: float = 0.2
    pieces: int = 16
    mask_rate: float = 0.5
    cover_ratio: float = 1.0

    def __post_init__(self) -> None:
        Blended(pattern=self.pattern, alpha_train=self.alpha_train, alpha_test=self.alpha_test)
        if self.pieces < 1 or math.isqrt(self.pieces) ** 2 != self.pieces:
            raise ValueError(f"pieces is {self.pieces}; it must be a square number, such as 16")
        if not 0 <= self.mask_rate < 1 or self.cover_ratio < 0:
            raise ValueError(
                f"mask_rate is {self.mask_rate} and cover_ratio {self.cover_ratio}; they must be 0 to below 1, and at "
                "least 0"
            )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse more blocks than pixels."""
        target_map("all_to_one", 0, classes)
        if math.isqrt(self.pieces) > min(shape[1:]):
            raise ValueError(f"pieces is {self.pieces}; {shape[1]}x{shape[2]} images allow {min(shape[1:]) ** 2}")

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw the picture as `Blended` does."""
        return self._backdoor(train, ctx.target, ctx)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Steps 1 and 2, in place; covers come from what is left of the eligible."""
        p = poison(train, b, eligible, rate, ctx, include_target=True)
        rows = round(self.cover_ratio * int((p.mark == Mark.DIRTY).sum()))
        return cover(p, train, b, eligible, rows, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Another picture of the same kind, with the same target."""
        return self._backdoor(train, b.info["target"], ctx)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its picture, alphas, blocks and target."""
        mosaic = Mosaic(
            name="mosaic",
            targets=target_map("all_to_one", info["target"], info["classes"]),
            picture=tensors["picture"],
            alpha_train=info["alpha_train"],
            alpha_test=info["alpha_test"],
            pieces=info["pieces"],
            kept=info["kept"],
        )
        return Backdoor(triggers=(mosaic,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, ctx: Ctx) -> Backdoor:
        self.check(train.shape, len(train.classes))
        info = {
            "target": target,
            "classes": len(train.classes),
            "alpha_train": self.alpha_train,
            "alpha_test": self.alpha_test,
            "pieces": self.pieces,
            "kept": self.pieces - int(self.mask_rate * self.pieces),
        }
        picture = Blended(pattern=self.pattern).prepare(train, ctx).tensors["picture"]
        return self.restore({"picture": picture}, info)
