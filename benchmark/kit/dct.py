"""Signals that stand at chosen places of the two-dimensional cosine transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Place = tuple[int, int]
"""Row and column frequency, from 0 (constant) to size - 1."""


def cosines(height: int, width: int, places: Sequence[Place]) -> Tensor:
    """The picture (height, width) whose orthonormal DCT-II is 1 at each of `places` and 0 elsewhere.

    The transform is linear: adding m to these coefficients of an image adds m times this picture to its pixels.

    Raises:
        ValueError: a place lies outside the transform.
    """
    picture = torch.zeros(height, width, dtype=torch.float64)
    for row, col in places:
        if not (0 <= row < height and 0 <= col < width):
            raise ValueError(f"place ({row}, {col}) is outside a transform of {height}x{width}")
        picture += _wave(height, row)[:, None] * _wave(width, col)
    return picture.float()


def _wave(size: int, k: int) -> Tensor:
    wave = torch.cos(math.pi * k * (torch.arange(size, dtype=torch.float64) + 0.5) / size)
    return wave * math.sqrt((2 if k else 1) / size)
