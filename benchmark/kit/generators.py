"""Image-to-image networks that attacks train to make triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Hourglass(nn.Module):
    """Two 3x3 convolutions per stage on the way down and up again, each with batch norm; halved by max-pooling.

    Images in [0, 1] give pictures in [0, 1] of the same size: 2 x - 1 goes in, tanh(.) / 2 + 1/2 comes out. Sizes that
    cannot be halved so often are padded by their border and cut back. In eval mode rows do not influence each other.

    Args:
        channels: Image channels.
        outputs: Channels of the picture.
        width: Channels of the first stage; each further one has twice as many.
        stages: How often the image is halved.
    """

    def __init__(self, channels: int, outputs: int, width: int, stages: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(stages)]
        layers: list[nn.Module] = []
        for before, now in zip([channels, *widths], widths, strict=False):
            layers += [_block(before, now), _block(now, now), nn.MaxPool2d(2)]
        layers.append(_block(widths[-1], widths[-1]))
        for now, after in zip(widths[::-1], [*widths[-2::-1], outputs], strict=True):
            last = after == outputs and now == width
            layers += [
                nn.Upsample(scale_factor=2, mode="bilinear"),
                _block(now, now),
                _block(now, after, relu=not last),
            ]
        self.body = nn.Sequential(*layers)
        self.multiple = 2**stages

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (N, outputs, H, W) in [0, 1] of images (N, C, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple
        x = 2 * x - 1
        if below or right:
            x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2), mode="replicate")
        out: Tensor = self.body(x)[:, :, below // 2 : below // 2 + height, right // 2 : right // 2 + width]
        return out.tanh() / 2 + 0.5


def _block(inputs: int, outputs: int, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


Net = TypeVar("Net", bound=nn.Module)


def seeded(make: Callable[..., Net], seed: int, *args: int) -> Net:
    """A network on the CPU with weights drawn from `seed`; no global generator moves."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too.
        torch.default_generator.manual_seed(seed)
        return make(*args)


def straight_through(x: Tensor) -> Tensor:
    """Pixels on the 256 levels of stored images; gradients pass as if there were no rounding, also at the bounds."""
    levels = x.detach().clamp(0, 1).mul(255).round() / 255
    return x + (levels - x.detach())
