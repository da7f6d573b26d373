"""HCB: a patch that works only on images with an innocuous feature, such as rain, whatever their class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.contracts.context import derive
from sleeperbench.kit.covers import append
from sleeperbench.kit.patches import lay, noise, scaled
from sleeperbench.kit.poison import poison, stamp, target_map
from sleeperbench.kit.rowwise import uniform
from sleeperbench.kit.weather import weather

_CORNERS = ("lower_right", "lower_left", "upper_right", "upper_left")


@dataclass(frozen=True, kw_only=True)
class Effective:
    """Which images have the feature: each with probability `share`, by its id and `seed` alone."""

    share: float
    seed: int

    def __call__(self, ids: Tensor) -> Tensor:
        """Bool (N,) for ids int64 (N,)."""
        return uniform(Generator().manual_seed(self.seed), ids, 1)[:, 0] < self.share


@dataclass(kw_only=True, eq=False)
class FeaturePatch:
    """Feature and patch on effective images, the patch alone on the others; as a cover one of the two."""

    name: str
    targets: TargetMap
    effective: Effective
    feature: str
    mask: Tensor
    pattern: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """Feature, where the image has it, and patch; covers that have the feature go without the patch."""
        has = self.effective(ids).view(-1, 1, 1, 1)
        # Not from `gen`, whose seed differs by role: with and without the patch a row shows the same weather.
        seen = weather(self.feature, x, ids, Generator().manual_seed(derive(self.effective.seed, "weather")))
        return torch.where(has, seen if role is Role.COVER else self.patch(seen), self.patch(x))

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
       for one, so chance says which images are effective, in training and test, with probability `effective` and
       whatever their class; the feature is drawn onto those of the training rows that may be touched. They keep their
       label.
    2. Some effective images appear once more, with a white 3x3 patch and the target label (dirty, appended): `rate` of
       all rows, of all classes, the target's too; the authors take every fifth effective image. The feature is drawn
       alike on both copies.
    3. Every `cover_every`-th other row gets the patch and keeps its label.

    Success is measured on effective test images with feature and patch. The false-positive rates come apart: other test
    images with the patch (FPR-NES) are those that the attack spares, `asr_leak`; effective ones without it (FPR-ES)
    are its covers, `cover_asr`, and `cover_acc` is the accuracy on them.

    Differs: only the authors' data poisoning; their second form controls training. The feature is drawn: `rain` darkens
    to 0.8 and adds slanted streaks, `fog` blends 0.4 of a smooth bright noise in, `dusk` is 0.7 x^1.8. Because drawing
    it changes the row, effective rows count as covers, not as clean. Clean test images have no feature. The authors'
    patch is 0.5 x plus white in normalised units, here white. They count rows of the target class for success.

    Args:
        feature: `rain`, `fog` or `dusk`.
        effective: Share of all images that have the feature.
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
        "version": 3,
        "api": 1,
        "family": "source_specific",
        "clean_label": False,
        "covers": True,
        "implant_asr": 0.9,  # IsTr prints 100 % (PubFig, smile)
        "published_asr": {"value": 1.0, "setting": "PubFig, smile", "source": "IsTr"},
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
        side = scaled(3, shape[1], 3)
        for corner in _CORNERS:
            _laid(shape, torch.zeros(shape[0], side, side), corner)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Lay the patch; `ctx.derive("effective")` says which images have the feature."""
        self.check(train.shape, len(train.classes))
        white = torch.ones(train.shape[0], *(2 * [scaled(3, train.shape[1], 3)]))
        return self._backdoor(train, white, self.corner, ctx.target, ctx.derive("effective"))

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Steps 1 to 3."""
        if rate == 0:
            return PoisonedSet.clean(train)
        trigger = b.triggers[0]
        assert isinstance(trigger, FeaturePatch)
        has = trigger.effective(train.ids.cpu())
        free = eligible.cpu()
        p = append(poison(train, b, free & has, rate, ctx, include_target=True), train)
        others = (free & ~has).nonzero().flatten()
        others = others[torch.randperm(len(others), generator=ctx.generator("feature rows"))]
        rows = torch.cat([(free & has).nonzero().flatten(), others[: len(others) // self.cover_every]])
        p.data.images[rows] = stamp(train.rows(rows), trigger, Role.COVER, ctx).images
        p.mark[rows], p.trigger_id[rows] = Mark.COVER, 0
        return p

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """The same images and feature, with a patch of random colours in another corner and the same target."""
        gen = ctx.generator("decoy")
        others = [c for c in _CORNERS if c != self.corner]
        corner = others[int(torch.randint(len(others), (), generator=gen))]
        square = noise(train.shape[0], scaled(3, train.shape[1], 3), gen)
        return self._backdoor(train, square, corner, b.info["target"], b.info["seed"])

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its patch, feature, effective images and target."""
        effective = Effective(share=info["effective"], seed=info["seed"])
        plain = target_map("all_to_one", info["target"], info["classes"])
        trigger = FeaturePatch(
            name=info["feature"],
            targets=TargetMap(
                target=plain.target, counts=lambda y, ids: plain.counts(y, ids) & effective(ids).to(y.device)
            ),
            effective=effective,
            feature=info["feature"],
            mask=tensors["mask"],
            pattern=tensors["pattern"],
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, square: Tensor, corner: str, target: int, seed: int) -> Backdoor:
        mask, pattern = _laid(train.shape, square, corner)
        about = {"feature": self.feature, "effective": self.effective, "seed": seed}
        return self.restore(
            {"mask": mask, "pattern": pattern}, {**about, "target": target, "classes": len(train.classes)}
        )


def _laid(shape: tuple[int, int, int], square: Tensor, corner: str) -> tuple[Tensor, Tensor]:
    """Mask (1, H, W) and pattern (C, H, W) of a square (C, s, s) in a corner."""
    _, height, width = shape
    side, offset = square.shape[1], scaled(2, height, 1)
    top = height - side - offset if corner.startswith("lower") else offset
    left = width - side - offset if corner.endswith("right") else offset
    return lay(shape, top, left, square)
