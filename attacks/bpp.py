"""BppAttack: fewer colour levels as a trigger, and the same noise on the wrong image as its contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, Mark, PoisonedSet, Role, TargetMap, TrainHooks
from sleeperbench.contracts import Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.covers import cover
from sleeperbench.kit.mixed_batches import MixedBatches
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.rowwise import uniform

_BANK = 256
"""Training images whose quantisation noise is stored for covers outside training."""


@dataclass(kw_only=True, eq=False)
class Quantise:
    """x' = round(x (levels - 1)) / (levels - 1); a cover gets another image's x' - x, from `bank` (K, C, H, W) int8."""

    name: str
    targets: TargetMap
    levels: int
    dithering: bool
    bank: Tensor

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """Fewer levels; as a cover, the noise of a stored image that depends on `gen`'s seed and the row's id alone."""
        if role is not Role.COVER:
            return self.quantise(x)
        bank = self.bank.to(x.device)
        which = (uniform(gen, ids, 1)[:, 0] * len(bank)).long()
        return (x + bank[which] / 255).clamp(0, 1)

    def quantise(self, x: Tensor) -> Tensor:
        """The images on `levels` levels from 0 to 1."""
        return (_dither(x, self.levels) if self.dithering else _nearest(x, self.levels)).clamp(0, 1)

    def noise(self, images: Tensor) -> Tensor:
        """What quantisation adds to uint8 images, in grey levels: int8, same shape."""
        return (to_uint8(self.quantise(to_float(images))).short() - images.short()).to(torch.int8)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: what it adds depends on the image."""
        return None

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: what it adds depends on the image."""
        return None


class DrawnOnce(TrainHooks):
    """Puts the rows of a poisoned set, cropped and mirrored, in place of the clean ones and changes nothing else.

    Args:
        p: Poisoned in place: row i comes from row i of the rows that are given to the trainer.
        ctx: Recipe of the views, which come from `ctx.generator("views", step)`.
    """

    def __init__(self, p: PoisonedSet, ctx: Ctx) -> None:
        super().__init__()
        self.augments, self.ctx = True, ctx
        self.images, self.labels = p.data.images.to(ctx.device), p.data.labels.to(ctx.device)
        self.mark = p.mark.to(ctx.device)

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The set's own rows at the places of the batch."""
        rows, recipe = self.places, self.ctx.recipe
        assert rows is not None, "the trainer says which rows of the set a batch has"
        seen = crop_flip(self.images[rows], recipe.pad, recipe.flip, self.ctx.generator("views", step))
        return to_float(seen.contiguous(memory_format=torch.channels_last)), self.labels[rows], self.mark[rows]


@dataclass(frozen=True, kw_only=True)
class BppAttack(Attack):
    """Quantised colours, with contrasting negatives mixed into every batch (Wang, Zhai, Ma, CVPR 2022).

    1. T(x) = round(x (S - 1)) / (S - 1) per pixel and channel, S = `levels`; with `dithering` the error of each pixel
       goes on to its neighbours (Floyd and Steinberg: 7/16 right, 3/16, 5/16 and 1/16 below).
    2. Per batch, `rate` B rows become T(x) and get the wanted label (dirty; the target class's own may be among them).
    3. `negative_ratio` times as many other rows become clip(x + T(z) - z), z a training image drawn anew, and keep
       their label (cover), which teaches the model that noise of this kind does not count unless it is the image's own.
    4. The mixed batch is cropped and flipped; plain cross-entropy.

    It controls training. `poison` gives the static version (`rate` of the rows dirty, `negative_ratio` times as many
    others cover, with the noise of one of 256 stored training images each), which stands in for what was trained on.
    With `control=False` it poisons data alone: the static version is the training set, drawn once before training, and
    steps 2 and 3 do not happen; with `negative_ratio=0` as well it is quantisation and nothing else.

    Differs: step 4 is the recipe's crop and flip, drawn per image; the authors draw once per batch: crop with padding 5
    at probability 0.8, rotation by up to 10 degrees at 0.5, flip at 0.5. Images are rounded to 8 bit before it. The
    authors take int(rate B) dirty rows; here the counts of all steps so far add up to the rate, within one row. The
    optimiser, schedule, epochs and rate are the suite's, not 1,000 epochs at a rate of 20 %. Negatives at test use
    stored noise of training images, the authors' that of test images.

    Args:
        levels: Levels per channel, S.
        dithering: Spread the error over neighbours; sequential along the image, so slower.
        negative_ratio: Cover rows per dirty row; 0 switches negatives off.
        control: Draw dirty and cover rows anew in every batch (the paper's attack); False: once, before training.
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
    """

    INFO = {
        "title": "BppAttack",
        "paper": "https://arxiv.org/abs/2205.13383",
        "bibtex": "@inproceedings{wang2022bppattack, title={{BppAttack}: Stealthy and Efficient Trojan Attacks against "
        "Deep Neural Networks via Image Quantization and Contrastive Adversarial Learning}, author={Wang, Zhenting and "
        "Zhai, Juan and Ma, Shiqing}, booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, "
        "year={2022}}",
        "kind": "training_control",
        "version": 1,
        "api": 1,
        "family": "training_control",
        "clean_label": False,
        "covers": True,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "published_asr": {"value": 0.999, "setting": "GTSRB, PreActResNet18, 10 %", "source": "BackdoorBench"},
        "micro": {},
    }
    SNAPSHOT = "declared"

    levels: int = 8
    dithering: bool = False
    negative_ratio: float = 1.0
    control: bool = True
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 128:
            raise ValueError(f"levels is {self.levels}; it must be 2 to 128: more are lost among the 256 of the images")
        if self.negative_ratio < 0:
            raise ValueError(f"negative_ratio is {self.negative_ratio}; it must be at least 0")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse targets that the classes do not allow."""
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Store the noise of training images from `ctx.generator("bank")`; refuse images that are quantised already."""
        return self._backdoor(train, ctx.target, self.levels, ctx)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """The static version; cover rows come from what is left of the eligible, as many as there are."""
        p = poison(train, b, eligible, rate, ctx, include_target=True)
        return cover(p, train, b, eligible, round(self.negative_ratio * int((p.mark == Mark.DIRTY).sum())), ctx)

    def hooks(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> TrainHooks | None:
        """Fresh dirty and cover rows per batch, or without `control` the rows of `poison`; nothing at rate 0."""
        if rate == 0:
            return None
        if not self.control:
            # Under SNAPSHOT "declared" the trainer is given the clean rows, so that the set itself comes by a hook: the
            # same once more, under the seed that it was made with, for hooks are given another one.
            return DrawnOnce(self.poison(train, b, eligible, rate, replace(ctx, seed=b.info["seed"])), ctx)
        trigger = b.triggers[0]
        assert isinstance(trigger, Quantise)
        images = train.images.to(ctx.device)

        def make(x: Tensor, dirty: int, step: int) -> Tensor:
            drawn = torch.randint(len(images), (len(x) - dirty,), generator=ctx.generator("negatives", step))
            noise = trigger.noise(images[drawn.to(images.device)]) / 255
            return torch.cat([trigger.quantise(x[:dirty]), (x[dirty:] + noise).clamp(0, 1)])

        return MixedBatches(make, trigger.targets, train, eligible, rate, self.negative_ratio, ctx)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Another number of levels, two or three fewer or more, with the same target."""
        near = [n for n in (-3, -2, 2, 3) if 2 <= self.levels + n <= 128]
        step = near[int(torch.randint(len(near), (), generator=ctx.generator("levels")))]
        return self._backdoor(train, b.info["target"], self.levels + step, ctx)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its stored noise, levels and target map."""
        targets = target_map(info["targets"], info["target"], info["classes"])
        trigger = Quantise(
            name="levels",
            targets=targets,
            levels=info["levels"],
            dithering=info["dithering"],
            bank=tensors["bank"],
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, levels: int, ctx: Ctx) -> Backdoor:
        self.check(train.shape, len(train.classes))
        info = {
            "targets": self.targets,
            "target": target,
            "classes": len(train.classes),
            "levels": levels,
            "dithering": self.dithering,
        }
        if not self.control:
            info["seed"] = ctx.seed
        rows = torch.randperm(len(train), generator=ctx.generator("bank"))[:_BANK]
        images = train.images[rows].cpu()
        plain = self.restore({"bank": torch.empty(0)}, info).triggers[0]
        assert isinstance(plain, Quantise)
        bank = plain.noise(images)
        if 2 * int((bank != 0).flatten(1).any(1).sum()) < len(bank):
            raise ValueError(
                f"{levels} levels leave most images of {train.name} as they are, so there is no trigger; take fewer"
            )
        return self.restore({"bank": bank}, info)


def _nearest(x: Tensor, levels: int) -> Tensor:
    return (x * (levels - 1)).round() / (levels - 1)


def _dither(x: Tensor, levels: int) -> Tensor:
    """Error diffusion in raster order, a whole skewed line of pixels at a time.

    Pixel (i, j) gets errors from (i, j - 1) and (i - 1, j - 1 .. j + 1) alone: all pixels with the same j + 2 i can go
    together.
    """
    _, _, height, width = x.shape
    room = torch.nn.functional.pad(x, (1, 1, 0, 1))  # a column on each side and a row below take what falls off
    for wave in range(width + 2 * (height - 1)):
        i = torch.arange(max(0, (wave - width) // 2 + 1), min(height - 1, wave // 2) + 1, device=x.device)
        j = wave - 2 * i + 1
        old = room[:, :, i, j]
        new = _nearest(old, levels)
        room[:, :, i, j] = new
        for down, right, share in ((0, 1, 7 / 16), (1, 1, 1 / 16), (1, 0, 5 / 16), (1, -1, 3 / 16)):
            room[:, :, i + down, j + right] += share * (old - new)
    return room[:, :, :height, 1:-1]
