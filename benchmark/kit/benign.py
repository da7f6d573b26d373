"""BTI-DBF's inversion: which features are benign, and a generator of images that move the others.

inversion = Inversion(case.net, case.clean, case.ctx, Effort())
inversion.pretrain()
inversion.look(net)                 # the mask, then the generator, on the network as it is now
x = inversion.generator(x)          # images in [0, 1] that the backdoor should answer to
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.contracts.models import Model
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.batchnorm import refresh
from sleeperbench.kit.classifier import Classifier, load, pack
from sleeperbench.kit.generators import seeded
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating, predict
from sleeperbench.kit.taps import taps
from sleeperbench.kit.unet import UNet

DEPTH = 4
"""Levels of the generator."""
BENIGN_LIMIT = 3.0
"""Mean squared change of benign features from which the generator comes back to the image instead of moving others."""
RELEASED = "released"
"""In the path of a repair by shifted steps: the returned weights with running statistics of the shifted ones."""
BATCH = 256
"""Largest number of rows per batch of `settled`."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Updates of the three stages and their rates: 50, 20 and 30 epochs of 2,500 rows in batches of 128.

    Args:
        pretrain: Updates of the generator towards the identity.
        mask: Updates of the mask.
        generate: Updates of the generator against the network.
        bound: Largest mean squared change of an image, in units of the network's own normalisation.
        batch: Rows per update; all rows where there are fewer.
        width: Filters of the generator's first level.
    """

    pretrain: int = 1000
    mask: int = 400
    generate: int = 600
    bound: float = 0.3
    batch: int = 128
    width: int = 32


class Generator(nn.Module):
    """A U-Net whose pictures are cut to [0, 1]; gradients pass the cut, so that no pixel stays stuck at a bound."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = UNet(channels, channels, width, DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of images in [0, 1]."""
        out: Tensor = self.net(x)
        return out + (out.detach().clamp(0, 1) - out.detach())


class Inversion:
    """The generator, its optimiser and the mask, kept over the rounds of a repair (Xu et al., ICLR 2024).

    Features are the answer of the last stage, before pooling. All classifiers stay as they are: copies are frozen, in
    eval mode. Images are neither cropped nor flipped.

    Args:
        net: The network that the generator is pre-trained on.
        data: The defender's clean rows.
        ctx: Randomness, device and costs.
        effort: Updates.
    """

    def __init__(self, net: Classifier, data: ImageSet, ctx: Ctx, effort: Effort) -> None:
        self.ctx, self.effort = ctx, effort
        self.images, self.labels = data.images.to(ctx.device), data.labels.to(ctx.device)
        self.site = taps(net).stages[-1]
        self.std = net.std.to(ctx.device)
        self.generator = seeded(Generator, ctx.derive("generator"), net.spec.shape[0], effort.width).to(ctx.device)
        self._against = self._adam()
        self.net = self._frozen(net)
        self.target = -1
        """The label that the generator's images get most often, fixed after the first look; -1 before."""
        self.share = 0.0
        """Share of the clean rows that got it when it was fixed."""
        self._round = 0

    def pretrain(self) -> None:
        """Bring the generator near the identity: in the image, in the features and in the answers."""

        def loss(x: Tensor, y: Tensor) -> Tensor:
            made = self.generator(x)
            with torch.no_grad():
                wanted, answer = self._features(x)
            features, logits = self._features(made)
            apart = self._apart(x, made)
            weight = 100.0 if float(apart.detach()) > 0.1 else 0.01
            # Cross-entropy of the two answers' distributions.
            same = -(answer.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            return same + F.mse_loss(features, wanted) + weight * apart

        self._train(self._adam(), self.effort.pretrain, "pretrain", loss)

    def look(self, net: Classifier) -> None:
        """The mask of benign features of `net`, then the generator against the others; fixes the target once."""
        self.net = self._frozen(net)
        mask = self.benign()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            made = self.generator(x)
            with torch.no_grad():
                before, _ = self._features(x)
            after, logits = self._features(made)
            apart = self._apart(x, made)
            kept = F.mse_loss(mask * after, mask * before)
            if float(apart.detach()) > self.effort.bound or float(kept.detach()) > BENIGN_LIMIT:
                total = apart
            else:
                total = 0.01 * kept - F.mse_loss((1 - mask) * after, (1 - mask) * before)
            if self.target >= 0:
                # Beyond the bounds too: coming back to the image must not lose the label.
                total = total + F.cross_entropy(logits, torch.full_like(y, self.target))
            return total

        self._train(self._against, self.effort.generate, "generate", loss)
        self.generator.eval()
        if self.target < 0:
            self.target, self.share = self._most_frequent()
        self._round += 1

    def benign(self) -> Tensor:
        """The mask (1, *features) in (0, 1): with it alone the labels are found, with its complement they are lost."""
        with torch.no_grad():
            features, _ = self._features(to_float(self.images[:1]))
        start = torch.randn(features.shape, generator=self.ctx.generator("mask", self._round)).to(self.ctx.device)
        raw = start.requires_grad_()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            mask = squash(raw)
            with self._through(mask):
                found = F.cross_entropy(self.net(x), y)
            with self._through(1 - mask):
                lost = F.cross_entropy(self.net(x), y)
            return found - lost

        self._train(torch.optim.Adam([raw], lr=0.01), self.effort.mask, "mask", loss)
        return squash(raw.detach())

    def _most_frequent(self) -> tuple[int, float]:
        """The label that most images from the generator get, of clean rows with a little noise."""
        gen = self.ctx.generator("target")
        counts = torch.zeros(self.net.spec.classes, dtype=torch.int64)
        with evaluating(self.generator), torch.no_grad():
            for part in self.images.split(500):
                x = to_float(part)
                noisy = x + 0.03 * torch.randn(x.shape, generator=gen).to(x.device)
                answer = self.net(self.generator(noisy.clamp(0, 1))).argmax(1).cpu()
                counts += torch.bincount(answer, minlength=len(counts))
                self.ctx.cost.forwards += len(x)
        return int(counts.argmax()), float(counts.max()) / len(self.images)

    def answers(self) -> Tensor:
        """Labels (N,) that the network gives to the generator's images of the clean rows."""
        with evaluating(self.generator), torch.no_grad():
            made = torch.cat(
                [self.generator(to_float(p)).mul(255).round().to(torch.uint8) for p in self.images.split(500)]
            )
        return predict(self.net, made, ctx=self.ctx).argmax(1).cpu()

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.generator.parameters(), lr=1e-3)

    def _train(
        self, opt: torch.optim.Optimizer, steps: int, name: str, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Updates on random batches, every row once per epoch; each loss sends a batch twice through the network."""
        gen = self.ctx.generator(name, self._round)
        batch = min(self.effort.batch, len(self.images))
        self.generator.train()
        step = 0
        while step < steps:
            order = torch.randperm(len(self.images), generator=gen).to(self.ctx.device)
            for rows in order[: len(order) // batch * batch].split(batch)[: steps - step]:
                opt.zero_grad()
                loss(to_float(self.images[rows]), self.labels[rows]).backward()  # type: ignore[no-untyped-call]
                opt.step()
                self.ctx.cost.forwards += 2 * batch
                self.ctx.cost.backwards += (2 if name == "mask" else 1) * batch
                step += 1
            self.ctx.progress(step, steps, name)

    def _apart(self, x: Tensor, made: Tensor) -> Tensor:
        """Mean squared change of the images, in the network's own units."""
        return ((x - made) / self.std).square().mean()

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Answer of the last stage, and logits, of one pass."""
        found: list[Tensor] = []
        handle = self.net.get_submodule(self.site).register_forward_hook(lambda m, i, out: found.append(out.clone()))
        try:
            logits = self.net(x)
        finally:
            handle.remove()
        return found[0], logits

    @contextmanager
    def _through(self, mask: Tensor) -> Iterator[None]:
        handle = self.net.get_submodule(self.site).register_forward_hook(lambda m, i, out: out * mask)
        try:
            yield
        finally:
            handle.remove()

    def _frozen(self, net: Classifier) -> Classifier:
        return copy.deepcopy(net).to(self.ctx.device).requires_grad_(False).eval()


def squash(raw: Tensor) -> Tensor:
    """tanh(u) / (2 + 1e-7) + 1/2, in (0, 1)."""
    return raw.tanh() / (2 + 1e-7) + 0.5


class Reversed(TrainHooks):
    """Puts the generator's images, with their true labels, in place of int(share B) + 1 rows of every batch."""

    def __init__(self, generator: nn.Module, share: float) -> None:
        super().__init__()
        self.generator, self.share = generator, share

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first rows of a batch, whose order is random, replaced; marked 1."""
        n = min(len(x), int(self.share * len(x)) + 1)
        with evaluating(self.generator), torch.no_grad():
            made = self.generator(x[:n])
        mark = torch.zeros_like(y)
        mark[:n] = 1
        return torch.cat([made, x[n:]]), y, mark


def settled(net: Classifier, rows: ImageSet, ctx: Ctx) -> Model:
    """`net` with running statistics estimated anew on `rows`, not augmented; without BatchNorm as it is."""
    try:
        return refresh(net, rows.images, batch=BATCH, ctx=ctx)
    except NotApplicable:
        return pack(net)


def rounds(
    net: Classifier,
    data: ImageSet,
    ctx: Ctx,
    effort: Effort,
    count: int,
    repair: Callable[[Classifier, Inversion, Ctx], Model],
) -> Iterator[tuple[Classifier, Inversion]]:
    """The network after each of `count` rounds of inversion and repair; the generator is kept from round to round.

    Args:
        net: The attacked network; left untouched.
        data: Clean rows.
        ctx: Each round's repair gets one with a seed of its own.
        effort: Updates of the inversion.
        count: Rounds.
        repair: Makes a repaired model of the present network.
    """
    inversion = Inversion(net, data, ctx, effort)
    inversion.pretrain()
    for i in range(count):
        inversion.look(net)
        net = load(repair(net, inversion, replace(ctx, seed=ctx.derive("round", i))), ctx.device)
        yield net, inversion
