from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import ModelSpec
from sleeperbench.defenses import nab
from sleeperbench.defenses.nab import NAB, Flood, Stamped, colour, relabelled, stamped
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import build, load
from sleeperbench.kit.select import right

SPEC = ModelSpec(
    arch="small_cnn",
    classes=10,
    shape=(3, 16, 16),
    norm=((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)),
    args={"width": 4},
)


def case(n: int = 200) -> Any:
    train = samples.digits()["train"].rows(torch.arange(n))
    return SimpleNamespace(spec=samples.SPEC, train=train, recipe=samples.RECIPE, ctx=samples.ctx(3))


def test_pseudo_labels_equal_a_loop() -> None:
    gen = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=gen), torch.randint(5, (60,), generator=gen)
    labels[labels == 3] = 2  # class 3 has no row
    loss = torch.rand(60, generator=gen)
    loss[labels == 4] = 0.0  # all of class 4 are left out
    order = loss.argsort(stable=True)
    suspected, left_out = torch.zeros(60, dtype=torch.bool), torch.zeros(60, dtype=torch.bool)
    suspected[order[:9]], left_out[order[:20]] = True, True
    assert bool(left_out[labels == 4].all())
    centres = {k: features[(labels == k) & ~left_out].mean(0) for k in (0, 1, 2)}
    found = relabelled(features, labels, suspected, left_out, 5)
    changed = 0
    for i in range(60):
        nearest = min(centres, key=lambda k: float((features[i] - centres[k]).norm()))
        assert int(found[i]) == (nearest if bool(suspected[i]) else int(labels[i]))
        changed += int(found[i]) != int(labels[i])
    assert changed > 3
    everything = torch.ones(60, dtype=torch.bool)
    assert torch.equal(relabelled(features, labels, suspected, everything, 5), labels)


def test_the_stamp_is_on_changed_rows_alone() -> None:
    ids = torch.tensor([7, 3, 5, 0])
    hooks = Stamped(ids, torch.tensor([True, False, True, False]), 2, SPEC, samples.ctx())
    x = torch.rand(4, 3, 16, 16)
    kept, y = x.clone(), torch.arange(4)
    seen, same, _ = hooks.batch(x, y, ids[[1, 2, 3, 0]], 0)
    assert torch.equal(x, kept) and torch.equal(same, y)
    wanted = x.clone()
    for row in (1, 3):
        for c, value in enumerate((0.4, 0.5, 0.6)):
            wanted[row, c, :2, :2] = value
    assert torch.equal(seen, wanted)


def test_the_finished_model_stamps_every_input() -> None:
    net = build(SPEC, 0).eval()
    whole = load(stamped(net, 2))
    x = torch.rand(5, 3, 16, 16)
    other = x.clone()
    other[:, :, :2, :2] = colour(SPEC)
    assert torch.allclose(whole(x), net(other), atol=1e-6) and not torch.allclose(whole(x), net(x), atol=1e-6)
    seen: list[Tensor] = []
    whole.body.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    whole(x)
    assert float(seen[0][:, :, :2, :2].abs().max()) < 1e-6, "0 after normalisation"
    assert colour(samples.SPEC).shape == (1, 1, 1)


@pytest.mark.parametrize(("gamma", "sign"), [(0.2, 1), (5.0, -1)])
def test_flooding_turns_around_at_gamma(gamma: float, sign: int) -> None:
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2] * 2)
    loss, ce = Flood(gamma).loss(net, x, y, y), F.cross_entropy(net(x), y)
    assert float(loss.detach()) == pytest.approx(abs(float(ce.detach()) - gamma) + gamma, rel=1e-5)
    (up,), (plain,) = (torch.autograd.grad(v, net[1].weight) for v in (loss, ce))
    assert torch.allclose(up, sign * plain)


def test_stages_have_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    first: dict[str, Any] = {}

    def learn(net: Any, data: Any, recipe: Any, ctx: Any, **args: Any) -> Any:
        first.update(args, recipe=recipe)
        return net

    monkeypatch.setattr(nab, "pretrain", learn)
    monkeypatch.setattr(
        nab, "fit", lambda net, data, recipe, ctx, hooks: seen.append((net, data, recipe, ctx.seed, hooks))
    )
    c = case()
    loss = torch.rand(200, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(nab, "predict", lambda net, images, ctx: torch.eye(10)[c.train.labels] * 3)
    outcome = NAB().run(c)
    (_, data, r, one, flood), (_, relabelled_data, s, two, hooks) = seen
    assert data is c.train and isinstance(flood, Flood) and flood.gamma == 0.5
    assert (r.epochs, r.lr, r.batch, r.weight_decay, r.schedule, r.pad) == (20, 0.1, 64, 1e-4, "constant", 0)
    assert (s.epochs, s.lr, s.batch, s.weight_decay, s.schedule) == (100, 0.1, 64, 1e-4, "cosine")
    assert s.pad == samples.RECIPE.pad and isinstance(hooks, Stamped) and hooks.side == 2 and one != two
    assert torch.equal(relabelled_data.labels, outcome.relabel)
    r = first["recipe"]
    assert (r.epochs, r.lr, r.batch, r.momentum, r.weight_decay, r.schedule) == (100, 0.4, 512, 0.9, 1e-4, "cosine")
    assert (first["temperature"], first["blur"]) == (0.5, True)
    assert outcome.chosen == {"suspected": 10, "relabelled": 0}, "centres agree with the labels here"

    # A row that lies with another class gets its label, and only if it is among the suspected.
    seen.clear()
    features = torch.eye(10)[c.train.labels] * 3
    ranked = loss.argsort()
    features[ranked[0]], features[ranked[100]] = features[ranked[150]].clone(), features[ranked[150]].clone()
    c.train.labels[ranked[0]] = (c.train.labels[ranked[150]] + 1) % 10
    monkeypatch.setattr(nab, "predict", lambda net, images, ctx: features)
    monkeypatch.setattr(NAB, "losses", lambda self, case: loss)
    outcome = NAB().run(c)
    assert outcome.relabel[ranked[0]] == c.train.labels[ranked[150]]
    assert outcome.relabel[ranked[100]] == c.train.labels[ranked[100]]
    assert outcome.chosen["relabelled"] == 1 and int(seen[0][4].table.sum()) == 1
    assert torch.equal(outcome.suspicion, -loss)


def test_it_runs_alike_twice() -> None:
    state = torch.random.get_rng_state()
    method = NAB(isolation_epochs=1, contrast_epochs=1, epochs=1)
    a, b = method.run(case()), method.run(case())
    assert all(torch.equal(b.model.state[k], v) for k, v in a.model.state.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.relabel, b.relabel) and a.model.spec.wraps[-1].kind == "stamp"


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"isolate": 0.0}, {"excluded": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NAB(**bad)
    with pytest.raises(ValueError, match="side"):
        NAB(side=20).check((3, 16, 16), 10)


def test_a_stamp_covers_the_backdoor_that_plain_training_learns() -> None:
    backdoor = (BadNets(), 1000, 0.1, 8)
    poisoned, test = samples.planted(*backdoor)
    c = SimpleNamespace(spec=samples.wide(8, 8), train=poisoned.data, recipe=samples.RECIPE, ctx=samples.ctx(3))
    # As BackdoorBench isolates: as many rows as there are poisoned ones.
    outcome = NAB(isolate=0.1, isolation_epochs=10, contrast_epochs=8, epochs=12).run(c)
    changed, dirty = outcome.relabel != poisoned.data.labels, poisoned.mark == 1
    assert int((changed & dirty).sum()) > 30 > 3 * int((changed & ~dirty).sum())
    net, bare = load(outcome.model), load(outcome.model)
    bare.wraps[-1].mask.zero_()
    plain = samples.trained(*backdoor)
    asr = [measure_asr(n, test, c.ctx).value for n in (plain, bare, net)]
    assert asr[0] > 0.9 and asr[2] < 0.4 and asr[2] < 0.7 * asr[1]
    clean = samples.sized(samples.digits()["test"], 8)
    assert float(right(net, clean, ctx=c.ctx).float().mean()) > 0.7
