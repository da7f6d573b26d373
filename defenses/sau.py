"""SAU: find what fools the backdoored model and the present one alike, then let them disagree on it."""

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
from sleeperbench.kit.pgd import ascent
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.tune import tune

NAMES = {f"eps={eps:g}": eps for eps in (0.05, 0.1, 0.2, 0.3)}
"""What the honest choice tries, the least aggressive first; the published bound is among them."""


@dataclass(frozen=True, kw_only=True)
class SAU(Defense):
    """Shared adversarial unlearning (Wei et al., NeurIPS 2023), with the settings of the authors' code.

    f_0 is the backdoored model, frozen; f starts as a copy of it. Per step, on a batch of B clean rows (x, y):

    1. Inner: delta per image, +eps in every pixel at first; `inner_steps` steps of size `step` along the sign of the
       falling gradient of beta_adv L_adv + beta_share JS, clipped to [-eps, eps]. L_adv = -1 / 2B times the sum of the
       cross-entropies of f and of f_0 at x + delta, each over the images where that model still gives the label that
       it gives at x. JS = 1 / B times the sum of the Jensen-Shannon divergences between both models' answers at
       x + delta, over the images that are not yet shared: both labels changed, and to the same one.
    2. Outer: an Adam step on CE(f(x), y) + weight L_sh, where L_sh = -1 / B times the sum of log(1 - p(yhat)) over the
       images that fool f_0: yhat, its answer at x + delta, is neither y nor its answer at x; p is f's at x + delta. As
       in the authors' code the logarithm is the mean of two forms that are equal but for clamps,
       log(1e-6 + min(0.999, sum of the other classes)) and log(1 + 1e-6 - max(0.001, p(yhat))).

    All parameters of f are tuned. All layers run in eval mode: BatchNorm normalises by its running statistics, which
    stay. It stops after `steps` and keeps the last weights. Images are not augmented, and x + delta may leave [0, 1]. A
    step costs, per image, 4 + 2 `inner_steps` passes forth and 2 + 2 `inner_steps` back. With a given `eps` all clean
    rows are trained on. With None every bound of 0.05, 0.1, 0.2, 0.3 is tried on the rows that `kit.candidates.split`
    leaves, and the largest that the honest rule accepts on the others is kept; all are in the outcome's path.

    Differs: the published 100 rounds over 2,500 CIFAR-10 rows in batches of 256 are kept as 1,000 steps, whatever the
    number of rows. The search takes all its steps also when every image is shared: its gradient is then 0. Clean
    answers are computed once per batch, not once per inner step. The adversarial training term, whose published weight
    is 0, and the variant with batch statistics are left out.

    Args:
        eps: Bound of a perturbation's pixels, of [0, 1]; None for the honest choice.
        step: Size of an inner step, in the same unit.
        inner_steps: Inner steps.
        beta_adv: Weight of L_adv in the search.
        beta_share: Weight of JS in the search.
        weight: Weight of L_sh in the outer loss.
        lr: Adam's rate, constant.
        steps: Outer steps.
        batch: Rows per step; all rows where there are fewer.
    """

    INFO = {
        "title": "SAU",
        "paper": "https://arxiv.org/abs/2307.10562",
        "bibtex": "@inproceedings{wei2023shared, title={Shared Adversarial Unlearning: Backdoor Mitigation by "
        "Unlearning Shared Adversarial Examples}, author={Wei, Shaokui and Zhang, Mingda and Zha, Hongyuan and Wu, "
        "Baoyuan}, booktitle={Advances in Neural Information Processing Systems}, year={2023}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"steps": 4, "batch": 32},
        "effort": ["steps", "inner_steps"],
        "presets": {"reduced": {"steps": 170}},
    }
    ACCESS = Access(clean=0.05)

    eps: float | None = 0.2
    step: float = 0.2
    inner_steps: int = 5
    beta_adv: float = 0.01
    beta_share: float = 1.0
    weight: float = 1.0
    lr: float = 1e-4
    steps: int = 1000
    batch: int = 256

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 < self.eps <= 1:
            raise ValueError(f"eps is {self.eps}; it must lie in 0..1, without 0, or be left out")

    def run(self, case: Case) -> Outcome:
        """The tuned model and, where the bound was chosen, all candidates."""
        if self.eps is not None:
            return Outcome(model=self.tuned(case, case.clean, self.eps))
        rows, held = split(case)
        picked = pick(case.net, self.candidates(case, rows), held, ctx=case.ctx, what="eps")
        if picked.name is None:
            return Outcome(chosen={"eps": None, **picked.about}, path=picked.path)
        chosen = {"eps": NAMES[picked.name], **picked.about}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=picked.path)

    def candidates(self, case: Case, rows: ImageSet) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """One model per bound."""
        for name, eps in NAMES.items():
            yield name, load(self.tuned(case, rows, eps), case.ctx.device), {}

    def tuned(self, case: Case, rows: ImageSet, eps: float) -> Model:
        """The model after unlearning on `rows` under one bound."""
        return tune(
            case.net,
            rows,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            augment=False,
            optimiser="adam",
            hooks=SharedUnlearning(case.net, self, eps, case.ctx),
        )


class SharedUnlearning(TrainHooks):
    """The search for shared perturbations, and the loss that unlearns them."""

    def __init__(self, net: Classifier, settings: SAU, eps: float, ctx: Ctx) -> None:
        super().__init__()
        self.reference = copy.deepcopy(net).to(ctx.device).eval().requires_grad_(False)
        self.settings, self.eps, self.ctx = settings, eps, ctx

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE(f(x), y) + weight L_sh."""
        # Eval mode for dropout too; without a graph f(x) would leave autocast's copies of the weights without one.
        with evaluating(net):
            logits = net(x).float()
            clean, clean_0 = logits.argmax(1), self.refer(x).argmax(1)
            delta = self.search(net, x, y, clean, clean_0)
            attacked, yhat = net(x + delta).float(), self.refer(x + delta).argmax(1)
        fools = (yhat != y) & (yhat != clean_0)
        return F.cross_entropy(logits, y) + self.settings.weight * sharing(attacked, yhat, fools)

    def search(self, net: nn.Module, x: Tensor, y: Tensor, clean: Tensor, clean_0: Tensor) -> Tensor:
        """Step 1: delta (N, C, H, W)."""
        s = self.settings

        def gain(delta: Tensor) -> Tensor:
            return -apart(net(x + delta).float(), self.refer(x + delta), y, clean, clean_0, s.beta_adv, s.beta_share)

        return ascent(gain, torch.full_like(x, self.eps), eps=self.eps, step=s.step, steps=s.inner_steps)

    def refer(self, x: Tensor) -> Tensor:
        """f_0's logits; counted."""
        out: Tensor = self.reference(x).float()
        self.ctx.cost.forwards += len(x)
        if out.requires_grad:
            self.ctx.cost.backwards += len(x)
        return out


def apart(
    logits: Tensor, logits_0: Tensor, y: Tensor, clean: Tensor, clean_0: Tensor, beta_adv: float, beta_share: float
) -> Tensor:
    """What step 1 descends on: beta_adv L_adv + beta_share JS, a scalar.

    Args:
        logits: f at x + delta, (N, K).
        logits_0: f_0 there.
        y: True labels (N,).
        clean: f's answers at x, (N,).
        clean_0: f_0's.
        beta_adv: Weight of L_adv.
        beta_share: Weight of JS.
    """
    now, now_0 = logits.argmax(1), logits_0.argmax(1)
    same, same_0 = now == clean, now_0 == clean_0
    shared = ~same & ~same_0 & (now == now_0)
    hits = F.cross_entropy(logits, y, reduction="none") * same + F.cross_entropy(logits_0, y, reduction="none") * same_0
    p, q = logits.softmax(1).clamp_min(1e-8), logits_0.softmax(1).clamp_min(1e-8)
    mean = (p + q) / 2
    js = ((p * (p.log() - mean.log()) + q * (q.log() - mean.log())) / 2).sum(1) * ~shared
    return (beta_share * js.sum() - beta_adv * hits.sum() / 2) / len(y)


def sharing(logits: Tensor, yhat: Tensor, fools: Tensor) -> Tensor:
    """L_sh: how much f at x + delta still gives `yhat` where that fools f_0; at least 0 but for 1e-6."""
    p = logits.softmax(1)
    at = F.one_hot(yhat, p.shape[1]).bool()
    others = p.masked_fill(at, 0).sum(1)
    wrong = p.gather(1, yhat[:, None])[:, 0]
    terms = (1e-6 + others.clamp_max(0.999)).log() + (1 + 1e-6 - wrong.clamp_min(0.001)).log()
    return -(terms * fools).sum() / 2 / len(yhat)
