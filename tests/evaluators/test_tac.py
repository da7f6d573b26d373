"""Two definitions of the trigger-activated change, by hand and on a trained model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Role
from sleeperbench.evaluators.tac import TriggerActivatedChange, agreement, contrast
from sleeperbench.kit import similarity
from sleeperbench.kit.similarity import activations, changes, sites, strongest, tac


def case(net: Any, **parts: Any) -> Any:
    bd = samples.badnets_rendered("test", Role.TEST)
    return SimpleNamespace(**{"attacked": net, "bd_test": bd, "ctx": samples.ctx()} | parts)


def test_both_kinds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two images, two channels, two places: differences (3, 4) and (0, -2) in channel 0, (1, 0) and (0, 0) in channel 1.
    answers = [
        torch.zeros(2, 2, 2),
        torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, -2.0], [0.0, 0.0]]]),
    ]
    monkeypatch.setattr(
        similarity, "activations", lambda net, images, names, **kwargs: {"conv": answers[int(images[0, 0, 0, 0])]}
    )
    clean = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    found = changes(None, clean, clean + 1, ["conv"], ctx=samples.ctx())  # type: ignore[arg-type]
    assert found["l2"]["conv"].tolist() == [(5 + 2) / 2, 1 / 2]
    assert found["l1sum"]["conv"].tolist() == [(7 + 2) / 2, 1 / 2]


def test_the_sums_over_batches_are_those_over_all_images() -> None:
    net, bd = samples.badnets_net(), samples.badnets_rendered("test", Role.TEST)
    names = sites(net, bd.data.images[:1])["conv"]
    assert len(bd) > 250, "more than one batch"
    found = changes(net, bd.clean.images, bd.data.images, names, ctx=samples.ctx())
    before, after = (activations(net, x, names) for x in (bd.clean.images, bd.data.images))
    for name in names:
        change = (after[name] - before[name]).double()
        assert torch.allclose(found["l1sum"][name], change.abs().mean(0).sum(1), rtol=1e-6)
        assert torch.allclose(found["l2"][name], tac(net, bd.clean.images, bd.data.images, [name])[name])


def test_the_largest_and_on_which_two_rankings_agree() -> None:
    change = torch.tensor([1.0, 8.0, 2.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]).double()
    assert strongest(change, 0.2).tolist() == [1, 3] and strongest(change, 0.01).tolist() == [1]
    assert contrast(change, 0.2) == pytest.approx(8 / 2.4)
    other = change.clone()
    other[2] = 9.0
    assert agreement(change, other, 0.2) == 0.5 and agreement(change, change * 3, 0.2) == 1
    nothing = torch.zeros(4).double()
    assert math.isnan(contrast(nothing, 0.5)) and math.isnan(agreement(nothing, nothing, 0.5))


def test_figures_by_kind_and_layer_and_every_channel_is_kept() -> None:
    net = samples.badnets_net()
    c = case(net)
    found = TriggerActivatedChange(pairs=60, share=0.25).measure(c)
    assert c.ctx.cost.forwards == 120
    rows = {(m.metric, m.qualifier): m.value for m in found.rows}
    layers = sites(net, c.bd_test.data.images[:1])["conv"]
    for kind in ("l2", "l1sum"):
        each = [rows["tac_contrast", f"layer={n};tac_kind={kind}"] for n in layers]
        assert all(v is not None and v > 1 for v in each)
        assert rows["tac_contrast", f"tac_kind={kind}"] == pytest.approx(sum(v or 0 for v in each) / len(each))
        kept = found.curves[f"channels-{kind}"]
        assert {n: len(v) for n, v in kept.items()} == {n: net.get_submodule(n).out_channels for n in layers}
        for n in layers:
            values = torch.tensor(kept[n])
            assert contrast(values.double(), 0.25) == pytest.approx(
                rows["tac_contrast", f"layer={n};tac_kind={kind}"], rel=1e-3
            )
    assert rows["tac_contrast", "tac_kind=l2"] != rows["tac_contrast", "tac_kind=l1sum"]
    assert 0 <= (rows["tac_agreement", ""] or 0) <= 1
    series = found.curves["tac"]["series"]
    assert len(series) == len(layers) and all(s["y"] == sorted(s["y"], reverse=True) for s in series)


def test_reasons_and_refusals() -> None:
    found = TriggerActivatedChange().measure(case(None, bd_test=None))
    assert [(m.metric, m.reason) for m in found.rows] == [
        ("tac_contrast", "no_trigger"),
        ("tac_agreement", "no_trigger"),
    ]
    bd = samples.badnets_rendered("test", Role.TEST)

    same = type("Same", (), {"data": bd.clean, "clean": bd.clean, "__len__": lambda self: len(bd)})()
    found = TriggerActivatedChange(pairs=5).measure(case(samples.badnets_net(), bd_test=same))
    assert {m.reason for m in found.rows} == {"no_change"} and "tac" not in found.curves
    for bad in ({"pairs": 0}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(ValueError, match="pairs"):
            TriggerActivatedChange(**bad)  # type: ignore[arg-type]
