"""Squares and how they are laid on an image, at any image size."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def scaled(pixels: int, height: int, least: int = 0) -> int:
    """A length that is given for images of 32 pixels, on images of `height` pixels; at least `least`."""
    return max(least, round(pixels * height / 32))


def lay(shape: tuple[int, int, int], top: int, left: int, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mask (1, H, W) of zeros and ones and pattern (C, H, W) with `square` (C, h, w) at that place."""
    channels, height, width = shape
    _, tall, wide = square.shape
    if min(top, left) < 0 or top + tall > height or left + wide > width:
        raise ValueError(f"a patch of {tall}x{wide} pixels at row {top}, column {left} leaves a {height}x{width} image")
    mask, pattern = torch.zeros(1, height, width), torch.zeros(channels, height, width)
    mask[:, top : top + tall, left : left + wide] = 1
    pattern[:, top : top + tall, left : left + wide] = square
    return mask, pattern


def checkers(side: int, cells: int, light: Tensor, dark: Tensor) -> Tensor:
    """A board (C, side, side) of `cells` x `cells` fields in two colours (C,); the first field is light.

    A side that is shorter than `cells` has fields of one pixel.
    """
    cell = torch.arange(side) * min(cells, side) // side
    board = (cell[:, None] + cell[None, :]) % 2 == 0
    return torch.where(board, light[:, None, None], dark[:, None, None])


def noise(channels: int, side: int, gen: Generator) -> Tensor:
    """A square (C, side, side) of 8-bit colours drawn per pixel and channel."""
    return torch.randint(256, (channels, side, side), generator=gen) / 255
