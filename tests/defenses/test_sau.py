from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses.sau import NAMES, SAU, SharedUnlearning, apart, sharing
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.pixels import to_float


def clean() -> ImageSet:
    """400 rows that no model of the samples was trained on."""
    pool, probe = samples.digits()["pool"], samples.digits()["probe"]
    parts = {k: torch.cat([getattr(pool, k), getattr(probe, k)]) for k in ("images", "labels", "ids")}
    return replace(pool, **parts)


def case(rows: ImageSet, val: int = 0) -> Any:
    n = len(rows) - val
    return SimpleNamespace(
        net=samples.badnets_net(),
        clean=rows,
        tune=rows.rows(torch.arange(n)),
        val=rows.rows(torch.arange(n, len(rows))),
        ctx=samples.ctx(9),
    )


def slow_apart(
    logits: Tensor, logits_0: Tensor, y: Tensor, clean: Tensor, clean_0: Tensor, b1: float, b2: float
) -> Any:
    """Row by row, with the early ends as conditions."""
    adv, js = torch.zeros(()), torch.zeros(())
    for i in range(len(y)):
        p, q = logits[i].softmax(0), logits_0[i].softmax(0)
        now, now_0 = int(p.argmax()), int(q.argmax())
        fooled, fooled_0 = now != int(clean[i]), now_0 != int(clean_0[i])
        if not fooled:
            adv = adv - p[y[i]].log() / 2
        if not fooled_0:
            adv = adv - q[y[i]].log() / 2
        if not (fooled and fooled_0 and now == now_0):
            for a, b in zip(p, q, strict=True):
                js = js + a * (2 * a / (a + b)).log() / 2 + b * (2 * b / (a + b)).log() / 2
    return (b2 * js - b1 * adv) / len(y)


def test_the_inner_loss_equals_a_slow_reference() -> None:
    gen = torch.Generator().manual_seed(0)
    logits, logits_0 = (3 * torch.randn(60, 4, generator=gen) for _ in range(2))
    y, clean_, clean_0 = (torch.randint(4, (60,), generator=gen) for _ in range(3))
    now, now_0 = logits.argmax(1), logits_0.argmax(1)
    kinds = (now != clean_).int() + 2 * (now_0 != clean_0).int() + 4 * (now == now_0).int()
    assert len(kinds.unique()) == 8, "all kinds of rows are there"
    logits.requires_grad_()
    logits_0.requires_grad_()
    for b1, b2 in ((0.01, 1.0), (1.0, 0.0), (0.3, 0.7)):
        found = apart(logits, logits_0, y, clean_, clean_0, b1, b2)
        expected = slow_apart(logits, logits_0, y, clean_, clean_0, b1, b2)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        up, wanted = (torch.autograd.grad(v, (logits, logits_0)) for v in (found, expected))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(up, wanted, strict=True))


def test_shared_rows_pull_no_more() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]], requires_grad=True)
    logits_0 = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 1.0]])
    zero = torch.zeros(2, dtype=torch.int64)
    (up,) = torch.autograd.grad(apart(logits, logits_0, zero, zero, zero, 1.0, 1.0), logits)
    assert torch.equal(up[0], torch.zeros(3)), "both say 1 instead of 0"
    assert float(up[1].abs().sum()) > 0


class Linear(nn.Module):
    """A linear net on 12 pixels; nets of different seeds are a little different."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body = nn.Linear(12, 3)
        same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(2 * torch.randn(p.shape, generator=same) + 0.5 * torch.randn(p.shape, generator=own))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))


def test_the_search_equals_a_slow_loop_with_its_early_end() -> None:
    f, f_0 = Linear(1), Linear(2)
    gen = torch.Generator().manual_seed(2)
    x, y = torch.rand(40, 3, 2, 2, generator=gen), torch.randint(3, (40,), generator=gen)
    method = SAU(eps=0.2, step=0.15, inner_steps=4)
    ctx = samples.ctx()
    hooks = SharedUnlearning(f_0, method, 0.2, ctx)  # type: ignore[arg-type]
    clean_, clean_0 = f(x).argmax(1), f_0(x).argmax(1)
    found = hooks.search(f, x, y, clean_, clean_0)
    assert all(p.grad is None for net in (f, f_0, hooks.reference) for p in net.parameters())
    # Rows do not touch each other, so one at a time, until it is shared.
    ended = 0
    for i in range(40):
        delta = torch.full((1, 3, 2, 2), 0.2)
        for _ in range(4):
            delta.requires_grad_()
            a, b = f(x[i : i + 1] + delta), f_0(x[i : i + 1] + delta)
            one = slice(i, i + 1)
            loss = slow_apart(a, b, y[one], clean_[one], clean_0[one], 0.01, 1.0)
            shared = int(a.argmax()) != int(clean_[i]) and int(b.argmax()) != int(clean_0[i])
            if shared and int(a.argmax()) == int(b.argmax()):
                ended += 1
                break
            (up,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() - 0.15 * up.sign()).clamp(-0.2, 0.2)
        assert torch.allclose(found[i], delta[0].detach(), atol=1e-6), i
    assert 0 < ended < 40
    assert float(found.abs().max()) == pytest.approx(0.2)
    assert ctx.cost.forwards == ctx.cost.backwards == 4 * 40, "those of the reference alone; training counts f's"


def test_the_sharing_term_equals_a_slow_reference() -> None:
    gen = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 5, generator=gen)
    logits[0] = torch.tensor([40.0, 0, 0, 0, 0])
    yhat = torch.randint(5, (50,), generator=gen)
    yhat[0], yhat[1] = 0, int(logits[1].argmin())
    fools = torch.rand(50, generator=gen) < 0.5
    fools[:2] = True
    total = 0.0
    for i in range(50):
        if fools[i]:
            p = logits[i].double().softmax(0)
            wrong = float(p[yhat[i]])
            total -= math.log(1e-6 + min(0.999, 1 - wrong)) / 2 + math.log(1 + 1e-6 - max(0.001, wrong)) / 2
    found = float(sharing(logits, yhat, fools))
    # 1 + 1e-6 - 1 is 9.5e-7 in single precision.
    assert found == pytest.approx(total / 50, rel=2e-3)
    # In between the clamps it is -log(1 - p).
    p = torch.tensor([[0.3, 0.7]])
    assert float(sharing(p.log(), torch.tensor([1]), torch.tensor([True]))) == pytest.approx(-math.log(0.3), rel=1e-4)
    assert float(sharing(logits, yhat, torch.zeros(50, dtype=torch.bool))) == 0
    assert found > 0


def test_the_outer_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    f, f_0, ctx = copy.deepcopy(samples.clean_net()), samples.badnets_net(), samples.ctx()
    rows = samples.digits()["pool"]
    x, y = to_float(rows.images), rows.labels.clone()
    y[:60] = (y[:60] + 1) % 10  # the reference errs on these without any perturbation
    noise = 0.8 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) - 0.5)
    monkeypatch.setattr(SharedUnlearning, "search", lambda *args: noise)
    hooks = SharedUnlearning(f_0, SAU(weight=0.7), 0.2, ctx)
    f.train()
    state = {k: v.clone() for k, v in f.state_dict().items()}
    found = hooks.loss(f, x, y, y)
    assert all(m.training for m in f.modules())
    assert all(torch.equal(state[k], v) for k, v in f.state_dict().items()), "running statistics stay"
    f.eval()
    with torch.no_grad():
        p, yhat, before = f(x + noise).softmax(1), f_0(x + noise).argmax(1), f_0(x).argmax(1)
        expected, fooled = float(F.cross_entropy(f(x), y)), 0
        assert int(((yhat != y) & (yhat == before)).sum()) > 5, "wrong, but not fooled"
        for i in range(len(y)):
            if int(yhat[i]) not in (int(y[i]), int(before[i])):
                fooled += 1
                wrong = float(p[i, yhat[i]].double())
                expected -= 0.7 / len(y) / 2 * math.log(1e-6 + min(0.999, 1 - wrong))
                expected -= 0.7 / len(y) / 2 * math.log(1 + 1e-6 - max(0.001, wrong))
    assert 10 < fooled < 140
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert all(p.grad is not None for p in f.parameters())
    assert all(p.grad is None for p in hooks.reference.parameters())


def test_at_first_every_fooled_image_is_shared() -> None:
    net, rows, ctx = samples.badnets_net(), samples.digits()["pool"], samples.ctx()
    x, y = to_float(rows.images), rows.labels
    hooks = SharedUnlearning(net, SAU(), 0.2, ctx)
    answers = net(x).argmax(1)
    delta = hooks.search(net, x, y, answers, answers)
    with torch.no_grad():
        now, now_0 = net(x + delta).argmax(1), hooks.reference(x + delta).argmax(1)
    assert torch.equal(now, now_0)
    assert int((now != answers).sum()) > 75, "half of them are fooled"
    # A pixel that pulls nowhere stays at +eps; the others move by eps, and never out of the ball.
    assert sorted(delta.unique().tolist()) == pytest.approx([-0.2, 0.0, 0.2], abs=1e-6)


def test_steps_costs_and_what_stays() -> None:
    c = case(clean())
    before = pack(c.net).state
    model = SAU(steps=4, batch=50, inner_steps=3).run(c).model
    assert c.ctx.cost.forwards == 4 * 50 * (4 + 2 * 3)
    assert c.ctx.cost.backwards == 4 * 50 * (2 + 2 * 3)
    weights = {n for n, _ in c.net.named_parameters()}
    for name, tensor in model.state.items():
        # Adam moves a weight by at most about its rate per step; buffers stay.
        assert torch.equal(tensor, before[name]) == (name not in weights), name
        assert float((tensor - before[name]).abs().max()) < 4 * 1.5e-4
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())


def test_the_models_learn_to_disagree() -> None:
    c, test = case(clean()), samples.digits()["test"].rows(torch.arange(150))
    method = SAU(steps=20, batch=40, lr=3e-3, inner_steps=3)
    net = copy.deepcopy(c.net)
    net.load_state_dict(dict(method.run(c).model.state))
    x, y = to_float(test.images), test.labels
    hooks = SharedUnlearning(c.net, method, 0.2, c.ctx)

    def agreeing(f: Any) -> float:
        delta = hooks.search(f, x, y, f(x).argmax(1), c.net(x).argmax(1))
        with torch.no_grad():
            a, b = f(x + delta).argmax(1), c.net(x + delta).argmax(1)
        return float(((a == b) & (b != y)).float().mean())

    assert agreeing(net.eval()) < 0.5 * agreeing(c.net)
    assert float((net(x).argmax(1) == y).float().mean()) > 0.85


def test_settings_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sleeperbench.defenses.sau.tune", lambda net, data, **args: seen.update(args, data=data))
    c = case(clean())
    SAU().run(c)
    hooks = seen.pop("hooks")
    s = hooks.settings
    assert (hooks.eps, s.step, s.inner_steps, s.beta_adv, s.beta_share, s.weight) == (0.2, 0.2, 5, 0.01, 1.0, 1.0)
    assert seen.pop("data") is c.clean and seen.pop("ctx") is c.ctx
    # No schedule and no weight decay.
    assert seen == {"lr": 1e-4, "steps": 1000, "batch": 256, "augment": False, "optimiser": "adam"}


def test_the_honest_bound_is_the_largest_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    ruined = copy.deepcopy(samples.badnets_net())
    with torch.no_grad():
        ruined.body.head.weight.zero_()
    seen: list[ImageSet] = []

    def tuned(self: Any, case: Any, rows: ImageSet, eps: float) -> Any:
        seen.append(rows)
        return pack(case.net if eps <= 0.1 else ruined)

    monkeypatch.setattr(SAU, "tuned", tuned)
    c = case(clean(), val=120)
    outcome = SAU(eps=None).run(c)
    assert outcome.chosen["eps"] == 0.1 and outcome.model is outcome.path["eps=0.1"]
    assert list(outcome.path) == list(NAMES) == ["eps=0.05", "eps=0.1", "eps=0.2", "eps=0.3"]
    assert all(rows is c.tune for rows in seen)


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"eps": 0.0}, {"eps": 1.5}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SAU.from_params(bad)
