"""CLP: channels whose Lipschitz bound stands out in their layer are pruned; no data is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.candidates import outlying
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.taps import taps


@dataclass(frozen=True, kw_only=True)
class CLP(Defense):
    """Channel-Lipschitzness pruning (Zheng, Tang, Li, Liu, ECCV 2022).

    1. Channel k of a convolution with a BatchNorm layer right behind has the bound
       sigma_max(W_k) |gamma_k| / sqrt(var_k), W_k being its kernel as a matrix (C_in, height x width).
    2. Per layer, gamma and beta become 0 where the bound exceeds mean + u standard deviations (divisor C - 1).

    No parameter gets a gradient and nothing is learnt: one shot. BatchNorm's running statistics are read and stay.
    Cost: one blank image, by which the pairs of layers are found.

    `u` is the published value. An honest choice of it would need clean rows, hence another access class.

    Differs: a BatchNorm layer belongs to a convolution whose very output it takes. The authors take the convolution
    visited last, which is another one behind an addition or a concatenation (PreAct-ResNet, DenseNet); such layers are
    left alone here, and `chosen` counts them. The variance has BatchNorm's eps, so that a dead channel's bound is
    finite.

    Args:
        u: Standard deviations above the mean of a layer beyond which channels go; the authors have 3 on CIFAR-10, 5 on
            Tiny-ImageNet.
    """

    INFO = {
        "title": "Channel-Lipschitzness pruning",
        "paper": "https://arxiv.org/abs/2208.03111",
        "bibtex": "@inproceedings{zheng2022data, title={Data-free Backdoor Removal Based on Channel Lipschitzness}, "
        "author={Zheng, Runkai and Tang, Rongjun and Li, Jianze and Liu, Li}, booktitle={ECCV}, year={2022}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"u": 1.0},
    }
    ACCESS = Access(clean=0)
    REQUIRES = frozenset({"bn", "conv"})

    u: float = 3.0

    def run(self, case: Case) -> Outcome:
        """The pruned model.

        Raises:
            NotApplicable: no BatchNorm layer stands right behind a convolution.
        """
        net = copy.deepcopy(case.net)
        found = pairs(net, case.ctx)
        if not found:
            raise NotApplicable("needs_conv_bn: no BatchNorm layer takes a convolution's output")
        gone = channels = 0
        for norm, conv in found.items():
            layer: Any = net.get_submodule(norm)
            out = outlying(bounds(net.get_submodule(conv), layer), self.u)
            with torch.no_grad():
                layer.weight[out], layer.bias[out] = 0.0, 0.0
            gone, channels = gone + int(out.sum()), channels + len(out)
        skipped = len(taps(net).batch_norms) - len(found)
        about = {"u": self.u, "pruned": gone, "channels": channels, "layers": len(found), "layers_skipped": skipped}
        return Outcome(model=pack(net), chosen=about)


@torch.no_grad()
def bounds(conv: Any, norm: Any) -> Tensor:
    """Lipschitz bound of each output channel of a convolution with BatchNorm behind it: float64 (C,)."""
    kernels = conv.weight.double().flatten(2)  # (C_out, C_in / groups, height x width)
    scale = norm.weight.double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return torch.linalg.matrix_norm(kernels, ord=2) * scale


@torch.no_grad()
def pairs(net: Classifier, ctx: Ctx) -> dict[str, str]:
    """BatchNorm layer -> the convolution whose output it takes, seen by passing one blank image."""
    inside = [(n, m) for n, m in net.named_modules() if n.startswith("body.")]
    outputs: list[tuple[str, Tensor, int]] = []
    found: dict[str, str] = {}

    def left(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # The version counts changes in place: a ReLU in between returns the same tensor, changed.
            outputs.append((name, output, output._version))

        return hook

    def entered(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for conv, output, version in outputs:
                if inputs[0] is output and output._version == version:
                    found[name] = conv

        return hook

    norms = [(n, m) for n, m in inside if isinstance(m, nn.BatchNorm2d) and m.affine and m.track_running_stats]
    handles = [m.register_forward_hook(left(n)) for n, m in inside if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(entered(n)) for n, m in norms]
    try:
        with evaluating(net):
            net(torch.zeros(1, *net.spec.shape, device=device_of(net)))
    finally:
        for handle in handles:
            handle.remove()
    ctx.cost.forwards += 1
    return found
