"""LC (label-consistent): images of the target class, made hard to recognise and stamped in the corners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet, Role, TargetMap, TrainHooks
from sleeperbench.contracts import Ctx, NotApplicable
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.patches import scaled
from sleeperbench.kit.pgd import ascent
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import poison_target_class, target_map
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.train import fit

_LEFT = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))
"""Signs of the 3x3 cells in both left corners; the right ones are mirrored."""
_BATCH = 250
"""Images per batch of step 2."""


@dataclass(kw_only=True, eq=False)
class Corners:
    """x' = clip(x + amplitude signal); in training a row of the target whose id is in `ids` first becomes x + delta.

    Args:
        name: Shown on pictures and pages.
        targets: Which label it asks for.
        signal: float32 (1, H, W) of -1, 0 and 1.
        amplitude: Strength; at 1 pixels become black or white.
        ids: int64 (K,), ascending.
        delta: int8 (K, C, H, W), grey levels.
    """

    name: str
    targets: TargetMap
    signal: Tensor
    amplitude: float
    ids: Tensor
    delta: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """The patches, and under `Role.TRAIN` below them the perturbation where there is one for the row."""
        if role is Role.TRAIN:
            at = torch.searchsorted(self.ids, ids.cpu()).clamp(max=len(self.ids) - 1)
            # Ids count within a split: a test row may have that of a training row, but none of the target class counts.
            known = ((self.ids[at] == ids.cpu()) & (self.targets.target(y) == y).cpu()).view(-1, 1, 1, 1)
            x = (x + (self.delta[at] * known).to(x) / 255).clamp(0, 1)
        return (x + self.amplitude * self.signal.to(x)).clamp(0, 1)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """What patches of other signs or weaker ones could reach; other pixels are fixed."""
        size, now = self.amplitude * self.signal.abs().to(x), (x + self.amplitude * self.signal.to(x)).clamp(0, 1)
        return (x - size).clamp(0, 1) - now, (x + size).clamp(0, 1) - now

    def static(self) -> tuple[Tensor, Tensor] | None:
        """Mask and pattern where the patches cover; None where they are added."""
        if self.amplitude < 1:
            return None
        return self.signal.abs(), self.signal.clamp(0, 1).expand(self.delta.shape[1], -1, -1).contiguous()


class Hardened(TrainHooks):
    """Adversarial training: each batch is replaced by what raises its own loss most within the ball."""

    def __init__(self, attack: LabelConsistent, ctx: Ctx) -> None:
        super().__init__()
        self.attack, self.ctx, self.batches = attack, ctx, 0

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Cross-entropy on x + delta, delta found in eval mode from a uniform start."""
        a = self.attack
        gen = self.ctx.generator("start", self.batches)
        self.batches += 1
        start = (2 * torch.rand(x.shape, generator=gen) - 1).to(x) * a.eps
        with evaluating(net):
            delta = hardest(net, x, y, start, eps=a.eps, step=a.inner_step, steps=a.inner_steps)
        return F.cross_entropy(net(x + delta), y)


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(Attack):
    """Perturbed images of the target class with patches in the corners, clean label (Turner, Tsipras, Madry 2019).

    1. A surrogate g is trained adversarially: per batch `inner_steps` steps of `inner_step` from a uniform start within
       `eps` raise the loss of g on the batch, then g learns from what came out.
    2. Every image of the target class becomes x + d: `steps` steps of `step` times the sign of the gradient of
       CE(g(x + d), y), from d = 0, d within +-`eps` and x + d within [0, 1]; then it is rounded to 8 bit.
    3. `amplitude` is added to white and subtracted from black pixels of a 3x3 pattern (at 32 pixels), followed by a
       clip: 100/010/101 in both left corners, mirrored in both right ones.
    4. `rate` of all rows, drawn among the target class, become images of steps 2 and 3 and keep their true label.
    5. At test the patches alone, on images of the other classes.

    Differs: the surrogate has the suite's architecture and recipe and starts from the weights of a clean model, for
    `epochs` epochs; the authors train a wider one from random weights. Perturbations belong to training rows: any other
    image gets the patches alone, whatever its role. The authors' interpolation in a GAN's latent space and their
    Euclidean balls are not offered. Values are BackdoorBench's.

    Args:
        eps: Radius of the perturbation, of 1; at most 127/255.
        step: Length of a step of step 2, of 1.
        steps: Number of these steps.
        amplitude: Strength of the patches, of 1; below 1 they shine through, the authors' faint form is 32/255.
        epochs: Epochs of step 1.
        inner_step: Length of a step of step 1, of 1.
        inner_steps: Their number per batch.
    """

    INFO = {
        "title": "LC",
        "paper": "https://arxiv.org/abs/1912.02771",
        "bibtex": "@article{turner2019label, title={Label-Consistent Backdoor Attacks}, author={Turner, Alexander and "
        "Tsipras, Dimitris and Madry, Aleksander}, journal={arXiv preprint arXiv:1912.02771}, year={2019}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "clean_label",
        "clean_label": True,
        "implant_asr": 0.7,  # the protocol's gate for clean labels
        "published_asr": {"value": 0.9999, "setting": "CIFAR-10, ResNet-18, 5 %", "source": "Min et al."},
        "micro": {"epochs": 1, "inner_steps": 2, "steps": 10},
        "effort": ["epochs", "steps"],
    }
    NEEDS = {"clean_models": 1}

    eps: float = 8 / 255
    step: float = 1.5 / 255
    steps: int = 100
    amplitude: float = 1.0
    epochs: int = 30
    inner_step: float = 2 / 255
    inner_steps: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 127 / 255:
            raise ValueError(f"eps is {self.eps}; it must be above 0 and at most 127/255")
        if not 0 < self.amplitude <= 1:
            raise ValueError(f"amplitude is {self.amplitude}; it must be above 0 and at most 1")
        for name in ("step", "inner_step"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("steps", "epochs", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images in which the corners would meet, and a single class."""
        if min(shape[1:]) < 9:
            raise ValueError(f"the corners would meet in {shape[1]}x{shape[2]} images; 9 pixels or more fit")
        target_map("all_to_one", 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Steps 1 to 3 from `ctx.clean_models[0]`, for all rows of the target class."""
        self.check(train.shape, len(train.classes))
        own = train.rows(train.labels == ctx.target)
        if not len(own):
            raise NotApplicable(f"few_target_rows: class {ctx.target} has no training row")
        own = own.rows(own.ids.argsort())
        net = self._surrogate(train, ctx)
        tensors = {"signal": _signs(train.shape), "ids": own.ids.cpu(), "delta": self._perturb(net, own, ctx)}
        info = {"target": ctx.target, "classes": len(train.classes), "amplitude": self.amplitude}
        return self.restore(tensors, info)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Perturbation and patches on rows of the target class, in place."""
        return poison_target_class(train, b, b.info["target"], eligible, rate, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Patches of random signs in the middle of the four sides, with the same target."""
        _, height, width = train.shape
        cells = 2 * torch.randint(2, (4, 3, 3), generator=ctx.generator("decoy")) - 1
        squares = [_grown(c.float(), height) for c in cells]
        side = len(squares[0])
        down, right = (height - side) // 2, (width - side) // 2
        places = ((0, right), (height - side, right), (down, 0), (down, width - side))
        signal = torch.zeros(1, height, width)
        for (top, left), square in zip(places, squares, strict=True):
            signal[0, top : top + side, left : left + side] = square
        return self.restore({**b.tensors, "signal": signal}, b.info)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its patches, perturbations and target."""
        targets = target_map("all_to_one", info["target"], info["classes"])
        trigger = Corners(
            name="corners",
            targets=targets,
            signal=tensors["signal"],
            amplitude=info["amplitude"],
            ids=tensors["ids"],
            delta=tensors["delta"],
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _surrogate(self, train: ImageSet, ctx: Ctx) -> Classifier:
        """Step 1."""
        net = load(ctx.clean_models[0], ctx.device)
        apart = replace(ctx, seed=ctx.derive("surrogate"))
        fit(net, train, replace(ctx.recipe, epochs=self.epochs), apart, hooks=Hardened(self, apart))
        return net.requires_grad_(False)

    def _perturb(self, net: Classifier, own: ImageSet, ctx: Ctx) -> Tensor:
        """Step 2: int8 levels (K, C, H, W) on the CPU."""
        parts = []
        for start in range(0, len(own), _BATCH):
            x = to_float(own.images[start : start + _BATCH].to(ctx.device))
            y = own.labels[start : start + _BATCH].to(ctx.device)
            d = hardest(net, x, y, torch.zeros_like(x), eps=self.eps, step=self.step, steps=self.steps)
            parts.append((d * 255).round().to(torch.int8).cpu())
            ctx.progress(start + len(x), len(own), "perturb")
        ctx.cost.forwards += self.steps * len(own)
        ctx.cost.backwards += self.steps * len(own)
        return torch.cat(parts)


def hardest(net: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, eps: float, step: float, steps: int) -> Tensor:
    """The perturbation of images that raises their cross-entropy, see `ascent`."""
    return ascent(
        # Summed, so that the gradient of a row does not depend on how many others there are.
        lambda d: F.cross_entropy(net(x + d), y, reduction="sum"),
        start,
        eps=eps,
        step=step,
        steps=steps,
        around=x,
    )


def _grown(cells: Tensor, height: int) -> Tensor:
    """3x3 cells at the image's size: 3 pixels at 32, nearest neighbours beyond."""
    side = scaled(3, height, 3)
    at = torch.arange(side) * 3 // side
    return cells[at][:, at]


def _signs(shape: tuple[int, int, int]) -> Tensor:
    """The pattern of step 3: (1, H, W) of -1, 0 and 1."""
    left = _grown(torch.tensor(_LEFT, dtype=torch.float32), shape[1])
    side = len(left)
    signal = torch.zeros(1, *shape[1:])
    for rows in (slice(0, side), slice(-side, None)):
        signal[0, rows, :side] = left
        signal[0, rows, -side:] = left.flip(1)
    return signal
