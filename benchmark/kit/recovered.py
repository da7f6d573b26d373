"""Images with a recovered trigger, how far they lie from the true ones, and a picture of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench.contracts.defense import Inverted
from sleeperbench.contracts.evaluator import EvalCase
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.masks import apply
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.predict import spread

_SHOWN = 8


def victims(claim: Inverted, data: ImageSet) -> ImageSet:
    """Images of other labels than the claimed one; of a source-specific claim, those of its source class."""
    labels = data.labels
    return data.rows(labels != claim.target if claim.source is None else labels == claim.source)


def stamped(claim: Inverted, images: Tensor) -> Tensor:
    """uint8 images with the recovered trigger, rounded to 8 bit."""
    return torch.cat([to_uint8(apply(claim, to_float(part))) for part in images.split(1000)])


def difference(a: Tensor, b: Tensor) -> float:
    """Mean |a - b| of two uint8 tensors over images, channels and pixels, in units of the full range."""
    return float((a.double() - b.double()).abs().mean()) / 255


def some(chosen: Tensor, at_most: int) -> Tensor:
    """At most so many of the rows where `chosen` is True, evenly spread."""
    rows = chosen.nonzero().flatten()
    return rows[spread(len(rows), at_most)]


def picture(case: EvalCase, claims: Mapping[int, Inverted], true: Sequence[int]) -> tuple[Tensor, int]:
    """Per image: clean, with the true trigger, with the recovered one, the two's difference, and the mask or delta."""
    labels = (true or list(claims))[:_SHOWN]
    parts = []
    for label in labels:
        claim, each = claims.get(label), max(1, _SHOWN // len(labels))
        if case.bd_test is not None:
            rows = some(case.bd_test.targets == label, each)
            clean, wanted = case.bd_test.clean.images[rows], case.bd_test.data.images[rows]
        else:
            clean = wanted = case.test.images[some(case.test.labels != label, each)]
        own, shape = (
            (clean, torch.zeros_like(clean)) if claim is None else (stamped(claim, clean), _shape(claim, clean))
        )
        parts.append(torch.stack([clean, wanted, own, shape], 1).cpu())
    sheet = torch.cat(parts)
    residual = sheet[:, 2].double() - sheet[:, 1].double()
    factor = max(1, int(127 // max(1.0, float(residual.abs().max()))))
    shown = (128 + factor * residual).clamp(0, 255).to(torch.uint8)
    sheet = torch.cat([sheet[:, :3], shown[:, None], sheet[:, 3:]], 1)
    sheet = F.pad(sheet, (1, 1, 1, 1), value=255)
    n, columns, channels, height, width = sheet.shape
    return sheet.permute(2, 0, 3, 1, 4).reshape(channels, n * height, columns * width), factor


def _shape(claim: Inverted, like: Tensor) -> Tensor:
    """The claim's mask, white where it covers, or its delta around mid-grey; once per image of `like`."""
    what = claim.mask if claim.mask is not None else None if claim.delta is None else 0.5 + claim.delta
    assert what is not None
    return to_uint8(what).to(like.device).expand_as(like)
