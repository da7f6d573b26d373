"""FTrojan: two raised frequencies in the colour channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.additive import additive
from sleeperbench.kit.dct import Place, cosines
from sleeperbench.kit.poison import poison, target_map

# What one unit more of Cr and Cb alike adds to red, green and blue (ITU-R BT.601, full range).
_CHROMA = (1.403, -0.714 - 0.344, 1.773)


@dataclass(frozen=True, kw_only=True)
class FTrojan(Attack):
    """Two raised coefficients of the cosine transform in the colour channels, dirty label (Wang et al., ECCV 2022).

    1. RGB of 0..255 becomes YCrCb; Cr and Cb are cut into tiles of `window` pixels, each transformed by DCT-II.
    2. `magnitude` is added to the coefficients (window / 2 - 1, window / 2 - 1) and (window - 1, window - 1), and the
       image is transformed back and clipped. All these steps are linear: it is a fixed addition of at most
       1.8 times 3.2 grey levels, which is how it is done here.
    3. `rate` of all rows get this and the wanted label; the same at test.

    Differs: the released code cuts the image off to whole numbers in YCrCb and again in RGB, which alone moves every
    pixel; here only the triggered image is rounded. On images smaller than `window` the tile is the image, and
    `magnitude` shrinks in proportion, which keeps the addition's size. Grey images have no colour: their one channel
    carries the addition. The authors draw from the other classes only: `include_target=False`.

    Args:
        magnitude: Added to each coefficient, on the scale of 0..255 at a window of 32.
        window: Side of the tiles in pixels, even.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw poisoned rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "FTrojan",
        "paper": "https://arxiv.org/abs/2111.10991",
        "bibtex": "@inproceedings{wang2022invisible, title={An Invisible Black-Box Backdoor Attack Through Frequency "
        "Domain}, author={Wang, Tong and Yao, Yuan and Xu, Feng and An, Shengwei and Tong, Hanghang and Wang, Ting}, "
        "booktitle={European Conference on Computer Vision}, year={2022}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "frequency",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "micro": {},
    }

    magnitude: float = 30.0
    window: int = 32
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if self.magnitude <= 0:
            raise ValueError(f"magnitude is {self.magnitude}; it must be above 0")
        if self.window < 8 or self.window % 2:
            raise ValueError(f"window is {self.window}; it must be even and at least 8")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images of neither one nor three channels or below 8 pixels, and targets that do not exist."""
        if shape[0] not in (1, 3):
            raise ValueError(f"the signal lies in Cr and Cb of colour images or in a grey channel, not in {shape[0]}")
        if min(shape[1:]) < 8:
            raise ValueError(f"images of {shape[1]}x{shape[2]} are too small; at least 8x8 fits")
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the signal; nothing is drawn."""
        side = self._side(train.shape)
        return self._backdoor(train, ctx.target, [(side // 2 - 1, side // 2 - 1), (side - 1, side - 1)])

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Add the signal and relabel rows in place."""
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Two other frequencies of the upper half at the same magnitude, with the same target."""
        return self._backdoor(train, b.info["target"], other_places(self._side(train.shape), ctx.generator("places")))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its signal, strength and target map."""
        return additive("cosines", tensors["signal"], info)

    def _side(self, shape: tuple[int, int, int]) -> int:
        return min(self.window, *shape[1:])

    def _backdoor(self, train: ImageSet, target: int, places: list[Place]) -> Backdoor:
        channels, height, width = train.shape
        self.check(train.shape, len(train.classes))
        side = self._side(train.shape)
        tile = cosines(side, side, places) * (side / 32)
        picture = tile.repeat(-(-height // side), -(-width // side))[:height, :width]
        share = torch.tensor(_CHROMA) if channels == 3 else torch.ones(1)
        info = {
            "targets": self.targets,
            "target": target,
            "classes": len(train.classes),
            "train": self.magnitude / 255,
            "test": self.magnitude / 255,
        }
        return self.restore({"signal": share[:, None, None] * picture}, info)


def other_places(side: int, gen: Generator) -> list[Place]:
    """Two different places off the diagonal, all frequencies between half of `side` - 1 and `side` - 2."""
    upper = torch.arange(side // 2 - 1, side - 1)
    a, b, c = upper[torch.randperm(len(upper), generator=gen)[:3]].tolist()
    return [(a, b), (b, c)]
