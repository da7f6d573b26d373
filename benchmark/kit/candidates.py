"""Candidates of a defense: made on some clean rows, judged on others by the honest rule, all kept in `Outcome.path`.

A pruning defense reads all its settings off one fit, which is cheap enough to be made for every fold:

    def fit(rows):                               # masks (one per BatchNorm channel, flat, as `kit.gates.channels`)
        mask = learn_masks(case.net, rows)
        return lambda t: mask > t                # what is kept at a setting

    return prune_most(case, THRESHOLDS, fit, what="threshold", form="t={:.2f}")

A tuning defense makes every candidate by itself and holds rows out once: `split`, and `pick`, which judges named
models, the least aggressive first. With a fixed setting nothing is judged: `prune_at`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
from sleeperbench.kit.select import accepts, choose, folds, held_out, right

_T = TypeVar("_T")
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
    of the clean rows, each class evenly, which is enough from 373 clean rows on. For methods whose candidates are
    trained one by one: cross-validation would train each of them six times (`prune_most` is for the others).
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

    Where making one raises FloatingPointError, since training did not stay finite, those before it are judged, and what
    it said is told as `diverged`. A generator that raised makes none of the more aggressive ones.

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
    ended: dict[str, str] = {}
    for name, made, known in _finite(candidates, ended):
        after[name], path[name] = right(made, held, ctx=ctx), pack(made)
        told[name] = {**known, "accuracy": _share(after[name])}
    best = choose([*reversed(path)], after.__getitem__, before)
    about: dict[str, Any] = {
        "rows": len(held),
        "accuracy_before": _share(before),
        "accuracy_after": _share(before if best is None else after[best]),
        "candidates": told,
        **ended,
    }
    if best is None:
        few = not certifies(len(held))
        about["unchanged"] = f"{len(held)} held-out rows are too few" if few else f"no {what} was accepted"
    return Picked(name=best, path=path, about=about)


def _finite(candidates: Iterable[_T], ended: dict[str, str]) -> Iterator[_T]:
    """The candidates until making one raises; `ended` then gets what it said, as `diverged`."""
    try:
        yield from candidates
    except FloatingPointError as e:
        ended["diverged"] = str(e)


def growing(settings: Iterable[tuple[float, Tensor]]) -> dict[float, Tensor]:
    """What is kept (bool, flat), by setting: only settings that remove more than those before them."""
    found, gone = {}, 0
    for setting, keep in settings:
        if int((~keep).sum()) > gone:
            found[setting], gone = keep, int((~keep).sum())
    return found


def prune_most(
    case: Case,
    settings: Sequence[float],
    fit: Callable[[ImageSet], Callable[[float], Tensor]],
    *,
    what: str,
    form: str,
    k: int = 5,
    made: Callable[[Tensor], Classifier] | None = None,
) -> Outcome:
    """The model without the most channels that the honest rule lets go, chosen by cross-validation, and all candidates.

    1. For each of `k` folds of the clean rows: fit on the others, and let the model of every setting answer the rows
       left out.
    2. All rows' answers together are held against the untouched model's, setting by setting (`kit.select.choose`).
    3. Fit on all clean rows. What is removed is what the chosen setting removes of this fit, and the candidates that
       are kept are this fit's: one per setting that removes more than those before it.

    Settings are compared by their values, since every fold's fit removes other channels. Several may remove the same of
    the last fit; the chosen one then answers with the candidate that has the least aggressive one's name. With too few
    clean rows to certify an unchanged model the last fit alone is made.

    So the accuracies in `chosen` are those of settings, not of models: `accuracy_after`, and each candidate's
    `accuracy`, are the shares of clean rows that the folds' models answered right at that setting, each row by a model
    fitted without it. The models answered and kept are the last fit's, which saw all clean rows; there are none left to
    judge these on. Where the model stays as it is, `accuracy_after` is `accuracy_before`.

    Args:
        case: Its model is pruned.
        settings: The least aggressive first; each removes what those before it remove, or more.
        fit: From rows to what is kept (bool, flat) at a setting. The last call is that with all rows.
        what: The setting's name in `chosen`.
        form: Makes a candidate's name of a setting, as `t={:.2f}` does.
        k: Number of folds.
        made: The model that keeps these channels; None for `kit.gates.pruned`.
    """

    def models(rows: ImageSet) -> Iterator[tuple[float, Classifier | None]]:
        kept, last = fit(rows), None
        for setting in settings:
            keep = kept(setting)
            yield setting, None if last is not None and torch.equal(keep, last) else _cut(case, keep, made)
            last = keep

    before = right(case.net, case.clean, ctx=case.ctx)
    judged = certifies(len(case.clean))
    after = held_out(case.clean, models, ctx=case.ctx, k=k) if judged else {}
    best = choose(settings[::-1], after.__getitem__, before) if judged else None
    kept = fit(case.clean)
    found = growing((setting, kept(setting)) for setting in settings)
    names = {form.format(setting): keep for setting, keep in found.items()}
    told: dict[str, dict[str, Any]] = {name: {"pruned": int((~keep).sum())} for name, keep in names.items()}
    for name, setting in zip(names, found, strict=True):
        if judged:
            told[name]["accuracy"] = _share(after[setting])
    path = {name: pack(_cut(case, keep, made)) for name, keep in names.items()}
    keep = kept(settings[0]) if best is None else kept(best)
    chosen = None if best is None else next((name for name, same in names.items() if torch.equal(same, keep)), None)
    about: dict[str, Any] = {
        what: best,
        "pruned": 0 if chosen is None else told[chosen]["pruned"],
        "channels": len(keep),
        "rows": len(case.clean),
        "folds": k if judged else 0,
        "accuracy_before": _share(before),
        "accuracy_after": _share(before if best is None or chosen is None else after[best]),
        "candidates": told,
    }
    if not judged:
        about["unchanged"] = f"{len(case.clean)} clean rows are too few"
    elif best is None:
        about["unchanged"] = f"no {what} was accepted"
    elif chosen is None:
        about["unchanged"] = f"{form.format(best)} removes no channel"
    return Outcome(model=None if chosen is None else path[chosen], chosen=about, path=path)


def prune_at(
    case: Case, keep: Tensor, setting: Mapping[str, float], made: Callable[[Tensor], Classifier] | None = None
) -> Outcome:
    """The model without the channels that a given setting removes; `made` as in `prune_most`."""
    about = {**setting, "pruned": int((~keep).sum()), "channels": len(keep)}
    return Outcome(model=pack(_cut(case, keep, made)), chosen=about)


def _cut(case: Case, keep: Tensor, made: Callable[[Tensor], Classifier] | None) -> Classifier:
    return pruned(case.net, keep) if made is None else made(keep)


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
