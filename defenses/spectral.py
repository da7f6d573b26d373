"""Spectral signatures: poisoned rows stick out along their class's first principal direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.taps import features


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Defense):
    """Drop the rows with the largest squared projection on their class's top singular vector (Tran et al. 2018).

    1. Take the penultimate features of all training rows, without augmentation, from the model trained on them.
    2. Per class by training label: centre them, find the top right singular vector v.
    3. A row's score is <r - mean, v>^2; the round(1.5 eps N_class) highest of each class are dropped.

    Retraining on the rest is the wrapper `retrain`.

    Differs: `eps` is an upper bound that the paper's defender knows; here it is the same for every attack, whatever the
    true rate, and classes without poison lose rows too. `suspicion` is the score itself, not scaled between classes.

    Args:
        eps: Assumed share of poisoned rows in a class, 0..1; 1.5 times as many are dropped.
    """

    INFO = {
        "title": "Spectral signatures",
        "paper": "https://arxiv.org/abs/1811.00636",
        "bibtex": "@inproceedings{tran2018spectral, title={Spectral Signatures in Backdoor Attacks}, author={Tran, "
        "Brandon and Li, Jerry and Madry, Aleksander}, booktitle={Advances in Neural Information Processing Systems}, "
        "year={2018}}",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {},
        "traverses": True,
        "presumes": "triggered rows, of a share known beforehand, that stand out along one direction of features",
    }
    ACCESS = Access(clean=0, train=True)
    REQUIRES = frozenset({"linear_head"})

    eps: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < 1.5 * self.eps < 1:
            raise ValueError(f"eps is {self.eps}: 1.5 times it must be a share between 0 and 1")

    def run(self, case: Case) -> Outcome:
        """Which rows to keep, and how suspicious each is."""
        labels = case.train.labels
        r = features(case.net, case.train.images, ctx=case.ctx).cpu().double()
        suspicion = torch.zeros(len(labels), dtype=torch.float64)
        keep = torch.ones(len(labels), dtype=torch.bool)
        for label in labels.unique():
            rows = (labels == label).nonzero()[:, 0]
            suspicion[rows] = outlyingness(r[rows])
            drop = round(1.5 * self.eps * len(rows))
            keep[rows[suspicion[rows].argsort(descending=True, stable=True)[:drop]]] = False
        return Outcome(keep=keep, suspicion=suspicion, chosen={"dropped": int((~keep).sum()), "rows": len(keep)})


def outlyingness(r: Tensor) -> Tensor:
    """Squared projections (N,) of the centred rows of `r` (N, D) on their top right singular vector."""
    centred = r - r.mean(0)
    # Right singular vectors are the eigenvectors of the scatter matrix, whose size does not grow with the rows.
    v = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return (centred @ v).square()
