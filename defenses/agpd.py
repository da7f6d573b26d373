"""AGPD: gradients of a class's logit point in two ways where some of its rows are poisoned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.anomaly import anomaly_index
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.select import right
from sleeperbench.kit.taps import taps

BATCH = 250
LARGEST = 1e6
"""What an anomaly index without bound is written as."""
BINS = np.linspace(0, 1, 100)


@dataclass(frozen=True, kw_only=True)
class AGPD(Defense):
    """Activation-gradient-based poisoned sample detection (Yuan et al., ICLR 2025).

    Settings are BackdoorBench's but for `tau`, of which it has none.

    1. Per row and convolution with a kernel larger than 1, without the stem and shortcuts: the gradient of the logit of
       the row's label by the convolution's output, averaged over places: a vector of one number per channel. Clean
       rows, 100 in all, at most 100 / K of each class, and only those that the model gets right, give the mean gradient
       of each class.
    2. Per class and layer: the row least similar (cosine) to the clean mean is the seed of the poison; the gap is the
       norm of the other rows' cosines to the clean mean minus those to the seed, over the root of the number of rows.
    3. The gaps of a layer become one-sided anomaly indices over classes. In the layer with the largest one, classes
       above `threshold` are targets; where no class of any layer is, those with a gap above `gap`, in that one of the
       last three layers before the very last which has most of them.
    4. In a target class the poison grows from the seed, round by round. With P and C a row's cosine distances to the
       mean of the poison so far and to the clean mean, rows join whose P / (P + C), rescaled to 0..1 over the rows
       left, is at most `tau`; until none is left.
    5. After each round, the histograms of that ratio over the rows left before it and over those left after it have a
       Jensen-Shannon distance. Rows are dropped that had joined before the window of `window` rounds in which the mean
       distance + 5 standard deviations is least.

    Retraining on the rest is the wrapper `retrain`.

    Differs: the index has no 1e-6 beside the MAD, and with fewer than six classes is 0. Released code ends with an
    error where a class has no clean row that the model gets right (such a class is passed over here), where there are
    fewer rounds than `window` (all of them are then one window) and where the first window is the best (the seed alone
    is dropped). `suspicion` falls with the round in which a row joined; it is 0 outside of target classes.

    Args:
        threshold: Anomaly index above which a class is a target; exp(2) as released.
        gap: Gap above which a class is a target where no index is large.
        tau: Rescaled ratio up to which rows join the poison.
        window: Rounds over which the distances shall be small and steady.
    """

    INFO = {
        "title": "Activation gradients",
        "paper": "https://arxiv.org/abs/2312.06230",
        "bibtex": "@inproceedings{yuan2025activation, title={Activation Gradient based Poisoned Sample Detection "
        "Against Backdoor Attacks}, author={Yuan, Danni and Zhang, Mingda and Wei, Shaokui and Liu, Li and Wu, "
        "Baoyuan}, booktitle={International Conference on Learning Representations}, year={2025}}",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {},
        "traverses": True,
        "presumes": "triggered rows whose gradients point another way than those of clean rows of their label",
    }
    ACCESS = Access(clean=100, train=True)
    REQUIRES = frozenset({"conv", "linear_head"})

    threshold: float = 7.38905609893065
    gap: float = 0.3
    tau: float = 0.05
    window: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1 or self.window < 1:
            raise ValueError(f"tau is {self.tau}, window {self.window}: give 0 to 1, and at least 1 round")

    def run(self, case: Case) -> Outcome:
        """Which rows to keep, and how suspicious each is.

        Raises:
            NotApplicable: `needs_conv`, no convolution but the first.
        """
        net, ctx, labels = case.net, case.ctx, case.train.labels.cpu()
        layers = taps(net).spatial_convs
        if not layers:
            raise NotApplicable("needs_conv")
        classes = labels.unique().tolist()
        means = self.references(case, layers)
        gaps = torch.full((len(layers), len(classes)), torch.nan, dtype=torch.float64)
        for i, label in enumerate(classes):
            rows = labels == label
            if label in means and int(rows.sum()) > 1:
                found = gradients(net, case.train.images[rows], label, layers, ctx)
                gaps[:, i] = torch.tensor([gap(found[n], means[label][n]) for n in layers], dtype=torch.float64)
            ctx.progress(i + 1, len(classes), "gradients")
        index = torch.stack([anomaly_index(g) for g in gaps]).clamp(0, LARGEST)
        at, targets = self.targets(gaps, index)

        suspicion = torch.zeros(len(labels), dtype=torch.float64)
        keep = torch.ones(len(labels), dtype=torch.bool)
        for label in (classes[i] for i in targets):
            rows = (labels == label).nonzero()[:, 0]
            layer = layers[at]
            found = gradients(net, case.train.images[rows], label, [layer], ctx)
            joined, distances = grow(found[layer], means[label][layer], self.tau)
            suspicion[rows] = 1 - joined.double() / (len(distances) + 1)
            keep[rows[joined < steady(distances, self.window)]] = False
        chosen = {
            "dropped": int((~keep).sum()),
            "rows": len(keep),
            "layer": layers[at] if targets else "",
            "target_classes": [classes[i] for i in targets],
            "largest_index": float(index.nan_to_num(nan=0.0).max()),
            "passed_over": [k for k in classes if k not in means],
        }
        return Outcome(keep=keep, suspicion=suspicion, chosen=chosen)

    def references(self, case: Case, layers: Sequence[str]) -> dict[int, dict[str, Tensor]]:
        """Mean gradients of clean rows by class and layer."""
        each = max(1, 100 // case.spec.classes)
        known, clean = right(case.net, case.clean, ctx=case.ctx), case.clean.labels.cpu()
        means = {}
        for label in clean[known].unique().tolist():
            rows = ((clean == label) & known).nonzero()[:each, 0]
            found = gradients(case.net, case.clean.images[rows], label, layers, case.ctx)
            means[label] = {name: g.mean(0) for name, g in found.items()}
        return means

    def targets(self, gaps: Tensor, index: Tensor) -> tuple[int, list[int]]:
        """Which layer to look at, and positions of the target classes, from gaps and indices (layers, classes)."""
        largest = index.nan_to_num(nan=-1.0).amax(1)
        if float(largest.max()) >= self.threshold:
            at = int(largest.argmax())
            return at, (index[at] > self.threshold).nonzero()[:, 0].tolist()
        late = list(range(len(gaps)))[-4:-1] or [0]
        found = [(gaps[at] > self.gap).nonzero()[:, 0].tolist() for at in late]
        most = max(range(len(late)), key=lambda i: len(found[i]))  # the first of equals
        return late[most], found[most]


def gradients(net: Classifier, images: Tensor, label: int, layers: Sequence[str], ctx: Ctx) -> dict[str, Tensor]:
    """Gradients of the logit of `label` by the layers' outputs, averaged over places: float64 (N, channels), CPU."""
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # On the tensor, before a ReLU may overwrite it: it then still gets the gradient of its own value.
            output.register_hook(lambda g: parts[name].append(g.mean((2, 3)).double().cpu()))

        return hook

    handles = [net.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    try:
        with evaluating(net), torch.enable_grad():
            for part in images.split(BATCH):
                x = to_float(part.to(device_of(net))).requires_grad_()
                torch.autograd.grad(net(x)[:, label].sum(), x)
    finally:
        for handle in handles:
            handle.remove()
    ctx.cost.forwards += len(images)
    ctx.cost.backwards += len(images)
    return {name: torch.cat(p) for name, p in parts.items()}


def cosine(g: Tensor, to: Tensor) -> Tensor:
    """Cosines (N,) of rows (N, C) to one vector (C,); 0 where either is zero."""
    return nn.functional.cosine_similarity(g, to[None], dim=1, eps=1e-30)


def gap(g: Tensor, clean: Tensor) -> float:
    """How unlike the rows (N, C) see the clean mean and the row least like it."""
    to_clean = cosine(g, clean)
    seed = int(to_clean.argmin())
    apart = to_clean - cosine(g, g[seed])
    apart[seed] = 0
    return float(apart.norm()) / math.sqrt(len(g))


def grow(g: Tensor, clean: Tensor, tau: float) -> tuple[Tensor, list[float]]:
    """The round in which each row (N, C) joins the poison, 0 for the seed, and each round's distance."""
    distance = 1 - cosine(g, clean)
    joined = torch.full((len(g),), -1)
    joined[int(distance.argmax())] = 0
    left = joined < 0

    def ratios() -> Tensor:
        poison = 1 - cosine(g[left], g[~left].mean(0))
        both = poison + distance[left]
        return torch.where(both > 0, poison / both, 0.5)

    before = ratios() if bool(left.any()) else torch.zeros(0)
    distances: list[float] = []
    while bool(left.any()):
        rates = ratios()
        scale = rates.max() - rates.min()
        joins = (rates - rates.min()) / scale <= tau if float(scale) > 0 else torch.ones_like(rates, dtype=torch.bool)
        joined[left.nonzero()[joins, 0]] = len(distances) + 1
        left = joined < 0
        distances.append(jensen_shannon(before, rates[~joins]))
        before = rates[~joins]
    return joined, distances


def jensen_shannon(a: Tensor, b: Tensor) -> float:
    """Jensen-Shannon distance, in nats, of two samples' histograms over 0..1; 1 where one has no rows."""
    if not len(a) or not len(b):
        return 1.0
    p, q = (np.histogram(v.clamp(0, 1).numpy(), bins=BINS)[0] / len(v) for v in (a, b))
    middle = (p + q) / 2
    parts = [(v[v > 0] * np.log(v[v > 0] / middle[v > 0])).sum() for v in (p, q)]
    return math.sqrt(max(0.0, sum(parts) / 2))


def steady(distances: Sequence[float], window: int) -> int:
    """The round at which the window with the least mean + 5 standard deviations begins, at least 1."""
    d = torch.tensor(distances, dtype=torch.float64)
    windows = d.unfold(0, min(window, len(d)), 1)
    return max(1, int((windows.mean(1) + 5 * windows.std(1, correction=0)).argmin()))
