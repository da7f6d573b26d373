"""IsTr's parts (Sun et al. 2025): Steps, label mutation, Differential-Middle-Slices, and what they say of a model.

    found = isolate(case, reference, Settings())
    found.scores, found.claimed, found.slices       # per label; per label looked at

`reference` is the benign model f_s. What the paper leaves open, and what was chosen, stands in docs/methods/istr.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.defense import Case
from sleeperbench.kit.pgd import ascent
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating, spread

FLOOR = 0.3
"""A pair (m, n) counts where at least this share of class m turns into n: 2-means alone always finds a high cluster."""
VOTES = 0.4
"""Share of the other classes that must suspect a label, at least, for Steps alone to claim it."""
AREAS = (0.02, 0.04, 0.08, 0.15, 0.25, 0.40, 0.60, 1.00)
"""Shares of the pixels in the top-down slices."""
FIXED = (0.01, 0.05)
"""The paper's t1 and t2 for MNIST."""
SUCCESS = 0.9
"""Success of a trigger at which no larger slice is tried, and without which a small slice says nothing."""
FEASIBLE = 0.8
"""The same for middle slices: thresholds of eq. 7 below it are discarded."""
SMALL = 0.2
"""A slice of at most this share of the median slice claims its label."""
LEAN = 0.2
"""A label that so much more of the other classes, or more, turns into than with the benign model is claimed."""
NATURAL = (0.7, 0.4)
"""A natural backdoor: at least this success with at most this share of the pixels."""
SOURCE = 0.9
"""A claimed label with one single pair at such a rate is source-specific."""

MUTATED, FITTED, _MAPPED, _JUDGED = 10, 60, 40, 150
"""Rows: at least so many must turn into a label, then at most so many for a trigger, a map, and its success."""
_INNER_STEPS, _INNER_STEP = 10, 0.1
"""Steps inside a slice."""
QUANTILES, LEAST, TRIES = 12, 4, 8
"""Eq. 7: candidates for t1 and t2, smallest set in pixels, and how many pairs are tried, the best first."""
_BATCH = 256
ROUNDING = 1e-9
"""What the bounds of the rules themselves fall short of by rounding alone: thresholds lie so much below them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is looked at.

    Args:
        steps: Iterations of Steps.
        step: Their length, in pixels of [0, 1].
        targeted: Towards each label in turn, instead of away from the row's own.
        dms: Slice, instead of stopping after Steps.
        slices: `topdown`, the largest pixels of the map; `adaptive`, the middle slice of eq. 7; `fixed`, that of FIXED.
        delta: What a window changes: the row's own `steps`, or `invert` its pixels.
        labels: Labels sliced at most, those most turned into.
        batched: Many rows in one pass through a net; False sends one at a time, at the same result but for rounding.
    """

    steps: int = 20
    step: float = 0.05
    targeted: bool = False
    dms: bool = True
    slices: Literal["topdown", "adaptive", "fixed"] = "topdown"
    delta: Literal["steps", "invert"] = "steps"
    labels: int = 10
    batched: bool = True

    @classmethod
    def of(cls, method: object) -> Settings:
        """Those that a method has as parameters of the same name; the others as they are here."""
        return cls(**{f.name: getattr(method, f.name) for f in fields(cls) if hasattr(method, f.name)})

    def __post_init__(self) -> None:
        if self.steps < 1 or self.labels < 1 or not self.step > 0:
            raise ValueError(f"steps {self.steps}, labels {self.labels} and step {self.step} must be above 0")
        if self.slices not in ("topdown", "adaptive", "fixed") or self.delta not in ("steps", "invert"):
            raise ValueError(f"slices is {self.slices!r} and delta {self.delta!r}: see the parameters")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One slice of a label's map and the trigger inside it.

    Args:
        mask: bool (H, W).
        area: Its share of the pixels; of a slice from the top the share asked for, where the mask is rounded up.
        delta: The trigger, (C, H, W), added to an image and cut to [0, 1].
        success: Share of held-out rows of other labels that get the label.
        thresholds: t1 and t2 of a middle slice.
    """

    mask: Tensor
    area: float
    delta: Tensor
    success: float
    thresholds: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What was found for one label.

    Args:
        label: The label.
        gaps: Its map E, float32 (H, W).
        trials: Slices in the order tried.
        goal: Success at which trying ended.
        benign: The benign model's map E_s, float32 (H, W); None where no map was made.
    """

    label: int
    gaps: Tensor
    trials: tuple[Trial, ...]
    goal: float
    benign: Tensor | None = None

    @property
    def kept(self) -> Trial:
        """The trial that reached the goal; where none did, the most successful, of equals the first."""
        return max(self.trials, key=lambda t: t.success)

    @property
    def area(self) -> float:
        """Area of the kept trial; 1 where none reached the goal."""
        return self.kept.area if self.kept.success >= self.goal else 1.0

    def natural(self) -> Trial | None:
        """The first trial that makes the label a natural backdoor of a clean model."""
        return next((t for t in self.trials if t.success >= NATURAL[0] and t.area <= NATURAL[1]), None)


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What IsTr says of a model.

    Args:
        scores: float64 (K,); a label is claimed iff its score exceeds `threshold`.
        threshold: The bound of the rule, which claims, too, less what rounding may take from it.
        rates: Label mutation after Steps, (K, K), NaN where no row of a class was right.
        reference: The same of the benign model; None without DMS.
        pairs: int64 (P, 2), (source, target) of claimed targets, from label mutation inside the slices.
        sources: Per claimed label that one class alone turns into, that class.
        slices: The labels looked at, the one most turned into first.
    """

    scores: Tensor
    threshold: float
    rates: Tensor
    reference: Tensor | None
    pairs: Tensor
    sources: dict[int, int]
    slices: tuple[Slice, ...]

    @property
    def claimed(self) -> list[int]:
        """Labels whose score exceeds the threshold."""
        return [int(n) for n in (self.scores > self.threshold).nonzero().flatten()]

    def best(self) -> Slice | None:
        """The label with the smallest slice, of equals the most successful; None if none was looked at."""
        return min(self.slices, key=lambda s: (s.area, -s.kept.success), default=None)


def climb(
    net: nn.Module,
    x: Tensor,
    aims: Tensor,
    *,
    steps: int,
    step: float,
    ctx: Ctx,
    towards: bool = False,
    where: Tensor | None = None,
    at_once: int = _BATCH,
) -> Tensor:
    """Steps: T <- clip(x + T + step sign(g) M, 0, 1) - x from T = 0, g the gradient of CE(f(x + T), aim) in x.

    No ball and no penalty bounds T; each row goes its own way.

    Args:
        net: Classifier in eval mode.
        x: float32 [0, 1] (N, C, H, W).
        aims: int64 (N,): the labels to leave, or to reach.
        steps: Iterations.
        step: Length of one, in pixels.
        ctx: Costs.
        towards: Descend to the aims instead of leaving them.
        where: M, bool (H, W); None for the whole image.
        at_once: Rows in one pass through the net.

    Returns:
        T, (N, C, H, W).
    """
    if not len(x):
        return torch.zeros_like(x)
    sign = -1.0 if towards else 1.0
    mask = torch.ones_like(x[:1, 0]) if where is None else where.to(x)
    parts = []
    for rows, wanted in zip(x.split(at_once), aims.split(at_once), strict=True):

        def loss(t: Tensor, rows: Tensor = rows, wanted: Tensor = wanted) -> Tensor:
            return sign * F.cross_entropy(net(rows + t * mask), wanted, reduction="sum")

        # No pixel moves by more than 1, so the ball of radius 1 binds nothing.
        parts.append(ascent(loss, torch.zeros_like(rows), eps=1.0, step=step, steps=steps, around=rows))
    ctx.cost.forwards += steps * len(x)
    ctx.cost.backwards += steps * len(x)
    return torch.cat(parts)


def mutation(hits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """R[m, n]: share of the kept rows of class m that turn into n; the diagonal is 0, rows of absent classes NaN.

    Args:
        hits: bool (N, K), row turns into label.
        labels: int64 (N,).
        kept: bool (N,), rows that count: the model was right on them.

    Returns:
        float64 (K, K), on the CPU.
    """
    k = hits.shape[1]
    own = F.one_hot(labels, k).double() * kept[:, None]
    lead = own.T @ hits.double()
    return (lead / own.sum(0)[:, None]).fill_diagonal_(0).masked_fill((own.sum(0) == 0)[:, None], torch.nan).cpu()


def two_means(values: Tensor) -> Tensor:
    """The cluster of higher values, bool (P,), of the best 2-means of numbers; empty where all are equal.

    The optimum itself, not that of some restarts: in one dimension it is a cut of the sorted values.
    """
    ordered = values.double().unique()
    if len(ordered) < 2:
        return torch.zeros_like(values, dtype=torch.bool)

    def inner(cut: Tensor) -> float:
        """Sum of squares around both means."""
        parts = (values[values < cut].double(), values[values >= cut].double())
        return sum(float((part - part.mean()).square().sum()) for part in parts)

    best: Tensor = min(ordered[1:], key=inner)
    return values >= best


def suspected(rates: Tensor) -> Tensor:
    """Pairs (m, n), bool (K, K): n is in the high cluster of row m without its diagonal, and its rate reaches FLOOR."""
    found = torch.zeros_like(rates, dtype=torch.bool)
    for m, row in enumerate(rates):
        if not row.isnan().any():
            others = torch.arange(len(row)) != m
            found[m, others] = two_means(row[others]) & (row[others] >= FLOOR)
    return found


def leaning(rates: Tensor) -> Tensor:
    """Mean over the other classes of the share that turns into each label, (K,); 0 where no other class has rows."""
    others = rates.masked_fill(torch.eye(len(rates), dtype=torch.bool), torch.nan)
    return others.nanmean(0).nan_to_num(0.0)


def windows(height: int, width: int) -> Tensor:
    """Square windows that cover the image, bool (L, H, W): an eighth of its side, some fifteen places per side."""
    side = max(2, min(height, width) // 8)

    def places(length: int) -> list[int]:
        stride = max(1, round((length - side) / 14))
        return sorted({*range(0, length - side + 1, stride), length - side})

    corners = list(itertools.product(places(height), places(width)))
    found = torch.zeros(len(corners), height, width, dtype=torch.bool)
    for window, (top, left) in zip(found, corners, strict=True):
        window[top : top + side, left : left + side] = True
    return found


def gap_maps(net: nn.Module, reference: nn.Module, x: Tensor, delta: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
    """Eq. 6: E_i = |f(x) - f(x_i)|_2 - |f_s(x) - f_s(x_i)|_2, at least 0, and its second term alone.

    x_i is x changed by `delta` inside window i, f are probabilities. Both are averaged over rows, then in each pixel
    over the windows that cover it.

    Args:
        net: f, in eval mode.
        reference: f_s, in eval mode.
        x: (N, C, H, W), at least one row.
        delta: The same shape, x + delta in [0, 1].
        ctx: Costs.

    Returns:
        E and the benign map, each float32 (H, W).
    """
    cover = windows(*x.shape[2:]).to(x)
    gaps, benign = (torch.zeros(len(cover), device=x.device) for _ in range(2))
    with torch.no_grad():
        for image, move in zip(x, delta, strict=True):
            seen = torch.cat([image[None], image + cover[:, None] * move])
            ours, theirs = ((p[1:] - p[:1]).norm(dim=1) for p in (n(seen).float().softmax(1) for n in (net, reference)))
            gaps += (ours - theirs).clamp_min(0)
            benign += theirs
            ctx.cost.forwards += 2 * len(seen)
    average = cover.flatten(1) / (len(x) * cover.flatten(1).sum(0))
    return (gaps @ average).view(x.shape[2:]), (benign @ average).view(x.shape[2:])


def top(gaps: Tensor, share: float) -> Tensor:
    """The top-down slice, bool (H, W): the ceil(share H W) largest pixels, of equals the first."""
    order = gaps.flatten().argsort(descending=True, stable=True)
    found = torch.zeros(gaps.numel(), dtype=torch.bool, device=gaps.device)
    found[order[: math.ceil(share * gaps.numel())]] = True
    return found.view_as(gaps)


def middle(gaps: Tensor, low: float, high: float) -> Tensor:
    """The middle slice, bool (H, W): t1 < E < t2."""
    return (gaps > low) & (gaps < high)


def separation(upper: Tensor, between: Tensor, benign: Tensor) -> float:
    """Eq. 7: (d1 + r1) / (d1 r1) + (d2 + r2) / (d2 r2), to be small, of three sets of pixels, bool (H, W).

    d1 and r1 are the distance of the centroids and the difference of the mean radii of `upper` and `between`, d2 and r2
    those of `benign` and `between`; a radius is the distance to the set's own centroid. Lengths are in pixels.
    """

    def shape(part: Tensor) -> tuple[Tensor, Tensor]:
        points = part.nonzero().double()
        centre = points.mean(0)
        return centre, (points - centre).norm(dim=1).mean()

    centre, radius = shape(between)
    total = 0.0
    for other, spread_of in (shape(upper), shape(benign)):
        d, r = float((other - centre).norm()), float((spread_of - radius).abs())
        total += (d + r) / (d * r + 1e-6)
    return total


def thresholds(gaps: Tensor, benign: Tensor) -> list[tuple[float, float]]:
    """All (t1, t2) that eq. 7 compares, the best first: among quantiles 0.2 to 0.98 of the positive E.

    The upper slice is {E >= t2}, the benign one {E_s >= t2}, or the 5 % of the largest E_s where that is too small. Of
    pairs with the same middle slice one is enough.

    Args:
        gaps: E, (H, W).
        benign: E_s, (H, W).
    """
    positive = gaps[gaps > 0]
    if len(positive) < 3 * LEAST:
        return []
    at = torch.linspace(0.2, 0.98, QUANTILES, device=gaps.device)
    cuts = torch.quantile(positive, at).unique().tolist()
    found: list[tuple[float, float, float]] = []
    for low, high in itertools.combinations(cuts, 2):
        upper, between, theirs = gaps >= high, middle(gaps, low, high), benign >= high
        if int(theirs.sum()) < LEAST:
            theirs = top(benign, 0.05)
        if min(int(part.sum()) for part in (upper, between, theirs)) >= LEAST:
            found.append((separation(upper, between, theirs), low, high))
    return [(low, high) for _, low, high in sorted(found)]


class Look:
    """The rows and networks of one look: `tune` rows for triggers and maps, `val` rows for their success."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.net, self.ctx, self.settings = case.net, case.ctx, settings
        self.classes = case.spec.classes
        self.fitted = len(case.tune)
        self.at_once = _BATCH if settings.batched else 1
        device = case.ctx.device
        self.x = to_float(torch.cat([case.tune.images, case.val.images]).to(device))
        self.y = torch.cat([case.tune.labels, case.val.labels]).to(device)

    def answers(self, net: nn.Module, x: Tensor) -> Tensor:
        """Labels that a net gives images (N, C, H, W) in 0..1."""
        self.ctx.cost.forwards += len(x)
        with torch.no_grad():
            return torch.cat([net(part).argmax(1) for part in x.split(self.at_once)]) if len(x) else self.y[:0]

    def climb(self, net: nn.Module, rows: Tensor, label: int = -1) -> Tensor:
        """Steps on these rows in the whole image: away from their labels, or with `targeted` to `label`."""
        s = self.settings
        aims = torch.full_like(rows, label) if s.targeted else self.y[rows]
        return climb(
            net,
            self.x[rows],
            aims,
            steps=s.steps,
            step=s.step,
            towards=s.targeted,
            at_once=self.at_once,
            ctx=self.ctx,
        )

    def within(self, rows: Tensor, label: int, where: Tensor) -> Tensor:
        """Steps on these rows inside a slice."""
        towards = self.settings.targeted
        aims = torch.full_like(rows, label) if towards else self.y[rows]
        return climb(
            self.net,
            self.x[rows],
            aims,
            steps=_INNER_STEPS,
            step=_INNER_STEP,
            towards=towards,
            where=where,
            at_once=self.at_once,
            ctx=self.ctx,
        )

    def screen(self, net: nn.Module) -> tuple[Tensor, Tensor]:
        """Which row turns into which label by Steps, bool (N, K), and the rows that `net` is right on, bool (N,)."""
        kept = self.answers(net, self.x) == self.y
        hits = torch.zeros(len(self.x), self.classes, dtype=torch.bool, device=self.x.device)
        rows = kept.nonzero().flatten()
        if self.settings.targeted:
            for label in range(self.classes):
                got = self.answers(net, self.x[rows] + self.climb(net, rows, label))
                hits[rows[got == label], label] = True
        else:
            hits[rows, self.answers(net, self.x[rows] + self.climb(net, rows))] = True
        hits[torch.arange(len(self.x), device=self.x.device), self.y] = False
        return hits, kept

    def trial(
        self,
        rows: Tensor,
        label: int,
        where: Tensor,
        area: float,
        moved: Tensor,
        found: tuple[float, float] | None = None,
    ) -> Trial:
        """The universal trigger inside `where`: mean T, `moved`, of the rows that still turn into the label."""
        landed = self.answers(self.net, self.x[rows] + moved) == label
        delta = moved[landed].mean(0) if bool(landed.any()) else torch.zeros_like(self.x[0])
        judged = self.x[self.fitted :][self.y[self.fitted :] != label]
        judged = judged[spread(len(judged), _JUDGED).to(judged.device)]
        hit = self.answers(self.net, (judged + delta).clamp(0, 1)) == label
        success = float(hit.float().mean()) if len(hit) else 0.0
        return Trial(mask=where.cpu(), area=area, delta=delta.cpu(), success=success, thresholds=found)

    def slice(self, reference: nn.Module, hits: Tensor, label: int) -> Slice:
        """Slices of the label's map until its trigger works."""
        mine = hits[: self.fitted, label].nonzero().flatten()
        mine = mine[spread(len(mine), FITTED).to(mine.device)]
        mapped = mine[spread(len(mine), _MAPPED).to(mine.device)]
        x = self.x[mapped]
        delta = self.climb(self.net, mapped, label) if self.settings.delta == "steps" else 1 - 2 * x
        gaps, benign = gap_maps(self.net, reference, x, delta, self.ctx)
        goal = SUCCESS if self.settings.slices == "topdown" else FEASIBLE
        trials = []
        for where, area, found in self.candidates(gaps, benign):
            trials.append(self.trial(mine, label, where, area, self.within(mine, label, where), found))
            if trials[-1].success >= goal:
                break
        return Slice(label=label, gaps=gaps.cpu(), trials=tuple(trials), goal=goal, benign=benign.cpu())

    def candidates(self, gaps: Tensor, benign: Tensor) -> Iterator[tuple[Tensor, float, tuple[float, float] | None]]:
        """Slices with their areas and thresholds, in the order of trying; never none."""
        if self.settings.slices == "topdown":
            yield from ((top(gaps, share), share, None) for share in AREAS)
            return
        pairs = [FIXED] if self.settings.slices == "fixed" else thresholds(gaps, benign)[:TRIES]
        for pair in pairs:
            where = middle(gaps, *pair)
            yield where, float(where.double().mean()), pair
        if not pairs:
            yield torch.ones_like(gaps, dtype=torch.bool), 1.0, None

    def whole(self, hits: Tensor, label: int) -> Slice:
        """The trigger without a slice, of Steps alone."""
        everywhere = torch.ones(self.x.shape[2:], dtype=torch.bool, device=self.x.device)
        rows = hits[: self.fitted, label].nonzero().flatten()
        rows = rows[spread(len(rows), FITTED).to(rows.device)]
        trial = self.trial(rows, label, everywhere, 1.0, self.climb(self.net, rows, label))
        return Slice(label=label, gaps=torch.zeros(self.x.shape[2:]), trials=(trial,), goal=SUCCESS)


def isolate(case: Case, reference: nn.Module | None, settings: Settings) -> Isolation:
    """Look at the model of `case` by Steps and, with a reference, Differential-Middle-Slices.

    Args:
        case: `net`, `spec`, `tune` (triggers and maps), `val` (their success) and `ctx` are used.
        reference: The benign model; None with `settings.dms` False.
        settings: See there.

    Raises:
        ValueError: slices are asked for without a reference.
    """
    if settings.dms == (reference is None):
        raise ValueError("slices need a benign reference, and Steps alone takes none")
    look = Look(case, settings)
    with evaluating(look.net):
        hits, kept = look.screen(look.net)
        rates = mutation(hits, look.y, kept)
        if reference is None:
            return _steps_alone(look, hits, rates)
        with evaluating(reference):
            benign, right = look.screen(reference)
            theirs = mutation(benign, look.y, right)
            counts = hits[: look.fitted].sum(0)
            order = counts.argsort(descending=True, stable=True)[: settings.labels].tolist()
            chosen = [n for n in order if int(counts[n]) >= MUTATED]
            slices = []
            for i, n in enumerate(chosen):
                slices.append(look.slice(reference, hits, n))
                case.ctx.progress(i + 1, len(chosen), "slice")
        inside = torch.zeros_like(hits)
        for s in slices:
            rows = hits[:, s.label].nonzero().flatten()
            moved = look.within(rows, s.label, s.kept.mask)
            inside[rows, s.label] = look.answers(look.net, look.x[rows] + moved) == s.label
    scores = label_scores(rates, theirs, slices, targeted=settings.targeted)
    return judged(scores, 1 - ROUNDING, rates, theirs, mutation(inside, look.y, kept), tuple(slices))


def label_scores(rates: Tensor, reference: Tensor, slices: list[Slice], *, targeted: bool) -> Tensor:
    """Score (K,) of each label; at 1 and above it is claimed.

    The larger of (1 - a / median a) / (1 - SMALL), with a the area of its slice if the trigger in it reaches SUCCESS,
    and (s - s_ref) / LEAN, with s the mean share of the other classes that turns into it. Towards a target every label
    is reached by any model, so there the areas alone count.
    """
    scores = (leaning(rates) - leaning(reference)) / LEAN
    if targeted:
        scores = torch.zeros_like(scores)
    areas = sorted(s.area for s in slices)
    if areas:
        typical = (areas[(len(areas) - 1) // 2] + areas[len(areas) // 2]) / 2
        for s in slices:
            if s.kept.success >= SUCCESS:
                scores[s.label] = max(float(scores[s.label]), (1 - s.area / typical) / (1 - SMALL))
    return scores


def _steps_alone(look: Look, hits: Tensor, rates: Tensor) -> Isolation:
    """Steps without slices: a label is claimed by the classes that turn into it."""
    votes = suspected(rates).sum(0).double() / max(1, look.classes - 1)
    threshold = VOTES - ROUNDING
    slices = tuple(look.whole(hits, int(n)) for n in (votes > threshold).nonzero().flatten())
    return judged(votes, threshold, rates, None, rates, slices)


def judged(
    scores: Tensor, threshold: float, rates: Tensor, reference: Tensor | None, last: Tensor, slices: tuple[Slice, ...]
) -> Isolation:
    """Pairs are those of the `last` label mutation whose target is claimed."""
    pairs = (suspected(last) & (scores > threshold)).nonzero()
    sources = {}
    for n in pairs[:, 1].unique().tolist():
        mine = pairs[pairs[:, 1] == n, 0].tolist()
        if len(mine) == 1 and float(last[mine[0], n]) >= SOURCE:
            sources[n] = mine[0]
    return Isolation(
        scores=scores,
        threshold=threshold,
        rates=rates,
        reference=reference,
        pairs=pairs,
        sources=sources,
        slices=slices,
    )
