"""The network of IsTr's GTSRB experiments, which is Neural Cleanse's: six convolutions, two dense layers."""

from __future__ import annotations

from torch import Tensor, nn

LEAST = 22
"""Three pairs of a padded and an unpadded convolution, each pair halved, leave one pixel."""


class GtsrbCNN(nn.Module):
    """Three pairs of 3x3 convolutions (32, 64, 128 channels), dense layer of 512, linear head; ReLU everywhere.

    The first convolution of a pair is padded, the second is not; each pair ends in a 2x2 maximum. IsTr (Sun et al.
    2025) prints "6 convolutions, 2 dense layers, 571,723 parameters" and no widths; the network of Neural Cleanse's
    GTSRB example (Wang et al., S&P 2019) has these layers and exactly this number with 3 channels, 32 pixels and 43
    classes. There is no BatchNorm, so methods that need it don't apply.

    Differs: without the example's dropout (0.2 behind each pair, 0.5 behind the dense layer).

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels, at least 22; the dense layer's size depends on it.
    """

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        if size < LEAST:
            raise ValueError(f"gtsrb_cnn needs images of at least {LEAST} pixels, not {size}")
        self.stage1 = _stage(channels, 32)
        self.stage2 = _stage(32, 64)
        self.stage3 = _stage(64, 128)
        side = size
        for _ in range(3):
            side = (side - 2) // 2
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(128 * side**2, 512), nn.ReLU(inplace=True))
        self.head = nn.Linear(512, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 512)."""
        return self.dense(self.stage3(self.stage2(self.stage1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))


def _stage(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, out, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
