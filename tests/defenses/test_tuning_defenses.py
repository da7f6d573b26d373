from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Backdoor, Role
from sleeperbench.attacks.blended import Blended
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.exact_purification import ExactPurification, triggered_rows
from sleeperbench.defenses.ft import FineTuning
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import load, pack
from sleeperbench.kit.poison import stamp


def case(**parts: Any) -> Any:
    net, clean = samples.badnets_net(), samples.digits()["pool"]
    return SimpleNamespace(**{"net": net, "clean": clean, "oracle": samples.badnets(), "ctx": samples.ctx(9)} | parts)


def test_ft_takes_the_steps_it_says_over_all_clean_rows() -> None:
    c = case()
    before = pack(c.net).state
    model = FineTuning(steps=30, batch=64).run(c).model
    # Every step costs one batch forward and one backward.
    assert c.ctx.cost.backwards == c.ctx.cost.forwards == 30 * 64
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    moved = [n for n, _ in c.net.named_parameters() if not torch.equal(before[n], model.state[n])]
    assert len(moved) == len(list(c.net.parameters()))
    test = samples.digits()["test"]
    assert float((answers(load(model), test.images, c.ctx) == test.labels).float().mean()) > 0.9


def test_ft_settings_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sleeperbench.defenses.ft.tune", lambda net, data, **args: seen.update(args, data=data))
    c = case()
    FineTuning().run(c)
    assert seen.pop("data") is c.clean
    assert seen.pop("ctx") is c.ctx
    assert seen == {"lr": 0.01, "steps": 1000, "batch": 256, "weight_decay": 5e-4, "schedule": "cosine"}


def test_triggered_rows_keep_their_labels() -> None:
    clean = samples.digits()["pool"]
    rows = triggered_rows(clean, samples.badnets(), 0.1, samples.ctx())
    touched = (rows.images != clean.images).flatten(1).any(1)
    assert torch.equal(rows.labels, clean.labels)
    assert torch.equal(rows.ids, clean.ids)
    # 15 rows of 150; the checkerboard may by chance equal what lay there, but a digit's corner is dark.
    assert int(touched.sum()) == 15
    assert not bool((clean.labels[touched] == 0).any())
    expected = stamp(clean.rows(touched), samples.badnets().triggers[0], Role.TEST, samples.ctx()).images
    assert torch.equal(rows.images[touched], expected)


def test_the_test_trigger_is_unlearned_where_roles_differ() -> None:
    clean = samples.digits()["pool"]
    b = Blended().prepare(clean, samples.ctx())
    rows = triggered_rows(clean, b, 0.1, samples.ctx())
    touched = (rows.images != clean.images).flatten(1).any(1)
    assert torch.equal(rows.images[touched], stamp(clean.rows(touched), b.triggers[0], Role.TEST, samples.ctx()).images)


def test_several_triggers_share_the_rows() -> None:
    clean = samples.digits()["pool"]
    both = Backdoor(triggers=samples.badnets().triggers + Blended().prepare(clean, samples.ctx()).triggers)
    rows = triggered_rows(clean, both, 0.2, samples.ctx())
    many = (rows.images != clean.images).flatten(1).sum(1)
    assert int(((many > 0) & (many <= 9)).sum()) == 15
    assert int((many > 9).sum()) == 15


def test_exact_purification_removes_the_backdoor() -> None:
    c = case()
    test, bd_test = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST)
    assert measure_asr(c.net, bd_test, c.ctx).value > 0.9
    purified = load(ExactPurification(steps=80).run(c).model)
    assert measure_asr(purified, bd_test, c.ctx).value < 0.1
    assert float((answers(purified, test.images, c.ctx) == test.labels).float().mean()) > 0.9


def test_exact_purification_needs_a_trigger() -> None:
    with pytest.raises(NotApplicable, match="no_trigger"):
        ExactPurification().run(case(oracle=Backdoor(triggers=())))
    assert ExactPurification.ACCESS.track() == "T4"
