"""Neural Cleanse: the class that a suspiciously small mask reaches is the target of a backdoor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.anomaly import LEAST, smallness
from sleeperbench.kit.masks import Masks, optimise_masks


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Defense):
    """Invert a trigger for every class; flag classes whose mask is an outlier below (Wang et al., S&P 2019).

    1. For each class t, minimise mean CE(f((1 - m) x + m p), t) + w |m|_1 over a mask m (one plane) and a pattern p on
       the clean rows, all rows towards every t.
    2. After each pass over the rows the weight w doubles after `patience` successful passes in a row and falls by
       2^1.5 after as many failed ones. The smallest successful mask of each class is kept. A class stops early.
    3. Anomaly index of class t: (median - |m_t|) / (1.4826 median absolute deviation). Classes above `threshold` are
       flagged; the model's score is the largest index, that of the smallest working mask. A class that no mask reached
       counts with its last one in median and deviation, and is never flagged.
    4. With `repetitions` above 1, steps 1 to 3 from other starts and orders of rows. The score is then the mean of the
       models' indices, as BELT reports it, and a class is flagged by the mean of its own; its claim is the smallest
       mask of all repetitions.

    Settings of BackdoorBench. The recovered triggers of flagged classes are the claims that the wrapper `unlearn`
    repairs with; norms and successes of all classes stand in `chosen`, and which were not inverted.

    Differs: masks and patterns start uniform in [0, 1], as the authors' do; BackdoorBench starts both at 0.88. Rows are
    not augmented. The norm kept is that of the mask kept, not the mean over the pass. A pass takes `updates` updates
    whatever the number of rows (BackdoorBench: 2,500 rows in batches of 256), so that fewer rows mean smaller batches
    and not fewer updates. Of a class that no mask reached BackdoorBench keeps the first one. With fewer than six
    classes the method is not applicable.

    Args:
        epochs: Passes over the clean rows, at most.
        updates: Updates per pass.
        lr: Learning rate of Adam.
        weight: w at the start.
        patience: Passes before w changes.
        success: Share of rows that must reach the class.
        stop_after: Passes without a smaller mask after which a class stops.
        threshold: Anomaly index above which a class is flagged.
        repetitions: Inversions that the index is averaged over (BELT: 10).
        batched: All classes in one pass through the net; False sends one class through at a time in every update, at
            the same result but for rounding: for timings.
    """

    INFO = {
        "title": "Neural Cleanse",
        "paper": "https://doi.org/10.1109/SP.2019.00031",
        "bibtex": "@inproceedings{wang2019neural, title={Neural Cleanse: Identifying and Mitigating Backdoor Attacks "
        "in Neural Networks}, author={Wang, Bolun and Yao, Yuanshun and Shan, Shawn and Li, Huiying and Viswanath, "
        "Bimal and Zheng, Haitao and Zhao, Ben Y.}, booktitle={IEEE Symposium on Security and Privacy}, "
        "pages={707--723}, year={2019}}",
        "kind": "inversion",
        "version": 2,
        "api": 1,
        "micro": {"epochs": 4, "updates": 4},
        "effort": ["epochs", "updates"],
        "traverses": True,
        "presumes": "a small mask and pattern, the same on all images of all other classes",
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
    repetitions: int = 1
    batched: bool = True

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise ValueError(f"repetitions is {self.repetitions}: give at least 1")

    def run(self, case: Case) -> Outcome:
        """The verdict, an index per class, and the recovered triggers of flagged classes.

        Raises:
            NotApplicable: too few classes for an outlier.
        """
        classes = case.spec.classes
        if classes < LEAST:
            raise NotApplicable(f"too_few_classes: {classes}; an outlier needs {LEAST}")
        # The first repetition draws what a single one draws.
        seeds = [case.ctx.derive("repetition", r) for r in range(1, self.repetitions)]
        contexts = [case.ctx, *(replace(case.ctx, seed=seed) for seed in seeds)]
        runs = [
            optimise_masks(
                case.net,
                case.clean.images,
                torch.arange(classes),
                ctx=ctx,
                epochs=self.epochs,
                batch=math.ceil(len(case.clean) / self.updates),
                lr=self.lr,
                weight=self.weight,
                factor=2.0,
                patience=self.patience,
                success=self.success,
                stop_after=self.stop_after,
                at_once=0 if self.batched else 1,
            )
            for ctx in contexts
        ]
        found = smallest(runs)
        indices = torch.stack([smallness(sizes(run), ~run.norm.isnan()) for run in runs])
        index, score = indices.mean(0), float(indices.amax(1).mean())
        claimed = [int(t) for t in (index > self.threshold).nonzero().flatten()]
        return Outcome(
            verdict=Verdict(score=score, threshold=self.threshold, label_scores=index),
            inverted=tuple(Inverted(target=t, mask=found.mask[t], pattern=found.pattern[t]) for t in claimed),
            chosen={
                "claimed": claimed,
                "norms": [round(n, 4) for n in sizes(found).tolist()],
                "not_inverted": found.norm.isnan().nonzero().flatten().tolist(),
                "successes": [round(s, 4) for s in found.success.tolist()],
                "curves": drawn(indices, self.threshold),
            },
        )


def smallest(runs: Sequence[Masks]) -> Masks:
    """Per class the mask of smallest norm among several runs; of the first where none has a norm."""
    norms = torch.stack([run.norm for run in runs])
    best = norms.nan_to_num(nan=torch.inf).argmin(0)
    at = torch.arange(norms.shape[1])
    parts = {n: torch.stack([getattr(run, n) for run in runs])[best, at] for n in ("mask", "pattern", "success")}
    return Masks(norm=norms[best, at], **parts)


def sizes(found: Masks) -> Tensor:
    """Norms (K,) of the masks; of a class that was never reached that of its last mask."""
    return torch.where(found.norm.isnan(), found.mask.flatten(1).sum(1), found.norm)


def drawn(indices: Tensor, threshold: float) -> dict[str, Any]:
    """Index by class, and the model's by repetition where there are several, as a cell page draws them.

    Args:
        indices: float64 (repetitions, K), larger is more suspicious.
        threshold: Index above which a class is flagged.
    """
    ends = {"low": indices.amin(0).tolist(), "high": indices.amax(0).tolist()} if len(indices) > 1 else {}
    bars = {"label": "", "x": [str(t) for t in range(indices.shape[1])], "y": indices.mean(0).tolist(), **ends}
    made = {
        "index": {
            "title": "Anomaly index of each class's mask" + (", mean, lowest and highest repetition" if ends else ""),
            "x_label": "class",
            "y_label": "anomaly index",
            "threshold": threshold,
            "series": [bars],
        }
    }
    if ends:
        each = indices.amax(1).tolist()
        x = list(range(1, len(each) + 1))
        mean = {"label": "mean", "x": [x[0], x[-1]], "y": [sum(each) / len(each)] * 2}
        made["repetitions"] = {
            "title": "Largest anomaly index of each repetition, and their mean",
            "x_label": "repetition",
            "y_label": "anomaly index",
            "threshold": threshold,
            "series": [{"label": "repetitions", "x": x, "y": each, "points": True}, mean],
        }
    return made
