"""STRIP: the answer to a triggered image survives blending with other images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable, QueryNet
from sleeperbench.kit.pixels import to_float

_BATCH = 1000
"""Blended images at a time."""


@dataclass(frozen=True, kw_only=True)
class Strip(Defense):
    """Entropy of the answers to an input blended with clean images; low entropy is suspicious (Gao et al. 2019).

    1. Draw the overlays from the clean rows, once.
    2. Blend each remaining clean row with all overlays; its entropy H is the mean over overlays of
       -sum_c p_c ln p_c.
    3. The threshold lies where a share `frr` of the clean entropies is below it.
    4. An input is blended with the same overlays; its score is -H, and H below the threshold is an alarm.

    Overlays, calibration rows and the inputs asked about are disjoint. At most half of the clean rows become overlays,
    so that 72 rows give 36 overlays and 36 entropies, of which 1 % is none: the threshold is then the smallest.

    Differs: all inputs get the same overlays, where the authors draw new ones for each, so that a score depends on its
    own input alone. Natural logarithm instead of base 2, which changes no order; 0 ln 0 is 0. The threshold is an order
    statistic instead of the quantile of a normal fitted to the entropies. Overlays come from the defender's clean
    rows, which the model was not trained on, instead of from the training set.

    Args:
        overlays: Clean images that each input is blended with, at most half of the clean rows.
        mode: `add`, x' = min(1, x + alpha o), or `blend`, x' = (1 - alpha) x + alpha o.
        alpha: Weight of the overlay, above 0; below 1 for `blend`.
        frr: Share of clean inputs that may raise an alarm, 0..1.
    """

    INFO = {
        "title": "STRIP",
        "paper": "https://arxiv.org/abs/1902.06531",
        "bibtex": "@inproceedings{gao2019strip, title={{STRIP}: A Defence Against Trojan Attacks on Deep Neural "
        "Networks}, author={Gao, Yansong and Xu, Change and Wang, Derui and Chen, Shiping and Ranasinghe, Damith C. "
        "and Nepal, Surya}, booktitle={Annual Computer Security Applications Conference}, year={2019}}",
        "kind": "detection",
        "version": 3,
        "api": 1,
        "micro": {"overlays": 16},
        "effort": ["overlays"],
        "scores": True,
        "traverses": False,
        "presumes": "a trigger that survives blending, the same on all images",
    }
    ACCESS = Access(model="scores", clean=0.05)

    overlays: int = 100
    mode: Literal["add", "blend"] = "add"
    alpha: float = 1.0
    frr: float = 0.01

    def __post_init__(self) -> None:
        if self.mode not in ("add", "blend"):
            raise ValueError(f"mode is {self.mode!r}; it may be 'add' or 'blend'")
        if not self.alpha > 0 or (self.mode == "blend" and self.alpha >= 1):
            raise ValueError(f"alpha is {self.alpha}: give more than 0, and less than 1 with mode 'blend'")
        if self.overlays < 1 or not 0 <= self.frr < 1:
            raise ValueError(f"overlays {self.overlays} must be at least 1, frr {self.frr} from 0 to below 1")

    def run(self, case: Case) -> Outcome:
        """Overlays, as the second phase needs them, and the threshold.

        Raises:
            NotApplicable: fewer than two clean rows.
        """
        n = len(case.clean)
        if n < 2:
            raise NotApplicable(f"too_few_clean_rows: {n}, and overlays and calibration need one each")
        order = torch.randperm(n, generator=case.ctx.generator("overlays"))
        count = min(self.overlays, n // 2)
        overlays = case.clean.images[order[:count]]
        calibration = case.clean.images[order[count:]]
        clean = self._entropies(case.net, to_float(calibration).to(case.ctx.device), overlays)
        # At most floor(frr n) entropies lie strictly below this one.
        threshold = float(clean.sort().values[math.floor(self.frr * len(clean))])
        about = {"overlays": count, "calibration_rows": len(clean), "threshold": threshold}
        chosen = about | {"clean_mean": float(clean.mean()), "clean_std": float(clean.std(unbiased=False))}
        return Outcome(state=({"overlays": overlays}, None), alarm=-threshold, chosen=chosen)

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: QueryNet, x: Tensor) -> Tensor:
        """-H in nats, (N,) from -ln K to 0."""
        return -self._entropies(net, x, state[0]["overlays"])

    def _entropies(self, net: QueryNet, x: Tensor, overlays: Tensor) -> Tensor:
        """Mean entropy (N,), over overlays (M, C, H, W) uint8, of the answers to blended x (N, C, H, W) in [0, 1]."""
        o = to_float(overlays).to(x.device)
        parts = []
        for rows in x.split(max(1, _BATCH // len(o))):
            keep = 1.0 if self.mode == "add" else 1 - self.alpha
            blended = (keep * rows[:, None] + self.alpha * o[None]).clamp(0, 1)
            p = net(blended.flatten(0, 1))
            parts.append(torch.special.entr(p).sum(1).view(len(rows), len(o)).mean(1))
        return torch.cat(parts)
