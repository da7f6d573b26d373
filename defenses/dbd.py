"""DBD, decoupling-based defense: features without labels, then a head, then labels for the rows that it finds easy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, Recipe
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.contrast import alone, pretrain
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating, predict
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class DBD(Defense):
    """Backdoor defense via decoupling the training process (Huang et al., ICLR 2022).

    1. The features of a new network learn by SimCLR (NT-Xent at `temperature`) from the images without their labels.
    2. They are frozen; the head is trained for `head_epochs` with symmetric cross-entropy, SCE = 0.1 CE + RCE, where
       RCE = -sum p log q, p the answer and q the label with its zeros at 1e-4.
    3. `semi_epochs` times: the share `trusted` of rows with the smallest SCE keep their labels, the others lose them,
       and the whole network takes `iterations` steps of MixMatch. On B rows with labels and B without: a row without
       gets the mean of the answers to two views, raised to 1 / `sharpen` and brought to sum 1. All 3B views are mixed
       with a random order of themselves, l x + (1 - l) x', l ~ Beta(`mix`, `mix`), at least 1/2. The loss is the
       cross-entropy of the first B against their mixed targets, plus w times the mean squared difference of the
       others' answers to theirs; w rises linearly to `unlabelled` over the passes of steps 2 and 3.

    Step 2 trains the head alone, all in eval mode; steps 1 and 3 train all parameters (1 all but the head) with
    BatchNorm in train mode, also for the answers that become targets. It stops after fixed epochs and keeps the last
    weights. Rows are ranked in eval mode as they are. Optimiser of 2 and 3: Adam at a constant rate, one per step.

    Differs: the released code means to freeze the features in step 2 but misspells the flag, so that it trains them
    too; the paper is followed. Its Adam lives through both steps. Its contrastive loss looks out from one of the two
    views, here from both. Rows are ranked without crop and flip. Hue is turned in the YIQ plane, crops are bilinear,
    the crop of steps 2 and 3 is padded with zeros instead of reflected. The share of rows is rounded.

    Args:
        contrast_epochs: Passes of step 1 over whatever training set is given, as all epochs here.
        contrast_lr: Its learning rate at the start, along a cosine; weight decay 1e-4.
        contrast_batch: Its rows per update.
        temperature: Of NT-Xent.
        head_epochs: Passes of step 2, in batches of 128.
        semi_epochs: Splits of step 3.
        iterations: Updates per split.
        batch: Rows of either kind per update of step 3.
        lr: Adam's rate in steps 2 and 3.
        trusted: Share of rows that keep their labels.
        unlabelled: Largest weight of the squared difference.
        sharpen: Temperature of the guesses.
        mix: Parameter of the Beta distribution.
    """

    INFO = {
        "title": "DBD",
        "paper": "https://arxiv.org/abs/2202.03423",
        "bibtex": "@inproceedings{huang2022backdoor, title={Backdoor Defense via Decoupling the Training Process}, "
        "author={Huang, Kunzhe and Li, Yiming and Wu, Baoyuan and Qin, Zhan and Ren, Kui}, booktitle={International "
        "Conference on Learning Representations}, year={2022}}",
        "kind": "in_training",
        "version": 2,
        "api": 1,
        "micro": {"contrast_epochs": 1, "head_epochs": 1, "semi_epochs": 2, "iterations": 3, "batch": 16},
        "effort": ["contrast_epochs", "head_epochs", "semi_epochs", "iterations"],
        "presets": {"reduced": {"contrast_epochs": 6, "head_epochs": 1, "semi_epochs": 1}},
    }
    ACCESS = Access(model="none", clean=0, train=True, control=True)
    REQUIRES = frozenset({"linear_head"})

    contrast_epochs: int = 1000
    contrast_lr: float = 0.4
    contrast_batch: int = 512
    temperature: float = 0.5
    head_epochs: int = 10
    semi_epochs: int = 190
    iterations: int = 1024
    batch: int = 64
    lr: float = 2e-3
    trusted: float = 0.5
    unlabelled: float = 15.0
    sharpen: float = 0.5
    mix: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.trusted < 1:
            raise ValueError(f"trusted is {self.trusted}: give a share between 0 and 1")
        if self.sharpen <= 0 or self.mix <= 0:
            raise ValueError(f"sharpen is {self.sharpen} and mix {self.mix}; both must be above 0")

    def run(self, case: Case) -> Outcome:
        """The new network; `keep` are the rows that it would trust at the end, `suspicion` is their SCE."""
        ctx, train = case.ctx, case.train
        net = build(case.spec, seed=ctx.derive("init"))
        recipe = replace(
            case.recipe,
            epochs=self.contrast_epochs,
            lr=self.contrast_lr,
            batch=self.contrast_batch,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="cosine",
        )
        pretrain(net, train, recipe, ctx, temperature=self.temperature, positives=alone, blur=True)

        adam = replace(
            case.recipe, epochs=self.head_epochs, lr=self.lr, batch=128, weight_decay=0.0, schedule="constant"
        )
        net.requires_grad_(False)
        net.body.head.requires_grad_(True)
        fit(net, train, adam, replace(ctx, seed=ctx.derive("head")), hooks=Head(), optimiser="adam")

        net.requires_grad_(True)
        hooks = MixMatch(self, net, train, case.recipe, ctx)
        steps = self.semi_epochs * self.iterations
        semi = replace(adam, batch=self.batch)
        fit(net, train, semi, replace(ctx, seed=ctx.derive("semi")), hooks=hooks, steps=steps, optimiser="adam")
        found = ranking(net, train, ctx)
        keep = smallest(found, self.trusted)
        chosen = {"trusted": int(keep.sum()), "moved_since_last_split": int((hooks.trusted != keep).sum())}
        return Outcome(model=pack(net), keep=keep, suspicion=found, chosen=chosen)


class Head(TrainHooks):
    """Step 2: SCE, everything in eval mode."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """The batch's mean."""
        with evaluating(net):
            return symmetric(net(x).float(), y).mean()


class MixMatch(TrainHooks):
    """Step 3. The trainer's own batches are left aside: rows come from the two pools of the last split."""

    def __init__(self, settings: DBD, net: Classifier, train: ImageSet, recipe: Recipe, ctx: Ctx) -> None:
        super().__init__()
        self.augments = True
        self.settings, self.net, self.train, self.recipe, self.ctx = settings, net, train, recipe, ctx
        self.images, self.labels = train.images.to(ctx.device), train.labels.to(ctx.device)
        self.trusted = torch.zeros(len(train), dtype=torch.bool)
        self.orders: list[Tensor] = []
        self.target, self.weight = torch.zeros(0), 0.0

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """3B mixed views; splits anew where it is time."""
        s = self.settings
        epoch, at = divmod(step, s.iterations)
        if at == 0:
            self.split(epoch)
        gen = self.ctx.generator("semi views", step)
        size = min(s.batch, *(len(order) for order in self.orders))
        rows = [order[torch.arange(at * size, (at + 1) * size) % len(order)].to(x.device) for order in self.orders]
        seen = [to_float(crop_flip(self.images[r], self.recipe.pad, self.recipe.flip, gen)) for r in (*rows, rows[1])]
        with torch.no_grad():  # in train mode, as released
            guesses = [self.net(v).float() for v in seen[1:]]
        guessed = guess(guesses, s.sharpen)
        known = F.one_hot(self.labels[rows[0]], guessed.shape[1]).to(guessed)
        share = float(np.random.default_rng(self.ctx.derive("mix", step)).beta(s.mix, s.mix))
        order = torch.randperm(3 * size, generator=gen).to(x.device)
        mixed, self.target = mixed_up(
            torch.cat(seen), torch.cat([known, guessed, guessed]), max(share, 1 - share), order
        )
        passes = s.head_epochs + epoch + at / s.iterations
        self.weight = s.unlabelled * min(1.0, passes / s.semi_epochs)
        return mixed.contiguous(memory_format=torch.channels_last), y, torch.zeros_like(y)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Cross-entropy of the first third and squared difference of the others."""
        # Every pass gets rows of all thirds, so that its batch statistics are alike.
        parts = interleave(x.chunk(3))
        logits = torch.cat(interleave([net(part).float() for part in parts]))
        n = len(x) // 3
        known = -(logits[:n].log_softmax(1) * self.target[:n]).sum(1).mean()
        return known + self.weight * (logits[n:].softmax(1) - self.target[n:]).square().mean()

    def split(self, epoch: int) -> None:
        """Which rows keep their labels, and in which order either kind is gone through."""
        # The trainer counts every pass of the net while it trains, this one too.
        self.trusted = smallest(ranking(self.net, self.train), self.settings.trusted)
        pools = [self.trusted.nonzero().flatten(), (~self.trusted).nonzero().flatten()]
        gen = self.ctx.generator("semi order", epoch)
        self.orders = [pool[torch.randperm(len(pool), generator=gen)] for pool in pools]


def symmetric(logits: Tensor, y: Tensor) -> Tensor:
    """SCE of each row, (N,): 0.1 CE + RCE."""
    p = logits.softmax(1).clamp(1e-7, 1)
    label = F.one_hot(y, logits.shape[1]).to(p).clamp(1e-4, 1)
    return 0.1 * F.cross_entropy(logits, y, reduction="none") - (p * label.log()).sum(1)


def ranking(net: nn.Module, data: ImageSet, ctx: Ctx | None = None) -> Tensor:
    """SCE of each row, float64 (N,) on the CPU, in eval mode."""
    return symmetric(predict(net, data.images, ctx=ctx).cpu().double(), data.labels.cpu())


def smallest(values: Tensor, share: float) -> Tensor:
    """Which are the smallest, bool (N,): `share` of them, at least one, and not all."""
    found = torch.zeros(len(values), dtype=torch.bool)
    found[values.argsort(stable=True)[: min(max(1, round(share * len(values))), len(values) - 1)]] = True
    return found


def guess(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Targets (B, K) of rows without labels: the mean of the answers, sharpened."""
    p = torch.stack([view.softmax(1) for view in logits]).mean(0) ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def mixed_up(x: Tensor, target: Tensor, share: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """`share` of each image and target, and the rest of that which `order` puts beside it."""
    return share * x + (1 - share) * x[order], share * target + (1 - share) * target[order]


def interleave(parts: Sequence[Tensor]) -> list[Tensor]:
    """Three equal parts, of which the first has exchanged its second and last third with the others; undoes itself."""
    n = len(parts[0])
    small = n // 3
    cuts = [small + (i >= 3 - n % 3) for i in range(3)]
    cells = [list(part.split(cuts)) for part in parts]
    for i in (1, 2):
        cells[0][i], cells[i][i] = cells[i][i], cells[0][i]
    return [torch.cat(row) for row in cells]
