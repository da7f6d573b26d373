"""A small plain CNN for CPU suites and tests."""

from __future__ import annotations

from torch import Tensor, nn


def _stage(inp: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class SmallCNN(nn.Module):
    """Four 3x3 convolutions (strides 1, 2, 2, 2), each with BN and ReLU, global mean, linear head.

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels, at least 8; the network itself works at any.
        width: Channels of the first stage; the others have 2, 4 and 4 times as many.
    """

    def __init__(self, classes: int, channels: int, size: int, width: int = 16) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"small_cnn needs images of at least 8 pixels, not {size}")
        self.stage1 = _stage(channels, width, 1)
        self.stage2 = _stage(width, 2 * width, 2)
        self.stage3 = _stage(2 * width, 4 * width, 2)
        self.stage4 = _stage(4 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 4 * width)."""
        return self.stage4(self.stage3(self.stage2(self.stage1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))
