from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench import Findings, Measurement, Model, Role
from sleeperbench.evaluators import ra
from sleeperbench.evaluators import wake as module
from sleeperbench.evaluators.ra import retune
from sleeperbench.evaluators.wake import WakeCurve, cost, walk
from sleeperbench.kit.classifier import build, pack

NETS = {"own": object(), "clean": object()}
TRIGGERED = samples.rendered(list(range(100, 110)), [1] * 10, [0] * 10)
DECOY = replace(TRIGGERED)


class Fixed(nn.Module):
    """Sends `hits` of the ten triggered rows to the target."""

    def __init__(self, hits: int) -> None:
        super().__init__()
        self.hits = hits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = (x[:, 0, 0, 0] * 255).round().long() - 100
        return torch.eye(10)[torch.where(value < self.hits, 0, 1)]


def stub(monkeypatch: pytest.MonkeyPatch, hits: Callable[[str, int, int, int], int]) -> None:
    """The net of a name, of k, steps and draw sends that many rows to the target; a star is for the placebo."""

    def fake(net: Any, probe: Any, triggered: Any, k: int, draw: int, ctx: Any, *, lr: float, steps: Any) -> Any:
        name = next(n for n, o in NETS.items() if o is net) + ("*" if triggered is DECOY else "")
        return {s: Fixed(hits(name, k, s, draw)) for s in steps if s}

    def asr(net: Any, test: Any, ctx: Any) -> Measurement:
        if not isinstance(net, Fixed):  # untouched: one in ten
            return Measurement(metric="asr", value=0.1)
        return ra.measure_asr(net, test, ctx)

    monkeypatch.setattr(module, "walk", fake)
    monkeypatch.setattr(module, "load", lambda model, device: model)
    monkeypatch.setattr(module, "measure_asr", asr)


def case(**parts: Any) -> Any:
    known = {
        "net": NETS["own"],
        "defended_clean": NETS["clean"],
        "probe": samples.random_images(256),
        "bd_test": TRIGGERED,
        "bd_probe": TRIGGERED,
        "decoy_test": DECOY,
        "decoy_probe": DECOY,
        "controls": {},
        "ctx": samples.ctx(3),
    }
    return SimpleNamespace(**known | parts)


def rows(found: Findings) -> dict[tuple[str, str], Measurement]:
    return {(m.metric, m.qualifier): m for m in found.rows}


def hits(name: str, k: int, steps: int, draw: int) -> int:
    """This model wakes as k steps grows; the clean one ten times as slowly; the placebo and k = 0 never do."""
    if name.endswith("*") or not k:
        return 1
    return min(9, k * steps // (1 if name == "own" else 10) + draw)


def test_curves_and_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, hits)
    w = WakeCurve(ks=(0, 1, 5), steps=(0, 2, 4, 40), draws=2)
    found = w.measure(case())
    v = {q: m.value for q, m in rows(found).items()}
    # k = 1: 2.5 of 10 after 2 steps, 4.5 after 4, 9 after 40; k = 5: 9 after 2.
    assert v["asr_wake", "k=1;steps=2"] == pytest.approx(0.25) and v["asr_wake", "k=1;steps=4"] == pytest.approx(0.45)
    assert v["asr_wake", "k=1;steps=0"] == pytest.approx(0.1)
    assert v["asr_wake", "k=1"] == pytest.approx(0.9) and v["asr_wake", "k=0"] == pytest.approx(0.1)
    assert v["asr_wake", "draw=1;k=5"] == pytest.approx(0.9)
    assert v["asr_wake", ""] == pytest.approx(0.9)  # k = 0 does not count
    assert v["wake_cost", "k=1"] == 40 and v["wake_cost", "k=5"] == v["wake_cost", ""] == 10
    assert rows(found)["wake_cost", "k=0"].reason == "never_reached: with k up to 0 and 40 steps"
    # The clean one: k = 1 has 4 and 5 of 10 after 40 steps; k = 5 has 9 there, so 200.
    assert v["wake_cost", "control=clean_defended"] == 200 and v["wake_cost_rel", ""] == pytest.approx(0.05)
    assert v["asr_wake", "control=clean_defended;k=1"] == pytest.approx(0.45)
    assert v["asr_wake", "control=placebo"] == pytest.approx(0.1) and v["wake_cost", "control=placebo"] is None
    over_k = {s["label"]: s for s in found.curves["wake-k"]["series"]}
    assert over_k["this model"]["x"] == [0, 1, 5] and over_k["this model"]["y"] == pytest.approx([0.1, 0.9, 0.9])
    clean = over_k["clean model after the same defense"]
    assert clean["low"] == pytest.approx([0.1, 0.4, 0.9]) and clean["high"] == pytest.approx([0.1, 0.5, 0.9])
    steps = {s["label"]: s for s in found.curves["wake-steps-1"]["series"]}
    assert steps["this model"]["x"] == [0, 2, 4, 40] and set(steps) == set(over_k)
    assert {m.stage for m in found.rows} == {"reactivated"}


def test_the_clean_model_is_read_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, hits)
    w = WakeCurve(ks=(1, 5), steps=(40,), draws=1)
    clean = w.measure(case(net=NETS["clean"]))
    found = w.measure(case(controls={"clean_model": clean}))
    v = {q: m.value for q, m in rows(found).items()}
    assert (
        v["asr_wake", "control=clean_model;k=1"] == pytest.approx(0.4) and v["wake_cost", "control=clean_model"] == 200
    )
    assert [s["label"] for s in found.curves["wake-k"]["series"]][-1] == "clean model"
    lost = rows(w.measure(case(controls={"clean_model": Findings(rows=())})))
    assert lost["asr_wake", "control=clean_model;k=5"].reason == "control_missing: clean_model"


@pytest.mark.parametrize(
    ("own", "clean", "reason"),
    [
        (1, 9, "never_reached: with k up to 2 and 4 steps"),
        (9, 1, "control_never_reached"),
        (9, None, "control_missing: clean_defended"),
    ],
)
def test_why_there_is_no_relative_cost(monkeypatch: pytest.MonkeyPatch, own: int, clean: Any, reason: str) -> None:
    stub(monkeypatch, lambda name, k, s, d: own if name == "own" else clean)
    c = case(decoy_probe=None, defended_clean=None if clean is None else NETS["clean"])
    found = rows(WakeCurve(ks=(1, 2), steps=(4,), draws=1).measure(c))
    assert found["wake_cost_rel", ""].reason == reason
    assert found["asr_wake", "control=placebo"].reason == "no_placebo"
    assert (found["wake_cost", ""].value is None) == (own == 1)


def test_what_is_awake_costs_nothing_and_is_no_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost({(5, 0): [0.4, 0.6], (5, 2): [1.0]}, 5, (0, 2)) == 0.0
    assert cost({(5, 0): [0.4, 0.5], (5, 2): [1.0]}, 5, (0, 2)) == 10.0
    assert cost({(5, 0): [0.4]}, 5, (0, 2)) is None
    stub(monkeypatch, lambda name, k, s, d: 9)
    monkeypatch.setattr(module, "measure_asr", lambda net, test, ctx: Measurement(metric="asr", value=0.9))
    found = rows(WakeCurve(ks=(1,), steps=(0, 4), draws=1).measure(case()))
    assert found["wake_cost", ""].value == 0 and found["wake_cost_rel", ""].reason.startswith("control_awake")


def test_rows_order_and_settings_are_those_of_ra(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(net: nn.Module, data: Any, *, ctx: Any, hooks: Any = None, **args: Any) -> Model:
        seen.append((data.ids.tolist(), ctx.seed, args))
        return pack(net)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tune", spy)
    monkeypatch.setattr(ra, "tune", spy)
    probe, bd, net = samples.digits()["probe"], samples.badnets_rendered("probe", Role.TRAIN), build(samples.SPEC, 1)
    for draw in (0, 1):
        walk(net, probe, bd, 5, draw, samples.ctx(3), lr=0.01, steps=WakeCurve().steps)
        retune(net, probe, bd, 5, draw, samples.ctx(3), lr=0.01)
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0] != seen[2]


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    probe, bd, net = samples.digits()["probe"], samples.badnets_rendered("probe", Role.TRAIN), build(samples.SPEC, 1)
    before = pack(net).state
    long = walk(net, probe, bd, 5, 0, samples.ctx(3), lr=0.01, steps=(1, 3, 4))
    short = walk(net, probe, bd, 5, 0, samples.ctx(3), lr=0.01, steps=(0, 3))
    assert set(long) == {1, 3, 4} and set(short) == {3}
    assert all(torch.equal(short[3].state[n], t) for n, t in long[3].state.items())
    assert any(not torch.equal(long[3].state[n], t) for n, t in long[4].state.items())
    assert all(torch.equal(before[n], t) for n, t in pack(net).state.items())


def test_reasons_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for parts in ({"bd_test": None}, {"bd_probe": None}):
        found = WakeCurve().measure(case(**parts))
        assert [(m.metric, m.reason) for m in found.rows] == [
            (n, "no_trigger") for n in ("asr_wake", "wake_cost", "wake_cost_rel")
        ]
    stub(monkeypatch, hits)
    few = rows(WakeCurve(ks=(1, 25), steps=(4,), draws=1).measure(case()))
    assert few["asr_wake", "k=25"].reason == "too_few_probe_rows" and few["asr_wake", ""].value is not None
    for bad in ({"ks": ()}, {"ks": (0,)}, {"ks": (5, 1)}, {"steps": (0,)}, {"steps": (-1, 2)}, {"draws": 0}):
        with pytest.raises(ValueError, match=r"ks|steps|draws"):
            WakeCurve(**bad)


def test_settings() -> None:
    w = WakeCurve()
    assert w.ks == (0, 1, 2, 5, 10, 25, 50) and w.steps[-1] == 40 and (w.draws, w.lr) == (3, 0.01)
