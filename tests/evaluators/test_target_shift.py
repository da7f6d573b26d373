"""The shift is a projection in the model's own features, recognises a backdoor and needs no lineage."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Findings, Measurement, Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import Rendered
from sleeperbench.defenses.exact_purification import triggered_rows
from sleeperbench.evaluators import target_shift as module
from sleeperbench.evaluators.target_shift import TargetShift, overall, shift, shifts
from sleeperbench.kit.classifier import Classifier, build, load
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
    source, target = torch.tensor([1.0, 0.0]), torch.tensor([5.0, 0.0])
    assert shift(source, source, target) == 0
    assert shift(source, target, target) == 1
    assert shift(source, torch.tensor([3.0, 7.0]), target) == 0.5  # what is across the way counts nothing
    assert shift(source, torch.tensor([-3.0, 0.0]), target) == -1


def pixels(columns: list[list[int]], labels: list[int], first: int = 0) -> Any:
    """Images whose first pixels are the features that `fake` reads."""
    data = samples.images(torch.zeros(len(labels), 1, 16, 16, dtype=torch.uint8), labels)
    data.images[:, 0, 0, : len(columns[0])] = torch.tensor(columns, dtype=torch.uint8)
    return replace(data, ids=torch.arange(len(labels)) + first)


NOBODY: Any = None


def fake(net: Any, images: Tensor, batch: int = 500, *, ctx: Any = None) -> Tensor:
    return images[:, 0, 0, :2].float()


def test_each_target_is_reached_from_its_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "features", fake)
    # Classes 0, 1, 2 lie at (0, 0), (10, 0), (0, 20); all to all: 0 to 1 goes half of its way, 1 to 2 all, 2 to 0 none.
    test = pixels([[0, 0], [10, 0], [0, 20]], [0, 1, 2])
    plain = pixels([[0, 0], [10, 0], [0, 20]], [0, 1, 2])
    moved = pixels([[5, 9], [0, 20], [0, 20]], [0, 1, 2])
    seen = Rendered(
        data=moved, clean=plain, targets=torch.tensor([1, 2, 0]), trigger_id=torch.zeros(3, dtype=torch.long)
    )
    ctx = samples.ctx()
    found = shifts(NOBODY, test, seen, 10, ctx)
    assert found == pytest.approx({(0, 0): 0, (0, 1): 0.5, (0, 2): 1})
    assert overall(found) == pytest.approx(0.5)
    # Two triggers count alike however many targets or rows they have.
    assert overall({(0, 1): 0.2, (0, 2): 0.4, (1, 5): 0.9}) == pytest.approx(0.6)
    two = replace(seen, trigger_id=torch.tensor([0, 0, 1]))
    figures = rows(TargetShift().measure(case(None, test=test, bd_test=two, clean_models=())))
    assert figures["shift_target", ""].value == pytest.approx(0.375)
    assert figures["shift_target", "trigger=0"].value == pytest.approx(0.75)
    assert figures["shift_target", "label=2;trigger=0"].value == pytest.approx(1)
    assert figures["shift_target_net", ""].reason == "no_clean_model"
    # A class without a clean test image has no place to be reached.
    assert set(shifts(NOBODY, test.rows(torch.tensor([0, 1])), seen, 10, ctx)) == {(0, 0), (0, 1)}


def test_orthogonal_maps_scales_and_shifts_of_the_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, net = module.features, samples.badnets_net()
    bd, test = samples.badnets_rendered("test", Role.TEST), samples.digits()["test"]
    plain = overall(shifts(net, test, bd, 2000, samples.ctx()))
    gen = torch.Generator().manual_seed(0)
    width = real(net, test.images[:1]).shape[1]
    q = torch.linalg.qr(torch.randn(width, width, generator=gen)).Q
    bias = torch.randn(width, generator=gen)

    def mapped(*args: Any, **kwargs: Any) -> Tensor:
        return -3.7 * real(*args, **kwargs) @ q + bias

    monkeypatch.setattr(module, "features", mapped)
    assert overall(shifts(net, test, bd, 2000, samples.ctx())) == pytest.approx(plain, rel=1e-4)
    monkeypatch.setattr(module, "features", lambda *a, **k: real(*a, **k) * torch.arange(1, width + 1))
    assert overall(shifts(net, test, bd, 2000, samples.ctx())) != pytest.approx(plain, rel=1e-2)


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


def test_a_placebo_stands_beside_it() -> None:
    bd = samples.badnets_rendered("test", Role.TEST)
    still = replace(bd, data=bd.clean)
    found = rows(TargetShift().measure(case(samples.badnets_net(), decoy_test=still)))
    assert found["shift_target", "control=placebo"].value == 0
    assert rows(TargetShift().measure(case(samples.badnets_net())))["shift_target", "control=placebo"].reason == (
        "no_placebo"
    )


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
