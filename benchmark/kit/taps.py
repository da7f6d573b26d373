"""Where to look inside a classifier: names of its layers, and what they answer.

Names are those of `net.named_modules()`, so `net.get_submodule(name)` is the layer, `name + ".weight"` its key in the
state, and `Wrap.site` takes them too. A wrapped classifier has the same names as the plain one, and a layer's answer
then has the wrap's change in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating

PENULTIMATE = "penultimate"
"""Not a layer's name: stands for the input of the head."""


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Names of the layers that methods look at.

    Args:
        stages: Stages in order; blocks in a transformer.
        penultimate: The input of the head, (N, D); a name for `capture` only.
        head: The last linear layer.
        spatial_convs: Convolutions with a kernel larger than 1, in order, without the stem and shortcuts: where BEC
            and TAC look. Empty for a ViT, whose only convolution is the patch embedding.
        batch_norms: All BatchNorm2d layers, in order.
    """

    stages: tuple[str, ...]
    penultimate: str
    head: str
    spatial_convs: tuple[str, ...]
    batch_norms: tuple[str, ...]


def taps(net: Classifier) -> Taps:
    """The layers of `net` by role.

    Raises:
        ValueError: the head is no nn.Linear.
    """
    body: Any = net.body
    if not isinstance(body.head, nn.Linear):
        raise ValueError(f"`{net.spec.arch}` has no linear head but {type(body.head).__name__}")
    names = {module: name for name, module in net.named_modules()}
    # Layers inserted by a wrap live under `wraps.` and are no part of the architecture.
    inside = [(name, module) for module, name in names.items() if name.startswith("body.")]
    stages = getattr(body, "stage_names", None)
    if stages is None:
        stages = tuple(name for name, _ in body.named_children() if name.startswith("stage"))
    stages = tuple(f"body.{name}" for name in stages)
    convs = [(name, m) for name, m in inside if isinstance(m, nn.Conv2d)]
    stem = _stem(convs[0][0]) if convs else ""
    return Taps(
        stages=stages,
        penultimate=PENULTIMATE,
        head=names[body.head],
        spatial_convs=tuple(
            name
            for name, m in convs
            if max(m.kernel_size) > 1 and not f"{name}.".startswith(f"{stem}.") and not _is_shortcut(name, stages)
        )
        if stem
        else (),
        batch_norms=tuple(name for name, m in inside if isinstance(m, nn.BatchNorm2d)),
    )


def capture(net: Classifier, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What the named layers answer to `x` in one forward pass, as `look` does without the logits."""
    return look(net, x, names)[1]


def look(net: Classifier, x: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, K), and what the named layers answer to `x` in the same forward pass, in the order of `names`.

    Mode and gradients are the caller's: the answers carry the graph unless this runs under `torch.no_grad()`. They are
    copies, because a ReLU behind a layer may overwrite its output. The hooks are gone afterwards, also after an error.

    Args:
        net: A classifier.
        x: float32 [0, 1] (N, C, H, W).
        names: Layers, or `penultimate`.

    Raises:
        ValueError: a name is no layer, or the layer was not run; says which.
    """
    found: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    handles = []
    try:
        for name in names:
            if name == PENULTIMATE:
                handles.append(modules[taps(net).head].register_forward_pre_hook(_keep_input(found, name)))
            elif name in modules:
                handles.append(modules[name].register_forward_hook(_keep_output(found, name)))
            else:
                raise ValueError(f"no layer {name!r}; see `taps(net)` and `net.named_modules()`")
        logits: Tensor = net(x)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in found:
            raise ValueError(f"layer {name!r} took no part in the forward pass")
    return logits, {name: found[name] for name in names}


def features(net: Classifier, images: Tensor, batch: int = 500, *, ctx: Ctx | None = None) -> Tensor:
    """Penultimate features (N, D) of uint8 images, on the network's device; eval mode, no gradients, modes put back.

    Args:
        net: A classifier with a linear head.
        images: uint8 (N, C, H, W).
        batch: Images per forward pass.
        ctx: Where the forward passes are counted.
    """
    device = device_of(net)
    with evaluating(net), torch.no_grad():
        parts = [capture(net, to_float(p.to(device)), [PENULTIMATE])[PENULTIMATE] for p in images.split(batch)]
    if ctx is not None:
        ctx.cost.forwards += len(images)
    return torch.cat(parts)


def _stem(first: str) -> str:
    """The module before the stages: a whole `stem`, deep `conv1` or `patch_embed`, else the first convolution alone."""
    parts = first.split(".")
    for i, part in enumerate(parts):
        if part in ("stem", "conv1", "patch_embed"):
            return ".".join(parts[: i + 1])
    return first


def _is_shortcut(name: str, stages: tuple[str, ...]) -> bool:
    parts = name.split(".")
    for i, part in enumerate(parts):
        # A `downsample` right under a stage (ConvNeXt) is on the main path; within a block it is the shortcut.
        if part == "shortcut" or (part == "downsample" and ".".join(parts[:i]) not in stages):
            return True
    return False


def _keep_output(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[name] = output.clone()

    return hook


def _keep_input(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        found[name] = inputs[0].clone()

    return hook


def behind(net: Classifier, site: str, answer: Tensor) -> Tensor:
    """Logits (N, K) of the net where the layer `site` answers `answer` (N, ...), whatever the image."""
    handle = net.get_submodule(site).register_forward_hook(lambda module, inputs, output: answer)
    try:
        logits: Tensor = net(torch.zeros(1, *net.spec.shape, device=answer.device))
    finally:
        handle.remove()
    return logits.float()
