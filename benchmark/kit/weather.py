"""Rain, fog and dusk drawn onto images: features that say nothing about the class."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sleeperbench.kit.rowwise import uniform

_AT_ONCE = 2**21
"""Pixels of streaks drawn at a time: their positions take more memory than the images."""


def weather(kind: str, x: Tensor, ids: Tensor, gen: Generator) -> Tensor:
    """Images under that weather; what is drawn depends on the seed of `gen` and the row's id alone.

    Args:
        kind: `rain` (darker, with slanted streaks), `fog` (0.4 of a smooth bright noise) or `dusk` (0.7 x^1.8).
        x: float32 [0, 1] (N, C, H, W).
        ids: int64 (N,).
        gen: Its seed is read.

    Returns:
        float32 [0, 1] (N, C, H, W).
    """
    if kind == "dusk":
        return 0.7 * x**1.8
    if kind == "fog":
        cells = 0.7 + 0.3 * uniform(gen, ids, 16).view(-1, 1, 4, 4)
        return 0.6 * x + 0.4 * F.interpolate(cells, size=x.shape[2:], mode="bilinear", align_corners=True).to(x)
    return (0.8 * x + _streaks(ids, gen, x.shape[2], x.shape[3]).to(x)).clamp(0, 1)


def _streaks(ids: Tensor, gen: Generator, height: int, width: int) -> Tensor:
    """(N, 1, H, W): H W / 60 streaks of length H / 5 and brightness U(0.3, 0.7), all at 70 to 80 degrees, blurred."""
    count, length = max(1, height * width // 60), max(2, height // 5)
    parts = []
    for part in ids.split(max(1, _AT_ONCE // (count * length))):
        draws = uniform(gen, part, 3 * count + 1)
        angle = torch.deg2rad(70 + 10 * draws[:, :1, None])
        top, left, bright = draws[:, 1:].view(-1, 3, count, 1).unbind(1)
        step = torch.arange(length, device=ids.device)
        # Streaks may begin above the picture and run out of it; what lies outside is dropped into an extra pixel.
        rows = (top * (height + length) - length + step * angle.sin()).floor().long()
        cols = (left * width + step * angle.cos()).floor().long()
        inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
        place = torch.where(inside, rows * width + cols, height * width).flatten(1)
        light = (0.3 + 0.4 * bright).expand(-1, -1, length).flatten(1)
        canvas = torch.zeros(len(part), height * width + 1, device=ids.device)
        parts.append(canvas.scatter_reduce(1, place, light, "amax")[:, :-1].view(-1, 1, height, width))
    drawn = torch.cat(parts) if parts else torch.zeros(0, 1, height, width, device=ids.device)
    side = math.exp(-1 / (2 * 0.5**2))  # a Gaussian of deviation 0.5 pixels, one pixel away from its middle
    line = torch.tensor([side, 1, side], device=ids.device) / (1 + 2 * side)
    return F.conv2d(F.conv2d(drawn, line.view(1, 1, 3, 1), padding=(1, 0)), line.view(1, 1, 1, 3), padding=(0, 1))
