"""BEC is 1 for the attacked model, scatters around 0 for clean ones, and is null for what has no lineage."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Findings, Measurement, Role, Wrap
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.defenses.fine_pruning import last_site
from sleeperbench.evaluators import bec as module
from sleeperbench.evaluators.bec import (
    BackdoorExistence,
    leave_one_out,
    ratio,
    ratios,
    split,
)
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.gates import pruned
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.similarity import strongest, tac
from sleeperbench.kit.taps import capture, taps
from sleeperbench.kit.train import fit
from sleeperbench.kit.tune import tune
from sleeperbench.kit.wraps import make

CONVS = [f"body.stage{i}.0" for i in (2, 3, 4)]
NORMS = [f"body.stage{i}.1" for i in (2, 3, 4)]


@functools.cache
def tuned() -> Classifier:
    return load(tune(samples.badnets_net(), samples.digits()["pool"], ctx=samples.ctx(1), lr=0.3, steps=60))


@functools.cache
def clean(seed: int) -> Classifier:
    """Half trained, which is enough to be a clean model of its own."""
    net = build(samples.SPEC, seed)
    fit(net, samples.digits()["train"], replace(samples.RECIPE, epochs=2), samples.ctx(seed))
    return net


@functools.cache
def twin() -> Classifier:
    """The same poisoned rows, another initialisation and order."""
    train = samples.digits()["train"]
    rows = BadNets().poison(train, samples.badnets(), torch.ones(len(train), dtype=torch.bool), 0.1, samples.ctx(5))
    net = build(samples.SPEC, 77)
    fit(net, rows.data, replace(samples.RECIPE, epochs=6), samples.ctx(77))
    return net


def stored(net: Any) -> Classifier:
    """As the engine hands it over; training leaves weights in another memory format, which rounds otherwise."""
    return load(pack(net))


def case(net: Any, **parts: Any) -> Any:
    return SimpleNamespace(
        **{
            "net": stored(net),
            "attacked": stored(samples.badnets_net()),
            "bd_test": samples.badnets_rendered("test", Role.TEST),
            "descends": True,
            "is_defended": True,
            "clean_models": tuple(stored(clean(s)) for s in (11, 12, 13)),
            "ctx": samples.ctx(3),
        }
        | parts
    )


def rows(findings: Findings) -> dict[tuple[str, str], Measurement]:
    found = {(m.metric, m.qualifier): m for m in findings.rows}
    assert len(found) == len(findings.rows)
    return found


def measured(net: Any, draws: int = 2, **parts: Any) -> dict[tuple[str, str], Measurement]:
    return rows(BackdoorExistence(draws=draws).measure(case(net, **parts)))


def test_settings_are_the_published_ones() -> None:
    assert vars(BackdoorExistence()) == {"rows": 500, "pairs": 2200, "share": 0.1, "draws": 20}


def test_the_attacked_model_is_exactly_one() -> None:
    found = measured(samples.badnets_net())
    ones = [m for m in found.values() if m.metric.startswith("bec") and "control=clean;" not in m.qualifier]
    assert len(ones) == 2 * 3 + 2 * 3 + 2 + 5
    assert {m.value for m in ones} == {1.0}
    assert {found["cka", f"layer={n}"].value for n in CONVS} == {1.0}


def slow_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (v.flatten(1).double() - v.flatten(1).double().mean(0) for v in (x, y))
    cross = [(a.T @ b).square().sum().sqrt() for a, b in ((x, y), (x, x), (y, y))]
    return float(cross[0] ** 2 / (cross[1] * cross[2]))


@pytest.mark.parametrize(("site", "names"), [("", CONVS), ("site=post_bn", NORMS)])
def test_the_figure_by_hand(site: str, names: list[str]) -> None:
    found = measured(tuned())
    attacked, bd = samples.badnets_net(), samples.badnets_rendered("test", Role.TEST)
    seen, pairs = split(bd, 500, 2200, samples.ctx(3))
    assert len(seen) == len(bd) // 2
    assert len(pairs) == len(bd) - len(seen)
    top = {}
    with torch.no_grad():
        x, y = (capture(attacked, to_float(v.images[pairs]), names) for v in (bd.clean, bd.data))
        for n in names:
            change = (x[n] - y[n]).flatten(2).norm(dim=2).mean(0)
            top[n] = change.topk(max(1, len(change) // 10)).indices
        assert [len(top[n]) for n in names] == [1, 3, 3]

        def alike(net: Any) -> list[float]:
            own, other = (capture(m, to_float(bd.data.images[seen]), names) for m in (attacked, net))
            return [slow_cka(own[n][:, top[n]], other[n][:, top[n]]) for n in names]

        own, others = alike(tuned()), [alike(clean(s)) for s in (11, 12, 13)]
    s_c = sum(map(sum, others)) / 9
    assert found["cka", site].value == pytest.approx(sum(own) / 3, abs=1e-5)
    assert found["cka", "model=clean" + (";" + site if site else "")].value == pytest.approx(s_c, abs=1e-5)
    assert found["bec", site].value == pytest.approx((sum(own) / 3 - s_c) / (1 - s_c), abs=1e-4)
    each = [(o - sum(c) / 3) / (1 - sum(c) / 3) for o, c in zip(own, zip(*others, strict=True), strict=True)]
    assert found["bec_layerwise", site].value == pytest.approx(sum(each) / 3, abs=1e-4)
    one = f"layer={names[1]}" + (";" + site if site else "")
    assert found["bec_layerwise", one].value == pytest.approx(each[1], abs=1e-4)
    if not site:
        alone = (sum(others[0]) / 3 - sum(map(sum, others[1:])) / 6) / (1 - sum(map(sum, others[1:])) / 6)
        assert found["bec", "control=clean;model=0"].value == pytest.approx(alone, abs=1e-4)


def test_ratio_of_means_and_means_of_ratios() -> None:
    by_model = {"own": [0.9, 0.6, 0.99], "clean0": [0.5, 0.3, 0.97], "clean1": [0.7, 0.1, 0.97]}
    s_c = (0.6 + 0.2 + 0.97) / 3
    assert ratio(by_model) == pytest.approx((0.83 - s_c) / (1 - s_c))
    assert ratios(by_model)[:2] == pytest.approx([0.75, 0.5])
    assert math.isnan(ratios(by_model)[2])  # room 0.03
    # A layer that is dead in one model is left out for all.
    dead = by_model | {"clean1": [0.7, math.nan, 0.97]}
    assert ratio(dead) == pytest.approx((0.945 - 0.785) / (1 - 0.785))
    assert math.isnan(ratio({"own": [math.nan], "clean0": [0.5]}))
    assert leave_one_out([[0.5], [0.6], [0.8]]) == pytest.approx([-0.2 / 0.3, -0.05 / 0.35, 0.25 / 0.45])


def test_no_image_serves_both_tac_and_cka() -> None:
    data = samples.random_images(40)
    both = replace(data, ids=torch.arange(40) % 20)  # twenty images, each with two triggers
    clean = torch.zeros(40, dtype=torch.int64)
    bd: Any = samples.Rendered(data=both, clean=both, targets=clean, trigger_id=torch.arange(40) // 20)
    seen, pairs = split(bd, 8, 100, samples.ctx())
    assert len(seen) == 8
    assert not set(both.ids[seen].tolist()) & set(both.ids[pairs].tolist())
    assert set(both.ids[pairs].tolist()) | set(both.ids[seen].tolist()) == set(range(20))
    assert len(split(bd, 8, 5, samples.ctx())[1]) == 5
    again = split(bd, 8, 100, samples.ctx())
    assert torch.equal(seen, again[0])
    assert not torch.equal(seen, split(bd, 8, 100, samples.ctx(1))[0])


def test_a_tenth_of_the_channels_and_at_least_one() -> None:
    change = torch.tensor([1.0, 3.0, 3.0, 2.0] + [0.0] * 60)
    assert strongest(change, 0.1).tolist()[:4] == [1, 2, 3, 0]
    assert [len(strongest(torch.rand(n), 0.1)) for n in (4, 64, 128, 256, 512)] == [1, 6, 12, 25, 51]


def test_what_was_trained_anew_is_no_descendant() -> None:
    for net in (clean(11), clean(21), twin()):
        found = measured(net, descends=False)
        for metric in ("bec", "bec_layerwise", "bec_debiased"):
            for qualifier in ("", "site=post_bn"):
                assert found[metric, qualifier].value is None
                assert found[metric, qualifier].reason == "not_a_descendant"
        assert found["bec", "control=no_lineage"].value is not None
        assert not any("control=random" in q or "control=weights" in q for _, q in found)
        assert abs(found["bec", "control=no_lineage"].value) < 0.4
    assert measured(tuned())["bec", ""].value is not None


def test_a_clean_model_is_no_part_of_what_it_is_held_against() -> None:
    found = measured(clean(12), descends=False)
    assert found["bec", "control=no_lineage"].value == found["bec", "control=clean;model=1"].value
    whole = measured(clean(21), descends=False)["cka", "model=clean"].value
    own = found["cka", ""].value
    assert found["cka", "model=clean"].value == pytest.approx((3 * whole - own) / 2, abs=1e-6)


def test_controls_stand_on_the_same_scale() -> None:
    found = measured(tuned(), draws=4)
    draws = [found["bec", f"control=random;draw={i}"].value for i in range(4)]
    assert len(set(draws)) > 1
    assert found["bec", "control=random"].value == pytest.approx(sum(d for d in draws if d is not None) / 4)
    assert found["bec", "control=random;stat=max"].value == max(d for d in draws if d is not None)
    alone = [found["bec", f"control=clean;model={i}"].value for i in range(3)]
    assert found["bec", "control=clean;stat=min"].value == min(v for v in alone if v is not None)
    assert all(v is not None and abs(v) < 0.5 for v in alone)
    clean_inputs = found["bec", "control=clean_inputs"].value
    assert clean_inputs is not None
    assert clean_inputs != found["bec", ""].value

    own = {n: p for n, p in tuned().named_parameters() if n.startswith("body.")}
    flat = torch.cat([p.detach().flatten() for p in own.values()])

    def vector(net: Any) -> torch.Tensor:
        return torch.cat([dict(net.named_parameters())[n].detach().flatten() for n in own])

    attacked = vector(samples.badnets_net())
    apart = sum(float((vector(clean(s)) - attacked).norm()) for s in (11, 12, 13)) / 3
    assert found["bec", "control=weights"].value == pytest.approx(1 - float((flat - attacked).norm()) / apart, abs=1e-5)


def test_pruned_batch_norm_shows_behind_it_and_not_before() -> None:
    attacked, bd = samples.badnets_net(), samples.badnets_rendered("test", Role.TEST)
    _, pairs = split(bd, 500, 2200, samples.ctx(3))
    top = strongest(tac(attacked, bd.clean.images[pairs], bd.data.images[pairs], [NORMS[0]])[NORMS[0]], 0.1)
    sizes = [8, 16, 32, 32]
    keep = torch.ones(sum(sizes), dtype=torch.bool)
    keep[sizes[0] + top] = False
    found = measured(pruned(attacked, keep))
    assert found["cka", f"layer={CONVS[0]}"].value == 1
    dead = found["cka", f"layer={NORMS[0]};site=post_bn"]
    assert (dead.value, dead.reason) == (None, "dead_channels")
    assert found["bec_layerwise", f"layer={NORMS[0]};site=post_bn"].reason == "dead_channels"
    assert found["bec", "site=post_bn"].value is not None  # from the other two layers


def test_what_stands_before_the_input_is_taken_off() -> None:
    model = pack(samples.badnets_net())
    spec = replace(model.spec, wraps=(Wrap(kind="noise", args={"sigma": 0.3}),))
    found = measured(load(replace(model, spec=spec)))
    assert found["bec", ""].value == 1
    assert found["bec", "control=weights"].value == 1, "what was taken off is no tensor of the model"


@pytest.mark.parametrize("wrap", [
    Wrap(kind="insert", site=NORMS[0], args={"layer": "conv1x1_bn", "channels": 16}),
    Wrap(kind="gate", site=NORMS[0], args={"channels": 16}),
])  # fmt: skip
def test_an_added_layer_has_no_distance_of_weights(wrap: Wrap) -> None:
    net = samples.badnets_net()
    model, layer = pack(net), make(wrap, net, net.spec)
    first = next(iter(layer.state_dict().values()))  # the identity; some channels are turned or taken out
    first.mul_(torch.linspace(-1, 1, len(first)).view(-1, *[1] * (first.dim() - 1)))
    added = {f"wraps.0.{name}": tensor for name, tensor in layer.state_dict().items()}
    whole = load(replace(model, spec=replace(model.spec, wraps=(wrap,)), state={**model.state, **added}))
    found = measured(whole)
    # The attacked model's own weights are all there, so that their distance alone would be 0.
    weighed = found["bec", "control=weights"]
    assert (weighed.value, weighed.reason) == (None, "other_architecture")
    moved = found["bec", ""].value
    assert moved is not None and moved < 0.99


def gated(site: str, factor: torch.Tensor) -> Classifier:
    plain, wrap = pack(samples.badnets_net()), Wrap(kind="gate", site=site, args={"channels": len(factor)})
    return load(
        replace(plain, spec=replace(plain.spec, wraps=(wrap,)), state={**plain.state, "wraps.0.factor": factor})
    )


def test_what_a_gate_behind_the_last_layer_removed_is_zero_there() -> None:
    attacked, bd = stored(samples.badnets_net()), samples.badnets_rendered("test", Role.TEST)
    seen, pairs = split(bd, 500, 2200, samples.ctx(3))
    with torch.no_grad():
        x, y, z = (
            capture(attacked, to_float(images), CONVS)[CONVS[-1]]
            for images in (bd.clean.images[pairs], bd.data.images[pairs], bd.data.images[seen])
        )
    change = (x - y).flatten(2).norm(dim=2).mean(0)
    cut = change.topk(len(change) // 10).indices
    factor = torch.ones(len(change))
    factor[cut[0]], factor[cut[1]] = 0.0, 0.5  # of three that are looked at
    alike = slow_cka(z[:, cut], (z * factor[:, None, None])[:, cut])
    found = measured(gated(last_site(attacked, samples.ctx()), factor))
    assert found["cka", f"layer={CONVS[-1]}"].value == pytest.approx(alike, abs=1e-5)
    s_c = found["cka", "model=clean"].value
    assert s_c is not None and alike < 0.99
    assert found["bec", ""].value == pytest.approx(((2 + alike) / 3 - s_c) / (1 - s_c), abs=1e-4)
    for qualifier in ("site=post_bn", "control=clean_inputs"):
        value = found["bec", qualifier].value
        assert value is not None and value < 0.999


@pytest.mark.parametrize("removed", [True, False])
def test_a_change_that_no_layer_sees_leaves_no_figure(removed: bool) -> None:
    net = samples.badnets_net()
    at = last_site(net, samples.ctx())
    channels = net.get_submodule(taps(net).head).in_features
    if removed:
        found = measured(gated(at, torch.zeros(channels)))
    else:
        plain, wrap = pack(net), Wrap(kind="insert", site=at, args={"layer": "conv1x1_bn", "channels": channels})
        state = {f"wraps.0.{name}": tensor for name, tensor in make(wrap, net, net.spec).state_dict().items()}
        found = measured(load(replace(plain, spec=replace(plain.spec, wraps=(wrap,)), state={**plain.state, **state})))
    for metric in ("bec", "bec_layerwise", "bec_debiased"):
        for qualifier in ("", "site=post_bn"):
            row = found[metric, qualifier]
            assert row.value is None
            assert row.reason.partition(":")[0] == ("removed_channels" if removed else "unseen_change")
    for control in ("clean_inputs", "random"):
        assert found["bec", f"control={control}"].value is None
    assert found["bec", "control=clean;model=0"].value is not None, "clean models are as they were"


def test_curves_show_layers_against_clean_models() -> None:
    curves = BackdoorExistence(draws=1).measure(case(tuned())).curves
    assert set(curves) == {"cka", "bec"}
    own, clean = curves["cka"]["series"]
    assert own["x"] == clean["x"] == [1, 2, 3]
    assert all(low <= y <= high for low, y, high in zip(clean["low"], clean["y"], clean["high"], strict=True))
    assert set(BackdoorExistence(draws=1).measure(case(twin(), descends=False)).curves) == {"cka"}


def test_reasons() -> None:
    names = {m.name for m in BackdoorExistence.METRICS}
    ruined = load(pack(samples.badnets_net()))
    with torch.no_grad():
        next(ruined.parameters()).fill_(torch.nan)
    other = build(replace(samples.SPEC, args={"width": 4}), 0)
    few: Any = samples.rendered([0] * 6, [1] * 6, [0] * 6)
    for net, parts, reason in (
        (tuned(), {"bd_test": None}, "no_trigger"),
        (other, {}, "other_architecture"),
        (ruined, {}, "nan"),
        (tuned(), {"bd_test": few}, "too_few_rows"),
    ):
        found = BackdoorExistence().measure(case(net, **parts)).rows
        assert {m.metric for m in found} == names
        assert {(m.value, m.reason.partition(":")[0]) for m in found} == {(None, reason)}
    with pytest.raises(ValueError, match="share"):
        BackdoorExistence(share=0)


def test_tac_says_how_far_the_chosen_channels_stand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {n: torch.tensor([4.0] + [1.0] * 9) for n in CONVS} | {n: torch.ones(10) for n in NORMS}
    monkeypatch.setattr(module, "tac", lambda *a, **k: fixed)
    found = measured(tuned())
    assert found["tac", ""].value == pytest.approx(4 / 1.3)
    assert found["tac", f"layer={CONVS[2]}"].value == pytest.approx(4 / 1.3)
    monkeypatch.setattr(module, "tac", lambda *a, **k: {n: torch.zeros(10) for n in [*CONVS, *NORMS]})
    assert measured(tuned())["tac", ""].reason == "no_change"


def test_the_same_backdoor_trained_anew_stands_beside_the_undefended_model() -> None:
    found = measured(samples.badnets_net(), is_defended=False, twin=stored(twin()))
    alone = measured(twin(), descends=False)
    assert found["bec", "control=twin"].value == alone["bec", "control=no_lineage"].value
    # A model that does not answer to these images has another backdoor, or none.
    other = measured(samples.badnets_net(), is_defended=False, twin=stored(clean(21)))
    assert other["bec", "control=twin"].reason == "other_trigger"
    assert not any("twin" in q for _, q in measured(samples.badnets_net()))
