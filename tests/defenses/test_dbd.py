from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.attacks.badnets import BadNets
from sleeperbench.defenses import dbd
from sleeperbench.defenses.dbd import DBD, Head, MixMatch, guess, interleave, mixed_up, smallest, symmetric
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import build, load
from sleeperbench.kit.contrast import alone
from sleeperbench.kit.select import right
from sleeperbench.kit.train import fit


def case(n: int = 120) -> Any:
    train = samples.digits()["train"].rows(torch.arange(n))
    return SimpleNamespace(spec=samples.SPEC, train=train, recipe=samples.RECIPE, ctx=samples.ctx(3))


def test_symmetric_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 40.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([2, 0])
    for i in range(2):
        p = [math.exp(float(v)) for v in logits[i]]
        p = [v / sum(p) for v in p]
        reverse = -sum(max(v, 1e-7) * math.log(1.0 if k == int(y[i]) else 1e-4) for k, v in enumerate(p))
        wanted = -0.1 * math.log(p[int(y[i])]) + reverse
        assert float(symmetric(logits, y)[i]) == pytest.approx(wanted, rel=1e-6)


def test_the_split_takes_the_smallest() -> None:
    values = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.3])
    assert smallest(values, 0.4).tolist() == [False, True, False, True, False]
    assert smallest(values, 0.01).sum() == 1 and smallest(values, 0.99).sum() == 4


def test_guesses_are_sharpened_means() -> None:
    a, b = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    p = (a.softmax(1) + b.softmax(1)) / 2
    squared = [float(v) ** 2 for v in p[0]]
    assert guess([a, b], 0.5)[0].tolist() == pytest.approx([v / sum(squared) for v in squared])
    assert torch.allclose(guess([a, b], 1.0), p)


@pytest.mark.parametrize("n", [4, 6, 8])
def test_interleaving_mixes_all_thirds_and_undoes_itself(n: int) -> None:
    parts = [torch.arange(n) + 100 * i for i in range(3)]
    mixed = interleave(parts)
    assert sorted(torch.cat(mixed).tolist()) == sorted(torch.cat(parts).tolist())
    assert {int(v) // 100 for v in mixed[0]} == {0, 1, 2} and all(len(m) == n for m in mixed)
    assert all(torch.equal(a, b) for a, b in zip(interleave(mixed), parts, strict=True))


class Watched(nn.Module):
    """A linear net that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(256, 10, generator=gen) / 16)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x.flatten(1) @ self.weight


def hooks(net: Any, c: Any, **settings: Any) -> MixMatch:
    return MixMatch(DBD(**settings), net, c.train, c.recipe, c.ctx)


def test_a_step_equals_a_slow_reference() -> None:
    c, net = case(), Watched()
    h = hooks(net, c, batch=8, iterations=5, semi_epochs=20)
    x, y, ids = torch.zeros(8, 1, 16, 16), torch.zeros(8, dtype=torch.int64), torch.arange(8)
    for step in range(7):
        net.seen.clear()
        mixed, _, _ = h.batch(x, y, ids, step)
    # Step 6 is the second of the second split.
    u1, u2 = net.seen
    rows = [order[8:16] for order in h.orders]
    losses = symmetric(net(c.train.images.float() / 255).double(), c.train.labels)
    assert set(rows[0].tolist()) <= set(losses.argsort()[:60].tolist()), "rows with labels are the easy half"
    assert set(rows[1].tolist()) <= set(losses.argsort()[60:].tolist())
    assert not torch.equal(u1, u2) and mixed.shape == (24, 1, 16, 16)
    gen = c.ctx.generator("semi views", 6)
    views = [dbd.to_float(dbd.crop_flip(c.train.images[r], 1, False, gen)) for r in (rows[0], rows[1], rows[1])]
    assert torch.equal(views[1], u1) and torch.equal(views[2], u2)
    p = ((net(u1).softmax(1) + net(u2).softmax(1)) / 2) ** 2
    p = (p / p.sum(1, keepdim=True)).detach()
    targets = torch.cat([F.one_hot(c.train.labels[rows[0]], 10).float(), p, p])
    share = float(dbd.np.random.default_rng(c.ctx.derive("mix", 6)).beta(0.75, 0.75))
    share = max(share, 1 - share)
    order = torch.randperm(24, generator=gen)
    together = torch.cat(views)
    assert torch.allclose(mixed, share * together + (1 - share) * together[order], atol=1e-6)
    assert torch.allclose(h.target, share * targets + (1 - share) * targets[order], atol=1e-6)
    assert h.weight == pytest.approx(15 * (10 + 1 + 1 / 5) / 20)
    total = 0.0
    for i in range(24):
        q = net(mixed[i : i + 1])[0].detach().double().softmax(0)
        if i < 8:
            total -= float(h.target[i].double() @ q.log()) / 8
        else:
            total += h.weight * float((q - h.target[i].double()).square().sum()) / (16 * 10)
    assert float(h.loss(net, mixed, y, y).detach()) == pytest.approx(total, rel=1e-5)
    h.batch(x, y, ids, 5 * 12)
    assert h.weight == 15, "it rises no further"


def test_mixing_by_hand() -> None:
    x, t = torch.tensor([[0.0], [1.0]]), torch.eye(2)
    found, target = mixed_up(x, t, 0.75, torch.tensor([1, 0]))
    assert found.flatten().tolist() == [0.25, 0.75] and target.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_the_head_is_trained_in_eval_mode() -> None:
    net, data = build(samples.SPEC, 0).train(), samples.digits()["pool"]
    x = data.images[:20].float() / 255
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = Head().loss(net, x, data.labels[:20], data.labels[:20])
    assert all(m.training for m in net.modules())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    wanted = symmetric(net.eval()(x), data.labels[:20]).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_stages_have_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    first: dict[str, Any] = {}

    def learn(net: Any, data: Any, recipe: Any, ctx: Any, **args: Any) -> None:
        first.update(args, recipe=recipe, data=data)

    def fake(net: Any, data: Any, recipe: Any, ctx: Any, **args: Any) -> None:
        trained = [n for n, p in net.named_parameters() if p.requires_grad]
        seen.append({"recipe": recipe, "seed": ctx.seed, "trained": trained, **args})

    monkeypatch.setattr(dbd, "pretrain", learn)
    monkeypatch.setattr(dbd, "fit", fake)
    c = case()
    outcome = DBD().run(c)
    r = first["recipe"]
    assert (r.epochs, r.lr, r.batch, r.momentum, r.weight_decay, r.schedule) == (1000, 0.4, 512, 0.9, 1e-4, "cosine")
    assert (first["temperature"], first["blur"], first["positives"]) == (0.5, True, alone) and first["data"] is c.train
    head, semi = seen
    r = head["recipe"]
    assert (r.epochs, r.lr, r.batch, r.weight_decay, r.schedule) == (10, 2e-3, 128, 0.0, "constant")
    assert head["trained"] == ["body.head.weight", "body.head.bias"] and isinstance(head["hooks"], Head)
    r = semi["recipe"]
    assert (r.lr, r.batch, r.schedule, semi["steps"]) == (2e-3, 64, "constant", 190 * 1024)
    assert len(semi["trained"]) > 4 and head["optimiser"] == semi["optimiser"] == "adam"
    s = semi["hooks"].settings
    assert (s.trusted, s.unlabelled, s.sharpen, s.mix) == (0.5, 15.0, 0.5, 0.75)
    assert head["seed"] != semi["seed"] and int(outcome.keep.sum()) == 60


def test_every_pass_of_the_third_step_is_counted_once() -> None:
    c, net = case(), build(samples.SPEC, 0)
    h = hooks(net, c, batch=8, iterations=2, semi_epochs=2)
    fit(net, c.train, replace(c.recipe, batch=8), c.ctx, hooks=h, steps=4, optimiser="adam")
    # Two rankings of all rows; per step two guesses of 8 rows, and 24 mixed ones.
    assert c.ctx.cost.forwards == 2 * 120 + 4 * (2 * 8 + 24) and c.ctx.cost.backwards == 4 * 24


def test_it_runs_alike_twice() -> None:
    state = torch.random.get_rng_state()
    method = DBD(contrast_epochs=1, head_epochs=1, semi_epochs=2, iterations=2, batch=8, contrast_batch=60)
    a, b = method.run(case()), method.run(case())
    assert all(torch.equal(b.model.state[k], v) for k, v in a.model.state.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float(a.suspicion[a.keep].max()) <= float(a.suspicion[~a.keep].min())


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"trusted": 1.0}, {"sharpen": 0.0}, {"mix": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DBD(**bad)


def test_poisoned_rows_are_seldom_trusted_and_the_backdoor_is_not_learnt() -> None:
    backdoor = (BadNets(), 500, 0.05, 8)
    poisoned, test = samples.planted(*backdoor)
    c = SimpleNamespace(spec=samples.wide(8, 8), train=poisoned.data, recipe=samples.RECIPE, ctx=samples.ctx(3))
    # Batches of 100, so that ten passes over 500 rows are 50 updates.
    outcome = DBD(contrast_epochs=10, contrast_batch=100, head_epochs=60, semi_epochs=2, iterations=10).run(c)
    dirty = poisoned.mark == 1
    # Half of all rows are trusted: at random half of the poisoned ones would be.
    assert int(outcome.keep.sum()) == 250 and float(outcome.keep[dirty].double().mean()) < 0.3
    net = load(outcome.model)
    assert measure_asr(samples.trained(*backdoor), test, c.ctx).value > 0.9
    assert measure_asr(net, test, c.ctx).value < 0.4
    clean = samples.sized(samples.digits()["test"], 8)
    assert float(right(net, clean, ctx=c.ctx).float().mean()) > 0.3, "chance is 0.1"
