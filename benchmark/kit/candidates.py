"""Candidates of a defense: made on some clean rows, judged on others by the honest rule, all kept in `Outcome.path`.

A pruning defense with one mask or score per BatchNorm channel (flat, in the order of `kit.gates.channels`):

    rows, held = split(case)
    mask = learn_masks(case.net, rows)
    found = growing((t, mask > t) for t in THRESHOLDS)
    return prune_most(case, held, found, what="threshold", form="t={:.2f}")

Any other: `pick` judges named models, the least aggressive first. With a fixed setting nothing is judged: `prune_at`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.defense import Case, Outcome
from sleeperbench.contracts.models import Model
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.gates import channels, pruned
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.select import accepts, choose, folds, right

THRESHOLDS = tuple(i / 20 for i in range(19))
"""0, 0.05, ... 0.90: where the field cuts masks in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Picked:
    """What `pick` found.

    Args:
        name: The candidate taken; None when none was accepted.
        path: All candidates by name.
        about: For `Outcome.chosen`: rows, accuracies on them, and why nothing was taken (`unchanged`).
    """

    name: str | None
    path: Mapping[str, Model]
    about: Mapping[str, Any]


def split(case: Case) -> tuple[ImageSet, ImageSet]:
    """Rows to make candidates on and rows to judge them on.

    These are `tune` and `val` where `val` can certify an unchanged model (114 rows and more), otherwise 70 % and 30 %
    of the clean rows, each class evenly, which is enough from 373 clean rows on. Cross-validation would make every
    candidate five times.
    """
    if certifies(len(case.val)):
        return case.tune, case.val
    tenths = folds(case.clean.labels, 10, case.ctx.derive("split"))
    held = torch.zeros(len(case.clean), dtype=torch.bool)
    held[torch.cat(tenths[:3])] = True
    return case.clean.rows(~held), case.clean.rows(held)


def certifies(n: int) -> bool:
    """Whether `n` rows can show that a model which did not change lost nothing."""
    unchanged = torch.ones(n, dtype=torch.bool)
    return n > 0 and accepts(unchanged, unchanged)


def pick(
    net: Classifier,
    candidates: Iterable[tuple[str, Classifier, Mapping[str, Any]]],
    held: ImageSet,
    *,
    ctx: Ctx,
    what: str,
) -> Picked:
    """The most aggressive candidate that the honest rule accepts on `held`.

    Args:
        net: The untouched model.
        candidates: Name, model and what is told of it beside its accuracy; the least aggressive first. A generator
            holds one model at a time on the device.
        held: Rows that no candidate was made on.
        ctx: Costs.
        what: The setting's name, for the reason where none is accepted.
    """
    before = right(net, held, ctx=ctx)
    after: dict[str, Tensor] = {}
    path: dict[str, Model] = {}
    told: dict[str, Any] = {}
    for name, made, known in candidates:
        after[name], path[name] = right(made, held, ctx=ctx), pack(made)
        told[name] = {**known, "accuracy": _share(after[name])}
    best = choose([*reversed(path)], after.__getitem__, before)
    about: dict[str, Any] = {
        "rows": len(held),
        "accuracy_before": _share(before),
        "accuracy_after": _share(before if best is None else after[best]),
        "candidates": told,
    }
    if best is None:
        few = not certifies(len(held))
        about["unchanged"] = f"{len(held)} held-out rows are too few" if few else f"no {what} was accepted"
    return Picked(name=best, path=path, about=about)


def growing(settings: Iterable[tuple[float, Tensor]]) -> dict[float, Tensor]:
    """What is kept (bool, flat), by setting: only settings that remove more than those before them."""
    found, gone = {}, 0
    for setting, keep in settings:
        if int((~keep).sum()) > gone:
            found[setting], gone = keep, int((~keep).sum())
    return found


def prune_most(case: Case, held: ImageSet, found: Mapping[float, Tensor], *, what: str, form: str) -> Outcome:
    """The model without the most channels that the honest rule lets go, and all candidates.

    Args:
        case: Its model is pruned.
        held: Rows that `found` does not depend on.
        found: Channels kept, by setting, the least aggressive first.
        what: The setting's name in `chosen`.
        form: Makes a candidate's name of a setting, as `t={:.2f}` does.
    """
    names = {form.format(setting): setting for setting in found}
    made = ((n, pruned(case.net, found[s]), {"pruned": int((~found[s]).sum())}) for n, s in names.items())
    picked = pick(case.net, made, held, ctx=case.ctx, what=what)
    best = None if picked.name is None else names[picked.name]
    about = {
        what: best,
        "pruned": 0 if best is None else int((~found[best]).sum()),
        "channels": sum(channels(case.net).values()),
    }
    model = None if picked.name is None else picked.path[picked.name]
    return Outcome(model=model, chosen={**about, **picked.about}, path=picked.path)


def prune_at(case: Case, keep: Tensor, setting: Mapping[str, float]) -> Outcome:
    """The model without the channels that a given setting removes."""
    about = {**setting, "pruned": int((~keep).sum()), "channels": len(keep)}
    return Outcome(model=pack(pruned(case.net, keep)), chosen=about)


def outlying(score: Tensor, u: float) -> Tensor:
    """Which scores (C,) of a layer exceed their mean by `u` standard deviations (divisor C - 1): bool (C,).

    Channels without a score (NaN) are left out of both and never outlying. Of C scores none exceeds the mean by more
    than (C - 1) / sqrt(C) deviations: with 3, layers of up to ten channels keep all of theirs.
    """
    known = score[~score.isnan()]
    if len(known) < 2:
        return torch.zeros_like(score, dtype=torch.bool)
    return score > known.mean() + u * known.std()


@torch.no_grad()
def before_norms(net: Classifier, images: Tensor, look: Callable[[Tensor], Tensor], *, ctx: Ctx) -> dict[str, Tensor]:
    """What `look` makes of the input (N, C, H, W) of each BatchNorm layer, in the order of `kit.gates.channels`.

    One pass of all images in eval mode; inputs are dropped as soon as they were looked at.

    Args:
        net: Left as it is.
        images: uint8 (N, C, H, W).
        look: Gets a layer's input.
        ctx: Costs.

    Raises:
        NotApplicable: `needs_bn`.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = look(inputs[0])

        return keep

    names = list(channels(net))
    handles = [net.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        with evaluating(net):
            net(to_float(images.to(device_of(net))))
    finally:
        for handle in handles:
            handle.remove()
    ctx.cost.forwards += len(images)
    return {name: found[name] for name in names}


def _share(hit: Tensor) -> float:
    return float(hit.double().mean())
