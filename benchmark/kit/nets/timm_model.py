"""Any classifier of timm, with its first layers adapted to small images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from sleeperbench.errors import BadInput, nearest

SMALL = 64
"""Images up to this many pixels count as small."""
STRIDE = 8
"""Largest total stride on small images."""


class TimmNet(nn.Module):
    """The timm model `name`; up to 64 pixels its first layers are changed so that the total stride is at most 8.

    - Nets that cut the image into patches (ViT, DeiT, CaiT): the image side is given, the patch is the
      largest divisor of it up to a seventh of it: 2 at 16 px, 4 at 28 and 32 px, 8 at 64 px. Hierarchical ones (Swin)
      get the patch that makes the total stride 8.
    - Nets that begin with a strided convolution (ResNet, RegNet, EfficientNet, DenseNet, ConvNeXt, MobileNet, ...):
      from the input on, resolution by resolution, strides become 1 and pools the identity until the total stride is at
      most 8; a first convolution with a kernel larger than 3 becomes a new 3x3 one at stride 1. So the ResNets get the
      usual 3x3 stride-1 stem without max pool.
    - Others (VGG) stay as they are; a net that cannot work at this size is refused.

    Larger images get the net as timm has it. A replaced first convolution starts from fresh weights even with
    `pretrained=True`; timm resamples the patch embedding of pretrained transformers.

    Args:
        classes: Number of logits.
        channels: Image channels.
        size: Image side in pixels.
        name: Name in `timm.list_models()`, with or without a weights tag.
        pretrained: Download and use timm's weights.
        args: Passed on to `timm.create_model`.

    Raises:
        BadInput: timm has no such model, or it cannot work on such images, or it has no single head.
    """

    def __init__(
        self, classes: int, channels: int, size: int, *, name: str, pretrained: bool = False, **args: Any
    ) -> None:
        super().__init__()
        base = name.split(".")[0]
        if not timm.is_model(base):
            raise BadInput(f"timm has no model `{base}`: {nearest(base, timm.list_models())}")

        def create(pretrained: bool, **sizes: int) -> nn.Module:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=classes, in_chans=channels, **(sizes | args)
            )

        try:
            self.net = _adapted(create, size, pretrained)
            if not isinstance(self.net.get_classifier(), nn.Module):
                raise ValueError("it has no single head")
            with _probing(self.net), torch.no_grad():
                self.features(_blank(self.net, channels, size))
        except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as e:
            raise BadInput(f"`timm:{name}` does not work on {channels} x {size} x {size} images: {e}") from e

    @property
    def head(self) -> nn.Module:
        """The classifier layer, in most families an nn.Linear."""
        return self.net.get_classifier()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Modules where timm takes its feature maps: stages of a CNN, blocks of a transformer; without the stem."""
        taps = [info["module"] for info in getattr(self.net, "feature_info", [])]
        blocks = [t for t in taps if t not in ("stem", "conv_stem") and _computes(self.net.get_submodule(t))]
        return tuple(f"net.{t}" for t in blocks or taps)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, D), the input of `head`."""
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.net(x)


def _adapted(create: Callable[..., nn.Module], size: int, pretrained: bool) -> Any:
    with torch.device("meta"):
        plain: Any = create(False)
    first = next((m for m in plain.modules() if isinstance(m, nn.Conv2d)), None)
    if any(isinstance(m, PatchEmbed) for m in plain.modules()):
        if size > SMALL:
            return create(pretrained, img_size=size)
        reductions = [info["reduction"] for info in plain.feature_info]
        if reductions[0] != reductions[-1]:
            patch = max(1, STRIDE * reductions[0] // reductions[-1])
        else:
            patch = max(p for p in range(1, max(1, size // 7) + 1) if size % p == 0)
        return create(pretrained, img_size=size, patch_size=patch)
    net = create(pretrained)
    if size <= SMALL and first is not None and max(first.stride) > 1:
        _shrink_strides(net)
    return net


def _shrink_strides(net: Any) -> None:
    """Take strides away, highest resolution first, until a 64-pixel image keeps an eighth of its side."""
    while True:
        strided = {name: m for name, m in net.named_modules() if _is_strided(m)}
        sides, left = _sides(net, strided)
        if left * STRIDE >= SMALL or not sides:
            return
        # A block's shortcut sees the same side as its main path, so both lose their stride together.
        for name in [name for name, side in sides.items() if side == max(sides.values())]:
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, _unstrided(strided[name], name == _first_conv(net)[0]))


def _sides(net: Any, modules: Mapping[str, nn.Module]) -> tuple[dict[str, int], int]:
    """Side of the map that reaches each module, and that of the last map, for one blank image of 64 pixels."""
    sides: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sides[name] = inputs[0].shape[-1]

    handles = [m.register_forward_pre_hook(functools.partial(note, name)) for name, m in modules.items()]
    try:
        with _probing(net), torch.no_grad():
            last = net.forward_features(_blank(net, _first_conv(net)[1].in_channels, SMALL))
    finally:
        for handle in handles:
            handle.remove()
    return sides, last.shape[-1]


def _is_strided(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return max(module.stride) > 1
    return isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and module.stride not in (1, (1, 1))


def _unstrided(module: Any, first: bool) -> nn.Module:
    if not isinstance(module, nn.Conv2d):
        return nn.Identity()
    if first and max(module.kernel_size) > 3:
        weight = module.weight
        return nn.Conv2d(
            module.in_channels, module.out_channels, 3, 1, 1, bias=module.bias is not None, device=weight.device
        )
    module.stride = (1, 1)
    return module


def _first_conv(net: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))


def _computes(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())


def _blank(net: nn.Module, channels: int, size: int) -> Tensor:
    return torch.zeros(1, channels, size, size, device=next(net.parameters()).device)


@contextmanager
def _probing(net: nn.Module) -> Iterator[None]:
    """Eval mode inside, so that a probe moves no running statistics; a new net is in training mode afterwards."""
    net.eval()
    try:
        yield
    finally:
        net.train()
