"""Attacks: triggers, what is poisoned, and how training is controlled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum, auto
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.method import Method
from sleeperbench.data.images import ImageSet


class Mark(IntEnum):
    """What a training row is to the attacker."""

    CLEAN = 0
    DIRTY = 1
    COVER = 2


class Role(StrEnum):
    """Why a trigger is applied; train and test triggers may differ."""

    TRAIN = auto()
    TEST = auto()
    COVER = auto()


@dataclass(frozen=True, kw_only=True)
class PoisonedSet:
    """What an attack trains on.

    Args:
        data: Images and labels as trained on.
        mark: int64 (N,) of `Mark`.
        trigger_id: int64 (N,), index of the trigger on a row, -1 without one.
        true_labels: int64 (N,), labels before poisoning.
        appended: bool (N,), True where a row was added beside its clean copy.
    """

    data: ImageSet
    mark: Tensor
    trigger_id: Tensor
    true_labels: Tensor
    appended: Tensor

    @classmethod
    def clean(cls, data: ImageSet) -> PoisonedSet:
        """`data` with nothing poisoned."""
        n = len(data)
        return cls(
            data=data,
            mark=torch.zeros(n, dtype=torch.int64),
            trigger_id=torch.full((n,), -1),
            true_labels=data.labels.clone(),
            appended=torch.zeros(n, dtype=torch.bool),
        )

    def rate(self) -> float:
        """Rows that carry a trigger meant to work (mark DIRTY) over the rows that were not appended."""
        return int((self.mark == Mark.DIRTY).sum()) / max(1, int((~self.appended).sum()))

    def view(self, seed: int) -> ImageSet:
        """All that a defender may see: rows shuffled by `seed`, ids renumbered, no marks."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed))
        return replace(self.data.rows(order), ids=torch.arange(len(order)))


@dataclass(frozen=True, kw_only=True)
class TargetMap:
    """Which label a trigger asks for, and which samples count.

    Args:
        target: True labels (N,) -> wanted labels (N,).
        counts: (labels, ids) -> bool (N,): the sample belongs to the triggered test set. Never where the true label
            is already the target.
    """

    target: Callable[[Tensor], Tensor]
    counts: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def all_to_one(cls, target: int) -> TargetMap:
        """Every other class to `target`."""
        return cls(target=lambda y: torch.full_like(y, target), counts=lambda y, ids: y != target)

    @classmethod
    def all_to_all(cls, classes: int, shift: int = 1) -> TargetMap:
        """Class y to (y + shift) mod classes."""
        return cls(
            target=lambda y: (y + shift) % classes,
            counts=lambda y, ids: torch.full_like(y, shift % classes != 0, dtype=torch.bool),
        )


class Trigger(Protocol):
    """Something that turns clean images into triggered ones."""

    @property
    def name(self) -> str:
        """Shown on pictures and pages."""
        ...

    @property
    def targets(self) -> TargetMap:
        """Which label it asks for, and which samples count."""
        ...

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """Triggered copies, float32 [0, 1] (N, C, H, W); row i depends on row i alone."""
        ...

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Admissible deltas (low, high) around the trigger on `x`, for Excl; None where undefined."""
        ...

    def static(self) -> tuple[Tensor, Tensor] | None:
        """(mask (1, H, W), pattern (C, H, W)), both in [0, 1]; None when sample-specific."""
        ...


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """One or several triggers and all that re-applies them; `Attack.restore` reads tensors and info back."""

    triggers: tuple[Trigger, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Any = None


class TrainHooks:
    """Control over training: override any subset. The trainer owns the loop, the data and the schedule."""

    def __init__(self) -> None:
        self.aux: dict[str, nn.Module] = {}
        """Networks trained beside the classifier (generators); their states are stored with the backdoor."""
        self.augments = False
        """`batch` gets the images as they are and does the recipe's crop and flip itself, after its trigger."""
        self.places: Tensor | None = None
        """Where the rows of the batch at hand stand in the training set; the trainer sets it before `batch`. Rows that
        an attack added beside their clean copies share their ids."""

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [0, 1], labels and marks to train on, from a batch of training rows, augmented unless `augments`."""
        return x, y, torch.zeros_like(y)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Scalar training loss."""
        return nn.functional.cross_entropy(net(x), y)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """One update; returns the detached loss. Override for two optimisers or sharpness-aware steps."""
        opt.zero_grad(set_to_none=True)
        loss = self.loss(net, x, y, mark)
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        return loss.detach()

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        """Called after each epoch (from 0); True stops training."""
        return False


class Attack(Method):
    """A backdoor attack.

    `NEEDS` names further inputs, such as `{"clean_models": 1}`; they reach `ctx.clean_models`. `SNAPSHOT` says what the
    set of `poison` is: `exact`, what was trained on; `declared`, one that stands for it, where `hooks` poison the
    batches of the clean training rows; `none`, the clean rows themselves: nothing stands for what was trained on.
    With `"covers": True` in INFO the engine also renders test images with `Role.COVER`, whose true label should stand.
    An attack with `"wrapper": True` in INFO is named `<id>:<inner id>` and finds the wrapped one as `ctx.inner`.
    Defenses of the training set get what `poison` gave, under flag `snapshot` if it was declared; with `none` they are
    not applicable.
    """

    NEEDS: ClassVar[Mapping[str, int]] = {}
    SNAPSHOT: ClassVar[Literal["exact", "declared", "none"]] = "exact"

    @abstractmethod
    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Choose pattern, position and target; train encoders. Randomness from `ctx.generator` alone."""

    @abstractmethod
    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The training set, with at most `rate` of all rows poisoned, chosen among `eligible` (bool, (N,))."""

    def hooks(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> TrainHooks | None:
        """Training control, or None for plain training on the poisoned set. The first four are those of `poison`."""
        return None

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from what `prepare` (and the hooks' aux networks) stored.

        An attack that wraps another takes the wrapped class as a third argument.
        """

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """A trigger of the same family, with the same target, that the model never saw: RA's placebo.

        The default prepares anew under `ctx`, whose seed is another; override where the pattern is fixed.
        """
        return self.prepare(train, ctx)
