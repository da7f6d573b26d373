"""Entropy pruning: channels whose responses to the training set are least spread are pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.candidates import before_norms, outlying, prune_at
from sleeperbench.kit.gates import channels

BATCH = 500


@dataclass(frozen=True, kw_only=True)
class EntropyPruning(Defense):
    """Entropy pruning, EP (Zheng, Tang, Li, Liu, NeurIPS 2022); `dde` in the tables of BackdoorBench.

    1. Draw images from the training set as it was found, poison among them, and pass them in eval mode.
    2. Per channel entering a BatchNorm layer: the largest value over positions of each image, standardised over the
       images (divisor N - 1), as a histogram with bins of `width` from the layer's least value on.
    3. Per layer, gamma becomes 0 where the histogram's entropy falls below mean - u standard deviations: clean and
       poisoned images form two lumps in a backdoor's channel. Beta and statistics stay.

    No parameter gets a gradient and nothing is learnt: one shot. Labels are unused. Cost: one pass forward per image.

    `u` is the published value. This defender has no clean rows on which it could be chosen.

    Differs: every value falls into a bin; the released code leaves out values on an edge between bins and those in the
    last, incomplete one. Channels that answer alike to all images have no standard deviation: they are left out of
    the layer's mean and stay. Images are not augmented.

    Args:
        u: Standard deviations below the mean of a layer beyond which channels go; the authors have 3 on CIFAR-10, 4 on
            Tiny-ImageNet.
        images: Images drawn from the training set; all where there are fewer.
        width: Width of a bin, in standard deviations of the channel; BackdoorBench has 0.1.
    """

    INFO = {
        "title": "Entropy pruning",
        "paper": "https://proceedings.neurips.cc/paper_files/paper/2022/file/"
        "76917808731dae9e6d62c2a7a6afb542-Paper-Conference.pdf",
        "bibtex": "@inproceedings{zheng2022preactivation, title={Pre-activation Distributions Expose Backdoor "
        "Neurons}, author={Zheng, Runkai and Tang, Rongjun and Li, Jianze and Liu, Li}, booktitle={Advances in "
        "Neural Information Processing Systems}, year={2022}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"u": 1.0},
    }
    ACCESS = Access(clean=0, train=True)
    REQUIRES = frozenset({"bn"})

    u: float = 3.0
    images: int = 500
    width: float = 0.01

    def __post_init__(self) -> None:
        if self.images < 2 or self.width <= 0:
            raise ValueError(f"images is {self.images} and width {self.width}; at least 2 and more than 0 are needed")

    def run(self, case: Case) -> Outcome:
        """The pruned model."""
        gen = case.ctx.generator("images")
        images = case.train.images[torch.randperm(len(case.train), generator=gen)[: self.images]]
        parts = [before_norms(case.net, part, peaks, ctx=case.ctx) for part in images.split(BATCH)]
        scores = [entropies(torch.cat([p[name] for p in parts], 1), self.width) for name in channels(case.net)]
        keep = torch.cat([~outlying(-s, self.u) for s in scores])
        return prune_at(case, keep, {"u": self.u, "rows": len(images)})


def peaks(x: Tensor) -> Tensor:
    """The largest value over positions of (N, C, H, W), per channel and image: (C, N) on the CPU."""
    return x.amax((2, 3)).T.cpu()


def entropies(values: Tensor, width: float) -> Tensor:
    """Entropy of each channel's standardised values (C, N) in nats, float64 (C,); NaN where they are all equal."""
    found = torch.full((len(values),), torch.nan, dtype=torch.float64)
    alive = values.amax(1) > values.amin(1)
    if bool(alive.any()):
        v = values[alive].double()
        v = (v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True)
        bins = ((v - v.min()) / width).long()
        counts = torch.zeros(len(v), int(bins.max()) + 1, dtype=torch.float64)
        counts.scatter_add_(1, bins, torch.ones_like(v))
        found[alive] = torch.special.entr(counts / v.shape[1]).sum(1)
    return found
