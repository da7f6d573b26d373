"""Narcissus: one noise for all images, made on a surrogate to look more like the target class than its own images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.contracts import Ctx, NotApplicable
from sleeperbench.kit.additive import additive
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import poison_target_class, target_map


@dataclass(frozen=True, kw_only=True)
class Narcissus(Attack):
    """Universal noise that points into the target class, clean label (Zeng et al., CCS 2023).

    1. A surrogate was trained on public data of other classes and on the target class: here the clean model
       `ctx.clean_models[0]`.
    2. It is adapted to the images of the target class alone, `warm_epochs` epochs of RAdam at `warm_lr`.
    3. One noise d for all images, from 0, minimises CE(f(clip(x + clip(d, -eps, eps))), target) over the images x of
       the target class, randomly cropped and mirrored: one step of RAdam at `lr` per batch of `batch` images, `rounds`
       rounds over the class, or until the gradient of a round's last batch is 0 everywhere. The surrogate normalises
       by its batch and keeps its weights.
    4. `rate` of all rows, drawn among the target class, become clip(x + d) and keep their true label.
    5. At test clip(x + `magnify` d), on images of the other classes.

    Differs: what the attacker may see. The authors' attacker has the target class and public out-of-distribution data
    (Tiny-ImageNet for CIFAR-10). Nothing is downloaded here: the training rows of the other classes stand for these
    data, and the surrogate has the victim's architecture and recipe, which makes a stronger attacker. The authors'
    surrogate knows the target class as one more class and calls it by another label from step 2 on; here it has its own
    label throughout. Batches of a round are of equal size to within one image. The noise is rounded to whole levels of
    8 bit.

    Args:
        eps: Largest absolute value of the noise, of 1.
        magnify: Factor of the noise at test.
        warm_epochs: Epochs of step 2; 0 leaves the surrogate as it is.
        warm_lr: Their learning rate.
        rounds: Passes over the target class in step 3.
        lr: Their learning rate, in pixels of [0, 1]; the authors' is 0.01 in pixels of [-1, 1].
        batch: Images per step of steps 2 and 3.
    """

    INFO = {
        "title": "Narcissus",
        "paper": "https://arxiv.org/abs/2204.05255",
        "bibtex": "@inproceedings{zeng2023narcissus, title={Narcissus: A Practical Clean-Label Backdoor Attack with "
        "Limited Information}, author={Zeng, Yi and Pan, Minzhou and Just, Hoang Anh and Lyu, Lingjuan and Qiu, "
        "Meikang and Jia, Ruoxi}, booktitle={ACM SIGSAC Conference on Computer and Communications Security}, "
        "year={2023}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "clean_label",
        "clean_label": True,
        "implant_asr": 0.7,  # the protocol's gate for clean labels
        "published_asr": {"value": 0.9989, "setting": "faces, three poisoned images", "source": "the paper"},
        "micro": {"warm_epochs": 1, "rounds": 50},
        "effort": ["warm_epochs", "rounds"],
    }
    NEEDS = {"clean_models": 1}

    eps: float = 16 / 255
    magnify: float = 3.0
    warm_epochs: int = 5
    warm_lr: float = 0.1
    rounds: int = 1000
    lr: float = 0.005
    batch: int = 350

    def __post_init__(self) -> None:
        for name in ("eps", "magnify", "warm_lr", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, least in (("warm_epochs", 0), ("rounds", 1), ("batch", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.eps > 1:
            raise ValueError(f"eps is {self.eps}; it must be at most 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse a single class."""
        target_map("all_to_one", 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Steps 1 to 3; order and views from `ctx.generator`."""
        self.check(train.shape, len(train.classes))
        own = train.rows(train.labels == ctx.target).images
        if len(own) < 2:
            raise NotApplicable(f"few_target_rows: class {ctx.target} has {len(own)} training rows, 2 are needed")
        net = load(ctx.clean_models[0], ctx.device)
        own = own.to(ctx.device)
        self._warm_up(net, own, ctx)
        return self._backdoor(train, ctx.target, self._noise(net, own, ctx))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The noise on rows of the target class, in place."""
        return poison_target_class(train, b, b.info["target"], eligible, rate, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """The noise's pixels dealt anew, with the same target."""
        signal = b.tensors["signal"]
        order = torch.randperm(signal[0].numel(), generator=ctx.generator("decoy"))
        return self._backdoor(train, b.info["target"], signal.flatten(1)[:, order].view_as(signal))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its noise, strengths and target."""
        return additive("noise", tensors["signal"], info)

    def _backdoor(self, train: ImageSet, target: int, signal: Tensor) -> Backdoor:
        info = {
            "targets": "all_to_one",
            "target": target,
            "classes": len(train.classes),
            "train": 1.0,
            "test": self.magnify,
        }
        return self.restore({"signal": signal.contiguous()}, info)

    def _warm_up(self, net: Classifier, own: Tensor, ctx: Ctx) -> None:
        """Step 2, in place."""
        opt = torch.optim.RAdam(net.parameters(), lr=self.warm_lr)
        net.train()
        for epoch in range(self.warm_epochs):
            for x in self._views(own, ctx, "warm", epoch):
                opt.zero_grad(set_to_none=True)
                _loss(net, x, ctx).backward()  # type: ignore[no-untyped-call]
                opt.step()

    def _noise(self, net: Classifier, own: Tensor, ctx: Ctx) -> Tensor:
        """Step 3: the noise (C, H, W) on the CPU, in whole levels."""
        net.train().requires_grad_(False)
        delta = torch.zeros(1, *own.shape[1:], device=ctx.device, requires_grad=True)
        opt = torch.optim.RAdam([delta], lr=self.lr)
        for turn in range(self.rounds):
            for x in self._views(own, ctx, "noise", turn):
                opt.zero_grad(set_to_none=True)
                _loss(net, (x + delta.clamp(-self.eps, self.eps)).clamp(0, 1), ctx).backward()  # type: ignore[no-untyped-call]
                opt.step()
            ctx.progress(turn + 1, self.rounds, "noise")
            if delta.grad is not None and not bool(delta.grad.any()):
                break
        levels = (delta.detach().clamp(-self.eps, self.eps) * 255).round()[0].cpu()
        if not bool(levels.any()):
            raise NotApplicable("no_gradient: the surrogate leaves the noise below half a level")
        return levels / 255

    def _views(self, own: Tensor, ctx: Ctx, use: str, turn: int) -> Iterator[Tensor]:
        """The images of the class in random order, cropped and mirrored as the suite does, in batches."""
        order = torch.randperm(len(own), generator=ctx.generator(use, "order", turn)).to(own.device)
        seen = crop_flip(own[order], ctx.recipe.pad, ctx.recipe.flip, ctx.generator(use, "views", turn))
        for part in seen.tensor_split(math.ceil(len(own) / self.batch)):
            yield to_float(part)


def _loss(net: Classifier, x: Tensor, ctx: Ctx) -> Tensor:
    """Cross-entropy of images towards the target class."""
    ctx.cost.forwards += len(x)
    ctx.cost.backwards += len(x)
    return F.cross_entropy(net(x), torch.full((len(x),), ctx.target, device=x.device))
