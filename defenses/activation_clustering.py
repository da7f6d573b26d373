"""Activation clustering: the features of a poisoned class fall into two clusters of unequal size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.taps import features

FEWEST = 3
"""Two clusters and a silhouette need this many rows."""


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Defense):
    """Split each class's features in two clusters and drop the smaller one where it is small (Chen et al. 2018).

    1. Take the penultimate features of all training rows, without augmentation, from the model trained on them.
    2. Per class by training label: reduce them to `components` independent components (FastICA), or principal ones.
    3. 2-means on the reduced features.
    4. `rule` says which classes are poisoned: `size`, those whose smaller cluster holds less than the share `size` of
       the rows; `silhouette`, those of them whose mean silhouette also exceeds `silhouette`; `smaller`, all.
    5. The smaller cluster of a poisoned class is dropped.

    Retraining on the rest is the wrapper `retrain`.

    Differs: the paper's third analysis, a model trained without a cluster that classifies its rows, is left out.
    2-means is the best of ten starts. Features that vary in fewer directions than `components` keep as many as there
    are. `suspicion` is 1 - the share of a row's cluster in its class, whatever the rule.

    Args:
        components: Dimensions that features are reduced to.
        reduction: `ica` or `pca`.
        rule: `size`, `silhouette` or `smaller`.
        size: Share of a class's rows below which its smaller cluster is too small, 0..1.
        silhouette: Mean silhouette above which two clusters count as two, -1..1; for rule `silhouette`.
    """

    INFO = {
        "title": "Activation clustering",
        "paper": "https://arxiv.org/abs/1811.03728",
        "bibtex": "@inproceedings{chen2019activation, title={Detecting Backdoor Attacks on Deep Neural Networks by "
        "Activation Clustering}, author={Chen, Bryant and Carvalho, Wilka and Baracaldo, Nathalie and Ludwig, Heiko "
        "and Edwards, Benjamin and Lee, Taesung and Molloy, Ian and Srivastava, Biplav}, booktitle={Workshop on "
        "Artificial Intelligence Safety at AAAI}, year={2019}}",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {},
        "traverses": True,
        "presumes": "triggered rows that are a cluster of their own in the features, the smaller one",
    }
    ACCESS = Access(clean=0, train=True)
    REQUIRES = frozenset({"linear_head"})

    components: int = 10
    reduction: str = "ica"
    rule: str = "size"
    size: float = 0.35
    silhouette: float = 0.1

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 < self.size <= 0.5:
            raise ValueError(f"components is {self.components}, size {self.size}: give at least 1, and 0 to 0.5")
        if self.reduction not in ("ica", "pca") or self.rule not in ("size", "silhouette", "smaller"):
            raise ValueError(f"reduction {self.reduction!r} or rule {self.rule!r} is unknown")

    def run(self, case: Case) -> Outcome:
        """Which rows to keep, and how suspicious each is."""
        labels = case.train.labels.cpu()
        r = features(case.net, case.train.images, ctx=case.ctx).cpu().double()
        suspicion = torch.zeros(len(labels), dtype=torch.float64)
        keep = torch.ones(len(labels), dtype=torch.bool)
        shares: dict[str, float] = {}
        poisoned: list[int] = []
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:, 0]
            reduced = reduce(r[rows], self.components, self.reduction, case.ctx.derive("reduce", label))
            if reduced is None:
                continue
            small = smaller(reduced, case.ctx.derive("clusters", label))
            share = float(small.double().mean())
            suspicion[rows] = share + (1 - 2 * share) * small.double()
            shares[str(label)] = share
            if self.accuses(reduced, small):
                poisoned.append(label)
                keep[rows[small]] = False
        chosen = {"dropped": int((~keep).sum()), "rows": len(keep), "poisoned_classes": poisoned, "shares": shares}
        return Outcome(keep=keep, suspicion=suspicion, chosen=chosen)

    def accuses(self, reduced: Tensor, small: Tensor) -> bool:
        """Whether a class with these reduced features and this smaller cluster counts as poisoned."""
        if self.rule == "smaller":
            return True
        if not float(small.double().mean()) < self.size:
            return False
        if self.rule == "size":
            return True
        from sklearn.metrics import silhouette_score

        return float(silhouette_score(reduced.numpy(), small.numpy())) > self.silhouette


def reduce(r: Tensor, components: int, reduction: str, seed: int) -> Tensor | None:
    """The rows of `r` (N, D) in at most so many components, float64; None where no two clusters can be had of them."""
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning

    # Directions without variance would be divided by; rows that are all alike have no other.
    rank = int(torch.linalg.matrix_rank(r - r.mean(0))) if len(r) >= FEWEST else 0
    if rank == 0:
        return None
    n, state = min(components, rank), seed % 2**32
    made: Any = PCA(n, random_state=state)
    if reduction == "ica":
        made = FastICA(n, whiten="unit-variance", random_state=state)
    with warnings.catch_warnings():
        # Features need not be mixtures of independent sources; the components of the last iteration are taken.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torch.from_numpy(np.ascontiguousarray(made.fit_transform(r.numpy())))


def smaller(reduced: Tensor, seed: int) -> Tensor:
    """Which rows (N,) 2-means puts into the smaller cluster; of equal ones, that of the first row is kept."""
    from sklearn.cluster import KMeans

    found = torch.from_numpy(KMeans(2, n_init=10, random_state=seed % 2**32).fit_predict(reduced.numpy()))
    second = found != found[0]
    return second if 2 * int(second.sum()) <= len(second) else ~second
