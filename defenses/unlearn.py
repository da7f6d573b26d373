"""Unlearning with recovered triggers: one repair for every inversion method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Inverted, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.masks import appliable, apply
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class Unlearn(Defense):
    """Fine-tune so that the triggers which the wrapped method claims change nothing (Algorithm 3 of the IsTr paper).

    1. Take the recovered triggers A that `unlearn:<method>` claims. Without a claim the model is left as it is.
    2. Minimise mean CE(f(x), y) + mean CE(f(A(x)), y) over the clean rows, labels unchanged, both terms in one update
       and one pass through the net, BatchNorm in train mode.

    The trigger is put on after crop and flip, so that it lies where it was found. The same recipe serves every method.

    Differs: the paper gives neither epochs, nor learning rate, nor the size of the clean set; 20 epochs of SGD with
    momentum 0.9, constant learning rate 0.01 and weight decay 5e-4 are this project's choice, kept as the 390 steps
    that they are on 2,500 rows in batches of 128. Of several triggers each row draws one anew in every update, so that
    neither the weight of the second term nor the cost grows with their number.

    Args:
        lr: Learning rate.
        steps: Updates.
        batch: Rows per update, each once plain and once triggered; all rows where there are fewer.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "Unlearning of recovered triggers",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, "
        "journal={arXiv preprint arXiv:2508.04094}, year={2025}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "wrapper": True,
        "micro": {"steps": 20, "batch": 64},
        "effort": ["steps"],
    }
    ACCESS = Access(clean=0.05, inner="inverted")

    lr: float = 0.01
    steps: int = 390
    batch: int = 128
    weight_decay: float = 5e-4

    def run(self, case: Case) -> Outcome:
        """The repaired model; the given one where nothing is claimed.

        Raises:
            NotApplicable: triggers are claimed, but none that can be put on images here.
        """
        claims = case.inner.inverted
        usable = [inv for inv in claims if appliable(inv)]
        chosen = {"triggers": [inv.target for inv in usable]}
        if not claims:
            return Outcome(chosen=chosen)
        if not usable:
            raise NotApplicable(f"needs_stamp: none of {len(claims)} recovered triggers has a mask or a delta")
        model = tune(
            case.net,
            case.clean,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            hooks=Unlearning(usable, case.ctx),
        )
        return Outcome(model=model, chosen=chosen)


class Unlearning(TrainHooks):
    """The loss on a batch and on the same batch triggered, each row by one of `triggers`."""

    def __init__(self, triggers: Sequence[Inverted], ctx: Ctx) -> None:
        super().__init__()
        self.triggers = triggers
        self.gen = ctx.generator("unlearn")

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Mean CE(f(x), y) + mean CE(f(A(x)), y)."""
        stamped = x.clone()
        which = torch.randint(len(self.triggers), (len(x),), generator=self.gen)
        for i, trigger in enumerate(self.triggers):
            rows = (which == i).nonzero().flatten().to(x.device)
            stamped[rows] = apply(trigger, x[rows])
        # Twice the mean over both halves is the sum of their means.
        return 2 * F.cross_entropy(net(torch.cat([x, stamped])), torch.cat([y, y]))
