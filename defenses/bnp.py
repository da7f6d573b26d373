"""BNP: channels whose statistics on clean images are far from the running ones are pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Access, Defense, ImageSet, Outcome
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.candidates import before_norms, outlying, prune_at, prune_most
from sleeperbench.kit.classifier import Classifier

DEVIATIONS = tuple(10 - i / 2 for i in range(21))
"""10, 9.5, ... 0, the sweep of BackdoorBench, the least aggressive first."""


@dataclass(frozen=True, kw_only=True)
class BNP(Defense):
    """BatchNorm-statistics pruning (Zheng, Tang, Li, Liu, NeurIPS 2022).

    1. Pass one batch of clean images in eval mode and take mean m_b and variance v_b (divisor: values - 1) of each
       channel entering a BatchNorm layer.
    2. Its score is the divergence KL(N(m_b, v_b) || N(m_r, v_r)) from the running statistics, which training on
       poisoned batches left: log(s_r / s_b) + (v_b + (m_b - m_r)^2) / (2 v_r) - 1/2.
    3. Per layer, gamma becomes 0 where the score exceeds mean + u standard deviations; beta and statistics stay.

    No parameter gets a gradient and nothing is learnt: one shot. Labels of the batch are unused. Cost: one pass forward
    per image of the batch, for six batches (one with a given `u`), and each clean row once per value of `u`.

    `u`, unless given, is the smallest of 10, 9.5 ... 0 that the honest rule accepts by cross-validation: batches are
    drawn from all but one of five parts of the clean rows, and the models of all values answer that one. The value so
    chosen cuts the scores of a batch from all clean rows. All candidates of these are kept in the outcome's path
    (`u=3.0` stands for all down to the next name).

    Differs: the authors fix u and take 500 images. BatchNorm's eps is added to both variances, so that a dead channel's
    score is finite.

    Args:
        u: Standard deviations above the mean of a layer beyond which channels go, at least 0; None for the honest
            choice. The authors have 3 on CIFAR-10, 4 on Tiny-ImageNet.
        images: Clean images in the batch, drawn at random; all where there are fewer.
    """

    INFO = {
        "title": "BatchNorm-statistics pruning",
        "paper": "https://proceedings.neurips.cc/paper_files/paper/2022/file/"
        "76917808731dae9e6d62c2a7a6afb542-Paper-Conference.pdf",
        "bibtex": "@inproceedings{zheng2022preactivation, title={Pre-activation Distributions Expose Backdoor "
        "Neurons}, author={Zheng, Runkai and Tang, Rongjun and Li, Jianze and Liu, Li}, booktitle={Advances in "
        "Neural Information Processing Systems}, year={2022}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {},
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"bn"})

    u: float | None = None
    images: int = 500

    def __post_init__(self) -> None:
        if self.u is not None and self.u < 0:
            raise ValueError(f"u is {self.u}; it must be at least 0, or be left out")
        if self.images < 2:
            raise ValueError(f"images is {self.images}; at least 2 are needed")

    def run(self, case: Case) -> Outcome:
        """The pruned model and, where u was chosen, all candidates."""
        if self.u is not None:
            scores = self.scores(case.net, case.clean.images, case.ctx)
            return prune_at(case, kept(scores, self.u), {"u": self.u})

        def fit(rows: ImageSet) -> Callable[[float], Tensor]:
            scores = self.scores(case.net, rows.images, case.ctx)
            return lambda u: kept(scores, u)

        return prune_most(case, DEVIATIONS, fit, what="u", form="u={:.1f}")

    def scores(self, net: Classifier, images: Tensor, ctx: Ctx) -> dict[str, Tensor]:
        """Divergence of each channel, float64 (C,) per BatchNorm layer, from one batch of `images`.

        Raises:
            NotApplicable: no BatchNorm layer with gamma, or one that keeps no running statistics.
        """
        some = torch.randperm(len(images), generator=ctx.generator("images"))[: self.images]
        seen = before_norms(net, images[some], moments, ctx=ctx)
        found = {}
        for name, (mean, var) in seen.items():
            layer: Any = net.get_submodule(name)
            if layer.running_var is None:
                raise NotApplicable(f"needs_running_statistics: {name} keeps none")
            there = layer.running_mean.double(), layer.running_var.double() + layer.eps
            found[name] = divergence(mean, var + layer.eps, *there).cpu()
        return found


def moments(x: Tensor) -> Tensor:
    """Mean and unbiased variance of each channel of (N, C, H, W): float64 (2, C)."""
    var, mean = torch.var_mean(x, (0, 2, 3))
    return torch.stack([mean, var]).double()


def divergence(mean: Tensor, var: Tensor, mean_r: Tensor, var_r: Tensor) -> Tensor:
    """KL(N(mean, var) || N(mean_r, var_r)), in nats."""
    return 0.5 * (var_r / var).log() + (var + (mean - mean_r).square()) / (2 * var_r) - 0.5


def kept(scores: Mapping[str, Tensor], u: float) -> Tensor:
    """Channels whose score does not stand out in their layer: bool, flat."""
    return torch.cat([~outlying(s, u) for s in scores.values()])
