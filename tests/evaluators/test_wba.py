from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench import Findings, Measurement, Role
from sleeperbench.contracts import Rendered
from sleeperbench.evaluators.wba import Shifted, WhiteBoxActivation, objective
from sleeperbench.kit.classifier import Classifier, build


def case(net: Any, control: bool = True, **parts: Any) -> Any:
    found = Findings(rows=tuple(Measurement(metric=m, value=v) for m, v in (("asr_wba", 0.2), ("asr_guaa", 0.1))))
    known = {
        "net": net,
        "bd_probe": samples.badnets_rendered("probe", Role.TRAIN),
        "bd_test": samples.badnets_rendered("test", Role.TEST),
        "controls": {"clean_model": found} if control else {},
        "ctx": samples.ctx(3),
    }
    return SimpleNamespace(**known | parts)


def headlines(found: Findings) -> dict[tuple[str, str], float | None]:
    return {(m.metric, m.qualifier): m.value for m in found.rows}


class Gate(nn.Module):
    """Class 1 where the 2x2 corner adds up to more than `limit`, else class 0."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        over = 20 * (x[:, 0, :2, :2].sum((1, 2)) - self.limit)
        return torch.stack([-over, over], 1)


def gated(n: int) -> Rendered:
    """Dark images; the trigger lifts the four corner pixels to 0.8."""
    clean = samples.random_images(n, (1, 4, 4), 2)
    clean = replace(clean, images=clean.images // 2, labels=torch.zeros(n, dtype=torch.int64))
    bad = clean.images.clone()
    bad[:, :, :2, :2] = 204
    targets = torch.ones(n, dtype=torch.int64)
    return Rendered(data=replace(clean, images=bad), clean=clean, targets=targets, trigger_id=targets * 0)


def test_the_objective_is_the_codes() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for row, t in zip(logits.tolist(), targets.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in row) for v in row]
        rival = max(v for j, v in enumerate(p) if j != t)
        total += -math.log(p[t]) - math.log(1.0001 - rival + 1e-12)
    assert float(objective(logits, targets)) == pytest.approx(total / 5, rel=1e-9)


def test_the_strongest_rival_is_pushed_down_even_where_it_is_certain() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]])
    value = objective(logits, torch.tensor([1]))
    # p_j = 1: the second term is -log(1e-4), finite.
    assert float(value) == pytest.approx(60 - math.log(1e-4), rel=1e-3)


def test_a_step_is_plain_gradient_descent_in_the_ball() -> None:
    net: Classifier = build(samples.SPEC, 4)
    net.eval()
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    t = torch.zeros(6, dtype=torch.int64)
    d = torch.zeros(1, 1, 16, 16)
    moved = WhiteBoxActivation(lr=0.05)._step(net, x, t, d)
    assert 0 < float(moved.abs().max()) < 0.05  # nothing is clamped, so what was taken is lr times the gradient
    for row, column in ((8, 8), (3, 11)):
        tilt = torch.zeros_like(d)
        tilt[0, 0, row, column] = 1e-2
        with torch.no_grad():
            rise = (objective(net(x + tilt), t) - objective(net(x - tilt), t)) / 2e-2
        assert float(moved[0, 0, row, column]) == pytest.approx(-0.05 * float(rise), rel=0.05, abs=2e-6)
    far = WhiteBoxActivation(lr=1e4)._step(net, x, t, d)
    assert float(far.abs().max()) == pytest.approx(0.05)


def test_it_stays_in_its_ball_and_keeps_the_published_count_of_passes() -> None:
    ctx = samples.ctx(3)
    bd = samples.badnets_rendered("probe", Role.TRAIN)
    found = WhiteBoxActivation(steps=23, rho=0.03, lr=5.0).learn(build(samples.SPEC, 4), bd.data, bd.targets, ctx)
    assert [tuple(d.shape) for d in found] == [(1, 1, 16, 16)] * 2
    assert all(float(d.abs().max()) <= 0.03 for d in found) and not torch.equal(found[0], found[1])
    # U(-rho, rho): about half of each sign, and close to the bound somewhere.
    assert 0.3 < float((found[0] > 0).double().mean()) < 0.7 and float(found[0].abs().max()) > 0.028
    # Each pass over the 220-odd images has one batch of 128: the short one is dropped.
    assert 128 <= len(bd) < 256 and ctx.cost.backwards == ctx.cost.forwards == 23 * 128


def test_the_images_are_clipped() -> None:
    seen: list[torch.Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)[:, :2]

    Shifted(Watch(), torch.full((1, 1, 2, 2), 0.05))(torch.tensor([0.0, 0.5, 0.97, 1.0]).view(1, 1, 2, 2))
    assert torch.allclose(seen[0].flatten(), torch.tensor([0.05, 0.55, 1.0, 1.0]))


@pytest.mark.parametrize(("limit", "woken"), [(3.1, 1.0), (3.35, 1.0), (3.45, 0.0)])
def test_it_wakes_what_lies_within_its_reach(limit: float, woken: float) -> None:
    # Triggered corners add up to 3.2 and can gain 4 rho = 0.2; untriggered ones to 2 at most.
    c = case(Gate(limit), bd_probe=gated(40), bd_test=gated(30))
    found = WhiteBoxActivation(steps=40).measure(c)
    values = headlines(found)
    assert values["asr_wba", ""] == woken and values["asr_guaa", ""] == 0
    assert values["asr_wba", "control=clean_model"] == 0.2 and values["asr_guaa", "control=clean_model"] == 0.1
    series = {s["label"]: s for s in found.curves["wba"]["series"]}
    assert series["triggered, to the target"]["x"] == [0, 40]
    assert series["triggered, to the target"]["y"] == [float(limit < 3.2), woken]
    assert series["triggered, to the true class"]["y"][1] == 1 - woken
    assert {m.stage for m in found.rows} == {"reactivated"}


def test_the_control_wakes_where_no_trigger_is_needed() -> None:
    c = case(Gate(0.1), False, bd_probe=gated(40), bd_test=gated(30))
    values = headlines(WhiteBoxActivation(steps=40).measure(c))
    assert (values["asr_wba", ""], values["asr_guaa", ""]) == (1.0, 1.0)
    # Every image goes to the target, which is nobody's own class.
    assert (values["r_acc_wba", ""], values["r_acc_guaa", ""]) == (0.0, 0.0)


def test_what_moved_is_told_from_what_stood_still() -> None:
    net = build(samples.SPEC, 1)
    c = case(net, bd_probe=gated(20), bd_test=gated(10))
    still, moved = (headlines(WhiteBoxActivation(steps=3, lr=lr).measure(c))["wba_moved", ""] for lr in (1e-9, 5.0))
    assert still < 1e-6 < 0.01 < moved
    attack = WhiteBoxActivation(steps=3, lr=5.0)
    start, *_, end = attack.learn(c.net, c.bd_probe.data, c.bd_probe.targets, c.ctx)
    assert moved == pytest.approx(float((end - start).abs().mean()) / attack.rho)


def test_every_target_is_the_triggers_own() -> None:
    bd = gated(30)
    bd = replace(bd, targets=torch.zeros_like(bd.targets), data=replace(bd.data, labels=bd.targets))
    # Towards class 0, which holds below 3.1: corners of 3.2 have to fall by 0.1.
    values = headlines(WhiteBoxActivation(steps=40).measure(case(Gate(3.1), False, bd_probe=bd, bd_test=bd)))
    assert values["asr_wba", ""] == 1.0


def test_the_control_sees_no_trigger_and_is_else_the_same_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    learn = WhiteBoxActivation.learn

    def watched(self: Any, net: Any, images: Any, targets: Any, ctx: Any) -> list[torch.Tensor]:
        found = learn(self, net, images, targets, ctx)
        seen.append((images, found[0]))
        return found

    monkeypatch.setattr(WhiteBoxActivation, "learn", watched)
    c = case(Gate(3.3), bd_probe=gated(20), bd_test=gated(10))
    rows = WhiteBoxActivation(steps=5).measure(c).rows
    (wba, start), (guaa, same) = seen
    assert torch.equal(start, same) and torch.equal(wba.ids, guaa.ids)
    assert wba is c.bd_probe.data and guaa is c.bd_probe.clean
    assert {m.total for m in rows if not m.qualifier and m.metric != "wba_moved"} == {len(c.bd_test)}


def test_reasons() -> None:
    for parts in ({"bd_test": None}, {"bd_probe": None}):
        rows = WhiteBoxActivation().measure(case(build(samples.SPEC, 4), **parts)).rows
        assert [(m.metric, m.value, m.reason) for m in rows] == [
            (m.name, None, "no_trigger") for m in WhiteBoxActivation.METRICS
        ]
    bare = case(Gate(3.3), bd_probe=gated(9), bd_test=gated(9), controls={"clean_model": Findings(rows=())})
    rows = WhiteBoxActivation(steps=1).measure(bare).rows
    assert [m.reason for m in rows if m.qualifier] == ["control_missing: clean_model"] * 2
    ruined = build(samples.SPEC, 1)
    with torch.no_grad():
        next(ruined.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        WhiteBoxActivation(steps=1).measure(case(ruined))


def test_settings_are_the_published_ones() -> None:
    w = WhiteBoxActivation()
    # 50 passes over 1,000 images in 7 full batches of 128, 5 steps on each.
    assert (w.rho, w.steps, w.inner, w.lr) == (0.05, 50 * (1000 // 128) * 5, 5, 0.05)
    with pytest.raises(ValueError, match="rho"):
        WhiteBoxActivation(rho=0.0)
