from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Role
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import istr_strip as module
from sleeperbench.defenses.istr_strip import IsTrStrip, answering, between
from sleeperbench.evaluators.detection import auroc
from sleeperbench.kit import slices
from sleeperbench.kit.pixels import to_float


def case(**parts: Any) -> Any:
    net, clean = samples.badnets_net(), samples.digits()["probe"]
    tune, val = clean.rows(torch.arange(200)), clean.rows(torch.arange(200, 250))
    about = {"net": net, "spec": net.spec, "clean": clean, "tune": tune, "val": val, "recipe": samples.RECIPE}
    return SimpleNamespace(**about | {"ctx": samples.ctx(3)} | parts)


def entropy(net: nn.Module, x: Tensor, overlays: Tensor) -> Tensor:
    """Mean entropy of half-and-half blends, one overlay at a time."""
    found = torch.zeros(len(x))
    with torch.no_grad():
        for o in to_float(overlays):
            p = net(0.5 * x + 0.5 * o).softmax(1)
            found -= (p * p.log()).sum(1) / len(overlays)
    return found


def test_inputs_with_the_true_trigger_stand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_MAPPED", 6)
    seen: list[slices.Isolation] = []

    def watched(*args: Any) -> slices.Isolation:
        seen.append(slices.isolate(*args))
        return seen[-1]

    monkeypatch.setattr(module, "isolate", watched)
    c, method = case(), IsTrStrip(overlays=12, labels=1, reference_steps=60)
    outcome = samples.judged(method, c)
    assert outcome.chosen["claimed"] == [0]
    assert outcome.chosen["trigger_label"] == 0
    assert outcome.verdict.score > outcome.verdict.threshold
    overlays = outcome.state[0]["overlays"]
    known = {tuple(row.flatten().tolist()) for row in c.tune.images}
    assert len(overlays) == 12
    assert all(tuple(o.flatten().tolist()) in known for o in overlays)

    # The threshold is that of the held-out rows with and without the recovered trigger.
    (found,) = seen
    x = to_float(c.val.images)
    stamped = (x[c.val.labels != 0] + found.slices[0].kept.delta).clamp(0, 1)
    threshold, accuracy = between(entropy(c.net, x, overlays), entropy(c.net, stamped, overlays), 0.05)
    assert outcome.chosen["threshold"] == pytest.approx(threshold, abs=1e-4)
    assert outcome.chosen["balanced_accuracy"] == pytest.approx(accuracy, abs=1e-4)

    bad = to_float(samples.badnets_rendered("test", Role.TEST).data.images[:80])
    good = to_float(samples.digits()["test"].images[:80])
    scores = [method.score(outcome.state, c.net, images) for images in (bad, good)]
    assert torch.allclose(scores[0], outcome.state[1]["threshold"] - entropy(c.net, bad, overlays), atol=1e-4)
    assert auroc(*scores) > 0.95
    assert outcome.alarm == 0
    assert float((scores[0] > 0).float().mean()) > 0.9


def test_the_threshold_has_the_best_balanced_accuracy() -> None:
    gen = torch.Generator().manual_seed(0)
    for shift in (0.1, 0.4, 2.0):
        clean, bad = torch.rand(17, generator=gen), torch.rand(12, generator=gen) - shift
        threshold, accuracy = between(clean, bad, 0.05)
        both = sorted(clean.tolist() + bad.tolist())
        middles = [(a + b) / 2 for a, b in itertools.pairwise(both)]
        rated = {
            m: (sum(h < m for h in bad.tolist()) / 12 + sum(h >= m for h in clean.tolist()) / 17) / 2 for m in middles
        }
        assert accuracy == pytest.approx(max(rated.values()))
        assert threshold == pytest.approx(min(m for m, r in rated.items() if r > max(rated.values()) - 1e-9))


def test_without_a_lower_entropy_the_clean_rows_set_it() -> None:
    clean = torch.arange(100, 0, -1).float()
    assert between(clean, clean + 1, 0.05) == (6.0, None)
    assert between(clean, clean[:0], 0.05) == (6.0, None)
    assert between(torch.ones(3), torch.ones(3), 0.05) == (1.0, None)


def test_probabilities_are_asked_in_eval_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 3)).train()
    x = torch.rand(4, 1, 16, 16)
    p = answering(net)(x)
    assert net.training
    assert not p.requires_grad
    assert torch.allclose(p, net.eval()(x).softmax(1))


def test_few_rows_and_senseless_settings() -> None:
    c = case()
    with pytest.raises(NotApplicable, match="too_few_clean_rows"):
        IsTrStrip().run(case(val=c.val.rows(torch.arange(0))))
    for bad in ({"overlays": 0}, {"alpha": 1.0}, {"frr": 1.0}, {"labels": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            IsTrStrip(**bad)  # type: ignore[arg-type]
