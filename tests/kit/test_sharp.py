from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from sleeperbench.kit.sharp import sam_shift, shifted, still_statistics


def tensors(seed: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=gen, dtype=torch.float64), torch.randn(5, generator=gen, dtype=torch.float64)]


def norm(parts: list[torch.Tensor]) -> float:
    return float(torch.cat([p.flatten() for p in parts]).norm())


def test_the_shift_has_norm_rho_over_all_tensors_and_the_gradient_s_direction() -> None:
    w, g = tensors(0), tensors(1)
    shift = sam_shift(w, g, 0.7, adaptive=False)
    assert norm(shift) == pytest.approx(0.7, rel=1e-9)
    for s, part in zip(shift, g, strict=True):
        assert torch.allclose(s, part * 0.7 / norm(g))


def test_the_adaptive_shift_has_norm_rho_in_units_of_the_weights() -> None:
    w, g = tensors(0), tensors(1)
    w[1][2] = 0.0
    shift = sam_shift(w, g, 2.0, adaptive=True)
    moved = [s[v != 0] / v[v != 0].abs() for s, v in zip(shift, w, strict=True)]
    assert norm(moved) == pytest.approx(2.0, rel=1e-9)
    assert float(shift[1][2]) == 0.0
    # No other shift of that size raises the linear loss <g, eps> more.
    best = sum(float((a * b).sum()) for a, b in zip(shift, g, strict=True))
    gen = torch.Generator().manual_seed(2)
    for _ in range(50):
        other = [torch.randn(v.shape, generator=gen, dtype=v.dtype) * v.abs() for v in w]
        scale = 2.0 / norm([o[v != 0] / v[v != 0].abs() for o, v in zip(other, w, strict=True)])
        assert scale * sum(float((a * b).sum()) for a, b in zip(other, g, strict=True)) <= best + 1e-9


def test_weights_are_exactly_restored_also_after_an_error() -> None:
    w = [nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(3, 3))]
    before = [p.detach().clone() for p in w]
    with contextlib.suppress(RuntimeError), shifted(w, [torch.full_like(p, 0.1) for p in w]):
        assert torch.allclose(w[0], before[0] + 0.1)
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(w, before, strict=True))


def test_statistics_stand_still_while_batches_are_normalised() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval())
    net[1].train()
    x = torch.randn(8, 1, 3, 3)
    expected = net[0](x)
    expected = (expected - expected.mean((0, 2, 3), keepdim=True)) / (
        expected.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    with still_statistics(net):
        out = net[1](net[0](x))
    assert torch.allclose(out, expected, atol=1e-5)
    assert all(torch.equal(kept[k], v) for k, v in net.state_dict().items()) and set(kept) == set(net.state_dict())
    net[1](net[0](x))
    assert not torch.equal(net[1].running_mean, kept["1.running_mean"])
