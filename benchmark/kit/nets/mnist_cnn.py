"""The network of IsTr's MNIST experiments: three convolutions, two dense layers."""

from __future__ import annotations

from torch import Tensor, nn

LEAST = 8
"""Three halvings leave one pixel."""


class MnistCNN(nn.Module):
    """Three 3x3 convolutions (32, 64, 128 channels), each with ReLU and 2x2 maximum, dense layer of 256, linear head.

    IsTr (Sun et al. 2025) prints "3 convolutions, 2 dense layers, 413,882 parameters" and no widths. This one has
    390,410 with 1 channel, 28 pixels and 10 classes; no usual widths give the printed number. There is no BatchNorm,
    so methods that need it don't apply.

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels, at least 8; the dense layer's size depends on it.
    """

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        if size < LEAST:
            raise ValueError(f"mnist_cnn needs images of at least {LEAST} pixels, not {size}")
        self.stage1 = _stage(channels, 32)
        self.stage2 = _stage(32, 64)
        self.stage3 = _stage(64, 128)
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(128 * (size // 8) ** 2, 256), nn.ReLU(inplace=True))
        self.head = nn.Linear(256, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 256)."""
        return self.dense(self.stage3(self.stage2(self.stage1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))


def _stage(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
