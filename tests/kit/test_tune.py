from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.defense import Outcome
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.train import fit
from sleeperbench.kit.tune import tune

RECIPE = Recipe(pad=2, flip=True, precision="fp32", weight_decay=5e-4, momentum=0.5, batch=7, epochs=99)


def ctx(seed: int = 0) -> Ctx:
    return Ctx(seed=seed, recipe=RECIPE, scratch=Path("unused"))


def net() -> Any:
    return build(ModelSpec(arch="small_cnn", classes=4, shape=(1, 8, 8), norm=((0.4,), (0.3,))), seed=3)


def data(n: int = 40) -> ImageSet:
    gen = torch.Generator().manual_seed(2)
    return ImageSet(
        images=torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=gen),
        labels=torch.arange(n) % 4, ids=torch.arange(n), classes=("a", "b", "c", "d"), name="noise", split="train",
        digest="",
    )  # fmt: skip


class Log(TrainHooks):
    def __init__(self) -> None:
        super().__init__()
        self.lrs: list[float] = []
        self.options: dict[str, Any] = {}
        self.x: list[Tensor] = []
        self.ids: list[Tensor] = []

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        self.x.append(x)
        self.ids.append(ids)
        return super().batch(x, y, ids, step)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.options = dict(opt.param_groups[0])
        self.lrs.append(self.options["lr"])
        return super().step(net, opt, x, y, mark)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_net_and_the_global_generator_untouched(training: bool) -> None:
    given = net().train(training)
    given.body.head.eval()
    state, modes = copy.deepcopy(given.state_dict()), [m.training for m in given.modules()]
    strides = [p.stride() for p in given.parameters()]
    before = torch.get_rng_state()
    tuned = tune(given, data(), epochs=2, lr=0.1, ctx=ctx())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in given.state_dict().items())
    assert [m.training for m in given.modules()] == modes
    assert [p.stride() for p in given.parameters()] == strides
    assert all(p.grad is None for p in given.parameters())
    assert tuned.spec == given.spec
    moved = [k for k, v in tuned.state.items() if not torch.equal(v, state[k])]
    assert moved == list(state)  # every weight and every running statistic


def test_equals_fit_on_a_copy() -> None:
    by_hand = net()
    recipe = dataclasses.replace(
        RECIPE, epochs=3, lr=0.02, batch=128, momentum=0.9, weight_decay=0.0, schedule="constant"
    )
    fit(by_hand, data(), recipe, ctx())
    tuned = tune(net(), data(), epochs=3, lr=0.02, ctx=ctx())
    assert all(torch.equal(v, tuned.state[k]) for k, v in pack(by_hand).state.items())


def test_options_reach_the_optimiser() -> None:
    log = Log()
    tune(
        net(),
        data(),
        steps=4,
        lr=0.2,
        batch=16,
        momentum=0.7,
        weight_decay=0.01,
        schedule="cosine",
        ctx=ctx(),
        hooks=log,
    )
    assert log.lrs == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    assert (log.options["momentum"], log.options["weight_decay"]) == (0.7, 0.01)
    assert [len(x) for x in log.x] == [16] * 4
    assert len(torch.cat(log.ids[:2]).unique()) == 32


def test_fewer_rows_than_a_batch() -> None:
    log = Log()
    tune(net(), data(5), epochs=3, lr=0.01, ctx=ctx(), hooks=log)
    assert [len(x) for x in log.x] == [5, 5, 5]


@pytest.mark.parametrize("augment", [True, False])
def test_augments_as_the_recipe_says_or_not_at_all(augment: bool) -> None:
    log, rows = Log(), data()
    tune(net(), rows, steps=1, lr=0.01, ctx=ctx(), augment=augment, hooks=log)
    assert torch.equal(log.x[0], rows.images[log.ids[0]].float() / 255) != augment


def test_epochs_or_steps() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        tune(net(), data(), lr=0.1, ctx=ctx())
    with pytest.raises(ValueError, match="exactly one"):
        tune(net(), data(), lr=0.1, epochs=1, steps=1, ctx=ctx())


def test_counts_into_the_callers_ctx() -> None:
    c = ctx()
    tune(net(), data(), steps=3, lr=0.01, batch=16, ctx=c)
    assert (c.cost.forwards, c.cost.backwards) == (48, 48)


def test_the_outsiders_defense() -> None:
    """The call of the shortest defense in the documentation."""
    case = SimpleNamespace(net=net().eval(), tune=data(), ctx=ctx())
    self = SimpleNamespace(epochs=1, lr=0.001)
    outcome = Outcome(model=tune(case.net, case.tune, epochs=self.epochs, lr=self.lr, ctx=case.ctx))
    assert outcome.model is not None
    assert not torch.equal(outcome.model.state["body.head.weight"], case.net.body.head.weight)


class Watch(Log):
    """Keeps the running statistics and the modes of BatchNorm at every step."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.training = [m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        return super().loss(net, x, y, mark)


def test_running_statistics_stay_and_are_what_is_normalised_by() -> None:
    given, watch = net(), Watch()
    tuned = tune(given, data(), epochs=2, lr=0.1, ctx=ctx(), statistics="running", hooks=watch)
    assert watch.training and not any(watch.training)
    before = pack(given).state
    still = [k for k in before if "running" in k]
    assert still and all(torch.equal(before[k], tuned.state[k]) for k in still)
    moved = tune(given, data(), epochs=2, lr=0.1, ctx=ctx())
    assert not any(torch.equal(before[k], moved.state[k]) for k in still)


def test_adam_takes_its_own_steps_under_the_same_schedule() -> None:
    given, log = net(), Log()
    tuned = tune(given, data(), steps=1, lr=0.01, ctx=ctx(), optimiser="adam", hooks=log)
    assert log.options["betas"] == (0.9, 0.999) and log.lrs == [0.01]
    # The first step of Adam moves each weight by the learning rate, whatever its gradient's size.
    names = dict(given.named_parameters())
    step = torch.cat([(tuned.state[k] - v.detach()).flatten().abs() for k, v in names.items()])
    moved = step[step > 0]  # weights behind a ReLU that no row woke have no gradient
    assert float(moved.max()) <= 0.01 + 1e-6 and float((moved > 0.009).float().mean()) > 0.95


def test_an_unknown_optimiser_is_named() -> None:
    with pytest.raises(ValueError, match="lion"):
        tune(net(), data(), steps=1, lr=0.01, ctx=ctx(), optimiser="lion")  # type: ignore[arg-type]
