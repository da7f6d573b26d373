from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from scipy.stats import multivariate_normal

from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.scan import SCAn, decompose, identities, minor, ratio, split
from sleeperbench.kit.classifier import build, pack


def case(**parts: Any) -> Any:
    known = {"net": build(samples.SPEC, 0), "spec": samples.SPEC, "recipe": samples.RECIPE, "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | parts)


def drawn(counts: list[int], d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows r = mu_class + e with a full covariance of e, and their labels."""
    gen = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    mu = 2 * torch.randn(len(counts), d, generator=gen, dtype=torch.float64)
    mix = torch.randn(d, d, generator=gen, dtype=torch.float64) / d**0.5
    e = torch.randn(len(y), d, generator=gen, dtype=torch.float64) @ mix
    order = torch.randperm(len(y), generator=gen)
    return (mu[y] + e)[order] + 5, y[order]


def em(r: np.ndarray, y: np.ndarray, ridge: float, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """The EM of the method row by row, with one matrix inverse per class."""
    n, d = r.shape
    x = r - r.mean(0)
    mu = np.stack([x[y == k].mean(0) for k in range(y.max() + 1)])

    def covariances(mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, e = np.zeros((n, d)), np.zeros((n, d))
        for i in range(n):
            u[i], e[i] = mu[y[i]], x[i] - mu[y[i]]
        return np.cov(u.T), np.cov(e.T)

    s_mu, s_e = covariances(mu)
    for _ in range(iterations):
        ridged = s_e + ridge * np.trace(s_e) / d * np.eye(d)
        for k in range(len(mu)):
            # The posterior of mu given n rows: precision S_mu^-1 + n S_e^-1. S_mu has no inverse, hence in this form.
            count = (y == k).sum()
            gain = np.linalg.pinv(np.eye(d) + count * s_mu @ np.linalg.inv(ridged)) @ s_mu @ np.linalg.inv(ridged)
            mu[k] = sum(gain @ row for row in x[y == k])
        s_mu, s_e = covariances(mu)
    return s_mu, s_e + ridge * np.trace(s_e) / d * np.eye(d)


@pytest.mark.parametrize("ridge", [1e-9, 0.3])
def test_the_global_model_is_that_of_a_slow_em(ridge: float) -> None:
    r, y = drawn([9, 4, 15, 6, 2], 6)
    s_mu, s_e = decompose(r, y, ridge, 7, 0.0)
    wanted_mu, wanted_e = em(r.numpy(), y.numpy(), ridge, 7)
    assert np.allclose(s_mu.numpy(), wanted_mu, atol=1e-6)
    assert np.allclose(s_e.numpy(), wanted_e, atol=1e-6)


def test_em_stops_when_it_stands() -> None:
    r, y = drawn([9, 4, 15, 6, 2], 3)
    one, rest = decompose(r, y, 0.01, 1, 0.0), decompose(r, y, 0.01, 100, 1e9)
    assert all(torch.equal(a, b) for a, b in zip(one, rest, strict=True))
    assert not torch.allclose(one[0], decompose(r, y, 0.01, 100, 1e-5)[0])
    with pytest.raises(NotApplicable, match="too_few_clean_rows"):
        decompose(r[:5], torch.arange(5), 0.01, 100, 1e-5)


def test_identity_is_the_mean_that_the_likelihood_and_the_prior_agree_on() -> None:
    x, _ = drawn([12], 4)
    s_mu, s_e = (a @ a.T for a in (drawn([4], 4, 1)[0], drawn([4], 4, 2)[0]))
    found = identities(x.sum(0)[None], torch.tensor([12]), s_mu, s_e)[0].requires_grad_()
    # Where the log posterior is flat.
    log = -(x - found) @ torch.linalg.inv(s_e) @ (x - found).T
    (log.diagonal().sum() - found @ torch.linalg.inv(s_mu) @ found).backward()
    assert found.grad is not None and float(found.grad.abs().max()) < 1e-6


def test_statistic_is_twice_the_mean_log_likelihood_ratio() -> None:
    x, y = drawn([14, 9], 5)
    second = y == 1
    s_e = torch.cov(drawn([30], 5, 3)[0].T)
    one = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    root = torch.linalg.cholesky(s_e)
    white, mu = (torch.linalg.solve_triangular(root, v.T, upper=False).T for v in (x, one[None]))
    wanted = 0.0
    for row, of_second in zip(x.numpy(), second.tolist(), strict=True):
        own = x[second if of_second else ~second].mean(0).numpy()
        wanted += multivariate_normal.logpdf(row, own, s_e.numpy()) - multivariate_normal.logpdf(row, one, s_e.numpy())
    assert ratio(white, second, mu[0]) == pytest.approx(2 * wanted / len(x), rel=1e-9)


def test_split_is_in_the_metric_of_the_variation() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=gen, dtype=torch.float64) * torch.tensor([10.0, 0.1])
    second = torch.arange(60) < 20
    x[second, 1] += 2  # far in the variation's own measure, near in the plain one
    found = split(x / torch.tensor([10.0, 0.1]), 0)
    assert found is not None and (torch.equal(found, second) or torch.equal(found, ~second))
    plain = split(x, 0)
    assert plain is not None and not torch.equal(plain, second) and not torch.equal(plain, ~second)
    assert split(x[:1], 0) is None and split(torch.ones(4, 2, dtype=torch.float64), 0) is None


def test_the_group_with_fewer_clean_rows_goes() -> None:
    t, f = True, False
    assert minor(torch.tensor([t, t, t, f]), torch.tensor([t, f, f]))
    assert not minor(torch.tensor([t, f, f, f]), torch.tensor([t, t, f]))
    assert minor(torch.tensor([t, f, f]), torch.tensor([t, f]))  # equally many: fewer training rows
    assert not minor(torch.tensor([t, t, f]), torch.tensor([], dtype=torch.bool))


def test_planted_rows_of_a_class_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    r, y = drawn([60] * 8, 5)
    planted = (y == 3).nonzero()[:35, 0]  # more poison than clean rows: size would mislead
    r[planted] += 6 * torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    known = drawn([60] * 8, 5)
    clean_rows = torch.cat([(known[1] == k).nonzero()[-10:, 0] for k in range(8)])  # of class 3 none is planted
    parts = {"train": (r, y), "clean": (known[0][clean_rows], y[clean_rows])}
    sets = {name: replace(samples.random_images(len(v), seed=len(v)), labels=v) for name, (_, v) in parts.items()}
    found = {len(v): f for f, v in parts.values()}
    monkeypatch.setattr("sleeperbench.defenses.scan.features", lambda net, images, ctx: found[len(images)])
    outcome = SCAn().run(case(**sets))
    assert outcome.chosen["contaminated_classes"] == [3]
    assert torch.equal((~outcome.keep).nonzero()[:, 0], planted)
    assert outcome.chosen["dropped"] == 35 and outcome.chosen["clean_rows"] == 80
    assert set(outcome.suspicion[planted].tolist()) == {outcome.chosen["index"]["3"]}
    j = torch.tensor(list(outcome.chosen["statistic"].values()), dtype=torch.float64)
    middle = np.median(j.numpy())
    wanted = np.abs(j.numpy() - middle) / (1.4826 * np.median(np.abs(j.numpy() - middle)))
    assert list(outcome.chosen["index"].values()) == pytest.approx(wanted.tolist())
    few = SCAn(threshold=float(wanted.max()) + 1e-6).run(case(**sets))
    assert bool(few.keep.all()) and few.chosen["contaminated_classes"] == []


def test_settings_are_the_published_ones_and_the_model_stays() -> None:
    assert SCAn().threshold == pytest.approx(np.exp(2))
    assert (SCAn().iterations, SCAn().tolerance) == (100, 1e-5)
    data = samples.digits()
    c = case(train=data["train"].rows(torch.arange(150)), clean=data["pool"].rows(torch.arange(60)))
    before = pack(c.net).state
    outcome = SCAn().run(c)
    again = SCAn().run(c)
    assert outcome.keep.shape == (150,) and c.ctx.cost.forwards == 2 * 210
    assert torch.equal(outcome.suspicion, again.suspicion)
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    with pytest.raises(ValueError, match="ridge is"):
        SCAn(ridge=0.0)
