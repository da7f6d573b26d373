"""Confusion training: wrong labels on clean rows break every rule but the trigger's; what is still learnt is poison."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import predict
from sleeperbench.kit.taps import features
from sleeperbench.kit.train import fit

SHARES = (1 / 2, 1 / 5, 1 / 25, 1 / 50, 1 / 100)
"""Share of the training set that each round but the last hands to the next one, as released."""
FEWEST = (50, 50, 50, 50, 100)
"""One row in so many of each class is handed on at least, as released."""
RATES = (0.001, 0.001, 0.001, 0.01, 0.01, 0.01)
"""Learning rate of confusion training, by round; those for CIFAR-10."""
LAMBDAS = (20, 20, 20, 30, 30, 15)
"""How many times as much clean and inspected batch weigh together as the inspected one, by round; for CIFAR-10."""
EVERY = 2
"""An inspected batch comes with every second clean one."""
RIDGE = 0.001
"""Added to the variances of the two groups' projections."""


@dataclass(frozen=True, kw_only=True)
class ConfusionTraining(Defense):
    """Learn the training set and wrong labels of clean rows at once; drop what is still answered (Qi et al. 2023).

    Six rounds, the first with the whole training set as its pool:

    1. Pretrain on the pool, from the base model of the round before (the first from scratch); the last round also on
       the clean rows. CE, constant learning rate, no augmentation.
    2. Confusion training of a copy: every step takes a batch of clean rows labelled (p + s) mod K, p the answer of the
       model under test and s = 1, 2, ... K - 1, 1, ... by step; every second step also a batch of the pool. The loss is
       ((lambda - 1) CE(clean, confused) + inspected) / lambda, where `inspected` is the mean of the pool rows' CE
       weighted by 1 / w_y, w_c = sqrt(share of class c in the pool + 0.001), all 1 in the last round.
    3. The next pool: the 1/2, 1/5, 1/25, 1/50, 1/100 of all training rows with the least loss in eval mode, and of each
       class at least 1/50 of its rows, 1/100 the last time.

    Then, with the last confused model:

    4. Suspects are the rows that it still answers as labelled. Per class, features are projected on their two principal
       directions; the ratio is exp of the mean log-likelihood of all rows under two normal distributions (suspects,
       others) minus that under the others' alone.
    5. Suspects are dropped in the class with the largest ratio if that exceeds `largest`, and in those above `ratio`.

    Retraining on the rest is the wrapper `retrain`.

    Differs: the model under test stands for the released code's own model trained on the whole set with augmentation.
    A pool never has fewer rows than a batch. The ridge is added to variances, not to covariances too. An epoch of
    pretraining drops its last short batch. Precision is the suite's. Schedules stay in epochs and steps whatever the
    data set; the settings are those for CIFAR-10. `suspicion` is the probability of a row's label under the last
    confused model.

    Args:
        pretrain_epochs: Epochs of step 1 in the first two rounds.
        later_epochs: Epochs of step 1 in the other rounds.
        steps: Steps of step 2 in the first four rounds.
        last_steps: Steps of step 2 in the last two.
        batch: Rows per batch, of each kind.
        pretrain_lr: Learning rate of step 1, with momentum 0.9; confusion training has 0.7.
        weight_decay: L2 factor on all parameters, in both.
        largest: Ratio above which the class with the largest one loses its suspects.
        ratio: Ratio above which any class does.
    """

    INFO = {
        "title": "Confusion training",
        "paper": "https://arxiv.org/abs/2205.13616",
        "bibtex": "@inproceedings{qi2023towards, title={Towards A Proactive {ML} Approach for Detecting Backdoor "
        "Poison Samples}, author={Qi, Xiangyu and Xie, Tinghao and Wang, Jiachen T. and Wu, Tong and Mahloujifar, "
        "Saeed and Mittal, Prateek}, booktitle={USENIX Security Symposium}, year={2023}}",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {"pretrain_epochs": 1, "later_epochs": 1, "steps": 6, "last_steps": 6},
        "effort": ["pretrain_epochs", "later_epochs", "steps", "last_steps"],
        "presets": {"reduced": {"pretrain_epochs": 12, "later_epochs": 5, "steps": 750, "last_steps": 250}},
        "traverses": True,
        "presumes": "a trigger that is still learnt where wrong labels keep a model from learning anything else",
    }
    ACCESS = Access(clean=0.04, train=True, control=True)
    REQUIRES = frozenset({"linear_head"})

    pretrain_epochs: int = 100
    later_epochs: int = 40
    steps: int = 6000
    last_steps: int = 2000
    batch: int = 32
    pretrain_lr: float = 0.01
    weight_decay: float = 1e-4
    largest: float = 1.5
    ratio: float = 2.0

    def __post_init__(self) -> None:
        if min(self.pretrain_epochs, self.later_epochs, self.steps, self.last_steps) < 1 or self.batch < 2:
            raise ValueError(f"batch is {self.batch}: give at least 2 rows, and at least one epoch and step")

    def run(self, case: Case) -> Outcome:
        """Which rows to keep, and how suspicious each is."""
        ctx, train, clean = case.ctx, case.train, case.clean
        recipe = replace(
            case.recipe, batch=self.batch, weight_decay=self.weight_decay, schedule="constant", pad=0, flip=False
        )
        answers = copy.deepcopy(case.net).to(ctx.device).eval()
        base = build(case.spec, seed=ctx.derive("init"))
        confused, pool = base, torch.arange(len(train))
        pools = []
        rounds = len(SHARES) + 1
        for i in range(rounds):
            last = i == rounds - 1
            pools.append(len(pool))
            rows = train.rows(pool)
            known = rows if not last else _joined(rows, clean)
            epochs = self.pretrain_epochs if i < 2 else self.later_epochs
            given = replace(recipe, lr=self.pretrain_lr, momentum=0.9, epochs=epochs)
            fit(base, known, given, replace(ctx, seed=ctx.derive("pretrain", i)))

            confused = copy.deepcopy(base)
            weights = torch.ones(case.spec.classes) if last else shares(rows.labels, case.spec.classes).sqrt()
            here = replace(ctx, seed=ctx.derive("confuse", i))
            hooks = Confusion(rows, answers, weights, LAMBDAS[i], self.batch, here)
            given = replace(recipe, lr=RATES[i], momentum=0.7)
            fit(confused, clean, given, here, hooks=hooks, steps=self.steps if i < 4 else self.last_steps)
            if not last:
                loss = losses(predict(confused, train.images, ctx=ctx), train.labels)
                count = max(int(SHARES[i] * len(train)), self.batch)
                pool = distilled(loss, train.labels.cpu(), count, FEWEST[i])
            ctx.progress(i + 1, rounds, "rounds")

        labels = train.labels.cpu()
        logits = predict(confused, train.images, ctx=ctx)
        suspects = logits.argmax(1).cpu() == labels
        r = features(confused, train.images, ctx=ctx).cpu().double()
        ratios = {k: likelihood_ratio(r[labels == k], suspects[labels == k]) for k in labels.unique().tolist()}
        accused = [k for k, v in ratios.items() if v > self.ratio or (v > self.largest and v == max(ratios.values()))]
        keep = ~(suspects & torch.isin(labels, torch.tensor(accused, dtype=labels.dtype)))
        chosen = {
            "dropped": int((~keep).sum()),
            "rows": len(keep),
            "clean_rows": len(clean),
            "suspects": int(suspects.sum()),
            "accused_classes": accused,
            "ratios": {str(k): v for k, v in ratios.items()},
            "pools": pools,
        }
        return Outcome(keep=keep, suspicion=(-losses(logits, labels)).exp(), chosen=chosen)


class Confusion(TrainHooks):
    """Clean batches under confused labels, and with every second one a batch of the pool under its own.

    Args:
        pool: Inspected rows.
        answers: The model whose answers are shifted, in eval mode.
        weights: Per class, what the losses of its pool rows are divided by (K,).
        lamb: Weight of both batches together; the inspected one weighs 1.
        batch: Rows of an inspected batch.
        ctx: Order of the pool, device and costs.
    """

    def __init__(self, pool: ImageSet, answers: nn.Module, weights: Tensor, lamb: float, batch: int, ctx: Ctx) -> None:
        super().__init__()
        self.answers, self.lamb, self.ctx = answers, lamb, ctx
        self.weights = weights.to(ctx.device)
        self.images, self.labels = pool.images.to(ctx.device), pool.labels.to(ctx.device)
        self.parts = self._parts(batch)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clean rows (mark 0) under confused labels, then rows of the pool (mark 1)."""
        classes = len(self.weights)
        with torch.no_grad():
            answer = self.answers(x).argmax(1)
        self.ctx.cost.forwards += len(x)
        y = (answer + 1 + step % (classes - 1)) % classes
        if step % EVERY:
            return x, y, torch.zeros_like(y)
        rows = next(self.parts)
        mark = torch.cat([torch.zeros_like(y), torch.ones_like(rows)])
        return torch.cat([x, to_float(self.images[rows])]), torch.cat([y, self.labels[rows]]), mark

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """((lambda - 1) confused + inspected) / lambda, or confused alone."""
        ce = nn.functional.cross_entropy(net(x), y, reduction="none")
        clean = mark == 0
        confused = ce[clean].mean()
        if bool(clean.all()):
            return confused
        weight = 1 / self.weights[y[~clean]]
        inspected = (ce[~clean] * weight).sum() / weight.sum()
        return ((self.lamb - 1) * confused + inspected) / self.lamb

    def _parts(self, batch: int) -> Iterator[Tensor]:
        epoch = 0
        while True:
            order = torch.randperm(len(self.labels), generator=self.ctx.generator("pool", epoch))
            yield from order.to(self.ctx.device).split(batch)
            epoch += 1


def shares(labels: Tensor, classes: int) -> Tensor:
    """Share of each class (K,) in the labels, + 0.001."""
    return labels.cpu().bincount(minlength=classes).float() / len(labels) + 0.001


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, float64 (N,) on the CPU: float32 rounds the smallest ones to zero."""
    return nn.functional.cross_entropy(logits.cpu().double(), labels.cpu(), reduction="none")


def distilled(loss: Tensor, labels: Tensor, count: int, fewest: int) -> Tensor:
    """Positions of the `count` rows with the least loss, and of at least one in `fewest` of each class, in order."""
    order = loss.argsort(stable=True)
    taken = torch.zeros(len(loss), dtype=torch.bool)
    taken[order[:count]] = True
    for label in labels.unique():
        own = order[labels[order] == label]
        taken[own[: len(own) // fewest]] = True
    return taken.nonzero()[:, 0]


def likelihood_ratio(r: Tensor, suspect: Tensor) -> float:
    """What two normal distributions gain per row over the others' alone, as exp, for a class's features `r` (N, D).

    1 where either group has fewer than two rows.
    """
    if not 2 <= int(suspect.sum()) <= len(suspect) - 2:
        return 1.0
    _, _, v = torch.linalg.svd(r - r.mean(0), full_matrices=False)
    x = r @ v[:2].T

    def normal(rows: Tensor) -> torch.distributions.MultivariateNormal:
        spread = torch.cov(rows.T) + RIDGE * torch.eye(2, dtype=rows.dtype)
        return torch.distributions.MultivariateNormal(rows.mean(0), spread)

    mine = x[suspect]
    # The other rows have the same likelihood in both.
    gain = normal(mine).log_prob(mine) - normal(x[~suspect]).log_prob(mine)
    return math.exp(min(float(gain.sum()) / len(x), 100.0))


def _joined(a: ImageSet, b: ImageSet) -> ImageSet:
    images, labels = torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels])
    return replace(a, images=images, labels=labels, ids=torch.arange(len(labels)))
