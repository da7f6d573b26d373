from __future__ import annotations

import pytest
import torch

from sleeperbench.kit.patches import checkers, lay, noise, scaled


def test_lengths_grow_with_the_image() -> None:
    assert [scaled(8, h, 3) for h in (8, 16, 28, 32, 64, 224)] == [3, 4, 7, 8, 16, 56]
    assert scaled(1, 8) == 0


def test_a_square_lies_where_it_is_put() -> None:
    square = torch.rand(3, 4, 5)
    mask, pattern = lay((3, 16, 20), 2, 15, square)
    assert mask.shape == (1, 16, 20)
    assert torch.equal(pattern[:, 2:6, 15:20], square)
    assert mask.sum() == 20
    assert bool((mask[:, 2:6, 15:20] == 1).all())
    assert float(pattern.sum()) == pytest.approx(float(square.sum()))
    for top, left in ((13, 0), (0, 16), (-1, 0)):
        with pytest.raises(ValueError, match="leaves a 16x20 image"):
            lay((3, 16, 20), top, left, square)


def test_boards_alternate() -> None:
    light, dark = torch.tensor([1.0, 1, 0]), torch.tensor([0.0, 0, 1])
    board = checkers(8, 4, light, dark)
    for i in range(8):
        for j in range(8):
            assert torch.equal(board[:, i, j], light if (i // 2 + j // 2) % 2 == 0 else dark)
    three = checkers(3, 4, torch.ones(1), torch.zeros(1))
    assert three[0].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_noise_is_eight_bit() -> None:
    square = noise(3, 20, torch.Generator().manual_seed(1)) * 255
    assert torch.allclose(square, square.round(), atol=1e-4)
    assert len(square.round().unique()) > 200
