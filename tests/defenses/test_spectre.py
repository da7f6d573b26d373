from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from scipy.linalg import expm, inv, sqrtm

from sleeperbench.defenses.spectre import Spectre, outliers, principal, que, tail, top_direction, trusted, whiten
from sleeperbench.kit.classifier import build, pack


def case(**parts: Any) -> Any:
    known = {"net": build(samples.SPEC, 0), "spec": samples.SPEC, "recipe": samples.RECIPE, "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | parts)


def poisoned(n: int, d: int, bad: int, shift: float, seed: int = 0) -> torch.Tensor:
    """Correlated normal rows, of which the first `bad` are shifted along a direction of little variance; centred."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=gen, dtype=torch.float64) * torch.linspace(6, 0.2, d)
    x[:bad, -1] += shift * 0.2
    return x - x.mean(0)


def slow_scores(x: np.ndarray, rows: np.ndarray, alpha: float) -> np.ndarray:
    """Whitening by the covariance of some rows, then QUE scores one by one."""
    k = x.shape[1]
    kept = x[rows] - x[rows].mean(0)
    white = x @ np.real(inv(sqrtm(kept.T @ kept / len(kept))))
    s = np.cov(white.T)
    m = expm(alpha * (s - np.eye(k)) / (np.linalg.norm(s, 2) - 1))
    return np.array([w @ m @ w / np.trace(m) for w in white])


def slow_filter(x: np.ndarray, eps: float, tau: float) -> set[int]:
    """One step of the robust estimator with the covariance of the outer products written out."""
    n, d = x.shape
    y = x @ np.real(inv(sqrtm(x.T @ x / n)))
    far = {i for i in range(n) if y[i] @ y[i] >= 10 * d * np.log(n / tau)}
    if far:
        return far
    z = np.stack([np.kron(row, row) for row in y])
    values, vectors = np.linalg.eigh(z.T @ z / n - np.outer(np.eye(d).ravel(), np.eye(d).ravel()))
    if values[-1] <= 1 + 10 * eps * np.log(1 / eps) ** 2:
        return set()
    v = vectors[:, -1].reshape(d, d)
    p = np.array([(row @ v @ row - np.trace(v)) / np.sqrt(2) for row in y])
    deviations = np.abs(p - np.median(p))
    for i, deviation in enumerate(sorted(deviations), 1):
        t = deviation - 3
        if t <= 0:
            continue
        allowed = 1 if t <= 10 * np.log(1 / eps) else 3 * eps / (t * np.log(t)) ** 2
        if i / n >= allowed:
            return set(np.flatnonzero(deviations > t).tolist())
    return set()


def test_whitening_and_scores_are_those_of_plain_numpy() -> None:
    x = poisoned(80, 5, 8, 9.0)
    rows = torch.arange(80) >= 10
    white = whiten(x, rows)
    assert torch.allclose(torch.cov(white[rows].T, correction=0), torch.eye(5, dtype=torch.float64), atol=1e-9)
    assert np.allclose(que(white, 4.0).numpy(), slow_scores(x.numpy(), rows.numpy(), 4.0), rtol=1e-8)
    assert np.allclose(que(whiten(x, rows), 1.5).numpy(), slow_scores(x.numpy(), rows.numpy(), 1.5), rtol=1e-8)
    small = 0.5 * white / white.std()  # less variance than trusted everywhere: all directions weigh alike
    assert torch.allclose(que(small * 0.1, 4.0), (small * 0.1).square().mean(1))


@pytest.mark.parametrize("k", [1, 2, 6])
def test_top_direction_is_the_first_eigenvector_of_the_outer_products(k: int) -> None:
    x = poisoned(60, k, 5, 8.0)
    y = whiten(x, torch.ones(60, dtype=torch.bool))
    value, v = top_direction(y)
    z = np.stack([np.outer(row, row).ravel() for row in y.numpy()])
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True).reshape(k * k, k * k))
    assert value == pytest.approx(values[-1], rel=1e-6)
    assert abs(float(v.flatten() @ torch.from_numpy(vectors[:, -1].copy()))) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("bad", "shift", "eps"), [(6, 200.0, 0.02), (8, 12.0, 0.001), (8, 9.0, 0.0005), (0, 0.0, 0.1)])
def test_a_filter_step_drops_what_the_written_out_one_drops(bad: int, shift: float, eps: float) -> None:
    x = poisoned(200, 4, bad, shift)
    found = outliers(x, eps, 0.1)
    assert set(found.tolist()) == slow_filter(x.numpy(), eps, 0.1)
    assert bool(len(found)) == bool(bad)
    many = poisoned(2000, 3, 1, 1e4)
    assert outliers(many, 0.05, 0.1).tolist() == [0]  # so far out that no direction is looked for


def test_tail_is_the_released_bound() -> None:
    assert tail(10 * np.log(1 / 0.1), 0.1) == 1
    assert tail(40.0, 0.1) == pytest.approx(0.3 / (40 * np.log(40)) ** 2)


def test_the_estimator_keeps_within_its_limit() -> None:
    x = poisoned(200, 4, 8, 12.0)
    kept = trusted(x, 0.001, 0.1, 5)
    assert int((~kept).sum()) == 5 and bool((~kept[:8]).sum() == 5)
    rest = np.arange(200)
    for _ in range(2):
        out = slow_filter(x.numpy()[rest], 0.001, 0.1)
        assert out
        rest = np.delete(rest, sorted(out))
    assert torch.equal(trusted(x, 0.001, 0.1, 200 - len(rest)).nonzero()[:, 0], torch.from_numpy(rest))
    assert bool(trusted(poisoned(200, 4, 0, 0.0), 0.1, 0.1, 40).all())


def test_principal_directions_are_singular_vectors_with_an_inverse() -> None:
    r = poisoned(30, 8, 0, 0.0) + 3
    u, s, _ = torch.linalg.svd(r - r.mean(0), full_matrices=False)
    assert torch.allclose(principal(r, 5).abs(), (u[:, :5] * s[:5]).abs(), atol=1e-9)
    assert principal(r, 100).shape == (30, 8)
    assert principal(r[:10], 100).shape == (10, 5)
    assert principal(torch.cat([r, r], 1), 100).shape == (30, 8)
    assert principal(torch.ones(6, 3, dtype=torch.float64), 100).shape == (6, 0)


def test_the_dimensions_taken_leave_the_largest_excess() -> None:
    x = poisoned(120, 9, 6, 14.0)
    x = x - x.mean(0)
    k, scores = Spectre().best(x, 6)
    excess = {}
    for dims in (1, 2, 3, 4, 5, 6, 8, 9):  # (1 + 2 i / 9)^2 rounded
        kept = trusted(x[:, :dims], 6 / 120, 0.1, 12)
        if dims == 1:
            each = (x[:, 0] / x[kept, 0].std(correction=0)).square().numpy()
        else:
            each = slow_scores(x[:, :dims].numpy(), kept.numpy(), 4.0)
        rest = np.ones(120, dtype=bool)
        rest[np.argsort(-each)[:9]] = False
        excess[dims] = (slow_scores(x.numpy(), rest, 4.0).mean(), each)
    wanted = max(excess, key=lambda d: excess[d][0])
    assert k == wanted == 9  # the shift is in the last direction
    assert np.allclose(scores.numpy(), excess[wanted][1], rtol=1e-6)
    assert set(scores.argsort(descending=True)[:6].tolist()) == set(range(6))


def test_planted_rows_of_a_class_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.full((160,), 1), torch.full((100,), 4), torch.full((8,), 7)])
    labels = labels[torch.randperm(len(labels), generator=gen)]
    r = torch.randn(len(labels), 6, generator=gen) * torch.tensor([9, 5, 3, 1, 0.5, 0.1])
    planted = (labels == 1).nonzero()[:8, 0]
    r[planted, 5] += 2  # along a direction that hardly counts in the plain covariance
    monkeypatch.setattr("sleeperbench.defenses.spectre.features", lambda net, images, ctx: r)
    c = case(train=replace(samples.random_images(len(labels)), labels=labels))
    outcome = Spectre().run(c)
    dropped = ~outcome.keep
    assert bool(dropped[planted].all())
    assert [int(dropped[labels == k].sum()) for k in (1, 4, 7)] == [12, 8, 0]
    for k in (1, 4):  # the highest of each class, and no other
        of = labels == k
        assert float(outcome.suspicion[of & dropped].min()) >= float(outcome.suspicion[of & ~dropped].max())
    assert set(outcome.chosen["dimensions"]) == {"1", "4"} and outcome.chosen["dropped"] == 20
    assert torch.equal(outcome.suspicion, Spectre().run(c).suspicion)


def test_settings_are_the_published_ones_and_the_model_stays() -> None:
    method = Spectre()
    assert (method.alpha, method.tau, method.dimensions) == (4.0, 0.1, 100)
    c = case(train=samples.digits()["train"].rows(torch.arange(120)))
    before = pack(c.net).state
    assert Spectre(dimensions=4).run(c).keep.shape == (120,) and c.ctx.cost.forwards == 120
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())


@pytest.mark.parametrize("bad", [{"eps": 0.0}, {"eps": 0.5}, {"tau": 1.0}, {"dimensions": 0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Spectre(**bad)
