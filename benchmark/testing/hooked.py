"""An attack's hooks, run through the trainer for a few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sleeperbench.contracts.attack import Attack, Backdoor, Mark, TrainHooks
from sleeperbench.engine import artifacts
from sleeperbench.engine.loading import Wrapped
from sleeperbench.kit.classifier import build
from sleeperbench.kit.train import fit
from sleeperbench.testing import surroundings
from sleeperbench.testing.differ import differ
from sleeperbench.testing.stage import RATE, RECIPE, Variant, stage
from sleeperbench.testing.subject import Subject

STEPS = 3
_OFF = 1e-3
"""Of a level: what float32 leaves of whole ones is far below."""


@dataclass(frozen=True, kw_only=True)
class Hooked:
    """What became of a short training.

    Args:
        backdoor: The live backdoor afterwards, with the aux networks' tensors as the engine stores them.
        poisons: The hooks change images or labels of a batch; with `augments`, that they have a `batch`.
        trouble: What was wrong with a batch, or the exception; empty if nothing.
        moved: What is no longer as it was in the process.
        net: State of the classifier.
        marks: Marks of all rows that were trained on.
    """

    backdoor: Backdoor
    poisons: bool
    trouble: str
    moved: tuple[str, ...]
    net: dict[str, Tensor]
    marks: Tensor


def hooked(s: Subject, variant: Variant, turn: int = 0) -> Hooked | None:
    """Train a micro net with the attack's hooks, once for all checks; None if it has none.

    It starts from a `prepare` of its own, since hooks may train what the trigger is made of.
    """
    return cast(Hooked | None, s.once(("hooked", variant, turn), lambda: _hooked(s, variant)))


def _hooked(s: Subject, variant: Variant) -> Hooked | None:
    if s.cls.hooks is Attack.hooks:  # type: ignore[attr-defined]
        return None
    at = stage(variant)
    train, eligible = at.attackable
    ctx = s.ctx(at)
    method = s.method()
    b = method.prepare(train, ctx)
    poisoned = method.poison(train, b, eligible, RATE, ctx)
    ctx = replace(ctx, seed=ctx.derive("train"))
    before = surroundings.look()
    hooks = method.hooks(train, b, eligible, RATE, ctx)
    if hooks is None:
        return None
    seen = poisoned.data if s.snapshot == "exact" else train
    troubles: list[str] = []
    marks: list[Tensor] = []
    changes: list[bool] = []
    _listen(hooks, variant, troubles, marks, changes)
    net = build(variant.spec, seed=1)
    try:
        log = fit(net, seen, RECIPE, ctx, hooks=hooks, steps=STEPS)
        if not all(math.isfinite(loss) for loss in log.losses):
            troubles.append(f"losses are {log.losses}")
    except Exception as e:
        troubles.append(f"{type(e).__name__}: {e}")
    moved = surroundings.moved(before)
    surroundings.put_back(before)
    aux = {f"aux.{n}.{k}": v for n, m in hooks.aux.items() for k, v in m.state_dict().items()}
    return Hooked(
        backdoor=replace(b, tensors={**b.tensors, **aux}),
        poisons=type(hooks).batch is not TrainHooks.batch if hooks.augments else any(changes),
        trouble=next(iter(troubles), ""),
        moved=moved,
        net=net.state_dict(),
        marks=torch.cat(marks) if marks else torch.zeros(0, dtype=torch.int64),
    )


def _listen(hooks: Any, variant: Variant, troubles: list[str], marks: list[Tensor], changes: list[bool]) -> None:
    """Look at every batch on its way from `batch` to `step`."""
    inner = hooks.batch

    def batch(x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        before = x.clone(), y.clone()
        x, y, mark = inner(x, y, ids, step)
        changes.append(bool(differ((x, y), before)))
        n, pixels = len(x), x.detach()
        low, high = float(pixels.min()), float(pixels.max())
        if x.dtype != torch.float32 or tuple(x.shape[1:]) != variant.shape or low < 0 or high > 1:
            troubles.append(f"batch returns images {x.dtype} {tuple(x.shape)} from {low:g} to {high:g}")
        elif (off := float((255 * pixels - (255 * pixels).round()).abs().max())) > _OFF:
            troubles.append(f"batch returns pixels {off:.2f} of a level off what an 8-bit image holds")
        if y.shape != (n,) or y.dtype != torch.int64 or int(y.min()) < 0 or int(y.max()) >= variant.classes:
            troubles.append(f"batch returns labels {y.dtype} {tuple(y.shape)} from {y.min()} to {y.max()}")
        if mark.shape != (n,) or not set(mark.tolist()) <= {int(m) for m in Mark}:
            troubles.append(f"batch returns marks {tuple(mark.shape)} of {sorted(set(mark.tolist()))}")
        marks.append(mark)
        return x, y, mark

    hooks.batch = batch


def restored(s: Subject, variant: Variant, backdoor: Backdoor) -> Backdoor:
    """The backdoor, written and read back as the engine does."""
    folder = stage(variant).place()
    artifacts.write_backdoor(folder, backdoor, s.id)
    return artifacts.read_backdoor(folder, Wrapped(s.cls, s.wrapped) if s.wrapped else s.cls)
