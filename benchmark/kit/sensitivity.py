"""Telling poisoned training rows by how far their features move under a transformation of the image (D-BR, D-ST)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.rowwise import uniform
from sleeperbench.kit.taps import PENULTIMATE, capture
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class Pools:
    """What `distinguish` found.

    Args:
        score: float32 (N,), mean squared change of a row's features; larger is more suspicious.
        clean: bool (N,), the rows that move least.
        poisoned: bool (N,), the rows that move most; none of them is in `clean`.
    """

    score: Tensor
    clean: Tensor
    poisoned: Tensor


def check_shares(clean: float, poisoned: float) -> None:
    """Refuse shares of rows for the two ends of the ranking that do not fit into one.

    Raises:
        ValueError: they are not above 0, or together above 1.
    """
    if not (0 < clean < 1 and 0 < poisoned < 1 and clean + poisoned <= 1):
        raise ValueError(f"clean is {clean} and poisoned {poisoned}: give shares that fit into one")


def distinguish(
    spec: ModelSpec,
    train: ImageSet,
    recipe: Recipe,
    ctx: Ctx,
    *,
    epochs: int,
    spread_epochs: int,
    lr: float,
    clean: float,
    poisoned: float,
) -> Pools:
    """Sample distinguishment (Chen, Wu, Wang, NeurIPS 2022).

    A new network is trained on all rows, then tuned to spread the mean features of the classes, both without
    augmentation and at a constant rate; rows are ranked by `sensitivity`.

    Args:
        spec: The network.
        train: Rows, poisoned ones among them.
        recipe: Precision; SGD is that of the method (batch 128, momentum 0.9, weight decay 5e-4).
        ctx: Seed, device, costs.
        epochs: Passes of the first training.
        spread_epochs: Passes of the tuning.
        lr: Of both.
        clean: Share of rows to take as clean.
        poisoned: Share of rows to take as poisoned.
    """
    net = build(spec, seed=ctx.derive("sensitivity"))
    plain = replace(
        recipe, lr=lr, batch=128, momentum=0.9, weight_decay=5e-4, schedule="constant", pad=0, flip=False, epochs=epochs
    )
    fit(net, train, plain, replace(ctx, seed=ctx.derive("sensitivity", "train")))
    spreading = replace(plain, epochs=spread_epochs)
    fit(net, train, spreading, replace(ctx, seed=ctx.derive("sensitivity", "spread")), hooks=Spread())
    score = sensitivity(net, train, ctx).cpu()
    order, n = score.argsort(stable=True), len(train)
    low, high = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
    low[order[: max(1, round(clean * n))]] = True
    high[order[n - max(1, round(poisoned * n)) :]] = True
    return Pools(score=score, clean=low & ~high, poisoned=high)


class Spread(TrainHooks):
    """Pull the mean features of the batch's classes apart."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """The mean of the matrix of cosines between class means, its diagonal set to 0."""
        assert isinstance(net, Classifier)
        found = capture(net, x, [PENULTIMATE])[PENULTIMATE].float()
        return crowding(found, y)


def crowding(features: Tensor, y: Tensor) -> Tensor:
    """Of features (N, D) under labels (N,): mean cosine over all pairs of class means, that of one with itself 0."""
    present = y.unique()
    members = (y == present[:, None]).to(features)
    centres = F.normalize(members @ features / members.sum(1, keepdim=True), dim=1)
    cosines = centres @ centres.T
    return (cosines - torch.diag_embed(cosines.diagonal())).mean()


@torch.no_grad()
def sensitivity(net: Classifier, data: ImageSet, ctx: Ctx, batch: int = 500) -> Tensor:
    """Mean squared difference between the features of each image and of its turned and shifted copy, (N,)."""
    device, gen, parts = device_of(net), ctx.generator("turned"), []
    with evaluating(net):
        for images, ids in zip(data.images.split(batch), data.ids.split(batch), strict=True):
            x = to_float(images.to(device))
            pair = [capture(net, z, [PENULTIMATE])[PENULTIMATE] for z in (x, turned(x, ids, gen))]
            parts.append((pair[0] - pair[1]).square().mean(1))
    ctx.cost.forwards += 2 * len(data)
    return torch.cat(parts)


def turned(x: Tensor, ids: Tensor, gen: torch.Generator) -> Tensor:
    """Images turned by U(-180, 180) degrees, then shifted by up to a fifth of each side; black outside.

    Pixels are taken from the nearest place, once for both. What is drawn depends on the row's id alone.

    Args:
        x: float32 (N, C, H, W).
        ids: int64 (N,).
        gen: Its seed is read.
    """
    draws = uniform(gen, ids, 3).to(x.device)
    angle = (2 * draws[:, 0] - 1) * math.pi
    h, w = x.shape[2:]
    # Whole pixels, as the field's transformation shifts.
    dy, dx = ((0.2 * n * (2 * draws[:, i + 1] - 1)).round() / (n / 2) for i, n in enumerate((h, w)))
    cos, sin = angle.cos(), angle.sin()
    # An output place, moved back by the shift and turned back, is where the pixel comes from.
    rows = [torch.stack([cos, -sin, -cos * dx + sin * dy], 1), torch.stack([sin, cos, -sin * dx - cos * dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
