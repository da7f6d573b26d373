"""What every method is handed beside its data: randomness, device, recipe, scratch folder, cost counters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How classifiers of a suite are trained; stored with every model.

    Args:
        epochs: Passes over the training rows.
        lr: Peak learning rate of SGD.
        batch: Rows per step; the last short batch of an epoch is dropped.
        momentum: SGD momentum.
        weight_decay: L2 factor on all parameters.
        schedule: `cosine` to zero over all steps, or `constant`.
        precision: `fp32` or `bf16` (autocast in training only).
        pad: Zero padding in pixels before the random crop; 0 for no crop.
        flip: Random horizontal flip.
    """

    epochs: int = 40
    lr: float = 0.1
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    precision: str = "fp32"
    pad: int = 4
    flip: bool = True


@dataclass
class Cost:
    """What a task spent, counted in images.

    Args:
        forwards: Images through a classifier's forward pass.
        backwards: Images through a backward pass.
        queries: Images sent to a query-only model.
    """

    forwards: int = 0
    backwards: int = 0
    queries: int = 0


def derive(seed: int, *labels: object) -> int:
    """A 63-bit seed that depends on `seed` and the labels, and on nothing else."""
    text = "\0".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _silent(done: int, total: int, what: str) -> None:
    pass


@dataclass(kw_only=True)
class Ctx:
    """The running context of one task.

    Args:
        seed: Root of this task's randomness; an attack's comes from the suite's secret, a defense's is drawn apart.
        target: For attacks, the class that an all-to-one trigger aims at; -1 elsewhere.
        device: Where tensors of the task live.
        recipe: How classifiers are trained in this suite.
        scratch: The only folder that method code may write to.
        cost: Counters; the kit fills them.
        progress: `progress(done, total, what)` for long work.
        clean_models: For attacks that declare NEEDS clean_models: independent clean models.
        inner: For an attack that wraps another: the wrapped attack.
    """

    seed: int
    recipe: Recipe
    scratch: Path
    target: int = -1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cost: Cost = field(default_factory=Cost)
    progress: Callable[[int, int, str], None] = _silent
    clean_models: tuple[Any, ...] = ()
    inner: Any = None

    def derive(self, *labels: object) -> int:
        """A seed for one named use, independent of every other name."""
        return derive(self.seed, *labels)

    def generator(self, *labels: object, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for one named use. CPU by default, so that draws are equal on every device."""
        return torch.Generator(device=device).manual_seed(self.derive(*labels))
