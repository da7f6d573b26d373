"""Contrastive learning of features: random views, the loss of SimCLR and its supervised form, and the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.taps import PENULTIMATE, capture
from sleeperbench.kit.train import fit


def contrastive(first: Tensor, second: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """How far the 2N views are from those they belong to; their mean over i.

    Of view i: -mean over its positives j of log(exp(z_i z_j / T) / sum over all k but i of exp(z_i z_k / T)).
    With the identity as positives this is the NT-Xent loss of SimCLR (Chen et al., ICML 2020), with equal labels the
    supervised contrastive loss (Khosla et al., NeurIPS 2020).

    Args:
        first: Unit vectors (N, D), one view of each image.
        second: The other view.
        positives: bool (N, N), row i's are i itself and whatever else belongs to it; of both views of each.
        temperature: T.
    """
    z, n = torch.cat([first, second]).float(), len(first)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    wanted = positives.repeat(2, 2) & ~itself
    log_share = logits.log_softmax(1).masked_fill(~wanted, 0)
    return -(log_share.sum(1) / wanted.sum(1)).mean()


class Encoder(nn.Module):
    """Features of a classifier behind a head of two layers: unit vectors (N, `out`).

    Args:
        net: Its penultimate features are taken, and trained with.
        out: Length of the vectors.
        seed: Of the head's first weights.
    """

    def __init__(self, net: Classifier, out: int, seed: int) -> None:
        super().__init__()
        self.net = net
        body: Any = net.body
        width = body.head.in_features
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors of images [0, 1]."""
        return F.normalize(self.project(capture(self.net, x, [PENULTIMATE])[PENULTIMATE]), dim=1)


def pretrain(
    net: Classifier,
    data: ImageSet,
    recipe: Recipe,
    ctx: Ctx,
    *,
    temperature: float,
    positives: Callable[[Tensor, Tensor], Tensor],
    blur: bool,
    warm_epochs: int = 0,
) -> Encoder:
    """Train the features of `net` in place; its head keeps its first weights.

    Args:
        net: A classifier with a linear head.
        data: Rows; two views of each are seen per pass.
        recipe: Schedule and batch; an image is mirrored where `flip` says so.
        ctx: Seed, device, costs.
        temperature: Of the loss.
        positives: (labels, ids) of a batch -> bool (N, N), see `contrastive`.
        blur: Views are blurred half of the time.
        warm_epochs: Passes over which the rate rises linearly from a hundredth of the recipe's to where its schedule
            then stands.

    Returns:
        The features behind their projection, in eval mode.
    """
    body: Any = net.body
    frozen = [p for p in body.head.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    warm = warm_epochs * (len(data) // min(recipe.batch, len(data)))
    hooks = _Contrast(temperature, positives, blur, recipe, ctx, warm)
    encoder = Encoder(net, 128, ctx.derive("projection"))
    fit(encoder, data, recipe, replace(ctx, seed=ctx.derive("pretrain")), hooks=hooks)
    for p in frozen:
        p.requires_grad_(True)
    return encoder


class _Contrast(TrainHooks):
    def __init__(
        self,
        temperature: float,
        positives: Callable[[Tensor, Tensor], Tensor],
        blur: bool,
        recipe: Recipe,
        ctx: Ctx,
        warm: int,
    ) -> None:
        super().__init__()
        self.augments = True
        self.temperature, self.positives, self.blur = temperature, positives, blur
        self.recipe, self.ctx, self.warm, self.done = recipe, ctx, warm, 0
        self.wanted = torch.zeros(0)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Both views, one after the other."""
        gen = self.ctx.generator("contrast views", step)
        both = torch.cat([view(x, gen, flip=self.recipe.flip, blur=self.blur) for _ in range(2)])
        self.wanted = self.positives(y, ids)
        return both.contiguous(memory_format=torch.channels_last), y, torch.zeros_like(y)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """The contrastive loss."""
        first, second = net(x).chunk(2)
        return contrastive(first, second, self.wanted, self.temperature)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """An update at a rate that may still rise."""
        if self.done < self.warm:
            for group in opt.param_groups:
                group["lr"] *= 0.01 + 0.99 * self.done / self.warm
        self.done += 1
        return super().step(net, opt, x, y, mark)


def alone(y: Tensor, ids: Tensor) -> Tensor:
    """Positives of SimCLR: every image is alike to itself alone."""
    return torch.eye(len(y), dtype=torch.bool, device=y.device)


def view(x: Tensor, gen: Generator, *, flip: bool, blur: bool) -> Tensor:
    """A random view of each image, as SimCLR draws them for small images.

    A crop of 0.2 to 1 of the area, 3/4 to 4/3 as wide as high, at a random place, brought to full size; mirrored in one
    of two; with probability 0.8 brightness, contrast and saturation times U(0.6, 1.4) and the hue turned by up to a
    tenth of a circle, in this order; in one of five grey; blurred in one of two (Gaussian of 0.1 to 2 pixels). Hue is
    turned in the YIQ plane. Images of one channel have neither saturation nor hue.

    Args:
        x: float32 [0, 1] (N, C, H, W).
        gen: Source of the draws, on the CPU.
        flip: Mirror at all.
        blur: Blur at all.

    Returns:
        float32 [0, 1] (N, C, H, W).
    """
    n = len(x)
    u = torch.rand(13, n, generator=gen).to(x.device)
    area, ratio = 0.2 + 0.8 * u[0], ((2 * u[1] - 1) * math.log(4 / 3)).exp()
    wide, high = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    side = torch.where((u[2] < 0.5) & flip, -1.0, 1.0)
    zero = torch.zeros_like(wide)
    rows = [
        torch.stack([wide * side, zero, (2 * u[3] - 1) * (1 - wide)], 1),
        torch.stack([zero, high, (2 * u[4] - 1) * (1 - high)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    jitter, grey = (u[5] < 0.8)[:, None, None, None], (u[6] < 0.2)[:, None, None, None]
    bright, contrast, saturation = (0.6 + 0.8 * u[i][:, None, None, None] for i in (7, 8, 9))
    changed = (x * bright).clamp(0, 1)
    middle = _luma(changed).mean((2, 3), keepdim=True)
    changed = (middle + contrast * (changed - middle)).clamp(0, 1)
    if x.shape[1] == 3:
        luma = _luma(changed)
        changed = (luma + saturation * (changed - luma)).clamp(0, 1)
        changed = _turn_hue(changed, (2 * u[10] - 1) * 0.1 * 2 * math.pi)
    x = torch.where(jitter, changed, x)
    if x.shape[1] == 3:
        x = torch.where(grey, _luma(x).expand_as(x), x)
    if blur:
        x = torch.where((u[11] < 0.5)[:, None, None, None], _blurred(x, 0.1 + 1.9 * u[12]), x)
    return x.clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    """(N, 1, H, W); images that have not three channels are their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)).sum(1, keepdim=True)


def _turn_hue(x: Tensor, angle: Tensor) -> Tensor:
    """Colours turned around the grey axis by `angle` (N,) radians; their luma stays, but for cut-off."""
    to = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], device=x.device)
    c, s, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack(
        [torch.stack([one, zero, zero], 1), torch.stack([zero, c, -s], 1), torch.stack([zero, s, c], 1)], 1
    )
    return torch.einsum("nij,njhw->nihw", torch.linalg.inv(to) @ turn @ to, x).clamp(0, 1)


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with `sigma` (N,) pixels, of at most three pixels to each side; edges repeat."""
    n, c, h, w = x.shape
    reach = min(3, h - 1, w - 1)
    at = torch.arange(-reach, reach + 1, device=x.device)
    line = (-(at**2) / (2 * sigma[:, None] ** 2)).softmax(1)
    flat = F.pad(x, (reach, reach, reach, reach), mode="replicate").reshape(1, n * c, h + 2 * reach, w + 2 * reach)
    kernel = line.repeat_interleave(c, 0)[:, None]
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=n * c)
    return F.conv2d(flat, kernel[:, :, :, None], groups=n * c).view(n, c, h, w)
