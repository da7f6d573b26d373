"""Cognitive distillation: little of a triggered image is enough for the answer that it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating

_BATCH = 250
"""Images at a time."""


@dataclass(frozen=True, kw_only=True)
class CognitiveDistillation(Defense):
    """The size of the smallest mask behind which an image gets the same logits (Huang et al., ICLR 2023).

    1. An image x gets a mask m = (tanh(u) + 1) / 2, one number per pixel for all channels, with u = 1 everywhere.
    2. `steps` steps of Adam on u (momenta 0.1 and 0.1) lower
       mean_k |z_k(x m + (1 - m) c) - z_k(x)| + `alpha` sum |m| + `beta` TV(m), with z the logits, c a colour drawn
       anew for each step, and TV the sum of squared differences of neighbours over the number of pixels.
    3. The image's score is -sum |m|.
    4. An image whose sum |m| is more than `gamma` standard deviations below the mean of clean rows is called triggered.

    This is CD-L; CD-F, which compares features instead of logits, is left out.

    Differs: the colours of the steps are drawn once and the same for all images, where the authors draw one per image,
    so that a score depends on its own input alone. Each image has its own loss; the authors' is the mean over a batch,
    whose size Adam divides out.

    Args:
        alpha: Weight of the mask's L1 norm.
        beta: Weight of the total variation.
        lr: Learning rate of Adam.
        steps: Steps per image.
        gamma: Standard deviations below the mean of clean rows at which the threshold lies.
        rows: Clean rows that mean and deviation are taken from, at most.
    """

    INFO = {
        "title": "Cognitive distillation",
        "paper": "https://arxiv.org/abs/2301.10908",
        "bibtex": "@inproceedings{huang2023distilling, title={Distilling Cognitive Backdoor Patterns within an Image}, "
        "author={Huang, Hanxun and Ma, Xingjun and Erfani, Sarah Monazam and Bailey, James}, "
        "booktitle={International Conference on Learning Representations}, year={2023}}",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {"steps": 10, "rows": 30},
        "effort": ["steps"],
        "scores": True,
        "traverses": False,
        "presumes": "a trigger that decides the answer with few pixels, whatever the rest of the image is",
    }
    ACCESS = Access(clean=0.05)

    alpha: float = 0.01
    beta: float = 10.0
    lr: float = 0.1
    steps: int = 100
    gamma: float = 1.0
    rows: int = 500

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) < 0 or not self.lr > 0:
            raise ValueError(f"alpha is {self.alpha}, beta {self.beta}, lr {self.lr}: give 0 or more, lr more than 0")
        if self.steps < 1 or self.rows < 2:
            raise ValueError(f"steps is {self.steps}, rows {self.rows}: give at least 1, and at least 2")

    def run(self, case: Case) -> Outcome:
        """The colours, as the second phase needs them, and the threshold from the clean rows' norms.

        Raises:
            NotApplicable: fewer than two clean rows.
        """
        n, ctx = min(self.rows, len(case.clean)), case.ctx
        if n < 2:
            raise NotApplicable(f"too_few_clean_rows: {n}, and a deviation needs two")
        colours = torch.rand(self.steps, case.clean.shape[0], generator=ctx.generator("colours"))
        some = torch.randperm(len(case.clean), generator=ctx.generator("rows"))[:n]
        images, found = case.clean.images[some].to(device_of(case.net)), []
        for part in images.split(_BATCH):
            found.append(self.masks(case.net, to_float(part), colours).sum((1, 2, 3)).cpu())
            ctx.progress(sum(map(len, found)), n, "masks of clean rows")
        ctx.cost.forwards += n * (1 + self.steps)
        ctx.cost.backwards += n * self.steps
        norms = torch.cat(found).double()
        threshold = float(norms.mean() - self.gamma * norms.std())
        chosen = {
            "clean_rows": n,
            "clean_mean": float(norms.mean()),
            "clean_std": float(norms.std()),
            "threshold": threshold,
            "clean_flagged": float((norms < threshold).double().mean()),
        }
        return Outcome(state=({"colours": colours}, None), alarm=-threshold, chosen=chosen)

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: nn.Module, x: Tensor) -> Tensor:
        """-sum |m|, (N,) from minus the number of pixels to 0; above minus the threshold is an alarm."""
        parts = [self.masks(net, part, state[0]["colours"]).sum((1, 2, 3)) for part in x.split(_BATCH)]
        return -torch.cat(parts)

    def masks(self, net: nn.Module, x: Tensor, colours: Tensor) -> Tensor:
        """Masks (N, 1, H, W) in [0, 1] of images (N, C, H, W), with the colours (steps, C) of their backgrounds."""
        u = torch.ones_like(x[:, :1])
        adam = torch.optim.Adam([u], lr=self.lr, betas=(0.1, 0.1))
        with evaluating(net), torch.no_grad():
            wanted = net(x).float()
        for colour in colours.to(x.device):
            u.requires_grad_()
            with evaluating(net), torch.enable_grad():
                m = shown(u)
                seen = x * m + (1 - m) * colour[:, None, None]
                apart = (net(seen).float() - wanted).abs().mean(1)
                loss = apart + self.alpha * m.sum((1, 2, 3)) + self.beta * variation(m)
            (u.grad,) = torch.autograd.grad(loss.sum(), u)
            adam.step()
        return shown(u.detach())


def shown(u: Tensor) -> Tensor:
    """The share of each pixel that a mask lets through."""
    return (u.tanh() + 1) / 2


def variation(m: Tensor) -> Tensor:
    """Squared differences of neighbours in masks (N, 1, H, W), summed and divided by the number of pixels, (N,)."""
    down, right = m.diff(dim=2).square().sum((1, 2, 3)), m.diff(dim=3).square().sum((1, 2, 3))
    return (down + right) / m[0].numel()
