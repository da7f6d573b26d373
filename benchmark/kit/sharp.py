"""Steps that look at the loss beside the weights: FT-SAM, path-aware minimisation and their like.

A sharpness-aware step takes the gradient at shifted weights and applies it to the original ones:

    grads = torch.autograd.grad(loss(net), params)
    with shifted(params, sam_shift(params, grads, rho, adaptive=False)), still_statistics(net):
        loss(net).backward()
    opt.step()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def sam_shift(params: Sequence[Tensor], grads: Sequence[Tensor], rho: float, *, adaptive: bool) -> list[Tensor]:
    """The shift that raises the loss most at distance `rho`, to first order (Foret et al. 2021; Kwon et al. 2021).

    rho g / (|g| + 1e-12); adaptive: rho w^2 g / (| |w| g | + 1e-12), the largest rise under | eps / |w| | <= rho. The
    norm runs over all tensors together.

    Args:
        params: The weights w.
        grads: Their gradients g, in the same order.
        rho: Radius.
        adaptive: Measure a weight's shift in units of its size; a weight of 0 then stays 0.
    """
    scaled = [w.abs() * g if adaptive else g for w, g in zip(params, grads, strict=True)]
    norm = torch.stack([s.norm() for s in scaled]).norm() + 1e-12
    return [(w.abs() * s if adaptive else s) * (rho / norm) for w, s in zip(params, scaled, strict=True)]


@contextmanager
def shifted(params: Sequence[Tensor], shift: Sequence[Tensor]) -> Iterator[None]:
    """The weights are moved by `shift` inside, in place, and have their exact values again afterwards."""
    kept = [w.detach().clone() for w in params]
    with torch.no_grad():
        for w, s in zip(params, shift, strict=True):
            w.add_(s)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, k in zip(params, kept, strict=True):
                w.copy_(k)


@contextmanager
def still_statistics(net: nn.Module) -> Iterator[None]:
    """BatchNorm layers in training mode use their batch's statistics inside but leave the running ones as they are."""
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    kept = [(layer.running_mean, layer.running_var, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        # Without buffers a layer in training mode normalises by its batch and writes nowhere.
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    try:
        yield
    finally:
        for layer, (mean, var, count) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, count
            layer.track_running_stats = True
