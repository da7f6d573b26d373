"""Refinement of recovered triggers: inversion for the labels that another method claims, from where it found them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sleeperbench import Access, Defense, ImageSet, Inverted, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.defenses.b3d import B3D
from sleeperbench.defenses.pixel_backdoor import PixelBackdoor, victims
from sleeperbench.kit.masks import appliable, apply, optimise_masks
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating

_AT_ONCE = 512
"""Images per pass through the net that B3D asks, as many as one that is only asked answers."""
_EDGE = 0.02
"""Masks start at most this near to 0 and 1, where the slope of the optimisation vanishes."""


@dataclass(frozen=True, kw_only=True)
class Refine(Defense):
    """A costly inverter for few labels, from a place that is known: what a cheap screen is worth to it.

    1. Labels: the targets of the triggers that `refine:<method>` claims. No other class is looked at; the wrapped
       method's verdict stands. Without a claim there is nothing to refine.
    2. Start: mask and pattern of the claim; of an additive claim d the mask |d| (largest channel, largest pixel 1) and
       the pattern clip(mean clean image + d). With `start` "random", as the inverter itself starts.
    3. `by` "masks": minimise mean CE(f((1 - m) x + m p), t) + w |m|_1 under the schedule of Neural Cleanse; the
       smallest mask is kept that sends `success` of the rows to the label. Where there is none, the claim stays as it
       was.
    4. `by` "pixels": PixelBackdoor in the place of step 3. Its two patterns start as the positive and the negative part
       of d, of a mask and pattern as those of what they change in the mean clean image.
    5. `by` "b3d": B3D in the place of step 3, which asks the model alone: `epochs` times `updates` updates, its weight
       moving after each pass. Its masks and patterns start as those of step 3.

    IsTr (Sun et al. 2025) proposes that its steps find the label and its slices the place for other inverters;
    `refine:istr` is that.

    Differs: the paper only says that its parts can serve others; labels, start and schedule are this project's choice.
    Inverters that take no label and no place of their own accord are left out: docs/methods/refine.md says which.

    Args:
        by: Neural Cleanse's masks, PixelBackdoor's patterns, or B3D's masks from scores.
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
        "version": 2,
        "api": 1,
        "wrapper": True,
        "micro": {"epochs": 4, "updates": 4},
        "effort": ["epochs", "updates"],
        "traverses": False,
        "presumes": "what the wrapped method presumes, and a mask or additive pattern, the same on all images",
    }
    ACCESS = Access(clean=0.05, inner="inverted")

    by: Literal["masks", "pixels", "b3d"] = "masks"
    start: Literal["claim", "random"] = "claim"
    epochs: int = 80
    updates: int = 10
    lr: float = 0.1
    weight: float = 1e-3
    success: float = 0.98

    def __post_init__(self) -> None:
        if self.by not in ("masks", "pixels", "b3d") or self.start not in ("claim", "random"):
            raise ValueError(f"by is {self.by!r} and start {self.start!r}: see the parameters")

    def run(self, case: Case) -> Outcome:
        """The wrapped verdict with refined claims; their norms (or changed pixels) and successes in `chosen`.

        Raises:
            NotApplicable: triggers are claimed, but none that can be put on images here.
        """
        claims = case.inner.inverted
        usable = [inv for inv in claims if appliable(inv)]
        if claims and not usable:
            raise NotApplicable(f"needs_stamp: none of {len(claims)} recovered triggers has a mask or a delta")
        if not usable:
            return Outcome(verdict=case.inner.verdict, chosen={"claimed": []})
        inverters = {"masks": self._masks, "pixels": self._pixels, "b3d": self._asked}
        refined, sizes, successes = inverters[self.by](case, usable)
        return Outcome(
            verdict=case.inner.verdict,
            inverted=tuple(refined),
            chosen={
                "claimed": [inv.target for inv in usable],
                "norms": [None if n.isnan() else round(float(n), 4) for n in sizes],
                "successes": [round(s, 4) for s in successes.tolist()],
            },
        )

    def _masks(self, case: Case, claims: Sequence[Inverted]) -> tuple[list[Inverted], Tensor, Tensor]:
        """Step 3: claims, norms (NaN where nothing was kept) and shares of hits."""
        found = optimise_masks(
            case.net,
            case.clean.images,
            torch.tensor([inv.target for inv in claims]),
            ctx=case.ctx,
            epochs=self.epochs,
            batch=math.ceil(len(case.clean) / self.updates),
            lr=self.lr,
            weight=self.weight,
            factor=2.0,
            patience=5,
            success=self.success,
            stop_after=25,
            start=begun(claims, case.clean) if self.start == "claim" else None,
        )
        return _masked(claims, found.mask, found.pattern, found.norm), found.norm, found.success

    @torch.no_grad()
    def _asked(self, case: Case, claims: Sequence[Inverted]) -> tuple[list[Inverted], Tensor, Tensor]:
        """Step 5: claims, norms (NaN where nothing was kept) and shares of hits."""

        def scores(x: Tensor) -> Tensor:
            case.ctx.cost.forwards += len(x)
            return torch.cat([case.net(p.to(case.ctx.device)).softmax(1).cpu() for p in x.split(_AT_ONCE)])

        inverter = B3D(
            steps=self.epochs * self.updates,
            batch=math.ceil(len(case.clean) / self.updates),
            lr=self.lr,
            weight=self.weight,
            window=self.updates,
            success=self.success,
        )
        with evaluating(case.net):
            masks, patterns, norms, shares = inverter.invert(
                scores,
                case.clean.images,
                torch.tensor([inv.target for inv in claims]),
                case.ctx,
                start=begun(claims, case.clean) if self.start == "claim" else None,
            )
        return _masked(claims, masks, patterns, norms), norms, shares

    def _pixels(self, case: Case, claims: Sequence[Inverted]) -> tuple[list[Inverted], Tensor, Tensor]:
        """Step 4: claims, numbers of changed pixels (NaN where nothing was kept) and shares of hits."""
        inverter = PixelBackdoor(
            steps=self.epochs,
            images=len(case.clean),
            batch=math.ceil(len(case.clean) / self.updates),
            lr=self.lr,
            weight=self.weight,
            success=self.success,
        )
        targets = torch.tensor([inv.target for inv in claims])
        deltas, sizes, shares = inverter.invert(
            case.net,
            case.clean.images,
            victims(case.clean, case.spec.classes, inverter.images, case.ctx)[targets],
            case.ctx,
            targets=targets,
            start=parted(claims, case.clean) if self.start == "claim" else None,
        )
        refined = [
            inv if size.isnan() else replace(inv, mask=None, pattern=None, delta=delta)
            for inv, size, delta in zip(claims, sizes, deltas, strict=True)
        ]
        return refined, sizes, shares


def _masked(claims: Sequence[Inverted], masks: Tensor, patterns: Tensor, norms: Tensor) -> list[Inverted]:
    """Claims with masks (K, 1, H, W) and patterns (K, C, H, W) in their place; as they were where the norm is NaN."""
    return [
        inv if norm.isnan() else replace(inv, mask=mask, pattern=pattern, delta=None)
        for inv, mask, pattern, norm in zip(claims, masks, patterns, norms, strict=True)
    ]


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


def parted(claims: Sequence[Inverted], clean: ImageSet) -> tuple[Tensor, Tensor]:
    """Positive and negative parts, (K, C, H, W) in [0, 1] each, of what recovered triggers add to the mean image."""
    mean = to_float(clean.images).mean(0)
    added = torch.stack(
        [apply(inv, mean[None])[0] - mean if inv.delta is None else inv.delta.float() for inv in claims]
    )
    return added.clamp(0, 1), (-added).clamp(0, 1)
