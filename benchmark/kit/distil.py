"""Distillation: a student is trained beside a teacher that only answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.taps import capture

OUTPUT = ""
"""The name of the whole network among its modules: `capture` gives its logits."""


class Taught(TrainHooks):
    """A student's training; a method adds its loss, which compares `capture` of the student with `answers`.

    Args:
        teacher: Left as it is.
        sites: Layers of it that are looked at; `OUTPUT` for its logits.
        ctx: Costs.
    """

    def __init__(self, teacher: Classifier, sites: Sequence[str], ctx: Ctx) -> None:
        super().__init__()
        self.teacher, self.sites, self.ctx = teacher, tuple(sites), ctx

    def answers(self, x: Tensor) -> dict[str, Tensor]:
        """What the teacher answers to a batch, by site: in eval mode, without a graph; its images are counted."""
        with evaluating(self.teacher), torch.no_grad():
            found = capture(self.teacher, x, self.sites)
        self.ctx.cost.forwards += len(x)
        return found
