"""Neural Cleanse: the class that a suspiciously small mask reaches is the target of a backdoor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.anomaly import LEAST, anomaly_index
from sleeperbench.kit.masks import optimise_masks

_INFINITE = 1e6
"""Stands for an infinite index, which tables cannot hold."""


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Defense):
    """Invert a trigger for every class; flag classes whose mask is an outlier below (Wang et al., S&P 2019).

    1. For each class t, minimise mean CE(f((1 - m) x + m p), t) + w |m|_1 over a mask m (one plane) and a pattern p on
       the clean rows, all rows towards every t.
    2. After each pass over the rows the weight w doubles after `patience` successful passes in a row and falls by
       2^1.5 after as many failed ones. The smallest successful mask of each class is kept. A class stops early.
    3. Anomaly index of class t: (median - |m_t|) / (1.4826 median absolute deviation). Classes above `threshold` are
       flagged; the model's score is the largest index, that of the smallest mask.

    Settings of BackdoorBench. The recovered triggers of flagged classes are the claims that the wrapper `unlearn`
    repairs with; norms and successes of all classes stand in `chosen`.

    Differs: masks and patterns start uniform in [0, 1], as the authors' do; BackdoorBench starts both at 0.88. Rows are
    not augmented. The norm kept is that of the mask kept, not the mean over the pass. A pass takes `updates` updates
    whatever the number of rows (BackdoorBench: 2,500 rows in batches of 256), so that fewer rows mean smaller batches
    and not fewer updates. A class whose mask never succeeds has no norm and counts in no median; BackdoorBench keeps
    its first mask. With fewer than six such norms nothing is flagged (score 0), with fewer than six classes the method
    is not applicable.

    Args:
        epochs: Passes over the clean rows, at most.
        updates: Updates per pass.
        lr: Learning rate of Adam.
        weight: w at the start.
        patience: Passes before w changes.
        success: Share of rows that must reach the class.
        stop_after: Passes without a smaller mask after which a class stops.
        threshold: Anomaly index above which a class is flagged.
    """

    INFO = {
        "title": "Neural Cleanse",
        "paper": "https://doi.org/10.1109/SP.2019.00031",
        "bibtex": "@inproceedings{wang2019neural, title={Neural Cleanse: Identifying and Mitigating Backdoor Attacks "
        "in Neural Networks}, author={Wang, Bolun and Yao, Yuanshun and Shan, Shawn and Li, Huiying and Viswanath, "
        "Bimal and Zheng, Haitao and Zhao, Ben Y.}, booktitle={IEEE Symposium on Security and Privacy}, "
        "pages={707--723}, year={2019}}",
        "kind": "inversion",
        "version": 1,
        "api": 1,
        "micro": {"epochs": 4, "updates": 4},
        "effort": ["epochs", "updates"],
    }
    ACCESS = Access(clean=0.05)

    epochs: int = 80
    updates: int = 10
    lr: float = 0.1
    weight: float = 1e-3
    patience: int = 5
    success: float = 0.98
    stop_after: int = 25
    threshold: float = 2.0

    def run(self, case: Case) -> Outcome:
        """The verdict, an index per class, and the recovered triggers of flagged classes.

        Raises:
            NotApplicable: too few classes for an outlier.
        """
        classes = case.spec.classes
        if classes < LEAST:
            raise NotApplicable(f"too_few_classes: {classes}; an outlier needs {LEAST}")
        found = optimise_masks(
            case.net,
            case.clean.images,
            torch.arange(classes),
            ctx=case.ctx,
            epochs=self.epochs,
            batch=math.ceil(len(case.clean) / self.updates),
            lr=self.lr,
            weight=self.weight,
            factor=2.0,
            patience=self.patience,
            success=self.success,
            stop_after=self.stop_after,
        )
        index = suspicion(found.norm)
        claimed = [int(t) for t in (index > self.threshold).nonzero().flatten()]
        return Outcome(
            verdict=Verdict(score=float(index.max()), threshold=self.threshold, label_scores=index),
            inverted=tuple(Inverted(target=t, mask=found.mask[t], pattern=found.pattern[t]) for t in claimed),
            chosen={
                "claimed": claimed,
                "norms": [None if math.isnan(n) else round(n, 4) for n in found.norm.tolist()],
                "successes": [round(s, 4) for s in found.success.tolist()],
            },
        )


def suspicion(norms: Tensor) -> Tensor:
    """Anomaly index (K,) of small norms: larger is smaller; classes without a norm share the lowest one."""
    index = -anomaly_index(norms)
    known = index[~index.isnan()]
    lowest = float(known.min()) if len(known) else 0.0
    return index.nan_to_num(nan=lowest).clamp(-_INFINITE, _INFINITE)
