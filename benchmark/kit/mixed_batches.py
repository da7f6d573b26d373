"""Training control that poisons rows of every batch anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sleeperbench.contracts.attack import Mark, TargetMap, TrainHooks
from sleeperbench.contracts.context import Ctx
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.poison import rows_at

Make = Callable[[Tensor, int, int], Tensor]
"""(images (n, C, H, W), dirty, step) -> images: the first `dirty` with the trigger, the others as covers."""


class MixedBatches(TrainHooks):
    """Dirty and cover rows made in every batch, rounded to 8 bit, then cropped and mirrored with the others.

    Of step i round((i + 1) r B) - round(i r B) rows are dirty and `cover_ratio` times as many cover, which adds up to
    the rate r, also where r B is below 1. Rows that may not be poisoned are left alone; where a batch holds too few
    that may, dirty rows come first.

    Args:
        make: Makes the poisoned rows of a batch.
        targets: Which label dirty rows get.
        train: Clean rows, as given to the trainer.
        eligible: bool (N,), rows that may be poisoned.
        rate: Share of dirty rows, r.
        cover_ratio: Cover rows per dirty row.
        ctx: Recipe of the views, which come from `ctx.generator("views", step)`.

    Raises:
        ValueError: `rate` is outside 0..1, or less than a row of all although it is positive.
    """

    def __init__(
        self,
        make: Make,
        targets: TargetMap,
        train: ImageSet,
        eligible: Tensor,
        rate: float,
        cover_ratio: float,
        ctx: Ctx,
    ) -> None:
        super().__init__()
        rows_at(rate, len(train))
        self.augments = True
        self.make, self.targets, self.rate, self.cover_ratio, self.ctx = make, targets, rate, cover_ratio, ctx
        free = torch.zeros(int(train.ids.max()) + 1, dtype=torch.bool)
        free[train.ids.cpu()] = eligible.cpu()
        self.free = free.to(ctx.device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed batch."""
        share = self.rate * len(x)
        dirty = round((step + 1) * share) - round(step * share)
        free = self.free[ids]
        # Fixed numbers of rows, eligible ones first: counting those of a batch would wait for the device.
        rows = (~free).long().argsort(stable=True)[: dirty + round(self.cover_ratio * dirty)]
        kind = torch.full_like(rows, Mark.COVER)
        kind[:dirty] = Mark.DIRTY

        mark, pixels = torch.zeros_like(y), to_uint8(x)
        mark[rows] = torch.where(free[rows], kind, 0)
        made = to_uint8(self.make(x[rows], min(dirty, len(rows)), step))
        pixels[rows] = torch.where(free[rows][:, None, None, None], made, pixels[rows])
        y = torch.where(mark == Mark.DIRTY, self.targets.target(y), y)
        recipe = self.ctx.recipe
        pixels = crop_flip(pixels, recipe.pad, recipe.flip, self.ctx.generator("views", step))
        return to_float(pixels.contiguous(memory_format=torch.channels_last)), y, mark
