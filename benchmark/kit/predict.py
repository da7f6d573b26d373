"""Logits over many images, and how many are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx
from sleeperbench.kit.pixels import to_float


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode it had, also after an error."""
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(net: nn.Module) -> torch.device:
    """Where the network's tensors live; the CPU for one without any."""
    return next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu"))


def predict(net: nn.Module, images: Tensor, *, batch: int = 1000, ctx: Ctx | None = None) -> Tensor:
    """Logits float32 (N, K) on the network's device, in eval mode and without gradients; modes are put back.

    Args:
        net: Takes float32 [0, 1] (N, C, H, W).
        images: uint8 (N, C, H, W), on any device.
        batch: Images per forward pass; the logits of a row agree to 1e-5 whatever it is.
        ctx: Where the forward passes are counted.
    """
    device = device_of(net)
    with evaluating(net), torch.no_grad():
        # An empty set still needs one (empty) pass: it alone knows the number of classes.
        parts = [net(to_float(part.to(device))).float() for part in images.split(batch)]
    if ctx is not None:
        ctx.cost.forwards += len(images)
    return torch.cat(parts)


def hits(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Rows whose largest logit is at their label, and all rows; of tied logits the first class counts.

    Args:
        logits: (N, K).
        labels: int64 (N,).
    """
    right = logits.argmax(1) == labels.to(logits.device)
    return int(right.sum()), len(labels)


def spread(n: int, at_most: int) -> Tensor:
    """Positions of at most `at_most` of n rows, evenly spaced, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, at_most)).round().long()
