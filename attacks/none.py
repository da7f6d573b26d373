"""No attack: the clean models that everything else is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.patches import lay, noise, scaled
from sleeperbench.kit.pixels import to_uint8


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """Clean training: the control for every attack and the negatives of every detector.

    With `stamped` or `noisy` it makes hard negatives for a zoo: models that look worked upon and have no backdoor. A
    detector that flags them reacts to a pattern that was merely seen, or to a model that fits badly.

    Args:
        stamped: Share of all rows, 0..1, that carry one square of random colours in the lower right corner, 3 pixels at
            32, and keep their label; the square is as frequent in every class, so it means nothing.
        noisy: Share of all rows, 0..1, whose label is drawn anew among all classes.
    """

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

    stamped: float = 0.0
    noisy: float = 0.0

    def __post_init__(self) -> None:
        for name in ("stamped", "noisy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of all rows, 0..1")

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """A backdoor without triggers."""
        return Backdoor(triggers=())

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The training set, whatever the rate; squares and labels are drawn from `ctx.generator("negative")`."""
        n, (channels, height, _) = len(train), train.shape
        gen = ctx.generator("negative")
        images, labels = train.images.clone(), train.labels.clone()
        side = scaled(3, height, least=3)
        mask, pattern = lay(train.shape, height - side, train.shape[2] - side, noise(channels, side, gen))
        chosen = torch.randperm(n, generator=gen)[: round(self.stamped * n)].to(images.device)
        images[chosen] = torch.where(mask.to(images.device) > 0, to_uint8(pattern).to(images.device), images[chosen])
        chosen = torch.randperm(n, generator=gen)[: round(self.noisy * n)]
        drawn = torch.randint(len(train.classes), (len(chosen),), generator=gen)
        labels[chosen.to(labels.device)] = drawn.to(labels)
        trained_on = PoisonedSet.clean(replace(train, images=images, labels=labels))
        return replace(trained_on, true_labels=train.labels.clone())

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """A backdoor without triggers."""
        return Backdoor(triggers=())
