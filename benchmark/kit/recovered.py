"""Images with a recovered trigger, how far they lie from the true ones, and a picture of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench.contracts.defense import Inverted
from sleeperbench.contracts.evaluator import EvalCase
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.masks import appliable, apply
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.predict import spread

_SHOWN = 8


def stamped(claim: Inverted, data: ImageSet, part: str = "test") -> Tensor:
    """uint8 images with a recovered trigger that has a mask or a delta, rounded to 8 bit; whatever `part` they are."""
    return torch.cat([to_uint8(apply(claim, to_float(x))) for x in data.images.split(1000)])


def victims(claim: Inverted, data: ImageSet) -> ImageSet:
    """Images of other labels than the claimed one; of a source-specific claim, those of its source class."""
    labels = data.labels
    return data.rows(labels != claim.target if claim.source is None else labels == claim.source)


class Stamper:
    """Puts recovered triggers on test and probe images, or looks up what the inverter's own code made of them.

    Args:
        case: With `outcome`, `stamps`, `test` and `probe`.
    """

    def __init__(self, case: EvalCase) -> None:
        self._numbers = {id(claim): i for i, claim in enumerate(case.outcome.inverted)}
        self._stamps = case.stamps
        ids = {"test": case.test.ids, "probe": case.probe.ids}
        self._places = {part: {row: i for i, row in enumerate(rows.tolist())} for part, rows in ids.items()}

    def knows(self, claim: Inverted) -> bool:
        """Whether there are images with this trigger."""
        return appliable(claim) or f"{self._numbers[id(claim)]}.test" in self._stamps

    def __call__(self, claim: Inverted, data: ImageSet, part: str = "test") -> Tensor:
        """uint8 images with the recovered trigger, rounded to 8 bit; `data` are rows of the case's `part`."""
        if appliable(claim):
            return stamped(claim, data)
        made, places = self._stamps[f"{self._numbers[id(claim)]}.{part}"], self._places[part]
        return made[[places[row] for row in data.ids.tolist()]].to(data.images.device)


def difference(a: Tensor, b: Tensor) -> float:
    """Mean |a - b| of two uint8 tensors over images, channels and pixels, in units of the full range."""
    return float((a.double() - b.double()).abs().mean()) / 255


def some(chosen: Tensor, at_most: int) -> Tensor:
    """At most so many of the rows where `chosen` is True, evenly spread."""
    rows = chosen.nonzero().flatten()
    return rows[spread(len(rows), at_most)]


def picture(case: EvalCase, claims: Mapping[int, Inverted], true: Sequence[int], stamp: Stamper) -> tuple[Tensor, int]:
    """Per image: clean, with the true trigger, with the recovered one, the two's difference, and the mask or delta."""
    labels = (true or list(claims))[:_SHOWN]
    parts = []
    for label in labels:
        claim, each = claims.get(label), max(1, _SHOWN // len(labels))
        if case.bd_test is not None:
            rows = some(case.bd_test.targets == label, each)
            data, wanted = case.bd_test.clean.rows(rows), case.bd_test.data.images[rows]
        else:
            data = case.test.rows(some(case.test.labels != label, each))
            wanted = data.images
        clean = own = data.images
        shape = torch.zeros_like(clean)
        if claim is not None:
            own = stamp(claim, data)
            shape = _shape(claim, clean, own)
        parts.append(torch.stack([clean, wanted, own, shape], 1).cpu())
    sheet = torch.cat(parts)
    residual = sheet[:, 2].double() - sheet[:, 1].double()
    factor = max(1, int(127 // max(1.0, float(residual.abs().max()))))
    shown = (128 + factor * residual).clamp(0, 255).to(torch.uint8)
    sheet = torch.cat([sheet[:, :3], shown[:, None], sheet[:, 3:]], 1)
    sheet = F.pad(sheet, (1, 1, 1, 1), value=255)
    n, columns, channels, height, width = sheet.shape
    return sheet.permute(2, 0, 3, 1, 4).reshape(channels, n * height, columns * width), factor


def _shape(claim: Inverted, clean: Tensor, own: Tensor) -> Tensor:
    """The claim's mask, white where it covers, or what it adds, around mid-grey; once per image."""
    if claim.mask is not None:
        return to_uint8(claim.mask).to(clean.device).expand_as(clean)
    if claim.delta is not None:
        return to_uint8(0.5 + claim.delta).to(clean.device).expand_as(clean)
    return to_uint8(0.5 + to_float(own) - to_float(clean))
