"""The architectures that methods are tried on: small, and each of another make."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from torch import Tensor, nn

from sleeperbench.kit.classifier import architectures
from sleeperbench.kit.nets.preact_resnet import PreActBlock


class MicroPreAct(nn.Module):
    """`preact_resnet18` with one block per stage and 8, 8, 16, 16 channels."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, 1, 1, bias=False)
        self.stage1 = nn.Sequential(PreActBlock(8, 8, 1))
        self.stage2 = nn.Sequential(PreActBlock(8, 8, 2))
        self.stage3 = nn.Sequential(PreActBlock(8, 16, 2))
        self.stage4 = nn.Sequential(PreActBlock(16, 16, 2))
        self.head = nn.Linear(16, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 16)."""
        return self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))


class MicroNoBN(nn.Module):
    """Four 3x3 convolutions with ReLU and no normalisation, linear head."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(channels, 8, 3, 1, 1), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.stage3 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.stage4 = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # without it so deep a net without normalisation hardly learns
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 16)."""
        return self.stage4(self.stage3(self.stage2(self.stage1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))


ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "micro_bn": ("small_cnn", {"width": 4}),
    "micro_preact": ("micro_preact", {}),
    "micro_nobn": ("micro_nobn", {}),
    "micro_vit": ("timm:vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}),
}
"""Name in reports -> id and arguments of the architecture."""


def register() -> None:
    """Make the two nets of this file known to this process alone: no suite shall offer them."""
    known: Any = architectures()
    for name, cls in (("micro_preact", MicroPreAct), ("micro_nobn", MicroNoBN)):
        known[name] = EntryPoint(name, f"{__name__}:{cls.__name__}", "sleeperbench.models")
