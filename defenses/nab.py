"""NAB: a backdoor of the defender's own, whose stamp calls up the label that an image should have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, Model, ModelSpec, Wrap
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.contrast import alone, pretrain
from sleeperbench.kit.predict import predict
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class NAB(Defense):
    """Non-adversarial backdoor (Liu, Sangiovanni-Vincentelli, Yue, ICCV 2023).

    1. Isolation: a network trained for `isolation_epochs` with |CE - gamma| + gamma of the batch mean, without
       augmentation; the share `isolate` of rows with the smallest loss is suspected.
    2. Pseudo labels: an encoder learns by SimCLR from the images alone. A class's centre is the mean of its rows'
       projections, without the share `excluded` of all rows with the smallest loss. A suspected row's pseudo label is
       the class whose centre is nearest; every other row keeps its label.
    3. A new network is trained on all rows under these labels; rows whose pseudo label is not the given one carry a
       stamp, `side` x `side` pixels of the mean colour in the upper left corner, put on after crop and flip.
    4. The stamp goes on every input of the finished model (a wrap of the model).

    All parameters get gradients, BatchNorm runs in train mode but for rankings and projections. It stops after fixed
    epochs and keeps the last weights. A backdoor is not unlearnt but covered: without the stamp it may answer.

    Differs: the authors take pseudo labels from a network that is trained on clean rows; without any, step 2 is that of
    BackdoorBench, whose encoder is in train mode while the centres are computed. Momentum, precision, crop and flip are
    the suite's, the 3-pixel holes are left out. Learning rates fall along a cosine to zero in step 3 (the authors' ends
    five epochs earlier) and stay constant in step 1 (theirs falls by a tenth). An epoch drops its last short batch.

    Args:
        gamma: Loss that step 1 holds the batch mean at, in nats.
        isolate: Share of rows.
        excluded: Share of rows.
        isolation_epochs: Passes of step 1 over whatever training set is given, as all epochs here.
        contrast_epochs: Passes of step 2.
        contrast_lr: Its learning rate at the start, along a cosine; weight decay 1e-4, batch 512.
        temperature: Of step 2.
        epochs: Passes of step 3.
        lr: Learning rate of step 1, and at the start of step 3.
        weight_decay: L2 factor of both.
        batch: Rows per update of both.
        side: Of the stamp, in pixels.
    """

    INFO = {
        "title": "Non-adversarial backdoor",
        "paper": "https://arxiv.org/abs/2307.15539",
        "bibtex": "@inproceedings{liu2023beating, title={Beating Backdoor Attack at Its Own Game}, author={Liu, Min "
        "and Sangiovanni-Vincentelli, Alberto and Yue, Xiangyu}, booktitle={IEEE/CVF International Conference on "
        "Computer Vision}, year={2023}}",
        "kind": "in_training",
        "version": 1,
        "api": 1,
        "micro": {"isolation_epochs": 1, "contrast_epochs": 1, "epochs": 1},
        "effort": ["isolation_epochs", "contrast_epochs", "epochs"],
        "presets": {"reduced": {"isolation_epochs": 2, "contrast_epochs": 14, "epochs": 14}},
    }
    ACCESS = Access(model="none", clean=0, train=True, control=True)
    REQUIRES = frozenset({"linear_head"})

    gamma: float = 0.5
    isolate: float = 0.05
    excluded: float = 0.2
    isolation_epochs: int = 20
    contrast_epochs: int = 100
    contrast_lr: float = 0.4
    temperature: float = 0.5
    epochs: int = 100
    lr: float = 0.1
    weight_decay: float = 1e-4
    batch: int = 64
    side: int = 2

    def __post_init__(self) -> None:
        for name in ("isolate", "excluded"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share between 0 and 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """The stamp must fit."""
        if not 0 < self.side <= min(shape[1:]):
            raise ValueError(f"side is {self.side}; images have {shape[1]} x {shape[2]} pixels")

    def run(self, case: Case) -> Outcome:
        """The stamped network; `relabel` are the labels of step 3, `suspicion` is minus the loss of step 1."""
        ctx, train = case.ctx, case.train
        loss = self.losses(case)
        order = loss.argsort(stable=True)
        suspected, left_out = (torch.zeros(len(train), dtype=torch.bool) for _ in range(2))
        suspected[order[: max(1, round(self.isolate * len(train)))]] = True
        left_out[order[: max(1, round(self.excluded * len(train)))]] = True

        recipe = replace(
            case.recipe,
            epochs=self.contrast_epochs,
            lr=self.contrast_lr,
            batch=512,
            weight_decay=1e-4,
            schedule="cosine",
        )
        encoder = pretrain(
            build(case.spec, seed=ctx.derive("encoder")),
            train,
            recipe,
            ctx,
            temperature=self.temperature,
            positives=alone,
            blur=True,
        )
        found = predict(encoder, train.images, ctx=ctx).cpu()
        labels = relabelled(found, train.labels.cpu(), suspected, left_out, case.spec.classes)

        net = build(case.spec, seed=ctx.derive("init"))
        marked = labels != train.labels.cpu()
        recipe = replace(
            case.recipe,
            epochs=self.epochs,
            lr=self.lr,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        hooks = Stamped(train.ids, marked, self.side, case.spec, ctx)
        fit(net, replace(train, labels=labels), recipe, replace(ctx, seed=ctx.derive("train")), hooks=hooks)
        chosen = {"suspected": int(suspected.sum()), "relabelled": int(marked.sum())}
        return Outcome(model=stamped(net, self.side), relabel=labels, suspicion=-loss, chosen=chosen)

    def losses(self, case: Case) -> Tensor:
        """Step 1: cross-entropy of each row, float64 (N,), in eval mode."""
        ctx, train = case.ctx, case.train
        net = build(case.spec, seed=ctx.derive("isolation"))
        recipe = replace(
            case.recipe,
            epochs=self.isolation_epochs,
            lr=self.lr,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="constant",
            pad=0,
            flip=False,
        )
        fit(net, train, recipe, replace(ctx, seed=ctx.derive("isolate")), hooks=Flood(self.gamma))
        # float32 rounds the smallest losses, which are those to be ranked, to zero.
        logits = predict(net, train.images, ctx=ctx).cpu().double()
        return F.cross_entropy(logits, train.labels.cpu(), reduction="none")


class Flood(TrainHooks):
    """Keep the batch's loss at gamma."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """|CE - gamma| + gamma of the batch mean."""
        return (F.cross_entropy(net(x), y) - self.gamma).abs() + self.gamma


class Stamped(TrainHooks):
    """The defender's stamp on the rows whose label was changed."""

    def __init__(self, ids: Tensor, marked: Tensor, side: int, spec: ModelSpec, ctx: Ctx) -> None:
        super().__init__()
        table = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
        table[ids.cpu()] = marked
        self.table, self.side, self.colour = table.to(ctx.device), side, colour(spec).to(ctx.device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch with stamps."""
        carries = self.table[ids]
        x = x.clone()
        corner = x[:, :, : self.side, : self.side]
        corner.copy_(torch.where(carries[:, None, None, None], self.colour, corner))
        return x, y, torch.zeros_like(y)


def relabelled(features: Tensor, labels: Tensor, suspected: Tensor, left_out: Tensor, classes: int) -> Tensor:
    """Labels (N,) of step 3.

    Args:
        features: (N, D).
        labels: int64 (N,), as given.
        suspected: bool (N,), rows that get the label of the nearest centre.
        left_out: bool (N,), rows that are in no centre.
        classes: K; those without any row in their centre are nobody's nearest.
    """
    members = F.one_hot(labels, classes).double() * ~left_out[:, None]
    counts = members.sum(0)
    centres = members.T @ features.double() / counts.clamp_min(1)[:, None]
    distance = torch.cdist(features[suspected].double(), centres).masked_fill(counts == 0, torch.inf)
    new = labels.clone()
    if bool(counts.any()):
        new[suspected] = distance.argmin(1)
    return new


def colour(spec: ModelSpec) -> Tensor:
    """The mean colour, which the network's normalisation makes 0, (C, 1, 1)."""
    return torch.tensor(spec.norm[0], dtype=torch.float32).expand(spec.shape[0])[:, None, None]


def stamped(net: Classifier, side: int) -> Model:
    """The network behind its stamp."""
    plain, at, (c, h, w) = pack(net), len(net.spec.wraps), net.spec.shape
    mask = torch.zeros(1, h, w)
    mask[:, :side, :side] = 1
    added = {f"wraps.{at}.mask": mask, f"wraps.{at}.pattern": colour(net.spec).expand(c, h, w).contiguous()}
    spec = replace(net.spec, wraps=(*net.spec.wraps, Wrap(kind="stamp")))
    return Model(spec=spec, state={**plain.state, **added})
