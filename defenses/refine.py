"""Refinement of recovered triggers: masks for the labels that another method claims, from where it found them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sleeperbench import Access, Defense, ImageSet, Inverted, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.masks import appliable, apply, optimise_masks
from sleeperbench.kit.pixels import to_float

_EDGE = 0.02
"""Masks start at most this near to 0 and 1, where the slope of the optimisation vanishes."""


@dataclass(frozen=True, kw_only=True)
class Refine(Defense):
    """Neural Cleanse for few labels, from a place that is known: what a cheap screen is worth to a costly inverter.

    1. Labels: the targets of the triggers that `refine:<method>` claims. No other class is looked at; the wrapped
       method's verdict stands. Without a claim there is nothing to refine.
    2. Start: mask and pattern of the claim; of an additive claim d the mask |d| (largest channel, largest pixel 1) and
       the pattern clip(mean clean image + d). With `start` "random", as Neural Cleanse starts.
    3. Minimise mean CE(f((1 - m) x + m p), t) + w |m|_1 under the schedule of Neural Cleanse; the smallest mask is kept
       that sends `success` of the rows to the label. Where there is none, the claim stays as it was.

    IsTr (Sun et al. 2025) proposes that its steps find the label and its slices the place for other inverters;
    `refine:istr` is that.

    Differs: the paper only says that its parts can serve others; labels, start and schedule are this project's choice.

    Args:
        start: From the claims, or anew.
        epochs: Passes over the clean rows, at most.
        updates: Updates per pass.
        lr: Learning rate of Adam.
        weight: w at the start.
        success: Share of rows that must reach the label.
    """

    INFO = {
        "title": "Refinement of recovered triggers",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, "
        "journal={arXiv preprint arXiv:2508.04094}, year={2025}}",
        "kind": "inversion",
        "version": 1,
        "api": 1,
        "wrapper": True,
        "micro": {"epochs": 4, "updates": 4},
        "effort": ["epochs", "updates"],
        "traverses": False,
        "presumes": "what the wrapped method presumes, and a mask and pattern, the same on all images",
    }
    ACCESS = Access(clean=0.05, inner="inverted")

    start: Literal["claim", "random"] = "claim"
    epochs: int = 80
    updates: int = 10
    lr: float = 0.1
    weight: float = 1e-3
    success: float = 0.98

    def run(self, case: Case) -> Outcome:
        """The wrapped verdict with refined claims; norms and successes before and after in `chosen`.

        Raises:
            NotApplicable: triggers are claimed, but none that can be put on images here.
        """
        claims = case.inner.inverted
        usable = [inv for inv in claims if appliable(inv)]
        if claims and not usable:
            raise NotApplicable(f"needs_stamp: none of {len(claims)} recovered triggers has a mask or a delta")
        if not usable:
            return Outcome(verdict=case.inner.verdict, chosen={"claimed": []})
        found = optimise_masks(
            case.net,
            case.clean.images,
            torch.tensor([inv.target for inv in usable]),
            ctx=case.ctx,
            epochs=self.epochs,
            batch=math.ceil(len(case.clean) / self.updates),
            lr=self.lr,
            weight=self.weight,
            factor=2.0,
            patience=5,
            success=self.success,
            stop_after=25,
            start=begun(usable, case.clean) if self.start == "claim" else None,
        )
        refined = [
            inv if norm.isnan() else replace(inv, mask=mask, pattern=pattern, delta=None)
            for inv, norm, mask, pattern in zip(usable, found.norm, found.mask, found.pattern, strict=True)
        ]
        return Outcome(
            verdict=case.inner.verdict,
            inverted=tuple(refined),
            chosen={
                "claimed": [inv.target for inv in usable],
                "norms": [None if n.isnan() else round(float(n), 4) for n in found.norm],
                "successes": [round(s, 4) for s in found.success.tolist()],
            },
        )


def begun(claims: Sequence[Inverted], clean: ImageSet) -> tuple[Tensor, Tensor]:
    """Masks (K, 1, H, W) and patterns (K, C, H, W) in [0, 1] that stand for recovered triggers."""
    mean = to_float(clean.images).mean(0)
    masks, patterns = [], []
    for inv in claims:
        if inv.mask is not None and inv.pattern is not None:
            masks.append(inv.mask.float())
            patterns.append(inv.pattern.float())
            continue
        assert inv.delta is not None
        strength = inv.delta.float().abs().amax(0, keepdim=True)
        masks.append(strength / strength.max().clamp(min=1e-6))
        patterns.append(apply(inv, mean[None])[0])
    return torch.stack(masks).clamp(_EDGE, 1 - _EDGE), torch.stack(patterns).clamp(_EDGE, 1 - _EDGE)
