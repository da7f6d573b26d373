from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench import Findings, Measurement, Model, Role
from sleeperbench.contracts import NotApplicable, Wrap
from sleeperbench.engine.suite import shipped
from sleeperbench.evaluators import accident as module
from sleeperbench.evaluators.accident import (
    Range,
    WakingByAccident,
    average,
    averages,
    in_eight_bits,
    look,
    pruned,
    quantised,
    under,
    weights,
)
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.pixels import to_float


def net(seed: int = 1) -> Classifier:
    return build(samples.SPEC, seed).eval()


def case(**parts: Any) -> Any:
    known = {
        "net": net(),
        "test": samples.digits()["test"],
        "probe": samples.digits()["probe"],
        "bd_probe": samples.badnets_rendered("probe", Role.TRAIN),
        "bd_test": samples.badnets_rendered("test", Role.TEST),
        "controls": {},
        "defended_clean": None,
        "again": None,
        "ctx": samples.ctx(3),
    }
    return SimpleNamespace(**known | parts)


def rows(found: Findings) -> dict[tuple[str, str], Measurement]:
    return {(m.metric, m.qualifier): m for m in found.rows}


def test_weights_are_those_of_convolutions_and_linear_layers() -> None:
    n = net()
    keys = weights(n)
    assert keys and all(n.state_dict()[k].dim() in (2, 4) for k in keys)
    assert set(keys) == {k for k, t in n.state_dict().items() if t.dim() in (2, 4) and k.startswith("body.")}


def test_eight_bits_per_output_channel() -> None:
    n = net()
    key = weights(n)[1]
    with torch.no_grad():
        w = n.get_parameter(key)
        w[0] = 0  # a dead channel stays dead
        w[1] = 0.1
        w[1].flatten()[:4] = torch.tensor([1.27, -0.5, 0.015, 0.0149])  # s = 0.01
    model = quantised(n)
    got, was = model.state[key], n.state_dict()[key]
    assert not got[0].any()
    assert torch.allclose(got[1].flatten()[:2], torch.tensor([1.27, -0.5]))
    # 1.5 is a half: rounded to the even 2; 1.49 to 1.
    assert torch.allclose(got[1].flatten()[2:4], torch.tensor([0.02, 0.01]), atol=1e-6)
    for k in weights(n):
        old, new = n.state_dict()[k].flatten(1), model.state[k].flatten(1)
        scale = old.abs().amax(1, keepdim=True) / 127
        assert bool(((old - new).abs() <= scale / 2 * 1.001 + 1e-9).all())
        assert all(len(row.unique()) <= 255 for row in new) and not torch.equal(old, new)
    others = set(model.state) - set(weights(n))
    assert all(torch.equal(model.state[k], n.state_dict()[k]) for k in others)
    assert torch.equal(was, n.state_dict()[key]), "the model itself is left as it was"


def test_activations_of_eight_bits_are_those_of_torch() -> None:
    seen, layer = Range(), nn.Linear(4, 2)
    for low, high in ((0.5, 1.0), (-0.3, 0.9)):  # the ends of all, and 0 among them
        assert seen(layer, (torch.tensor([[low, high, 0.6, 0.7]]),)) is None
    assert (seen.low, seen.high) == pytest.approx((-0.3, 1.0))
    seen.watching = False
    x = torch.cat([torch.linspace(-1, 2, 4001), torch.tensor([-0.3, 0.0, 1.0])])[None]
    given = seen(layer, (x,))
    assert given is not None
    scale = 1.3 / 255
    expected = torch.fake_quantize_per_tensor_affine(x, scale, round(0.3 / scale), 0, 255)
    # At a half two ways of rounding may part by one step.
    apart = (given[0] - expected).abs()
    assert float(apart.max()) <= scale * 1.01 and float((apart > 1e-5).double().mean()) < 0.01
    assert len(given[0].unique()) == 256 and given[0][0, -2] == 0
    silent = Range()
    silent.watching = False
    assert silent(layer, (x,)) == (x,)


def test_every_layer_gets_its_input_in_eight_bits_with_ranges_of_clean_rows() -> None:
    n, c = net(), samples.ctx()
    probe = samples.digits()["probe"].images[:40]
    got, met = in_eight_bits(n, probe, c), dict[str, torch.Tensor]()
    for key in weights(got):
        name = key.removesuffix(".weight")
        got.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: met.update({name: x[0]}))
    x = to_float(probe)
    with torch.no_grad():
        moved = got(x)
    assert set(met) == {k.removesuffix(".weight") for k in weights(n)}
    assert all(len(t.unique()) <= 256 for t in met.values())
    # On the rows of which it knows the ends nothing is cut, so an input is at most half a step off what it is.
    first = met[next(iter(met))]
    inside = (x - n.mean) / n.std
    step = float(inside.max() - min(inside.min(), torch.tensor(0.0))) / 255
    assert 0 < float((first - inside).abs().max()) <= step * 0.501
    assert not torch.equal(load(quantised(n))(x), moved)
    assert c.cost.forwards == 40 and all(not m._forward_pre_hooks for m in n.modules())
    # What lies beyond the ends is cut: all that it has seen is grey 200, and 0 belongs to every range.
    even = in_eight_bits(n, torch.full_like(probe, 200), c)
    with torch.no_grad():
        assert torch.allclose(even(x), even(x.clamp(0.5, 200 / 255)), atol=1e-5)


@pytest.mark.parametrize("part", [0.3, 0.7])
def test_the_smallest_weights_of_all_layers_go(part: float) -> None:
    n = net()
    model = pruned(n, part)
    old = torch.cat([n.state_dict()[k].flatten() for k in weights(n)])
    new = torch.cat([model.state[k].flatten() for k in weights(n)])
    gone = (new == 0) & (old != 0)
    assert int((new == 0).sum()) == int(part * len(old))
    assert float(old[gone].abs().max()) <= float(old[~gone].abs().min())
    assert torch.equal(new[~gone], old[~gone])
    shares = [float((model.state[k] == 0).double().mean()) for k in weights(n)]
    assert max(shares) - min(shares) > 0.05, "one threshold for all layers"


def test_shifted_images_are_those_of_the_weather() -> None:
    probe = samples.digits()["probe"].rows(torch.arange(20))
    dusk = under("dusk", probe, samples.ctx())
    expected = (0.7 * to_float(probe.images) ** 1.8 * 255).round()
    assert torch.equal(dusk.float(), expected)
    assert not torch.equal(under("fog", probe, samples.ctx()), probe.images)


class Stub(nn.Module):
    """Answers 0 to the first `hits` of ten triggered rows, and right to the first `right` of ten clean rows."""

    spec = samples.SPEC

    def __init__(self, hits: int, right: int) -> None:
        super().__init__()
        self.hits, self.right = hits, right
        self.state = {"answers": torch.tensor([hits, right])}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = (x[:, 0, 0, 0] * 255).round().long()
        bad = torch.where(value - 100 < self.hits, 0, 1)
        clean = torch.where(value - 50 < self.right, 2, 1)
        return torch.eye(10)[torch.where(value >= 100, bad, clean)]


def staged(monkeypatch: pytest.MonkeyPatch, **hits: Any) -> Any:
    """A case in which each way leads to a stub of that many hits and right answers; `before` is the model itself."""
    monkeypatch.setattr(module, "pack", lambda n: n)
    monkeypatch.setattr(module, "load", lambda model, device: model)
    monkeypatch.setattr(module, "retune", lambda net, p, t, k, draw, ctx, *, lr, steps: hits["tuned"][draw])
    half_way = {id(b): n for b, n in zip(hits["tuned"], hits["averaged"], strict=True)}
    half_way[id(hits.get("again"))] = hits.get("together")
    monkeypatch.setattr(module, "between", lambda a, b, t: half_way[id(b)])
    monkeypatch.setattr(module, "refresh", lambda net, images, *, batch, ctx: hits["bn"])
    monkeypatch.setattr(module, "quantised", lambda net: hits["int8"])
    monkeypatch.setattr(module, "in_eight_bits", lambda net, images, ctx: hits["int8"])
    monkeypatch.setattr(module, "pruned", lambda net, part: hits["pruned"])
    return case(
        net=hits["before"],
        test=samples.answering(list(range(50, 60)), [2] * 10),
        probe=samples.random_images(20, (1, 16, 16)),
        bd_test=samples.rendered(list(range(100, 110)), [1] * 10, [0] * 10),
        controls=hits.get("controls", {}),
        defended_clean=hits.get("defended_clean"),
        again=hits.get("again"),
    )


def test_the_largest_rise_that_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    was = Findings(
        rows=(
            Measurement(metric="asr_accident_rise", value=0.05, qualifier="way=int8"),
            Measurement(metric="asr_accident_rise", value=0.01, qualifier="way=averaged"),
        )
    )
    c = staged(
        monkeypatch,
        before=Stub(1, 9),
        tuned=[Stub(2, 9), Stub(4, 9)],
        averaged=[Stub(1, 9), Stub(1, 10)],
        bn=Stub(0, 9),
        int8=Stub(2, 8),
        pruned=Stub(10, 1),
        controls={"clean_model": was},
        defended_clean=Stub(3, 9),
        again=Stub(0, 9),
        together=Stub(6, 9),
    )
    found = rows(WakingByAccident(draws=2, shares=(0.5,)).measure(c))
    v = {q: m.value for q, m in found.items()}
    assert v["asr_accident", "way=before"] == 0.1 and v["c_acc_accident", "way=before"] == 0.9
    assert v["asr_accident", "draw=1;way=tuned"] == 0.4 and v["asr_accident", "way=tuned"] == pytest.approx(0.3)
    assert v["asr_accident_rise", "way=tuned"] == pytest.approx(0.2)
    assert v["c_acc_accident", "way=averaged_tuned"] == pytest.approx(0.95)
    assert v["asr_accident_rise", "way=bn_fog"] == pytest.approx(-0.1)
    # The mean of two copies is the largest rise of a whole model, but has no control: it is no headline either.
    assert v["asr_accident", "way=averaged"] == 0.6 and v["asr_accident_rise", "way=averaged"] == pytest.approx(0.5)
    assert v["c_acc_accident", "way=averaged"] == 0.9
    assert not any("control=" in q and q.endswith("way=averaged") for _, q in found)
    # Pruning sends everything to class 0 or 1: a rise of 0.9 by a ruined model is no headline.
    assert v["asr_accident_rise", "share=0.5;way=pruned"] == pytest.approx(0.9)
    assert v["asr_accident_rise", ""] == pytest.approx(0.2) and v["asr_accident", ""] == pytest.approx(0.3)
    assert v["c_acc_accident", ""] == pytest.approx(0.9)
    assert v["asr_accident_rise", "control=clean_model;way=int8"] == 0.05
    assert found["asr_accident_rise", "control=clean_model"].reason == "control_missing: clean_model"
    # The clean model after the same defense starts at 0.3, and the same changes are made to it.
    assert v["asr_accident", "control=clean_defended;way=before"] == 0.3
    assert v["asr_accident_rise", "control=clean_defended;way=int8_weights"] == pytest.approx(-0.1)
    assert v["asr_accident_rise", "control=clean_defended"] == pytest.approx(0.0)
    assert v["asr_accident", "control=clean_defended;way=tuned"] == pytest.approx(0.3)
    assert not any("control=clean_defended" in q and "draw=" in q for _, q in found)
    assert found["asr_accident", "way=int8"].total == 10 and {m.stage for m in found.values()} == {"reactivated"}


def test_without_batch_norm_and_with_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ruin = Stub(10, 0)
    c = staged(monkeypatch, before=Stub(1, 9), tuned=[ruin], averaged=[ruin], bn=ruin, int8=ruin, pruned=ruin)

    def refuse(*a: Any, **k: Any) -> Model:
        raise NotApplicable("needs_bn")

    monkeypatch.setattr(module, "refresh", refuse)
    found = rows(WakingByAccident(draws=1, shares=(0.5,)).measure(c))
    assert found["asr_accident", "way=bn_dusk"].reason == found["asr_accident_rise", "way=bn_dusk"].reason == "needs_bn"
    assert all(found[m.name, ""].reason.startswith("collapsed") for m in WakingByAccident.METRICS)
    assert [found[m.name, "way=averaged"].reason for m in WakingByAccident.METRICS] == ["one_copy"] * 3
    gone = [found[m.name, "control=clean_defended"].reason for m in WakingByAccident.METRICS]
    assert gone == ["control_missing: clean_defended"] * 3


def test_two_equal_copies_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defense that draws nothing: its rise of 0 would be no finding."""
    same = Stub(1, 9)
    parts: Any = {"tuned": [same], "averaged": [same], "bn": same, "int8": same, "pruned": same, "together": same}
    c = staged(monkeypatch, before=Stub(1, 9), again=Stub(1, 9), **parts)
    found = rows(WakingByAccident(draws=1, shares=(0.5,)).measure(c))
    told = [found[m.name, "way=averaged"] for m in WakingByAccident.METRICS]
    assert [(m.value, m.reason) for m in told] == [(None, "same_copy")] * 3
    assert found["asr_accident_rise", "way=tuned"].value == 0


def test_the_ways_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning is RA's without triggered rows, the average lies between, and BatchNorm alone changes under weather."""
    seen: list[Any] = []
    tuned = net(7)

    def fake(net: Any, probe: Any, triggered: Any, k: int, draw: int, ctx: Any, *, lr: float, steps: int) -> Any:
        seen.append((k, draw, lr, steps))
        return tuned

    monkeypatch.setattr(module, "retune", fake)
    c = case(probe=samples.digits()["probe"].rows(torch.arange(40)))
    changed = WakingByAccident(draws=2)._changed(c.net, c, c.bd_probe)
    made = {(way, draw): pack(n) for way, draw, n in changed if not isinstance(n, str)}  # type: ignore[arg-type]
    assert seen == [(0, 0, 0.01, 40), (0, 1, 0.01, 40)]
    own, other, middle = pack(c.net).state, pack(tuned).state, made["averaged_tuned", 0]
    for n, t in middle.state.items():
        if t.is_floating_point():
            assert torch.allclose(t, (own[n] + other[n]) / 2, atol=1e-7)
    fog = made["bn_fog", None]
    changed = {n for n, t in fog.state.items() if not torch.equal(t, own[n])}
    assert changed and all("running_" in n or "num_batches" in n for n in changed)
    assert all(torch.equal(made["int8", None].state[k], t) for k, t in made["int8_weights", None].state.items())
    assert list(made)[-5:] == [
        ("int8_weights", None),
        ("int8", None),
        *((f"pruned;share={s:g}", None) for s in (0.3, 0.5, 0.7)),
    ]


def test_two_defended_copies_are_averaged() -> None:
    """Running statistics too; a copy with other parts, or none, has no mean."""
    one, two = net(3), net(4)
    with torch.no_grad():
        for n, t in two.named_buffers():
            if t.is_floating_point() and n.startswith("body."):
                t += 0.5
    c = case()
    middle = averages(one, two, c.ctx)
    assert isinstance(middle, Classifier) and not middle.training
    assert middle.state_dict().keys() == average(one, two, c.ctx).state_dict().keys()
    for n, t in middle.state_dict().items():
        a, b = one.state_dict()[n], two.state_dict()[n]
        assert torch.allclose(t, (a + b) / 2, atol=1e-7) if t.is_floating_point() else torch.equal(t, b)
    assert averages(one, None, c.ctx) == "one_copy"
    assert averages(one, load(pack(one)), c.ctx) == "same_copy"
    near = load(pack(one))
    with torch.no_grad():
        near.get_buffer(next(n for n, _ in near.named_buffers() if n.endswith("running_mean"))).add_(0.1)
    assert isinstance(averages(one, near, c.ctx), Classifier), "running statistics are tensors too"
    gated = build(replace(samples.SPEC, wraps=(Wrap(kind="gate", site="body.stage1.1"),)), 4)
    assert averages(one, gated, c.ctx) == "other_form"


def test_a_model_is_looked_at_as_everywhere() -> None:
    n, c = load(pack(net(3))), case()
    hit = n(to_float(c.bd_test.data.images)).argmax(1) == c.bd_test.targets
    asr, acc = look(n, c.test, c.bd_test, c.ctx)
    assert (asr.count, asr.total) == (int(hit.sum()), len(c.bd_test)) and acc.total == len(c.test)


def test_reasons_and_refusals() -> None:
    for parts in ({"bd_test": None}, {"bd_probe": None}):
        found = WakingByAccident().measure(case(**parts))
        assert [(m.metric, m.reason) for m in found.rows] == [(m.name, "no_trigger") for m in WakingByAccident.METRICS]
    for bad in ({"draws": 0}, {"lr": 0.0}, {"shares": (1.0,)}):
        with pytest.raises(ValueError, match="draws"):
            WakingByAccident(**bad)
    assert replace(WakingByAccident()).shares == (0.3, 0.5, 0.7)


@pytest.mark.parametrize("name", ["accident", "wake", "qra", "lmc"])
def test_suites_for_a_gpu_and_for_a_cpu_measure_what_lies_under_the_tables(name: str) -> None:
    suites = [tomllib.loads(text) for text in shipped().values()]
    under = {s["name"] for s in suites if name in s["matrix"]["evaluators"]}
    assert {"paper-safety", "paper-safety-under-cpu"} <= under


def test_the_suite_for_a_cpu_has_every_attack_and_defense_of_the_claims_on_inputs_and_paths() -> None:
    suite = tomllib.loads(shipped()["paper-safety-under-cpu"])
    text = resources.files("sleeperbench.published").joinpath("superficial-safety.toml").read_text()
    claims = [c for c in tomllib.loads(text)["claim"] if c["metric"].startswith(("p_asr_qra", "c_asr_qra", "lmc_"))]
    assert len(claims) == 11
    for c in claims:
        assert set(c["attack"]) <= set(suite["matrix"]["attacks"])
        named = [c["defense"]] if isinstance(c["defense"], str) else c["defense"]
        assert set(named) <= set(suite["matrix"]["defenses"])
        assert set(c.get("to", ())) <= set(suite["evaluator"]["qra"]["peers"])
