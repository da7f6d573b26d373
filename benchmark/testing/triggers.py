"""Checks of attacks: what the trigger does to images, which labels it asks for, how it is stored, its placebo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sleeperbench.contracts.attack import Role
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.poison import stamp
from sleeperbench.testing.base import Failed, Skipped, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.hooked import hooked, restored
from sleeperbench.testing.stage import BASE, stage
from sleeperbench.testing.subject import Made, Subject

EPS = 1e-5
"""Room for float32 arithmetic that depends on the batch's size."""


def _triggers(s: Subject) -> tuple[Any, ...]:
    made: Made = s.answer()
    if not made.backdoor.triggers:
        raise Skipped("it has no trigger")
    return made.backdoor.triggers


def _apply(trigger: Any, x: Tensor, rows: Tensor, role: Role, gen: torch.Generator | None = None) -> Tensor:
    test = stage(BASE).micro.test
    gen = gen or torch.Generator().manual_seed(5)
    out: Tensor = trigger.apply(x.clone(), test.labels[rows], test.ids[rows], role, gen)
    return out


def _test() -> tuple[Tensor, Tensor]:
    images = stage(BASE).micro.test.images
    return to_float(images), torch.arange(len(images))


def _each(s: Subject) -> Iterator[tuple[Any, Role, str]]:
    for trigger in _triggers(s):
        for role in Role:
            yield trigger, role, f"trigger {trigger.name}, role {role}"


@check(
    "trigger_pixels",
    "attack",
    what="Triggered images are float32 in [0, 1], and the trigger is still there after rounding to 8 bit.",
    remedy="Clamp to [0, 1] at the end of `apply`; give the trigger a strength of more than half a level (1 / 510).",
)
def trigger_pixels(s: Subject) -> None:
    """Apply to ordinary, black and white images."""
    x, rows = _test()
    for trigger, role, at in _each(s):
        given = {"micro": x, "black": torch.zeros_like(x), "white": torch.ones_like(x)}
        shown = {name: _apply(trigger, images, rows, role) for name, images in given.items()}
        for name, out in shown.items():
            low, high = float(out.min()), float(out.max())
            hold(low >= -EPS and high <= 1 + EPS, f"{at}: pixels of {name} images run from {low:g} to {high:g}")
        changed = (to_uint8(shown["micro"]) != to_uint8(x)).flatten(1).any(1)
        hold(2 * int(changed.sum()) >= len(x), f"{at}: after rounding {int(changed.sum())} of {len(x)} images differ")


@check(
    "trigger_rows",
    "attack",
    what="Row i of `apply` depends on row i alone, not on the batch's size, order or other rows.",
    remedy="Make what varies between images from `ids` (or the image) and `gen.initial_seed()`, not from draws or "
    "statistics over the batch.",
)
def trigger_rows(s: Subject) -> None:
    """Apply to the whole, in reverse, and in parts."""
    x, rows = _test()
    for trigger, role, at in _each(s):
        whole = _apply(trigger, x, rows, role)
        back = _apply(trigger, x.flip(0), rows.flip(0), role).flip(0)
        gen = torch.Generator().manual_seed(5)
        parts = torch.cat([_apply(trigger, x[p], p, role, gen) for p in rows.split(7)])
        for how, other in (("in reverse order", back), ("in batches of 7", parts)):
            bad = ((whole - other).abs() > EPS).flatten(1).any(1)
            hold(not bool(bad.any()), f"{at}: {how}, {int(bad.sum())} of {len(x)} images come out otherwise")


@check(
    "trigger_static",
    "attack",
    what="`static()` is None, or a mask (1, H, W) and pattern (C, H, W) in [0, 1] that blend into what `apply` gives "
    "at test.",
    remedy="Return the mask and pattern of Role.TEST, so that x (1 - mask) + pattern mask is the triggered image; "
    "None where there is no such pair.",
)
def trigger_static(s: Subject) -> str:
    """Blend and compare."""
    x, rows = _test()
    none = 0
    for trigger in _triggers(s):
        static = trigger.static()
        none += static is None
        if static is None:
            continue
        mask, pattern = static
        shapes = tuple(mask.shape), tuple(pattern.shape)
        hold(
            shapes == ((1, *x.shape[2:]), tuple(x.shape[1:])), f"trigger {trigger.name}: mask and pattern are {shapes}"
        )
        for name, t in (("mask", mask), ("pattern", pattern)):
            hold(float(t.min()) >= 0 and float(t.max()) <= 1, f"trigger {trigger.name}: {name} is outside 0..1")
        far = float((_apply(trigger, x, rows, Role.TEST) - (x * (1 - mask) + pattern * mask)).abs().max())
        hold(far <= 1e-3, f"trigger {trigger.name}: the blend of static() is up to {far:.3g} off `apply` at test")
    return "sample-specific" if none else ""


@check(
    "trigger_range",
    "attack",
    what="`range()` is None, or low <= 0 <= high of the images' shape, and a triggered image plus either stays in "
    "[0, 1].",
    remedy="Bounds are deltas around the triggered image (Role.TEST), cut off where the pixel would leave [0, 1].",
)
def trigger_range(s: Subject) -> None:
    """Add both bounds."""
    x, rows = _test()
    for trigger in _triggers(s):
        bounds = trigger.range(x, stage(BASE).micro.test.ids)
        if bounds is None:
            continue
        at, out = f"trigger {trigger.name}", _apply(trigger, x, rows, Role.TEST)
        for name, t in zip(("low", "high"), bounds, strict=True):
            hold(t.shape == x.shape and bool(t.isfinite().all()), f"{at}: {name} is {tuple(t.shape)} or not finite")
            low, high = float((out + t).min()), float((out + t).max())
            hold(low >= -EPS and high <= 1 + EPS, f"{at}: image plus {name} runs from {low:g} to {high:g}")
        low, high = bounds
        hold(float(low.max()) <= EPS and float(high.min()) >= -EPS, f"{at}: zero change is outside low..high")


@check(
    "target_map",
    "attack",
    what="`target` gives classes, and `counts` is bool and never True where the label already is the wanted one.",
    remedy="Use `kit.poison.target_map` or `TargetMap.all_to_one`; else end `counts` with `& (target(y) != y)`.",
)
def target_map(s: Subject) -> None:
    """Ask for every class, with many ids."""
    k = BASE.classes
    y, ids = torch.arange(k).repeat(20), torch.arange(20 * k)
    for trigger in _triggers(s):
        at = f"trigger {trigger.name}"
        wanted, counts = trigger.targets.target(y), trigger.targets.counts(y, ids)
        good = (
            wanted.dtype == torch.int64 and wanted.shape == y.shape and 0 <= int(wanted.min()) <= int(wanted.max()) < k
        )
        hold(good, f"{at}: target gives {wanted.dtype} {tuple(wanted.shape)}, {wanted.unique().tolist()}")
        hold(counts.dtype == torch.bool and counts.shape == y.shape, f"{at}: counts is {counts.dtype}")
        hold(not bool((counts & (wanted == y)).any()), f"{at}: it counts samples whose label is already the wanted one")
        hold(bool(counts.any()), f"{at}: no sample counts, so there is no success to measure")


@check(
    "restore",
    "attack",
    what="A backdoor that was written and read back has the same triggers, targets, static pattern, and applies alike.",
    remedy="Let `prepare` end in `restore(tensors, info)`, so that one code builds both; put everything random into "
    "`tensors` or `info`, and take `aux.<name>.*` from there after training with hooks.",
)
def restore(s: Subject) -> None:
    """Write, read, apply both."""
    found = hooked(s, BASE)
    b = found.backdoor if found else s.answer().backdoor
    try:
        again = restored(s, BASE, b)
    except Exception as e:
        raise Failed(f"writing and reading raises {type(e).__name__}: {e}") from e
    unlike = differ(dict(b.tensors), dict(again.tensors), "tensors") or differ(b.info, again.info, "info")
    hold(not unlike, f"after reading {unlike}")
    hold(len(b.triggers) == len(again.triggers), f"{len(b.triggers)} triggers become {len(again.triggers)}")
    x, rows = _test()
    y = torch.arange(BASE.classes)
    for old, new in zip(b.triggers, again.triggers, strict=True):
        hold(old.name == new.name, f"trigger {old.name!r} becomes {new.name!r}")
        for role in Role:
            unlike = differ(_apply(old, x, rows, role), _apply(new, x, rows, role), f"apply under role {role}")
            hold(not unlike, f"trigger {old.name}: after reading {unlike}")
        one, two = ((t.targets.target(y), t.targets.counts(y, y), t.static(), t.range(x, rows)) for t in (old, new))
        unlike = differ(one, two, "targets, counts, static(), range()")
        hold(not unlike, f"trigger {old.name}: after reading {unlike}")


@check(
    "decoy",
    "attack",
    what="The decoy asks for the same labels on the same samples, and is another trigger.",
    remedy="Override `decoy`: draw anew from its ctx and take target and classes from `b.info`; a fixed pattern needs "
    "another place or form.",
)
def decoy(s: Subject) -> None:
    """Compare it with the true trigger."""
    b = s.answer().backdoor
    at = stage(BASE)
    train, _ = at.attackable
    ctx = s.ctx(at)
    other = s.method().decoy(train, b, replace(ctx, seed=ctx.derive("decoy", 0)))
    hold(len(other.triggers) == len(b.triggers), f"{len(b.triggers)} triggers have {len(other.triggers)} decoys")
    test, y = at.micro.test, at.micro.test.labels
    for true, placebo in zip(_triggers(s), other.triggers, strict=True):
        same = torch.equal(true.targets.target(y), placebo.targets.target(y))
        hold(same, f"the decoy of trigger {true.name} asks for other labels")
        same = torch.equal(true.targets.counts(y, test.ids), placebo.targets.counts(y, test.ids))
        hold(same, f"the decoy of trigger {true.name} counts other samples")
        pairs = [stamp(test, t, Role.TEST, ctx).images for t in (true, placebo)]
        hold(not torch.equal(*pairs), f"the decoy of trigger {true.name} is that trigger")
