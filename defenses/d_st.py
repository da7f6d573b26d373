"""D-ST: tell poisoned rows by their sensitivity to transformations, then train a new model that trusts the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome, TrainHooks
from sleeperbench.contracts import Case
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.contrast import pretrain, view
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.sensitivity import check_shares, distinguish
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class DST(Defense):
    """Distinguishment and secure training (Chen, Wu, Wang, NeurIPS 2022).

    1. Rows are ranked as in `d_br`, and the ends of the ranking are taken as clean and as poisoned.
    2. The features of a new network learn by semi-supervised contrast on all rows: a clean row's positives are both
       views of itself and of the batch's rows with its label, every other row's are its own views. The projection
       behind the features has two layers and 128 outputs, and is dropped.
    3. The linear head is trained alone, on the clean and the poisoned rows, with CE over the batch's clean rows minus
       `repel` times CE over its poisoned ones.

    Step 2 trains all but the head, with BatchNorm in train mode; step 3 the head alone, all in eval mode, so running
    statistics stay. Views are those of SimCLR (crops, mirrored where the recipe mirrors, colours; no blur). It stops
    after fixed epochs and keeps the last weights.

    Differs: a clean row's label speaks for other rows of that label whether they are clean or not, as in the authors'
    code (their mask looks at the anchor alone). A batch's last rows are dropped. Hue is turned in the YIQ plane, in a
    fixed order. The authors keep the head with the best test accuracy; here the last one is kept. Where a batch has
    no clean or no poisoned row that term is 0.

    Args:
        epochs: Passes of step 1's first training, over whatever training set is given, as all epochs here.
        spread_epochs: Passes of its second half.
        first_lr: Learning rate of step 1.
        clean: Share of rows to take as clean.
        poisoned: Share of rows to take as poisoned.
        contrast_epochs: Passes of step 2.
        contrast_lr: Peak rate of step 2, along a cosine after ten epochs of rising.
        temperature: Of step 2.
        head_epochs: Passes of step 3.
        head_lr: Learning rate of step 3, constant.
        repel: See step 3.
        batch: Rows per update of steps 2 and 3.
    """

    INFO = {
        "title": "D-ST",
        "paper": "https://openreview.net/forum?id=AsH-Tx2U0Ug",
        "bibtex": "@inproceedings{chen2022effective, title={Effective Backdoor Defense by Exploiting Sensitivity of "
        "Poisoned Samples}, author={Chen, Weixin and Wu, Baoyuan and Wang, Haoqian}, booktitle={Advances in Neural "
        "Information Processing Systems}, year={2022}}",
        "kind": "in_training",
        "version": 1,
        "api": 1,
        "micro": {"epochs": 1, "spread_epochs": 1, "contrast_epochs": 1, "head_epochs": 1, "batch": 64},
        "effort": ["epochs", "spread_epochs", "contrast_epochs", "head_epochs"],
        "presets": {"reduced": {"epochs": 1, "spread_epochs": 1, "contrast_epochs": 22, "head_epochs": 1}},
    }
    ACCESS = Access(model="none", clean=0, train=True, control=True)
    REQUIRES = frozenset({"linear_head"})

    epochs: int = 2
    spread_epochs: int = 10
    first_lr: float = 0.01
    clean: float = 0.2
    poisoned: float = 0.05
    contrast_epochs: int = 200
    contrast_lr: float = 0.5
    temperature: float = 0.1
    head_epochs: int = 10
    head_lr: float = 5.0
    repel: float = 0.001
    batch: int = 512

    def __post_init__(self) -> None:
        check_shares(self.clean, self.poisoned)

    def run(self, case: Case) -> Outcome:
        """The new model; `keep` are the rows not taken as poisoned, `suspicion` is the sensitivity."""
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
        trusted, shunned = (table(train.ids, rows).to(ctx.device) for rows in (pools.clean, pools.poisoned))
        net = build(case.spec, seed=ctx.derive("init"))
        pretrain(
            net,
            train,
            replace(
                case.recipe,
                epochs=self.contrast_epochs,
                lr=self.contrast_lr,
                batch=self.batch,
                momentum=0.9,
                weight_decay=1e-4,
                schedule="cosine",
            ),
            ctx,
            temperature=self.temperature,
            positives=lambda y, ids: alike(y, trusted[ids]),
            blur=False,
            warm_epochs=min(10, self.contrast_epochs),
        )
        net.requires_grad_(False)
        net.body.head.requires_grad_(True)
        recipe = replace(
            case.recipe,
            epochs=self.head_epochs,
            lr=self.head_lr,
            batch=self.batch,
            momentum=0.9,
            weight_decay=0.0,
            schedule="constant",
        )
        hooks = Head(self.repel, shunned, case)
        fit(net, train.rows(pools.clean | pools.poisoned), recipe, replace(ctx, seed=ctx.derive("head")), hooks=hooks)
        chosen = {"clean": int(pools.clean.sum()), "poisoned": int(pools.poisoned.sum())}
        return Outcome(model=pack(net), keep=~pools.poisoned, suspicion=pools.score, chosen=chosen)


class Head(TrainHooks):
    """Step 3: clean rows attract, poisoned ones repel."""

    def __init__(self, repel: float, shunned: Tensor, case: Case) -> None:
        super().__init__()
        self.augments = True
        self.repel, self.shunned, self.case = repel, shunned, case

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """A view of each row, and as its mark whether it is taken as poisoned."""
        gen = self.case.ctx.generator("head views", step)
        seen = view(x, gen, flip=self.case.recipe.flip, blur=False)
        return seen.contiguous(memory_format=torch.channels_last), y, self.shunned[ids].long()

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE(clean) - repel CE(poisoned)."""
        assert isinstance(net, Classifier)
        with evaluating(net):
            errors = F.cross_entropy(net(x), y, reduction="none")
        return mean(errors, mark == 0) - self.repel * mean(errors, mark == 1)


def mean(values: Tensor, of: Tensor) -> Tensor:
    """The mean of those values (N,); 0 without any."""
    return (values * of).sum() / of.sum().clamp_min(1)


def alike(y: Tensor, trusted: Tensor) -> Tensor:
    """Positives (N, N) of step 2: a trusted row's are all rows of its label, every other row's is itself."""
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    return torch.where(trusted[:, None], y[:, None] == y, itself)


def table(ids: Tensor, rows: Tensor) -> Tensor:
    """By id instead of by place: bool (largest id + 1,)."""
    found = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
    found[ids[rows]] = True
    return found
