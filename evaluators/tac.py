"""TAC, the trigger-activated change: which channels of the attacked model answer to the trigger, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from sleeperbench import EvalCase, Evaluator, Findings, Measurement, Metric, Needs
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.predict import spread
from sleeperbench.kit.similarity import changes, sites, strongest

Change = Mapping[str, Tensor]
"""Layer -> float64 (channels,)."""


@dataclass(frozen=True, kw_only=True)
class TriggerActivatedChange(Evaluator):
    """The change that the trigger makes in every channel (Zheng, Tang, Li, Liu, ECCV 2022), by two definitions in use.

    1. Up to `pairs` test images of classes that count, each with its trigger and without, through the attacked model;
       every spatial convolution but stem and shortcuts, before BatchNorm; of a ViT, every block's MLP.
    2. `tac_kind=l2`: TAC[k] is the mean over images of the 2-norm, over the places of channel k, of the difference.
       `tac_kind=l1sum`: the absolute difference, mean over images, summed over places.
    3. `tac_contrast`: mean TAC of the max(1, int(share C)) channels with the largest, over that of all channels of the
       layer; mean over layers, and each as `layer=...`.
    4. `tac_agreement`: share of these channels that both kinds choose; mean over layers, and each.

    Every channel's TAC, of both kinds, is kept beside the figures. `bec` chooses its channels by `l2`, on other rows.

    Differs: `l2` is what BEC's released code ranks by, up to one factor per layer; `l1sum` is what BackdoorBench draws,
    which also looks at BatchNorm and linear layers.

    Args:
        pairs: Most image pairs, spread evenly.
        share: Share of each layer's channels.
    """

    INFO = {
        "title": "Trigger-activated change",
        "paper": "https://arxiv.org/abs/2208.03111",
        "bibtex": "@inproceedings{zheng2022data, title={Data-free Backdoor Removal Based on Channel Lipschitzness}, "
        "author={Zheng, Runkai and Tang, Rongjun and Li, Jianze and Liu, Li}, booktitle={ECCV}, year={2022}}",
        "kind": "existence",
        "version": 1,
        "api": 1,
        "micro": {"pairs": 40},
        "effort": ["pairs"],
    }
    NEEDS = Needs(scope="attack", outcome=(), undefended=True)
    METRICS = (
        Metric(
            name="tac_contrast",
            unit="",
            low=1.0,
            high=math.inf,
            better="none",
            doc="TAC of the channels with the largest over that of all channels of the layer, mean over layers",
        ),
        Metric(
            name="tac_agreement",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="Share of the channels with the largest TAC on which its two definitions agree, mean over layers",
        ),
    )

    pairs: int = 2200
    share: float = 0.1

    def __post_init__(self) -> None:
        if self.pairs < 1 or not 0 < self.share <= 1:
            raise ValueError("pairs is at least 1, and share in (0, 1]")

    def measure(self, case: EvalCase) -> Findings:
        """Figures of both kinds over layers and of each layer, and TAC of every channel."""
        bd = case.bd_test
        if bd is None:
            return self._nothing("no_trigger")
        net = cast(Classifier, case.attacked)
        names = sites(net, bd.data.images[:1])["conv"]
        if not names:
            return self._nothing("no_layers: neither spatial convolutions nor blocks with an MLP")
        rows = spread(len(bd), self.pairs)
        found = changes(net, bd.clean.images[rows], bd.data.images[rows], names, ctx=case.ctx)
        if not all(bool(t.isfinite().all()) for by in found.values() for t in by.values()):
            return self._nothing("nan: activations are not finite")
        figures = [
            m
            for kind, by in found.items()
            for m in over_layers("tac_contrast", {n: contrast(t, self.share) for n, t in by.items()}, kind)
        ]
        both = {n: agreement(found["l2"][n], found["l1sum"][n], self.share) for n in names}
        figures += over_layers("tac_agreement", both)
        return Findings(rows=tuple(figures), curves=curves(found))

    def _nothing(self, reason: str) -> Findings:
        return Findings(rows=tuple(Measurement(metric=m.name, value=None, reason=reason) for m in self.METRICS))


def contrast(change: Tensor, share: float) -> float:
    """Mean of the largest over the mean of all; NaN where the trigger changes nothing."""
    mean = float(change.mean())
    return max(1.0, float(change[strongest(change, share)].mean()) / mean) if mean > 0 else math.nan


def agreement(one: Tensor, other: Tensor, share: float) -> float:
    """Share of the largest channels that two rankings have in common; NaN where the trigger changes nothing."""
    if not bool(one.any()):
        return math.nan
    mine, theirs = (set(strongest(x, share).tolist()) for x in (one, other))
    return len(mine & theirs) / len(mine)


def over_layers(metric: str, by: Mapping[str, float], kind: str = "") -> list[Measurement]:
    """The mean over the layers that have a figure, and a row for each layer."""
    alive = [v for v in by.values() if math.isfinite(v)]
    tail = f"tac_kind={kind}" if kind else ""
    whole = _row(metric, sum(alive) / len(alive) if alive else math.nan, tail)
    return [whole, *(_row(metric, v, f"layer={n}" + f";{tail}" * bool(tail)) for n, v in by.items())]


def curves(found: Mapping[str, Change]) -> dict[str, Any]:
    """TAC over the layer's mean against the share of channels, and every channel's TAC to four digits."""
    at = [i / 20 for i in range(21)]
    series = []
    for name, change in found["l2"].items():
        mean, order = float(change.mean()), change.sort(descending=True).values
        if mean > 0:
            y = [float(order[round(x * (len(order) - 1))]) / mean for x in at]
            series.append({"label": name.removeprefix("body."), "x": at, "y": y})
    drawn: dict[str, Any] = {
        f"channels-{kind}": {name: [float(f"{v:.4g}") for v in change.tolist()] for name, change in by.items()}
        for kind, by in found.items()
    }
    if series:
        drawn["tac"] = {
            "title": "Channels by the change that the trigger makes (tac_kind=l2)",
            "x_label": "share of the layer's channels, largest first",
            "y_label": "TAC over the layer's mean",
            "series": series,
        }
    return drawn


def _row(metric: str, value: float, qualifier: str) -> Measurement:
    known = math.isfinite(value)
    return Measurement(
        metric=metric, value=value if known else None, qualifier=qualifier, reason="" if known else "no_change"
    )
