"""Excl, backdoor exclusivity: how far a trigger may change and still work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import EvalCase, Evaluator, Findings, Measurement, Metric, Needs
from sleeperbench.contracts import Ctx, Rendered
from sleeperbench.evaluators.accuracy import answers, share
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating, spread

ABLATIONS = (("direction",), ("dynamic",), ("direction", "dynamic"))
"""What rows B, C and A of Table V switch off."""


@dataclass(frozen=True, kw_only=True)
class Exclusivity(Evaluator):
    """The largest change of the trigger that still works, against the largest possible (Qiu et al., S&P 2024).

    Excl(x) = 1 - ||delta*|| / ||R||, Euclidean norms: 0 where any trigger of the family works, 1 where only the
    attacker's does. [low, high] are the changes that the family admits around the trigger on x (`Trigger.range`); R is,
    per value, the farther of the two. delta* comes from Algorithm 1, on all images at once:

    1. delta = 0; Adam on delta alone, constant rate; lambda = `weight` for each image.
    2. For i = 1 .. `steps`: x_u = clip(x_p + delta, 0, 1), o = f(x_u).
    3. From i = steps / 2 on: u = o / ||o||, lambda <- max(0, lambda + u_t - max_{j != t} u_j): more push while the
       trigger works, less where it fails.
    4. loss = sum over images of CE(o, t) + lambda ||R - delta||; a step of Adam; delta is clamped to [low, high]. As a
       sum, with one norm and one lambda per image, it gives every image the gradients it has alone.
    5. Where argmax o = t: e = 1 - ||x_u - x_p|| / ||R||.

    `excl` is the mean of the smallest e of an image, `excl_last` of the last one, as the code prints; `bound` is the
    mean of ||delta*|| = (1 - smallest e) ||R||, the trigger upper bound of Table V, beside the mean of ||R||
    (`control=boundary`), the largest that it can be. Images that the unchanged trigger does not send to the target, or
    with R = 0, are left out; `excl_eligible` is the share of the others. The test images are evenly spread, the same
    for all attacks with one target and equal rows that count. Measured on the undefended model.

    The search sees everything: weights (gradients), the live trigger with its family, and the target. It is a probe
    of the attack, no attack. Triggers without a range (warps, quantisation, reflections) have no figure
    (`no_trigger_range`). R scales with the family: compare a trigger with its own BELT versions, not with others.

    Differs: the code counts images on which the trigger fails, with 1 unless they come to succeed; it draws the images
    at random. Ranges of other families than the patch are unpublished: they are those of the attacks' pages. lambda
    has no step size and no margin epsilon, as in the code; the paper words one.

    Args:
        images: Triggered test images.
        steps: Iterations; lambda moves in the second half.
        lr: Learning rate of Adam, in pixels of [0, 1].
        weight: lambda at the start.
        direction: Push towards R; False pushes delta away from 0, CE - lambda ||delta|| (Table V, A and B).
        dynamic: Let lambda move; False keeps `weight` throughout (Table V, A and C).
        ablations: Search again without direction, without moving lambda and without both, on the same images (Table
            V): rows of `excl` and `bound` with `direction=off` or `dynamic=off`. Four times the work.
    """

    INFO = {
        "title": "Backdoor exclusivity",
        "paper": "https://arxiv.org/abs/2312.04902",
        "bibtex": "@inproceedings{qiu2024belt, title={{BELT}: Old-School Backdoor Attacks can Evade the "
        "State-of-the-Art Defense with Backdoor Exclusivity Lifting}, author={Qiu, Huming and Sun, Junjie and Zhang, "
        "Mi and Pan, Xudong and Yang, Min}, booktitle={IEEE Symposium on Security and Privacy}, year={2024}}",
        "kind": "existence",
        "version": 1,
        "api": 1,
        "micro": {"images": 6, "steps": 20},
        "effort": ["images", "steps"],
    }
    NEEDS = Needs(scope="attack", outcome=(), white_box=True, undefended=True, trigger="live")
    METRICS = (
        Metric(
            name="excl",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="1 minus the largest change of the trigger that still works over the largest possible, mean of images",
        ),
        Metric(
            name="excl_last",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="The same with the last change that worked instead of the largest",
        ),
        Metric(
            name="excl_eligible",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="Images of those taken on which the unchanged trigger works, which alone count",
        ),
        Metric(
            name="bound",
            unit="",
            low=0.0,
            high=math.inf,
            better="none",
            doc="Norm of the largest change of the trigger that still works, of pixels in [0, 1], mean of images",
        ),
    )

    images: int = 100
    steps: int = 5000
    lr: float = 0.001
    weight: float = 0.1
    direction: bool = True
    dynamic: bool = True
    ablations: bool = False

    def __post_init__(self) -> None:
        if not (self.images > 0 and self.steps > 1 and self.lr > 0 and self.weight >= 0):
            raise ValueError("images, steps and lr are positive, steps above 1, weight is at least 0")
        if self.ablations and not (self.direction and self.dynamic):
            raise ValueError("ablations switch direction and dynamic off themselves: leave both on")

    def measure(self, case: EvalCase) -> Findings:
        """Best and last value over the images on which the trigger works."""
        if case.bd_test is None:
            return self._nothing("no_trigger")
        bd, net, ctx = case.bd_test, case.attacked, case.ctx
        bd = chosen(bd, spread(len(bd), self.images))
        works = answers(net, bd.data.images, ctx) == bd.targets.cpu()
        bounds = ranges(case, bd)
        if bounds is None:
            return self._nothing("no_trigger_range")
        # Where nothing may change (an empty generated mask) the quotient has no meaning.
        works &= norms(farther(*bounds)) > 1e-6
        rows = [share("excl_eligible", works)]
        if not bool(works.any()):
            none = ("excl", "excl_last", "bound")
            rows += [Measurement(metric=m, value=None, reason="no_eligible_images") for m in none]
            return Findings(rows=tuple(rows))
        bd, (low, high) = chosen(bd, works), (b[works] for b in bounds)
        start = to_float(bd.data.images).to(ctx.device)
        where = (start, bd.targets.to(ctx.device), low.to(ctx.device), high.to(ctx.device))
        boundary = farther(low, high)
        found = self.search(net, *where, ctx)
        rows += [
            *self._sizes(found, boundary, ""),
            Measurement(metric="excl_last", value=float(found.last.double().mean())),
            Measurement(metric="bound", value=float(norms(boundary).double().mean()), qualifier="control=boundary"),
        ]
        for off in ABLATIONS if self.ablations else ():
            other = replace(self, ablations=False, **dict.fromkeys(off, False))
            rows += self._sizes(other.search(net, *where, ctx), boundary, ";".join(f"{name}=off" for name in off))
        return Findings(rows=tuple(rows), curves=curves(bd, found, boundary))

    def _sizes(self, found: Found, boundary: Tensor, qualifier: str) -> list[Measurement]:
        """`excl` and `bound` of one search."""
        means = {"excl": found.best.double().mean(), "bound": changes(found, boundary).double().mean()}
        return [Measurement(metric=m, value=float(v), qualifier=qualifier) for m, v in means.items()]

    def search(self, net: nn.Module, x: Tensor, targets: Tensor, low: Tensor, high: Tensor, ctx: Ctx) -> Found:
        """Algorithm 1 on triggered images x (N, C, H, W) that work, with what delta may be on each."""
        boundary = farther(low, high)
        whole = norms(boundary)
        delta = torch.zeros_like(x, requires_grad=True)
        opt = torch.optim.Adam([delta], lr=self.lr)
        weight = torch.full((len(x),), self.weight, device=x.device)
        best = torch.ones(len(x), device=x.device)
        last, trace = best.clone(), [(0, 1.0)]
        every = max(1, self.steps // 50)
        with evaluating(net):
            for i in range(1, self.steps + 1):
                moved = (x + delta).clamp(0, 1)
                out = net(moved)
                if self.dynamic and 2 * i >= self.steps:
                    weight = (weight + lead(out.detach(), targets)).clamp_min(0)
                pull = norms(boundary - delta) if self.direction else -norms(delta)
                loss = F.cross_entropy(out, targets, reduction="sum") + (weight * pull).sum()
                (delta.grad,) = torch.autograd.grad(loss, delta)
                opt.step()
                with torch.no_grad():
                    delta.clamp_(low, high)
                    left = (1 - norms(moved - x) / whole).clamp(0, 1)
                    works = out.argmax(1) == targets
                    last = torch.where(works, left, last)
                    best = torch.where(works, torch.minimum(best, left), best)
                ctx.cost.forwards += len(x)
                ctx.cost.backwards += len(x)
                if i % every == 0 or i == self.steps:
                    trace.append((i, float(best.double().mean())))
                    ctx.progress(i, self.steps, "exclusivity")
        return Found(best=best, last=last, trace=tuple(trace))

    def _nothing(self, reason: str) -> Findings:
        return Findings(rows=tuple(Measurement(metric=m.name, value=None, reason=reason) for m in self.METRICS))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search found: per image the smallest and the last e that worked, and the mean smallest by step."""

    best: Tensor
    last: Tensor
    trace: tuple[tuple[int, float], ...]


def chosen(bd: Rendered, rows: Tensor) -> Rendered:
    """Some rows of `bd`."""
    return Rendered(
        data=bd.data.rows(rows),
        clean=bd.clean.rows(rows),
        targets=bd.targets[rows],
        trigger_id=bd.trigger_id[rows],
    )


def ranges(case: EvalCase, bd: Rendered) -> tuple[Tensor, Tensor] | None:
    """(low, high) of every image from its own trigger; None where one of the triggers has no range."""
    x = to_float(bd.clean.images)
    low, high = torch.zeros_like(x), torch.zeros_like(x)
    for i, trigger in enumerate(case.oracle.triggers):
        rows = (bd.trigger_id == i).nonzero()[:, 0]
        if not len(rows):
            continue
        with torch.no_grad():
            found = trigger.range(x[rows], bd.clean.ids[rows])
        if found is None:
            return None
        low[rows], high[rows] = found[0].to(x), found[1].to(x)
    return low, high


def farther(low: Tensor, high: Tensor) -> Tensor:
    """R: per value the bound that is farther from 0, with its sign; the upper one of two equal."""
    return torch.where(high >= -low, high, low)


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each image (N,), with a finite gradient at 0."""
    return (x.flatten(1).square().sum(1) + 1e-24).sqrt()


def lead(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the largest other one, both over the logits' Euclidean norm, (N,)."""
    u = logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-12)
    at = targets[:, None]
    return u.gather(1, at)[:, 0] - u.scatter(1, at, -torch.inf).amax(1)


def changes(found: Found, boundary: Tensor) -> Tensor:
    """||delta*||, the norm of the largest change that worked, (N,)."""
    return (1 - found.best).cpu() * norms(boundary).cpu()


def curves(bd: Rendered, found: Found, boundary: Tensor) -> dict[str, Any]:
    """Mean smallest e by iteration, and per image the figures and the largest change that worked."""
    ids = bd.data.ids.tolist()
    steps, means = zip(*found.trace, strict=True)
    change = changes(found, boundary)
    return {
        "excl": {
            "title": "Exclusivity found so far, mean of images",
            "x_label": "iteration",
            "y_label": "Excl",
            "series": [{"label": "smallest", "x": list(steps), "y": list(means)}],
        },
        "excl_images": {
            "title": "Exclusivity of each image",
            "x_label": "image id",
            "y_label": "Excl; change and boundary in Euclidean norm",
            "series": [
                {"label": "smallest", "x": ids, "y": found.best.tolist()},
                {"label": "last", "x": ids, "y": found.last.tolist()},
                {"label": "largest change that worked", "x": ids, "y": change.tolist()},
                {"label": "boundary", "x": ids, "y": norms(boundary).tolist()},
            ],
        },
    }
