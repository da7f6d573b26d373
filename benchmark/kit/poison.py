"""Putting triggers on images: which rows, which labels, and always rounded to 8 bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sleeperbench.contracts.attack import Backdoor, Mark, PoisonedSet, Role, TargetMap, Trigger
from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.evaluator import Rendered
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.pixels import to_float, to_uint8

_BATCH = 100
"""Images per call of a trigger: 1000 take twice the time on a CPU, whose caches they leave."""


def target_map(kind: str, target: int, classes: int) -> TargetMap:
    """The map named `all_to_one` (every class to `target`) or `all_to_all` (y to (y + 1) mod `classes`).

    Raises:
        ValueError: unknown name, fewer than two classes, or `target` is no class.
    """
    if classes < 2:
        raise ValueError(f"a backdoor needs at least two classes, not {classes}")
    if kind == "all_to_all":
        return TargetMap.all_to_all(classes)
    if kind != "all_to_one":
        raise ValueError(f"targets is {kind!r}; it may be 'all_to_one' or 'all_to_all'")
    if not 0 <= target < classes:
        raise ValueError(f"target class {target} is not among the classes 0..{classes - 1}")
    return TargetMap.all_to_one(target)


def stamp(data: ImageSet, trigger: Trigger, role: Role, ctx: Ctx) -> ImageSet:
    """`data` with `trigger` on every row, rounded to 8 bit; labels are untouched.

    It runs where `data.images` lie: on the CPU the pixels are equal whatever the device of the task.
    """
    gen = ctx.generator("trigger", trigger.name, role, device=data.images.device)
    parts = []
    for start in range(0, len(data), _BATCH):
        part = slice(start, start + _BATCH)
        x = to_float(data.images[part])
        parts.append(to_uint8(trigger.apply(x, data.labels[part], data.ids[part], role, gen)))
    return replace(data, images=torch.cat(parts)) if parts else data


def rows_at(rate: float, n: int) -> int:
    """How many of `n` rows a poison rate is: round(rate n), 0 for a rate of 0.

    Raises:
        ValueError: `rate` is outside 0..1, or rounds to no row although it is positive: nothing would be poisoned.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"poison rate {rate} is outside 0..1")
    wanted = round(rate * n)
    if rate > 0 and wanted == 0:
        raise ValueError(f"poison rate {rate} of {n} rows is no row at all; one row is a rate of {1 / n:.2g}")
    return wanted


def poison(
    train: ImageSet, backdoor: Backdoor, eligible: Tensor, rate: float, ctx: Ctx, *, include_target: bool
) -> PoisonedSet:
    """Dirty-label poisoning that replaces rows in place.

    Draws round(rate * len(train)) rows uniformly among the eligible, or all of these if they are fewer, puts the
    training trigger on them and gives them the wanted label. Several triggers share the rows evenly. The rate is a
    share of all rows; `PoisonedSet.rate` says which one was possible. Rows keep their slots and ids.

    Args:
        train: Clean rows.
        backdoor: Triggers with their target maps.
        eligible: bool (N,), rows that may be poisoned.
        rate: Share of all rows, 0..1; 0 leaves the set clean.
        ctx: Rows come from `ctx.generator("rows")`.
        include_target: Whether rows that already have the wanted label may be drawn: they get the trigger and keep
            their label.

    Raises:
        ValueError: `rate` is outside 0..1, rounds to no row although it is positive, no row may be poisoned, or one of
            several triggers gets none.
    """
    n = len(train)
    wanted_rows = rows_at(rate, n)
    if wanted_rows == 0 or not backdoor.triggers:
        return PoisonedSet.clean(train)

    order = torch.randperm(n, generator=ctx.generator("rows"))
    free = eligible.cpu().clone()
    images, labels = train.images.clone(), train.labels.clone()
    clean = PoisonedSet.clean(train)
    for i, trigger in enumerate(backdoor.triggers):
        # Shares differ by one row at most and add up to the whole.
        share = wanted_rows * (i + 1) // len(backdoor.triggers) - wanted_rows * i // len(backdoor.triggers)
        wanted = trigger.targets.target(train.labels)
        allowed = free if include_target else free & (wanted != train.labels).cpu()
        chosen = order[allowed[order]][:share]
        free[chosen] = False
        images[chosen] = stamp(train.rows(chosen), trigger, Role.TRAIN, ctx).images
        labels[chosen] = wanted[chosen]
        clean.mark[chosen] = Mark.DIRTY
        clean.trigger_id[chosen] = i
    if not bool((clean.mark == Mark.DIRTY).any()):
        raise ValueError(f"poison rate {rate}: no row may be poisoned ({int(eligible.sum())} of {n} are eligible)")
    idle = [t.name for i, t in enumerate(backdoor.triggers) if not bool((clean.trigger_id == i).any())]
    if idle:
        raise ValueError(
            f"poison rate {rate} of {n} rows ({int(eligible.sum())} eligible) leaves no row for {', '.join(idle)}; "
            f"each of {len(backdoor.triggers)} triggers needs one: raise the rate, or take more rows"
        )
    return replace(clean, data=replace(train, images=images, labels=labels))


def poison_target_class(
    train: ImageSet, backdoor: Backdoor, target: int, eligible: Tensor, rate: float, ctx: Ctx
) -> PoisonedSet:
    """Clean-label poisoning in place: rows of class `target` get the training trigger and keep their label.

    As `poison`, with the rate a share of all rows, and all eligible rows of the class where these are fewer.

    Raises:
        NotApplicable: no row of the class may be poisoned.
        ValueError: as `poison`.
    """
    own = eligible.cpu() & (train.labels == target).cpu()
    if rows_at(rate, len(train)) and not bool(own.any()):
        raise NotApplicable(f"few_target_rows: class {target} has no training row that may be poisoned")
    return poison(train, backdoor, own, rate, ctx, include_target=True)


def render(data: ImageSet, backdoor: Backdoor, role: Role, ctx: Ctx) -> Rendered | None:
    """The rows of `data` that count, triggered and rounded to 8 bit; all triggers one after the other.

    `Role.TEST` gives what success is measured on, `Role.TRAIN` what an attacker would insert into training data,
    `Role.COVER` what it would insert under the true label.

    Returns:
        None for a backdoor without triggers.

    Raises:
        ValueError: no row counts for one of the triggers.
    """
    picked = [t.targets.counts(data.labels, data.ids) for t in backdoor.triggers]
    for i, (trigger, rows) in enumerate(zip(backdoor.triggers, picked, strict=True)):
        if not bool(rows.any()):
            raise ValueError(f"no row of {data.name}/{data.split} counts for trigger {i} ({trigger.name})")
    return _render(data, backdoor, picked, role, ctx)


def render_leak(data: ImageSet, backdoor: Backdoor, ctx: Ctx) -> Rendered | None:
    """The rows that do not count though the attacker's label is not theirs, with the test trigger.

    These are the other classes of a source-specific backdoor, which should keep their label.

    Returns:
        None where every such row counts.
    """
    picked = [
        ~t.targets.counts(data.labels, data.ids) & (t.targets.target(data.labels) != data.labels)
        for t in backdoor.triggers
    ]
    return _render(data, backdoor, picked, Role.TEST, ctx)


def _render(data: ImageSet, backdoor: Backdoor, picked: list[Tensor], role: Role, ctx: Ctx) -> Rendered | None:
    """The picked rows (bool (N,) per trigger), triggered; None when there are none."""
    clean, triggered, wanted, which = [], [], [], []
    for i, (trigger, chosen) in enumerate(zip(backdoor.triggers, picked, strict=True)):
        rows = data.rows(chosen)
        if not len(rows):
            continue
        clean.append(rows)
        triggered.append(stamp(rows, trigger, role, ctx))
        wanted.append(trigger.targets.target(rows.labels))
        which.append(torch.full((len(rows),), i))
    if not clean:
        return None
    return Rendered(data=_join(triggered), clean=_join(clean), targets=torch.cat(wanted), trigger_id=torch.cat(which))


def _join(parts: list[ImageSet]) -> ImageSet:
    return replace(
        parts[0],
        images=torch.cat([p.images for p in parts]),
        labels=torch.cat([p.labels for p in parts]),
        ids=torch.cat([p.ids for p in parts]),
    )
