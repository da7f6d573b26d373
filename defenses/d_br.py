"""D-BR: tell poisoned rows by their sensitivity to transformations, unlearn them and relearn the clean ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.predict import hits, predict
from sleeperbench.kit.sensitivity import check_shares, distinguish
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class DBR(Defense):
    """Distinguishment and backdoor removal (Chen, Wu, Wang, NeurIPS 2022).

    1. A new network is trained for `epochs` on the training set without augmentation, then tuned for `spread_epochs`
       on the mean of the matrix of cosines between the batch's class means of features, the diagonal set to 0.
    2. Rows are ranked by the mean squared difference between the features of the image and of a copy turned by up to
       180 degrees and shifted by up to a fifth. Those that move least are taken as clean, those that move most as
       poisoned: a trigger that was turned works no more.
    3. The attacked model itself, `rounds` times: a pass over the poisoned rows with -CE, then one over the clean ones
       with CE, all with crop and flip.

    All parameters get gradients, BatchNorm runs in train mode. It stops after `rounds` and keeps the last weights. The
    first pass is left out in each round before which fewer than 1/K of the poisoned rows are answered as labelled; it
    comes back where they are again.

    Differs: the stop and the last weights, neither of which looks at test data; the authors keep the round with the
    best test accuracy minus test ASR, and without a stop ascent ruins a network. Step 1's rate is constant (the
    authors' falls along a cosine of 100 epochs, of which 12 are done). A pass has an optimiser of its own, where
    theirs share one momentum, and drops its last short batch. Turn and shift take the nearest pixel once, not twice.

    Args:
        epochs: Passes of step 1 over the training set, whatever its size.
        spread_epochs: Passes of its second half.
        first_lr: Learning rate of step 1.
        clean: Share of rows to take as clean.
        poisoned: Share of rows to take as poisoned.
        rounds: Passes over either pool in step 3.
        lr: Learning rate of step 3, constant.
    """

    INFO = {
        "title": "D-BR",
        "paper": "https://openreview.net/forum?id=AsH-Tx2U0Ug",
        "bibtex": "@inproceedings{chen2022effective, title={Effective Backdoor Defense by Exploiting Sensitivity of "
        "Poisoned Samples}, author={Chen, Weixin and Wu, Baoyuan and Wang, Haoqian}, booktitle={Advances in Neural "
        "Information Processing Systems}, year={2022}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"epochs": 1, "spread_epochs": 1, "rounds": 2},
        "effort": ["epochs", "spread_epochs", "rounds"],
    }
    ACCESS = Access(clean=0, train=True, control=True)
    REQUIRES = frozenset({"linear_head"})

    epochs: int = 2
    spread_epochs: int = 10
    first_lr: float = 0.01
    clean: float = 0.2
    poisoned: float = 0.05
    rounds: int = 20
    lr: float = 1e-4

    def __post_init__(self) -> None:
        check_shares(self.clean, self.poisoned)

    def run(self, case: Case) -> Outcome:
        """The repaired model; `keep` are the rows not taken as poisoned, `suspicion` is the sensitivity."""
        ctx, train = case.ctx, case.train
        pools = distinguish(
            case.spec,
            train,
            case.recipe,
            ctx,
            epochs=self.epochs,
            spread_epochs=self.spread_epochs,
            lr=self.first_lr,
            clean=self.clean,
            poisoned=self.poisoned,
        )
        clean, poisoned = train.rows(pools.clean), train.rows(pools.poisoned)
        net = copy.deepcopy(case.net).to(ctx.device)
        recipe = replace(
            case.recipe, epochs=1, lr=self.lr, batch=128, momentum=0.9, weight_decay=5e-4, schedule="constant"
        )
        before, unlearnt = share(net, poisoned, ctx), 0
        for i in range(self.rounds):
            if share(net, poisoned, ctx) >= 1 / case.spec.classes:
                fit(net, poisoned, recipe, replace(ctx, seed=ctx.derive("unlearn", i)), hooks=Ascent())
                unlearnt += 1
            fit(net, clean, recipe, replace(ctx, seed=ctx.derive("relearn", i)))
        chosen = {
            "clean": len(clean),
            "poisoned": len(poisoned),
            "unlearning_rounds": unlearnt,
            "poisoned_accuracy_before": before,
            "poisoned_accuracy": share(net, poisoned, ctx),
            "clean_accuracy": share(net, clean, ctx),
        }
        return Outcome(model=pack(net), keep=~pools.poisoned, suspicion=pools.score, chosen=chosen)


class Ascent(TrainHooks):
    """Climb the loss."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """-CE."""
        return -F.cross_entropy(net(x), y)


def share(net: nn.Module, rows: ImageSet, ctx: Ctx) -> float:
    """Share of the rows answered as labelled, in eval mode."""
    count, total = hits(predict(net, rows.images, ctx=ctx), rows.labels)
    return count / total
