"""Refool: a reflection in front of the image, as in a window pane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from sleeperbench import Attack, Backdoor, ImageSet, PoisonedSet, Role, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.poison import poison, target_map
from sleeperbench.kit.rowwise import uniform

_GAMMA = 2.2
_LEAVES = 64
_ROWS = 128
"""Images blended at a time: each has two matrices of its size."""


@dataclass(kw_only=True, eq=False)
class Reflection:
    """The image through glass that reflects one of `pictures` (K, C, H, W) uint8, doubled or out of focus."""

    name: str
    targets: TargetMap
    pictures: Tensor
    alpha: float
    ghost_rate: float

    def apply(self, x: Tensor, y: Tensor, ids: Tensor, role: Role, gen: Generator) -> Tensor:
        """A picture and its optics per row, which depend on `gen`'s seed (so on the role) and the row's id alone."""
        draws = uniform(gen, ids, 8)
        return torch.cat([self._blend(*part) for part in zip(x.split(_ROWS), draws.split(_ROWS), strict=True)])

    def _blend(self, x: Tensor, u: Tensor) -> Tensor:
        """Steps 2 to 5 of `Refool` from eight numbers of U[0, 1) per row."""
        height, width = x.shape[2:]
        pictures = self.pictures.to(x.device)
        r = (pictures[(u[:, 0] * len(pictures)).long()] / 255) ** _GAMMA
        t = x**_GAMMA
        ghost = (u[:, 1] < self.ghost_rate)[:, None, None]
        share = torch.where(u[:, 4] < 0.5, 0.15 + 0.35 * u[:, 5], 0.85 - 0.35 * u[:, 5])[:, None, None, None]

        # Both optics are one matrix along each axis: the blur, or the two shifted copies of the ghost.
        near, far = [], []
        for size, draw in ((height, u[:, 2]), (width, u[:, 3])):
            shift = (3 + (draw * 6).floor()) * size / 32
            blur = _blur((1 + 4 * u[:, 6]) * size / 32, size)
            near.append(torch.where(ghost, _stretch(shift, shift, size), blur))
            far.append(_stretch(torch.zeros_like(shift), shift, size))
        seen, second = _through(near, r), _through(far, r)

        alpha = torch.full_like(u[:, 7], self.alpha) if self.alpha else 0.55 + 0.4 * u[:, 7]
        alpha = alpha[:, None, None, None]
        double = (share * seen + (1 - share) * second) * (1 - alpha)
        single = _dim(seen, t, 1.08 + 0.1 * u[:, 5]) * _vignette(height, width, x) * (1 - alpha / 2)
        return (torch.where(ghost[..., None], double, single) + alpha * t).clamp(0, 1) ** (1 / _GAMMA)

    def range(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: what it adds depends on the image."""
        return None

    def static(self) -> tuple[Tensor, Tensor] | None:
        """None: each row has a reflection of its own."""
        return None


@dataclass(frozen=True, kw_only=True)
class Refool(Attack):
    """A reflection of another scene, drawn anew per image (Liu, Ma, Bailey, Lu, ECCV 2020).

    1. `pictures` scenes are made once; each triggered row draws one of them. Image t and scene r are blended in linear
       light, x^2.2, and taken back by the power 1 / 2.2.
    2. With probability `ghost_rate` the scene is doubled, as by a thick pane: share g of it is shifted by 3 to 8 pixels
       per axis (at 32 pixels) and 1 - g is not, g from U(0.15, 0.5) or one minus that; what both copies cover is
       stretched to the image's size and enters with weight 1 - alpha.
    3. Otherwise it is out of focus: blurred by a Gaussian of deviation U(1, 5) pixels (at 32), lowered per channel by
       1.08 to 1.18 times the mean excess of scene plus image over 1, and weighted by a vignette times 1 - alpha / 2.
    4. The image enters with weight `alpha`, which darkens it.
    5. `rate` of all rows get this and the wanted label; at test every image draws a reflection of its own.

    Differs: the scenes are made up, of overlapping discs whose radii follow a power law (dead leaves, which have the
    edges and spectrum of photographs); the authors choose 200 photographs by retraining until they fool a classifier.
    Labels are flipped and `alpha` is fixed at 0.4, as in BackdoorBench, which reports that the authors' clean label and
    random alpha do not implant a target class; `labels="clean", alpha=0` is their form. Shift and blur grow with the
    image's size, the stretch is bilinear, and images are rounded to the nearest of 256 levels.

    Args:
        pictures: Scenes to reflect.
        alpha: Weight of the image in linear light; 0 draws it per image from U(0.55, 0.95).
        ghost_rate: Probability of the doubled form.
        labels: `dirty` (rows of any class get the wanted label) or `clean` (rows of the target class, all-to-one only).
        targets: `all_to_one` (the run's target class) or `all_to_all` (y to y + 1).
        include_target: Draw dirty rows from all classes, the target class too, as BackdoorBench does.
    """

    INFO = {
        "title": "Refool",
        "paper": "https://arxiv.org/abs/2007.02343",
        "bibtex": "@inproceedings{liu2020reflection, title={Reflection Backdoor: A Natural Backdoor Attack on Deep "
        "Neural Networks}, author={Liu, Yunfei and Ma, Xingjun and Bailey, James and Lu, Feng}, booktitle={European "
        "Conference on Computer Vision}, year={2020}}",
        "kind": "data_poisoning",
        "version": 1,
        "api": 1,
        "family": "blend",
        "clean_label": False,
        "implant_asr": 0.9,  # the protocol's gate for dirty-label attacks at a rate of 5 % or more
        "micro": {"pictures": 8},
    }

    pictures: int = 200
    alpha: float = 0.4
    ghost_rate: float = 0.49
    labels: Literal["dirty", "clean"] = "dirty"
    targets: Literal["all_to_one", "all_to_all"] = "all_to_one"
    include_target: bool = True

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"pictures is {self.pictures}; it must be at least 1")
        for name, value in (("alpha", self.alpha), ("ghost_rate", self.ghost_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be 0 to 1")
        if self.labels not in ("dirty", "clean"):
            raise ValueError(f"labels is {self.labels!r}; it may be 'dirty' or 'clean'")
        if self.labels == "clean" and self.targets != "all_to_one":
            raise ValueError("labels='clean' needs targets='all_to_one': a clean label says one class")

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Refuse images below 12 pixels, whose blur would be wider than they are, and targets that do not exist."""
        if min(shape[1:]) < 12:
            raise ValueError(f"images of {shape[1]}x{shape[2]} are too small for a reflection; at least 12x12 fits")
        target_map(self.targets, 0, classes)

    def prepare(self, train: ImageSet, ctx: Ctx) -> Backdoor:
        """Make the scenes from `ctx.generator("pictures")`."""
        return self._backdoor(train, ctx.target, ctx)

    def poison(self, train: ImageSet, b: Backdoor, eligible: Tensor, rate: float, ctx: Ctx) -> PoisonedSet:
        """Reflections on rows in place, which get the wanted label or have it."""
        if self.labels == "clean":
            own = eligible.cpu() & (train.labels == b.info["target"]).cpu()
            return poison(train, b, own, rate, ctx, include_target=True)
        return poison(train, b, eligible, rate, ctx, include_target=self.include_target)

    def decoy(self, train: ImageSet, b: Backdoor, ctx: Ctx) -> Backdoor:
        """Other scenes through the same glass, with the same target."""
        return self._backdoor(train, b.info["target"], ctx)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], info: Any) -> Backdoor:
        """The backdoor from its scenes, optics and target map."""
        trigger = Reflection(
            name="reflection",
            targets=target_map(info["targets"], info["target"], info["classes"]),
            pictures=tensors["pictures"],
            alpha=info["alpha"],
            ghost_rate=info["ghost_rate"],
        )
        return Backdoor(triggers=(trigger,), tensors=tensors, info=info)

    def _backdoor(self, train: ImageSet, target: int, ctx: Ctx) -> Backdoor:
        self.check(train.shape, len(train.classes))
        info = {
            "targets": self.targets,
            "target": target,
            "classes": len(train.classes),
            "alpha": self.alpha,
            "ghost_rate": self.ghost_rate,
        }
        return self.restore({"pictures": _scenes(self.pictures, train.shape, ctx.generator("pictures"))}, info)


def _scenes(n: int, shape: tuple[int, int, int], gen: Generator) -> Tensor:
    """Pictures of overlapping discs, radii from 1/20 to 1/2 of the side with density r^-3: uint8 (n, C, H, W)."""
    channels, height, width = shape
    scenes = torch.randint(256, (n, channels, 1, 1), generator=gen, dtype=torch.uint8).repeat(1, 1, height, width)
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    cols = (torch.arange(width) + 0.5) / width
    for _ in range(_LEAVES):
        top, left, u = torch.rand(3, n, 1, 1, generator=gen)
        radius = (400 - u * (400 - 4)) ** -0.5  # 1 / r^2 is uniform from 4 to 400
        inside = (rows - top) ** 2 + (cols - left) ** 2 < radius**2
        colour = torch.randint(256, (n, channels, 1, 1), generator=gen, dtype=torch.uint8)
        scenes = torch.where(inside[:, None], colour, scenes)
    return scenes


def _through(axes: list[Tensor], r: Tensor) -> Tensor:
    """`axes` (N, H, H) and (N, W, W) along the rows and columns of r (N, C, H, W)."""
    return axes[0][:, None] @ r @ axes[1].transpose(1, 2)[:, None]


def _stretch(start: Tensor, lost: Tensor, size: int) -> Tensor:
    """(N, size, size): samples `size - lost` pixels from `start` on as `size` pixels, bilinearly."""
    at = (torch.arange(size, device=start.device) + 0.5) * ((size - lost) / size)[:, None] - 0.5
    at = torch.minimum(at.clamp(min=0), (size - 1 - lost)[:, None]) + start[:, None]
    return (1 - (at[:, :, None] - torch.arange(size, device=start.device)).abs()).clamp(min=0)


def _blur(sigma: Tensor, size: int) -> Tensor:
    """(N, size, size): Gaussian blur cut off at two deviations, mirrored at the border's middle."""
    reach = min(size - 1, -(-10 * size // 32))
    there = torch.arange(-reach, size + reach, device=sigma.device)
    away = (there - torch.arange(size, device=sigma.device)[:, None]).abs()
    sigma = sigma[:, None, None]
    weight = torch.exp(-(away**2) / (2 * sigma**2)) * (away <= (2 * sigma).ceil())
    weight /= weight.sum(2, keepdim=True)
    mirrored = (size - 1 - (there.abs() - (size - 1)).abs())[None, None].expand_as(weight)
    return torch.zeros(len(sigma), size, size, device=sigma.device).scatter_add_(2, mirrored, weight)


def _dim(r: Tensor, t: Tensor, strength: Tensor) -> Tensor:
    """Scene r lowered per row and channel by `strength` times the mean excess over 1 of r + t, where it exceeds 1."""
    both = r + t
    over = both > 1
    excess = ((both - 1) * over).sum((2, 3)) / over.sum((2, 3)).clamp(min=1)
    return (r - (excess * strength[:, None])[..., None, None]).clamp(0, 1)


def _vignette(height: int, width: int, like: Tensor) -> Tensor:
    """(height, width): 1 in the middle, exp(-(u^2 + v^2) / 4) with u and v from -3 to 3 along the axes."""
    u, v = (((torch.arange(n, device=like.device) + 0.5) / n * 6 - 3) ** 2 for n in (height, width))
    return torch.exp(-(u[:, None] + v) / 4)
