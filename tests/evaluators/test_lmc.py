from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench import Role, Wrap
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.evaluators.lmc import LinearConnectivity, between, figures
from sleeperbench.kit.classifier import load, pack


def case(net: Any, **parts: Any) -> Any:
    known = {
        "net": net,
        "attacked": samples.badnets_net(),
        "test": samples.digits()["test"],
        "probe": samples.digits()["probe"],
        "bd_test": samples.badnets_rendered("test", Role.TEST),
        "peers": (SimpleNamespace(name="exact_purification", net=samples.clean_net(2)),),
        "ctx": samples.ctx(),
    }
    return SimpleNamespace(**known | parts)


def test_both_ends_are_the_models_themselves_buffers_included() -> None:
    a, b = pack(samples.badnets_net()), pack(samples.clean_net())
    for t, end in ((0.0, a), (1.0, b)):
        state = between(a, b, t).state
        assert all(torch.equal(state[k], v) for k, v in end.state.items() if v.is_floating_point())
    half = between(a, b, 0.5).state
    moved = [k for k in half if "running_var" in k]
    assert moved
    assert all(torch.allclose(half[k], (a.state[k] + b.state[k]) / 2) for k in [*moved, "body.head.weight"])
    counters = [k for k, v in b.state.items() if not v.is_floating_point()]
    assert counters and all(torch.equal(half[k], b.state[k]) for k in counters)


def test_scalars_in_closed_form() -> None:
    values = {m.metric: m.value for m in figures([1.0, 0.9, 0.3, 0.1, 0.25], [0.1, 0.5, 0.2, 0.1, 0.2], "")}
    assert values["lmc_bd_auc"] == pytest.approx(0.51)
    assert values["lmc_t20"] == 1.0  # it wakes again at the end
    assert values["lmc_barrier_clean"] == pytest.approx(0.35)
    assert values["lmc_barrier_bd"] == pytest.approx(0.9 - (0 + 0.75) / 2)
    quiet = {m.metric: m.value for m in figures([0.2, 0.1], [0.1, 0.1], "")}
    assert quiet["lmc_t20"] == 0 and quiet["lmc_barrier_clean"] == 0
    assert quiet["lmc_barrier_bd"] == pytest.approx(0.05)


def test_the_ends_of_the_curve_are_what_accuracy_says() -> None:
    c = case(samples.clean_net())
    found = LinearConnectivity(points=3).measure(c)
    asr, error = (s["y"] for s in found.curves["lmc"]["series"])
    for i, net in ((0, c.attacked), (2, c.net)):
        hit = answers(net, c.bd_test.data.images, c.ctx) == c.bd_test.targets
        assert asr[i] == pytest.approx(float(hit.double().mean()), abs=1e-6)
        right = answers(net, c.test.images, c.ctx) == c.test.labels
        assert error[i] == pytest.approx(1 - float(right.double().mean()), abs=1e-6)
    assert asr[0] > 0.9 and asr[2] < 0.1
    # Two independent networks: what lies between them classifies worse than both.
    (barrier,) = [m.value for m in found.rows if m.metric == "lmc_barrier_clean" and not m.qualifier]
    assert barrier > 0.1


def told(c: Any, net: Any) -> tuple[Any, Any]:
    """ASR and clean error of a model by itself."""
    hit = answers(net, c.bd_test.data.images, c.ctx) == c.bd_test.targets
    wrong = answers(net, c.test.images, c.ctx) != c.test.labels
    return tuple(pytest.approx(float(v.double().mean()), abs=1e-6) for v in (hit, wrong))


def test_the_way_from_exact_purification_runs_from_its_model_to_this_one() -> None:
    c = case(samples.badnets_net(), attacked=samples.clean_net())  # three models, no two alike
    curves = LinearConnectivity(points=3).measure(c).curves
    asr, error = (s["y"] for s in curves["lmc_exact_purification"]["series"])
    assert (asr[0], error[0]) == told(c, c.peers[0].net)
    assert (asr[2], error[2]) == told(c, c.net)
    assert asr[0] < 0.1 and asr[2] > 0.9
    firsts = {name: [s["y"][0] for s in curves[name]["series"]] for name in ("lmc", "lmc_exact_purification")}
    assert firsts["lmc"] != firsts["lmc_exact_purification"]


def test_the_ends_are_re_estimated_on_the_probe_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.evaluators.lmc.REFRESH_ROWS", 40)
    probe = samples.digits()["probe"]
    # Images of other brightness from row to row: other rows, or none, would give other answers.
    dimmed = (probe.images.float() * torch.linspace(0, 1, len(probe))[:, None, None, None]).to(torch.uint8)
    c = case(samples.badnets_net(), attacked=samples.clean_net(), probe=replace(probe, images=dimmed))
    rows = torch.linspace(0, len(probe) - 1, 40).round().long()

    @torch.no_grad()
    def afresh(net: Any) -> Any:
        fresh = copy.deepcopy(net).eval()
        for layer in (m for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)):
            layer.reset_running_stats()
            layer.momentum = None  # torch's cumulative average
            layer.train()
        fresh(dimmed[rows].float() / 255)
        return fresh.eval()

    curves = LinearConnectivity(points=2).measure(c).curves
    for name, start in (("lmc_bn", c.attacked), ("lmc_exact_purification_bn", c.peers[0].net)):
        asr, error = (s["y"] for s in curves[name]["series"])
        for at, net in ((0, start), (1, c.net)):
            assert (asr[at], error[at]) == told(c, afresh(net))
            assert (asr[at], error[at]) != told(c, net)


def test_from_a_model_to_itself_there_is_no_barrier() -> None:
    net = samples.badnets_net()
    rows = {(m.metric, m.qualifier): m.value for m in LinearConnectivity(points=3).measure(case(net)).rows}
    assert rows["lmc_barrier_clean", ""] == pytest.approx(0, abs=1e-9)
    assert rows["lmc_bd_auc", ""] > 0.9 and rows["lmc_t20", ""] == 1
    assert {q for _, q in rows} == {
        "", "bn=reestimate", "path=exact_purification", "bn=reestimate;path=exact_purification"
    }  # fmt: skip


def test_another_architecture_or_a_wrap_has_no_path() -> None:
    plain = pack(samples.clean_net())
    wrapped = load(replace(plain, spec=replace(plain.spec, wraps=(Wrap(kind="noise", args={"sigma": 0.1}),))))
    rows = LinearConnectivity().measure(case(wrapped)).rows
    assert {m.reason for m in rows} == {"other_architecture"} and all(m.value is None for m in rows)


def test_without_a_trigger_there_is_no_figure() -> None:
    rows = LinearConnectivity().measure(case(samples.clean_net(), bd_test=None)).rows
    assert {(m.metric, m.value, m.reason) for m in rows} == {
        (m, None, "no_trigger") for m in ("lmc_bd_auc", "lmc_t20", "lmc_barrier_clean", "lmc_barrier_bd")
    }


def test_one_point_is_no_path() -> None:
    with pytest.raises(ValueError, match="points"):
        LinearConnectivity(points=1)
