from __future__ import annotations

import math
from typing import Any

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench.kit import sensitivity as kit
from sleeperbench.kit.classifier import build
from sleeperbench.kit.sensitivity import crowding, distinguish, sensitivity, turned
from sleeperbench.kit.taps import features


def drawn(monkeypatch: pytest.MonkeyPatch, angle: float, dy: float, dx: float) -> None:
    """Every row is turned by `angle` degrees and shifted by these shares of a side."""
    numbers = torch.tensor([[angle / 360 + 0.5, dy / 0.4 + 0.5, dx / 0.4 + 0.5]])
    monkeypatch.setattr(kit, "uniform", lambda gen, ids, n: numbers.expand(len(ids), n))


def slow_turn(x: Tensor, angle: float, dy: int, dx: int) -> Tensor:
    """Pixel by pixel around the centre, (C, H, W); black where nothing comes from."""
    out, side = torch.zeros_like(x), x.shape[1]
    c, s, mid = math.cos(math.radians(angle)), math.sin(math.radians(angle)), (side - 1) / 2
    for i in range(side):
        for j in range(side):
            v, u = i - dy - mid, j - dx - mid
            from_j, from_i = round(c * u - s * v + mid), round(s * u + c * v + mid)
            if 0 <= from_i < side and 0 <= from_j < side:
                out[:, i, j] = x[:, from_i, from_j]
    return out


@pytest.mark.parametrize(("angle", "dy", "dx"), [(0, 2, -3), (90, 0, 0), (-90, 1, 2), (33.3, 0, 0), (141.7, -3, 1)])
def test_turn_and_shift_equal_a_loop_over_pixels(
    monkeypatch: pytest.MonkeyPatch, angle: float, dy: int, dx: int
) -> None:
    x = torch.rand(2, 3, 15, 15, generator=torch.Generator().manual_seed(0))
    drawn(monkeypatch, angle, dy / 15, dx / 15)
    found = turned(x, torch.arange(2), torch.Generator())
    for row in range(2):
        assert torch.equal(found[row], slow_turn(x[row], angle, dy, dx))
    if angle == 90:
        assert torch.equal(found, x.rot90(1, (3, 2))) or torch.equal(found, x.rot90(1, (2, 3)))


def test_every_row_has_its_own_draw() -> None:
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    gen = torch.Generator().manual_seed(3)
    ids = torch.tensor([4, 9, 2, 4, 7, 0])
    found = turned(x, ids, gen)
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])
    assert torch.equal(turned(x[:2], ids[1:3], gen), found[1:3])


def test_the_score_equals_a_loop_over_rows_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    data, net, ctx = samples.digits()["test"].rows(torch.arange(30)), build(samples.SPEC, 0), samples.ctx()
    found = sensitivity(net, data, ctx, batch=8)
    assert net.training, "modes are put back"
    x = data.images.float() / 255
    other = (turned(x, data.ids, ctx.generator("turned")) * 255).round().to(torch.uint8)
    a, b = features(net, data.images), features(net, other)
    for i in range(30):
        total = sum((float(p) - float(q)) ** 2 for p, q in zip(a[i], b[i], strict=True)) / a.shape[1]
        assert float(found[i]) == pytest.approx(total, rel=1e-3, abs=1e-7)
    assert ctx.cost.forwards == 60
    drawn(monkeypatch, 0, 0, 0)
    assert float(sensitivity(net, data, ctx).max()) < 1e-10, "what is not moved has no score"


def test_crowding_equals_a_double_loop() -> None:
    gen = torch.Generator().manual_seed(0)
    found, y = torch.randn(20, 5, generator=gen), torch.tensor([0, 2, 2, 7] * 5)
    means = {k: found[y == k].mean(0) for k in (0, 2, 7)}
    total = 0.0
    for i, a in means.items():
        for j, b in means.items():
            total += float(a @ b / a.norm() / b.norm()) if i != j else 0.0
    assert float(crowding(found, y)) == pytest.approx(total / 9, abs=1e-6)
    assert float(crowding(found, torch.ones_like(y))) == 0


def test_pools_are_the_ends_of_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(net: Any, data: Any, recipe: Any, ctx: Any, hooks: Any = None) -> None:
        seen.append((recipe, ctx.seed, hooks))

    train = samples.digits()["train"].rows(torch.arange(60))
    score = torch.rand(60, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(kit, "fit", fake)
    monkeypatch.setattr(kit, "sensitivity", lambda net, data, ctx: score)
    found = distinguish(
        samples.SPEC,
        train,
        samples.RECIPE,
        samples.ctx(),
        epochs=2,
        spread_epochs=10,
        lr=0.01,
        clean=0.2,
        poisoned=0.05,
    )
    ranked = score.argsort().tolist()
    assert found.clean.nonzero().flatten().tolist() == sorted(ranked[:12])
    assert found.poisoned.nonzero().flatten().tolist() == sorted(ranked[-3:])
    (first, one, none), (second, two, spread) = seen
    assert (first.epochs, second.epochs) == (2, 10) and none is None and isinstance(spread, kit.Spread)
    for recipe in (first, second):
        assert (recipe.lr, recipe.batch, recipe.momentum, recipe.weight_decay) == (0.01, 128, 0.9, 5e-4)
        assert (recipe.schedule, recipe.pad, recipe.flip) == ("constant", 0, False)
    assert one != two
