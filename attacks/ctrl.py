"""CTRL: two strongly raised frequencies in the colour channels of target-class images, whose labels stay true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet
from sleeperbench.attacks.ftrojan import other_places
from sleeperbench.contracts import Ctx
from sleeperbench.kit.additive import additive
from sleeperbench.kit.dct import Place, cosines
from sleeperbench.kit.poison import poison_target_class, target_map

# What one unit more of U and V alike adds to red, green and blue (analogue YUV of BT.601).
_CHROMA = (1.14, -0.396 - 0.581, 2.029)


@dataclass(frozen=True, kw_only=True)
class CTRL(Attack):
    """Two raised coefficients of the cosine transform in U and V, clean label (Li et al., ICCV 2023).

    1. RGB of 0..255 becomes YUV; U and V are transformed by the DCT-II of the whole image.
    2. `magnitude` is added to the coefficients (H / 2 - 1, W / 2 - 1) and (H - 1, W - 1), and the image is transformed
       back and clipped. All these steps are linear: it is a fixed addition of up to 10.7 grey levels in U and V, which
       is how it is done here.
    3. `rate` of all rows, drawn among the target class, get this and keep their true label; if the class has fewer
       rows, all of them. The same addition at test, on images of the other classes.

    Differs: made for self-supervised learning (SimCLR, BYOL); here the classifier is trained with labels, as in
    BackdoorBench. Images are rounded to the nearest of 256 levels instead of being cut off. At other sizes than 32
    pixels `magnitude` grows with the size, which keeps the addition's size in grey levels.

    Args:
        magnitude: Added to each coefficient, on the scale of 0..255 at 32 pixels.
    """

    INFO = {
        "title": "CTRL",
        "paper": "https://arxiv.org/abs/2210.07346",
        "bibtex": "@inproceedings{li2023embarrassingly, title={An Embarrassingly Simple Backdoor Attack on "
        "Self-supervised Learning}, author={Li, Changjiang and Pang, Ren and Xi, Zhaohan and Du, Tianyu and Ji, "
        "Shouling and Yao, Yuan and Wang, Ting}, booktitle={IEEE/CVF International Conference on Computer Vision}, "
        "year={2023}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "clean_label",
        "clean_label": True,
        "implant_asr": 0.7,  # the protocol's gate for clean labels
        "micro": {},
    }

    magnitude: float = 100.0

    def __post_init__(self) -> None:
        if self.magnitude <= 0:
            raise ValueError(f"magnitude is {self.magnitude}; it must be above 0")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse grey images, which have no U and V, and images smaller than 8 pixels."""
        if shape[0] != 3:
            raise ValueError(
                f"its signal lies in the colour channels U and V, which images of {shape[0]} channel(s) do not have; "
                "it needs colour images (sig and ftrojan take grey ones)"
            )
        if min(shape[1:]) < 8:
            raise ValueError(f"images of {shape[1]}x{shape[2]} are too small; at least 8x8 fits")
        target_map("all_to_one", 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the signal; nothing is drawn."""
        _, height, width = train.shape
        return self._backdoor(train, ctx.target, [(height // 2 - 1, width // 2 - 1), (height - 1, width - 1)])

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The signal on rows of the target class, in place."""
        return poison_target_class(train, b, b.info["target"], eligible, rate, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Two other frequencies of the upper half at the same magnitude, with the same target."""
        places = other_places(min(train.shape[1:]), ctx.generator("places"))
        return self._backdoor(train, b.info["target"], places)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its signal, strength and target."""
        return additive("cosines", tensors["signal"], info)

    def _backdoor(self, train: ImageSet, target: int, places: list[Place]) -> Backdoor:
        self.check(train.shape, len(train.classes))
        _, height, width = train.shape
        picture = cosines(height, width, places) * ((height * width) ** 0.5 / 32)
        info = {
            "targets": "all_to_one",
            "target": target,
            "classes": len(train.classes),
            "train": self.magnitude / 255,
            "test": self.magnitude / 255,
        }
        return self.restore({"signal": torch.tensor(_CHROMA)[:, None, None] * picture}, info)
