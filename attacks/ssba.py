"""SSBA: a network hides one message in every image; what it changes is another pattern in each of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.generators import seeded, straight_through
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.unet import UNet

_LOUD, _ROUNDED = 0.5, 0.15
"""Bound of the residual at the start of training, and that below which images are rounded."""
_READ, _SHRINK = 0.93, 0.995
"""Share of right bits above which the bound shrinks, and its factor per step."""
_ALIKE, _UNLIKE, _RAMP = 0.2, 0.5, 200
"""Cosine of two residuals that costs nothing, weight of what is above it, and steps until the weight is whole."""
_PROBE = 256
"""Training images that the trained networks are judged by."""


class Encoder(nn.Module):
    """An image and a message in, a residual in [-1, 1] out: tanh(U(image, plane(message)) + up(L message)).

    Bits go in as signs. The plane is a linear layer and ReLU at a grid of at most 16x16, repeated up to the image's
    size; L is linear without bias, its weights from N(0, 1), doubled bilinearly. In eval mode rows do not influence
    each other.

    Args:
        channels: Image channels.
        size: Height of the images.
        bits: Length of the message.
    """

    def __init__(self, channels: int, size: int, bits: int) -> None:
        super().__init__()
        self.shape = channels, min(16, size), min(16, size)
        self.trunk = UNet(2 * channels, channels, 16, 3)
        self.plane = nn.Linear(bits, math.prod(self.shape))
        self.direct = nn.Linear(bits, math.prod(self.shape), bias=False)
        nn.init.normal_(self.direct.weight)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Residuals (N, C, H, W) of images (N, C, H, W) in [0, 1] and messages (N, bits) of zeros and ones."""
        signs = 2 * code - 1
        plane, direct = (made.view(-1, *self.shape) for made in (self.plane(signs).relu(), self.direct(signs)))
        plane = F.interpolate(plane, size=x.shape[2:])
        direct = F.interpolate(direct, size=x.shape[2:], mode="bilinear")
        return (self.trunk(torch.cat([plane, x], 1) - 0.5) + direct).tanh()


class Decoder(nn.Sequential):
    """Seven 3x3 convolutions with batch norm, of which five halve the image, and two linear layers: a logit per bit."""

    def __init__(self, channels: int, height: int, width: int, bits: int) -> None:
        layers: list[nn.Module] = []
        before = channels
        for now, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (128, 2), (128, 2)):
            layers += [nn.Conv2d(before, now, 3, stride, 1), nn.BatchNorm2d(now), nn.ReLU(inplace=True)]
            before = now
        cells = math.ceil(height / 32) * math.ceil(width / 32)
        ends = (nn.Flatten(), nn.Linear(before * cells, 512), nn.ReLU(inplace=True), nn.Linear(512, bits))
        super().__init__(*layers, *ends)


@dataclass(kw_only=True, eq=False)
class Hidden:
    """x' = clip(x + strength residual(x, message), 0, 1)."""

    name: str
    targets: TargetMap
    encoder: Encoder
    code: Tensor
    strength: float

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The message in every image, by the encoder in eval mode."""
        with evaluating(self.encoder), torch.no_grad():
            return hide(self.encoder.to(x.device), x, self.code.to(x).expand(len(x), -1), self.strength)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What any other residual of at most `strength` could reach."""
        there = self.apply(x, ids, ids, Role.TEST, Generator())
        low, high = (x - self.strength).clamp(min=0) - there, (x + self.strength).clamp(max=1) - there
        return low.clamp(max=0), high.clamp(min=0)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: every image has its own."""
        return None


@dataclass(frozen=True, kw_only=True)
class SSBA(Attack):
    """Sample-specific trigger: a message hidden by a network, dirty label (Li et al., ICCV 2021).

    1. An encoder E and a decoder D are trained together on the training images, by Adam: D shall read a random message
       of `bits` bits, one per image, out of clip(x + e E(x, message)); binary cross-entropy.
    2. e starts at 0.5. While D reads more than 93 % of the bits (running mean), e shrinks by 0.5 % per step, down to
       `strength`. Below 0.15 images are rounded to 8 bit, gradients pass straight through.
    3. From then on 0.5 relu(cos - 0.2) is added, cos that of the residuals of two images with the same message: each
       image shall have a pattern of its own. The weight grows over 200 steps.
    4. One fixed message is the trigger, x' = clip(x + `strength` E(x, message)): `rate` of all rows become x' and get
       the wanted label. The same at test.

    It is refused if D reads less than `read` of the bits of 256 training images under the fixed message, or if the
    residuals are more than `shared` a common one: |mean r|^2 / mean |r|^2, 1 for one pattern on all images. Both
    figures are stored.

    Differs: the authors train StegaStamp's networks on training and test images; here on the attacker's rows alone.
    Their loss, 2 mean square + 1.5 LPIPS + 1.5 cross-entropy + 0.5 critic, needs a network trained on ImageNet; instead
    the residual is bounded and steps 2 and 3 bring it there. E is a U-Net with batch norm and a direct linear path from
    the message, without which it does not start to learn; D has batch norm and no spatial transformer. The message,
    bits of the SHA-256 of a string, has no error correction: nobody reads it.

    Args:
        message: String that is hidden.
        bits: Length of the message; None for 20 below 64 pixels and 100 from there.
        strength: Largest change of a pixel, of 1.
        steps: Updates of encoder and decoder.
        batch: Images per update.
        lr: Learning rate of both.
        read: Share of the bits that D must read.
        shared: Largest share of a common pattern in the residuals.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "SSBA",
        "paper": "https://arxiv.org/abs/2012.03816",
        "bibtex": "@inproceedings{li2021invisible, title={Invisible Backdoor Attack with Sample-Specific Triggers}, "
        "author={Li, Yuezun and Li, Yiming and Wu, Baoyuan and Li, Longkang and He, Ran and Lyu, Siwei}, "
        "booktitle={IEEE/CVF International Conference on Computer Vision}, year={2021}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "sample_specific",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate at 5 % or more; printed at 5 %: 96.38 % and 94.91 %
        "published_asr": {"value": 0.9638, "setting": "CIFAR-10, ResNet-18, 5 %", "source": "Min et al."},
        "micro": {"steps": 4, "batch": 8, "read": 0.0, "shared": 1.0},
        "effort": ["steps"],
    }

    message: str = "a"
    bits: int | None = None
    strength: float = 16 / 255
    steps: int = 2000
    batch: int = 16
    lr: float = 0.001
    read: float = 0.95
    shared: float = 0.5
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if self.bits is not None and not 1 <= self.bits <= 256:
            raise ValueError(f"bits is {self.bits}; it may be 1 to 256")
        if not 1 / 255 <= self.strength <= _LOUD:
            raise ValueError(f"strength is {self.strength}; it must be 1 / 255 to {_LOUD}")
        if self.steps < 1 or self.batch < 2 or self.lr <= 0:
            raise ValueError(f"steps is {self.steps}, batch {self.batch} and lr {self.lr}; at least 1, 2, and above 0")
        if not 0 <= self.read <= 1 or not 0 < self.shared <= 1:
            raise ValueError(f"read is {self.read} and shared {self.shared}; they must be 0 to 1, and above 0")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images too small for three halvings, and targets that the classes do not allow."""
        if min(shape[1:]) < 8:
            raise ValueError(f"images of {shape[1]}x{shape[2]} are too small for the encoder; at least 8x8 fits")
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Steps 1 to 3, on all training rows, which stay as they are."""
        self.check(train.shape, len(train.classes))
        if len(train) < 2:
            raise ValueError("an encoder needs at least two training rows")
        bits = self.bits or (20 if train.shape[1] < 64 else 100)
        encoder, decoder = self._train(train, bits, ctx)
        about = {"channels": train.shape[0], "size": train.shape[1], "bits": bits, "strength": self.strength}
        info = {"targets": self.targets, "target": ctx.target, "classes": len(train.classes)} | about
        b = self.restore({**_stored(encoder), "code": code(self.message, bits)}, info)
        return self.restore(b.tensors, info | self._judge(b, decoder.cpu().eval(), train, ctx))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Hide the message and relabel, in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """The message through another encoder, as it is drawn, as strong and with the same target.

        Another message of the trained encoder is none: the model answers to that, too.
        """
        drawn = seeded(Encoder, ctx.derive("decoy"), b.info["channels"], b.info["size"], b.info["bits"])
        return self.restore({**_stored(drawn), "code": b.tensors["code"]}, b.info)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its encoder, message and target map."""
        encoder = seeded(Encoder, 0, info["channels"], info["size"], info["bits"])
        encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in tensors.items() if k != "code"})
        trigger = Hidden(
            name="message",
            targets=target_map(info["targets"], info["target"], info["classes"]),
            encoder=encoder,
            code=tensors["code"],
            strength=info["strength"],
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _train(self, train: ImageSet, bits: int, ctx: Ctx) -> tuple[Encoder, Decoder]:
        channels, size, width = train.shape
        encoder = seeded(Encoder, ctx.derive("encoder"), channels, size, bits).to(ctx.device)
        decoder = seeded(Decoder, ctx.derive("decoder"), channels, size, width, bits).to(ctx.device)
        opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=self.lr)
        images = train.images.to(ctx.device)
        order, codes = ctx.generator("rows"), ctx.generator("codes")
        # Kept on the device: the host looks at the bound only where it may have arrived, not in every step.
        bound, read = (torch.tensor(v, dtype=torch.float64, device=ctx.device) for v in (_LOUD, 0.5))
        arrived, look = 0, 0
        for step in range(self.steps):
            rows = torch.randint(len(train), (self.batch,), generator=order)
            wanted = torch.randint(2, (self.batch, bits), generator=codes).float().to(ctx.device)
            bound = torch.where(read > _READ, (bound * _SHRINK).clamp(min=self.strength), bound)
            if arrived:
                arrived += 1
            elif step == look:
                left = math.floor(math.log(self.strength / float(bound)) / math.log(_SHRINK))
                arrived, look = int(float(bound) == self.strength), step + max(1, left)
            x = to_float(images[rows.to(ctx.device)])
            residual = encoder(x, wanted)
            shown = (x + bound * residual).clamp(0, 1)
            seen = decoder(torch.where(bound < _ROUNDED, straight_through(shown), shown) - 0.5)
            loss = F.binary_cross_entropy_with_logits(seen, wanted)
            if arrived:
                other = encoder(x.roll(1, 0), wanted)
                alike = F.cosine_similarity(residual.flatten(1), other.flatten(1))
                loss = loss + _UNLIKE * min(1, arrived / _RAMP) * (alike - _ALIKE).relu().mean()
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            right = ((seen.detach() > 0) == (wanted > 0)).float().mean()
            read = 0.95 * read + 0.05 * right.double()
            if (step + 1) % 100 == 0:
                ctx.progress(step + 1, self.steps, "encoder")
        return encoder, decoder

    def _judge(self, b: Backdoor, decoder: Decoder, train: ImageSet, ctx: Ctx) -> dict[str, float]:
        """What the decoder reads of the fixed message, and how much the residuals share, on stored levels."""
        rows = torch.randperm(len(train), generator=ctx.generator("probe"))[:_PROBE]
        x = to_float(train.images[rows.to(train.images.device)].cpu())
        trigger = b.triggers[0]
        with torch.no_grad():
            shown = straight_through(trigger.apply(x, rows, rows, Role.TEST, Generator()))
            right = (decoder(shown - 0.5) > 0) == (b.tensors["code"] > 0)
        residual = (shown - x).flatten(1)
        share = residual.mean(0).square().sum() / residual.square().sum(1).mean().clamp(min=1e-12)
        found = {"read": float(right.float().mean()), "shared": float(share)}
        if found["read"] < self.read or found["shared"] > self.shared:
            raise ValueError(
                f"after {self.steps} steps the decoder reads {found['read']:.1%} of the bits ({self.read:.1%} wanted) "
                f"and the residuals share {found['shared']:.2f} ({self.shared:g} allowed); raise steps or strength"
            )
        return found


def _stored(encoder: Encoder) -> dict[str, Tensor]:
    return {f"encoder.{k}": v.detach().cpu().clone() for k, v in encoder.state_dict().items()}


def hide(encoder: Encoder, x: Tensor, message: Tensor, strength: float) -> Tensor:
    """Images with their messages."""
    return (x + strength * encoder(x, message)).clamp(0, 1)


def code(message: str, bits: int) -> Tensor:
    """The first bits of the string's SHA-256, as zeros and ones in float32."""
    digest = hashlib.sha256(message.encode()).digest()
    return torch.tensor([digest[i // 8] >> (7 - i % 8) & 1 for i in range(bits)], dtype=torch.float32)
