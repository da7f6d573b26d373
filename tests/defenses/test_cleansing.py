from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import ImageSet, Outcome, Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.retrain import Retrain
from sleeperbench.defenses.spectral import SpectralSignatures, outlyingness
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.evaluators.detection import auroc
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import build, load, pack


def poisoned() -> Any:
    train = samples.digits()["train"]
    return BadNets().poison(train, samples.badnets(), torch.ones(len(train), dtype=torch.bool), 0.1, samples.ctx(5))


def case(**parts: Any) -> Any:
    known = {"net": samples.badnets_net(), "spec": samples.SPEC, "recipe": samples.RECIPE, "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | parts)


# ---- spectral --------------------------------------------------------------------------------------------------------
def test_outlyingness_is_the_projection_on_the_top_singular_vector() -> None:
    gen = torch.Generator().manual_seed(0)
    for n, d in ((40, 7), (5, 12), (1, 3)):
        r = torch.randn(n, d, generator=gen, dtype=torch.float64) * torch.arange(1, d + 1) + 5
        centred = r - r.mean(0)
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        assert torch.allclose(outlyingness(r), (u[:, 0] * s[0]) ** 2, atol=1e-8)
        # Where the features lie plays no role.
        assert torch.allclose(outlyingness(r + 100), outlyingness(r), atol=1e-6)


def test_planted_rows_of_a_class_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.full((200,), 1), torch.full((120,), 4), torch.full((1,), 7)])
    labels = labels[torch.randperm(len(labels), generator=gen)]
    r = torch.randn(len(labels), 16, generator=gen)
    r[:, 3] *= 20 * (labels == 4)  # another class spreads more widely, but classes are judged by themselves
    planted = (labels == 1).nonzero()[:10, 0]
    direction = torch.randn(16, generator=gen)
    r[planted] += 12 * direction / direction.norm()
    monkeypatch.setattr("sleeperbench.defenses.spectral.features", lambda net, images, ctx: r)
    data = replace(samples.random_images(len(labels)), labels=labels)
    outcome = SpectralSignatures().run(case(train=data))
    dropped = ~outcome.keep
    assert bool(dropped[planted].all())
    assert [int(dropped[labels == k].sum()) for k in (1, 4, 7)] == [15, 9, 0]
    for k in (1, 4):  # the highest of each class, and no other
        of = labels == k
        assert float(outcome.suspicion[of & dropped].min()) > float(outcome.suspicion[of & ~dropped].max())
    assert torch.allclose(outcome.suspicion[labels == 1], outlyingness(r[labels == 1].double()))
    assert outcome.chosen == {"dropped": 24, "rows": 321}
    fewer = SpectralSignatures(eps=0.01).run(case(train=data))
    assert int((~fewer.keep).sum()) == 3 + 2


def test_poisoned_digits_are_more_suspicious() -> None:
    p = poisoned()
    c = case(train=p.data)
    before = pack(c.net).state
    outcome = SpectralSignatures().run(c)
    assert auroc(outcome.suspicion[p.mark == 1], outcome.suspicion[p.mark == 0]) > 0.7
    assert c.ctx.cost.forwards == len(p.data)
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    for label in p.data.labels.unique():
        of = p.data.labels == label
        assert int((of & ~outcome.keep).sum()) == round(0.075 * int(of.sum()))


@pytest.mark.parametrize("eps", [0.0, 0.7])
def test_eps_must_leave_rows(eps: float) -> None:
    with pytest.raises(ValueError, match="eps is"):
        SpectralSignatures(eps=eps)


# ---- retrain ---------------------------------------------------------------------------------------------------------
def trained_on(monkeypatch: pytest.MonkeyPatch, inner: Outcome) -> tuple[ImageSet, Outcome, Any]:
    seen: list[Any] = []
    monkeypatch.setattr("sleeperbench.defenses.retrain.fit", lambda *args: seen.append(args))
    c = case(train=samples.random_images(6, (1, 16, 16)), inner=inner)
    outcome = Retrain().run(c)
    ((net, data, recipe, ctx),) = seen
    assert (recipe, ctx) == (samples.RECIPE, c.ctx)
    # What the patched training leaves as it was: a network of its own, not the attacked one.
    fresh = pack(build(samples.SPEC, c.ctx.derive("init"))).state
    assert all(torch.equal(t, fresh[n]) for n, t in outcome.model.state.items())
    assert all(torch.equal(t, fresh[n]) for n, t in pack(net).state.items())
    return data, outcome, c


def test_retrain_takes_the_kept_rows_under_the_given_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = torch.tensor([True, False, True, True, False, True])
    data, outcome, c = trained_on(monkeypatch, Outcome(keep=keep))
    assert torch.equal(data.images, c.train.images[keep])
    assert torch.equal(data.labels, c.train.labels[keep])
    assert outcome.chosen == {"kept": 4, "rows": 6, "relabelled": 0}

    relabel = c.train.labels.clone()
    relabel[2] = (relabel[2] + 1) % 10
    data, outcome, c = trained_on(monkeypatch, Outcome(keep=keep, relabel=relabel))
    assert torch.equal(data.images, c.train.images[keep])
    assert torch.equal(data.labels, relabel[keep])
    assert outcome.chosen == {"kept": 4, "rows": 6, "relabelled": 1}

    data, outcome, c = trained_on(monkeypatch, Outcome(relabel=relabel))
    assert torch.equal(data.labels, relabel)
    assert outcome.chosen == {"kept": 6, "rows": 6, "relabelled": 1}


def test_retrain_needs_marks() -> None:
    c = case(train=samples.random_images(6), inner=Outcome(suspicion=torch.rand(6)))
    with pytest.raises(NotApplicable, match="no_marks"):
        Retrain().run(c)


def test_retraining_without_the_poison_has_no_backdoor() -> None:
    p = poisoned()
    c = case(train=p.data, inner=Outcome(keep=p.mark == 0))
    outcome = Retrain().run(c)
    net = load(outcome.model)
    test, bd_test = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST)
    assert measure_asr(net, bd_test, c.ctx).value < 0.1
    assert float((answers(net, test.images, c.ctx) == test.labels).float().mean()) > 0.9
