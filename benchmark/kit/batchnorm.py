"""Batch-normalisation statistics estimated anew; the weights stay."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.contracts.models import Model
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.pixels import to_float


@torch.no_grad()
def refresh(net: Classifier, images: Tensor, *, batch: int, ctx: Ctx) -> Model:
    """A copy of `net` whose running statistics come from `images` alone.

    The images, not augmented, are cut into the fewest batches of at most `batch` rows, equal in size to within one
    row, in their order. With n_k rows in batch k, every normalisation layer ends with
    running_mean = sum n_k m_k / sum n_k and running_var = sum n_k v_k / sum n_k, where m_k is the mean and v_k the
    unbiased variance (divisor: values per channel minus 1) of the layer's input over batch k and all positions. In the
    first such layer running_mean is thus the mean over all images; deeper layers see inputs that batch statistics
    normalised. Equal batches make it torch's cumulative average (`momentum=None`). All other layers run in eval mode.

    Args:
        net: Left untouched.
        images: uint8 (N, C, H, W).
        batch: Largest number of rows per batch.
        ctx: Device and costs.

    Returns:
        The model with new statistics.

    Raises:
        NotApplicable: `needs_bn`, no layer keeps running statistics.
        ValueError: no images.
    """
    if not len(images):
        raise ValueError("no images to estimate statistics from")
    fresh = copy.deepcopy(net).to(ctx.device).eval()
    layers = [m for m in fresh.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        raise NotApplicable("needs_bn")
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    for part in images.to(ctx.device).tensor_split(math.ceil(len(images) / batch)):
        seen += len(part)
        for layer in layers:
            layer.momentum = len(part) / seen
        fresh(to_float(part))
    ctx.cost.forwards += len(images)
    return pack(fresh)
