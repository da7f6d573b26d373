"""A U-Net: image to image with skip connections, for encoders of triggers and for inverting generators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU per level; max-pooling halves, transposed convolutions double.

    What a level answered on the way down is joined to its input on the way up (Ronneberger, Fischer, Brox 2015). The
    last layer is a 1x1 convolution without activation. Sizes that cannot be halved so often are padded by their border
    and cut back. In eval mode rows do not influence each other.

    Args:
        channels: Input channels.
        outputs: Output channels.
        width: Channels of the first level; each further one has twice as many.
        depth: How often the image is halved.
    """

    def __init__(self, channels: int, outputs: int, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_level(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1])
        self.join = nn.ModuleList(_level(2 * w, w) for w in widths[-2::-1])
        self.last = nn.Conv2d(width, outputs, 1)
        self.multiple = 2**depth

    def forward(self, x: Tensor) -> Tensor:
        """(N, outputs, H, W), unbounded, of (N, channels, H, W)."""
        height, width = x.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple
        if below or right:
            x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2), mode="replicate")
        kept = []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        out: Tensor = self.last(x)[:, :, below // 2 : below // 2 + height, right // 2 : right // 2 + width]
        return out


def _level(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
