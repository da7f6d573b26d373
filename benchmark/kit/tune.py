"""Fine-tuning of a copy: the loop of FT, NAD, FST, SEAM, unlearning, exact purification and the retuning attack."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.models import Model
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.train import fit


def tune(
    net: Classifier,
    data: ImageSet,
    *,
    ctx: Ctx,
    lr: float,
    epochs: int | None = None,
    steps: int | None = None,
    batch: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    augment: bool = True,
    hooks: TrainHooks | None = None,
    optimiser: Literal["sgd", "adam"] = "sgd",
    statistics: Literal["batch", "running"] = "batch",
) -> Model:
    """A fine-tuned copy of `net`; `net` itself keeps its weights, buffers, mode and layout.

    All parameters that require a gradient are tuned.

    Args:
        net: The model to start from.
        data: Labelled rows; fewer than `batch` make one batch of all rows per epoch.
        ctx: Seed, device and costs; crop, flip and precision are those of `ctx.recipe`.
        lr: Learning rate; peak value under `cosine`.
        epochs: Passes over `data`. Either this or `steps`.
        steps: Updates. Published schedules on smaller data keep their meaning in steps, not in epochs.
        batch: Rows per update.
        momentum: SGD momentum.
        weight_decay: L2 factor on all parameters.
        schedule: `constant`, or `cosine` to zero.
        augment: Crop and flip as in training; False for the images as they are.
        hooks: Another loss, step or batch.
        optimiser: `sgd`, or `adam`, which leaves `momentum` unused.
        statistics: BatchNorm normalises by its `batch`, as in training, or by its `running` statistics, which stay.

    Returns:
        The tuned model.

    Raises:
        ValueError: none or both of `epochs` and `steps`, or what `fit` refuses.
        FloatingPointError: the loss or the weights are no longer finite.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("tune needs exactly one of epochs and steps")
    recipe = replace(
        ctx.recipe,
        epochs=epochs or 0,
        lr=lr,
        batch=batch,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        pad=ctx.recipe.pad if augment else 0,
        flip=ctx.recipe.flip and augment,
    )
    tuned = copy.deepcopy(net)
    fit(tuned, data, recipe, ctx, hooks=hooks, steps=steps, optimiser=optimiser, statistics=statistics)
    return pack(tuned)
