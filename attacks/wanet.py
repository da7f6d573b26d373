"""WaNet: a smooth, invisible warp of the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TargetMap, TrainHooks
from sleeperbench.contracts import Ctx
from sleeperbench.contracts.context import derive
from sleeperbench.kit.covers import cover
from sleeperbench.kit.mixed_batches import MixedBatches
from sleeperbench.kit.poison import poison, target_map


@dataclass(kw_only=True, eq=False)
class Warp:
    """x' = x sampled bilinearly at `grid` (H, W, 2): coordinates (x, y), -1 and 1 in the middle of border pixels."""

    name: str
    targets: TargetMap
    grid: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The fixed warp; as a cover, jittered by noise that depends on `gen`'s seed and the row's id alone."""
        if role is not Role.COVER:
            return self.warp(x)
        rows = [Generator().manual_seed(derive(gen.initial_seed(), i)) for i in ids.tolist()]
        return self.warp(x, torch.stack([self.noise(1, g)[0] for g in rows]))

    def warp(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The images under the grid, with `noise` (N, H, W, 2) added to it."""
        grid = self.grid.to(x).expand(len(x), -1, -1, -1)
        if noise is not None:
            grid = (grid + noise.to(x)).clamp(-1, 1)
        return F.grid_sample(x, grid, mode="bilinear", align_corners=True)

    def noise(self, n: int, gen: Generator) -> Tensor:
        """The jitter of noise mode for `n` images: U(-1, 1) / size per pixel and axis, half a pixel at most."""
        height, width, _ = self.grid.shape
        return (torch.rand(n, height, width, 2, generator=gen) * 2 - 1) / torch.tensor([width, height])

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: a warp bounds no pixel."""
        return None

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: what the warp changes depends on the image."""
        return None


@dataclass(frozen=True, kw_only=True)
class WaNet(Attack):
    """A fixed smooth warp, with noise mode mixed into every batch (Nguyen and Tran, ICLR 2021).

    1. P ~ U(-1, 1) of shape (2, k, k), divided by its mean absolute value and upsampled bicubically to the image's
       size, is the field N.
    2. grid = clip(identity + s N / size, -1, 1): a shift by s N (size - 1) / (2 size) pixels, at any image size.
    3. Per batch, `rate` B rows are warped and get the wanted label (dirty; rows of the target class may be among
       them).
    4. `cross_ratio` times as many other rows are warped by clip(grid + U(-1, 1) / size), drawn anew per image and
       pixel, and keep their label (cover), which teaches the model this field and no other distortion.
    5. The mixed batch is cropped and flipped; plain cross-entropy.

    It controls training. `poison` gives the static version (`rate` of the rows dirty, `cross_ratio` times as many
    others cover with one draw each), which stands in for what was trained on.

    Differs: step 5 is the recipe's crop and flip, drawn per image; the authors draw once per batch: crop with padding 5
    at probability 0.8, rotation by up to 10 degrees at 0.5, flip at 0.5. Images are rounded to 8 bit before it. The
    authors take int(rate B) dirty rows; here the counts of all steps so far add up to the rate, within one row. The
    optimiser, schedule and epochs are the suite's, not 1,000 epochs from a learning rate of 0.01.

    Args:
        k: Side of the control grid.
        s: Strength of the warp.
        cross_ratio: Cover rows per dirty row; 0 switches noise mode off.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
    """

    INFO = {
        "title": "WaNet",
        "paper": "https://arxiv.org/abs/2102.10369",
        "bibtex": "@inproceedings{nguyen2021wanet, title={WaNet -- Imperceptible Warping-based Backdoor Attack}, "
        "author={Nguyen, Tuan Anh and Tran, Anh Tuan}, booktitle={International Conference on Learning "
        "Representations}, year={2021}}",
        "kind": "training_control",
        "version": 2,
        "api": 1,
        "family": "warp",
        "clean_label": False,
        "covers": True,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.9955, "setting": "CIFAR-10, 10 %, 1000 epochs", "source": "authors' code"},
        "micro": {},
    }
    SNAPSHOT = "declared"

    k: int = 4
    s: float = 0.5
    cross_ratio: float = 2.0
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k is {self.k}; a control grid has at least 2 points a side")
        if self.s <= 0 or self.cross_ratio < 0:
            raise ValueError(f"s is {self.s} and cross_ratio {self.cross_ratio}; they must be above 0 and at least 0")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse a control grid finer than the image and targets that the classes do not allow."""
        if self.k > min(shape[1:]):
            raise ValueError(f"k is {self.k}; images of {shape[1]}x{shape[2]} allow at most {min(shape[1:])}")
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw the field from `ctx.generator("field")`."""
        return self._backdoor(train, ctx.target, ctx)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The static version; cover rows come from what is left of the eligible, as many as there are."""
        p = poison(train, b, eligible, rate, ctx, include_target=True)
        rows = round(self.cross_ratio * int((p.mark == Mark.DIRTY).sum()))
        return cover(p, train, b, eligible, rows, ctx)

    def hooks(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> TrainHooks | None:
        """Fresh dirty and cover rows per batch; nothing at rate 0."""
        if rate == 0:
            return None
        trigger = b.triggers[0]
        assert isinstance(trigger, Warp)

        def make(x: Tensor, dirty: int, step: int) -> Tensor:
            noise = trigger.noise(len(x), ctx.generator("noise", step))
            noise[:dirty] = 0
            return trigger.warp(x, noise)

        return MixedBatches(make, trigger.targets, train, eligible, rate, self.cross_ratio, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Another field, with the same target."""
        return self._backdoor(train, b.info["target"], ctx)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its field, strength and target map."""
        field = tensors["field"]
        height, width, _ = field.shape
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        grid = torch.stack([x, y], -1) + info["s"] * field / torch.tensor([width, height])
        targets = target_map(info["targets"], info["target"], info["classes"])
        return Backdoor(
            triggers=(Warp(name="warp", targets=targets, grid=grid.clamp(-1, 1)),), tensors=tensors, info=info
        )

    def _backdoor(self, train: ImageSet, target: int, ctx: Ctx) -> Backdoor:
        self.check(train.shape, len(train.classes))
        control = torch.rand(1, 2, self.k, self.k, generator=ctx.generator("field")) * 2 - 1
        control /= control.abs().mean()
        field = F.interpolate(control, size=train.shape[1:], mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        info = {"targets": self.targets, "target": target, "classes": len(train.classes), "s": self.s}
        return self.restore({"field": field.contiguous()}, info)
