from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench.defenses import istr_reference as module
from sleeperbench.defenses.istr import IsTr
from sleeperbench.defenses.istr_reference import IsTrReference
from sleeperbench.kit import slices
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.row_slices import isolate_rows


def case() -> Any:
    net, clean = samples.badnets_net(), samples.digits()["probe"]
    tune, val = clean.rows(torch.arange(200)), clean.rows(torch.arange(200, 250))
    references = (pack(samples.clean_net()),)
    return SimpleNamespace(net=net, spec=net.spec, tune=tune, val=val, references=references, ctx=samples.ctx(3))


def test_it_claims_the_target_against_the_clean_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_MAPPED", 6)
    seen: list[nn.Module] = []

    def watched(c: Any, reference: nn.Module, settings: slices.Settings) -> slices.Isolation:
        seen.append(reference)
        return slices.isolate(c, reference, settings)

    monkeypatch.setattr(module, "isolate", watched)
    found = IsTrReference(labels=1).run(case())
    assert found.chosen["claimed"] == [0] == [i.target for i in found.inverted]
    wanted = samples.clean_net().state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in seen[0].state_dict().items())
    # The clean model's own lean stands beside it; the target is no lean of it.
    theirs = slices.leaning(torch.tensor(found.chosen["reference_rates"]).double())
    ours = slices.leaning(torch.tensor(found.chosen["rates"]).double())
    assert float(ours[0] - theirs[0]) > 0.4
    assert float(found.verdict.label_scores[0]) >= float(ours[0] - theirs[0]) / 0.2 - 0.01


def test_rows_are_sliced_against_the_clean_model() -> None:
    settings: dict[str, Any] = {"slices": "adaptive", "delta": "invert", "labels": 1}
    c = case()
    c.tune, c.val = c.tune.rows(torch.arange(40)), c.val.rows(torch.arange(20))
    found = IsTrReference(maps="row", **settings).run(c)
    assert found.chosen["claimed"] == [0]
    wanted = isolate_rows(c, samples.clean_net(), slices.Settings(**settings)).slices[0]
    assert wanted.benign is not None
    assert torch.equal(found.state[0]["slices"][0], wanted.kept.mask)
    assert torch.allclose(found.inverted[0].delta, wanted.kept.delta, atol=1e-6)
    assert torch.allclose(found.state[0]["benign"][0], wanted.benign, atol=1e-5)


def test_access_and_settings_are_those_of_istr_but_for_the_reference() -> None:
    assert (IsTrReference.ACCESS.references, IsTr.ACCESS.references) == (1, 0)
    assert (IsTrReference.ACCESS.track(), IsTr.ACCESS.track()) == ("T1R", "T1")
    assert slices.Settings.of(IsTrReference()) == slices.Settings.of(IsTr())
    names = [{f.name for f in dataclasses.fields(c)} for c in (IsTr, IsTrReference)]
    assert names[0] - names[1] == {"dms", "reference_steps", "batched"}
    assert not names[1] - names[0]
    with pytest.raises(ValueError, match="labels 0"):
        IsTrReference(labels=0)
