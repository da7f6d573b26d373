from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses.seam import SEAM, Forgetting, Recovery, some
from sleeperbench.kit.classifier import load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, right
from sleeperbench.kit.tune import tune


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


def test_forgetting_labels_are_wrong_at_random_and_drawn_anew() -> None:
    rows = clean()
    hooks = Forgetting(rows, 0.2, samples.ctx())
    x, y = to_float(rows.images), rows.labels
    drawn = []
    for step in range(60):
        seen, labels, mark = hooks.batch(x, y, rows.ids, step)
        assert seen is x and labels.shape == mark.shape == y.shape
        drawn.append(labels)
    found = torch.stack(drawn)
    assert not bool((found == y).any())
    assert sorted(found.unique().tolist()) == list(range(10))
    assert int((found[0] != found[1]).sum()) > 300
    # Of 24,000 draws each of the nine other classes gets a ninth, to within five standard errors.
    further = torch.bincount(((found - y) % 10).flatten(), minlength=10) / found.numel()
    assert float((further[1:] - 1 / 9).abs().max()) < 5 * (1 / 9 * 8 / 9 / found.numel()) ** 0.5


def test_two_classes_are_swapped() -> None:
    rows = samples.images(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), [0, 1, 1, 0], 2)
    labels = Forgetting(rows, 0.6, samples.ctx()).batch(to_float(rows.images), rows.labels, rows.ids, 0)[1]
    assert labels.tolist() == [1, 0, 0, 1]


def test_the_bound_falls_with_the_classes_to_a_floor() -> None:
    bounds = {k: SEAM().bound(k) for k in (2, 3, 4, 5, 10, 43, 200)}
    assert bounds == {2: 0.6, 3: 0.6, 4: 0.5, 5: 0.4, 10: 0.2, 43: 0.2, 200: 0.2}


def test_each_phase_ends_at_its_bound() -> None:
    rows, net, ctx = clean(), samples.badnets_net(), samples.ctx()
    share = float(right(net, rows, ctx=ctx).double().mean())
    assert share > 0.9
    for hooks, stops in (
        (Forgetting(rows, share, ctx), False),
        (Forgetting(rows, share + 1e-6, ctx), True),
        (Recovery(rows, share, ctx), False),
        (Recovery(rows, share - 1e-6, ctx), True),
        (Recovery(rows, None, ctx), False),
    ):
        assert hooks.epoch_end(net, 4) is stops
        assert (hooks.epochs, hooks.accuracy) == (5, share)


def slow_adam(net: Any, batches: list[tuple[Tensor, Tensor]], lr: float) -> Any:
    """Adam written out, in train mode."""
    net.train()
    params = list(net.parameters())
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for t, (x, y) in enumerate(batches, 1):
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        with torch.no_grad():
            for p, m, v, g in zip(params, first, second, grads, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return net.eval()


def key(image: Tensor) -> tuple[float, ...]:
    """What tells an image from others."""
    return tuple(image.flatten().tolist())


def test_two_phases_equal_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    loss = Forgetting.loss

    def spy(self: Any, net: Any, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        seen.append((x.clone(), y.clone()))
        return loss(self, net, x, y, mark)

    monkeypatch.setattr(Forgetting, "loss", spy)
    monkeypatch.setattr(Recovery, "loss", spy)
    c = case(clean())
    model = SEAM(forgotten=0.0, forget_share=0.25, forget_steps=4, recover_steps=3, recovered=1.0).run(c).model
    monkeypatch.undo()
    assert len(seen) == 7
    known = dict(zip(map(key, to_float(c.clean.images)), c.clean.labels.tolist(), strict=True))
    true = [torch.tensor([known[key(image)] for image in x]) for x, _ in seen]
    # Phase 1: three batches of 32 of the 100 rows, then anew, under wrong labels; phase 2 under the right ones.
    assert all(bool((t != y).all()) for t, (_, y) in zip(true[:4], seen[:4], strict=True))
    assert all(torch.equal(t, y) for t, (_, y) in zip(true[4:], seen[4:], strict=True))
    assert len({key(image) for x, _ in seen[:4] for image in x}) <= 100
    # A fresh optimiser for phase 2, on what phase 1 left.
    net = slow_adam(slow_adam(copy.deepcopy(c.net), seen[:4], 1e-3), seen[4:], 1e-3)
    for name, tensor in net.state_dict().items():
        assert torch.allclose(model.state[name].double(), tensor.double(), atol=2e-4), name
    assert not torch.equal(model.state["body.stage1.1.running_mean"], pack(c.net).state["body.stage1.1.running_mean"])


def test_forgetting_ends_below_the_bound_and_recovery_above_its_own() -> None:
    c, test = case(clean()), samples.digits()["test"]
    outcome = SEAM(recovered=0.97).run(c)
    chosen = outcome.chosen
    assert chosen["forget_accuracy"] < 0.2 and 1 <= chosen["forget_epochs"] <= 80
    assert chosen["recover_accuracy"] > 0.97
    assert float(right(load(outcome.model), c.clean, ctx=samples.ctx()).double().mean()) == chosen["recover_accuracy"]
    assert float(right(load(outcome.model), test, ctx=c.ctx).double().mean()) > 0.9
    assert not outcome.path
    # Of 80 rows an epoch is two batches of 32, of 400 it is twelve; each is followed by a look.
    steps = chosen["forget_epochs"] * 64 + chosen["recover_epochs"] * 12 * 32
    looks = chosen["forget_epochs"] * 80 + chosen["recover_epochs"] * 400
    assert c.ctx.cost.backwards == steps
    assert c.ctx.cost.forwards == steps + looks + len(test)


def test_steps_are_a_ceiling() -> None:
    c = case(clean())
    chosen = SEAM(forgotten=0.0, forget_steps=3, recovered=1.0, recover_steps=2).run(c).chosen
    assert (chosen["forget_epochs"], chosen["recover_epochs"]) == (2, 1)
    assert c.ctx.cost.backwards == 5 * 32


def test_a_fifth_of_the_rows_is_forgotten_on() -> None:
    rows = clean()
    part = some(rows, 0.2, samples.ctx())
    assert len(part) == 80 and len(part.ids.unique()) == 80
    assert not torch.equal(part.ids.sort().values, some(rows, 0.2, samples.ctx(1)).ids.sort().values)
    assert torch.equal(part.ids, some(rows, 0.2, samples.ctx()).ids)
    assert len(some(rows.rows(torch.arange(2)), 0.2, samples.ctx())) == 1


def test_settings_are_those_of_the_toolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def tune(net: Any, data: Any, **args: Any) -> Any:
        seen.append({"data": data} | args)
        return pack(samples.badnets_net())

    monkeypatch.setattr("sleeperbench.defenses.seam.tune", tune)
    c = case(clean())
    SEAM(recovered=0.97).run(c)
    forget, recover = seen
    assert forget.pop("hooks").bound == 0.2 and recover.pop("hooks").bound == 0.97
    assert len(forget.pop("data")) == 80 and recover.pop("data") is c.clean
    assert len({forget.pop("ctx").seed, recover.pop("ctx").seed, c.ctx.seed}) == 3
    assert (forget.pop("steps"), recover.pop("steps")) == (160, 7900)
    assert forget == recover == {"lr": 1e-3, "batch": 32, "augment": False, "optimiser": "adam"}


def test_recovery_ends_where_rows_held_out_have_not_risen_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares by hand: the best is the third epoch's, met again in the sixth; five epochs after the third it ends."""
    shares = iter([0.5, 0.7, 0.8, 0.79, 0.75, 0.8, 0.7, 0.6, 0.9])
    held, net = clean(), copy.deepcopy(samples.badnets_net())
    monkeypatch.setattr("sleeperbench.defenses.seam.right", lambda n, rows, ctx: torch.tensor([next(shares)]))
    hooks = SEAM().recovery(held.rows(torch.arange(9)), held, samples.ctx())
    assert hooks.judged is held
    ends = []
    for epoch in range(8):
        with torch.no_grad():
            net.body.head.bias.fill_(epoch + 1)
        ends.append(hooks.epoch_end(net, epoch))
    assert ends == [False] * 7 + [True] and (hooks.at, hooks.epochs) == (3, 8)
    assert hooks.best == pytest.approx(0.8) and float(hooks.model.state["body.head.bias"][0]) == 3


def test_both_phases_leave_the_rows_held_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    c, seen = case(clean(), val=120), list[ImageSet]()

    def spy(net: Any, data: ImageSet, **args: Any) -> Any:
        seen.append(data)
        return tune(net, data, **args)

    monkeypatch.setattr("sleeperbench.defenses.seam.tune", spy)
    outcome = SEAM().run(c)
    assert len(seen[0]) == 56 and set(seen[0].ids.tolist()) <= set(c.tune.ids.tolist()) and seen[1] is c.tune
    chosen = outcome.chosen
    assert chosen["recover_epochs"] == chosen["epochs"] + 5 and chosen["rows"] == 120 and not outcome.path
    assert float(right(load(outcome.model), c.val, ctx=samples.ctx()).double().mean()) == chosen["accuracy_after"] > 0.9
    # Of 280 rows an epoch is eight batches: a run that ends with the best epoch has the same weights.
    short = SEAM(recover_steps=8 * chosen["epochs"]).run(case(clean(), val=120)).model
    assert all(torch.equal(outcome.model.state[k], v) for k, v in short.state.items())


def test_the_honest_choice_is_the_earliest_epoch_accepted() -> None:
    c = case(clean(), val=120)
    outcome = SEAM(patience=None, recover_steps=53).run(c)
    # 280 rows are eight batches of 32: 53 steps are six epochs and a part of the seventh.
    assert list(outcome.path) == [f"epochs={n}" for n in (7, 4, 2, 1)]
    before = right(c.net, c.val, ctx=c.ctx)
    ok = [
        int(n.partition("=")[2])
        for n, m in outcome.path.items()
        if accepts(before, right(load(m), c.val, ctx=samples.ctx()))
    ]
    assert outcome.chosen["epochs"] == min(ok, default=None)
    assert outcome.chosen["rows"] == 120
    if ok:
        assert outcome.model is outcome.path[f"epochs={min(ok)}"]
    last = outcome.path["epochs=7"]
    assert float(right(load(last), c.tune, ctx=samples.ctx()).double().mean()) == outcome.chosen["recover_accuracy"]


def test_nothing_accepted_leaves_the_model() -> None:
    outcome = SEAM(patience=None, recover_steps=1).run(case(clean(), val=120))
    assert outcome.model is None and outcome.chosen["epochs"] is None
    assert outcome.chosen["unchanged"] == "no epoch was accepted" and list(outcome.path) == ["epochs=1"]


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"recovered": 1.1}, {"patience": 0}, {"forgotten": -0.1}, {"forget_share": 0.0}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SEAM.from_params(bad)
