"""A small residual network for CPU suites."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Post-activation basic block (He et al., CVPR 2016), with a 1x1 convolution where the shape changes."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inp != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inp, H, W) -> (N, out, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """Stem of 16 channels, four stages of one basic block (16, 32, 64, 128 channels), global mean, linear head.

    About 16 million multiply-adds per 32x32 image.

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels, at least 8; the network itself works at any.
        width: Channels of stem and first stage; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, classes: int, channels: int, size: int, width: int = 16) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"small_resnet needs images of at least 8 pixels, not {size}")
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stage1 = Block(width, width, 1)
        self.stage2 = Block(width, 2 * width, 2)
        self.stage3 = Block(2 * width, 4 * width, 2)
        self.stage4 = Block(4 * width, 8 * width, 2)
        self.head = nn.Linear(8 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 8 * width)."""
        return self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))
