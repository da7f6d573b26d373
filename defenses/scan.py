"""SCAn: a class whose features are better explained by two identities than by one holds poison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.anomaly import anomaly_index
from sleeperbench.kit.taps import features

LARGEST = 1e6
"""What an anomaly index without bound is written as."""


@dataclass(frozen=True, kw_only=True)
class SCAn(Defense):
    """Decompose features into identity and variation; test each class for two identities (Tang et al. 2021).

    1. Take the penultimate features of clean and training rows, without augmentation, from the model trained on them.
    2. Global model, on the clean rows: r = mu_class + e with mu ~ N(0, S_mu), e ~ N(0, S_e), fitted by EM. E: each
       class's mu is its posterior mean; M: S_mu and S_e are the covariances of mu and r - mu over the rows.
    3. Per class, of training and clean rows together: split into two groups by 2-means in the metric of S_e^-1.
    4. J is the mean over the class of twice the log-likelihood ratio of two identities (the groups' means) against one
       (the posterior mean), both with S_e. A class is contaminated where |J - median| / (1.4826 MAD) exceeds
       `threshold`, median and MAD over classes.
    5. In a contaminated class the group with fewer of the class's clean rows is dropped; of equally many, the smaller
       group of training rows.

    Retraining on the rest is the wrapper `retrain`.

    Differs: S_e gets a ridge, since the clean rows may be fewer than the features are wide; released code takes the
    pseudo-inverse, which is blind to directions in which the clean rows do not vary. 2-means is the best of ten starts,
    not one random start. J is the mean over rows, as in the authors' released code; the paper compares the sum. With
    fewer than six classes none can be an outlier.

    Args:
        threshold: Anomaly index above which a class is contaminated; exp(2) in the paper.
        ridge: Added to the diagonal of S_e wherever it is inverted, as a share of its mean diagonal.
        iterations: Most iterations of EM.
        tolerance: EM stops when both covariances together move by less (Frobenius norms).
    """

    INFO = {
        "title": "SCAn",
        "paper": "https://arxiv.org/abs/1908.00686",
        "bibtex": "@inproceedings{tang2021demon, title={Demon in the Variant: Statistical Analysis of {DNNs} for "
        "Robust Backdoor Contamination Detection}, author={Tang, Di and Wang, XiaoFeng and Tang, Haixu and Zhang, "
        "Kehuan}, booktitle={USENIX Security Symposium}, year={2021}}",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {},
        "traverses": True,
        "presumes": "triggered rows with an identity of their own in the features, in a minority of the classes",
    }
    ACCESS = Access(clean=0.05, train=True)
    REQUIRES = frozenset({"linear_head"})

    threshold: float = 7.38905609893065
    ridge: float = 0.001
    iterations: int = 100
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.ridge <= 0 or self.iterations < 1:
            raise ValueError(f"ridge is {self.ridge}, iterations {self.iterations}: give more than 0, and at least 1")

    def run(self, case: Case) -> Outcome:
        """Which rows to keep; suspicion is the class's index for rows of the group that would be dropped, else 0.

        Raises:
            NotApplicable: `too_few_clean_rows`, the clean rows of no class differ from each other.
        """
        labels, clean = case.train.labels.cpu(), case.clean.labels.cpu()
        known, r = (features(case.net, d.images, ctx=case.ctx).cpu().double() for d in (case.clean, case.train))
        between, within = decompose(known, clean, self.ridge, self.iterations, self.tolerance)

        n = len(labels)
        x = torch.cat([r, known])
        x, y = x - x.mean(0), torch.cat([labels, clean])
        classes, index = labels.unique().tolist(), torch.full((len(labels.unique()),), torch.nan, dtype=torch.float64)
        sums = torch.stack([x[y == k].sum(0) for k in classes])
        counts = torch.tensor([int((y == k).sum()) for k in classes])
        root = torch.linalg.cholesky(within)
        # In these coordinates S_e is the identity.
        white, one = (
            torch.linalg.solve_triangular(root, v.T, upper=False).T
            for v in (x, identities(sums, counts, between, within))
        )
        suspects = torch.zeros(n, dtype=torch.bool)
        for i, label in enumerate(classes):
            rows = (y == label).nonzero()[:, 0]
            second = split(white[rows], case.ctx.derive("split", label))
            if second is None:
                continue
            index[i] = ratio(white[rows], second, one[i])
            mine = rows < n
            suspect = second if minor(second[mine], second[~mine]) else ~second
            suspects[rows[mine & suspect]] = True
        statistic, index = index, anomaly_index(index).abs().nan_to_num(nan=0.0, posinf=LARGEST)
        at = torch.tensor(classes)
        suspicion = torch.zeros(n, dtype=torch.float64)
        for label, value in zip(classes, index.tolist(), strict=True):
            suspicion[suspects & (labels == label)] = value
        keep = suspicion <= self.threshold
        chosen = {
            "dropped": int((~keep).sum()),
            "rows": n,
            "clean_rows": len(clean),
            "contaminated_classes": at[index > self.threshold].tolist(),
            "index": {str(k): v for k, v in zip(classes, index.tolist(), strict=True)},
            "statistic": {str(k): v for k, v in zip(classes, statistic.tolist(), strict=True) if v == v},
        }
        return Outcome(keep=keep, suspicion=suspicion, chosen=chosen)


def decompose(r: Tensor, y: Tensor, ridge: float, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Covariances S_mu and S_e (with its ridge) of clean features `r` (N, D) with labels `y`, by EM."""
    x = r - r.mean(0)
    classes, place = y.unique(return_inverse=True)
    counts = place.bincount(minlength=len(classes))
    sums = torch.zeros(len(classes), x.shape[1], dtype=x.dtype).index_add_(0, place, x)
    means = sums / counts[:, None]
    between, within = torch.cov(means[place].T), torch.cov((x - means[place]).T)
    if not float(within.trace()) > 0:
        raise NotApplicable(f"too_few_clean_rows: {len(r)} rows of {len(classes)} classes do not vary within classes")
    for _ in range(iterations):
        means = identities(sums, counts, between, _ridged(within, ridge))
        before = between, within
        between, within = torch.cov(means[place].T), torch.cov((x - means[place]).T)
        if float((between - before[0]).norm() + (within - before[1]).norm()) < tolerance:
            break
    return between, _ridged(within, ridge)


def identities(sums: Tensor, counts: Tensor, between: Tensor, within: Tensor) -> Tensor:
    """Posterior means (K, D) of the classes' mu: S_mu (n S_mu + S_e)^-1 of the sum of a class's n centred rows."""
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, between, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    # Both covariances are diagonal in these coordinates, so one decomposition serves every count n.
    values = values.clamp(min=0)
    along = torch.linalg.solve_triangular(root, sums.T, upper=False).T @ vectors
    return (along * values / (counts[:, None] * values + 1)) @ (root @ vectors).T


def split(white: Tensor, seed: int) -> Tensor | None:
    """The rows (N,) of the second of two groups by 2-means; None where rows are alike or fewer than two."""
    if len(white) < 2 or not bool((white != white[0]).any()):
        return None
    from sklearn.cluster import KMeans

    return torch.from_numpy(KMeans(2, n_init=10, random_state=seed % 2**32).fit_predict(white.numpy()) == 1)


def ratio(white: Tensor, second: Tensor, one: Tensor) -> float:
    """J: twice the mean log-likelihood of two groups' means over that of `one`, where S_e is the identity."""
    two = torch.where(second[:, None], white[second].mean(0), white[~second].mean(0))
    return float(((white - one).square() - (white - two).square()).sum(1).mean())


def minor(train: Tensor, clean: Tensor) -> bool:
    """Whether the second group is the one to drop: it has fewer clean rows, of equally many fewer training rows."""
    mine, others = int(clean.sum()), int((~clean).sum())
    return mine < others or (mine == others and int(train.sum()) <= int((~train).sum()))


def _ridged(within: Tensor, ridge: float) -> Tensor:
    return within + ridge * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
