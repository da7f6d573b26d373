"""Triggered rows that keep their label, copies beside the clean rows, and backdoors of some classes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sleeperbench.contracts.attack import Backdoor, Mark, PoisonedSet, Role, TargetMap
from sleeperbench.contracts.context import Ctx
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.poison import stamp


def cover(
    p: PoisonedSet, train: ImageSet, backdoor: Backdoor, allowed: Tensor, rows: int, ctx: Ctx, *, which: int = 0
) -> PoisonedSet:
    """`p` with cover rows: `Role.COVER` of one trigger under the true label, in place.

    Draws `rows` rows uniformly among those that are allowed and still clean, or all of these if they are fewer.

    Args:
        p: Poisoned in place: row i comes from row i of `train`.
        train: Clean rows.
        backdoor: Triggers.
        allowed: bool (N,), rows that may be covered.
        rows: How many.
        ctx: Rows come from `ctx.generator("cover rows")`.
        which: Index of the trigger.
    """
    left = allowed.cpu() & (p.mark == Mark.CLEAN)
    order = torch.randperm(len(train), generator=ctx.generator("cover rows"))
    chosen = order[left[order]][:rows]
    images, mark, trigger_id = p.data.images.clone(), p.mark.clone(), p.trigger_id.clone()
    images[chosen] = stamp(train.rows(chosen), backdoor.triggers[which], Role.COVER, ctx).images
    mark[chosen], trigger_id[chosen] = Mark.COVER, which
    return replace(p, data=replace(p.data, images=images), mark=mark, trigger_id=trigger_id)


def append(p: PoisonedSet, train: ImageSet, rows: Tensor | None = None) -> PoisonedSet:
    """`p` with poisoned rows moved behind the clean ones, each slot holding its clean row again.

    Args:
        p: Row i comes from row i of `train`; rows that were appended before stand behind these, and stay.
        train: Clean rows, N.
        rows: bool (N,), which rows move; all that are marked by default.
    """
    n = len(train)
    rows = p.mark[:n] != Mark.CLEAN if rows is None else rows
    back = PoisonedSet.clean(train)
    stay = ~rows

    def joined(clean: Tensor, now: Tensor) -> Tensor:
        kept = clean.clone()
        kept[stay] = now[:n][stay]
        return torch.cat([kept, now[n:], now[:n][rows]])

    data = replace(
        train,
        images=joined(train.images, p.data.images),
        labels=joined(train.labels, p.data.labels),
        ids=joined(train.ids, p.data.ids),
    )
    return PoisonedSet(
        data=data,
        mark=joined(back.mark, p.mark),
        trigger_id=joined(back.trigger_id, p.trigger_id),
        true_labels=joined(back.true_labels, p.true_labels),
        appended=torch.cat([back.appended, torch.ones(len(data) - n, dtype=torch.bool)]),
    )


def of_sources(target: int, sources: Sequence[int]) -> TargetMap:
    """Every image to `target`, of which only those of the source classes count."""
    return TargetMap(
        target=lambda y: torch.full_like(y, target),
        counts=lambda y, ids: torch.isin(y, torch.tensor(list(sources), device=y.device)) & (y != target),
    )


def after(offsets: Sequence[int], target: int, classes: int) -> list[int]:
    """The classes that lie so many places after the target class, counted in a circle.

    Raises:
        ValueError: an offset is the target class itself or beyond the classes, or comes twice.
    """
    if len(set(offsets)) < len(offsets) or not all(0 < o < classes for o in offsets):
        raise ValueError(
            f"classes counted from the target class are {list(offsets)}; each may be 1 to {classes - 1}, and only once"
        )
    return [(target + o) % classes for o in offsets]
