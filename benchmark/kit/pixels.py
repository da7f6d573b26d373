"""Between stored pixels (uint8) and the pixels of method code (float32 in [0, 1])."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(u8: Tensor) -> Tensor:
    """Stored pixels as float32 in [0, 1], same shape and device."""
    return u8.to(torch.float32).div_(255)


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8: clamped, then rounded to the nearest level, never truncated."""
    return x.detach().clamp(0, 1).mul(255).round_().to(torch.uint8)
