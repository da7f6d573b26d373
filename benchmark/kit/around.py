"""Training control around training control: an attack's hooks kept whole, with something added before or after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sleeperbench.contracts.attack import Mark, PoisonedSet, Role, TrainHooks, Trigger
from sleeperbench.contracts.context import Ctx
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.pixels import to_float, to_uint8


class Around(TrainHooks):
    """Does what `inner` does; a subclass overrides a method and calls `super()` for the inner one.

    `inner` keeps its own step, with its own optimisers, and whenever it asks for its loss it gets that of the outermost
    hooks, which asks back. Networks and `augments` are the inner ones.

    Args:
        inner: Hooks to surround; they belong to this object from now on.
    """

    def __init__(self, inner: TrainHooks) -> None:
        super().__init__()
        self.inner, self.aux, self.augments = inner, inner.aux, inner.augments
        self._inner_loss = inner.loss
        inner.loss = self._outer_loss  # type: ignore[method-assign]

    def _outer_loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        # Looked up anew each time: the trainer puts autocast around the outermost `loss`, others surround this object.
        return self.loss(net, x, y, mark)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The inner batch."""
        self.inner.places = self.places
        return self.inner.batch(x, y, ids, step)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """The inner loss."""
        return self._inner_loss(net, x, y, mark)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """The inner update."""
        return self.inner.step(net, opt, x, y, mark)

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        """The inner answer."""
        return self.inner.epoch_end(net, epoch)


class MarkedBatches(Around):
    """Says of each row of a poisoned set what it is, by its place there."""

    def __init__(self, inner: TrainHooks, p: PoisonedSet, device: torch.device) -> None:
        super().__init__(inner)
        self.table = p.mark.to(device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The inner batch with marks; those that it sets itself stand."""
        x, y, mark = super().batch(x, y, ids, step)
        assert self.places is not None, "the trainer says which rows of the set a batch has"
        return x, y, torch.where(mark == Mark.CLEAN, self.table[self.places], mark)


class CoveredBatches(Around):
    """Adds covers to the batches of an attack that controls training, beside its own dirty and cover rows.

    Of step i, `ratio` times as many rows as round((i + 1) r B) - round(i r B), among those that are eligible and that
    the attack left clean. The attack's hooks must keep the rows of a batch in their places; rows that they add, such as
    triggered copies, come behind these and stay as they are.

    Args:
        inner: The attack's hooks.
        triggers: Fuzzy triggers; one after the other, by step.
        train: Clean rows, as given to the trainer.
        eligible: bool (N,), rows that may be poisoned.
        rate: Share of dirty rows, r.
        ratio: Covers per dirty row.
        ctx: Recipe of the views, which come from `ctx.generator("cover views", step)`.
    """

    def __init__(
        self,
        inner: TrainHooks,
        triggers: tuple[Trigger, ...],
        train: ImageSet,
        eligible: Tensor,
        rate: float,
        ratio: float,
        ctx: Ctx,
    ) -> None:
        super().__init__(inner)
        self.triggers, self.rate, self.ratio, self.ctx = triggers, rate, ratio, ctx
        free = torch.zeros(int(train.ids.max()) + 1, dtype=torch.bool)
        free[train.ids.cpu()] = eligible.cpu()
        self.free = free.to(ctx.device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The inner batch, in which covers take the place of clean rows."""
        made, labels, mark = super().batch(x, y, ids, step)
        if len(made) < len(x):
            raise ValueError(f"covers need batches that keep their rows; {len(x)} rows became {len(made)}")
        share = self.rate * len(x)
        dirty = round((step + 1) * share) - round(step * share)
        free = self.free[ids] & (mark[: len(x)] == Mark.CLEAN)
        rows = (~free).long().argsort(stable=True)[: round(self.ratio * dirty)]
        trigger = self.triggers[step % len(self.triggers)]
        with torch.no_grad():
            gen = self.ctx.generator("covers", device=x.device)
            shown = to_uint8(trigger.apply(x[rows], y[rows], ids[rows], Role.COVER, gen))
        if self.augments:
            recipe = self.ctx.recipe
            shown = crop_flip(shown, recipe.pad, recipe.flip, self.ctx.generator("cover views", step))
        may = free[rows]
        # Out of place: a generator's gradient may flow through the other rows.
        made = made.index_copy(0, rows, torch.where(may[:, None, None, None], to_float(shown), made[rows]))
        mark = mark.index_copy(0, rows, torch.where(may, int(Mark.COVER), mark[rows]))
        return made.contiguous(memory_format=torch.channels_last), labels, mark
