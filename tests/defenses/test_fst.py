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
from sleeperbench.defenses.fst import NAMES, FeatureShiftTuning, Shift, head, with_new_head
from sleeperbench.kit.classifier import load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import right
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


def slow(method: FeatureShiftTuning, rows: ImageSet, ctx: Any) -> dict[str, Tensor]:
    """Gradient of the shift term, momentum and projection written out, on batches of all rows."""
    net = copy.deepcopy(samples.badnets_net()).train()
    old = net.body.head.weight.detach().clone()
    first = with_new_head(net, ctx).body.head
    net.body.head.load_state_dict(first.state_dict())
    x, y = to_float(rows.images), rows.labels
    recipe = replace(ctx.recipe, lr=method.lr, schedule="cosine")
    speed: dict[str, Tensor] = {}
    for step in range(method.steps):
        names = dict(net.named_parameters())
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(names.values()))
        with torch.no_grad():
            for (name, p), g in zip(names.items(), grads, strict=True):
                if name == "body.head.weight":
                    g = g + method.alpha * old
                speed[name] = 0.9 * speed.get(name, torch.zeros_like(p)) + g
                p -= learning_rate(recipe, step, method.steps) * speed[name]
            w = net.body.head.weight
            w.copy_(w * (float((old**2).sum()) / float((w**2).sum())) ** 0.5)
    return net.state_dict()


@pytest.mark.parametrize("alpha", [0.1, 0.0, 2.0])
def test_steps_equal_a_slow_loop(alpha: float) -> None:
    method, rows, ctx = (
        FeatureShiftTuning(alpha=alpha, steps=4),
        samples.digits()["pool"].rows(torch.arange(60)),
        plain(),
    )
    found = method.run(case(rows, ctx)).model.state
    expected = slow(method, rows, ctx)
    before = pack(samples.badnets_net()).state
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), atol=2e-5, rtol=1e-4), name
        assert not torch.equal(found[name], before[name]), name
    assert ctx.cost.forwards == ctx.cost.backwards == 4 * 60


def test_the_shift_term_is_alpha_times_the_inner_product_and_leaves_the_bias() -> None:
    net = copy.deepcopy(samples.badnets_net()).eval()
    old = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    rows = samples.digits()["pool"]
    x, y = to_float(rows.images), rows.labels
    hook = Shift(old, 0.3)
    loss, ce = hook.loss(net, x, y, y), F.cross_entropy(net(x), y)
    w = net.body.head.weight.detach()
    inner = sum(float(a) * float(b) for a, b in zip(w.flatten(), old.flatten(), strict=True))
    assert float((loss - ce).detach()) == pytest.approx(0.3 * inner, rel=1e-4)
    params = dict(net.named_parameters())
    shifted = torch.autograd.grad(loss, list(params.values()))
    plainly = torch.autograd.grad(ce, list(params.values()))
    for name, a, b in zip(params, shifted, plainly, strict=True):
        expected = b + 0.3 * old if name == "body.head.weight" else b
        assert torch.allclose(a, expected, atol=1e-6), name


def test_the_head_has_the_old_norm_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    biases: list[Tensor] = []
    steps = Shift.step

    def step(self: Shift, net: Any, *args: Any) -> Tensor:
        loss = steps(self, net, *args)
        norms.append(float(net.body.head.weight.detach().double().norm()))
        biases.append(net.body.head.bias.detach().clone())
        return loss

    monkeypatch.setattr(Shift, "step", step)
    net = samples.badnets_net()
    FeatureShiftTuning(alpha=1.0, steps=12, batch=64).run(case(clean()))
    assert norms == pytest.approx([float(net.body.head.weight.detach().double().norm())] * 12, rel=1e-6)
    # The bias is not rescaled with the weight: its norm goes its own way.
    assert len({round(float(b.norm()), 6) for b in biases}) == 12


def test_the_new_head_is_uniform_and_the_rest_stays() -> None:
    net = samples.badnets_net()
    before, rows = pack(net).state, []
    for seed in range(40):
        fresh = with_new_head(net, samples.ctx(seed))
        rows.append(torch.cat([fresh.body.head.weight.detach().flatten(), fresh.body.head.bias.detach()]))
        assert all(torch.equal(before[n], t) for n, t in pack(fresh).state.items() if "head" not in n)
    drawn, bound = torch.cat(rows), 32**-0.5
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.abs().max()) > 0.99 * bound
    assert abs(float(drawn.mean())) < 0.01 * bound
    assert float(drawn.var()) == pytest.approx(bound**2 / 3, rel=0.03)
    assert all(torch.equal(before[n], t) for n, t in pack(net).state.items())
    assert torch.equal(
        rows[0], torch.cat([p.detach().flatten() for p in head(with_new_head(net, samples.ctx(0))).parameters()])
    )


def test_a_head_without_bias() -> None:
    net = copy.deepcopy(samples.badnets_net())
    net.body.head = nn.Linear(32, 10, bias=False)
    assert [tuple(p.shape) for p in head(with_new_head(net, samples.ctx())).parameters()] == [(10, 32)]


def test_settings_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sleeperbench.defenses.fst.tune", lambda net, data, **args: seen.update(args, data=data))
    c = case(clean())
    FeatureShiftTuning().run(c)
    hooks = seen.pop("hooks")
    assert hooks.alpha == 0.1 and torch.equal(hooks.old, c.net.body.head.weight)
    assert seen.pop("data") is c.clean and seen.pop("ctx") is c.ctx
    # Without weight decay, which is what `tune` does unless told otherwise.
    assert seen == {"lr": 0.01, "steps": 80, "batch": 128, "schedule": "cosine"}
    assert "linear_head" in FeatureShiftTuning.REQUIRES


def test_the_new_head_relearns_and_turns_away() -> None:
    rows, test = clean(), samples.digits()["test"]
    c = case(rows, samples.ctx(9))
    old = c.net.body.head.weight.detach().flatten()

    def cosine(alpha: float) -> float:
        model = load(FeatureShiftTuning(alpha=alpha, steps=60, lr=0.1, batch=64).run(c).model)
        assert float(right(model, test, ctx=c.ctx).float().mean()) > 0.8
        return float(F.cosine_similarity(model.body.head.weight.detach().flatten(), old, dim=0))

    assert cosine(0.5) < -0.5 < cosine(0.0)


def test_the_honest_alpha_is_the_largest_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    ruined = copy.deepcopy(samples.badnets_net())
    with torch.no_grad():
        ruined.body.head.weight.zero_()
    seen: list[ImageSet] = []

    def tuned(self: Any, case: Any, rows: ImageSet, alpha: float) -> Any:
        seen.append(rows)
        return pack(case.net if alpha <= limit else ruined)

    monkeypatch.setattr(FeatureShiftTuning, "tuned", tuned)
    c = case(clean(), val=120)
    limit = 0.2
    outcome = FeatureShiftTuning(alpha=None).run(c)
    assert outcome.chosen["alpha"] == 0.2 and outcome.model is outcome.path["alpha=0.2"]
    assert list(outcome.path) == list(NAMES) and list(NAMES.values()) == sorted(NAMES.values())
    assert all(rows is c.tune for rows in seen)
    limit = -1
    outcome = FeatureShiftTuning(alpha=None).run(c)
    assert outcome.model is None and outcome.chosen["alpha"] is None
    assert outcome.chosen["unchanged"] == "no alpha was accepted"


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"alpha": -1.0}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FeatureShiftTuning.from_params(bad)
