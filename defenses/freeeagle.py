"""FreeEagle: what one class's features, made up by optimisation, leak to the target of a backdoor; without any data."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.anomaly import LEAST
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.taps import behind, capture, taps

_INFINITE = 1e6
"""Stands for an infinite metric, which tables cannot hold."""
_HIGHEST = 999.0
"""Upper bound of made-up features behind a ReLU."""
_PAIRS = 5
"""How many of the largest leaks are shown."""


@dataclass(frozen=True, kw_only=True)
class FreeEagle(Defense):
    """Data-free detection from intermediate representations (Fu, Zhang, Ji et al., USENIX Security 2023).

    1. The net is cut into f = h(e(x)) behind the last stage but `later`.
    2. For every class c a representation r_c, uniform in [0, 1] at the start, minimises CE(h(r), c) by Adam with
       `weight_decay` (an L2 term), `steps` steps. Where e ends in a ReLU, r is cut to [0, 999] after each step.
    3. Q[s, t] = softmax(h(r_s))_t, diagonal 0; v_t = mean of Q[s, t] over s != t: what other classes leak to t.
    4. Metric (max v - Q3) / (Q3 - Q1), with Q1 and Q3 the values at positions int(n / 4) and int(3 n / 4) of the n
       values of v that are not 0, in ascending order.
    5. Backdoored iff the metric exceeds `threshold`; the suspected target is the class of max v.
    6. Pairs: the large entries of Q are the (source, target) of a backdoor, class-specific ones among them. Named are
       those whose metric, that of step 4 over all entries of Q, exceeds `threshold`.

    All classes are optimised in one batch (`batched`); of e nothing is run but one blank image. The largest entries of
    Q and v stand in `chosen`.

    Differs: the authors take a threshold from 30 % of the models they judge; the fixed 2 is a rule of thumb, set
    beforehand. They look at Q for pairs and have no rule which entries are large; the one of step 6 is this project's.
    Whether e ends in a ReLU is seen from its answers to 16 random images, none of them negative, and not
    from the architecture's name. One representation per class, as in the released settings.

    Args:
        steps: Steps of Adam.
        lr: Its learning rate.
        weight_decay: Its L2 factor on r.
        later: Stages that belong to h, besides the head; 0 leaves pooling and the head.
        threshold: Metric above which the model is backdoored, and a pair is named.
        batched: All classes in one pass; False sends one at a time through in every step, at the same result but for
            rounding: for timings.
    """

    INFO = {
        "title": "FreeEagle",
        "paper": "https://www.usenix.org/conference/usenixsecurity23/presentation/fu-chong",
        "bibtex": "@inproceedings{fu2023freeeagle, title={{FreeEagle}: Detecting Complex Neural Trojans in Data-Free "
        "Cases}, author={Fu, Chong and Zhang, Xuhong and Ji, Shouling and Wang, Ting and Lin, Peng and Feng, Yanghe "
        "and Yin, Jianwei}, booktitle={USENIX Security Symposium}, year={2023}}",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {"steps": 20},
        "effort": ["steps"],
        "traverses": True,
        "presumes": "later layers that lean to the target whatever the class; nothing of the trigger's shape",
    }
    ACCESS = Access(clean=0)

    steps: int = 1000
    lr: float = 0.01
    weight_decay: float = 5e-3
    later: int = 1
    threshold: float = 2.0
    batched: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.later < 0:
            raise ValueError("steps must be positive and later not negative")

    def run(self, case: Case) -> Outcome:
        """The verdict, with a metric per class, and pairs.

        Raises:
            NotApplicable: too few classes, or too few stages to cut at.
        """
        classes = case.spec.classes
        if classes < LEAST:
            raise NotApplicable(f"too_few_classes: {classes}; quartiles need {LEAST}")
        net = copy.deepcopy(case.net).to(case.ctx.device).eval().requires_grad_(False)
        stages = taps(net).stages
        if len(stages) <= self.later:
            raise NotApplicable(f"too_few_stages: {len(stages)}; {self.later} are left behind the cut")
        q = posteriors(net, stages[-1 - self.later], self.represent(net, stages[-1 - self.later], case.ctx))
        leaks = q.sum(0) / (classes - 1)
        scores = metric(leaks)
        largest = q.flatten().topk(_PAIRS).indices.tolist()
        return Outcome(
            verdict=Verdict(
                score=float(scores.max()),
                threshold=self.threshold,
                label_scores=scores,
                pairs=(metric(q.flatten()).view_as(q) > self.threshold).nonzero(),
            ),
            chosen={
                "target": int(leaks.argmax()),
                "leaks": [round(v, 6) for v in leaks.tolist()],
                "pairs": [[i // classes, i % classes, round(float(q.flatten()[i]), 6)] for i in largest],
            },
        )

    def represent(self, net: Classifier, site: str, ctx: Ctx) -> Tensor:
        """The r of every class, (K, ...), of the shape that `site` answers with."""
        classes, shape = net.spec.classes, net.spec.shape
        noise = torch.rand(16, *shape, generator=ctx.generator("images")).to(ctx.device)
        with torch.no_grad():
            answer = capture(net, noise, [site])[site]
        start = torch.rand(classes, *answer.shape[1:], generator=ctx.generator("representations"))
        r = start.to(ctx.device).requires_grad_()
        rectified = bool((answer >= 0).all())
        wanted = torch.arange(classes, device=ctx.device)
        adam = torch.optim.Adam([r], lr=self.lr, weight_decay=self.weight_decay)
        for step in range(self.steps):
            adam.zero_grad()
            # The sum gives each class its own gradient.
            for c in wanted.split(classes if self.batched else 1):
                F.cross_entropy(behind(net, site, r[c]), c, reduction="sum").backward()  # type: ignore[no-untyped-call]
            adam.step()
            if rectified:
                with torch.no_grad():
                    r.clamp_(0, _HIGHEST)
            ctx.cost.forwards += classes
            ctx.cost.backwards += classes
            ctx.progress(step + 1, self.steps, "represent")
        return r.detach()


def posteriors(net: Classifier, site: str, r: Tensor) -> Tensor:
    """Q, float64 (K, K) on the CPU: row s holds the posteriors of r_s, its own class at 0."""
    with torch.no_grad():
        q = behind(net, site, r).double().softmax(1).cpu()
    return q.fill_diagonal_(0)


def metric(leaks: Tensor) -> Tensor:
    """(v - Q3) / (Q3 - Q1) of each value, float64 (N,); quartiles of those that are not 0; 0 where there are none."""
    known = leaks[leaks != 0].sort().values
    if not len(known):
        return torch.zeros_like(leaks)
    low, high = known[int(0.25 * len(known))], known[int(0.75 * len(known))]
    gap = leaks - high
    return torch.where(gap == 0, 0.0, gap / (high - low)).clamp(-_INFINITE, _INFINITE)
