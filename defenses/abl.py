"""ABL, anti-backdoor learning: find what is learnt too well, then unlearn it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.predict import hits, predict
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class AntiBackdoorLearning(Defense):
    """Train on the poisoned set, set the rows with the smallest loss apart, and ascend on them (Li et al. 2021).

    1. Isolation: train from scratch with local gradient ascent, sign(CE - gamma) CE on the batch mean: clean rows
       hover around a loss of `gamma` while poisoned ones fall below it.
    2. Rank all rows by their loss in eval mode, without augmentation; isolate the share with the smallest.
    3. Tuning: train the same network further on the other rows.
    4. Unlearning: train on the isolated rows with -CE, until the network gets fewer than 1/K of them right.

    Differs: step 3 falls along a cosine from `lr` instead of in drops at epochs 40 and 60, and without cutout; plain
    momentum instead of Nesterov's. Step 4 stops by accuracy on the isolated rows, which needs no test set; the
    released code saves by test thresholds, and without a stop ascent ruins the network. Momentum, batch, precision,
    and crop and flip of step 3 are the suite's; steps 1 and 4 train without augmentation, as released. Epochs are
    those of whatever training set is given, since training from scratch is measured against the suite's own epochs;
    the published ones are of 50,000 rows. An epoch drops its last short batch.

    Args:
        gamma: Loss that step 1 holds the batch mean at, in nats.
        isolate: Share of rows to isolate, 0..1; at least one row.
        isolation_epochs: Epochs of step 1.
        tuning_epochs: Epochs of step 3.
        unlearning_epochs: Most epochs of step 4.
        lr: Learning rate of step 1, and at the start of step 3.
        unlearning_lr: Learning rate of step 4.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "Anti-backdoor learning",
        "paper": "https://arxiv.org/abs/2110.11571",
        "bibtex": "@inproceedings{li2021antibackdoor, title={Anti-Backdoor Learning: Training Clean Models on Poisoned "
        "Data}, author={Li, Yige and Lyu, Xixiang and Koren, Nodens and Lyu, Lingjuan and Li, Bo and Ma, Xingjun}, "
        "booktitle={Advances in Neural Information Processing Systems}, year={2021}}",
        "kind": "in_training",
        "version": 1,
        "api": 1,
        "micro": {"isolation_epochs": 2, "tuning_epochs": 2, "unlearning_epochs": 2},
        "effort": ["isolation_epochs", "tuning_epochs", "unlearning_epochs"],
        "presets": {"reduced": {"isolation_epochs": 11, "tuning_epochs": 34, "unlearning_epochs": 11}},
    }
    ACCESS = Access(model="none", clean=0, train=True, control=True)

    gamma: float = 0.5
    isolate: float = 0.01
    isolation_epochs: int = 20
    tuning_epochs: int = 60
    unlearning_epochs: int = 20
    lr: float = 0.1
    unlearning_lr: float = 5e-4
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.isolate < 1:
            raise ValueError(f"isolate is {self.isolate}: give a share between 0 and 1")

    def run(self, case: Case) -> Outcome:
        """The network after unlearning; `keep` are the rows not isolated, `suspicion` is minus the loss of step 2."""
        ctx, train = case.ctx, case.train
        given = replace(case.recipe, lr=self.lr, weight_decay=self.weight_decay, schedule="constant")
        plain = replace(given, pad=0, flip=False)
        net = build(case.spec, seed=ctx.derive("init"))

        recipe = replace(plain, epochs=self.isolation_epochs)
        fit(net, train, recipe, _seeded(ctx, "isolate"), hooks=LocalAscent(self.gamma))
        loss = losses(net, train, ctx)
        isolated = torch.zeros(len(train), dtype=torch.bool)
        isolated[loss.argsort(stable=True)[: max(1, round(self.isolate * len(train)))]] = True

        recipe = replace(given, epochs=self.tuning_epochs, schedule="cosine")
        fit(net, train.rows(~isolated), recipe, _seeded(ctx, "tune"))
        suspects = train.rows(isolated)
        ascent = Unlearn(suspects, case.spec.classes, ctx)
        before = ascent.accuracy(net)
        done = 0
        if before >= 1 / case.spec.classes:
            recipe = replace(plain, epochs=self.unlearning_epochs, lr=self.unlearning_lr)
            done = len(fit(net, suspects, recipe, _seeded(ctx, "unlearn"), hooks=ascent).losses)
        count, total = hits(predict(net, train.images[~isolated], ctx=ctx), train.labels[~isolated])
        chosen = {
            "isolated": len(suspects),
            "unlearning_epochs": done,
            "isolated_accuracy_before": before,
            "isolated_accuracy": ascent.accuracy(net),
            "kept_accuracy": count / total,
        }
        return Outcome(model=pack(net), keep=~isolated, suspicion=-loss, chosen=chosen)


class LocalAscent(TrainHooks):
    """Descend while the batch's loss is above gamma, ascend below."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """sign(CE - gamma) CE of the batch mean."""
        ce = nn.functional.cross_entropy(net(x), y)
        return torch.sign(ce.detach() - self.gamma) * ce


class Unlearn(TrainHooks):
    """Ascend on `rows` until fewer than one in `classes` is answered as labelled."""

    def __init__(self, rows: ImageSet, classes: int, ctx: Ctx) -> None:
        super().__init__()
        self.suspects, self.classes, self.ctx = rows, classes, ctx

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """-CE."""
        return -nn.functional.cross_entropy(net(x), y)

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        """Stop at less than chance."""
        return self.accuracy(net) < 1 / self.classes

    def accuracy(self, net: nn.Module) -> float:
        """Share of the rows answered as labelled, in eval mode."""
        count, total = hits(predict(net, self.suspects.images, ctx=self.ctx), self.suspects.labels)
        return count / total


def losses(net: nn.Module, data: ImageSet, ctx: Ctx) -> Tensor:
    """Cross-entropy of each row, float64 (N,) in nats on the CPU, in eval mode."""
    # float32 rounds the smallest losses, which are those to be ranked, to zero.
    logits = predict(net, data.images, ctx=ctx).cpu().double()
    return nn.functional.cross_entropy(logits, data.labels.cpu(), reduction="none")


def _seeded(ctx: Ctx, stage: str) -> Ctx:
    """The same task with an order and views of its own, since one ctx gives every training the same."""
    return replace(ctx, seed=ctx.derive(stage))
