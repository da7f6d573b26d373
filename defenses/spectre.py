"""SPECTRE: whiten a class's features by a robust covariance, so that what poison adds to it stands out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.taps import features

C = 10.0
"""The constant of the robust estimator's tests (Diakonikolas et al. 2017), as released."""
SHIFT = 3.0
"""What the estimator's tail test takes off a deviation, as released."""
KRYLOV = 30
"""Steps of Lanczos per start, as in the library that the released code calls."""


@dataclass(frozen=True, kw_only=True)
class Spectre(Defense):
    """Robust whitening, then quantum entropy (QUE) scores; the highest are dropped (Hayase et al. 2021).

    1. Take the penultimate features of all training rows, without augmentation, from the model trained on them.
    2. Per class by training label, with b = round(eps N_class): for each k of 1, 4, 9, 16, 25, 36, 49, 64, 81, 100,
       a. project the centred features on their top k principal directions;
       b. robust covariance: while the covariance of the whitened outer products yy' has a direction of more variance
          than normal rows would, drop the rows furthest along it; 2 b rows at most;
       c. whiten all rows by the covariance of the kept ones; S' is the covariance of the result;
       d. M = exp(alpha (S' - I) / (|S'| - 1)) / trace; a row's score is x' M x; round(1.5 b) highest are candidates.
    3. Take the k whose candidates, once left out of the covariance in 100 dimensions that whitens, leave the largest
       tr(S' M): the score of step 2d of all rows on average.
    4. Drop the candidates of every class.

    Retraining on the rest is the wrapper `retrain`.

    Differs: `eps` is an upper bound that the paper's defender knows, and the paper's defender knows the target class;
    here `eps` is the same for every attack, whatever the true rate, and every class loses rows. Classes of fewer than
    200 rows have fewer dimensions: half their rows, and as many as the features vary in. At k = 1 rows are scaled to
    unit variance, which changes no ranking; step 3 whitens with divisor N instead of N - 1. `suspicion` is the score
    under the k taken, not scaled between classes.

    Args:
        eps: Assumed share of poisoned rows in a class, 0..1; 1.5 times as many are dropped.
        alpha: Weight of the directions with most variance in the score.
        tau: Failure probability of the robust estimator.
        dimensions: Most principal directions; the ten k are spaced evenly by their square roots.
    """

    INFO = {
        "title": "SPECTRE",
        "paper": "https://arxiv.org/abs/2104.11315",
        "bibtex": "@inproceedings{hayase2021spectre, title={{SPECTRE}: Defending Against Backdoor Attacks Using Robust "
        "Statistics}, author={Hayase, Jonathan and Kong, Weihao and Somani, Raghav and Oh, Sewoong}, "
        "booktitle={International Conference on Machine Learning}, year={2021}}",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {},
        "effort": ["dimensions"],
        "traverses": True,
        "presumes": "triggered rows, of a share known beforehand, that stand out along few directions of features",
    }
    ACCESS = Access(clean=0, train=True)
    REQUIRES = frozenset({"linear_head"})

    eps: float = 0.05
    alpha: float = 4.0
    tau: float = 0.1
    dimensions: int = 100

    def __post_init__(self) -> None:
        if not 0 < 2 * self.eps < 1 or not 0 < self.tau < 1 or self.dimensions < 1:
            raise ValueError(f"eps is {self.eps}, tau {self.tau}, dimensions {self.dimensions}: out of range")

    def run(self, case: Case) -> Outcome:
        """Which rows to keep, and how suspicious each is."""
        labels = case.train.labels.cpu()
        r = features(case.net, case.train.images, ctx=case.ctx).cpu().double()
        suspicion = torch.zeros(len(labels), dtype=torch.float64)
        keep = torch.ones(len(labels), dtype=torch.bool)
        taken: dict[str, int] = {}
        classes = labels.unique().tolist()
        for i, label in enumerate(classes):
            rows = (labels == label).nonzero()[:, 0]
            x = principal(r[rows], self.dimensions)
            budget = round(self.eps * len(rows))
            if x.shape[1] and budget:
                k, scores = self.best(x, budget)
                suspicion[rows], taken[str(label)] = scores, k
                keep[rows[highest(scores, round(1.5 * budget))]] = False
            case.ctx.progress(i + 1, len(classes), "classes")
        return Outcome(
            keep=keep,
            suspicion=suspicion,
            chosen={"dropped": int((~keep).sum()), "rows": len(keep), "dimensions": taken},
        )

    def best(self, x: Tensor, budget: int) -> tuple[int, Tensor]:
        """The number of dimensions taken, and the scores (N,) under it, for principal components `x` (N, D)."""
        found: list[tuple[float, int, Tensor]] = []
        ladder = (torch.linspace(1, math.sqrt(x.shape[1]), 10, dtype=torch.float64) ** 2).round().long()
        for k in ladder.unique().tolist():
            part = x[:, :k]
            scores = que(whiten(part, trusted(part, budget / len(x), self.tau, 2 * budget)), self.alpha)
            rest = torch.ones(len(x), dtype=torch.bool)
            rest[highest(scores, round(1.5 * budget))] = False
            found.append((float(que(whiten(x, rest), self.alpha).mean()), k, scores))
        _, k, scores = max(found, key=lambda f: f[0])
        return k, scores


def principal(r: Tensor, most: int) -> Tensor:
    """The rows of `r` (N, D), centred, in their top principal directions: (N, at most `most`).

    Directions without variance are left out, and so are those beyond half the number of rows, since a covariance from
    fewer rows than dimensions has no inverse.
    """
    u, s, _ = torch.linalg.svd(r - r.mean(0), full_matrices=False)
    k = min(most, len(r) // 2, int((s > s[0] * 1e-6).sum()))
    return u[:, :k] * s[:k]


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count]


def whiten(x: Tensor, rows: Tensor) -> Tensor:
    """`x` (N, K) times the inverse root of the covariance of those of its rows that `rows` (N,) marks."""
    return x @ _inverse_root(torch.cov(x[rows].T, correction=0).reshape(x.shape[1], -1))


def que(x: Tensor, alpha: float) -> Tensor:
    """QUE scores (N,) of whitened rows `x` (N, K): x' M x."""
    k = x.shape[1]
    excess = torch.cov(x.T).reshape(k, k) - torch.eye(k, dtype=x.dtype)
    top = float(torch.linalg.eigvalsh(excess)[-1])
    if top <= 0:  # no direction varies more than the rows trusted
        return x.square().mean(1)
    m = torch.linalg.matrix_exp(alpha * excess / top)
    return ((x @ m) * x).sum(1) / m.trace()


def trusted(x: Tensor, eps: float, tau: float, most: int) -> Tensor:
    """The rows (N,) that the robust covariance estimator keeps of centred rows `x` (N, K)."""
    keep = torch.arange(len(x))
    while most > 0:
        out = outliers(x[keep], eps, tau)
        if not len(out):
            break
        out = out[:most]
        most -= len(out)
        stays = torch.ones(len(keep), dtype=torch.bool)
        stays[out] = False
        keep = keep[stays]
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[keep] = True
    return mask


def outliers(x: Tensor, eps: float, tau: float) -> Tensor:
    """One filter step: positions of the rows to drop, the furthest first; empty where the covariance can be trusted."""
    n, k = x.shape
    y = x @ _inverse_root(x.T @ x / n)
    lengths = y.square().sum(1)
    far = highest(lengths, int((lengths >= C * k * math.log(n / tau)).sum()))
    if len(far):
        return far
    value, v = top_direction(y)
    # Half the variance of y' V y for normal y and |V| = 1 would be a factor here; it is 1.
    if value <= 1 + C * eps * math.log(1 / eps) ** 2:
        return far
    v = (v + v.T) / 2
    p = ((y @ v) * y).sum(1) / math.sqrt(2) - v.trace() / math.sqrt(2)
    deviations = (p - _median(p)).abs()
    for i, deviation in enumerate(deviations.sort().values.tolist(), start=1):
        t = deviation - SHIFT
        if t > 0 and i / n >= tail(t, eps):
            return highest(deviations, int((deviations > t).sum()))
    return far


def tail(t: float, eps: float) -> float:
    """Share of rows that may deviate by more than `t`."""
    return 1.0 if t <= 10 * math.log(1 / eps) else 3 * eps / (t * math.log(t)) ** 2


def top_direction(y: Tensor) -> tuple[float, Tensor]:
    """Largest eigenvalue, and its eigenvector as a matrix (K, K), of the covariance of yy' over whitened rows `y`.

    Restarted Lanczos: the covariance, K^2 x K^2, is never formed.
    """
    n, k = y.shape
    eye = torch.eye(k, dtype=y.dtype)

    def times(v: Tensor) -> Tensor:
        # E[yy'] = I, since y is whitened by its own covariance.
        return (y.T * ((y @ v) * y).sum(1)) @ y / n - eye * v.trace()

    v = torch.ones(k, k, dtype=y.dtype) / k
    value = 0.0
    for _ in range(10):
        basis, images = [v], [times(v)]
        while len(basis) < min(KRYLOV, k * (k + 1) // 2):
            w = images[-1]
            for _ in range(2):  # once more against rounding
                w = w - sum(((b * w).sum() * b for b in basis), torch.zeros_like(w))
            if float(w.norm()) <= 1e-10 * max(1.0, float(images[0].norm())):
                break
            basis.append(w / w.norm())
            images.append(times(basis[-1]))
        q, a = torch.stack(basis).flatten(1), torch.stack(images).flatten(1)
        values, vectors = torch.linalg.eigh((q @ a.T + a @ q.T) / 2)
        value, best = float(values[-1]), vectors[:, -1]
        v = (best @ q).view(k, k)
        v = v / v.norm()
        if float(((best @ a).view(k, k) - value * v).norm()) <= 1e-6 * max(1.0, value):
            break
    return value, v


def _inverse_root(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return vectors / values.clamp(min=1e-12 * float(values[-1])).sqrt() @ vectors.T


def _median(p: Tensor) -> Tensor:
    ordered = p.sort().values
    return (ordered[(len(p) - 1) // 2] + ordered[len(p) // 2]) / 2
