"""STRIP whose threshold is set with the trigger that IsTr recovers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable, QueryNet
from sleeperbench.defenses.istr import benign, trained
from sleeperbench.defenses.strip import Strip
from sleeperbench.kit.isolation import told, verdict
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.slices import Settings, isolate


@dataclass(frozen=True, kw_only=True)
class IsTrStrip(Defense):
    """STRIP with model access alone: IsTr supplies the triggered images for its threshold (Sun et al. 2025, 5.2).

    1. DMS-Steps (see `istr`); of the labels looked at the one with the smallest slice, of equals the most successful
       trigger A. Its verdict on the model is this method's too.
    2. Overlays are drawn from the rows that IsTr worked on. STRIP's entropies H_c of the held-out clean rows x, and H_p
       of A(x) for those of other labels.
    3. The threshold maximises the balanced accuracy of H < threshold between H_p and H_c. Where the median of H_p is
       not below that of H_c, or there is no trigger, it lies where 5 % of H_c are below.
    4. An input's score is threshold - H: above 0 is an alarm.

    Differs: the paper gives neither overlays nor the rule of the threshold: 32 overlays are blended half and half, and
    of equally good thresholds the lowest is taken, in the middle between two entropies.

    Args:
        overlays: Clean images that each input is blended with, at most all rows that IsTr works on.
        alpha: Weight of the overlay, x' = (1 - alpha) x + alpha o.
        frr: Share of clean inputs that may raise an alarm where there is no trigger to set the threshold with.
        steps: Iterations of IsTr's Steps.
        labels: Labels that are sliced, those that most rows turn into.
        reference_steps: Updates that train IsTr's benign reference.
    """

    INFO = {
        "title": "IsTr and STRIP",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, "
        "journal={arXiv preprint arXiv:2508.04094}, year={2025}}",
        "kind": "detection",
        "version": 4,
        "api": 1,
        "micro": {"overlays": 8, "steps": 3, "labels": 1, "reference_steps": 2},
        "effort": ["overlays", "steps", "labels", "reference_steps"],
        "scores": True,
        "traverses": False,
        "prepares": True,
        "presumes": "a trigger that survives blending, the same on all images",
    }
    ACCESS = Access(clean=0.05)

    overlays: int = 32
    alpha: float = 0.5
    frr: float = 0.05
    steps: int = 20
    labels: int = 10
    reference_steps: int = 470

    def __post_init__(self) -> None:
        self.strip()
        Settings.of(self)

    def strip(self) -> Strip:
        """STRIP as it is used here; its score is -H."""
        return Strip(overlays=self.overlays, mode="blend", alpha=self.alpha, frr=self.frr)

    def prepare(self, case: Case) -> tuple[Mapping[str, Tensor], Any]:
        """Weights of IsTr's benign reference."""
        return trained(case, self.reference_steps), None

    def run(self, case: Case) -> Outcome:
        """Overlays and threshold for the second phase, and IsTr's verdict.

        Raises:
            NotApplicable: no row to find triggers on, or none held out.
        """
        if not len(case.tune) or not len(case.val):
            raise NotApplicable(f"too_few_clean_rows: {len(case.clean)}")
        found = isolate(case, benign(case), Settings.of(self))
        order = torch.randperm(len(case.tune), generator=case.ctx.generator("overlays"))
        overlays = case.tune.images[order[: self.overlays]]
        x = to_float(case.val.images).to(case.ctx.device)
        strip, state, net = self.strip(), ({"overlays": overlays}, None), answering(case.net)
        clean = -strip.score(state, net, x).cpu()
        best, triggered = found.best(), clean[:0]
        if best is not None:
            others = x[(case.val.labels != best.label).to(x.device)]
            stamped = (others + best.kept.delta.to(x)).clamp(0, 1)
            triggered = -strip.score(state, net, stamped).cpu() if len(stamped) else clean[:0]
        case.ctx.cost.forwards += len(overlays) * (len(clean) + len(triggered))
        threshold, accuracy = between(clean, triggered, self.frr)
        chosen = told(found) | {
            "trigger_label": None if best is None else best.label,
            "threshold": threshold,
            "balanced_accuracy": accuracy,
            "clean_mean": float(clean.mean()),
            "triggered_mean": float(triggered.mean()) if len(triggered) else None,
        }
        kept = ({"overlays": overlays}, {"threshold": threshold})
        return Outcome(verdict=verdict(found), state=kept, alarm=0.0, chosen=chosen)

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: nn.Module, x: Tensor) -> Tensor:
        """Threshold minus H in nats, (N,); above 0 is an alarm."""
        return self.strip().score(state, answering(net), x) + float(state[1]["threshold"])


def answering(net: nn.Module) -> QueryNet:
    """What STRIP asks: probabilities of a model in eval mode."""

    def ask(x: Tensor) -> Tensor:
        with evaluating(net), torch.no_grad():
            return net(x).float().softmax(1)

    return ask


def between(clean: Tensor, triggered: Tensor, frr: float) -> tuple[float, float | None]:
    """The threshold below which entropies raise an alarm, and its balanced accuracy on these.

    Args:
        clean: H_c, (n,), not empty.
        triggered: H_p, (p,).
        frr: Share of clean entropies below the threshold where `triggered` does not lie below them; the accuracy is
            then None.
    """
    if not len(triggered) or float(triggered.quantile(0.5)) >= float(clean.quantile(0.5)):
        return float(clean.sort().values[math.floor(frr * len(clean))]), None
    cuts = torch.cat([clean, triggered]).double().unique()
    cuts = (cuts[1:] + cuts[:-1]) / 2
    hit = (triggered.double()[:, None] < cuts).double().mean(0)
    spared = (clean.double()[:, None] >= cuts).double().mean(0)
    accuracy = (hit + spared) / 2
    best = int(accuracy.argmax())  # of equals the first, which is the lowest cut
    return float(cuts[best]), float(accuracy[best])
