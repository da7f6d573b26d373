"""RNP: channels that cannot help a network to recover from unlearning what it knows of clean images are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.candidates import THRESHOLDS, prune_at, prune_most
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.gates import Gates
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.tune import tune

CHECK = 4
"""Steps between two looks at the stopping rule: the authors' epoch, 500 rows in batches of 128."""
DROP = 40
"""Steps after which unlearning's rate falls to a tenth, each time: ten of the authors' epochs."""


@dataclass(frozen=True, kw_only=True)
class RNP(Defense):
    """Reconstructive neuron pruning (Li, Lyu, Ma, Koren, Lyu, Li, Jiang, ICML 2023).

    1. Unlearn: ascend on the cross-entropy of clean rows, cropped and flipped. All parameters get gradients (SGD,
       momentum 0.9, weight decay), BatchNorm is in train mode; stop once at most `stop` of the rows of the last 4
       updates were answered right, and after `unlearn_steps` at the latest.
    2. Recover: freeze the unlearned network and give every BatchNorm channel a mask on gamma, 1 at first. The masks
       alone get gradients: SGD with momentum 0.9 on alpha times the cross-entropy of clean rows, with batch statistics,
       clamped to [0, 1] after every step. Stop after `recover_steps`.
    3. In the original network gamma becomes 0 wherever mask <= threshold; beta and running statistics stay.

    Cost: a pass forward and one back per image of both stages, which run `folds` + 1 times (once with a given
    threshold), and each clean row once per threshold.

    The threshold, unless given, is the largest of 0, 0.05 ... 0.90 that the honest rule accepts by cross-validation:
    both stages have all but one of `folds` parts of the clean rows, and the models of all thresholds answer that one.
    The threshold so chosen cuts masks learnt on all clean rows. All candidates of the last masks are kept in the
    outcome's path (`t=0.20` stands for all up to the next name).

    Differs: the authors show all thresholds on test data and choose none. Their 20 + 20 epochs of 500 CIFAR-10 rows in
    batches of 128 are 80 + 80 steps, kept whatever the number of rows, and the stopping rule is looked at every 4
    steps, their epoch. Epochs drop their last short batch. They clip gradients before these are computed, which does
    nothing; none are clipped here. `stop` is the same for any number of classes. Dropout is off while masks are learnt.

    Args:
        threshold: Channels with a mask up to it are removed, 0..1; None for the honest choice.
        stop: Share of right answers at which unlearning ends, 0..1.
        alpha: Factor on the loss of the second stage.
        unlearn_lr: Learning rate of the first stage at the start.
        recover_lr: Learning rate of the masks.
        unlearn_steps: Most updates of the first stage.
        recover_steps: Updates of the second stage.
        batch: Rows per update; all rows where there are fewer.
        weight_decay: L2 factor on all parameters in the first stage.
        folds: Parts of the clean rows for the honest choice, at least 2; each takes both stages.
    """

    INFO = {
        "title": "Reconstructive neuron pruning",
        "paper": "https://arxiv.org/abs/2305.14876",
        "bibtex": "@inproceedings{li2023reconstructive, title={Reconstructive Neuron Pruning for Backdoor Defense}, "
        "author={Li, Yige and Lyu, Xixiang and Ma, Xingjun and Koren, Nodens and Lyu, Lingjuan and Li, Bo and Jiang, "
        "Yu-Gang}, booktitle={International Conference on Machine Learning}, year={2023}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {"unlearn_steps": 12, "recover_steps": 6, "batch": 32, "folds": 2},
        "effort": ["unlearn_steps", "recover_steps", "folds"],
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"bn"})

    threshold: float | None = None
    stop: float = 0.2
    alpha: float = 0.2
    unlearn_lr: float = 0.01
    recover_lr: float = 0.2
    unlearn_steps: int = 80
    recover_steps: int = 80
    batch: int = 128
    weight_decay: float = 5e-4
    folds: int = 5

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must lie in 0..1, or be left out")
        if not 0 <= self.stop <= 1:
            raise ValueError(f"stop is {self.stop}; it must lie in 0..1")
        if min(self.unlearn_steps, self.recover_steps) < 1 or self.batch < 2:
            raise ValueError("unlearn_steps and recover_steps must be at least 1, batch at least 2")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; at least 2 are needed")

    def run(self, case: Case) -> Outcome:
        """The pruned model and, where the threshold was chosen, all candidates."""
        about: dict[str, Any] = {}

        def fit(rows: ImageSet) -> Callable[[float], Tensor]:
            unlearned, told = self.unlearn(case.net, rows, case.ctx)
            about.update(told)  # stays of the last fit, which has all rows
            mask = self.recover(unlearned, rows, case.ctx)
            return lambda t: mask > t

        if self.threshold is not None:
            found = prune_at(case, fit(case.clean)(self.threshold), {"threshold": self.threshold})
        else:
            found = prune_most(case, THRESHOLDS, fit, what="threshold", form="t={:.2f}", k=self.folds)
        return Outcome(model=found.model, chosen={**found.chosen, **about}, path=found.path)

    def unlearn(self, net: Classifier, data: ImageSet, ctx: Ctx) -> tuple[Classifier, dict[str, Any]]:
        """The unlearned network, and for how many steps and down to what accuracy."""
        ascent = Ascent(self.stop)
        model = tune(
            net,
            data,
            ctx=ctx,
            lr=self.unlearn_lr,
            steps=self.unlearn_steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            hooks=ascent,
        )
        return load(model, ctx.device), {"unlearn_steps": ascent.steps, "unlearned_accuracy": ascent.accuracy}

    def recover(self, net: Classifier, data: ImageSet, ctx: Ctx) -> Tensor:
        """The learnt masks (channels,) in [0, 1].

        Raises:
            FloatingPointError: they are not finite.
        """
        gates = Gates(net, ctx)
        images, labels = data.images.to(ctx.device), data.labels.to(ctx.device)
        mask = torch.ones(gates.size, device=ctx.device, requires_grad=True)
        opt = torch.optim.SGD([mask], lr=self.recover_lr, momentum=0.9)
        gen = ctx.generator("masks")
        for chosen in batches(len(data), self.batch, self.recover_steps, gen):
            rows = chosen.to(ctx.device)
            x = to_float(crop_flip(images[rows], ctx.recipe.pad, ctx.recipe.flip, gen))
            loss = self.alpha * F.cross_entropy(gates(x, mask), labels[rows])
            opt.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        if not bool(mask.isfinite().all()):
            raise FloatingPointError(
                f"masks are not finite after {self.recover_steps} steps: lower recover_lr (now {self.recover_lr:g})"
            )
        return mask.detach()


class Ascent(TrainHooks):
    """Ascend on cross-entropy until at most `stop` of the rows of `CHECK` updates are answered right."""

    def __init__(self, stop: float) -> None:
        super().__init__()
        self.stop, self.done = stop, False
        self.steps = 0
        self.accuracy: float | None = None
        self._hits, self._seen = 0, 0

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """-CE."""
        out = net(x)
        self._hits, self._seen = self._hits + int((out.argmax(1) == y).sum()), self._seen + len(y)
        return -F.cross_entropy(out, y)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """One update, or none once the rule is met: an epoch of the trainer may be longer than the authors'."""
        if self.done:
            return torch.zeros((), device=x.device)
        for group in opt.param_groups:  # the trainer sets the rate anew before every step
            group["lr"] *= 0.1 ** (self.steps // DROP)
        value = super().step(net, opt, x, y, mark)
        self.steps += 1
        if self.steps % CHECK == 0:
            self.accuracy = self._hits / self._seen
            self.done = self.accuracy <= self.stop
            self._hits = self._seen = 0
        return value

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        """Whether the rule is met."""
        return self.done


def batches(n: int, size: int, steps: int, gen: Generator) -> Iterator[Tensor]:
    """`steps` batches of rows, shuffled anew in each epoch, which drops its last short batch."""
    size = min(size, n)
    done = 0
    while True:
        order = torch.randperm(n, generator=gen)
        for i in range(n // size):
            if done == steps:
                return
            yield order[i * size : (i + 1) * size]
            done += 1
