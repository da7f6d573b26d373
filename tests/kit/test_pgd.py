from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sleeperbench.kit.pgd import ascent


def towards(goal: Tensor):
    return lambda delta: -((delta - goal) ** 2).sum() / 2


def test_sign_steps_add_up_and_stop_at_the_ball() -> None:
    goal = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    start = torch.zeros(1, 1, 2, 2)
    two = ascent(towards(goal), start, eps=0.3, step=0.1, steps=2)
    assert torch.allclose(two, 0.2 * goal)
    assert torch.allclose(ascent(towards(goal), start, eps=0.3, step=0.1, steps=9), 0.3 * goal)
    assert torch.equal(start, torch.zeros(1, 1, 2, 2)) and not two.requires_grad


def test_unit_steps_have_the_step_s_length_in_every_row() -> None:
    goal = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    goal[1] *= 1e-3
    one = ascent(towards(goal), torch.zeros_like(goal), eps=9.0, step=0.25, steps=1, norm="l2", direction="unit")
    assert torch.allclose(one.flatten(1).norm(dim=1), torch.full((3,), 0.25))
    assert torch.allclose(one, 0.25 * goal / goal.flatten(1).norm(dim=1).view(3, 1, 1, 1))


def test_the_euclidean_ball_shortens_and_does_not_turn() -> None:
    goal = torch.full((2, 1, 2, 2), 5.0)
    out = ascent(towards(goal), torch.zeros_like(goal), eps=1.0, step=3.0, steps=4, norm="l2")
    assert torch.allclose(out, torch.full_like(out, 0.5))
    inside = torch.full((1, 1, 2, 2), 0.1)
    assert torch.equal(ascent(towards(goal), inside, eps=1.0, step=1.0, steps=0, norm="l2"), inside)


def test_images_stay_in_range_each_by_its_own_bound() -> None:
    x = torch.tensor([0.95, 0.05]).view(2, 1, 1, 1)
    up = ascent(lambda d: d.sum(), torch.zeros_like(x), eps=0.2, step=0.2, steps=1, around=x)
    assert torch.allclose(up.flatten(), torch.tensor([0.05, 0.2]))


def test_a_universal_perturbation_suits_all_images() -> None:
    x = torch.tensor([0.95, 0.05]).view(2, 1, 1, 1)
    up = ascent(lambda d: d.sum(), torch.zeros(1, 1, 1, 1), eps=0.2, step=0.2, steps=3, around=x)
    assert float(up) == pytest.approx(0.05)
    down = ascent(lambda d: -d.sum(), torch.zeros(1, 1, 1, 1), eps=0.2, step=0.2, steps=3, around=x)
    assert float(down) == pytest.approx(-0.05)


def test_no_gradient_no_move_and_the_nets_keep_theirs() -> None:
    layer = torch.nn.Linear(4, 1)
    out = ascent(
        lambda d: layer(d.flatten(1)).sum() * 0,
        torch.zeros(1, 1, 2, 2),
        eps=1,
        step=1,
        steps=2,
        norm="l2",
        direction="unit",
    )
    assert torch.equal(out, torch.zeros(1, 1, 2, 2)) and layer.weight.grad is None


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match="l1"):
        ascent(lambda d: d.sum(), torch.zeros(1, 1, 1, 1), eps=1, step=1, steps=1, norm="l1")  # type: ignore[arg-type]
