from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses.ft import FineTuning
from sleeperbench.defenses.ft_sam import FTSAM, NAMES, SharpnessAware
from sleeperbench.kit.classifier import load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, right
from sleeperbench.kit.train import learning_rate


def plain(seed: int = 9) -> Any:
    """A context without crops, so that a batch of all rows is the same in any order."""
    ctx = samples.ctx(seed)
    return replace(ctx, recipe=replace(ctx.recipe, pad=0))


def clean() -> ImageSet:
    """400 rows that no model of the samples was trained on."""
    pool, probe = samples.digits()["pool"], samples.digits()["probe"]
    parts = {k: torch.cat([getattr(pool, k), getattr(probe, k)]) for k in ("images", "labels", "ids")}
    return replace(pool, **parts)


def case(rows: ImageSet, ctx: Any = None, val: int = 0) -> Any:
    n = len(rows) - val
    return SimpleNamespace(
        net=samples.badnets_net(),
        clean=rows,
        tune=rows.rows(torch.arange(n)),
        val=rows.rows(torch.arange(n, len(rows))),
        ctx=plain() if ctx is None else ctx,
    )


def smoothed(logits: Tensor, y: Tensor, s: float) -> Tensor:
    """The mean over rows of sum over classes of -target log p, row by row."""
    total = torch.zeros(())
    for row, label in zip(logits.log_softmax(1), y.tolist(), strict=True):
        for k, logp in enumerate(row):
            total = total - (1 - s if k == label else s / (logits.shape[1] - 1)) * logp
    return total / len(y)


def slow(method: FTSAM, rows: ImageSet, ctx: Any) -> dict[str, Tensor]:
    """Momentum, weight decay, shift and statistics written out, on batches of all rows."""
    net = copy.deepcopy(samples.badnets_net()).train()
    x, y = to_float(rows.images), rows.labels
    params = list(net.parameters())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    speed = [torch.zeros_like(p) for p in params]
    recipe = replace(ctx.recipe, lr=method.lr, schedule="cosine")
    for step in range(method.steps):
        g = torch.autograd.grad(smoothed(net(x), y, method.smoothing), params)
        sizes = [p.detach().abs() if method.adaptive else torch.ones_like(p) for p in params]
        length = sum(float(((s * v) ** 2).sum()) for s, v in zip(sizes, g, strict=True)) ** 0.5
        eps = [method.rho * s * s * v / length for s, v in zip(sizes, g, strict=True)]
        old = [p.detach().clone() for p in params]
        for m in norms:
            m.momentum = 0.0
        with torch.no_grad():
            for p, e in zip(params, eps, strict=True):
                p += e
        g = torch.autograd.grad(smoothed(net(x), y, method.smoothing), params)
        for m in norms:
            m.momentum = 0.1
            m.num_batches_tracked -= 1
        with torch.no_grad():
            for p, o, v, d in zip(params, old, speed, g, strict=True):
                v.mul_(0.9).add_(d + method.weight_decay * o)
                p.copy_(o - learning_rate(recipe, step, method.steps) * v)
    return net.state_dict()


@pytest.mark.parametrize("settings", [{}, {"adaptive": False, "rho": 0.3, "smoothing": 0.0, "weight_decay": 0.1}])
def test_steps_equal_a_slow_loop(settings: dict[str, Any]) -> None:
    method, rows, ctx = FTSAM(steps=3, **settings), samples.digits()["pool"].rows(torch.arange(24)), plain()
    found = method.run(case(rows, ctx)).model
    expected = slow(method, rows, ctx)
    before = pack(samples.badnets_net()).state
    for name, tensor in expected.items():
        assert torch.allclose(found.state[name].double(), tensor.double(), atol=2e-5, rtol=1e-4), name
        assert not torch.equal(found.state[name], before[name]), name
    # Two passes each way per step.
    assert ctx.cost.forwards == ctx.cost.backwards == 3 * 2 * 24


def test_the_second_pass_is_at_distance_rho() -> None:
    net = copy.deepcopy(samples.badnets_net()).train()
    at: list[list[Tensor]] = []

    class Spy(SharpnessAware):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
            at.append([p.detach().double().clone() for p in net.parameters()])
            return super().loss(net, x, y, mark)

    rows = samples.digits()["pool"]
    opt = torch.optim.SGD(net.parameters(), lr=0.0)
    x, y = to_float(rows.images), rows.labels
    for adaptive, rho in ((True, 2.0), (False, 0.05)):
        at.clear()
        Spy(rho, adaptive, 0.1).step(net, opt, x, y, torch.zeros_like(y))
        shift = [b - a for a, b in zip(*at, strict=True)]
        sized = [s / w.abs().clamp_min(1e-9) if adaptive else s for s, w in zip(shift, at[0], strict=True)]
        assert float(torch.cat([s.flatten() for s in sized]).norm()) == pytest.approx(rho, rel=1e-3)
        assert len(shift) == len(list(net.parameters())), "no tensor is left out"
        assert all(float(s.abs().max()) > 0 for s in shift)
        # With a rate of 0 the weights are those before the shift, to the bit.
        assert all(torch.equal(a, p.detach().double()) for a, p in zip(at[0], net.parameters(), strict=True))


def test_without_radius_and_smoothing_it_is_fine_tuning() -> None:
    rows = clean()
    sam = FTSAM(rho=0.0, smoothing=0.0, steps=6, batch=100).run(case(rows, samples.ctx(9))).model
    ft = FineTuning(steps=6, batch=100).run(case(rows, samples.ctx(9))).model
    assert all(torch.equal(ft.state[n], t) for n, t in sam.state.items())


def test_smoothing_of_two_classes() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    y = torch.tensor([0, 0])
    hook = SharpnessAware(1.0, True, 0.1)
    expected = 0.9 * F.cross_entropy(logits, y) + 0.1 * F.cross_entropy(logits, 1 - y)
    assert torch.allclose(hook.loss(nn.Identity(), logits, y, y), expected)


def test_settings_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sleeperbench.defenses.ft_sam.tune", lambda net, data, **args: seen.update(args, data=data))
    c = case(clean())
    FTSAM().run(c)
    hooks = seen.pop("hooks")
    assert (hooks.rho, hooks.adaptive, hooks.smoothing) == (2.0, True, 0.1)
    assert seen.pop("data") is c.clean and seen.pop("ctx") is c.ctx
    assert seen == {"lr": 0.01, "steps": 1000, "batch": 256, "weight_decay": 5e-4, "schedule": "cosine"}


def test_the_honest_radius_is_the_largest_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    ruined = copy.deepcopy(samples.badnets_net())
    with torch.no_grad():
        ruined.body.head.weight.zero_()
    seen: list[ImageSet] = []

    def tuned(self: Any, case: Any, rows: ImageSet, rho: float) -> Any:
        seen.append(rows)
        if rho == 8.0:
            raise FloatingPointError
        return pack(case.net if rho <= 1 else ruined)

    monkeypatch.setattr(FTSAM, "tuned", tuned)
    c = case(clean(), val=120)
    outcome = FTSAM(rho=None).run(c)
    assert outcome.chosen["rho"] == 1.0
    assert list(outcome.path) == ["rho=0.5", "rho=1", "rho=2", "rho=4"], "what diverged is no candidate"
    assert all(rows is c.tune for rows in seen) and len(seen) == len(NAMES)
    assert outcome.model is outcome.path["rho=1"]


def test_the_chosen_radius_is_one_that_the_rule_accepts() -> None:
    c = case(clean(), samples.ctx(9), val=120)
    outcome = FTSAM(rho=None, steps=5, batch=64).run(c)
    before = right(c.net, c.val, ctx=c.ctx)
    ok = [rho for n, rho in NAMES.items() if accepts(before, right(load(outcome.path[n]), c.val, ctx=c.ctx))]
    assert outcome.chosen["rho"] == max(ok, default=None)


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"rho": -1.0}, {"smoothing": 1.0}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FTSAM.from_params(bad)
