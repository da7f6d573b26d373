"""Plain fine-tuning at another repair's cost: what as much work on the obvious would have done."""

from __future__ import annotations

from dataclasses import dataclass

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class SameBudget(Defense):
    """Fine-tune with as many images through the network as the wrapped defense took (control).

    One image forward and backward costs fine-tuning one of each; of the wrapped run's images the sum of forward and
    backward passes is halved, so that a method of many forward passes (scores, adversarial search) is met with as much
    work. A run of fewer images than a batch gets one step.

    All else is `ft`: SGD with momentum 0.9, cosine from `lr` to zero, augmentation, BatchNorm in train mode.

    Args:
        lr: Learning rate at the start.
        batch: Rows per update; all rows where there are fewer.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "Fine-tuning of the same budget",
        "paper": "",
        "bibtex": "",
        "kind": "repair",
        "control": True,
        "version": 1,
        "api": 1,
        "micro": {"batch": 64},
        "wrapper": True,
    }
    ACCESS = Access(clean=0.05, inner="cost")

    lr: float = 0.01
    batch: int = 256
    weight_decay: float = 5e-4

    def run(self, case: Case) -> Outcome:
        """The fine-tuned model.

        Raises:
            NotApplicable: the wrapped defense took no pass through the network.
        """
        images = (case.spent.forwards + case.spent.backwards) // 2
        if not images:
            raise NotApplicable("no_cost: the wrapped defense took no pass through the network")
        steps = max(1, images // min(self.batch, len(case.clean)))
        model = tune(
            case.net,
            case.clean,
            ctx=case.ctx,
            lr=self.lr,
            steps=steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        return Outcome(model=model, chosen={"images": images, "steps": steps})
