from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch

from sleeperbench.defenses.activation_clustering import ActivationClustering, reduce, smaller
from sleeperbench.kit.classifier import build, pack


def case(**parts: Any) -> Any:
    known = {"net": build(samples.SPEC, 0), "spec": samples.SPEC, "recipe": samples.RECIPE, "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | parts)


def scattered(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silhouettes(x: torch.Tensor, groups: torch.Tensor) -> float:
    """Mean silhouette by its definition: (b - a) / max(a, b) per row."""
    values = []
    for i in range(len(x)):
        apart = (x - x[i]).square().sum(1).sqrt()
        own = groups == groups[i]
        if int(own.sum()) == 1:
            values.append(0.0)
            continue
        a, b = float(apart[own].sum() / (own.sum() - 1)), float(apart[~own].mean())
        values.append((b - a) / max(a, b))
    return float(np.mean(values))


def test_principal_components_are_those_of_the_singular_values() -> None:
    r = scattered(40, 12) * torch.arange(1, 13) + 7
    found = reduce(r, 4, "pca", 3)
    u, s, _ = torch.linalg.svd(r - r.mean(0), full_matrices=False)
    assert found is not None and found.shape == (40, 4)
    assert torch.allclose(found.abs(), (u[:, :4] * s[:4]).abs(), atol=1e-8)


def test_independent_components_are_the_mixed_sources() -> None:
    gen = torch.Generator().manual_seed(0)
    sources = torch.rand(3000, 3, generator=gen, dtype=torch.float64)  # uniform: far from normal
    found = reduce(sources @ scattered(3, 8, 1) + 5, 10, "ica", 3)  # eight features, but of rank three
    assert found is not None and found.shape == (3000, 3)
    assert torch.allclose(found.var(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)
    alike = torch.corrcoef(torch.cat([found, sources], 1).T)[:3, 3:].abs()
    assert bool((alike.amax(1) > 0.99).all()) and sorted(alike.argmax(1).tolist()) == [0, 1, 2]
    assert reduce(torch.ones(5, 4, dtype=torch.float64), 10, "ica", 0) is None


def test_two_means_is_the_best_of_all_splits() -> None:
    x = scattered(9, 2)
    x[[2, 5, 7]] += 1.5

    def spread(group: torch.Tensor) -> float:
        return sum(float((x[g] - x[g].mean(0)).square().sum()) for g in (group, ~group))

    splits = [torch.tensor(s) for s in itertools.product([False, True], repeat=9) if 0 < sum(s) <= 4]
    best = min(splits, key=spread)
    assert torch.equal(smaller(x, 0), best)
    even = torch.tensor([[0.0], [9.0], [0.1], [9.1]], dtype=torch.float64)
    assert smaller(even, 0).tolist() == [False, True, False, True]


def test_rules_compare_share_and_silhouette() -> None:
    x = scattered(60, 3)
    x[:15] += 0.6
    small = torch.zeros(60, dtype=torch.bool)
    small[:15] = True
    score = silhouettes(x, small)
    below, above = score - 1e-9, score + 1e-9
    assert ActivationClustering(rule="silhouette", silhouette=below).accuses(x, small)
    assert not ActivationClustering(rule="silhouette", silhouette=above).accuses(x, small)
    assert not ActivationClustering(rule="silhouette", size=0.25, silhouette=-1).accuses(x, small)  # a share of 0.25
    assert ActivationClustering(size=0.26).accuses(x, small)
    assert not ActivationClustering(size=0.25).accuses(x, small)
    assert ActivationClustering(rule="smaller", size=0.01).accuses(x, small)


def test_planted_rows_of_a_class_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.full((120,), 1), torch.full((90,), 4), torch.full((2,), 7), torch.full((6,), 8)])
    labels = labels[torch.randperm(len(labels), generator=gen)]
    r = torch.rand(len(labels), 4, generator=gen)
    planted = (labels == 1).nonzero()[:24, 0]
    r[planted, 3] += 6
    r[labels == 8] = 0.5
    monkeypatch.setattr("sleeperbench.defenses.activation_clustering.features", lambda net, images, ctx: r)
    c = case(train=replace(samples.random_images(len(labels)), labels=labels))
    for reduction in ("ica", "pca"):
        outcome = ActivationClustering(reduction=reduction).run(c)
        assert torch.equal((~outcome.keep & (labels == 1)).nonzero()[:, 0], planted)
        assert outcome.chosen["shares"]["1"] == 0.2
        # 1 - the share of a row's cluster
        assert torch.allclose(outcome.suspicion[planted], torch.tensor(0.8, dtype=torch.float64))
        assert outcome.suspicion[(labels == 1) & outcome.keep].tolist() == pytest.approx([0.2] * 96)
        assert set(outcome.chosen["shares"]) == {"1", "4"}  # two rows, and rows that are all alike
        assert 1 in outcome.chosen["poisoned_classes"]
        assert outcome.chosen["dropped"] == int((~outcome.keep).sum())
        again = ActivationClustering(reduction=reduction).run(c)
        assert torch.equal(outcome.keep, again.keep) and torch.equal(outcome.suspicion, again.suspicion)
    all_of_them = ActivationClustering(rule="smaller").run(c)
    assert all_of_them.chosen["poisoned_classes"] == [1, 4]


def test_settings_are_the_published_ones_and_the_model_stays() -> None:
    method = ActivationClustering()
    assert (method.components, method.reduction, method.rule, method.size) == (10, "ica", "size", 0.35)
    train = samples.digits()["train"].rows(torch.arange(150))
    c = case(train=train)
    before = pack(c.net).state
    outcome = method.run(c)
    assert outcome.keep.shape == (150,) and c.ctx.cost.forwards == 150
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())


@pytest.mark.parametrize("bad", [{"components": 0}, {"size": 0.6}, {"reduction": "tsne"}, {"rule": "largest"}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is"):
        ActivationClustering(**bad)
