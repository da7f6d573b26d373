"""WideResNet-28-2."""

from __future__ import annotations

from torch import Tensor, nn


class WideBlock(nn.Module):
    """Pre-activation wide block (Zagoruyko and Komodakis, BMVC 2016), without dropout."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inp, out, 1, stride, bias=False) if inp != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inp, H, W) -> (N, out, H / stride, W / stride)."""
        out = self.relu1(self.bn1(x))
        short = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + short


class WideResNet28x2(nn.Module):
    """Stem of 16 channels, three stages of four blocks (32, 64, 128 channels, strides 1, 2, 2), BN, ReLU, linear head.

    The architecture has three stages: there is no `stage4`. He initialisation (normal, fan-out) of convolutions, zero
    bias in the head. 1,467,610 parameters with 3 channels and 10 classes.
    Differs: global mean instead of an 8x8 pooling window, which is the same at 32x32.

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels, at least 8; the network itself works at any.
    """

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"wrn28_2 needs images of at least 8 pixels, not {size}")
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stage1 = _stage(16, 32, 1)
        self.stage2 = _stage(32, 64, 2)
        self.stage3 = _stage(64, 128, 2)
        self.last = nn.Sequential(nn.BatchNorm2d(128), nn.ReLU(inplace=True))
        self.head = nn.Linear(128, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 128)."""
        return self.last(self.stage3(self.stage2(self.stage1(self.stem(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))


def _stage(inp: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(WideBlock(inp, out, stride), *(WideBlock(out, out, 1) for _ in range(3)))
