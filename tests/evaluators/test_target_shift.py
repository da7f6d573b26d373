"""The shift is a projection in the model's own features, recognises a backdoor and needs no lineage."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Findings, Measurement, Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import Rendered
from sleeperbench.defenses.exact_purification import triggered_rows
from sleeperbench.evaluators import target_shift as module
from sleeperbench.evaluators.target_shift import (
    MEASURES,
    TargetShift,
    directions,
    inverse,
    measured,
    overall,
    pooled,
    shift,
    shifts,
    size,
    within,
)
from sleeperbench.kit.classifier import Classifier, build, load
from sleeperbench.kit.taps import PENULTIMATE
from sleeperbench.kit.train import fit
from sleeperbench.kit.tune import tune


@functools.cache
def clean(seed: int) -> Classifier:
    net = build(samples.SPEC, seed)
    fit(net, samples.digits()["train"], replace(samples.RECIPE, epochs=4), samples.ctx(seed))
    return net


def case(net: Any, **parts: Any) -> Any:
    return SimpleNamespace(
        **{
            "net": net,
            "test": samples.digits()["test"],
            "bd_test": samples.badnets_rendered("test", Role.TEST),
            "decoy_test": None,
            "clean_models": tuple(clean(s) for s in (11, 12, 13)),
            "ctx": samples.ctx(3),
        }
        | parts
    )


def rows(findings: Findings) -> dict[tuple[str, str], Measurement]:
    found = {(m.metric, m.qualifier): m for m in findings.rows}
    assert len(found) == len(findings.rows)
    return found


def value(net: Any, metric: str = "shift_target_net", **parts: Any) -> float:
    figure = rows(TargetShift().measure(case(net, **parts)))[metric, ""].value
    assert figure is not None
    return figure


def test_the_projection() -> None:
    way = torch.tensor([4.0, 0.0])
    assert shift(0 * way, way, way) == 0 and shift(way, way, way) == 1
    assert shift(torch.tensor([2.0, 7.0]), way, way) == 0.5  # what is across the way counts nothing
    assert shift(torch.tensor([-4.0, 0.0]), way, way) == -1
    assert size(torch.tensor([3.0, 4.0]), way) == 1.25


def test_every_measure_of_one_move() -> None:
    d, w = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, 0.0]).double()
    # Classes spread by 2 along the first axis and by 1 along the second, or 4 and 1 squared.
    rare = torch.diag(torch.tensor([0.25, 1.0])).double()
    moves = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 1.0]), PENULTIMATE: d}
    ways = {"a": torch.tensor([6.0, 0.0]), "b": torch.tensor([0.0, 2.0]), PENULTIMATE: w}
    found = measured(moves, ways, rare, torch.tensor([1.0, 1.0]).double())
    assert found == pytest.approx(
        {
            "": 0.25,
            "size": 5**0.5 / 4,
            "whitened": 0.25,
            "whitened_size": (4.25 / 4) ** 0.5,
            "head": 0.75,
            "stages": 0.5,
            "stages_size": 0.5,
        }
    )
    # Where the way lies across the spread, whitening turns what counts: now moves along the second axis do too.
    tilted = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
    assert measured(moves, ways, tilted, w)["whitened"] == pytest.approx((1 * 4 + 2 * 2) / 16)
    assert set(found) == set(MEASURES)


def test_covariance_is_within_classes_and_can_be_turned_round() -> None:
    gen = torch.Generator().manual_seed(1)
    h, labels = torch.randn(60, 3, generator=gen).double(), torch.arange(60) % 4
    far = h + 100 * labels[:, None].double()
    groups = torch.stack([h[labels == c] for c in range(4)])
    s = sum(np.cov(g.numpy().T, bias=True) for g in groups) / 4
    wanted = 0.9 * s + 0.1 * np.trace(s) / 3 * np.eye(3)
    assert within(far, labels).numpy() == pytest.approx(wanted)
    assert (inverse(within(h, labels)) @ within(h, labels)).numpy() == pytest.approx(np.eye(3))
    dead = within(torch.zeros(10, 3).double(), torch.zeros(10))
    assert not bool(inverse(dead).any())
    assert bool(inverse(dead + torch.nan).isnan().all())


def test_stages_are_averaged_over_places() -> None:
    h = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    assert torch.equal(pooled(h), h.flatten(2).mean(2))
    last = h.permute(0, 2, 3, 1)  # (N, H, W, C), as some transformers answer
    assert torch.equal(pooled(last), pooled(h))
    tokens = h.flatten(2).transpose(1, 2)
    assert torch.equal(pooled(tokens), pooled(h)) and torch.equal(pooled(pooled(h)), pooled(h))


def test_the_head_reads_a_class_against_the_others() -> None:
    net = clean(11)
    w = net.body.head.weight.detach().double()  # type: ignore[union-attr, operator]
    u = directions(net)
    assert torch.allclose(u[3], w[3] - torch.stack([w[k] for k in range(10) if k != 3]).mean(0))


def pixels(columns: list[list[int]], labels: list[int], first: int = 0) -> Any:
    """Images whose first pixels are the features that `fake` reads."""
    data = samples.images(torch.zeros(len(labels), 1, 16, 16, dtype=torch.uint8), labels)
    data.images[:, 0, 0, : len(columns[0])] = torch.tensor(columns, dtype=torch.uint8)
    return replace(data, ids=torch.arange(len(labels)) + first)


NOBODY: Any = None


def fake(net: Any, images: Tensor, ctx: Any) -> dict[str, Tensor]:
    return {PENULTIMATE: images[:, 0, 0, :2].double()}


def test_each_target_is_reached_from_its_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "answered", fake)
    monkeypatch.setattr(module, "directions", lambda net: torch.ones(3, 2).double())
    # Classes 0, 1, 2 lie at (0, 0), (10, 0), (0, 20); all to all: 0 to 1 goes half of its way, 1 to 2 all, 2 to 0 none.
    test = pixels([[0, 0], [10, 0], [0, 20]], [0, 1, 2])
    plain = pixels([[0, 0], [10, 0], [0, 20]], [0, 1, 2])
    moved = pixels([[5, 9], [0, 20], [0, 20]], [0, 1, 2])
    seen = Rendered(
        data=moved, clean=plain, targets=torch.tensor([1, 2, 0]), trigger_id=torch.zeros(3, dtype=torch.long)
    )
    ctx = samples.ctx()
    found = shifts(NOBODY, test, seen, 10, ctx)
    assert found[""] == pytest.approx({(0, 0): 0, (0, 1): 0.5, (0, 2): 1})
    assert found["size"] == pytest.approx({(0, 0): 0, (0, 1): 106**0.5 / 10, (0, 2): 1})
    assert found["head"][0, 1] == pytest.approx(14 / 10)
    assert overall(found[""]) == pytest.approx(0.5)
    # Two triggers count alike however many targets or rows they have.
    assert overall({(0, 1): 0.2, (0, 2): 0.4, (1, 5): 0.9}) == pytest.approx(0.6)
    two = replace(seen, trigger_id=torch.tensor([0, 0, 1]))
    figures = rows(TargetShift().measure(case(None, test=test, bd_test=two, clean_models=())))
    assert figures["shift_target", ""].value == pytest.approx(0.375)
    assert figures["shift_target", "trigger=0"].value == pytest.approx(0.75)
    assert figures["shift_target", "label=2;trigger=0"].value == pytest.approx(1)
    assert figures["shift_target_net", ""].reason == figures["shift_target_net", "measure=size"].reason
    assert figures["shift_target_net", ""].reason == "no_clean_model"
    # A class without a clean test image has no place to be reached.
    assert set(shifts(NOBODY, test.rows(torch.tensor([0, 1])), seen, 10, ctx)[""]) == {(0, 0), (0, 1)}


def test_orthogonal_maps_scales_and_shifts_of_the_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor, where moves count by how rare they are, any map that can be turned round, but for the shrinking."""
    real, net = module.answered, samples.badnets_net()
    bd, test = samples.badnets_rendered("test", Role.TEST), samples.digits()["test"]
    plain = shifts(net, test, bd, 2000, samples.ctx())
    gen = torch.Generator().manual_seed(0)
    width = real(net, test.images[:1], samples.ctx())[PENULTIMATE].shape[1]
    q = torch.linalg.qr(torch.randn(width, width, generator=gen).double()).Q
    bias = torch.randn(width, generator=gen).double()
    stretch = torch.diag(torch.arange(1, width + 1).double())

    def mapped(by: Tensor) -> Any:
        def answered(*args: Any) -> dict[str, Tensor]:
            found = real(*args)
            return found | {PENULTIMATE: found[PENULTIMATE] @ by + bias}

        return answered

    monkeypatch.setattr(module, "answered", mapped(-3.7 * q))
    turned = shifts(net, test, bd, 2000, samples.ctx())
    for measure in ("", "size", "whitened", "whitened_size"):
        assert overall(turned[measure]) == pytest.approx(overall(plain[measure]), rel=1e-6)
    monkeypatch.setattr(module, "answered", mapped(stretch))
    assert overall(shifts(net, test, bd, 2000, samples.ctx())[""]) != pytest.approx(overall(plain[""]), rel=1e-2)
    monkeypatch.setattr(module, "SHRINK", 1e-9)
    stretched = overall(shifts(net, test, bd, 2000, samples.ctx())["whitened"])
    monkeypatch.setattr(module, "answered", real)
    assert stretched == pytest.approx(overall(shifts(net, test, bd, 2000, samples.ctx())["whitened"]), rel=1e-3)


def twin() -> Classifier:
    train = samples.digits()["train"]
    bad = BadNets().poison(train, samples.badnets(), torch.ones(len(train), dtype=torch.bool), 0.1, samples.ctx(5))
    net = build(samples.SPEC, 77)
    fit(net, bad.data, replace(samples.RECIPE, epochs=6), samples.ctx(77))
    return net


def asleep() -> Classifier:
    """The attacked model with its head alone taught to ignore the trigger: the features still carry it."""
    net = copy.deepcopy(samples.badnets_net())
    for name, weight in net.named_parameters():
        weight.requires_grad_(name.startswith("body.head"))
    bad = triggered_rows(samples.digits()["pool"], samples.badnets(), 0.5, samples.ctx(9))
    return load(tune(net, bad, ctx=samples.ctx(9), lr=0.1, steps=160))


def test_it_tells_backdoored_models_from_clean_ones_whatever_they_come_from() -> None:
    band = rows(TargetShift().measure(case(clean(21))))
    others = [abs(band["shift_target_net", f"control=clean;model={i}"].value or 0) for i in range(3)]
    assert max(*others, abs(value(clean(21)))) < 0.2
    for net in (samples.badnets_net(), twin(), asleep()):
        assert value(net) > 0.5


def test_a_clean_model_is_no_control_of_itself() -> None:
    found = rows(TargetShift().measure(case(clean(12))))
    each = [found["shift_target_clean", f"model={i}"].value or 0 for i in range(3)]
    assert found["shift_target", ""].value == each[1]
    assert found["shift_target_clean", ""].value == pytest.approx((each[0] + each[2]) / 2)
    assert found["shift_target_net", ""].value == found["shift_target_net", "control=clean;model=1"].value
    other = rows(TargetShift().measure(case(samples.badnets_net())))
    assert other["shift_target_clean", ""].value == pytest.approx(sum(each) / 3)
    own = other["shift_target", ""].value or 0
    assert other["shift_target_net", ""].value == pytest.approx(own - sum(each) / 3)
    for q in (f"measure={m}" for m in MEASURES[1:]):
        a, b, net = (other[f"shift_target{end}", q].value or 0 for end in ("", "_clean", "_net"))
        assert net == pytest.approx(a - b) and b != 0


def test_a_placebo_stands_beside_it() -> None:
    bd = samples.badnets_rendered("test", Role.TEST)
    still = replace(bd, data=bd.clean)
    found = rows(TargetShift().measure(case(samples.badnets_net(), decoy_test=still)))
    assert found["shift_target", "control=placebo"].value == 0
    assert rows(TargetShift().measure(case(samples.badnets_net())))["shift_target", "control=placebo"].reason == (
        "no_placebo"
    )


def test_covariance_and_head_are_computed_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The placebo has the shift alone, which is the same figure without them."""
    net, bd = samples.badnets_net(), samples.badnets_rendered("test", Role.TEST)
    placebo = replace(bd, data=replace(bd.data, images=bd.clean.images // 2))
    expected = overall(shifts(net, samples.digits()["test"], placebo, 50, samples.ctx())[""])
    made: list[str] = []

    def counted(name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (made.append(name), real(*args))[1])

    for name in ("within", "inverse", "directions"):
        counted(name)
    found = rows(TargetShift(rows=50).measure(case(net, decoy_test=placebo)))
    assert found["shift_target", "control=placebo"].value == expected != 0
    assert sorted(made) == ["directions"] * 4 + ["inverse"] * 4 + ["within"] * 4  # this model and three clean ones


def test_reasons_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {m.name for m in TargetShift.METRICS}
    ruined = copy.deepcopy(samples.badnets_net())
    with torch.no_grad():
        next(ruined.parameters()).fill_(torch.nan)
    empty = samples.digits()["test"].rows(torch.nonzero(samples.digits()["test"].labels != 0).flatten())
    headless = copy.deepcopy(clean(11))
    headless.body.head = torch.nn.Identity()  # type: ignore[assignment]
    for net, parts, reason in (
        (None, {"bd_test": None}, "no_trigger"),
        (clean(11), {"test": empty}, "too_few_rows"),
        (ruined, {}, "nan"),
        (headless, {}, "needs_linear_head"),
    ):
        found = TargetShift().measure(case(net, **parts)).rows
        assert {m.metric for m in found} == names
        assert {(m.value, m.reason.partition(":")[0]) for m in found} == {(None, reason)}
    first, again = (TargetShift(rows=30).measure(case(samples.badnets_net())).rows for _ in range(2))
    assert first == again
    with pytest.raises(ValueError, match="rows"):
        TargetShift(rows=0)
