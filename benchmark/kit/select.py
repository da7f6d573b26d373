"""Honest selection: a setting is chosen on the defender's clean rows alone, by one rule for every method.

The rule takes the setting that removes most among those whose accuracy drop is at most 2 points at the one-sided 90 %
bound. A pruning defense with thresholds, most aggressive first (what `kit.candidates.prune_most` does, step by step):

    thresholds = (0.9, 0.8, 0.7)

    def pruned(rows):                       # learns masks on `rows`, gives one model per threshold
        masks = learn_masks(case.net, rows)
        return ((t, prune(case.net, masks, t)) for t in thresholds)

    after = held_out(case.clean, pruned, ctx=case.ctx)
    best = choose(thresholds, after.__getitem__, right(case.net, case.clean, ctx=case.ctx))

`best` is None when no threshold is accepted: the defense then leaves the model as it is. Otherwise it is applied to
masks learnt on all clean rows. A method whose candidates need no rows (they are computed from the weights) tests them
on all clean rows, and only as many as it takes:

    best = choose(thresholds, lambda t: right(prune(case.net, t), case.clean, ctx=case.ctx), before)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import TypeVar

import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.predict import predict

Setting = TypeVar("Setting")


def drop_bound(before: Tensor, after: Tensor, level: float) -> float:
    """Upper one-sided bound of the accuracy drop, from answers of two models on the same rows.

    With b rows lost (right before, wrong after), c rows gained and n rows in all, the drop is (b - c) / n. The bound
    counts one lost row more, as Clopper and Pearson's bound does, and adds the normal quantile z of `level` times the
    standard error of a paired difference: ((b' - c) + z sqrt(b' + c - (b' - c)^2 / n)) / n with b' = b + 1. Rows on
    which both models agree count in n alone, which is what makes paired rows sharper than two separate accuracies.

    Why not the usual ones: without the further row (Wald) a model that lost nothing on ten rows would be certified;
    Agresti and Min's half rows and Tango's score accept a true drop of 2 points in up to 20 % and 13 % of samples of
    100 to 150 rows where 10 % is meant. This bound accepts it in at most 10.4 % (exact sums over n = 72..2500 rows,
    0 to 6 % of rows gained), often in less. Without any change it needs 114 rows to certify 2 points at 90 %, as does
    the exact binomial bound: fewer rows cannot tell.

    Args:
        before: bool (n,), the first model is right on the row.
        after: bool (n,), the second is.
        level: Confidence, 0.5..1.

    Raises:
        ValueError: no rows, or not the same rows.
    """
    if before.shape != after.shape or before.dim() != 1 or not len(before):
        raise ValueError(f"answers must be on the same rows, not {tuple(before.shape)} and {tuple(after.shape)}")
    n = len(before)
    lost, gained = int((before & ~after).sum()) + 1, int((~before & after).sum())
    spread = max(lost + gained - (lost - gained) ** 2 / n, 0.0)
    return (lost - gained + NormalDist().inv_cdf(level) * math.sqrt(spread)) / n


def accepts(before: Tensor, after: Tensor, drop: float = 0.02, level: float = 0.90) -> bool:
    """Whether the accuracy drop is at most `drop` (a share, not points) at the one-sided bound of `level`."""
    return drop_bound(before, after, level) <= drop


def choose(
    settings: Sequence[Setting],
    after: Callable[[Setting], Tensor],
    before: Tensor,
    drop: float = 0.02,
    level: float = 0.90,
) -> Setting | None:
    """The first setting that is accepted.

    The bound holds for each setting alone. A path of many, each at the edge, is accepted somewhere more often than
    that; nested settings (thresholds of one ranking) share their lost rows and add little.

    Args:
        settings: Most aggressive first.
        after: Per setting, bool (n,) of the rows on which its model is right. Called until one is accepted.
        before: bool (n,), the rows on which the untouched model is right.
        drop: Largest accuracy drop, a share.
        level: Confidence of the one-sided bound.

    Returns:
        A setting, or None when none is accepted: leaving the model as it is, is a legal result.
    """
    return next((s for s in settings if accepts(before, after(s), drop, level)), None)


def right(net: nn.Module, data: ImageSet, *, ctx: Ctx) -> Tensor:
    """The rows of `data` on which `net` gives the label: bool (n,), on the CPU."""
    return predict(net, data.images, ctx=ctx).argmax(1).cpu() == data.labels.cpu()


def folds(labels: Tensor, k: int, seed: int) -> list[Tensor]:
    """Rows dealt to `k` folds at random, each class evenly.

    Returns:
        k int64 tensors of rows, each row in one of them; folds differ by at most one row, in all and in each class.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    dealt = shuffled[labels.cpu()[shuffled].argsort(stable=True)]  # class after class, at random within
    return [dealt[i::k] for i in range(k)]


def held_out(
    data: ImageSet,
    candidates: Callable[[ImageSet], Iterable[tuple[Setting, nn.Module | None]]],
    *,
    ctx: Ctx,
    k: int = 5,
) -> dict[Setting, Tensor]:
    """Cross-validation: each row answered by models made without it.

    Args:
        data: The defender's clean rows.
        candidates: Models for every setting, made from the rows it is given; None stands for the model just before,
            where a setting changes nothing. From a generator that keeps none, one at a time is held.
        ctx: Seed of the folds, and costs.
        k: Number of folds, at least 2.

    Returns:
        Per setting, bool (n,) in the order of `data`: its model is right on the row. For `choose`.

    Raises:
        ValueError: fewer than two folds, which would leave no rows to make models from.
    """
    if k < 2:
        raise ValueError(f"k is {k}; at least 2 folds are needed")
    found: dict[Setting, Tensor] = {}
    for rows in folds(data.labels, k, ctx.derive("folds")):
        rest = torch.ones(len(data), dtype=torch.bool)
        rest[rows] = False
        left, hit = data.rows(rows), torch.zeros(len(rows), dtype=torch.bool)
        for setting, net in candidates(data.rows(rest)):
            if net is not None:
                hit = right(net, left, ctx=ctx)
            found.setdefault(setting, torch.zeros(len(data), dtype=torch.bool))[rows] = hit
            del net  # before the next is made
    return found
