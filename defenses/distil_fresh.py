"""Distillation into a fresh network: what passes through the answers on clean rows alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.distil import OUTPUT, Taught
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class DistilFresh(Defense):
    """Train a new network on the attacked model's answers to clean rows (control; Hinton, Vinyals, Dean 2015).

    Per step, on an augmented batch of clean rows: loss = T^2 KL(softmax(teacher / T) || softmax(student / T)); labels
    are not used. The teacher is in eval mode and stays as it is.

    No weight comes from the attacked model, so what wakes here can only have come through its answers. Beside
    `scratch_on_clean`, which has the labels instead, it tells what the attacked model's knowledge is worth.

    The suite's recipe (rate, decay, schedule, augmentation) is taken with as many steps as plain fine-tuning takes.

    Args:
        temperature: T, above 0; 4 is usual for networks of ten classes.
        steps: Updates; those of `ft`.
        batch: Rows per update; all rows where there are fewer.
    """

    INFO = {
        "title": "Distillation into a fresh network",
        "paper": "https://arxiv.org/abs/1503.02531",
        "bibtex": "@article{hinton2015distilling, title={Distilling the Knowledge in a Neural Network}, "
        "author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff}, journal={arXiv:1503.02531}, year={2015}}",
        "kind": "repair",
        "control": True,
        "version": 1,
        "api": 1,
        "micro": {"steps": 20, "batch": 64},
        "effort": ["steps"],
        "descends": False,
    }
    ACCESS = Access(clean=0.05)

    temperature: float = 4.0
    steps: int = 1000
    batch: int = 256

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")

    def run(self, case: Case) -> Outcome:
        """The student; all clean rows are trained on, since nothing is chosen."""
        net = build(case.spec, seed=case.ctx.derive("init"))
        hooks = Distillation(case.net, self.temperature, case.ctx)
        fit(net, case.clean, replace(case.recipe, batch=self.batch), case.ctx, hooks=hooks, steps=self.steps)
        return Outcome(model=pack(net))


class Distillation(Taught):
    """The student's loss against a teacher that only answers."""

    def __init__(self, teacher: Classifier, temperature: float, ctx: Ctx) -> None:
        super().__init__(teacher, [OUTPUT], ctx)
        self.temperature = temperature

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """T^2 KL(teacher || student), mean over the batch."""
        wanted = (self.answers(x)[OUTPUT] / self.temperature).softmax(1)
        given = (net(x) / self.temperature).log_softmax(1)
        return self.temperature**2 * F.kl_div(given, wanted, reduction="batchmean")
