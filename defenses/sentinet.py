"""SentiNet: what decides the answer to a triggered image also decides it on other images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating, spread
from sleeperbench.kit.taps import capture, taps

_BATCH = 1000
"""Pasted images at a time."""
_SIDE = 8
"""Pixels that a map needs on a side to show a place."""
_SHOWN = 100
"""Points of a series in the drawn plane."""


@dataclass(frozen=True, kw_only=True)
class SentiNet(Defense):
    """Paste what decides the answer onto clean images, and count those that then get it (Chou et al. 2020).

    1. Draw the carriers from the clean rows, once, and for each a picture of uniform noise, the inert pattern.
    2. Grad-CAM of the class y that an input gets: relu(sum_k w_k A_k) with w_k the mean over places of d z_y / d A_k at
       the deepest stage of 8 x 8 places or more, enlarged to the image. The region is the share `region` of the pixels
       with the largest values, without those of value 0.
    3. Fooled: the share of carriers that get y when the input's region is pasted on them. Confidence: the mean largest
       probability of carriers with the inert pattern in that region.
    4. From other clean rows: of every interval `bin` of confidence take the `highest` most fooled rows, and fit through
       them, by least squares, fooled = a + b confidence + c confidence^2. The threshold d is the mean distance from
       this curve of all rows below it.
    5. An input's score is its distance from the curve, in the plane, negative below it; more than d is an alarm.

    Differs: the paper first gathers further classes by selective search and cuts their regions out of the map; peers
    leave this out, and so does this. Ties in Grad-CAM go to the first pixels in reading order. All inputs get the same
    carriers and noise, so that a score depends on its own input alone. backdoor-toolbox fits the middles of intervals,
    empty ones at 0, takes the threshold from a false alarm rate, and uses the true place of patches; BackdoorBench
    pastes on noise and looks at confidence alone. `highest` is BELT's; the paper takes one. Where few rows leave the
    curve undetermined, it is the one of smallest coefficients.

    Args:
        carriers: Clean images that regions are pasted on, at most half of the clean rows.
        rows: Clean rows that the curve is fitted to, at most.
        region: Share of the pixels that are pasted, above 0 and below 1.
        bin: Width of an interval of confidence, above 0.
        highest: Rows taken from each interval.
    """

    INFO = {
        "title": "SentiNet",
        "paper": "https://arxiv.org/abs/1812.00292",
        "bibtex": "@inproceedings{chou2020sentinet, title={{SentiNet}: Detecting Localized Universal Attacks Against "
        "Deep Learning Systems}, author={Chou, Edward and Tram{\\`e}r, Florian and Pellegrino, Giancarlo}, "
        "booktitle={IEEE Security and Privacy Workshops}, year={2020}}",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {"carriers": 8, "rows": 30},
        "effort": ["carriers", "rows"],
        "scores": True,
        "traverses": False,
        "presumes": "a trigger in one place, which works on all images",
    }
    ACCESS = Access(clean=0.05)

    carriers: int = 100
    rows: int = 400
    region: float = 0.15
    bin: float = 0.02
    highest: int = 2

    def __post_init__(self) -> None:
        if min(self.carriers, self.rows, self.highest) < 1 or not self.bin > 0:
            raise ValueError("carriers, rows and highest must be at least 1, and bin positive")
        if not 0 < self.region < 1:
            raise ValueError(f"region is {self.region}: give a share between 0 and 1")

    def run(self, case: Case) -> Outcome:
        """Carriers, noise and curve, as the second phase needs them; `points` holds the fitted rows' statistics.

        The threshold d is the alarm.

        Raises:
            NotApplicable: fewer than two clean rows, or no layer whose answer has places.
        """
        n = len(case.clean)
        if n < 2:
            raise NotApplicable(f"too_few_clean_rows: {n}, and carriers and curve need one each")
        order = torch.randperm(n, generator=case.ctx.generator("carriers"))
        count = min(self.carriers, n // 2)
        carriers = case.clean.images[order[:count]]
        inert = torch.randint(256, carriers.shape, dtype=torch.uint8, generator=case.ctx.generator("noise"))
        x = to_float(case.clean.images[order[count:][: self.rows]]).to(case.ctx.device)
        site = deepest(case.net, x[:1])
        fooled, confidence = (t.cpu().double() for t in self.statistics(case.net, site, x, carriers, inert))
        case.ctx.cost.forwards += (1 + 2 * count) * len(x) + 1
        case.ctx.cost.backwards += len(x)
        curve = fit_curve(confidence, fooled, self.bin, self.highest)
        distance = distances(confidence, fooled, curve)
        below = distance < 0
        threshold = float(-distance[below].mean()) if bool(below.any()) else 0.0
        chosen: dict[str, Any] = {
            "site": site,
            "carriers": count,
            "rows": len(x),
            "curve": [round(float(v), 4) for v in curve],
            "threshold": threshold,
            "clean_fooled": float(fooled.mean()),
            "clean_flagged": float((distance > threshold).double().mean()),
        }
        chosen["curves"] = {"plane": plane(confidence, fooled, curve, threshold)}
        tensors = {"carriers": carriers, "inert": inert, "curve": curve, "points": torch.stack([confidence, fooled], 1)}
        return Outcome(state=(tensors, {"site": site}), alarm=threshold, chosen=chosen)

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: Classifier, x: Tensor) -> Tensor:
        """Signed distance from the curve, above the threshold is an alarm, and beside it the input's place: (N, 3)."""
        t = state[0]
        fooled, confidence = self.statistics(net, state[1]["site"], x, t["carriers"], t["inert"])
        fooled, confidence = fooled.cpu().double(), confidence.cpu().double()
        return torch.stack([distances(confidence, fooled, t["curve"].cpu()), confidence, fooled], 1).float()

    def statistics(
        self, net: nn.Module, site: str, x: Tensor, carriers: Tensor, inert: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fooled and confidence, (N,) each, of images (N, C, H, W); carriers and inert patterns are uint8."""
        c, noise = to_float(carriers).to(x.device), to_float(inert).to(x.device)
        fooled, confidence = [], []
        for rows in x.split(max(1, _BATCH // len(c))):
            label, cam = grad_cam(net, site, rows)
            kept = largest(cam, self.region)[:, None]
            with evaluating(net), torch.no_grad():
                answer = net(torch.where(kept, rows[:, None], c).flatten(0, 1)).argmax(1).view(len(rows), -1)
                p = net(torch.where(kept, noise, c).flatten(0, 1)).float().softmax(1).amax(1)
            fooled.append((answer == label[:, None]).float().mean(1))
            confidence.append(p.view(len(rows), -1).mean(1))
        return torch.cat(fooled), torch.cat(confidence)


def deepest(net: Classifier, x: Tensor) -> str:
    """The last stage whose answer to x has 8 x 8 places, or as many as the finest has where that has fewer.

    Raises:
        NotApplicable: no stage answers with places, as in a transformer.
    """
    with evaluating(net), torch.no_grad():
        found = capture(net, x, taps(net).stages)
    side = {name: min(a.shape[2:]) for name, a in found.items() if a.dim() == 4}
    if not side:
        raise NotApplicable("no_spatial_stage: Grad-CAM needs a layer whose answer has places")
    return [name for name, s in side.items() if s >= min(_SIDE, max(side.values()))][-1]


def grad_cam(net: nn.Module, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (N,) and maps (N, 1, H, W) of Grad-CAM for them, 0 or more, of images (N, C, H, W)."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output)
        return output.clone()  # what follows may overwrite its input

    handle = net.get_submodule(site).register_forward_hook(keep)
    try:
        with evaluating(net), torch.enable_grad():
            logits = net(x.detach().clone().requires_grad_())
    finally:
        handle.remove()
    label = logits.argmax(1)
    (slope,) = torch.autograd.grad(logits.gather(1, label[:, None]).sum(), found[0])
    cam = (slope.mean((2, 3), keepdim=True) * found[0].detach()).sum(1, keepdim=True).relu()
    return label, F.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False)


def largest(cam: Tensor, share: float) -> Tensor:
    """The share of the pixels with the largest values, rounded down, at least one, none at 0: bool (N, 1, H, W)."""
    flat = cam.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(share * flat.shape[1]))]
    return (torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, True) & (flat > 0)).view_as(cam)


def fit_curve(confidence: Tensor, fooled: Tensor, width: float, highest: int) -> Tensor:
    """a, b, c (3,) of the parabola through the most fooled rows of each interval; float64 (N,) each."""
    interval = ((confidence - confidence.min()) / width).floor()
    chosen = []
    for i in interval.unique():
        own = (interval == i).nonzero().flatten()
        chosen.append(own[fooled[own].argsort(descending=True, stable=True)[:highest]])
    x, y = (v[torch.cat(chosen)].numpy() for v in (confidence, fooled))
    return torch.from_numpy(np.linalg.lstsq(np.vander(x, 3, increasing=True), y, rcond=None)[0])


def plane(confidence: Tensor, fooled: Tensor, curve: Tensor, threshold: float) -> dict[str, Any]:
    """Rows, the curve, and where the alarm begins, as a cell page draws them; all of it float64.

    Both lines are drawn over the confidences of the rows, as far as they lie in the plane. The alarm begins at the
    threshold's distance above the curve, along its normals.
    """
    a, b, c = curve
    shown = spread(len(confidence), _SHOWN)
    x = torch.linspace(float(confidence.min()), float(confidence.max()), _SHOWN, dtype=torch.float64)
    y, slope = a + b * x + c * x**2, b + 2 * c * x
    normal = (1 + slope**2).sqrt()
    lines = {"curve": (x, y), "alarm": (x - threshold * slope / normal, y + threshold / normal)}
    series = [{"label": "clean rows", "x": confidence[shown].tolist(), "y": fooled[shown].tolist(), "points": True}]
    for label, (across, up) in lines.items():
        inside = (across >= 0) & (across <= 1) & (up >= 0) & (up <= 1)
        if bool(inside.any()):
            series.append({"label": label, "x": across[inside].tolist(), "y": up[inside].tolist()})
    return {
        "title": "SentiNet's plane: carriers that an input's region fools, against their confidence under inert noise",
        "x_label": "mean largest probability under noise",
        "y_label": "share of carriers fooled",
        "series": series,
        "inputs": [0, 1],
    }


def distances(confidence: Tensor, fooled: Tensor, curve: Tensor) -> Tensor:
    """Distances (N,) of points from the parabola, negative below it; float64.

    The nearest point of the curve is not further than the one right above or below, at height g, which bounds where it
    is: within g to either side. It is looked for on a grid there, then on finer ones around the best.
    """
    a, b, c = curve.double()
    across = torch.linspace(-1, 1, 201, dtype=torch.float64)
    gap = fooled - (a + b * confidence + c * confidence**2)
    middle, reach = torch.zeros_like(gap), gap.abs()
    for _ in range(5):
        x = confidence[:, None] + middle[:, None] + reach[:, None] * across
        square = (x - confidence[:, None]) ** 2 + (a + b * x + c * x**2 - fooled[:, None]) ** 2
        least, at = square.min(1)
        middle, reach = middle + reach * across[at], reach / 50
    return least.sqrt() * gap.sign()
