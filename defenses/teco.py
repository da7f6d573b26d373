"""TeCo: a triggered image withstands some corruptions much longer than others, a clean one all about alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.contracts.context import derive
from sleeperbench.kit.dct import cosines
from sleeperbench.kit.pixels import to_float, to_uint8


@dataclass(frozen=True, kw_only=True)
class TeCo(Defense):
    """Test-time corruption robustness consistency, from hard labels (Liu et al., CVPR 2023).

    1. An input is corrupted in 15 ways (those of ImageNet-C) with severities 1 to 5, each from the clean image.
    2. Per corruption: the first severity at which the label is not that of the input itself; 6 where there is none.
    3. Score: the standard deviation of these 15 numbers (divided by 15).

    No clean data, no threshold. Severities have the constants of ImageNet-C, in pixels, as in package imagecorruptions.

    Differs: every draw (noise, angles, shuffles, snow, fog) is made once per seed, corruption and severity and is the
    same for all inputs, so that a score depends on its own input alone. BackdoorBench corrupts what severity 1, and the
    corruptions before, already corrupted; here always the input. Corruptions are made in batches and rounded to 8 bit;
    what each does otherwise than its model stands at its function. Images below 32 pixels, which the package refuses,
    are taken.

    Args:
        corruptions: Which of the 15.
        severities: How many of the five; a label that never changes counts as one more.
    """

    INFO = {
        "title": "TeCo",
        "paper": "https://arxiv.org/abs/2303.18191",
        "bibtex": "@inproceedings{liu2023detecting, title={Detecting Backdoors During the Inference Stage Based on "
        "Corruption Robustness Consistency}, author={Liu, Xiaogeng and Li, Minghui and Wang, Haoyu and Hu, Shengshan "
        "and Ye, Dengpan and Jin, Hai and Wu, Libing and Xiao, Chaowei}, booktitle={IEEE/CVF Conference on Computer "
        "Vision and Pattern Recognition}, pages={16363--16372}, year={2023}}",
        "kind": "detection",
        "version": 1,
        "api": 1,
        "micro": {"severities": 2},
        "effort": ["severities"],
        "scores": True,
        "traverses": False,
        "presumes": "a trigger that withstands some corruptions much longer than others",
    }
    ACCESS = Access(model="labels", clean=0)

    corruptions: tuple[str, ...] = (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
        "frost",
        "fog",
        "brightness",
        "contrast",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    )
    severities: int = 5

    def __post_init__(self) -> None:
        unknown = sorted(set(self.corruptions) - set(CORRUPTIONS))
        if unknown or len(self.corruptions) < 2:
            raise ValueError(f"corruptions are {self.corruptions}: give two or more of {', '.join(CORRUPTIONS)}")
        if not 1 <= self.severities <= 5:
            raise ValueError(f"severities is {self.severities}; it may be 1 to 5")

    def run(self, case: Case) -> Outcome:
        """The seed of all draws; nothing is asked."""
        seed = case.ctx.derive("corruptions") % 2**31
        return Outcome(state=({}, {"seed": seed}), chosen={"corruptions": len(self.corruptions)})

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: nn.Module, x: Tensor) -> Tensor:
        """Standard deviation (N,) of the severities that change the label."""
        answer = net(x)
        first = []
        for name in self.corruptions:
            held = [net(corrupt(x, name, s, state[1]["seed"])) == answer for s in range(1, self.severities + 1)]
            first.append(transition(torch.stack(held)))
        return torch.stack(first).float().std(0, unbiased=False)


def transition(held: Tensor) -> Tensor:
    """First severity (N,), from 1, at which a label did not hold, from bool (S, N); S + 1 where all did."""
    return 1 + held.long().cumprod(0).sum(0)


def corrupt(x: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupted copies of images (N, C, H, W) in [0, 1], rounded to 8 bit.

    Args:
        x: Images.
        name: A key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of all that is drawn; the same draws for all images.
    """
    gen = torch.Generator().manual_seed(derive(seed, name, severity))
    return to_float(to_uint8(CORRUPTIONS[name](x, severity - 1, gen)))


def _normal(x: Tensor, gen: Generator) -> Tensor:
    return torch.randn(x.shape[1:], generator=gen).to(x)


def _uniform(x: Tensor, gen: Generator) -> Tensor:
    return torch.rand(x.shape[1:], generator=gen).to(x)


def gaussian_noise(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Plus normal noise."""
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[s] * _normal(x, gen)


def shot_noise(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Poisson counts of c photons per full pixel, by inversion of one uniform number per pixel."""
    c = (60, 25, 12, 5, 3)[s]
    rate, u = x * c, _uniform(x, gen)
    chance = (-rate).exp()
    below, count = chance.clone(), torch.zeros_like(x)
    for k in range(1, 2 * c + 20):  # more than c + 7 sqrt(c) counts do not occur
        count += u >= below
        chance = chance * rate / k
        below = below + chance
    return count / c


def impulse_noise(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Values set to 0 or 1, as often."""
    c, u = (0.03, 0.06, 0.09, 0.17, 0.27)[s], _uniform(x, gen)
    return torch.where(u < c / 2, 0.0, torch.where(u < c, 1.0, x))


def defocus_blur(x: Tensor, s: int, gen: Generator) -> Tensor:
    """A disc, its edge smoothed; edges of the image are repeated (the package reflects them)."""
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[s]
    reach = max(8, radius)
    at = torch.arange(-reach, reach + 1)
    disc = (at[:, None] ** 2 + at**2 <= radius**2).float()
    edge = torch.exp(-(torch.arange(-2, 3).float() ** 2) / (2 * alias**2))
    if radius <= 8:
        edge = edge[1:4]
    kernel = _along(_along((disc / disc.sum())[None, None], edge / edge.sum(), 2), edge / edge.sum(), 3).to(x)
    c = x.shape[1]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(c, 1, -1, -1), groups=c)


def glass_blur(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Blurred, neighbours swapped, blurred; the package copies one onto the other instead of swapping them."""
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    h, w = x.shape[2:]
    place = np.arange(h * w).reshape(h, w)
    draws = torch.randint(-reach, reach, (times, h, w, 2), generator=gen).numpy()
    for i in range(times):
        for r in range(h - reach - 1, reach, -1):
            for c in range(w - reach - 1, reach, -1):
                other = (r + draws[i, r, c, 0], c + draws[i, r, c, 1])
                place[r, c], place[other] = place[other], place[r, c]
    order = torch.from_numpy(place.ravel()).to(x.device)
    return _gaussian(_gaussian(x, sigma).flatten(2)[:, :, order].view_as(x), sigma)


def motion_blur(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Half a Gaussian along a line at 45 degrees at most."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    return _streak(x, radius, sigma, 90 * float(torch.rand(1, generator=gen)) - 45)


def zoom_blur(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Mean of the image and of itself enlarged by up to a factor of 1.3."""
    top, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[s]
    factors = np.arange(1, top, step)
    return (x + sum(_zoom(x, float(f)) for f in factors)) / (len(factors) + 1)


def snow(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Flakes, enlarged and streaked, on a whitened image."""
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]
    flakes = mean + spread * torch.randn(1, 1, *x.shape[2:], generator=gen)
    flakes = _zoom(flakes, zoom)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    flakes = _streak(flakes, radius, sigma, -45 - 90 * float(torch.rand(1, generator=gen))).to(x)
    white = keep * x + (1 - keep) * torch.maximum(x, 1.5 * _grey(x) + 0.5)
    return white + flakes + flakes.flip(2, 3)


def frost(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Weighted sum with a picture of ridges, bright on mid-grey; the package has photographs of frozen windows."""
    keep, add = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    ridges = 1 - (2 * _clouds(x, 2.0, gen) - 1).abs()
    return keep * x + add * (0.3 + 0.7 * ridges**3)


def fog(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Plus clouds, then scaled to the image's own maximum; clouds are octaves of noise instead of diamond-square."""
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[s]
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * _clouds(x, decay, gen)) * most / (most + amount)


def brightness(x: Tensor, s: int, gen: Generator) -> Tensor:
    """The value of HSV raised; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[s]).clamp(0, 1)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)


def contrast(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Drawn towards the mean of each channel."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def elastic_transform(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Smooth random displacements of up to 0.5 % of the side times alpha."""
    h, w = x.shape[2:]
    alpha = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[s]
    field = (2 * torch.rand(1, 2, h, w, generator=gen) - 1) * 0.005 * h
    field = alpha * _gaussian(_gaussian(field, 0.01 * h, 2), 0.01 * w, 3)
    rows = torch.arange(h)[:, None] + field[0, 0]
    cols = torch.arange(w) + field[0, 1]
    grid = torch.stack([2 * (cols + 0.5) / w - 1, 2 * (rows + 0.5) / h - 1], 2)
    grid = grid[None].expand(len(x), -1, -1, -1).to(x)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def pixelate(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Means over cells; where cells are no whole number of pixels, of all pixels that they touch."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    small = F.interpolate(x, size=[max(1, int(n * share)) for n in x.shape[2:]], mode="area")
    return F.interpolate(small, size=x.shape[2:], mode="nearest")


_LUMA = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_CHROMA = "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99" + 32 * " 99"


def jpeg_compression(x: Tensor, s: int, gen: Generator) -> Tensor:
    """Rounding of the cosine transform of 8x8 blocks with the tables of the standard; chroma at half resolution."""
    scale = _table_scale((25, 18, 15, 10, 7)[s])
    h, w = x.shape[2:]
    padded = F.pad(255 * x, (0, -w % 16, 0, -h % 16), mode="replicate")
    if x.shape[1] != 3:
        return (_blocks(padded - 128, _LUMA, scale) + 128)[:, :, :h, :w] / 255
    to = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).to(x)
    planes = torch.einsum("ij,njhw->nihw", to, padded)
    luma = _blocks(planes[:, :1] - 128, _LUMA, scale) + 128
    chroma = F.interpolate(_blocks(F.avg_pool2d(planes[:, 1:], 2), _CHROMA, scale), scale_factor=2.0, mode="bilinear")
    back = torch.einsum("ij,njhw->nihw", torch.linalg.inv(to), torch.cat([luma, chroma], 1))
    return back[:, :, :h, :w] / 255


def _table_scale(quality: int) -> float:
    return 50 / quality if quality < 50 else 2 - quality / 50


def _blocks(plane: Tensor, table: str, scale: float) -> Tensor:
    """Planes (N, C, H, W) of levels with their 8x8 cosine coefficients rounded to multiples of the table's."""
    steps = torch.tensor([float(v) for v in table.split()]) * scale
    steps = (steps + 0.5).floor().clamp(1, 255).view(8, 8).to(plane)
    basis = torch.stack([cosines(8, 1, [(k, 0)])[:, 0] for k in range(8)]).to(plane)
    n, c, h, w = plane.shape
    cut = plane.view(n, c, h // 8, 8, w // 8, 8)
    rounded = (torch.einsum("ui,ncaibj,vj->ncaubv", basis, cut, basis) / steps[:, None, :]).round() * steps[:, None, :]
    return torch.einsum("ui,ncaubv,vj->ncaibj", basis, rounded, basis).reshape(n, c, h, w)


def _along(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Planes (N, C, H, W) filtered along one side, zero outside."""
    n, c, h, w = x.shape
    shape, half = ((-1, 1), (len(kernel) // 2, 0)) if dim == 2 else ((1, -1), (0, len(kernel) // 2))
    return F.conv2d(x.reshape(n * c, 1, h, w), kernel.view(1, 1, *shape).to(x), padding=half).view(n, c, h, w)


def _gaussian(x: Tensor, sigma: float, dim: int = 0) -> Tensor:
    """Gaussian blur along both sides, or along `dim` alone; edges are repeated."""
    if dim == 0:
        return _gaussian(_gaussian(x, sigma, 2), sigma, 3)
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    pad = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
    whole = _along(F.pad(x, pad, mode="replicate"), kernel / kernel.sum(), dim)
    return whole[:, :, reach:-reach] if dim == 2 else whole[:, :, :, reach:-reach]


def _streak(x: Tensor, radius: int, sigma: float, angle: float) -> Tensor:
    """Motion blur: shifted copies along a line, weighted by half a Gaussian; edges are repeated."""
    width = 2 * radius + 1
    weight = torch.exp(-(torch.arange(width).float() ** 2) / (2 * sigma**2))
    weight /= weight.sum()
    out = torch.zeros_like(x)
    for i in range(width):
        down, right = (-math.ceil(i * f(math.radians(angle)) - 0.5) for f in (math.sin, math.cos))
        if abs(down) >= x.shape[2] or abs(right) >= x.shape[3]:
            break
        rows = (torch.arange(x.shape[2], device=x.device) - down).clamp(0, x.shape[2] - 1)
        cols = (torch.arange(x.shape[3], device=x.device) - right).clamp(0, x.shape[3] - 1)
        out = out + float(weight[i]) * x[:, :, rows][:, :, :, cols]
    return out


def _zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarged around the middle, bilinear, cut to its size."""
    at = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(x), -1, -1).to(x)
    return F.grid_sample(x, F.affine_grid(at, list(x.shape), align_corners=False), align_corners=False)


def _clouds(x: Tensor, decay: float, gen: Generator) -> Tensor:
    """A picture (1, 1, H, W) from 0 to 1: octaves of uniform noise, each `decay` times fainter than the coarser one."""
    picture, cells, share = torch.zeros(1, 1, *x.shape[2:]), 2, 1.0
    while cells <= max(x.shape[2:]):
        noise = torch.rand(1, 1, cells, cells, generator=gen)
        picture = picture + share * F.interpolate(noise, size=x.shape[2:], mode="bilinear", align_corners=True)
        cells, share = 2 * cells, share / decay
    picture = picture - picture.min()
    return (picture / picture.max()).to(x)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1).to(x)).sum(1, keepdim=True)


CORRUPTIONS: Mapping[str, Callable[[Tensor, int, Generator], Tensor]] = {
    f.__name__: f
    for f in (
        *(gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost),
        *(fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression),
    )
}
"""Images (N, C, H, W), severity from 0, draws -> corrupted images, not yet cut to [0, 1]."""
