"""NAD: the backdoored model learns the attention of a copy that was fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, Model, NotApplicable
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.distil import OUTPUT, Taught
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.taps import capture, taps
from sleeperbench.kit.tune import tune

NAMES = {f"scale={scale:g}": scale for scale in (0.1, 1.0, 10.0)}
"""What the honest choice multiplies the betas by, the least aggressive first."""


@dataclass(frozen=True, kw_only=True)
class NAD(Defense):
    """Neural attention distillation (Li et al., ICLR 2021), with the settings of BackdoorBench.

    1. Teacher: a copy of the model, fine-tuned on the clean rows, then in eval mode and frozen.
    2. Student: the model itself, on CE + sum over its last three stages of beta MSE(A(F_S), A(F_T)), where
       A(F) = q / (|q| + 1e-6), q = sum over channels of F^2, the norm taken over each image's H x W map and the mean of
       squares over images and pixels. No gradient reaches the teacher.

    In both, SGD (momentum 0.9) at a constant rate on batches of clean rows, cropped and flipped. All parameters are
    tuned. BatchNorm normalises by the batch and updates its running statistics; the teacher of step 2 uses its running
    ones. It stops after `steps` and keeps the last weights. A teacher's step costs one pass forth and one back per
    image, a student's one more forth. With a given `scale` all clean rows are trained on. With None the betas times
    0.1, 1 and 10 are tried on the rows that `kit.candidates.split` leaves, under one teacher, and the largest that the
    honest rule accepts on the others is kept; all are in the outcome's path, but for those that diverge. Needs three
    stages whose maps have more than one pixel (`needs_maps`): a map of one is 1 whatever its network answers.

    Differs: 10 epochs on 2,500 CIFAR-10 rows in batches of 256 are kept as 100 steps, for teacher and student each,
    whatever the number of rows; BackdoorBench lets the teacher's rate begin to fall along a cosine over 100 epochs. It
    takes the maps of a pre-activation ResNet after the last stage's pooling, where they have one pixel; here they are
    those of the stage itself. The authors train the student for 20 epochs in batches of 64, at 0.1 for the first two,
    with Nesterov's momentum, and choose the epoch by accuracy and ASR on test data.

    Args:
        scale: Factor on all betas; None for the honest choice.
        betas: Weights of the attention terms of the last three stages, low to high.
        lr: Learning rate.
        teacher_steps: Updates of the teacher.
        steps: Updates of the student.
        batch: Rows per update; all rows where there are fewer.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "NAD",
        "paper": "https://arxiv.org/abs/2101.05930",
        "bibtex": "@inproceedings{li2021neural, title={Neural Attention Distillation: Erasing Backdoor Triggers from "
        "Deep Neural Networks}, author={Li, Yige and Lyu, Xixiang and Koren, Nodens and Lyu, Lingjuan and Li, Bo and "
        "Ma, Xingjun}, booktitle={International Conference on Learning Representations}, year={2021}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"teacher_steps": 10, "steps": 10, "batch": 64},
        "effort": ["teacher_steps", "steps"],
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"conv", "linear_head"})

    scale: float | None = 1.0
    betas: tuple[float, float, float] = (500.0, 1000.0, 1000.0)
    lr: float = 0.01
    teacher_steps: int = 100
    steps: int = 100
    batch: int = 256
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if len(self.betas) != 3 or min(self.betas) < 0:
            raise ValueError(f"betas is {self.betas}; three numbers of at least 0 are needed")
        if self.scale is not None and self.scale < 0:
            raise ValueError(f"scale is {self.scale}; it must be at least 0, or be left out")

    def run(self, case: Case) -> Outcome:
        """The student and, where the scale was chosen, all candidates.

        Raises:
            NotApplicable: the last three stages do not answer with maps.
        """
        stages = attended(case.net, case.clean.images[:1], case.ctx)
        if self.scale is not None:
            teacher = self.teacher(case, case.clean)
            return Outcome(model=self.student(case, case.clean, stages, teacher, self.scale))
        rows, held = split(case)
        picked = pick(case.net, self.candidates(case, rows, stages), held, ctx=case.ctx, what="scale")
        if picked.name is None:
            return Outcome(chosen={"scale": None, **picked.about}, path=picked.path)
        chosen = {"scale": NAMES[picked.name], **picked.about}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=picked.path)

    def candidates(
        self, case: Case, rows: ImageSet, stages: Sequence[str]
    ) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """One student per scale at which training stays finite."""
        teacher = self.teacher(case, rows)
        for name, scale in NAMES.items():
            try:
                model = self.student(case, rows, stages, teacher, scale)
            except FloatingPointError:
                continue
            yield name, load(model, case.ctx.device), {}

    def teacher(self, case: Case, rows: ImageSet) -> Classifier:
        """The fine-tuned copy, in eval mode."""
        ctx = replace(case.ctx, seed=case.ctx.derive("teacher"))
        return load(self.tuned(case.net, rows, ctx, self.teacher_steps, None), case.ctx.device)

    def student(self, case: Case, rows: ImageSet, stages: Sequence[str], teacher: Classifier, scale: float) -> Model:
        """The model after distillation."""
        terms = {name: scale * beta for name, beta in zip(stages, self.betas, strict=True)}
        return self.tuned(case.net, rows, case.ctx, self.steps, Distillation(teacher, terms, case.ctx))

    def tuned(self, net: Classifier, rows: ImageSet, ctx: Ctx, steps: int, hooks: TrainHooks | None) -> Model:
        """`net` after so many steps."""
        return tune(
            net,
            rows,
            ctx=ctx,
            lr=self.lr,
            steps=steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            hooks=hooks,
        )


class Distillation(Taught):
    """Cross-entropy, and the distance of the attention maps to those of `teacher`."""

    def __init__(self, teacher: Classifier, betas: dict[str, float], ctx: Ctx) -> None:
        super().__init__(teacher, [*betas], ctx)
        self.betas = betas

    def loss(self, net: Any, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE + sum of beta MSE(A(F_S), A(F_T))."""
        wanted = self.answers(x)
        seen = capture(net, x, [*self.betas, OUTPUT])
        loss = F.cross_entropy(seen[OUTPUT], y)
        for name, beta in self.betas.items():
            loss = loss + beta * F.mse_loss(attention(seen[name]), attention(wanted[name]))
        return loss


def attention(maps: Tensor) -> Tensor:
    """Attention maps (N, H, W) of feature maps (N, C, H, W): squares summed over channels, of Euclidean norm 1."""
    q = maps.float().square().sum(1)
    return q / (q.flatten(1).norm(dim=1)[:, None, None] + 1e-6)


def attended(net: Classifier, images: Tensor, ctx: Ctx) -> tuple[str, ...]:
    """Names of the last three stages.

    Raises:
        NotApplicable: there are fewer, or one answers with tokens, channels last, or a single pixel.
    """
    stages = taps(net).stages[-3:]
    with torch.no_grad(), evaluating(net):
        found = capture(net, to_float(images.to(device_of(net))), stages)
    ctx.cost.forwards += len(images)
    # Images are square, so maps are too; channels last gives (N, H, W, C).
    flat = [n for n, m in found.items() if m.dim() != 4 or m.shape[2] != m.shape[3] or m.shape[3] < 2]
    if len(stages) < 3 or flat:
        raise NotApplicable(f"needs_maps: {flat[0] if flat else 'a third stage'} gives none of more than one pixel")
    return stages
