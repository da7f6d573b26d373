"""DeBackdoor: search the triggers that known attacks could have used by simulated annealing, from scores alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.pixels import to_float

_AT_ONCE = 4096
"""Triggered images held in memory."""
_CELLS = 8
"""Side of the small picture that `blend` enlarges."""
_KNOTS = 4
"""Side of the grid of displacements that `warp` enlarges."""


@dataclass(frozen=True, kw_only=True)
class DeBackdoor(Defense):
    """A deductive search over trigger templates (Popovic et al., USENIX Security 2025), all-to-one.

    1. Templates, their parameters p in [0, 1]: `patch`, size x size free pixels at a free place; `blend`, a picture of
       8x8 cells, enlarged, of weight 0.1 to 0.2; `filter`, per channel a factor 0.7 to 1.3 and an offset up to 0.15;
       `wave`, a sinusoid of amplitude up to 0.15 and up to 8 periods along each side; `warp`, displacements up to 2/32
       of the side on a 4x4 grid, enlarged.
    2. Objective for label t: the continuous attack success rate, the mean over clean images x of other labels of
       sigmoid(`slope` d), with d = s_t(x') - max over i != t of s_i(x') for the scores s of the triggered image x'.
    3. Simulated annealing maximises it. A proposal draws a random subset of the parameters anew, 30 % of them at the
       start and one at the end; a patch's place is moved instead, by up to 10 pixels, shrinking alike. It is accepted
       if not worse, else with probability exp((new - old) / T), T falling linearly from `temperature` to 0. The best
       seen is kept. `chains` chains run for every label; those of patches keep to the cells of a square grid.
    4. The best trigger of each template and label is tried on held-out clean images of other labels; a label's score is
       its largest success rate over templates. Labels above `threshold` are flagged.

    Only the objective and the use of simulated annealing are published in what was read; templates, proposals,
    temperature, slope and threshold are ours. Search and held-out images are disjoint clean rows.

    Differs: strategies one-to-one and all-to-all and learned triggers are not searched.

    Args:
        templates: Which of the five.
        size: Side of the patch, in pixels.
        images: Clean images per label in the search.
        iterations: Proposals per chain.
        chains: Chains per label and template, a square number.
        slope: Factor in the sigmoid.
        temperature: T at the start.
        threshold: Success rate on held-out images above which a label is flagged.
        batched: All labels in one batch; False asks about the chains of one at a time, at the same result but for
            rounding: for timings.
    """

    INFO = {
        "title": "DeBackdoor",
        "paper": "https://arxiv.org/abs/2503.21305",
        "bibtex": "@inproceedings{popovic2025debackdoor, title={{DeBackdoor}: A Deductive Framework for Detecting "
        "Backdoor Attacks on Deep Models with Limited Data}, author={Popovic, Dorde and Sadeghi, Amin and Yu, Ting "
        "and Chawla, Sanjay and Khalil, Issa}, booktitle={USENIX Security Symposium}, year={2025}}",
        "kind": "inversion",
        "version": 1,
        "api": 1,
        "micro": {"images": 2, "iterations": 3, "chains": 1},
        "effort": ["images", "iterations", "chains"],
        "stamps": True,
        "traverses": True,
        "presumes": "a trigger of one of five families, as a patch of known size, the same on all images",
    }
    ACCESS = Access(model="scores", clean=0.05)

    templates: tuple[str, ...] = ("patch", "blend", "filter", "wave", "warp")
    size: int = 6
    images: int = 16
    iterations: int = 500
    chains: int = 9
    slope: float = 1.0
    temperature: float = 0.02
    threshold: float = 0.8
    batched: bool = True

    def __post_init__(self) -> None:
        unknown = sorted(set(self.templates) - set(TEMPLATES))
        if unknown or not self.templates:
            raise ValueError(f"templates are {self.templates}; they may be {', '.join(TEMPLATES)}")
        if min(self.size, self.images, self.iterations, self.chains) < 1 or math.isqrt(self.chains) ** 2 != self.chains:
            raise ValueError(f"chains is {self.chains}, a square number; all counts must be at least 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """A patch must fit."""
        if self.size > min(shape[1:]):
            raise ValueError(f"size {self.size} is larger than images of {shape[1]}x{shape[2]}")

    def run(self, case: Case) -> Outcome:
        """The verdict, a success rate per label, and the triggers of flagged labels.

        Raises:
            NotApplicable: a label has no search or held-out image of another label.
        """
        shape, labels = case.spec.shape, torch.arange(case.spec.classes)
        other = [[(part.labels != t).nonzero().flatten() for t in labels] for part in (case.tune, case.val)]
        if not all(len(rows) for part in other for rows in part):
            raise NotApplicable("too_few_clean_rows: a label has no image of another label to search or to test with")
        gen, search, test = case.ctx.generator("search"), to_float(case.tune.images), to_float(case.val.images)
        rate = torch.zeros(len(self.templates), len(labels))
        found: list[list[Tensor]] = [[] for _ in self.templates]
        for i, name in enumerate(self.templates):
            each = max(1, _AT_ONCE // (self.chains * self.images))
            for some in labels.split(each):
                x = torch.stack([search[_drawn(other[0][t], self.images, gen)] for t in some])
                best = self._anneal(case, name, x, some, gen)
                found[i] += list(best)
            for t, p in enumerate(found[i]):
                x = test[other[1][t]]
                answers = case.net(TEMPLATES[name](p[None], x[None], self.size)[0]).argmax(1)
                rate[i, t] = (answers == t).double().mean()
            case.ctx.progress(i + 1, len(self.templates), "templates")
        score, which = rate.max(0)
        claimed = [int(t) for t in (score > self.threshold).nonzero().flatten()]
        kept = {t: (self.templates[int(which[t])], found[int(which[t])][t]) for t in claimed}
        return Outcome(
            verdict=Verdict(score=float(score.max()), threshold=self.threshold, label_scores=score),
            inverted=tuple(claim(t, name, p, shape, self.size) for t, (name, p) in kept.items()),
            state=({str(t): p for t, (_, p) in kept.items()}, {str(t): name for t, (name, _) in kept.items()}),
            chosen={
                "claimed": claimed,
                "rates": {n: [round(v, 4) for v in r] for n, r in zip(self.templates, rate.tolist(), strict=True)},
            },
        )

    def stamp(self, state: tuple[Mapping[str, Tensor], Any], inv: Inverted, x: Tensor) -> Tensor:
        """Images with the recovered trigger of any template."""
        t = str(inv.target)
        return TEMPLATES[state[1][t]](state[0][t][None].to(x), x[None], self.size)[0]

    def _anneal(self, case: Case, name: str, x: Tensor, labels: Tensor, gen: Generator) -> Tensor:
        """Best parameters (L, P) for labels (L,) on images (L, V, C, H, W); all chains of all labels at once."""
        shape, chains = (x.shape[2], x.shape[3], x.shape[4]), self.chains
        low, high = bounds(name, shape, self.size, chains)
        low, high = low.repeat(len(labels), 1), high.repeat(len(labels), 1)
        x, aims = x.repeat_interleave(chains, 0), labels.repeat_interleave(chains)

        def rate(p: Tensor, x: Tensor, aims: Tensor) -> Tensor:
            scores = case.net(TEMPLATES[name](p, x, self.size).flatten(0, 1))
            return smooth_rate(scores.unflatten(0, (len(p), -1)), aims, self.slope)

        def objective(p: Tensor) -> Tensor:
            parts = (v.split(len(p) if self.batched else chains) for v in (p, x, aims))
            return torch.cat([rate(*part) for part in zip(*parts, strict=True)])

        p = low + (high - low) * torch.rand(low.shape, generator=gen)
        now = objective(p)
        best, top = p.clone(), now.clone()
        for i in range(self.iterations):
            left = 1 - i / max(1, self.iterations - 1)
            new = propose(p, low, high, left, reach(name, shape, self.size), gen)
            value = objective(new)
            yes = accepted(value, now, self.temperature * left, torch.rand(len(p), generator=gen))
            p, now = torch.where(yes[:, None], new, p), torch.where(yes, value, now)
            better = now > top
            best, top = torch.where(better[:, None], p, best), torch.where(better, now, top)
        return best.view(len(labels), chains, -1)[torch.arange(len(labels)), top.view(-1, chains).argmax(1)]


def smooth_rate(scores: Tensor, aims: Tensor, slope: float) -> Tensor:
    """Continuous attack success rate (A,) from scores (A, V, K) and wanted labels (A,)."""
    own = scores.gather(2, aims.view(-1, 1, 1).expand(-1, scores.shape[1], 1))[..., 0]
    others = scores.scatter(2, aims.view(-1, 1, 1).expand(-1, scores.shape[1], 1), -math.inf).amax(2)
    return (slope * (own - others)).sigmoid().mean(1)


def accepted(new: Tensor, old: Tensor, temperature: float, u: Tensor) -> Tensor:
    """Whether proposals (A,) are taken, for u from U[0, 1): Metropolis' rule for a maximum."""
    if temperature <= 0:
        return new >= old
    return (new >= old) | (u < ((new - old) / temperature).exp())


def propose(p: Tensor, low: Tensor, high: Tensor, left: float, place: Tensor, gen: Generator) -> Tensor:
    """Parameters (A, P) with a random subset changed: a share 0.3 `left`, at least one of each chain's.

    `place` (P,) says how far a parameter is moved at most, times `left`; 0 where it is drawn anew instead.
    """
    count = max(1, round(0.3 * left * p.shape[1]))
    chosen = torch.rand(p.shape, generator=gen).argsort(1).argsort(1) < count
    u = torch.rand(p.shape, generator=gen)
    moved = (p + (2 * u - 1) * place * left).clamp(low, high)
    return torch.where(chosen, torch.where(place > 0, moved, low + (high - low) * u), p)


def bounds(name: str, shape: tuple[int, int, int], size: int, chains: int) -> tuple[Tensor, Tensor]:
    """Bounds (chains, P) of the parameters: [0, 1], but for a patch's place, which keeps to the chain's cell."""
    low, high = torch.zeros(chains, _count(name, shape, size)), torch.ones(chains, _count(name, shape, size))
    if name == "patch":
        side = math.isqrt(chains)
        cell = torch.stack([torch.arange(chains) // side, torch.arange(chains) % side], 1)
        low[:, :2], high[:, :2] = cell / side, (cell + 1) / side
    return low, high


def reach(name: str, shape: tuple[int, int, int], size: int) -> Tensor:
    """Largest move (P,) of each parameter: ten pixels for a patch's place, else 0."""
    move = torch.zeros(_count(name, shape, size))
    if name == "patch":
        move[:2] = torch.tensor([10 / max(1, n - size + 1) for n in shape[1:]])
    return move


def _count(name: str, shape: tuple[int, int, int], size: int) -> int:
    c = shape[0]
    counts = {"patch": 2 + c * size**2, "blend": 1 + c * _CELLS**2, "filter": 2 * c, "wave": 4, "warp": 2 * _KNOTS**2}
    return counts[name]


def _drawn(rows: Tensor, n: int, gen: Generator) -> Tensor:
    """`n` of the rows in random order, over again where there are fewer."""
    return rows[torch.randperm(len(rows), generator=gen)][torch.arange(n) % len(rows)]


def patch_shape(p: Tensor, shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """Masks (A, 1, H, W) and patterns (A, C, H, W) of patches."""
    c, h, w = shape
    inside, cell = [], []
    for side, place in ((h, p[:, 0]), (w, p[:, 1])):
        first = (place * (side - size + 1)).floor().clamp(0, side - size)
        at = torch.arange(side, device=p.device) - first[:, None]
        inside.append((at >= 0) & (at < size))
        cell.append(at.clamp(0, size - 1).long())
    mask = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(p)
    colours = p[:, 2:].view(-1, c, size, size).permute(0, 2, 3, 1)
    rows = torch.arange(len(p), device=p.device)[:, None, None]
    return mask, colours[rows, cell[0][:, :, None], cell[1][:, None, :]].permute(0, 3, 1, 2) * mask


def blend_shape(p: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Even masks (A, 1, H, W) of 0.1 to 0.2 and smooth patterns (A, C, H, W)."""
    cells = p[:, 1:].view(-1, shape[0], _CELLS, _CELLS)
    pattern = F.interpolate(cells, size=shape[1:], mode="bilinear", align_corners=False)
    return (0.1 + 0.1 * p[:, :1]).view(-1, 1, 1, 1).expand(-1, 1, *shape[1:]), pattern


def wave_shape(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Additive sinusoids (A, C, H, W)."""
    rows, cols = (torch.arange(n, device=p.device) / n for n in shape[1:])
    amplitude, down, across, phase = (v.view(-1, 1, 1) for v in p.unbind(1))
    angle = 2 * math.pi * (8 * down * rows[:, None] + 8 * across * cols + phase)
    return (0.15 * amplitude * angle.sin())[:, None].expand(-1, shape[0], -1, -1)


def _mixed(x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    return x + mask[:, None] * (pattern[:, None] - x)


def _patch(p: Tensor, x: Tensor, size: int) -> Tensor:
    return _mixed(x, *patch_shape(p, x.shape[2:], size))


def _blend(p: Tensor, x: Tensor, size: int) -> Tensor:
    return _mixed(x, *blend_shape(p, x.shape[2:]))


def _wave(p: Tensor, x: Tensor, size: int) -> Tensor:
    return (x + wave_shape(p, x.shape[2:])[:, None]).clamp(0, 1)


def _filter(p: Tensor, x: Tensor, size: int) -> Tensor:
    factor, offset = (v.view(len(p), 1, -1, 1, 1) for v in p.chunk(2, 1))
    return ((0.7 + 0.6 * factor) * x + 0.3 * offset - 0.15).clamp(0, 1)


def _warp(p: Tensor, x: Tensor, size: int) -> Tensor:
    knots = (2 * p.view(-1, 2, _KNOTS, _KNOTS) - 1) * 4 / 32  # of a side of length 2: 2/32 of the side
    field = F.interpolate(knots, size=x.shape[3:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    own = F.affine_grid(torch.eye(2, 3).expand(len(p), -1, -1).to(x), [len(p), 1, *x.shape[3:]], align_corners=False)
    grid = (own + field).repeat_interleave(x.shape[1], 0)
    moved = F.grid_sample(x.flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return moved.clamp(0, 1).view_as(x)


TEMPLATES: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "patch": _patch,
    "blend": _blend,
    "filter": _filter,
    "wave": _wave,
    "warp": _warp,
}
"""Images (A, V, C, H, W) with the triggers of parameters (A, P), given the side of a patch."""


def claim(target: int, name: str, p: Tensor, shape: tuple[int, int, int], size: int) -> Inverted:
    """The recovered trigger: mask and pattern, a delta, or what `stamp` does."""
    if name == "wave":
        return Inverted(target=target, delta=wave_shape(p[None], shape)[0].contiguous())
    if name in ("patch", "blend"):
        mask, pattern = patch_shape(p[None], shape, size) if name == "patch" else blend_shape(p[None], shape)
        return Inverted(target=target, mask=mask[0].contiguous(), pattern=pattern[0].contiguous())
    return Inverted(target=target, uses_apply=True)
