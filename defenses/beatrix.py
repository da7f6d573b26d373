"""Beatrix: the features of a triggered image are correlated otherwise than those of the class that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.anomaly import LEAST, anomaly_index, bounded
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.taps import capture, look, taps

_FOLDS = 5
_TINY = 1e-6
"""Beside bounds and thresholds that may be 0."""
_BATCH = 250
"""Images per forward pass."""
_ENTRIES = 2**23
"""Entries of Gram matrices at a time."""


@dataclass(frozen=True, kw_only=True)
class Beatrix(Defense):
    """Gram matrices of features against their usual range per class (Ma et al., NDSS 2023).

    1. A, the answer (channels, places) of the last stage but one, gives Gram matrices of orders p = 1 ... `orders`:
       (A^p A^p')^(1/p), the powers by entry and the root with its sign; their upper triangles count.
    2. Per class, from `per_class` clean rows that get it: the range of an entry is its median +- `width` times the
       median distance from it.
    3. An input's deviation is the mean over all entries of (low - g) / |low| below the range, (g - high) / |high| above
       it, and 0 inside, in the range of the class that it gets.
    4. A class's threshold is the quantile `quantile` of the deviations of its clean rows, each held out in one of five
       folds from the rows that give the range. Inputs whose deviation exceeds it are suspects.
    5. Offline, over the training rows that get a class: J = mn / (m + n) MMD^2 between its suspects and the others, up
       to `group` rows each, on features averaged over places, the kernel exp(-2 d^2 / s) + exp(-d^2 / s) with s the
       median of all d^2; 0 without suspects.
    6. A class is a target of the attack where |J - median| / (1.4826 MAD) over classes exceeds `threshold`.

    An input's score is its deviation over its class's threshold; above 1 is an alarm. Training rows are judged alike;
    suspects among them are dropped. The verdict's score is the largest index of step 6.

    Differs: a class that fewer than five clean rows get is judged by `per_class` clean rows of any class and has no J.
    All rows are held out once; released code leaves out those that five folds of equal size do not take. 1e-6 stands
    beside denominators, where released code adds it inside the absolute value. Where fewer than six classes have a J
    there is no verdict.

    Args:
        per_class: Clean rows of a class, at most.
        orders: Largest order of Gram matrices.
        width: Median distances from the median to either end of the range.
        quantile: Share of clean rows below a class's threshold.
        group: Suspects and others, at most, that J is computed from.
        threshold: Index above which a class is a target; exp(2) in BackdoorBench.
    """

    INFO = {
        "title": "Beatrix",
        "paper": "https://arxiv.org/abs/2209.11715",
        "bibtex": "@inproceedings{ma2023beatrix, title={The ``{Beatrix}'' Resurrections: Robust Backdoor Detection via "
        "{Gram} Matrices}, author={Ma, Wanlun and Wang, Derui and Sun, Ruoxi and Xue, Minhui and Wen, Sheng and Xiang, "
        "Yang}, booktitle={Network and Distributed System Security Symposium}, year={2023}}",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {"orders": 3},
        "effort": ["orders"],
        "scores": True,
        "traverses": True,
        "presumes": "triggered images whose features are correlated otherwise than those of the class they get",
    }
    ACCESS = Access(clean=0.05, train=True)
    REQUIRES = frozenset({"linear_head"})

    per_class: int = 30
    orders: int = 8
    width: float = 10.0
    quantile: float = 0.95
    group: int = 500
    threshold: float = 7.38905609893065

    def __post_init__(self) -> None:
        if self.per_class < _FOLDS or min(self.orders, self.group) < 1:
            raise ValueError(f"per_class must be at least {_FOLDS}, orders and group at least 1")
        if not self.width > 0 or not 0 < self.quantile < 1:
            raise ValueError(f"width is {self.width}, quantile {self.quantile}: give more than 0, and a share")

    def run(self, case: Case) -> Outcome:
        """Ranges and thresholds, as the second phase needs them, which training rows to keep, and the verdict.

        Raises:
            NotApplicable: fewer than five clean rows, or no layer whose answer has places.
        """
        net, ctx, classes = case.net, case.ctx, case.spec.classes
        if len(case.clean) < _FOLDS:
            raise NotApplicable(f"too_few_clean_rows: {len(case.clean)}, and five folds need one each")
        device = device_of(net)
        site = place(net, to_float(case.clean.images[:1].to(device)))
        state = self.learn(net, site, case.clean.images, classes, ctx)

        value, pooled, labels = [], [], []
        for part in case.train.images.split(_BATCH):
            label, a = labelled(net, site, to_float(part.to(device)))
            value.append(self.judge(state, label, a))
            pooled.append(a.mean((2, 3)).double().cpu())
            labels.append(label.cpu())
            ctx.progress(sum(map(len, labels)), len(case.train), "training rows")
        ctx.cost.forwards += 1 + len(case.train)
        suspicion, x, y = (torch.cat(v) for v in (value, pooled, labels))

        own = state["own"]
        j = torch.full((classes,), torch.nan, dtype=torch.float64)
        for c in own.nonzero().flatten().tolist():
            mine, suspect = x[y == c], suspicion[y == c] > 1
            j[c] = discrepancy(mine[~suspect][: self.group], mine[suspect][: self.group])
        verdict, index = None, bounded(anomaly_index(j).abs())
        if int((~j.isnan()).sum()) >= LEAST:
            verdict = Verdict(score=float(index.max()), threshold=self.threshold, label_scores=index)
        keep = suspicion <= 1
        chosen = {
            "site": site,
            "classes_without_rows": (~own).nonzero().flatten().tolist(),
            "dropped": int((~keep).sum()),
            "rows": len(keep),
            "discrepancy": {str(c): v for c, v in enumerate(j.tolist()) if v == v},
        }
        return Outcome(
            keep=keep, suspicion=suspicion, verdict=verdict, state=(state, {"site": site}), alarm=1.0, chosen=chosen
        )

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: Classifier, x: Tensor) -> Tensor:
        """Deviation over the threshold of the class that the input gets, (N,) from 0; above 1 is an alarm."""
        parts = [self.judge(state[0], *labelled(net, state[1]["site"], part)) for part in x.split(_BATCH)]
        return torch.cat(parts).float()

    def learn(self, net: Classifier, site: str, images: Tensor, classes: int, ctx: Ctx) -> dict[str, Tensor]:
        """Ranges `low` and `high` (K, orders, entries), `threshold` (K,), and whether a class has its `own` rows."""
        device = device_of(net)
        labels = torch.cat([labelled(net, site, to_float(p.to(device)))[0] for p in images.split(_BATCH)]).cpu()
        ctx.cost.forwards += len(images)
        order = torch.randperm(len(images), generator=ctx.generator("rows"))
        own = labels.bincount(minlength=classes) >= _FOLDS
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for c in range(classes):
            # All classes without rows of their own share what any rows give.
            key = c if own[c] else -1
            if key not in found:
                rows = (order[labels[order] == c] if own[c] else order)[: self.per_class]
                _, a = labelled(net, site, to_float(images[rows].to(device)))
                ctx.cost.forwards += len(rows)
                found[key] = self.calibrate(torch.cat(list(grams(a, self.orders))))
        stacked = [torch.stack(v) for v in zip(*(found[c if own[c] else -1] for c in range(classes)), strict=True)]
        low, high, threshold = (v.cpu() for v in stacked)
        return {"low": low.float(), "high": high.float(), "threshold": threshold, "own": own}

    def calibrate(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Range (low, high) of Gram matrices (N, orders, entries), and the threshold of their deviations."""
        fold = torch.arange(len(g), device=g.device) % _FOLDS
        held = torch.cat([deviations(g[fold == i], *self.bounds(g[fold != i])) for i in range(_FOLDS)])
        return *self.bounds(g), held.sort().values[int(self.quantile * len(held))]

    def bounds(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Median - and + `width` median distances, (orders, entries) each."""
        median = middle(g)
        away = self.width * middle((g - median).abs())
        return median - away, median + away

    def judge(self, state: Mapping[str, Tensor], labels: Tensor, a: Tensor) -> Tensor:
        """Deviations over thresholds, float64 (N,) on the CPU, of inputs with these labels and activations."""
        value = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        for c in labels.unique().tolist():
            rows = (labels == c).nonzero().flatten()
            low, high = (state[n][c].to(a.device).double() for n in ("low", "high"))
            value[rows] = torch.cat([deviations(g, low, high) for g in grams(a[rows], self.orders)])
        return (value.cpu() + _TINY) / (state["threshold"].cpu()[labels.cpu()] + _TINY)


def place(net: Classifier, x: Tensor) -> str:
    """The last stage but one, or the only one.

    Raises:
        NotApplicable: its answer has no places, as in a transformer.
    """
    stages = taps(net).stages
    site = stages[-2:][0]
    with evaluating(net), torch.no_grad():
        answer = capture(net, x, [site])[site]
    if answer.dim() != 4:
        raise NotApplicable("no_spatial_stage: Gram matrices are over channels and places")
    return site


def labelled(net: Classifier, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The label (N,) that each image of (N, C, H, W) in [0, 1] gets, and what the layer `site` answers."""
    with evaluating(net), torch.no_grad():
        logits, answers = look(net, x, [site])
    return logits.argmax(1), answers[site]


def grams(a: Tensor, orders: int) -> Iterator[Tensor]:
    """Upper triangles of the Gram matrices of orders 1, 2, ... of activations (N, C, H, W), some rows at a time.

    Yields:
        float64 (rows, orders, C (C + 1) / 2); a power of 16 leaves what float32 holds.
    """
    c = a.shape[1]
    i, j = torch.triu_indices(c, c, device=a.device)
    for rows in a.flatten(2).double().split(max(1, _ENTRIES // (orders * c * c))):
        found = []
        for p in range(1, orders + 1):
            g = (rows**p @ (rows**p).transpose(1, 2))[:, i, j]
            found.append(g.sign() * g.abs() ** (1 / p))
        yield torch.stack(found, 1)


def middle(g: Tensor) -> Tensor:
    """The median over the first axis, of an even number the lower; torch's own has no deterministic form on GPUs."""
    return g.sort(0).values[(len(g) - 1) // 2]


def deviations(g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far (N, orders, entries) lie outside of a range, relative to its nearer end: the mean over entries, (N,)."""
    below = (low - g).relu() / (low.abs() + _TINY)
    above = (g - high).relu() / (high.abs() + _TINY)
    return (below + above).mean((1, 2))


def discrepancy(x: Tensor, z: Tensor) -> float:
    """J of two groups of features (m, C) and (n, C), float64; 0 without a second, NaN without a first."""
    m, n = len(x), len(z)
    if not n:
        return 0.0
    d = torch.cdist(torch.cat([x, z]), torch.cat([x, z])).square()
    s = float(d.median())
    if not m or not s > 0:
        return float("nan")
    k = (-2 * d / s).exp() + (-d / s).exp()
    return float(m * n / (m + n) * (k[:m, :m].mean() + k[m:, m:].mean() - 2 * k[:m, m:].mean()))
