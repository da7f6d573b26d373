"""Per-channel gates on BatchNorm layers: learn them on a copy, prune the original by them.

A method that learns masks, and one that computes scores, end alike:

    gates = Gates(case.net, case.ctx)
    mask = torch.ones(gates.size, device=case.ctx.device, requires_grad=True)
    ...                                         # descend on losses of gates(x, mask)
    model = pack(pruned(case.net, mask > 0.2))

Gates, scores and masks are flat: one value per channel, layer after layer in the order of `channels`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.taps import taps


def channels(net: Classifier) -> dict[str, int]:
    """The architecture's BatchNorm layers that have a gamma, in order, and how many channels each has.

    Raises:
        NotApplicable: `needs_bn`, there is none.
    """
    layers = {name: net.get_submodule(name) for name in taps(net).batch_norms}
    found = {name: len(layer.weight) for name, layer in layers.items() if isinstance(layer.weight, Tensor)}
    if not found:
        raise NotApplicable("needs_bn")
    return found


class Gates:
    """A frozen copy of a network whose BatchNorm layers have scalable channels.

    In each layer gamma' = gamma (mask + delta) and beta' = beta (1 + xi). Answers are differentiable in mask, delta and
    xi and in nothing else. The copy's BatchNorm layers use batch statistics, all other layers are in eval mode; its
    running statistics move and are of no use. With mask 1 and without delta and xi it answers as the network in that
    mode does.

    Args:
        net: Left untouched.
        ctx: Device and costs: images through the copy, and back through its answers.
    """

    def __init__(self, net: Classifier, ctx: Ctx) -> None:
        self._ctx = ctx
        self._channels = channels(net)
        self._net = copy.deepcopy(net).requires_grad_(False).eval()
        # Channels last: a third less time per step on CPU.
        self._net.to(device=ctx.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self._net.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        layers: list[Any] = [self._net.get_submodule(name) for name in self._channels]
        self._gamma = torch.cat([layer.weight for layer in layers])
        self._beta = torch.cat([layer.bias for layer in layers])
        self.size = len(self._gamma)
        """Number of gates."""

    def __call__(self, x: Tensor, mask: Tensor, delta: Tensor | None = None, xi: Tensor | None = None) -> Tensor:
        """Logits (N, K).

        Args:
            x: float32 [0, 1] (N, C, H, W).
            mask: (size,), 1 leaves a channel as it is, 0 removes all but its beta.
            delta: (size,), added to the mask; None for 0.
            xi: (size,), relative change of beta; None for 0.
        """
        gamma = self._gamma * (mask if delta is None else mask + delta)
        beta = self._beta if xi is None else self._beta * (1 + xi)
        sizes = list(self._channels.values())
        scaled: dict[str, Tensor] = {}
        for name, g, b in zip(self._channels, gamma.split(sizes), beta.split(sizes), strict=True):
            scaled |= {f"{name}.weight": g, f"{name}.bias": b}
        out = functional_call(self._net, scaled, (x.contiguous(memory_format=torch.channels_last),))
        self._ctx.cost.forwards += len(x)
        if out.requires_grad:
            out.register_hook(self._count(len(x)))
        return out

    def _count(self, n: int) -> Callable[[Tensor], None]:
        def count(grad: Tensor) -> None:
            self._ctx.cost.backwards += n

        return count


@torch.no_grad()
def pruned(net: Classifier, keep: Tensor) -> Classifier:
    """A copy of `net` with gamma 0 where a channel is not kept: it answers its beta everywhere. All else stays.

    Args:
        net: Left untouched.
        keep: bool (channels,), flat in the order of `channels`.

    Raises:
        ValueError: not one truth value per channel.
    """
    sizes = channels(net)
    if keep.dtype != torch.bool or keep.shape != (sum(sizes.values()),):
        raise ValueError(f"keep must be bool ({sum(sizes.values())},), not {keep.dtype} {tuple(keep.shape)}")
    cut = copy.deepcopy(net)
    for name, part in zip(sizes, keep.split(list(sizes.values())), strict=True):
        layer = cut.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm2d)
        layer.weight.masked_fill_(~part.to(layer.weight.device), 0)
    return cut
