"""Artificial Brain Stimulation: a neuron that alone drives any image to one class is a backdoor's."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.masks import apply
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.taps import behind, capture, look, taps

_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Images per pass through the net, at most."""
_STRAY = 2
"""Images that may have another winner than the neuron's label."""
_PER_LAYER = 3
"""Candidates of one layer in the first half of the list, at most."""
_OTHERS = 1e-4
"""Weight of the other activations of the candidate's layer."""
_COVERED = 0.01
"""A pixel counts as part of the mask above this."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A neuron (channel of a stage) that drives images to a label; `gap` ranks it."""

    site: str
    channel: int
    label: int
    gap: float


@dataclass(frozen=True, kw_only=True)
class ABS(Defense):
    """Stimulate every neuron, invert a trigger for the suspicious ones (Liu, Lee, Tao, Ma, Aafer, Zhang, CCS 2019).

    1. Stimulation. On `per_class` clean rows of each class, every channel of every stage's answer is replaced by the
       constants v_i = i `reach` max / `samples`, i = 0..`samples` - 1, with max the stage's largest activation on these
       rows, and the rest of the net is run.
    2. Selection. Per image and channel each label rises by max over i > 0 of z(v_i) - z(v_0); the label that rises most
       wins, by the gap to the second. A channel has the label that wins most often and is kept if that is on all images
       but two; its rank is the smallest gap among the images of other classes that the label wins, and above 0. At most
       three channels of a stage make the first half of the `top` candidates, the best of the others fill it up. Each
       label that is still without one gets its best channel in addition.
    3. Inversion. For every candidate (stage, channel c, label t) mask and pattern minimise, on a third of the rows,
       - sum a_c + 1e-4 sum of the stage's other activations - sum z_t + penalty, by Adam. With S = `area` of the image,
       the penalty is `weight` |m|_1 where more than S pixels of the mask exceed 0.01, twice that where more than
       (sqrt S + 2)^2 do, else 0. The mask is (tanh u + 1) / 2, u = 2 on the upper left square of S pixels, else -2;
       the pattern starts normal and is cut to [0, 1] after each update.
    4. REASR of a candidate: the share of the other two thirds, of classes other than t, that its trigger sends to t.
    5. Backdoored iff the largest REASR exceeds `threshold`. A label's score is the largest of its candidates; labels
       above the threshold are claimed with that candidate's mask and pattern.

    All candidates are inverted in one batch. They stand in `chosen` with their REASRs.

    Differs: neurons are channels of stages, not of every convolution, so that residual blocks are stimulated whole; the
    authors' sum over a layer and the next (before and after its activation) is one sum over the stage's answer. The
    target's logit has a term of its own, as in the authors' later PyTorch code; the neurons alone may not reach it.
    REASR is taken on rows that the inversion has not seen; the authors count on all. Groups of eight neurons do not
    lose a remainder. No label that some channel drives to goes without a candidate: among the authors' `top` alone the
    true one may be missing. Filter triggers (inverted in the space of pooled pixels) are left out.

    Args:
        per_class: Clean rows of each class, at most.
        samples: Constants per channel.
        reach: Largest constant, in units of the stage's largest activation, is `reach` (`samples` - 1) / `samples`.
        top: Candidates, to which come those of labels that none of them has.
        steps: Updates of the inversion.
        lr: Learning rate of Adam.
        area: Bound on the mask, as a share of the image.
        weight: Penalty per unit of the mask.
        threshold: REASR above which a label is flagged, 0..1.
        batched: All candidates in one batch; False inverts one at a time in every update, at the same result but for
            rounding: for timings. Channels are stimulated one after another either way.
    """

    INFO = {
        "title": "Artificial brain stimulation",
        "paper": "https://doi.org/10.1145/3319535.3363216",
        "bibtex": "@inproceedings{liu2019abs, title={{ABS}: Scanning Neural Networks for Back-doors by Artificial "
        "Brain Stimulation}, author={Liu, Yingqi and Lee, Wen-Chuan and Tao, Guanhong and Ma, Shiqing and Aafer, "
        "Yousra and Zhang, Xiangyu}, booktitle={ACM SIGSAC Conference on Computer and Communications Security}, "
        "pages={1265--1282}, year={2019}}",
        "kind": "inversion",
        "version": 2,
        "api": 1,
        "micro": {"per_class": 2, "samples": 2, "top": 5, "steps": 12, "area": 0.25},
        "effort": ["per_class", "samples", "top", "steps"],
        "traverses": False,
        "presumes": "a trigger of bounded size that works through single neurons, the same on all images",
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"conv"})

    per_class: int = 10
    samples: int = 5
    reach: float = 8.0
    top: int = 10
    steps: int = 1000
    lr: float = 0.1
    area: float = 0.0625
    weight: float = 500.0
    threshold: float = 0.88
    batched: bool = True

    def __post_init__(self) -> None:
        if min(self.per_class, self.top, self.steps) < 1 or self.samples < 2:
            raise ValueError("per_class, top and steps must be positive, samples at least 2")
        if not 0 < self.area <= 1:
            raise ValueError(f"area must lie in (0, 1], not {self.area}")

    def run(self, case: Case) -> Outcome:
        """The verdict, the largest REASR per label, and the triggers of flagged labels.

        Raises:
            NotApplicable: the net's stages answer with tokens, which have no channels to stimulate.
        """
        ctx, labels = case.ctx, case.clean.labels.cpu()
        net = copy.deepcopy(case.net).to(ctx.device).eval().requires_grad_(False)
        if not taps(net).spatial_convs:
            raise NotApplicable("needs_maps: its stages have no convolution")
        order = torch.randperm(len(labels), generator=ctx.generator("seeds"))
        seeds = torch.cat([order[labels[order] == t][: self.per_class] for t in range(case.spec.classes)])
        x, y = to_float(case.clean.images[seeds].to(ctx.device)), labels[seeds]
        rises = {site: self.stimulate(net, x, site, ctx) for site in taps(net).stages}
        found = select(rises, y, self.top)
        third = torch.arange(len(y)) % 3 == 0
        triggers = self.invert(net, x[third.to(x.device)], found, ctx) if found else []
        shares = [reasr(net, trigger, x[~third.to(x.device)], y[~third], ctx) for trigger in triggers]
        scores, claims = torch.zeros(case.spec.classes, dtype=torch.float64), {}
        for share, trigger in zip(shares, triggers, strict=True):
            if share > max(self.threshold, float(scores[trigger.target])):
                claims[trigger.target] = trigger
            scores[trigger.target] = max(share, float(scores[trigger.target]))
        named = [[c.site, c.channel, c.label, round(share, 4)] for c, share in zip(found, shares, strict=True)]
        return Outcome(
            verdict=Verdict(score=float(scores.max()), threshold=self.threshold, label_scores=scores),
            inverted=tuple(claims[t] for t in sorted(claims)),
            chosen={"claimed": sorted(claims), "candidates": named} | self.drawn(found, shares),
        )

    def drawn(self, found: Sequence[Candidate], shares: Sequence[float]) -> dict[str, Any]:
        """REASR of every candidate as bars for the cell page; nothing without a candidate."""
        bars = {f"{c.site}:{c.channel} to {c.label}": share for c, share in zip(found, shares, strict=True)}
        if not bars:
            return {}
        reasr = {
            "title": "REASR of the candidate neurons, in the order of selection",
            "x_label": "stage:channel, and the label it drives to",
            "y_label": "REASR",
            "threshold": self.threshold,
            "series": [{"label": "", "x": list(bars), "y": list(bars.values())}],
        }
        return {"curves": {"reasr": reasr}}

    @torch.no_grad()
    def stimulate(self, net: Classifier, x: Tensor, site: str, ctx: Ctx) -> Tensor:
        """How far each label rises, (channels, images, K) on the CPU: max over i > 0 of z(v_i) - z(v_0)."""
        at_once = _AT_ONCE.get(ctx.device.type, 256)
        answer = torch.cat([capture(net, part, [site])[site] for part in x.split(at_once)])
        top = float(answer.max())
        rises = []
        for channel in range(answer.shape[1]):
            levels = []
            for i in range(self.samples):
                changed = answer.clone()
                changed[:, channel] = i * self.reach * top / self.samples
                levels.append(torch.cat([behind(net, site, part) for part in changed.split(at_once)]))
                ctx.cost.forwards += len(x)
            rises.append((torch.stack(levels[1:]).amax(0) - levels[0]).cpu())
            ctx.progress(channel + 1, answer.shape[1], site)
        return torch.stack(rises)

    def invert(self, net: Classifier, x: Tensor, found: Sequence[Candidate], ctx: Ctx) -> list[Inverted]:
        """A trigger for each candidate, all in one batch, each as if it were alone."""
        n, (c, h, w) = len(found), x.shape[1:]
        size = self.area * h * w
        side = min(round(math.sqrt(size)), h, w)
        u = torch.full((n, 1, h, w), -2.0)
        u[:, :, :side, :side] = 2
        p = torch.randn(n, c, h, w, generator=ctx.generator("patterns")).clamp(0, 1)
        u, p = (v.to(ctx.device).requires_grad_() for v in (u, p))
        adam = torch.optim.Adam([u, p], lr=self.lr)
        parts = torch.arange(n).split(max(1, _AT_ONCE.get(ctx.device.type, 256) // len(x)) if self.batched else 1)
        for step in range(self.steps):
            adam.zero_grad()
            for part in parts:
                mask = (u[part].tanh() + 1) / 2
                stamped = x + mask[:, None] * (p[part][:, None] - x)
                logits, answers = look(net, stamped.flatten(0, 1), sorted({found[i].site for i in part.tolist()}))
                logits = logits.float()
                loss = penalty(mask, size, self.weight).sum()
                for row, i in enumerate(part.tolist()):
                    own = slice(row * len(x), (row + 1) * len(x))
                    loss = loss + drive(answers[found[i].site][own], logits[own], found[i])
                loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                p.clamp_(0, 1)
            ctx.cost.forwards += n * len(x)
            ctx.cost.backwards += n * len(x)
            ctx.progress(step + 1, self.steps, "invert")
        mask, pattern = ((u.detach().tanh() + 1) / 2).cpu(), p.detach().cpu()
        return [Inverted(target=found[i].label, mask=mask[i], pattern=pattern[i]) for i in range(n)]


def select(rises: dict[str, Tensor], labels: Tensor, top: int) -> list[Candidate]:
    """The candidates among all channels, from how far labels rise (channels, images, K); see step 2."""
    found = []
    for site, rise in rises.items():
        best, order = rise.topk(2, dim=2)
        winner, gap = order[:, :, 0], best[:, :, 0] - best[:, :, 1]
        for channel in range(len(rise)):
            counts = torch.bincount(winner[channel], minlength=rise.shape[2])
            label = int(counts.argmax())
            counted = (winner[channel] == label) & (labels != label)
            if int(counts[label]) >= len(labels) - _STRAY and bool(counted.any()):
                rank = float(gap[channel][counted].min())
                if rank > 0:  # else nothing reacts to it
                    found.append(Candidate(site=site, channel=channel, label=label, gap=rank))
    found.sort(key=lambda c: -c.gap)
    first: list[Candidate] = []
    for c in found:
        if len(first) < top // 2 and sum(f.site == c.site for f in first) < _PER_LAYER:
            first.append(c)
    chosen = [*first, *(c for c in found if c not in first)][:top]
    for c in found:
        if all(c.label != known.label for known in chosen):
            chosen.append(c)
    return chosen


def drive(answer: Tensor, logits: Tensor, c: Candidate) -> Tensor:
    """- sum a_c + 1e-4 sum of the others - sum z_t over images, from a stage's answer (B, channels, h, w)."""
    own = answer[:, c.channel].sum()
    return _OTHERS * (answer.sum() - own) - own - logits[:, c.label].sum()


def penalty(mask: Tensor, size: float, weight: float) -> Tensor:
    """Penalty (n,) of masks (n, 1, H, W): none up to `size` pixels, double beyond (sqrt size + 2)^2."""
    count = (mask > _COVERED).flatten(1).sum(1)
    factor = (count > size).to(mask.dtype) + (count > (math.sqrt(size) + 2) ** 2).to(mask.dtype)
    return weight * factor * mask.flatten(1).sum(1)


@torch.no_grad()
def reasr(net: Classifier, trigger: Inverted, x: Tensor, labels: Tensor, ctx: Ctx) -> float:
    """Share of the images of other classes that the trigger sends to its target; 0 where there are none."""
    x = x[(labels != trigger.target).to(x.device)]
    if not len(x):
        return 0.0
    ctx.cost.forwards += len(x)
    hits = [int((net(apply(trigger, part)).argmax(1) == trigger.target).sum()) for part in x.split(500)]
    return sum(hits) / len(x)
