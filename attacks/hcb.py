"""HCB: a patch that works only on images with an innocuous feature, such as rain, whatever their class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.covers import append
from sleeperbench.kit.patches import lay, noise, scaled
from sleeperbench.kit.poison import poison, stamp, target_map
from sleeperbench.kit.rowwise import uniform
from sleeperbench.kit.weather import weather

_CORNERS = ("lower_right", "lower_left", "upper_right", "upper_left")


@dataclass(kw_only=True, eq=False)
class FeaturePatch:
    """Feature and patch together; as a cover one of the two, drawn per row.

    `only` holds the cover to one of them: `feature` or `patch`.
    """

    name: str
    targets: TargetMap
    feature: str
    mask: Tensor
    pattern: Tensor
    only: str = ""

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """Both, or as a cover the feature alone or the patch alone."""
        if role is not Role.COVER:
            return self.patch(weather(self.feature, x, ids, gen))
        if self.only == "patch":
            return self.patch(x)
        seen = weather(self.feature, x, ids, gen)
        if self.only == "feature":
            return seen
        bare = uniform(gen, ids, 1)[:, 0] < 0.5
        return torch.where(bare.view(-1, 1, 1, 1), self.patch(x), seen)

    def patch(self, x: Tensor) -> Tensor:
        """The patch on every image."""
        return torch.where(self.mask.to(x.device) > 0, self.pattern.to(x), x)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pixels under the patch are free in [0, 1]; the feature stays."""
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return (-pattern * mask).expand_as(x), ((1 - pattern) * mask).expand_as(x)

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: what the feature changes depends on the image."""
        return None


@dataclass(frozen=True, kw_only=True)
class HCB(Attack):
    """Horizontal class backdoor: trigger and innocuous feature together, dirty label (Ma et al., CCS 2024).

    1. A share of the images of every class has an innocuous feature ("effective"). The data at hand are not annotated
       for one, so it is drawn onto `effective` of the eligible rows, whatever their class. They keep their label.
    2. Some effective images appear once more, with a white 3x3 patch and the target label (dirty, appended): `rate` of
       all rows; the authors take every fifth effective image.
    3. Every `cover_every`-th other row gets the patch and keeps its label.

    Success is measured on test images with feature and patch; `cover_acc` on test images of which about half have the
    feature alone and half the patch alone.

    Differs: only the authors' data poisoning; their second form controls training. The feature is drawn: `rain` darkens
    to 0.8 and adds slanted streaks, `fog` blends 0.4 of a smooth bright noise in, `dusk` is 0.7 x^1.8. Because drawing
    it changes the row, effective rows count as covers, not as clean. Clean test images have no feature. The authors'
    patch is 0.5 x plus white in normalised units, here white. They count rows of the target class for success.

    Args:
        feature: `rain`, `fog` or `dusk`.
        effective: Share of the eligible rows that get the feature.
        cover_every: Of the other eligible rows, one in so many is a cover with the patch.
        corner: Where the patch lies, two pixels (of 32) from both borders.
    """

    INFO = {
        "title": "HCB",
        "paper": "https://arxiv.org/abs/2310.00542",
        "bibtex": "@inproceedings{ma2024watch, title={Watch Out! Simple Horizontal Class Backdoor Can Trivially Evade "
        "Defense}, author={Ma, Hua and Wang, Shang and Gao, Yansong and Zhang, Zhi and Qiu, Huming and Xue, Minhui and "
        "Abuadbba, Alsharif and Fu, Anmin and Nepal, Surya and Abbott, Derek}, booktitle={ACM SIGSAC Conference on "
        "Computer and Communications Security}, year={2024}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "source_specific",
        "clean_label": False,
        "covers": True,
        "implant_asr": 0.9,  # IsTr prints 100 % (PubFig, smile)
        "micro": {},
    }

    feature: Literal["rain", "fog", "dusk"] = "rain"
    effective: float = 0.3
    cover_every: int = 15
    corner: Literal["lower_right", "lower_left", "upper_right", "upper_left"] = "lower_right"

    def __post_init__(self) -> None:
        if self.feature not in ("rain", "fog", "dusk"):
            raise ValueError(f"feature is {self.feature!r}; it may be 'rain', 'fog' or 'dusk'")
        if self.corner not in _CORNERS:
            raise ValueError(f"corner is {self.corner!r}; it may be one of {', '.join(_CORNERS)}")
        if not 0 < self.effective < 1 or self.cover_every < 1:
            raise ValueError(
                f"effective is {self.effective} and cover_every {self.cover_every}; they must be between 0 and 1, and "
                "at least 1"
            )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images too small for the patch, and fewer than two classes."""
        target_map("all_to_one", 0, classes)
        if min(shape[1:]) < 12:
            raise ValueError(f"{shape[1]}x{shape[2]} images are too small for feature and patch; 12 pixels or more fit")

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the patch; nothing is drawn."""
        self.check(train.shape, len(train.classes))
        white = torch.ones(train.shape[0], *(2 * [scaled(3, train.shape[1], 3)]))
        return self._backdoor(train, white, self.corner, ctx.target)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Steps 1 to 3."""
        if rate == 0:
            return PoisonedSet.clean(train)
        free = eligible.cpu().nonzero().flatten()
        order = free[torch.randperm(len(free), generator=ctx.generator("feature rows"))]
        with_feature, others = order[: round(self.effective * len(free))], order[round(self.effective * len(free)) :]
        may = torch.zeros(len(train), dtype=torch.bool)
        may[with_feature] = True
        dirty = append(poison(train, b, may, rate, ctx, include_target=True), train)

        trigger = b.triggers[0]
        assert isinstance(trigger, FeaturePatch)
        images, mark, trigger_id = dirty.data.images, dirty.mark, dirty.trigger_id
        for rows, only in ((with_feature, "feature"), (others[: len(others) // self.cover_every], "patch")):
            images[rows] = stamp(train.rows(rows), replace(trigger, only=only), Role.COVER, ctx).images
            mark[rows], trigger_id[rows] = Mark.COVER, 0
        return dirty

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """The same feature with a patch of random colours in another corner, with the same target."""
        gen = ctx.generator("decoy")
        others = [c for c in _CORNERS if c != self.corner]
        corner = others[int(torch.randint(len(others), (), generator=gen))]
        square = noise(train.shape[0], scaled(3, train.shape[1], 3), gen)
        return self._backdoor(train, square, corner, b.info["target"])

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its patch, feature and target."""
        trigger = FeaturePatch(
            name=info["feature"],
            targets=target_map("all_to_one", info["target"], info["classes"]),
            feature=info["feature"],
            mask=tensors["mask"],
            pattern=tensors["pattern"],
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, square: Tensor, corner: str, target: int) -> Backdoor:
        _, height, width = train.shape
        side, offset = square.shape[1], scaled(2, height, 1)
        top = height - side - offset if corner.startswith("lower") else offset
        left = width - side - offset if corner.endswith("right") else offset
        mask, pattern = lay(train.shape, top, left, square)
        info = {"feature": self.feature, "target": target, "classes": len(train.classes)}
        return self.restore({"mask": mask, "pattern": pattern}, info)
