"""Exact purification: unlearning with the true trigger, an upper bound."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sleeperbench import Access, Backdoor, Defense, ImageSet, Outcome, Role
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class ExactPurification(Defense):
    """Fine-tune with the true trigger on a tenth of the clean rows, under their true labels (oracle).

    The reference point of Min et al. (NeurIPS 2024) for what a repair can reach before and after re-activation.

    Where training and test trigger differ (`blended`), the rows carry the test trigger: it is what success is
    measured with, and what the deployed model will meet. Rows that already have the wanted label stay untouched:
    with the trigger they would teach the backdoor. Several triggers share the rows evenly.

    Differs: the paper gives neither optimiser nor learning rate; fine-tuning's are taken (SGD, momentum 0.9, weight
    decay 5e-4, cosine from 0.01). Its 20 epochs on 1,000 CIFAR-10 rows in batches of 128 are kept as 160 steps.

    Args:
        share: Share of the clean rows that get the trigger.
        lr: Learning rate at the start.
        steps: Updates.
    """

    INFO = {
        "title": "Exact purification",
        "paper": "https://arxiv.org/abs/2410.09838",
        "bibtex": "@inproceedings{min2024uncovering, title={Uncovering, Explaining, and Mitigating the Superficial "
        "Safety of Backdoor Defense}, author={Min, Rui and Qin, Zeyu and Zhang, Nevin L. and Shen, Li and Cheng, "
        "Minhao}, booktitle={Advances in Neural Information Processing Systems}, year={2024}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"steps": 20},
        "effort": ["steps"],
    }
    ACCESS = Access(clean=0.05, oracle=True)

    share: float = 0.1
    lr: float = 0.01
    steps: int = 160

    def run(self, case: Case) -> Outcome:
        """The purified model.

        Raises:
            NotApplicable: there is no trigger to unlearn.
        """
        if not case.oracle.triggers:
            raise NotApplicable("no_trigger")
        rows = triggered_rows(case.clean, case.oracle, self.share, case.ctx)
        model = tune(case.net, rows, ctx=case.ctx, lr=self.lr, steps=self.steps, weight_decay=5e-4, schedule="cosine")
        return Outcome(model=model)


def triggered_rows(clean: ImageSet, backdoor: Backdoor, share: float, ctx: Ctx) -> ImageSet:
    """`clean` with triggers on round(share N) random rows that count, at least one per trigger; labels stay true."""
    images = clean.images.clone()
    free = torch.ones(len(clean), dtype=torch.bool)
    order = torch.randperm(len(clean), generator=ctx.generator("rows"))
    each = max(1, round(share * len(clean) / len(backdoor.triggers)))
    for trigger in backdoor.triggers:
        allowed = free & trigger.targets.counts(clean.labels, clean.ids).cpu()
        chosen = order[allowed[order]][:each]
        free[chosen] = False
        images[chosen] = stamp(clean.rows(chosen), trigger, Role.TEST, ctx).images
    return replace(clean, images=images)
