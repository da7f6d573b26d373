"""LIRA: a generator of faint noise is trained against the classifier that learns to obey it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TargetMap, TrainHooks
from sleeperbench.attacks.blind import Twice, apart
from sleeperbench.contracts import Ctx
from sleeperbench.kit.generators import seeded, straight_through
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import rows_at, target_map
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.unet import UNet

_WIDTHS = (16, 32, 64, 128)
"""Channels of the autoencoder's four stages."""
_BLOCKS = (64, 3)
"""Width and depth of the U-Net: 64 to 512 channels."""
_FIRST = 256
"""Training images that BatchNorm's statistics of the drawn generator come from."""


class Autoencoder(nn.Module):
    """Four strided 4x4 convolutions down to 128 channels and four transposed ones back, with batch norm and ReLU.

    The last layer has neither. Sizes that do not divide by 16 are padded by their border and cut back.

    Args:
        channels: Image channels, in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, *_WIDTHS)
        layers: list[nn.Module] = []
        for before, now in zip(widths, _WIDTHS, strict=False):
            layers += [nn.Conv2d(before, now, 4, 2, 1), nn.BatchNorm2d(now), nn.ReLU(inplace=True)]
        for before, now in zip(_WIDTHS[::-1], widths[-2::-1], strict=True):
            layers += [nn.ConvTranspose2d(before, now, 4, 2, 1), nn.BatchNorm2d(now), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-2])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), unbounded, of images (N, C, H, W)."""
        height, width = x.shape[2:]
        below, right = -height % 16, -width % 16
        if below or right:
            x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2), mode="replicate")
        out: Tensor = self.body(x)[:, :, below // 2 : below // 2 + height, right // 2 : right // 2 + width]
        return out


@dataclass(kw_only=True, eq=False)
class Noise:
    """x' = clip(x + eps tanh(g(2 x - 1)), 0, 1); a decoy's noise has the other sign and is moved by `shift` pixels."""

    name: str
    targets: TargetMap
    generator: nn.Module
    eps: float
    negative: bool
    shift: tuple[int, int]

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The image's own noise, by the generator in eval mode."""
        with evaluating(self.generator), torch.no_grad():
            return self.add(self.generator.to(x.device), x)

    def add(self, generator: nn.Module, x: Tensor) -> Tensor:
        """Images under the noise of `generator`, with its gradient."""
        noise = generator(2 * x - 1).tanh().roll(self.shift, (2, 3))
        return (x + (-self.eps if self.negative else self.eps) * noise).clamp(0, 1)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What any other noise of at most `eps` could reach."""
        there = self.apply(x, ids, ids, Role.TEST, Generator())
        low, high = (x - self.eps).clamp(min=0) - there, (x + self.eps).clamp(max=1) - there
        return low.clamp(max=0), high.clamp(min=0)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: every image has its own."""
        return None


class LiraHooks(Twice):
    """Steps 2 to 4 of `Lira`."""

    def __init__(self, attack: Lira, trigger: Noise, train: ImageSet, eligible: Tensor, ctx: Ctx) -> None:
        super().__init__(trigger, train, eligible, ctx.device)
        self.attack, self.noise = attack, trigger
        used = trigger.generator.to(ctx.device).eval().requires_grad_(False)
        self.aux.update(generator=used)
        self.next = copy.deepcopy(used).train().requires_grad_(True)
        self.own = torch.optim.Adam(self.next.parameters(), lr=attack.generator_lr)
        self.joint = min(attack.joint_epochs, ctx.recipe.epochs // 2)
        self.epoch = 0

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Step 3: clean and triggered rows in one pass. Of triggered rows alone: their loss."""
        parts = apart(net(x), y, self.copies)
        return self.attack.clean * parts[0] + (1 - self.attack.clean) * parts[1] if len(parts) > 1 else parts[0]

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Step 2 in the joint stage, then step 3, which gives the loss."""
        n = len(x) - self.copies
        if self.epoch < self.joint and self.copies:
            weights = list(self.next.parameters())
            shown = straight_through(self.noise.add(self.next, self.images))
            with evaluating(net):
                # For these weights alone: nothing of it may reach the classifier's.
                found = torch.autograd.grad(self.loss(net, shown, y[n:], torch.full_like(y[n:], Mark.DIRTY)), weights)
            for p, g in zip(weights, found, strict=True):
                p.grad = g
            self.own.step()
        return super().step(net, opt, x, y, mark)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch and its copies under the noise in use."""
        self.images = x[self.chosen(ids)]
        return super().batch(x, y, ids, step)

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        """The generator that was trained comes into use; after the joint stage it is the same one."""
        self.noise.generator.load_state_dict(self.next.state_dict())
        self.epoch = epoch + 1
        return False


@dataclass(frozen=True, kw_only=True)
class Lira(Attack):
    """Learnable, imperceptible and robust backdoor (Doan, Lao, Zhao, Li, ICCV 2021).

    1. x' = clip(x + `eps` tanh(g(x))), g an autoencoder or a U-Net. Two copies: g is in use, h learns.
    2. Joint stage, in every batch: h takes a step of Adam at `generator_lr` that lowers CE(f(x + eps tanh(h(x))),
       wanted label), with the classifier f held fixed.
    3. In every batch: f takes a step that lowers `clean` CE(f(x), y) + (1 - `clean`) CE(f(x'), wanted label).
    4. After each epoch of the joint stage g becomes h. After `joint_epochs` g stays, and step 3 goes on alone.

    Every row of a batch appears clean and triggered, so that the poison rate says nothing but whether it runs (0: not
    at all). It controls training: the trigger is known only afterwards, so nothing stands for what was trained on.

    Differs: the authors add 0.01 in normalised units, 0.6 levels of CIFAR-10's 256, to images that are never stored;
    here `eps` is in pixels, images are clipped and rounded to 8 bit (gradients pass straight through), and 4 levels are
    the default. Clean and triggered images go through f in one pass, and f is in eval mode in step 2; with passes of
    their own, as the authors', BatchNorm trains under the statistics of each and is tested under those of all: clean
    accuracy fell from 87 to 39 % for users of that code. The joint stage lasts at most half of the epochs. Crop and
    flip, before the noise as in the authors' code, are the recipe's, without rotation. Optimiser, schedule and epochs
    of f are the suite's, without a second start; the authors train 50 and 250 epochs at a learning rate of 0.01. g sees
    2 x - 1; as a U-Net it pools by maximum and doubles by transposed convolutions, the authors' by average and
    bilinearly. It starts with the statistics of 256 training images, for those of a new network would leave its first
    epoch without noise. Rows of the cut that may not be poisoned get no triggered copy. BackdoorBench's port lets the
    gradient of step 2 into step 3; here as the authors.

    Args:
        eps: Largest change of a pixel, of 1.
        joint_epochs: Epochs of the joint stage.
        generator_lr: Learning rate of h.
        clean: Weight of the clean loss in step 3.
        generator: `autoencoder` (authors, for images of 28 and 32 pixels) or `unet` (for larger ones).
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
    """

    INFO = {
        "title": "LIRA",
        "paper": "https://openaccess.thecvf.com/content/ICCV2021/html/"
        "Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html",
        "bibtex": "@inproceedings{doan2021lira, title={LIRA: Learnable, Imperceptible and Robust Backdoor Attacks}, "
        "author={Doan, Khoa and Lao, Yingjie and Zhao, Weijie and Li, Ping}, booktitle={IEEE/CVF International "
        "Conference on Computer Vision}, year={2021}}",
        "kind": "training_control",
        "version": 2,
        "api": 1,
        "family": "sample_specific",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {
            "value": 1.0,
            "setting": "MNIST, CIFAR-10, GTSRB, Tiny-ImageNet",
            "source": "the paper's abstract",
        },
        "micro": {},
        "effort": ["joint_epochs"],
    }
    SNAPSHOT = "none"

    eps: float = 4 / 255
    joint_epochs: int = 50
    generator_lr: float = 1e-4
    clean: float = 0.5
    generator: Literal["autoencoder", "unet"] = "autoencoder"
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"

    def __post_init__(self) -> None:
        if self.generator not in ("autoencoder", "unet"):
            raise ValueError(f"generator is {self.generator!r}; it may be 'autoencoder' or 'unet'")
        if not 0.5 / 255 < self.eps <= 1:
            raise ValueError(f"eps is {self.eps}; it must be above half a level (1 / 510), else rounding removes it")
        if self.joint_epochs < 1 or self.generator_lr <= 0 or not 0 < self.clean < 1:
            raise ValueError(
                f"joint_epochs is {self.joint_epochs}, generator_lr {self.generator_lr} and clean {self.clean}; they "
                "must be at least 1, above 0, and between 0 and 1"
            )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse targets that the classes do not allow."""
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Draw g from `ctx.derive("generator")` and let it see images."""
        self.check(train.shape, len(train.classes))
        net = _network(self.generator, train.shape[0], ctx.derive("generator"))
        rows = torch.randperm(len(train), generator=ctx.generator("rows"))[:_FIRST]
        _settle(net, to_float(train.images[rows.to(train.images.device)].cpu()))
        tensors = {f"aux.generator.{k}": v.clone() for k, v in net.state_dict().items()}
        info = {"targets": self.targets, "target": ctx.target, "classes": len(train.classes), "eps": self.eps}
        about = {"generator": self.generator, "channels": train.shape[0], "negative": False, "shift": [0, 0]}
        return self.restore(tensors, info | about)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The clean rows: no trigger exists before training."""
        return PoisonedSet.clean(train)

    def hooks(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> TrainHooks | None:
        """Steps 2 to 4; nothing at rate 0."""
        trigger = b.triggers[0]
        assert isinstance(trigger, Noise)
        return LiraHooks(self, trigger, train, eligible, ctx) if rows_at(rate, len(train)) else None

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """The negative of each image's noise, moved around, for the same target."""
        gen = ctx.generator("shift")
        shift = [int(torch.randint(side // 4, side * 3 // 4 + 1, (), generator=gen)) for side in train.shape[1:]]
        return self.restore(b.tensors, {**b.info, "negative": True, "shift": shift})

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its generator and target map."""
        net = _network(info["generator"], info["channels"], 0)
        net.load_state_dict({k.removeprefix("aux.generator."): v for k, v in tensors.items()})
        trigger = Noise(
            name="noise",
            targets=target_map(info["targets"], info["target"], info["classes"]),
            generator=net,
            eps=info["eps"],
            negative=info["negative"],
            shift=tuple(info["shift"]),
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)


def _settle(net: nn.Module, images: Tensor) -> None:
    """Take BatchNorm's running statistics from these images, in one pass."""
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in layers]
    for layer in layers:
        layer.momentum = 1.0
    with torch.no_grad():
        net.train()(2 * images - 1)
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum
    net.eval()


def _network(kind: str, channels: int, seed: int) -> nn.Module:
    if kind == "unet":
        return seeded(UNet, seed, channels, channels, *_BLOCKS)
    return seeded(Autoencoder, seed, channels)
