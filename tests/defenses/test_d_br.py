from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn
from torch.nn import functional as F

from sleeperbench.defenses import d_br
from sleeperbench.defenses.d_br import DBR, Ascent, share
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.sensitivity import Pools


def case(n: int = 200) -> Any:
    train = samples.digits()["train"].rows(torch.arange(n))
    net = build(samples.SPEC, 4).eval()
    return SimpleNamespace(net=net, spec=samples.SPEC, train=train, recipe=samples.RECIPE, ctx=samples.ctx(3))


def pools(n: int = 200) -> Pools:
    score = torch.arange(n).float()
    return Pools(score=score, clean=score < 0.2 * n, poisoned=score >= 0.95 * n)


def test_ascent_climbs() -> None:
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2] * 2)
    (up,) = torch.autograd.grad(Ascent().loss(net, x, y, y), net[1].weight)
    (down,) = torch.autograd.grad(F.cross_entropy(net(x), y), net[1].weight)
    assert torch.allclose(up, -down)
    rows = samples.answering([1, 2, 3, 4], [1, 2, 0, 0])
    assert share(samples.ReadsPixel(), rows, samples.ctx()) == 0.5


def test_rounds_go_back_and_forth_and_stop_unlearning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    told: dict[str, Any] = {}

    def fake(net: Any, data: Any, recipe: Any, ctx: Any, hooks: Any = None) -> None:
        seen.append((data, recipe, ctx.seed, hooks))

    def separate(spec: Any, train: Any, recipe: Any, ctx: Any, **args: Any) -> Pools:
        told.update(args)
        return pools()

    c = case()
    accuracy = iter([0.9, 0.9, 0.5, 0.1, 0.09, 0.3, *[0.05] * 17])
    monkeypatch.setattr(d_br, "fit", fake)
    monkeypatch.setattr(d_br, "distinguish", separate)
    monkeypatch.setattr(d_br, "share", lambda net, rows, ctx: next(accuracy))
    outcome = DBR().run(c)
    assert told == {"epochs": 2, "spread_epochs": 10, "lr": 0.01, "clean": 0.2, "poisoned": 0.05}
    # Asked before all, then before every round: 0.9, 0.5, 0.1, 0.09 (below chance), 0.3, then always below.
    kinds = ["up" if isinstance(hooks, Ascent) else "down" for *_, hooks in seen]
    assert kinds == ["up", "down"] * 3 + ["down"] + ["up", "down"] + ["down"] * 15
    assert outcome.chosen["unlearning_rounds"] == 4 and outcome.chosen["poisoned_accuracy_before"] == 0.9
    for (data, recipe, _, _), kind in zip(seen, kinds, strict=True):
        assert torch.equal(data.ids, c.train.ids[pools().poisoned if kind == "up" else pools().clean])
        assert (recipe.lr, recipe.batch, recipe.momentum, recipe.weight_decay) == (1e-4, 128, 0.9, 5e-4)
        assert (recipe.epochs, recipe.schedule, recipe.pad) == (1, "constant", samples.RECIPE.pad)
    assert len({seed for _, _, seed, _ in seen}) == len(seen)
    assert torch.equal(outcome.keep, ~pools().poisoned) and torch.equal(outcome.suspicion, pools().score)


def test_the_attacked_model_is_repaired_and_left_alone() -> None:
    c = case()
    before, state = pack(c.net).state, torch.random.get_rng_state()
    method = DBR(epochs=1, spread_epochs=1, rounds=2)
    outcome = method.run(c)
    assert all(torch.equal(before[k], v) for k, v in pack(c.net).state.items())
    moved = [k for k, v in outcome.model.state.items() if v.is_floating_point() and not torch.equal(v, before[k])]
    assert {n for n, _ in c.net.named_parameters()} <= set(moved)
    weights = {n for n, _ in c.net.named_parameters()}
    assert max(float((outcome.model.state[k] - before[k]).abs().max()) for k in weights) < 0.01, "4 steps at 1e-4"
    assert torch.equal(torch.random.get_rng_state(), state)
    again = method.run(case())
    assert all(torch.equal(again.model.state[k], v) for k, v in outcome.model.state.items())
    assert again.chosen == outcome.chosen and int((~outcome.keep).sum()) == 10


def test_shares_must_fit() -> None:
    for bad in ({"clean": 0.0}, {"poisoned": 1.0}, {"clean": 0.8, "poisoned": 0.3}):
        with pytest.raises(ValueError, match="give shares"):
            DBR(**bad)
