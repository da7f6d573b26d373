"""Random crop with zero padding and horizontal flip, for whole batches of 8-bit images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Views:
    """How each row of an epoch is seen.

    Args:
        dy: int64 (N,), first row of the crop inside the padded image, 0..2 pad.
        dx: int64 (N,), first column, 0..2 pad.
        mirrored: bool (N,).
    """

    dy: Tensor
    dx: Tensor
    mirrored: Tensor

    def rows(self, part: slice) -> Views:
        """The views of a run of rows."""
        return Views(dy=self.dy[part], dx=self.dx[part], mirrored=self.mirrored[part])


def draw_views(n: int, pad: int, flip: bool, gen: Generator, device: torch.device) -> Views:
    """Views for `n` rows, each offset equally likely, mirrored with probability 1/2.

    They are drawn where `gen` lives and then moved, so that a CPU generator gives every device the same views. All
    three are drawn whether used or not: switching the flip off leaves the crops as they were.
    """
    dy = torch.randint(0, 2 * pad + 1, (n,), generator=gen, device=gen.device)
    dx = torch.randint(0, 2 * pad + 1, (n,), generator=gen, device=gen.device)
    mirrored = (torch.rand(n, generator=gen, device=gen.device) < 0.5) & flip
    return Views(dy=dy.to(device), dx=dx.to(device), mirrored=mirrored.to(device))


def pad_zero(images: Tensor, pad: int) -> Tensor:
    """uint8 (N, C, H, W) with `pad` black pixels on each side.

    Zero, as the field does: reflection shows a corner patch twice and so strengthens the poison.
    """
    return F.pad(images, (pad, pad, pad, pad)) if pad else images


def look(padded: Tensor, rows: Tensor, views: Views, pad: int) -> Tensor:
    """The `rows` (B,) of padded images as `views` (B of them) see them: uint8 (B, C, H, W)."""
    h, w = padded.shape[2] - 2 * pad, padded.shape[3] - 2 * pad
    # All crops as a view without a copy; the one gather then copies whole image lines.
    crops = padded.unfold(2, h, 1).unfold(3, w, 1)[rows, :, views.dy, views.dx]
    # `where` and not a mask assignment: selecting by a mask asks the device for a count in every step.
    return torch.where(views.mirrored.view(-1, 1, 1, 1), crops.flip(-1), crops)


def crop_flip(images: Tensor, pad: int, flip: bool, gen: Generator) -> Tensor:
    """A random view of each image.

    Args:
        images: uint8 (N, C, H, W).
        pad: Black pixels added on each side before a crop of the old size; 0 for no crop.
        flip: Mirror each image left to right with probability 1/2.
        gen: Source of the draws.

    Returns:
        uint8 (N, C, H, W).
    """
    views = draw_views(len(images), pad, flip, gen, images.device)
    return look(pad_zero(images, pad), torch.arange(len(images), device=images.device), views, pad)
