from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench import Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.defenses.abl import AntiBackdoorLearning, LocalAscent, Unlearn, losses
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import load


def poisoned() -> Any:
    train = samples.digits()["train"]
    return BadNets().poison(train, samples.badnets(), torch.ones(len(train), dtype=torch.bool), 0.1, samples.ctx(5))


def case(train: Any) -> Any:
    return SimpleNamespace(train=train, spec=samples.SPEC, recipe=samples.RECIPE, ctx=samples.ctx(3))


class Plane(nn.Module):
    """A linear classifier of the pixels, in double precision."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


def slope(net: Plane, x: torch.Tensor, y: torch.Tensor, at: tuple[int, int], step: float = 1e-6) -> float:
    """Central difference of the batch's mean cross-entropy."""
    values = []
    for sign in (1, -1):
        moved = net.weight.detach().clone()
        moved[at] += sign * step
        p = (x.flatten(1) @ moved).softmax(1)
        values.append(float(-p[torch.arange(len(y)), y].log().mean()))
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(("gamma", "sign"), [(0.5, 1), (1.4, -1)])
def test_local_ascent_follows_the_slope_above_gamma_and_climbs_below(gamma: float, sign: int) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 2, 2, generator=gen, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    net = Plane(torch.randn(4, 3, generator=gen, dtype=torch.float64))
    ce = float(nn.functional.cross_entropy(net(x), y).detach())
    assert 0.5 < ce < 1.4
    loss = LocalAscent(gamma).loss(net, x, y, torch.zeros_like(y))
    assert float(loss.detach()) == pytest.approx(sign * ce)
    loss.backward()
    for at in ((0, 0), (1, 2), (3, 1)):
        assert float(net.weight.grad[at]) == pytest.approx(sign * slope(net, x, y, at), abs=1e-7)


def test_unlearning_climbs_and_stops_below_chance() -> None:
    gen = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 1, 2, 2, generator=gen, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    net = Plane(torch.randn(4, 3, generator=gen, dtype=torch.float64))
    rows = samples.answering([1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0], [0] * 11)  # 2 of 11 right, chance is 1.1
    c = samples.ctx()
    Unlearn(rows, 10, c).loss(net, x, y, y).backward()
    assert float(net.weight.grad[1, 2]) == pytest.approx(-slope(net, x, y, (1, 2)), abs=1e-7)
    assert Unlearn(rows, 10, c).accuracy(samples.ReadsPixel()) == pytest.approx(2 / 11)
    assert not Unlearn(rows, 10, c).epoch_end(samples.ReadsPixel(), 0)
    assert Unlearn(rows.rows(torch.arange(10)), 11, c).accuracy(samples.ReadsPixel()) == 0.1
    assert not Unlearn(rows.rows(torch.arange(10)), 10, c).epoch_end(samples.ReadsPixel(), 0)  # at chance goes on
    assert Unlearn(rows.rows(torch.arange(9)), 10, c).epoch_end(samples.ReadsPixel(), 0)


def test_losses_are_per_row_and_tell_the_smallest_apart() -> None:
    net, data = samples.clean_net(), samples.digits()["test"].rows(torch.arange(20))
    c = samples.ctx()
    found = losses(net, data, c)
    for i in range(20):
        logits = net(data.images[i : i + 1].float() / 255)[0].detach().double()
        wanted = torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[data.labels[i]]
        assert float(found[i]) == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)
    assert c.cost.forwards == 20

    class Sure(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 0, 0, 0] * 30, torch.zeros(len(x))], dim=1)

    pixels = torch.full((3, 1, 4, 4), 255, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor([200, 255, 230])
    assert losses(Sure(), samples.images(pixels, [0, 0, 0], 2), c).argsort().tolist() == [1, 2, 0]


def test_backdoored_digits_are_isolated_and_unlearnt() -> None:
    p = poisoned()
    c = case(p.data)
    state = torch.random.get_rng_state()
    outcome = AntiBackdoorLearning(isolation_epochs=10, tuning_epochs=6).run(c)
    isolated = ~outcome.keep
    assert int(isolated.sum()) == outcome.chosen["isolated"] == 10  # 1 % of 1,000
    assert int((isolated & (p.mark == 1)).sum()) >= 6  # one at random
    assert float(outcome.suspicion[isolated].min()) >= float(outcome.suspicion[~isolated].max())
    net = load(outcome.model)
    test, bd_test = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST)
    assert measure_asr(net, bd_test, c.ctx).value < 0.1
    assert float((answers(net, test.images, c.ctx) == test.labels).float().mean()) > 0.7
    labels = p.data.labels
    right = answers(net, p.data.images, c.ctx) == labels
    assert outcome.chosen["isolated_accuracy"] == pytest.approx(float(right[isolated].double().mean()))
    assert outcome.chosen["kept_accuracy"] == pytest.approx(float(right[~isolated].double().mean()))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_stages_have_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(net: Any, data: Any, recipe: Any, ctx: Any, hooks: Any = None) -> Any:
        seen.append((data, recipe, ctx.seed, hooks))
        return SimpleNamespace(losses=[0.0] * 3)

    monkeypatch.setattr("sleeperbench.defenses.abl.fit", fake)
    monkeypatch.setattr(Unlearn, "accuracy", lambda self, net: 0.5)
    train = samples.digits()["train"].rows(torch.arange(200))
    outcome = AntiBackdoorLearning().run(case(train))
    (all_rows, first, seed1, lga), (rest, second, seed2, none), (few, third, seed3, ascent) = seen
    assert all_rows is train
    assert (len(rest), len(few)) == (198, 2)
    assert sorted([*rest.ids.tolist(), *few.ids.tolist()]) == train.ids.tolist()
    assert torch.equal(few.ids, train.ids[~outcome.keep])
    assert (first.epochs, first.lr, first.schedule, first.pad, first.flip) == (20, 0.1, "constant", 0, False)
    assert (second.epochs, second.lr, second.schedule, second.pad) == (60, 0.1, "cosine", samples.RECIPE.pad)
    assert (third.epochs, third.lr, third.schedule, third.pad) == (20, 5e-4, "constant", 0)
    assert all(r.weight_decay == 1e-4 and r.batch == samples.RECIPE.batch for r in (first, second, third))
    assert isinstance(lga, LocalAscent) and lga.gamma == 0.5
    assert none is None
    assert isinstance(ascent, Unlearn) and ascent.suspects is few and ascent.classes == 10
    assert len({seed1, seed2, seed3}) == 3
    assert outcome.chosen["unlearning_epochs"] == 3

    seen.clear()
    monkeypatch.setattr(Unlearn, "accuracy", lambda self, net: 0.05)
    outcome = AntiBackdoorLearning().run(case(train))
    assert len(seen) == 2  # nothing left to unlearn
    assert outcome.chosen["unlearning_epochs"] == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_isolate_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="isolate is"):
        AntiBackdoorLearning(isolate=share)
