from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sleeperbench.kit.augment import Views, crop_flip, draw_views, look, pad_zero


def images(n: int, c: int = 3, h: int = 9, w: int = 7) -> Tensor:
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def slow(image: Tensor, dy: int, dx: int, mirrored: bool, pad: int) -> Tensor:
    """One image, pixel by pixel: what lies outside is black."""
    h, w = image.shape[1:]
    out = torch.zeros_like(image)
    for y in range(h):
        for x in range(w):
            from_y, from_x = y + dy - pad, (w - 1 - x if mirrored else x) + dx - pad
            if 0 <= from_y < h and 0 <= from_x < w:
                out[:, y, x] = image[:, from_y, from_x]
    return out


@pytest.mark.parametrize(("pad", "flip", "c"), [(0, False, 1), (0, True, 3), (2, False, 3), (4, True, 1), (4, True, 3)])
def test_equals_the_slow_reference(pad: int, flip: bool, c: int) -> None:
    x = images(24, c)
    views = draw_views(24, pad, flip, torch.Generator().manual_seed(3), x.device)
    expected = [slow(x[i], int(views.dy[i]), int(views.dx[i]), bool(views.mirrored[i]), pad) for i in range(len(x))]
    assert torch.equal(crop_flip(x, pad, flip, torch.Generator().manual_seed(3)), torch.stack(expected))


def test_rows_are_gathered_in_the_order_asked() -> None:
    x = images(6)
    views = Views(dy=torch.tensor([0, 4, 2]), dx=torch.tensor([4, 1, 2]), mirrored=torch.tensor([True, False, False]))
    seen = look(pad_zero(x, 2), torch.tensor([5, 0, 2]), views, 2)
    assert torch.equal(seen[0], slow(x[5], 0, 4, True, 2))
    assert torch.equal(seen[1], slow(x[0], 4, 1, False, 2))
    assert torch.equal(seen[2], x[2])


def test_pads_with_black_and_does_not_reflect() -> None:
    x = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    views = draw_views(64, 3, False, torch.Generator().manual_seed(0), x.device)
    seen = crop_flip(x, 3, False, torch.Generator().manual_seed(0))
    lit = (8 - (views.dy - 3).abs()) * (8 - (views.dx - 3).abs())
    assert torch.equal((seen == 255).sum((1, 2, 3)), lit)
    assert torch.equal((seen == 0).sum((1, 2, 3)), 64 - lit)


def test_every_offset_and_side_is_as_likely() -> None:
    views = draw_views(81 * 400, 4, True, torch.Generator().manual_seed(0), torch.device("cpu"))
    counts = torch.bincount(views.dy * 9 + views.dx, minlength=81)
    assert ((counts - 400).abs() < 5 * 20).all()  # five standard deviations of a count around 400
    assert abs(float(views.mirrored.double().mean()) - 0.5) < 5 * 0.5 / (81 * 400) ** 0.5


def test_flip_off_leaves_the_crops() -> None:
    on = draw_views(50, 4, True, torch.Generator().manual_seed(2), torch.device("cpu"))
    off = draw_views(50, 4, False, torch.Generator().manual_seed(2), torch.device("cpu"))
    assert torch.equal(on.dy, off.dy)
    assert torch.equal(on.dx, off.dx)
    assert on.mirrored.any()
    assert not off.mirrored.any()


def test_same_generator_same_views() -> None:
    x = images(16)
    one, same, other = (crop_flip(x, 4, True, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert x.equal(images(16))
