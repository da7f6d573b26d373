"""Frequency detector: triggered images betray themselves in the cosine transform, to a network that never saw one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.dct import cosines
from sleeperbench.kit.patches import scaled
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.train import fit

_LEAST = 8
"""Pixels on a side that three halvings need."""
_BATCH = 500
"""Images at a time in the second phase."""


@dataclass(frozen=True, kw_only=True)
class Frequency(Defense):
    """A classifier of cosine transforms, trained on clean rows and made-up triggers (Zeng et al., ICCV 2021).

    1. Each clean row gets a triggered copy, of one of five kinds: a white block; a block of uniform noise; Gaussian
       noise over the image; a shadow; 0.3 times another clean row added. Blocks have sides of 2 to 7 and lie 0 to 5
       pixels from a corner, on 32 pixels.
    2. Images become the orthonormal DCT-II of each channel, on pixels 0 to 255.
    3. Six convolutions (32, 32, 64, 64, 128, 128 channels, each with ELU and BatchNorm; after each pair a maximum over
       2 x 2 and dropout of 0.2, 0.3, 0.4) and a linear layer tell copies from originals: cross-entropy, Adadelta, L2 on
       the kernels. `rounds` times new copies are made and trained on for `epochs` passes.
    4. An input's score is the logit of triggered minus that of clean; above 0 is an alarm.

    The suspicious model is not looked at: one detector serves all models of a data set.

    Differs: the same passes over fewer rows: the authors' 50,000 rows make 78,000 updates, 2,500 clean rows make 3,900.
    Lengths are in proportion to the image's side. BatchNorm averages with PyTorch's momentum and epsilon (Keras: 0.01
    and 1e-3). A pass drops its last short batch. Triggered copies are rounded to 8 bit; the authors truncate. Shadows
    are those of package albumentations (one or two pentagons in the lower half, lightness halved), filled where a
    pixel's centre lies inside.

    Args:
        rounds: Times that triggered copies are made anew.
        epochs: Passes over originals and copies in each round.
        batch: Images per update.
        lr: Learning rate of Adadelta.
        decay: Factor of the sum of squared kernels in the loss.
    """

    INFO = {
        "title": "Frequency detector",
        "paper": "https://arxiv.org/abs/2104.03413",
        "bibtex": "@inproceedings{zeng2021rethinking, title={Rethinking the Backdoor Attacks' Triggers: A Frequency "
        "Perspective}, author={Zeng, Yi and Park, Won and Mao, Z. Morley and Jia, Ruoxi}, booktitle={IEEE/CVF "
        "International Conference on Computer Vision}, pages={16473--16481}, year={2021}}",
        "kind": "detection",
        "version": 2,
        "api": 1,
        "micro": {"rounds": 1, "epochs": 1},
        "effort": ["rounds", "epochs"],
        "scores": True,
        "prepares": True,
        "traverses": False,
        "presumes": "a trigger that looks like one of five made-up kinds in the cosine transform",
    }
    ACCESS = Access(model="none", clean=0.05)

    rounds: int = 5
    epochs: int = 10
    batch: int = 64
    lr: float = 0.05
    decay: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.rounds, self.epochs, self.batch) < 1 or self.lr <= 0:
            raise ValueError("rounds, epochs, batch and lr must be positive")

    def prepare(self, case: Case) -> tuple[Mapping[str, Tensor], Any]:
        """The trained detector, which needs no model.

        Raises:
            NotApplicable: no clean rows, or images too small for the detector.
        """
        clean, ctx = case.clean, case.ctx
        if not len(clean):
            raise NotApplicable("too_few_clean_rows: 0")
        if min(clean.shape[1:]) < _LEAST:
            raise NotApplicable(f"images_too_small: {min(clean.shape[1:])}; the detector needs {_LEAST} pixels")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(ctx.derive("init"))
            net = Detector(clean.shape)
        recipe = replace(case.recipe, epochs=self.epochs, batch=self.batch, precision="fp32", pad=0, flip=False)
        hooks = Adadelta(net.to(ctx.device), self.lr, self.decay)
        losses = []
        for i in range(self.rounds):
            both = with_copies(clean, ctx.generator("copies", i))
            log = fit(net, both, recipe, replace(ctx, seed=ctx.derive("round", i)), hooks=hooks)
            losses.append(round(log.losses[-1], 4))
        state = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
        return state, {"shape": list(clean.shape), "losses": losses}

    def run(self, case: Case) -> Outcome:
        """The detector, as the second phase needs it."""
        state, about = case.prepared
        return Outcome(state=(state, {"shape": about["shape"]}), alarm=0.0, chosen={"losses": about["losses"]})

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: Any, x: Tensor) -> Tensor:
        """Logit of triggered minus that of clean, (N,); above 0 is an alarm."""
        with torch.random.fork_rng(devices=[]):
            detector = Detector(tuple(state[1]["shape"]))
        detector.load_state_dict(dict(state[0]))
        detector.to(x.device).eval()
        with torch.no_grad():
            logits = torch.cat([detector(part) for part in x.split(_BATCH)])
        return logits[:, 1] - logits[:, 0]


class Detector(nn.Module):
    """Logits (N, 2), clean and triggered, of images (N, C, H, W) in [0, 1]."""

    rows: Tensor
    cols: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        for name, size in (("rows", height), ("cols", width)):
            basis = torch.stack([cosines(size, 1, [(k, 0)])[:, 0] for k in range(size)])
            self.register_buffer(name, basis, persistent=False)
        layers: list[nn.Module] = []
        for wide, drop in ((32, 0.2), (64, 0.3), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ELU(), nn.BatchNorm2d(wide)]
                channels = wide
            layers += [nn.MaxPool2d(2), nn.Dropout(drop)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (height // 8) * (width // 8), 2))

    def transform(self, x: Tensor) -> Tensor:
        """Orthonormal DCT-II of each channel, on pixels 0 to 255."""
        return self.rows @ (255 * x) @ self.cols.T

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        found: Tensor = self.body(self.transform(x))
        return found


class Adadelta(TrainHooks):
    """Updates by Adadelta, whose averages last over rounds; L2 on the kernels of convolutions alone."""

    def __init__(self, net: nn.Module, lr: float, decay: float) -> None:
        super().__init__()
        kernels = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
        known = {id(p) for p in kernels}
        others = [p for p in net.parameters() if id(p) not in known]
        # A loss of decay |w|^2 has the slope 2 decay w.
        groups = [{"params": kernels, "weight_decay": 2 * decay}, {"params": others, "weight_decay": 0.0}]
        self.own = torch.optim.Adadelta(groups, lr=lr, rho=0.95, eps=1e-7)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """One update; the trainer's own optimiser stays idle."""
        return super().step(net, self.own, x, y, mark)


def with_copies(clean: ImageSet, gen: Generator) -> ImageSet:
    """The rows under label 0, then a triggered copy of each under label 1."""
    x = to_float(clean.images)
    copies = torch.stack([KINDS[int(torch.randint(len(KINDS), (), generator=gen))](row, x, gen) for row in x])
    labels = torch.arange(2).repeat_interleave(len(x))
    images = torch.cat([clean.images, to_uint8(copies)])
    return replace(clean, images=images, labels=labels, ids=torch.arange(2 * len(x)), classes=("clean", "triggered"))


def white_block(row: Tensor, rows: Tensor, gen: Generator) -> Tensor:
    """A white block near a corner of the image (C, H, W)."""
    return _near_corner(row, torch.ones_like(row), gen)


def noise_block(row: Tensor, rows: Tensor, gen: Generator) -> Tensor:
    """A block of uniform noise near a corner."""
    return _near_corner(row, torch.rand(row.shape, generator=gen), gen)


def gaussian_noise(row: Tensor, rows: Tensor, gen: Generator) -> Tensor:
    """Normal noise over the image: mean 25 levels, variance uniform in 10 to 70."""
    variance = 10 + 60 * torch.rand((), generator=gen)
    return row + (25 + variance.sqrt() * torch.randn(row.shape, generator=gen)) / 255


def shadow(row: Tensor, rows: Tensor, gen: Generator) -> Tensor:
    """One or two pentagons in the lower half with halved lightness; hue and saturation (of HLS) stay."""
    _, h, w = row.shape
    dark = torch.zeros(h, w, dtype=torch.bool)
    for _ in range(int(torch.randint(1, 3, (), generator=gen))):
        corners = torch.rand(5, 2, generator=gen)
        dark |= inside(h // 2 + corners[:, 0] * (h - h // 2), corners[:, 1] * w, h, w)
    light = (row.amax(0) + row.amin(0)) / 2
    # Chroma is saturation times 1 - |2 L - 1|, which is L for the halved lightness.
    factor = light / (1 - (2 * light - 1).abs()).clamp_min(1e-6)
    return torch.where(dark, light / 2 + (row - light) * factor, row)


def blend(row: Tensor, rows: Tensor, gen: Generator) -> Tensor:
    """0.3 times one of the rows added."""
    return row + 0.3 * rows[int(torch.randint(len(rows), (), generator=gen))]


KINDS = (white_block, noise_block, gaussian_noise, shadow, blend)
"""Image (C, H, W), all rows (N, C, H, W), draws -> a triggered copy, not yet cut to [0, 1]."""


def _near_corner(row: Tensor, block: Tensor, gen: Generator) -> Tensor:
    _, h, w = row.shape
    tall, wide, margin, corner = (
        int(torch.randint(low, high, (), generator=gen)) for low, high in ((2, 8), (2, 8), (0, 6), (0, 4))
    )
    tall, wide = scaled(tall, h, 1), scaled(wide, w, 1)
    down, right = scaled(margin, h), scaled(margin, w)
    top = down if corner < 2 else h - down - tall
    left = right if corner % 2 == 0 else w - right - wide
    found = row.clone()
    found[:, top : top + tall, left : left + wide] = block[:, :tall, :wide]
    return found


def inside(down: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Whether each pixel's centre (H, W) lies inside the polygon with these corners (K,), by the even-odd rule."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    found = torch.zeros(height, width, dtype=torch.bool)
    for i in range(len(down)):
        y1, x1, y2, x2 = down[i - 1], right[i - 1], down[i], right[i]
        crosses = (y1 > y) != (y2 > y)
        found ^= crosses & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return found
