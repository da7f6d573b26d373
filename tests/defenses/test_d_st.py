from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch.nn import functional as F

from sleeperbench.attacks.badnets import BadNets
from sleeperbench.defenses import d_st
from sleeperbench.defenses.d_st import DST, Head, alike, mean, table
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.select import right
from sleeperbench.kit.sensitivity import Pools


def case(n: int = 200) -> Any:
    train = samples.digits()["train"].rows(torch.arange(n))
    return SimpleNamespace(spec=samples.SPEC, train=train, recipe=samples.RECIPE, ctx=samples.ctx(3))


def pools(n: int = 200) -> Pools:
    score = torch.arange(n).float()
    return Pools(score=score, clean=score < 0.2 * n, poisoned=score >= 0.95 * n)


def test_positives_equal_a_double_loop() -> None:
    y, trusted = torch.tensor([0, 1, 0, 1, 1, 2]), torch.tensor([True, False, False, True, False, True])
    found = alike(y, trusted)
    for i in range(6):
        for j in range(6):
            assert bool(found[i, j]) == (i == j or (bool(trusted[i]) and int(y[i]) == int(y[j])))
    assert bool(found[0, 2]) and not bool(found[2, 0])


def test_clean_rows_attract_and_poisoned_ones_repel() -> None:
    c = case()
    net = build(samples.SPEC, 0).train()
    x, y = c.train.images[:12].float() / 255, c.train.labels[:12]
    mark = torch.tensor([0] * 9 + [1] * 3)
    found = Head(0.25, mark.bool(), c).loss(net, x, y, mark)
    assert all(m.training for m in net.modules())
    logits = net.eval()(x)
    wanted = F.cross_entropy(logits[:9], y[:9]) - 0.25 * F.cross_entropy(logits[9:], y[9:])
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    alone = Head(0.25, mark.bool(), c).loss(net, x[:9], y[:9], mark[:9])
    assert float(alone.detach()) == pytest.approx(float(F.cross_entropy(logits[:9], y[:9]).detach()), rel=1e-5)
    assert float(mean(torch.ones(3), torch.zeros(3, dtype=torch.bool))) == 0


def test_marks_follow_the_ids() -> None:
    c, shunned = case(), torch.tensor([False, True, False, True])
    ids = table(torch.tensor([7, 2, 9, 4]), shunned)
    assert ids.nonzero().flatten().tolist() == [2, 4]
    x = c.train.images[:3].float() / 255
    seen, y, mark = Head(0.1, ids, c).batch(x, c.train.labels[:3], torch.tensor([4, 9, 2]), 0)
    assert mark.tolist() == [1, 0, 1] and not torch.equal(seen, x) and torch.equal(y, c.train.labels[:3])


def test_stages_have_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}

    def separate(spec: Any, train: Any, recipe: Any, ctx: Any, **args: Any) -> Pools:
        told.update(args)
        return pools()

    def learn(net: Any, data: Any, recipe: Any, ctx: Any, **args: Any) -> None:
        first.update(args, data=data, recipe=recipe)

    def fake(net: Any, data: Any, recipe: Any, ctx: Any, hooks: Any) -> None:
        trained = [n for n, p in net.named_parameters() if p.requires_grad]
        second.update(data=data, recipe=recipe, hooks=hooks, trained=trained)

    monkeypatch.setattr(d_st, "distinguish", separate)
    monkeypatch.setattr(d_st, "pretrain", learn)
    monkeypatch.setattr(d_st, "fit", fake)
    c = case()
    outcome = DST().run(c)
    assert told == {"epochs": 2, "spread_epochs": 10, "lr": 0.01, "clean": 0.2, "poisoned": 0.05}
    r = first["recipe"]
    assert (r.epochs, r.lr, r.batch, r.momentum, r.weight_decay, r.schedule) == (200, 0.5, 512, 0.9, 1e-4, "cosine")
    assert (first["temperature"], first["blur"], first["warm_epochs"]) == (0.1, False, 10)
    assert first["data"] is c.train
    ids = c.train.ids[[0, 39, 40, 199]]
    zeros = torch.zeros(4, dtype=torch.int64)
    assert first["positives"](zeros, ids).sum(1).tolist() == [4, 4, 1, 1], "the first fifth is trusted"
    r = second["recipe"]
    assert (r.epochs, r.lr, r.batch, r.momentum, r.weight_decay, r.schedule) == (10, 5.0, 512, 0.9, 0.0, "constant")
    assert second["trained"] == ["body.head.weight", "body.head.bias"] and second["hooks"].repel == 0.001
    assert torch.equal(second["data"].ids, c.train.ids[pools().clean | pools().poisoned])
    assert torch.equal(outcome.keep, ~pools().poisoned) and torch.equal(outcome.suspicion, pools().score)


def test_it_runs_alike_twice() -> None:
    state = torch.random.get_rng_state()
    method = DST(epochs=1, spread_epochs=1, contrast_epochs=1, head_epochs=2, head_lr=0.5, batch=64)
    a, b = method.run(case()), method.run(case())
    assert all(torch.equal(b.model.state[k], v) for k, v in a.model.state.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    fresh = pack(build(samples.SPEC, samples.ctx(3).derive("init"))).state
    assert all(not torch.equal(fresh[n], a.model.state[n]) for n in ("body.head.weight", "body.stage1.0.weight"))
    assert a.chosen == {"clean": 40, "poisoned": 10}


def test_shares_must_fit() -> None:
    with pytest.raises(ValueError, match="give shares"):
        DST(clean=0.8, poisoned=0.3)


def test_poisoned_rows_are_found_and_the_backdoor_is_not_learnt() -> None:
    backdoor = (BadNets(), 1000, 0.1, 8)
    poisoned, test = samples.planted(*backdoor)
    c = SimpleNamespace(spec=samples.wide(8, 8), train=poisoned.data, recipe=samples.RECIPE, ctx=samples.ctx(3))
    outcome = DST(epochs=6, contrast_epochs=12, batch=128).run(c)
    # A tenth of all rows is poisoned, and of those that speak for their labels at most a fortieth.
    dirty, trusted = poisoned.mark == 1, outcome.suspicion.argsort()[:200]
    assert float(dirty.double().mean()) == 0.1 and float(dirty[trusted].double().mean()) < 0.025
    net = load(outcome.model)
    assert measure_asr(samples.trained(*backdoor), test, c.ctx).value > 0.9
    assert measure_asr(net, test, c.ctx).value < 0.3
    clean = samples.sized(samples.digits()["test"], 8)
    assert float(right(net, clean, ctx=c.ctx).float().mean()) > 0.5
