"""PreAct-ResNet-18 for small images, the network of most published backdoor tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Pre-activation basic block (He et al., ECCV 2016); the shortcut branches off behind the first BN and ReLU.

    The ReLUs are modules so that a layer can be inserted in front of either convolution.
    """

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inp, out, 1, stride, bias=False) if stride != 1 or inp != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inp, H, W) -> (N, out, H / stride, W / stride)."""
        out = self.relu1(self.bn1(x))
        short = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + short


class PreActResNet18(nn.Module):
    """Stem of 64 channels at stride 1, four stages of two pre-activation blocks (64, 128, 256, 512), linear head.

    As the field's CIFAR code has it: the last stage is averaged as it is, without a final BN and ReLU; PyTorch's
    default initialisation. 11,171,146 parameters with 3 channels and 10 classes.
    Differs: global mean instead of a 4x4 pooling window, which is the same at 32x32 and keeps one weight shape at all
    sizes.

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels, at least 8; the network itself works at any.
    """

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"preact_resnet18 needs images of at least 8 pixels, not {size}")
        self.stem = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.stage1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.stage2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.stage3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.stage4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.head = nn.Linear(512, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 512)."""
        out: Tensor = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return torch.mean(out, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.head(self.features(x))
