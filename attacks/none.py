"""No attack: the clean models that everything else is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.contracts import Ctx


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """Clean training: the control for every attack and the negatives of every detector."""

    INFO = {
        "title": "No attack",
        "paper": "",
        "bibtex": "",
        "kind": "control",
        "version": 1,
        "api": 1,
        "family": "none",
        "clean_label": False,
        "implant_asr": 0.0,  # nothing to implant
        "micro": {},
    }

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """A backdoor without triggers."""
        return Backdoor(triggers=())

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The training set as it is, whatever the rate."""
        return PoisonedSet.clean(train)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """A backdoor without triggers."""
        return Backdoor(triggers=())
