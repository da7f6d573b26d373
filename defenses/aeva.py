"""AEVA: the smallest perturbation into a backdoor's target is a peak on few pixels; labels alone find it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.anomaly import LEAST, anomaly_index, bounded
from sleeperbench.kit.pixels import to_float

Holds = Callable[[Tensor, Tensor], Tensor]
"""Whether images (N, C, H, W), made from these rows (N,), get the labels that are wanted of them: bool (N,)."""

_ROWS, _AT_ONCE = 2048, 4096
"""Perturbations that are looked for together, and images around them that are made and asked about at once, at most."""
_HALVINGS = 64
"""Bound on the halvings of a step. In float32 no step is left of it long before, and the image itself has the label."""


@dataclass(frozen=True, kw_only=True)
class AEVA(Defense):
    """Adversarial extreme value analysis from hard labels (Guo, Li, Liu, ICLR 2022).

    1. Clean rows that get their own label are kept. For every class t and every other class s, `samples` rows x of s
       are each paired with a row of t.
    2. HopSkipJump (Chen et al. 2020), targeted, L2, finds a small perturbation of x into t: a binary search between x
       and the row of t up to a share theta = 1 / (d sqrt d) of the way, then in iteration j
       a. delta = 0.1 for j = 1, else sqrt(d) theta |x' - x| with x' the image before the last search;
       b. floor(`queries` sqrt j) images a + delta u around the adversarial image a, u uniform on the unit sphere, are
          cut to [0, 1] and u with them; with phi = 1 where the label is t, else -1, the direction is the mean of
          (phi - mean phi) u, of u where all phi are 1, of -u where all are -1, divided by its norm;
       c. a step |a - x| / sqrt j along it, halved until the label is t; and the binary search again.
    3. The peak of a perturbation is the share of its absolute sum that its two largest pixels have, channels summed.
       A pair's peak is the largest over its samples; the global adversarial peak of t is the sum over classes s.
    4. Anomaly index of the K global peaks, above the median; classes above `threshold` are flagged.

    All pairs are perturbed side by side, each by draws of its own. For ten classes the published setting asks about
    9 10^7 images. Fewer source classes cost least: `sources`.

    Differs: images of a pair are cycled where one class has fewer than `samples`. A class without a row that gets its
    label is no source, so that all sums have equally many terms, and as a target gets the lowest index of the others.
    The limit of 30,000 queries per estimate is never reached and left out. Queries are float images and not rounded to
    8 bit, as in the authors' code. The claim of a flagged class, of which the paper has none, is the mean perturbation
    into it as an additive trigger.

    Args:
        samples: Images per pair of classes.
        sources: Source classes per target, drawn at random; more than there are means all.
        iterations: Iterations of HopSkipJump.
        queries: Queries of the first gradient estimate.
        threshold: Anomaly index above which a class is flagged.
        batched: All pairs at once; False looks for one perturbation at a time, at the same result but for rounding: for
            timings.
    """

    INFO = {
        "title": "Adversarial extreme value analysis",
        "paper": "https://openreview.net/forum?id=OM_lYiHXiCL",
        "bibtex": "@inproceedings{guo2022aeva, title={{AEVA}: Black-box Backdoor Detection Using Adversarial Extreme "
        "Value Analysis}, author={Guo, Junfeng and Li, Ang and Liu, Cong}, booktitle={International Conference on "
        "Learning Representations}, year={2022}}",
        "kind": "inversion",
        "version": 2,
        "api": 1,
        "micro": {"samples": 1, "sources": 1, "iterations": 2, "queries": 10},
        "effort": ["samples", "sources", "iterations", "queries"],
        "traverses": True,
        "presumes": "a small trigger of a single target, the same on all images of all other classes",
    }
    ACCESS = Access(model="labels", clean=0.05)

    samples: int = 40
    sources: int = 1000
    iterations: int = 50
    queries: int = 100
    threshold: float = 4.0
    batched: bool = True

    def __post_init__(self) -> None:
        if min(self.samples, self.sources, self.iterations, self.queries) < 1:
            raise ValueError("samples, sources, iterations and queries must be at least 1")

    def run(self, case: Case) -> Outcome:
        """The verdict, an index per class, and the mean perturbations into flagged classes.

        Raises:
            NotApplicable: too few classes for an outlier, or with a row that gets its label.
        """
        classes = case.spec.classes
        if classes < LEAST:
            raise NotApplicable(f"too_few_classes: {classes}; an outlier needs {LEAST}")
        x = to_float(case.clean.images)
        right = case.net(x) == case.clean.labels
        rows = [((case.clean.labels == c) & right).nonzero().flatten() for c in range(classes)]
        with_rows = [c for c in range(classes) if len(rows[c])]
        if len(with_rows) < LEAST:
            raise NotApplicable(f"too_few_classes: {len(with_rows)} have a clean row that gets its label, not {LEAST}")
        gap, shifts, far = torch.full((classes,), math.nan), {}, []
        sources = {t: _sources(with_rows, t, self.sources, case.ctx) for t in with_rows}
        pairs = len(sources[with_rows[0]])
        together = max(1, _ROWS // (pairs * self.samples)) if self.batched else 1
        for first in range(0, len(with_rows), together):
            targets = with_rows[first : first + together]
            begin = torch.cat([_cycled(rows[s], self.samples) for t in targets for s in sources[t]])
            end = torch.cat([_cycled(rows[t], self.samples).repeat(pairs) for t in targets])
            aims = torch.tensor(targets).repeat_interleave(pairs * self.samples)
            gens = [case.ctx.generator("directions", t, i) for t in targets for i in range(pairs * self.samples)]
            shift = self.shifts(case, x[begin], x[end], aims, gens)
            for t, own in zip(targets, shift.split(pairs * self.samples), strict=True):
                gap[t] = global_peak(peaks(own).view(pairs, self.samples))
                shifts[t] = own.mean(0)
                far.append(own.flatten(1).norm(dim=1).mean())
            case.ctx.progress(first + len(targets), len(with_rows), "classes")
        index = bounded(anomaly_index(gap))
        claimed = [int(t) for t in (index > self.threshold).nonzero().flatten()]
        return Outcome(
            verdict=Verdict(score=float(index.max()), threshold=self.threshold, label_scores=index),
            inverted=tuple(Inverted(target=t, delta=shifts[t]) for t in claimed),
            chosen={
                "claimed": claimed,
                "peaks": [None if math.isnan(g) else round(g, 4) for g in gap.tolist()],
                "distance": round(float(torch.stack(far).mean()), 4),
                "pairs": pairs * len(with_rows),
            },
        )

    def shifts(self, case: Case, x: Tensor, start: Tensor, aims: Tensor, gens: Sequence[Generator]) -> Tensor:
        """Perturbations (N, C, H, W) of `x` into the labels `aims` (N,), which the rows of `start` have."""

        def holds(images: Tensor, of: Tensor) -> Tensor:
            parts = zip(images.split(_AT_ONCE), of.split(_AT_ONCE), strict=True)
            return torch.cat([case.net(some) == aims[rows] for some, rows in parts])

        found = [
            hop(holds, x[rows], start[rows], rows, iterations=self.iterations, queries=self.queries, gens=gens)
            for rows in torch.arange(len(x)).split(len(x) if self.batched else 1)
        ]
        return torch.cat(found) - x


def _sources(classes: list[int], target: int, at_most: int, ctx: Ctx) -> list[int]:
    """Other classes to start from, in order."""
    others = [s for s in classes if s != target]
    order = torch.randperm(len(others), generator=ctx.generator("sources", target))[:at_most]
    return [others[i] for i in sorted(order.tolist())]


def _cycled(rows: Tensor, n: int) -> Tensor:
    return rows[torch.arange(n) % len(rows)]


def hop(
    holds: Holds, x: Tensor, start: Tensor, rows: Tensor, *, iterations: int, queries: int, gens: Sequence[Generator]
) -> Tensor:
    """Images (N, C, H, W) near `x` that hold, as `start` does: step 2, for all rows at once.

    Args:
        holds: Whether images hold; it is given the number of the row that each was made from.
        x: Images that do not hold.
        start: Images that do.
        rows: Their numbers, int64 (N,).
        iterations: Estimates and steps.
        queries: Images of the first estimate.
        gens: A generator for every number that a row can have.
    """
    d = x[0].numel()
    theta = 1 / (d * math.sqrt(d))
    adv, last = search(holds, x, start, rows, theta), _norm(start - x)
    for j in range(1, iterations + 1):
        delta = torch.full_like(last, 0.1) if j == 1 else math.sqrt(d) * theta * last
        count = int(queries * math.sqrt(j))
        way = torch.cat(
            [
                direction(holds, adv[some], rows[some], delta[some], count, gens)
                for some in torch.arange(len(x)).split(max(1, _AT_ONCE // count))
            ]
        )
        moved = step(holds, adv, rows, way, _norm(adv - x) / math.sqrt(j))
        last = _norm(moved - x)
        adv = search(holds, x, moved, rows, theta)
    return adv


def search(holds: Holds, x: Tensor, far: Tensor, rows: Tensor, theta: float) -> Tensor:
    """The nearest images to `x` on the way to `far` that still hold, to a share `theta` of the way."""
    low, high = (torch.full((len(x), 1, 1, 1), share) for share in (0.0, 1.0))
    gap = 1.0
    while gap > theta:
        middle, gap = (low + high) / 2, gap / 2
        inside = holds((1 - middle) * x + middle * far, rows).view(-1, 1, 1, 1)
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return (1 - high) * x + high * far


def direction(holds: Holds, adv: Tensor, rows: Tensor, delta: Tensor, count: int, gens: Sequence[Generator]) -> Tensor:
    """Unit vectors (N, C, H, W) in which the labels become more certain, each estimated from `count` around `adv`."""
    u = torch.stack([torch.randn(count, *adv.shape[1:], generator=gens[row]) for row in rows.tolist()])
    radius = delta.view(-1, 1, 1, 1, 1)
    around = (adv[:, None] + radius * u / u.flatten(2).norm(dim=2)[..., None, None, None]).clamp(0, 1)
    u = (around - adv[:, None]) / radius
    phi = holds(around.flatten(0, 1), rows.repeat_interleave(count)).view(-1, count).float() * 2 - 1
    # Where all labels agree their mean says nothing: then towards, or away from, where the pixels' bounds leave room.
    agreed = (phi == phi[:, :1]).all(1, keepdim=True)
    weight = torch.where(agreed, phi, phi - phi.mean(1, keepdim=True))
    way = (weight[..., None, None, None] * u).mean(1)
    return way / _norm(way).clamp_min(1e-30).view(-1, 1, 1, 1)


def step(holds: Holds, adv: Tensor, rows: Tensor, way: Tensor, size: Tensor) -> Tensor:
    """`adv` moved along `way` by `size` (N,), each halved until it holds there; only failing rows are asked again."""
    moved, size, left = adv.clone(), size.clone(), torch.arange(len(adv))
    for _ in range(_HALVINGS):
        tried = (adv[left] + size[left].view(-1, 1, 1, 1) * way[left]).clamp(0, 1)
        good = holds(tried, rows[left])
        moved[left[good]] = tried[good]
        left = left[~good]
        if not len(left):
            break
        size[left] /= 2
    return moved


def peaks(shift: Tensor) -> Tensor:
    """Share (N,) of the absolute sum of perturbations (N, C, H, W) that lies on the two largest pixels."""
    pixels = shift.abs().sum(1).flatten(1)
    return pixels.topk(2).values.sum(1) / pixels.sum(1).clamp_min(1e-30)


def global_peak(peak: Tensor) -> Tensor:
    """Sum over the sources of the largest of their samples' peaks (S, n)."""
    return peak.amax(1).sum()


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
