from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from scipy import stats
from torch import Tensor, nn

from sleeperbench import ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.mm_bd import MMBD, margin, p_values
from sleeperbench.kit.classifier import build


def case(net: nn.Module, classes: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Any:
    spec = ModelSpec(arch="small_cnn", classes=classes, shape=shape, norm=((0.5,), (0.5,)), args={"width": 4})
    return SimpleNamespace(net=net, spec=spec, ctx=samples.ctx(3))


class Linear(nn.Module):
    """Logits weight x of flattened images."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_settings_are_published() -> None:
    m = MMBD()
    assert (m.starts, m.steps, m.lr, m.tolerance, m.level) == (30, 300, 0.01, 1e-5, 0.05)
    assert MMBD.ACCESS.track() == "T0"


def test_margin_is_to_the_largest_other_logit() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [-5.0, -4.0, -9.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [0.5, -1.0]
    assert margin(logits, torch.tensor([1, 2])).tolist() == [-2.0, -5.0]


@pytest.mark.parametrize("k", [6, 10, 43])
def test_p_value_is_that_of_the_gamma_null(k: int) -> None:
    r = torch.from_numpy(np.random.default_rng(k).gamma(4, 2, k))
    r[2] = r.max() + 3
    null = np.delete(r.numpy(), 2)
    shape, loc, scale = stats.gamma.fit(null)
    wanted = 1 - stats.gamma.cdf(float(r[2]), shape, loc=loc, scale=scale) ** k
    assert float(p_values(r)[2]) == pytest.approx(float(wanted), rel=1e-6)
    assert int(p_values(r).argmin()) == 2


def test_every_class_ascends_as_if_it_were_alone() -> None:
    """A slow loop, class after class, with SGD made anew at each step and the same stop."""
    net = build(case(nn.Identity(), 7).spec, 0).eval()
    m = MMBD(starts=2, steps=9, lr=20.0, tolerance=0.05)
    c = case(net, 7)
    found = m.margins(net, 7, (1, 8, 8), c.ctx)
    starts = torch.rand(7, 2, 1, 8, 8, generator=c.ctx.generator("starts"))
    steps = []
    for t in range(7):
        x = starts[t].clone().requires_grad_()
        last, taken = 1000.0, 0
        for _ in range(9):
            taken += 1
            optimiser = torch.optim.SGD([x], lr=20.0, momentum=0.2)
            optimiser.zero_grad()
            z = net(x.clamp(0, 1))
            apart = z[:, t] - torch.cat([z[:, :t], z[:, t + 1 :]], 1).amax(1)
            (-apart.sum()).backward()
            optimiser.step()
            if abs(float(apart.detach().sum()) - last) / abs(last) < 0.05:
                break
            last = float(apart.detach().sum())
        steps.append(taken)
        assert float(found[t]) == pytest.approx(float(apart.detach().max()), rel=1e-4, abs=1e-5)
    assert len(set(steps)) > 1  # some stopped early
    assert c.ctx.cost.backwards == 2 * sum(steps)


def test_an_image_that_reaches_every_bound_has_the_largest_margin() -> None:
    """The optimum of a linear net is a corner of the cube."""
    weight = torch.zeros(6, 64)
    weight[0, :8], weight[3, 8:16] = 1.0, 3.0
    found = MMBD(lr=1.0, steps=50, tolerance=0).margins(Linear(weight), 6, (1, 8, 8), samples.ctx())
    # Own pixels at 1 and the others at 0; a class that reads nothing ties with another such one.
    assert found.tolist() == pytest.approx([8, 0, 0, 24, 0, 0], abs=1e-5)


def test_a_class_far_above_the_others_is_the_verdict() -> None:
    gen = torch.Generator().manual_seed(1)
    weight = torch.rand(10, 64, generator=gen)
    m = MMBD(lr=0.1, steps=60)
    even = m.run(case(Linear(weight), 10)).verdict
    weight[4] *= 8
    c = case(Linear(weight), 10)
    found = m.run(c)
    v = found.verdict
    assert v is not None and even is not None
    assert even.score <= even.threshold == -math.log10(0.05)
    assert v.score > v.threshold
    assert (int(v.label_scores.argmax()), found.chosen["target"]) == (4, 4)
    assert v.score == float(v.label_scores.max())
    assert found.inverted == ()
    again = m.run(case(Linear(weight), 10)).verdict
    assert torch.equal(again.label_scores, v.label_scores)


def test_it_declines_what_has_no_null() -> None:
    with pytest.raises(NotApplicable, match="too_few_classes: 5"):
        MMBD().run(case(Linear(torch.rand(5, 64)), 5))
    with pytest.raises(NotApplicable, match="no_null"):
        p_values(torch.tensor([1.0, 2, 3, 4, 5, math.nan]))
    with pytest.raises(ValueError, match="level"):
        MMBD(level=1)
