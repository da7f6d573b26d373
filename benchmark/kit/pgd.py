"""Projected gradient ascent on a perturbation of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def ascent(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
    direction: Literal["sign", "unit"] = "sign",
    around: Tensor | None = None,
) -> Tensor:
    """The perturbation after `steps` steps delta <- project(delta + step * direction(gradient of loss(delta))).

    Only `delta` gets gradients: networks under `loss` keep theirs, and their mode is the caller's.

    Args:
        loss: Scalar to ascend on, a function of the whole delta.
        start: Where to begin, (N, C, H, W); one row for a universal perturbation. Left untouched.
        eps: Radius of the ball, per row, in pixels of [0, 1].
        step: Length of a step, in pixels.
        steps: Gradient steps; 0 gives the projected start.
        norm: Ball of each row: largest absolute value, or Euclidean norm.
        direction: The gradient's sign, or the gradient over each row's Euclidean norm.
        around: Images x, (N, C, H, W): delta is clipped so that x + delta stays in [0, 1]. With one row of delta and
            many images that is the tightest of the images' bounds. None for no clipping.

    Returns:
        delta, detached, in the shape of `start`. A row without gradient stays where it is.
    """
    delta = _project(start.detach(), eps, norm, around)
    for _ in range(steps):
        delta.requires_grad_()
        (up,) = torch.autograd.grad(loss(delta), delta)
        move = up.sign() if direction == "sign" else up / _norms(up).clamp_min(1e-12)
        delta = _project(delta.detach() + step * move, eps, norm, around)
    return delta


def _project(delta: Tensor, eps: float, norm: str, around: Tensor | None) -> Tensor:
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    elif norm == "l2":
        # Never longer than eps, also after rounding: a row inside is left as it is.
        delta = delta * (eps / _norms(delta).clamp_min(1e-12)).clamp_max(1)
    else:
        raise ValueError(f"norm {norm!r} is unknown: use linf or l2")
    if around is None:
        return delta
    low, high = -around, 1 - around
    if len(delta) == 1:
        low, high = low.amax(0, keepdim=True), high.amin(0, keepdim=True)
    # Towards zero in every pixel, so that the ball is not left.
    return delta.clamp(low, high)


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row, (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
