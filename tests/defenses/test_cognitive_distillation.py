from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.cognitive_distillation import CognitiveDistillation, shown, variation
from sleeperbench.kit.pixels import to_float


class Planted(nn.Module):
    """Four weighted sums of all pixels; a bright lower right corner of 2 x 2 puts (10, 0, 0, 0) in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
        self.norm = nn.BatchNorm1d(4, affine=False)  # in eval mode nearly the identity; in training mode mixes rows

    def forward(self, x: Tensor) -> Tensor:
        there = torch.sigmoid(40 * (x[:, :, 6:, 6:].mean((1, 2, 3)) - 0.8))[:, None]
        planted = torch.tensor([10.0, 0, 0, 0])
        return self.norm(there * planted + (1 - there) * (x.flatten(1) @ self.weight.T))


def images(n: int, seed: int = 0) -> Any:
    return samples.random_images(n, (1, 8, 8), classes=4, seed=seed)


def case(clean: Any, seed: int = 0) -> Any:
    return SimpleNamespace(net=Planted(), clean=clean, ctx=samples.ctx(seed))


def slow_loss(net: nn.Module, x: Tensor, u: list[float], colour: Tensor, alpha: float, beta: float) -> float:
    """The loss of one image (C, H, W), one pixel at a time."""
    c, h, w = x.shape
    m = [(math.tanh(v) + 1) / 2 for v in u]
    seen = x.clone()
    for k in range(c):
        for i in range(h):
            for j in range(w):
                seen[k, i, j] = float(x[k, i, j]) * m[i * w + j] + (1 - m[i * w + j]) * float(colour[k])
    with torch.no_grad():
        apart = [abs(float(a - b)) for a, b in zip(net(seen[None])[0], net(x[None])[0], strict=True)]
    rough = sum((m[i * w + j] - m[(i - 1) * w + j]) ** 2 for i in range(1, h) for j in range(w))
    rough += sum((m[i * w + j] - m[i * w + j - 1]) ** 2 for i in range(h) for j in range(1, w))
    return sum(apart) / len(apart) + alpha * sum(m) + beta * rough / (h * w)


def slow_mask(net: nn.Module, x: Tensor, colours: Tensor, method: CognitiveDistillation) -> list[float]:
    """The mask of one image, by Adam written out and slopes by central differences."""
    n = x[0].numel()
    u, first, second = [1.0] * n, [0.0] * n, [0.0] * n
    for t, colour in enumerate(colours, start=1):
        slopes = []
        for i in range(n):
            ends = [
                slow_loss(net, x, [v + s * 1e-5 * (k == i) for k, v in enumerate(u)], colour, method.alpha, method.beta)
                for s in (1, -1)
            ]
            slopes.append((ends[0] - ends[1]) / 2e-5)
        for i, g in enumerate(slopes):
            first[i] = 0.1 * first[i] + 0.9 * g
            second[i] = 0.1 * second[i] + 0.9 * g * g
            mean, square = first[i] / (1 - 0.1**t), second[i] / (1 - 0.1**t)
            u[i] -= method.lr * mean / (math.sqrt(square) + 1e-8)
    return [(math.tanh(v) + 1) / 2 for v in u]


def test_masks_are_those_of_a_slow_descent() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    net[1].weight.data *= 4
    net[3].weight.data *= 4
    x, colours = torch.rand(2, 2, 3, 3).double(), torch.rand(4, 2).double()
    method = CognitiveDistillation(alpha=0.2, beta=3.0)
    found = method.masks(net, x, colours)
    assert found.shape == (2, 1, 3, 3)
    for row, m in zip(x, found, strict=True):
        assert m.flatten().tolist() == pytest.approx(slow_mask(net, row, colours, method), abs=1e-3)
    assert float(found.std()) > 0.02  # four equal steps would leave all pixels alike
    assert all(p.grad is None for p in net.parameters())


def test_masks_begin_alike_and_their_variation_is_that_of_neighbours() -> None:
    assert float(shown(torch.ones(1))) == pytest.approx(0.8808, abs=1e-4)
    m = torch.tensor([[0.0, 1.0, 1.0], [0.5, 1.0, 0.0]]).view(1, 1, 2, 3)
    # Down: 0.25 + 0 + 1; right: 1 + 0 + 0.25 + 1.
    assert float(variation(m)[0]) == pytest.approx(3.5 / 6)
    assert float(variation(torch.full((1, 1, 4, 4), 0.3))[0]) == 0


def test_a_patch_that_decides_is_all_that_stays() -> None:
    net, data = Planted(), images(24, 3)
    clean = to_float(data.images)
    triggered = clean.clone()
    triggered[:, :, 6:, 6:] = 1
    method = CognitiveDistillation()
    outcome: Any = method.run(case(images(20)))
    scores = [method.score(outcome.state, net, x) for x in (triggered, clean)]
    assert float(scores[0].min()) > outcome.alarm > float(scores[1].mean())
    assert float(scores[0].min()) > float(scores[1].max()) + 5
    colours = outcome.state[0]["colours"]
    masks = method.masks(net, triggered, colours)
    assert float(masks[:, :, 6:, 6:].mean()) > 2 * float(masks[:, :, :6].mean())
    # Where neighbours may differ freely, the four pixels of the corner are all that is left.
    masks = CognitiveDistillation(beta=0.0).masks(net, triggered, colours)
    assert float(masks[:, :, 6:, 6:].mean()) > 0.8 and float(masks.sum((1, 2, 3)).mean()) < 5
    assert net.training and all(p.grad is None for p in net.parameters())
    # Each row by itself, whatever stands beside it.
    alone = torch.cat([method.score(outcome.state, net, row[None]) for row in clean[:3]])
    assert torch.allclose(alone, scores[1][:3], atol=1e-2)


def test_the_run_keeps_colours_and_the_norms_of_clean_rows() -> None:
    method, data = CognitiveDistillation(steps=12, rows=15, gamma=0.5), images(20)
    c = case(data, 7)
    outcome: Any = method.run(c)
    colours = outcome.state[0]["colours"]
    assert torch.equal(colours, torch.rand(12, 1, generator=c.ctx.generator("colours")))
    some = torch.randperm(20, generator=c.ctx.generator("rows"))[:15]
    norms = method.masks(c.net, to_float(data.images[some]), colours).sum((1, 2, 3)).double()
    threshold = float(norms.mean()) - 0.5 * float(norms.std())
    assert -outcome.alarm == pytest.approx(threshold, abs=1e-4)
    assert outcome.chosen["clean_flagged"] == pytest.approx(float((norms < threshold).double().mean()))
    assert 0 < outcome.chosen["clean_flagged"] < 0.5 and outcome.chosen["clean_rows"] == 15
    x = to_float(data.images[some])
    assert torch.allclose(method.score(outcome.state, c.net, x).double(), -norms, atol=1e-3)
    assert (c.ctx.cost.forwards, c.ctx.cost.backwards) == (15 * 13, 15 * 12)
    again: Any = method.run(case(data, 7))
    assert torch.equal(again.state[0]["colours"], colours) and again.chosen == outcome.chosen
    assert not torch.equal(method.run(case(data, 8)).state[0]["colours"], colours)  # type: ignore[index]


def test_what_it_declines_and_refuses() -> None:
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 1"):
        CognitiveDistillation().run(case(images(1)))
    m = CognitiveDistillation()
    assert (m.alpha, m.beta, m.lr, m.steps, m.gamma, m.rows) == (0.01, 10, 0.1, 100, 1, 500)
    assert CognitiveDistillation.ACCESS.track() == "T1"
    for bad in ({"alpha": -0.1}, {"lr": 0.0}, {"steps": 0}, {"rows": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CognitiveDistillation(**bad)  # type: ignore[arg-type]
