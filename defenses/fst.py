"""FST: a new head, held away from the old one, makes the features move."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, Model
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.tune import tune

NAMES = {f"alpha={alpha:g}": alpha for alpha in (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)}
"""What the honest choice tries, the least aggressive first: the published weights lie among them."""


@dataclass(frozen=True, kw_only=True)
class FeatureShiftTuning(Defense):
    """Feature shift tuning (Min et al., NeurIPS 2023), with the settings of the authors' repository.

    1. The head's weight w_o (K, d) and its Frobenius norm are kept; head weight and bias are drawn anew, uniform in
       +-1/sqrt(d).
    2. Per step, on a batch of clean rows, cropped and flipped: SGD (momentum 0.9) on CE + alpha <w, w_o>, the sum over
       all products of the two weights.
    3. After each step w <- w |w_o| / |w|; without it the second term has no lower bound. The bias is in neither.

    All parameters are tuned. BatchNorm normalises by the batch and updates its running statistics. It stops after
    `steps` and keeps the last weights. A step costs one pass forth and one back per image. With a given `alpha` all
    clean rows are trained on. With None every alpha of 0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1 is tried on the rows that
    `kit.candidates.split` leaves, and the largest that the honest rule accepts on the others is kept; all are in the
    outcome's path. Needs a linear head.

    Differs: the published 10 epochs on 1,000 CIFAR-10 rows in batches of 128 are kept as 80 steps, whatever the number
    of rows. The cosine falls per step instead of per epoch.

    Args:
        alpha: Weight of the inner product with the old head; None for the honest choice. Its strength goes with the
            square of that head's norm.
        lr: Learning rate at the start of the cosine.
        steps: Updates.
        batch: Rows per update; all rows where there are fewer.
    """

    INFO = {
        "title": "FST",
        "paper": "https://arxiv.org/abs/2310.01875",
        "bibtex": "@inproceedings{min2023towards, title={Towards Stable Backdoor Purification through Feature Shift "
        "Tuning}, author={Min, Rui and Qin, Zeyu and Shen, Li and Cheng, Minhao}, booktitle={Advances in Neural "
        "Information Processing Systems}, year={2023}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"steps": 20, "batch": 64},
        "effort": ["steps"],
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"linear_head"})

    alpha: float | None = 0.1
    lr: float = 0.01
    steps: int = 80
    batch: int = 128

    def __post_init__(self) -> None:
        if self.alpha is not None and self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}; it must be at least 0, or be left out")

    def run(self, case: Case) -> Outcome:
        """The tuned model and, where alpha was chosen, all candidates."""
        if self.alpha is not None:
            return Outcome(model=self.tuned(case, case.clean, self.alpha))
        rows, held = split(case)
        picked = pick(case.net, self.candidates(case, rows), held, ctx=case.ctx, what="alpha")
        if picked.name is None:
            return Outcome(chosen={"alpha": None, **picked.about}, path=picked.path)
        chosen = {"alpha": NAMES[picked.name], **picked.about}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=picked.path)

    def candidates(self, case: Case, rows: ImageSet) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """One model per alpha."""
        for name, alpha in NAMES.items():
            yield name, load(self.tuned(case, rows, alpha), case.ctx.device), {}

    def tuned(self, case: Case, rows: ImageSet, alpha: float) -> Model:
        """The model after tuning on `rows` from a new head, the same for every alpha."""
        return tune(
            with_new_head(case.net, case.ctx),
            rows,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            schedule="cosine",
            hooks=Shift(case.net.body.head.weight, alpha),
        )


class Shift(TrainHooks):
    """The loss with the inner product of both heads, and the norm of the old one."""

    def __init__(self, old: Tensor, alpha: float) -> None:
        super().__init__()
        self.old, self.alpha = old.detach().clone(), alpha

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE + alpha <w, w_o>."""
        w = head(net).weight
        return F.cross_entropy(net(x), y) + self.alpha * (w * self.old.to(w.device)).sum()

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """An update, and the head's weight back to the old norm."""
        loss = super().step(net, opt, x, y, mark)
        w = head(net).weight
        with torch.no_grad():
            w.mul_(self.old.to(w.device).norm() / w.norm())
        return loss


@torch.no_grad()
def with_new_head(net: Classifier, ctx: Ctx) -> Classifier:
    """A copy of `net` whose head is drawn anew."""
    fresh = copy.deepcopy(net)
    linear = head(fresh)
    bound, gen = linear.in_features**-0.5, ctx.generator("head")
    for p in linear.parameters():
        p.copy_((2 * torch.rand(p.shape, generator=gen) - 1) * bound)
    return fresh


def head(net: Any) -> nn.Linear:
    """The last layer of a classifier."""
    found: nn.Linear = net.body.head
    return found
