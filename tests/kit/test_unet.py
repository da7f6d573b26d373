from __future__ import annotations

import pytest
import torch

from sleeperbench.kit.generators import seeded
from sleeperbench.kit.unet import UNet


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (9, 13)])
def test_any_size_comes_back(size: tuple[int, int]) -> None:
    net = seeded(UNet, 0, 3, 5, 4, 3).eval()
    assert net(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_rows_do_not_influence_each_other_in_eval_mode_and_the_seed_decides() -> None:
    a, b, c = seeded(UNet, 0, 1, 1, 4, 2).eval(), seeded(UNet, 0, 1, 1, 4, 2).eval(), seeded(UNet, 1, 1, 1, 4, 2).eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(a(x)[1:2], a(x[1:2]), atol=1e-6)
    assert torch.equal(a(x), b(x)) and not torch.allclose(a(x), c(x))


def test_the_skip_connections_carry_detail_past_the_bottleneck() -> None:
    net = seeded(UNet, 0, 1, 1, 4, 2).eval()
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    (far,) = torch.autograd.grad(net(x)[0, 0, 4, 4], x)
    assert float(far[0, 0, 4, 4].abs()) > 0
    with torch.no_grad():
        for up in net.up:
            up.weight.zero_()
            up.bias.zero_()
    assert not torch.allclose(net(x), net(torch.zeros_like(x)))


def test_every_parameter_gets_a_gradient() -> None:
    net = seeded(UNet, 0, 2, 1, 4, 2)
    net(torch.rand(2, 2, 8, 8)).square().mean().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum() > 0)
        for n, p in net.named_parameters()
        if "up" not in n or "weight" in n
    )
