"""The one trainer: attacks, clean models, defenses and re-activation probes all go through `fit`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sleeperbench.contracts.attack import Mark, TrainHooks
from sleeperbench.contracts.context import Cost, Ctx, Recipe
from sleeperbench.contracts.models import Model
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.augment import draw_views, look, pad_zero
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.pixels import to_float


@dataclass(frozen=True, kw_only=True)
class FitLog:
    """What a training left behind beside the weights.

    Args:
        losses: Mean training loss of each epoch.
        steps: Updates done.
        dirty: Rows that the hooks marked DIRTY per row drawn.
        models: The model after each epoch, when asked for.
    """

    losses: tuple[float, ...]
    steps: int
    dirty: float
    models: tuple[Model, ...] = ()


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """Learning rate of update `step` (from 0) of `total`.

    Raises:
        ValueError: the schedule is unknown.
    """
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * step / total))
    raise ValueError(f"schedule {recipe.schedule!r} is unknown: use cosine or constant")


def fit(
    net: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    ctx: Ctx,
    *,
    hooks: TrainHooks | None = None,
    steps: int | None = None,
    keep_epochs: bool = False,
    optimiser: Literal["sgd", "adam"] = "sgd",
    statistics: Literal["batch", "running"] = "batch",
) -> FitLog:
    """Train `net` in place and leave it in eval mode.

    Rows are shuffled anew in each epoch, cropped and mirrored in 8 bit (unless the hooks augment), and go to
    `hooks.batch` as float [0, 1]. An epoch drops its last short batch; fewer rows than a batch make one batch of all
    rows. Parameters whose `requires_grad` is False stay as they are. Nothing is evaluated. Order, views and the
    networks' own draws (dropout) derive from `ctx`: two fits under the same ctx see the same ones, so give a second fit
    that shall differ a ctx with another seed. The global random state is left as it was.

    Args:
        net: Classifier of [0, 1] images; moved to `ctx.device` in channels-last layout.
        data: Rows to train on; moved to the device whole.
        recipe: Schedule, batch, precision (`bf16` runs `hooks.loss` under autocast, all else stays fp32).
        ctx: Seed, device, progress; its cost counts images through calls of `net` and back through their outputs.
        hooks: Control over batch, loss, step and the end of an epoch; steps count on over epochs.
        steps: Number of updates, cycling through epochs, in place of `recipe.epochs`; the last epoch may be cut short.
        keep_epochs: Also keep the model after each epoch; `net` must be a `Classifier`.
        optimiser: `sgd`, or `adam` with the recipe's rate, decay and schedule and its own betas in place of momentum.
        statistics: What BatchNorm normalises by: its `batch`, or the `running` statistics, which then stay as they are.

    Returns:
        Losses per epoch and what was kept.

    Raises:
        ValueError: no rows, no steps, no parameter to train, an unknown schedule or precision, or models of each
            epoch asked of what cannot be packed.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    hooks = TrainHooks() if hooks is None else hooks
    weights = [p for p in net.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("no parameter to train: all have requires_grad=False")
    if not len(data) or recipe.batch < 1:
        raise ValueError(f"{len(data)} rows in batches of {recipe.batch}: give at least one row and batches of one")
    if keep_epochs and not isinstance(net, Classifier):
        raise ValueError(f"keep_epochs needs a Classifier, which can be packed, not {type(net).__name__}")
    batch = min(recipe.batch, len(data))
    per_epoch = len(data) // batch
    total = recipe.epochs * per_epoch if steps is None else steps
    if total < 1:
        raise ValueError(f"{total} steps to train for: give at least one epoch or step")
    epochs = math.ceil(total / per_epoch)

    net.to(device=ctx.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pad, flip = (0, False) if hooks.augments else (recipe.pad, recipe.flip)
    images = pad_zero(data.images.to(ctx.device), pad)
    labels, ids = data.labels.to(ctx.device), data.ids.to(ctx.device)
    opt = _optimiser(optimiser, weights, recipe)
    losses: list[float] = []
    models: list[Model] = []
    step, drawn = 0, 0
    dirty = torch.zeros((), dtype=torch.int64, device=ctx.device)
    with _seeded(ctx.derive("net"), ctx.device), _autocast(hooks, recipe.precision, ctx.device):
        for epoch in range(epochs):
            net.train()  # anew in each epoch: `epoch_end` may have looked at the net in eval mode
            if statistics == "running":
                for module in net.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
            order = torch.randperm(len(data), generator=ctx.generator("order", epoch)).to(ctx.device)
            views = draw_views(len(data), pad, flip, ctx.generator("views", epoch), ctx.device)
            now = min(per_epoch, total - step)
            summed = torch.zeros((), device=ctx.device)
            with _counting(net, ctx.cost):
                for part in (slice(i * batch, (i + 1) * batch) for i in range(now)):
                    for group in opt.param_groups:
                        group["lr"] = learning_rate(recipe, step, total)
                    rows = order[part]
                    seen = look(images, rows, views.rows(part), pad)
                    x = to_float(seen.contiguous(memory_format=torch.channels_last))
                    hooks.places = rows
                    x, y, mark = hooks.batch(x, labels[rows], ids[rows], step)
                    dirty += (mark == Mark.DIRTY).sum()
                    drawn += len(rows)
                    summed += hooks.step(net, opt, x, y, mark).detach()
                    step += 1
            losses.append(float(summed) / now)  # the only place where the host waits for the device
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss is {losses[-1]} after epoch {epoch + 1}: lower lr (now {recipe.lr:g})")
            stop = hooks.epoch_end(net, epoch)
            if keep_epochs:
                models.append(pack(cast(Classifier, net)))
            ctx.progress(epoch + 1, epochs, "train")
            if stop:
                break
    # The last update is seen by no loss.
    if not all(torch.stack([w.isfinite().all() for w in weights]).tolist()):
        raise FloatingPointError(f"weights are not finite after epoch {len(losses)}: lower lr (now {recipe.lr:g})")
    net.eval()
    return FitLog(losses=tuple(losses), steps=step, dirty=int(dirty) / drawn, models=tuple(models))


def _optimiser(name: str, weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(
            weights, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
        )
    if name == "adam":
        return torch.optim.Adam(weights, lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True)
    raise ValueError(f"optimiser {name!r} is unknown: use sgd or adam")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random state seeded inside, as it was outside."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for d in cuda:
            with torch.cuda.device(d):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _autocast(hooks: TrainHooks, precision: str, device: torch.device) -> Iterator[None]:
    """`hooks.loss` in the recipe's precision, whoever calls it: backward and update stay outside autocast.

    Around the whole step, autocast would keep its 8-bit-mantissa copies of the weights from before an update and use
    them after it in steps of two passes.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown: use fp32 or bf16")
    if precision == "fp32":
        yield
        return
    own = vars(hooks)
    before = own.get("loss")
    own["loss"] = torch.autocast(device.type, dtype=torch.bfloat16)(hooks.loss)
    try:
        yield
    finally:
        del own["loss"]
        if before is not None:
            own["loss"] = before


@contextmanager
def _counting(net: nn.Module, cost: Cost) -> Iterator[None]:
    """Count images through the net and gradients through its output, also where a hook takes several passes."""

    def forward(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        n = len(out)
        cost.forwards += n
        if out.requires_grad:
            out.register_hook(lambda grad: backward(n))

    def backward(n: int) -> None:
        cost.backwards += n

    handle = net.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()
