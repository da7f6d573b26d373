"""ANP: channels that an adversary can turn into a backdoor most easily are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.candidates import THRESHOLDS, prune_at, prune_most
from sleeperbench.kit.gates import Gates
from sleeperbench.kit.pixels import to_float


@dataclass(frozen=True, kw_only=True)
class AdversarialNeuronPruning(Defense):
    """Adversarial neuron pruning (Wu and Wang, NeurIPS 2021).

    Every BatchNorm channel has a mask m, 1 at first, and adversarial changes delta and xi: gamma' = gamma (m + delta),
    beta' = beta (1 + xi). Per step, on a batch of clean rows drawn with replacement, cropped and flipped:

    1. delta and xi start uniform in [-eps, eps] and take one step of size eps along the sign of the loss's gradient
       (ascent, without projection).
    2. The masks take an SGD step (momentum 0.9) on alpha L(m, 0, 0) + (1 - alpha) L(m, delta, xi), cross-entropy with
       batch statistics in BatchNorm, and are clamped to [0, 1].
    3. In the end gamma is set to 0 in the original network wherever m <= threshold; beta stays.

    The threshold, unless given, is the largest of 0, 0.05 ... 0.90 that the benchmark's honest rule accepts by
    cross-validation: for each of `folds` parts of the clean rows masks are learnt on the others, and the models of all
    thresholds answer the part left out. The threshold so chosen cuts masks that are learnt on all clean rows. With
    fewer than 114 of these no threshold can be accepted and the model stays as it is. All candidates of the last masks
    are kept in the outcome's path; `t=0.20` stands for all thresholds up to the next name, since they remove the same
    channels.

    Cost: 3 passes forward and 3 back per row of a batch and step, for `folds` + 1 masks (with a given threshold for
    one); and each clean row once per threshold.

    Differs: the authors give no rule for the threshold (0.2 is the usual value with their settings), BackdoorBench and
    Min et al. take the best one on test data. The authors have 500 clean rows on CIFAR-10. Dropout is off while masks
    are learnt.

    Args:
        threshold: Channels with a mask up to it are removed, 0..1; None for the honest choice.
        eps: Size of the adversarial start and step.
        alpha: Weight of the loss without adversary, 0..1.
        lr: Learning rate of the masks.
        steps: Updates of the masks.
        batch: Rows per update.
        folds: Parts of the clean rows for the honest choice, at least 2; each takes masks of its own.
    """

    INFO = {
        "title": "ANP",
        "paper": "https://arxiv.org/abs/2110.14430",
        "bibtex": "@inproceedings{wu2021adversarial, title={Adversarial Neuron Pruning Purifies Backdoored Deep "
        "Models}, author={Wu, Dongxian and Wang, Yisen}, booktitle={Advances in Neural Information Processing "
        "Systems}, year={2021}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {"steps": 7, "batch": 32, "folds": 2},
        "effort": ["steps", "folds"],
        "presets": {"reduced": {"steps": 530, "folds": 2}},
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"bn"})

    threshold: float | None = None
    eps: float = 0.4
    alpha: float = 0.2
    lr: float = 0.2
    steps: int = 2000
    batch: int = 128
    folds: int = 5

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must lie in 0..1, or be left out")
        if not 0 <= self.alpha <= 1 or self.eps < 0:
            raise ValueError(f"alpha is {self.alpha} and eps {self.eps}; they must lie in 0..1 and be at least 0")
        if self.steps < 1 or self.batch < 2:
            raise ValueError(f"steps is {self.steps} and batch {self.batch}; at least 1 and 2 are needed")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; at least 2 are needed")

    def run(self, case: Case) -> Outcome:
        """The pruned model and, where the threshold was chosen, all candidates."""
        if self.threshold is not None:
            keep = self.masks(case.net, case.clean, case.ctx) > self.threshold
            return prune_at(case, keep, {"threshold": self.threshold})

        def fit(rows: ImageSet) -> Callable[[float], Tensor]:
            mask = self.masks(case.net, rows, case.ctx)
            return lambda t: mask > t

        return prune_most(case, THRESHOLDS, fit, what="threshold", form="t={:.2f}", k=self.folds)

    def masks(self, net: Any, data: ImageSet, ctx: Ctx) -> Tensor:
        """The learnt masks (channels,) in [0, 1].

        Raises:
            FloatingPointError: they are not finite.
        """
        gates = Gates(net, ctx)
        images, labels = data.images.to(ctx.device), data.labels.to(ctx.device)
        mask = torch.ones(gates.size, device=ctx.device, requires_grad=True)
        opt = torch.optim.SGD([mask], lr=self.lr, momentum=0.9)
        gen = ctx.generator("masks")
        for step in range(self.steps):
            rows = torch.randint(len(data), (self.batch,), generator=gen).to(ctx.device)
            x, y = to_float(crop_flip(images[rows], ctx.recipe.pad, ctx.recipe.flip, gen)), labels[rows]
            delta, xi = self.adversary(gates, mask.detach(), x, y, gen)
            attacked = F.cross_entropy(gates(x, mask, delta, xi), y)
            loss = self.alpha * F.cross_entropy(gates(x, mask), y) + (1 - self.alpha) * attacked
            opt.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
            if (step + 1) % 50 == 0 or step + 1 == self.steps:
                ctx.progress(step + 1, self.steps, "masks")
        if not bool(mask.isfinite().all()):
            raise FloatingPointError(f"masks are not finite after {self.steps} steps: lower lr (now {self.lr:g})")
        return mask.detach()

    def adversary(self, gates: Gates, mask: Tensor, x: Tensor, y: Tensor, gen: Generator) -> tuple[Tensor, Tensor]:
        """The changes delta and xi (channels,) after one step of ascent from a random start."""
        start = (2 * torch.rand(2, gates.size, generator=gen) - 1) * self.eps
        delta, xi = start.to(mask.device).requires_grad_()
        loss = F.cross_entropy(gates(x, mask, delta, xi), y)
        up = torch.autograd.grad(loss, (delta, xi))
        return delta.detach() + self.eps * up[0].sign(), xi.detach() + self.eps * up[1].sign()
