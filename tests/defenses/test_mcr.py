from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses.mcr import MCR, POINTS, Bezier, Train, at, weights
from sleeperbench.kit.batchnorm import refresh
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, right


def case(net: Any = None, val: int = 120) -> Any:
    rows = samples.digits()["test"]
    n = len(rows) - val
    return SimpleNamespace(
        net=samples.badnets_net() if net is None else net,
        clean=rows,
        tune=rows.rows(torch.arange(n)),
        val=rows.rows(torch.arange(n, len(rows))),
        ctx=samples.ctx(9),
    )


def some_curve(seed: int = 0) -> Bezier:
    gen = torch.Generator().manual_seed(seed)
    a, b, c = ({"w": torch.randn(3, 2, generator=gen, dtype=torch.float64)} for _ in range(3))
    return Bezier(start=a, middle=b, end=c)


def test_the_curve_is_bezier_s() -> None:
    curve = some_curve()
    assert torch.equal(curve(0.0)["w"], curve.start["w"])
    assert torch.equal(curve(1.0)["w"], curve.end["w"])
    half = curve.start["w"] / 4 + curve.middle["w"] / 2 + curve.end["w"] / 4
    assert torch.allclose(curve(0.5)["w"], half)
    for t in (0.1, 0.37, 0.9):
        # De Casteljau: a point between points between the three.
        first = torch.lerp(curve.start["w"], curve.middle["w"], t)
        second = torch.lerp(curve.middle["w"], curve.end["w"], t)
        assert torch.allclose(curve(t)["w"], torch.lerp(first, second, t))
    slope = (curve(1e-6)["w"] - curve(0.0)["w"]) / 1e-6
    assert torch.allclose(slope, 2 * (curve.middle["w"] - curve.start["w"]), atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_middle_gets_the_gradient_of_the_loss_at_the_drawn_point(decay: float) -> None:
    net = copy.deepcopy(samples.clean_net()).double().train()
    start, end = weights(copy.deepcopy(samples.badnets_net()).double()), weights(build(samples.SPEC, 5).double())
    gen = torch.Generator().manual_seed(3)
    t = float(torch.rand((), generator=torch.Generator().manual_seed(3)))
    data = samples.digits()["pool"].rows(torch.arange(20))
    x, y = to_float(data.images).double(), data.labels
    loss = Train(start, end, decay, gen).loss(net, x, y, torch.zeros_like(y))
    found = torch.autograd.grad(loss, list(net.parameters()))
    point = {
        name: ((1 - t) ** 2 * start[name] + 2 * t * (1 - t) * p.detach() + t * t * end[name]).requires_grad_()
        for name, p in net.named_parameters()
    }
    at_point = F.cross_entropy(functional_call(net, point, (x,)), y)
    expected = loss_of(at_point, point, decay)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for g, h in zip(found, torch.autograd.grad(expected, list(point.values())), strict=True):
        assert torch.allclose(g, 2 * t * (1 - t) * h, atol=1e-10)


def loss_of(ce: Tensor, point: dict[str, Tensor], decay: float) -> Tensor:
    return ce + sum(((decay / 2) * w.square().sum() for w in point.values()), torch.zeros((), dtype=torch.float64))


def test_training_lowers_the_loss_along_the_curve_and_leaves_its_ends() -> None:
    c = case()
    before = pack(c.net).state
    method = MCR(steps=6, batch=64, curve_steps=40, curve_batch=64, curve_lr=0.02)
    curve = method.curve(c.net, c.tune, c.ctx)
    # The trainings take one pass each way per image.
    assert c.ctx.cost.forwards == c.ctx.cost.backwards == 6 * 64 + 40 * 64
    assert all(torch.equal(before[k], v) for k, v in curve.start.items())
    assert all(torch.equal(before[k], v) for k, v in pack(c.net).state.items())
    assert any(not torch.equal(before[k], v) for k, v in curve.end.items())
    straight = replace(curve, middle={k: (v + curve.end[k]) / 2 for k, v in curve.start.items()})
    untrained = MCR(steps=6, batch=64, curve_steps=1, curve_batch=64, curve_lr=0.0).curve(c.net, c.tune, samples.ctx(9))
    assert all(torch.equal(straight.middle[k], v) for k, v in untrained.middle.items()), "starts half way"
    assert all(torch.equal(curve.end[k], v) for k, v in untrained.end.items())

    def mean_loss(b: Bezier) -> float:
        net, x, y = copy.deepcopy(c.net).train(), to_float(c.tune.images), c.tune.labels
        with torch.no_grad():
            return sum(float(F.cross_entropy(functional_call(net, b(t), (x,)), y)) for t in POINTS) / len(POINTS)

    assert mean_loss(curve) < 0.9 * mean_loss(straight)


def test_the_curve_trains_its_middle_through_the_point() -> None:
    # So much decay that the images hardly matter: one step moves the middle by a share of phi(t).
    c = case()
    method = MCR(steps=2, batch=64, curve_steps=1, curve_batch=64, curve_lr=1e-5, weight_decay=1e4)
    curve = method.curve(c.net, c.tune, c.ctx)
    t = float(torch.rand((), generator=c.ctx.generator("t")))
    straight = replace(curve, middle={k: (v + curve.end[k]) / 2 for k, v in curve.start.items()})
    for k, point in straight(t).items():
        assert torch.allclose(straight.middle[k] - curve.middle[k], 0.1 * 2 * t * (1 - t) * point, atol=1e-3)
    assert 2 * t * (1 - t) > 0.05


def ends(seed: int = 1) -> Bezier:
    a, b, c = weights(samples.badnets_net()), weights(build(samples.SPEC, seed)), weights(samples.clean_net())
    return Bezier(start=a, middle=b, end=c)


def test_running_statistics_are_estimated_anew_at_the_point() -> None:
    c, curve = case(), ends()
    made = at(0.4, curve, c.net, c.tune, c.ctx)
    assert all(torch.equal(p, curve(0.4)[name]) for name, p in made.named_parameters())
    x = (to_float(c.tune.images) - 0.5) / 0.5
    with torch.no_grad():
        first = F.conv2d(x, curve(0.4)["body.stage1.0.weight"], padding=1)
    norm = made.body.stage1[1]
    assert torch.allclose(norm.running_mean, first.mean((0, 2, 3)), atol=1e-4)
    assert float((norm.running_mean - c.net.body.stage1[1].running_mean).abs().max()) > 0.01
    assert float((norm.running_var - c.net.body.stage1[1].running_var).abs().max()) > 0.01
    assert c.ctx.cost.forwards == len(c.tune)
    bare = copy.deepcopy(c.net)
    with torch.no_grad():
        for name, p in bare.named_parameters():
            p.copy_(curve(0.4)[name])
    expected = refresh(bare, c.tune.images, batch=256, ctx=samples.ctx()).state
    assert all(torch.equal(expected[k], v) for k, v in pack(made).state.items())


def test_the_ends_of_the_curve_are_the_models_but_for_statistics() -> None:
    c, curve = case(), ends()
    for t, net in ((0.0, samples.badnets_net()), (1.0, samples.clean_net())):
        expected = refresh(net, c.tune.images, batch=256, ctx=samples.ctx()).state
        found = pack(at(t, curve, c.net, c.tune, c.ctx)).state
        assert all(torch.equal(expected[k], v) for k, v in found.items())


def test_without_batchnorm_nothing_is_estimated() -> None:
    def bare(seed: int) -> Classifier:
        net = build(samples.SPEC, seed)
        for i in range(1, 5):
            getattr(net.body, f"stage{i}")[1] = nn.Identity()
        return net

    a, b = bare(1), bare(2)
    c = case(a)
    made = at(0.5, Bezier(start=weights(a), middle=weights(b), end=weights(b)), a, c.tune, c.ctx)
    assert c.ctx.cost.forwards == 0
    expected = {k: v / 4 + weights(b)[k] * 0.75 for k, v in weights(a).items()}
    assert all(torch.allclose(expected[k], v) for k, v in made.named_parameters())


def fixed(monkeypatch: pytest.MonkeyPatch, curve: Bezier) -> list[ImageSet]:
    seen: list[ImageSet] = []

    def made(self: Any, net: Any, data: ImageSet, ctx: Any) -> Bezier:
        seen.append(data)
        return curve

    monkeypatch.setattr(MCR, "curve", made)
    return seen


def test_the_farthest_accepted_point_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # From the suspicious model over itself to noise: accuracy falls along the way.
    a = weights(samples.badnets_net())
    seen, c = fixed(monkeypatch, Bezier(start=a, middle=a, end=weights(build(samples.SPEC, 4)))), case()
    outcome = MCR().run(c)
    assert seen == [c.tune]
    assert list(outcome.path) == [f"t={t:.1f}" for t in POINTS] == [f"t=0.{i}" for i in range(1, 10)]
    before = right(c.net, c.val, ctx=c.ctx)
    ok = {n: accepts(before, right(load(m), c.val, ctx=c.ctx)) for n, m in outcome.path.items()}
    best = max(float(n.removeprefix("t=")) for n, good in ok.items() if good)
    assert 0.1 <= best < 0.9
    assert outcome.chosen["t"] == best
    assert outcome.model is outcome.path[f"t={best:.1f}"]
    # Nine passes for statistics, ten judgements.
    assert outcome.chosen["rows"] == 120


def test_no_point_is_taken_where_none_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = weights(build(samples.SPEC, 4))
    fixed(monkeypatch, Bezier(start=noise, middle=noise, end=noise))
    outcome = MCR().run(case())
    assert outcome.model is None
    assert outcome.chosen["t"] is None and outcome.chosen["unchanged"] == "no t was accepted"
    assert len(outcome.path) == 9


def test_a_given_point_uses_all_rows_and_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, c = fixed(monkeypatch, ends()), case()
    outcome = MCR(t=0.1).run(c)
    assert seen == [c.clean]
    assert outcome.chosen == {"t": 0.1} and not outcome.path
    expected = pack(at(0.1, ends(), c.net, c.clean, c.ctx)).state
    assert outcome.model is not None
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())


def test_published_settings_and_access() -> None:
    ends_ = {"lr": 0.01, "steps": 1000, "batch": 256}
    assert MCR() == MCR(t=None, **ends_, curve_lr=0.01, curve_steps=2000, curve_batch=128, weight_decay=1e-4)
    assert MCR.ACCESS.track() == "T1"
    for bad in ({"t": 0.0}, {"t": 1.0}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MCR.from_params(bad)
