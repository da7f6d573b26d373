"""Blind: the code that computes the loss is poisoned; it adds a backdoor task and weighs it against the main one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TrainHooks, Trigger
from sleeperbench.attacks.badnets import Patch
from sleeperbench.contracts import Ctx
from sleeperbench.kit.patches import lay, scaled
from sleeperbench.kit.poison import rows_at, target_map

_SHAPE = ((1, 0, 1), (-1, 1, -1), (-1, -1, 0), (-1, 1, -1), (1, 0, 1))
"""The authors' pattern: black, white, and pixels that it leaves as they are (-1)."""
_CAP = 10.0
"""Largest normaliser of a gradient, in the authors' code."""
_TINY = 1e-12
"""Smallest one: a loss of zero has no gradient to divide."""
_WAIT = 0.1
"""Largest share of the training that may pass before the backdoor task is first looked at."""


class Twice(TrainHooks):
    """Appends to every batch triggered copies of its rows, with the wanted label; the rows themselves stay clean.

    Rows that may not be poisoned get no copy. `copies` says how many of the batch's last rows are some: their number is
    known here, and counting marks would wait for the device in every step.

    Args:
        trigger: Puts itself on the copies.
        train: Clean rows, as given to the trainer.
        eligible: bool (N,), rows that may be poisoned.
        device: Where batches lie.
    """

    def __init__(self, trigger: Trigger, train: ImageSet, eligible: Tensor, device: torch.device) -> None:
        super().__init__()
        self.trigger = trigger
        free = torch.zeros(int(train.ids.max()) + 1, dtype=torch.bool)
        free[train.ids.cpu()] = eligible.cpu()
        self.free, self.every = free.to(device), bool(eligible.all())
        self.copies = 0
        self.gen = torch.Generator(device=device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch and its copies."""
        rows = self.chosen(ids)
        self.copies = len(rows)
        with torch.no_grad():
            copies = self.trigger.apply(x[rows], y[rows], ids[rows], Role.TRAIN, self.gen)
        shown = torch.cat([x, copies.clamp(0, 1).mul(255).round() / 255])
        labels = torch.cat([y, self.trigger.targets.target(y[rows])])
        mark = torch.full_like(labels, Mark.DIRTY)
        mark[: len(x)] = Mark.CLEAN
        return shown.contiguous(memory_format=torch.channels_last), labels, mark

    def chosen(self, ids: Tensor) -> Tensor:
        """Places of the rows that get a copy; only where some may get none does finding them wait for the device."""
        return torch.arange(len(ids), device=ids.device) if self.every else self.free[ids].nonzero().flatten()


def apart(logits: Tensor, y: Tensor, copies: int) -> list[Tensor]:
    """Cross-entropy of the rows before the last `copies` and of these, where there are any, all of one pass."""
    n = len(y) - copies
    parts = [p for p in (slice(0, n), slice(n, None)) if len(y[p])]
    return [nn.functional.cross_entropy(logits[p], y[p]) for p in parts]


class BlindHooks(Twice):
    """Steps 2 to 4 of `Blind`."""

    def __init__(self, attack: Blind, trigger: Trigger, train: ImageSet, eligible: Tensor, ctx: Ctx) -> None:
        super().__init__(trigger, train, eligible, ctx.device)
        self.attack = attack
        steps = ctx.recipe.epochs * max(1, len(train) // ctx.recipe.batch)
        self.past: deque[float] = deque(maxlen=max(1, min(attack.history, int(_WAIT * steps))))

    def open(self) -> bool:
        """Step 2: enough batches were seen, and their mean loss is low enough."""
        full = len(self.past) == self.past.maxlen
        return full and sum(self.past) / len(self.past) < self.attack.threshold

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies where the backdoor task is open."""
        self.copies = 0
        return super().batch(x, y, ids, step) if self.open() else (x, y, torch.zeros_like(y))

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """That of the main task; `parts` keeps it and, where there are copies, that of the backdoor task."""
        self.parts = apart(net(x), y, self.copies)
        return self.parts[0]

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Steps 3 and 4; returns the loss of the main task. What surrounds these hooks adds to that task."""
        weights = [p for group in opt.param_groups for p in group["params"]]
        tasks = [self.loss(net, x, y, mark), *self.parts[1:]]
        grads = [
            torch.autograd.grad(task, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
            for task in tasks
        ]
        losses = [task.detach() for task in tasks]
        scales = self.scales(losses, grads) if len(grads) > 1 else [1.0]
        for p, *found in zip(weights, *grads, strict=True):
            p.grad = torch.stack([s * g for s, g in zip(scales, found, strict=True)]).sum(0)
        opt.step()
        # This waits for the device in every step: whether the next batch has copies depends on this loss.
        self.past.append(float(self.parts[0].detach()))
        return losses[0]

    def scales(self, losses: list[Tensor], grads: list[tuple[Tensor, ...]]) -> list[Any]:
        """Weights of main and backdoor task."""
        if self.attack.balance == "fixed":
            return [1.0, self.attack.weight]
        flat = [torch.cat([g.flatten() for g in gs]) for gs in grads]
        flat = [g / (loss * g.norm()).clamp(_TINY, _CAP) for g, loss in zip(flat, losses, strict=True)]
        first = nearest(*flat)
        return [first, 1 - first]


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """The s of [0.001, 0.999] at which |s a + (1 - s) b| is smallest (the two-task case of Desideri 2012)."""
    far = (a - b).square().sum()
    return torch.where(far > 0, (b * (b - a)).sum() / far, 0.5).clamp(0.001, 0.999)


@dataclass(frozen=True, kw_only=True)
class Blind(Attack):
    """A poisoned loss computation that balances main and backdoor task by MGDA (Bagdasaryan, Shmatikov, USENIX 2021).

    1. The data stay clean. The trigger is a 5x3 pattern of single black and white pixels.
    2. Once `history` batches were seen, and whenever the mean loss of the last `history` ones is below `threshold`, a
       batch yields a second one: all of its rows with the trigger and the wanted label.
    3. They have losses l1 and l2 with gradients g1 and g2 of all weights. With `mgda` these are normalised,
       u = g / min(l |g|, 10), and s is where |s u1 + (1 - s) u2| is smallest, at least 0.001 from 0 and 1. With `fixed`
       the weights are 1 and `weight`.
    4. One update along s g1 + (1 - s) g2.

    It controls training and uses every row in every batch, so that the poison rate says nothing but whether it runs
    (0: not at all). No set stands for what was trained on: the victim's data are clean.

    Differs: both batches go through the network in one pass. In passes of their own, as the authors', BatchNorm trains
    under the statistics of each and is tested under those of both: on digits that cost up to 17 points of clean
    accuracy, and BackdoorBench's 83 % on CIFAR-10 look like it. At most a tenth of the training passes before step 2,
    else short trainings would never reach it; 1,000 batches are published, for 100 epochs of CIFAR-10. The pattern
    grows with the image, in whole pixels. Rows of the cut that may not be poisoned get no triggered copy. The
    optimiser, schedule and epochs are the suite's, the authors' 200 epochs from a learning rate of 0.1, BackdoorBench's
    100 from 0.01.

    Args:
        balance: `mgda` (authors) or `fixed` (BackdoorBench's default).
        weight: Weight of the backdoor task under `fixed`.
        history: Batches that the mean loss is taken over.
        threshold: Mean loss of the main task below which the backdoor task runs, in nats.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
    """

    INFO = {
        "title": "Blind",
        "paper": "https://arxiv.org/abs/2005.03823",
        "bibtex": "@inproceedings{bagdasaryan2021blind, title={Blind Backdoors in Deep Learning Models}, "
        "author={Bagdasaryan, Eugene and Shmatikov, Vitaly}, booktitle={USENIX Security Symposium}, year={2021}}",
        "kind": "training_control",
        "version": 2,
        "api": 1,
        "family": "training_control",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate; BackdoorBench prints 99.94 % (CIFAR-10) and 69.29 % (GTSRB)
        "published_asr": {
            "value": 0.9994,
            "setting": "CIFAR-10, PreActResNet18, fixed weights",
            "source": "BackdoorBench",
        },
        "micro": {"history": 1, "threshold": 100.0},
    }
    SNAPSHOT = "none"

    balance: Literal["mgda", "fixed"] = "mgda"
    weight: float = 0.9
    history: int = 1000
    threshold: float = 1.0
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"

    def __post_init__(self) -> None:
        if self.balance not in ("mgda", "fixed"):
            raise ValueError(f"balance is {self.balance!r}; it may be 'mgda' or 'fixed'")
        if self.weight <= 0 or self.history < 1 or self.threshold <= 0:
            raise ValueError(
                f"weight is {self.weight}, history {self.history} and threshold {self.threshold}; they must be above "
                "0, at least 1, and above 0"
            )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images without room for the pattern and targets that the classes do not allow."""
        if min(shape[1:]) < 12:
            raise ValueError(f"images of {shape[1]}x{shape[2]} are too small for the pattern; at least 12x12 fits")
        _laid(shape, torch.tensor(_SHAPE, dtype=torch.float32), mirrored=False)
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the pattern; nothing is drawn."""
        self.check(train.shape, len(train.classes))
        return self._backdoor(train, ctx.target, torch.tensor(_SHAPE, dtype=torch.float32), mirrored=False)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The clean rows, which are what the victim provides."""
        return PoisonedSet.clean(train)

    def hooks(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> TrainHooks | None:
        """Steps 2 to 4; nothing at rate 0."""
        return BlindHooks(self, b.triggers[0], train, eligible, ctx) if rows_at(rate, len(train)) else None

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Other black and white pixels of the same number in the opposite corner, with the same target."""
        square = torch.tensor(_SHAPE, dtype=torch.float32).flatten()
        square = square[torch.randperm(len(square), generator=ctx.generator("decoy"))].view(len(_SHAPE), -1)
        return self._backdoor(train, b.info["target"], square, mirrored=True)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its mask, pattern and target map."""
        targets = target_map(info["targets"], info["target"], info["classes"])
        patch = Patch(name="pattern", targets=targets, mask=tensors["mask"], pattern=tensors["pattern"])
        return Backdoor(triggers=(patch,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, square: Tensor, mirrored: bool) -> Backdoor:
        mask, pattern = _laid(train.shape, square, mirrored)
        info = {"targets": self.targets, "target": target, "classes": len(train.classes)}
        return self.restore({"mask": mask, "pattern": pattern}, info)


def _laid(shape: tuple[int, int, int], square: Tensor, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Mask (1, H, W) and pattern (C, H, W): from row 3 and column 23 of 32, or at the point opposite."""
    channels, height, width = shape
    grown = max(1, round(height / 32))
    square = square.repeat_interleave(grown, 0).repeat_interleave(grown, 1)
    top, left = scaled(3, height), scaled(23, width)
    if mirrored:
        top, left = height - top - square.shape[0], width - left - square.shape[1]
    mask, pattern = lay(shape, top, left, square.clamp(min=0).expand(channels, -1, -1))
    mask[:, top : top + square.shape[0], left : left + square.shape[1]] = (square >= 0).float()
    return mask, pattern
