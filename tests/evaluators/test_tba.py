from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Findings, Measurement
from sleeperbench.contracts import Rendered
from sleeperbench.evaluators.tba import TransferActivation, same, slope
from sleeperbench.kit.classifier import build


class Gate(nn.Module):
    """Class 1 where the 2x2 corner adds up to more than `limit`, else class 0."""

    limit: Tensor

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor(limit))

    def forward(self, x: Tensor) -> Tensor:
        over = 20 * (x[:, 0, :2, :2].sum((1, 2)) - self.limit)
        return torch.stack([-over, over], 1)


def gated(n: int, bright: int = 204) -> Rendered:
    """Dark images; the trigger lifts the four corner pixels to `bright`."""
    clean = samples.random_images(n, (1, 4, 4), 2)
    clean = replace(clean, images=clean.images // 2, labels=torch.zeros(n, dtype=torch.int64))
    bad = clean.images.clone()
    bad[:, :, :2, :2] = bright
    targets = torch.ones(n, dtype=torch.int64)
    return Rendered(data=replace(clean, images=bad), clean=clean, targets=targets, trigger_id=targets * 0)


def named(**nets: nn.Module) -> tuple[Any, ...]:
    return tuple(SimpleNamespace(name=n, net=m) for n, m in nets.items())


def case(net: Any, **parts: Any) -> Any:
    known = {"net": net, "bd_probe": gated(40), "bd_test": gated(30), "controls": {}, "ctx": samples.ctx(3)}
    return SimpleNamespace(**known | parts)


def values(found: Findings) -> dict[str, float | None]:
    return {m.qualifier: m.value for m in found.rows if m.metric == "asr_tba"}


def test_the_slope_is_that_of_the_sum_over_surrogates() -> None:
    nets: list[nn.Module] = [build(samples.SPEC, s).eval() for s in (1, 2)]
    gen = torch.Generator().manual_seed(0)
    x, t = torch.rand(5, 1, 16, 16, generator=gen) * 0.6 + 0.2, torch.tensor([0, 3, 1, 1, 2])
    d = torch.zeros(1, 1, 16, 16)
    up = slope(nets, x, t, d)
    for row, column in ((8, 8), (3, 11)):
        tilt = torch.zeros_like(d)
        tilt[0, 0, row, column] = 1e-2
        with torch.no_grad():
            rise = sum(float(F.cross_entropy(n(x + tilt), t) - F.cross_entropy(n(x - tilt), t)) for n in nets) / 2e-2
        assert float(up[0, 0, row, column]) == pytest.approx(rise, rel=0.05, abs=1e-5)
    assert torch.allclose(up, slope(nets[:1], x, t, d) + slope(nets[1:], x, t, d))


def test_it_starts_in_the_ball_stays_there_and_counts() -> None:
    ctx = samples.ctx(3)
    bd = gated(600)
    nets: list[nn.Module] = [Gate(3.3), Gate(3.4)]
    one = TransferActivation(steps=1, lr=1e-9).learn(nets, bd.data, bd.targets, samples.ctx(3))
    start = 0.05 * (2 * torch.rand(1, 1, 4, 4, generator=samples.ctx(3).generator("start")) - 1)
    assert torch.allclose(one, start, atol=1e-6)
    d = TransferActivation(steps=7, lr=9.0).learn(nets, bd.data, bd.targets, ctx)
    # 600 images are one batch of 500; the short one is dropped. Only the corner has a gradient.
    assert ctx.cost.forwards == ctx.cost.backwards == 7 * 500 * 2
    assert torch.allclose(d[0, 0, :2, :2], torch.tensor(0.05)) and torch.equal(d[0, 0, 2:], start[0, 0, 2:])


@pytest.mark.parametrize(("limit", "woken"), [(3.3, 1.0), (3.45, 0.0)])
def test_what_is_made_on_surrogates_wakes_a_model_of_the_same_kind(limit: float, woken: float) -> None:
    # Triggered corners add up to 3.2; the surrogates ask for 3.35, which is within reach of 0.2 more.
    was = Findings(rows=(Measurement(metric="asr_tba", value=0.1),))
    c = case(Gate(limit), peers=named(a=Gate(3.35), b=Gate(3.36)), controls={"clean_model": was})
    found = TransferActivation(peers=("a", "b"), steps=40).measure(c)
    v = values(found)
    # Two classes: what does not go to the target gets its true label.
    right = {m.qualifier: m.value for m in found.rows if m.metric == "r_acc_tba"}
    assert right == {q: 1 - a for q, a in v.items() if a is not None and q != "control=clean_model"}
    assert v[""] == v["source=a"] == v["source=b"] == woken
    assert v["control=guaa"] == 0 and v["control=clean_model"] == 0.1


def test_surrogates_that_know_nothing_wake_nothing() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0, 3, 3], 0 * x[:, 0, 3, 3]], 1)

    v = values(TransferActivation(surrogates=("a",), steps=20).measure(case(Gate(3.35), surrogates=named(a=Blind()))))
    assert v == {"": 0.0, "control=guaa": 0.0, "source=a": 0.0}


def test_the_model_itself_and_what_is_not_purified_are_no_surrogates() -> None:
    net = Gate(3.3)
    peers = named(itself=copy.deepcopy(net), awake=Gate(3.1), good=Gate(3.35))
    found = TransferActivation(peers=("itself", "awake", "good"), steps=5).measure(case(net, peers=peers))
    reasons = {m.qualifier: m.reason for m in found.rows if m.value is None}
    assert reasons["source=itself"].startswith("same_model") and reasons["source=awake"] == "not_purified"
    v = values(found)
    assert set(v) == {"", "control=guaa", "source=itself", "source=awake", "source=good"}
    assert v["source=good"] == v[""] is not None, "the one that is left makes the d of all"
    (row, *_) = TransferActivation(peers=("awake",)).measure(case(net, peers=peers[:2])).rows
    assert (row.value, row.reason.split(":")[0]) == (None, "no_surrogates")
    # An architecture stands for an attacked model, awake by its nature.
    assert (
        values(TransferActivation(surrogates=("x",), steps=5).measure(case(net, surrogates=peers[1:2])))[""] is not None
    )


def test_a_defended_surrogate_of_another_architecture_must_be_purified() -> None:
    nets = {"net": Gate(3.1), "ft@net": Gate(3.1), "nad@net": Gate(3.35), "ft@other": Gate(3.3)}
    t = TransferActivation(surrogates=tuple(nets), steps=5)
    found = t.measure(case(Gate(3.3), surrogates=named(**nets)))
    reasons = {m.qualifier: m.reason.partition(":")[0] for m in found.rows if m.value is None}
    assert reasons == {"source=ft@net": "not_purified", "source=ft@other": "same_model"}
    assert {m.qualifier for m in found.rows if m.value is not None} == {
        "",
        "control=guaa",
        "source=net",
        "source=nad@net",
    }


def test_the_same_model_is_the_same_tensors() -> None:
    net = build(samples.SPEC, 1)
    other = copy.deepcopy(net)
    assert same(net, other)
    with torch.no_grad():
        next(other.parameters()).flatten()[0].add_(1e-6)
    assert not same(net, other) and not same(net, Gate(1.0))


def test_reasons() -> None:
    for parts in ({"bd_test": None}, {"bd_probe": None}):
        rows = TransferActivation(peers=("a",)).measure(case(Gate(3.3), **parts)).rows
        assert [(m.metric, m.reason) for m in rows] == [(m, "no_trigger") for m in ("asr_tba", "r_acc_tba")]
    rows = TransferActivation().measure(case(Gate(3.3))).rows
    assert [m.reason for m in rows] == ["no_surrogates: the suite names none"] * 2
    ruined = build(samples.SPEC, 1)
    torch.nn.init.constant_(next(ruined.parameters()), torch.nan)
    assert TransferActivation(peers=("a",)).measure(case(ruined)).rows[0].reason.startswith("nan")
    with pytest.raises(FloatingPointError):
        TransferActivation(surrogates=("a",)).measure(case(Gate(3.3), surrogates=named(a=Gate(float("nan")))))
    with pytest.raises(ValueError, match="rho"):
        TransferActivation(rho=0.0)


def test_settings_are_the_published_ones() -> None:
    t = TransferActivation()
    # 100 passes over 5,000 images in 10 batches of 500.
    assert (t.rho, t.steps, t.lr) == (0.05, 100 * (5000 // 500), 0.05)
