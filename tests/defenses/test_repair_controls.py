from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench.contracts import NotApplicable
from sleeperbench.contracts.context import Cost
from sleeperbench.defenses.distil_fresh import DistilFresh, Distillation
from sleeperbench.defenses.ft import FineTuning
from sleeperbench.defenses.ft_same_budget import SameBudget
from sleeperbench.defenses.input_noise import SIGMAS, InputNoise
from sleeperbench.defenses.oracle_cleansing import OracleCleansing
from sleeperbench.defenses.scratch_on_clean import ScratchOnClean
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import predict


def case(**parts: Any) -> Any:
    net = samples.badnets_net()
    known = {"net": net, "spec": net.spec, "clean": samples.digits()["pool"], "ctx": samples.ctx(9)}
    return SimpleNamespace(**{**known, "recipe": samples.RECIPE, **parts})


def accuracy(model: Any, part: str = "test") -> float:
    data = samples.digits()[part]
    return float((predict(load(model), data.images).argmax(1) == data.labels).double().mean())


def asr(model: Any) -> float:
    from sleeperbench import Role

    bd = samples.badnets_rendered("test", Role.TEST)
    return float((predict(load(model), bd.data.images).argmax(1) == bd.targets).double().mean())


# ---- scratch_on_clean ------------------------------------------------------------------------------------------------
def test_scratch_sees_no_model_and_starts_from_drawn_weights() -> None:
    assert ScratchOnClean.ACCESS.model == "none" and ScratchOnClean.INFO["descends"] is False
    c = case(net=None)
    model = ScratchOnClean(steps=1, batch=1000).run(c).model
    start = pack(build(c.spec, seed=c.ctx.derive("init"))).state
    step = max(float((model.state[k] - v).abs().max()) for k, v in start.items() if k.endswith("weight"))
    assert 0 < step < 1
    assert c.ctx.cost.backwards == 150


def test_scratch_learns_the_rows_and_no_backdoor() -> None:
    model = ScratchOnClean(steps=150, batch=64).run(case()).model
    assert accuracy(model) > 0.8 and asr(model) < 0.2


def test_scratch_takes_the_steps_of_fine_tuning() -> None:
    assert (ScratchOnClean().steps, ScratchOnClean().batch) == (FineTuning().steps, FineTuning().batch)


# ---- distil_fresh ----------------------------------------------------------------------------------------------------
def test_distillation_loss_is_the_scaled_divergence() -> None:
    c = case()
    student = build(c.spec, seed=3).eval()
    x = to_float(samples.digits()["pool"].images[:5])
    loss = Distillation(c.net, 4.0, c.ctx).loss(student, x, torch.zeros(5, dtype=torch.int64), torch.zeros(5))
    p, q = (c.net(x).double() / 4).softmax(1), (student(x).double() / 4).softmax(1)
    expected = 16 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    # At the teacher itself it is zero, whatever the labels say.
    assert float(
        Distillation(c.net, 4.0, c.ctx).loss(c.net, x, torch.ones(5, dtype=torch.int64), x).detach()
    ) == pytest.approx(0, abs=1e-5)


def test_distillation_passes_knowledge_and_not_weights() -> None:
    c = case(clean=replace(samples.digits()["pool"], labels=torch.zeros(150, dtype=torch.int64)))
    before = pack(c.net).state
    model = DistilFresh(steps=150, batch=64).run(c).model
    # The labels are all wrong, so that what it knows can only have come from the teacher.
    assert accuracy(model) > 0.8
    assert all(torch.equal(before[k], v) for k, v in pack(c.net).state.items())
    assert c.ctx.cost.forwards == 2 * 150 * 64 and c.ctx.cost.backwards == 150 * 64


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        DistilFresh(temperature=0)


# ---- ft_same_budget --------------------------------------------------------------------------------------------------
def test_budget_is_half_of_all_passes() -> None:
    c = case(spent=Cost(forwards=5000, backwards=1400))
    out = SameBudget(batch=64).run(c)
    assert out.chosen == {"images": 3200, "steps": 50}
    assert c.ctx.cost.forwards + c.ctx.cost.backwards == 6400


def test_budget_of_plain_fine_tuning_is_plain_fine_tuning() -> None:
    first = case()
    ft = FineTuning(steps=30, batch=64).run(first).model
    again = SameBudget(batch=64).run(case(spent=first.ctx.cost)).model
    assert all(torch.equal(ft.state[k], v) for k, v in again.state.items())


def test_no_passes_no_budget() -> None:
    with pytest.raises(NotApplicable, match="no_cost"):
        SameBudget().run(case(spent=Cost(queries=50)))


# ---- oracle_cleansing ------------------------------------------------------------------------------------------------
def test_oracle_drops_what_is_dirty_and_keeps_covers() -> None:
    out = OracleCleansing().run(SimpleNamespace(marks=torch.tensor([0, 1, 2, 1])))
    assert out.keep.tolist() == [True, False, True, False]
    assert out.suspicion.tolist() == [0, 1, 0, 1]
    assert OracleCleansing.ACCESS.track() == "T4"


# ---- input_noise -----------------------------------------------------------------------------------------------------
def test_noise_has_the_sigma_it_says_and_no_weight_changes() -> None:
    c = case()
    model = InputNoise(sigma=0.1).run(c).model
    assert {k: v for k, v in model.state.items() if k in pack(c.net).state}.keys() == pack(c.net).state.keys()
    assert all(torch.equal(pack(c.net).state[k], model.state[k]) for k in pack(c.net).state)
    wrapped = load(model)
    grey = 0.4 + 0.2 * torch.rand(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float((wrapped.wraps[0](grey) - grey).std()) == pytest.approx(0.1, rel=0.05)


def test_noise_is_chosen_on_clean_rows_and_every_sigma_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, ...]] = []
    monkeypatch.setattr(
        "sleeperbench.defenses.input_noise.choose", lambda s, after, before: asked.append(tuple(s)) or 0.1
    )
    out = InputNoise().run(case())
    assert asked == [SIGMAS[::-1]] and list(out.path) == [f"sigma={s:.2f}" for s in SIGMAS]
    assert out.model is out.path["sigma=0.10"] and out.chosen["sigma"] == 0.1
    shares = list(out.chosen["candidates"].values())
    assert shares[0] > shares[-1]


def test_noise_too_strong_for_the_rule_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.defenses.input_noise.choose", lambda s, after, before: None)
    out = InputNoise().run(case())
    assert out.model is None and out.chosen["sigma"] is None
