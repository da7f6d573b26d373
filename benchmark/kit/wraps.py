"""The closed list of changes to an architecture that can be rebuilt from a spec and tensors alone.

Each wrap acts on the network below it: `net[i + 1] = wrap[i](net[i])`. So of several wraps on the input the last one
sees the image first, and changes of logits or of one site follow each other in the order of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sleeperbench.contracts.models import ModelSpec, Wrap

INPUT, SITE, LOGITS = "input", "site", "logits"


class Change(nn.Module):
    """What a wrap does to the tensor at its place: the images, the output of its site, or the logits.

    Subclasses are built from the classifier's spec, the module at the site (None elsewhere) and the wrap's arguments.
    """

    place: ClassVar[str]


class Gate(Change):
    """Multiplies each channel of a site's output by `factor` (channels,), 1 at first.

    The factors are a buffer: a channel that was removed stays removed when the network is tuned.
    """

    place = SITE
    factor: Tensor

    def __init__(self, spec: ModelSpec, site: nn.Module | None, *, channels: int = 0) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(channels or _channels(site)))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`: (N, C, H, W), (N, C) or tokens (N, T, C)."""
        return x * (self.factor[:, None, None] if x.dim() == 4 else self.factor)


class Insert(Change):
    """A trainable layer after a site: `conv1x1_bn` on (N, C, H, W) or `linear` on the last axis; identity at first."""

    place = SITE

    def __init__(self, spec: ModelSpec, site: nn.Module | None, *, layer: str, channels: int = 0) -> None:
        super().__init__()
        n = channels or _channels(site)
        if layer == "conv1x1_bn":
            conv = nn.Conv2d(n, n, 1, bias=False)
            nn.init.dirac_(conv.weight)
            self.layer: nn.Module = nn.Sequential(conv, nn.BatchNorm2d(n))
        elif layer == "linear":
            linear = nn.Linear(n, n)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.layer = linear
        else:
            raise ValueError(f"wrap `insert` has no layer {layer!r}; it has: conv1x1_bn, linear")

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return self.layer(x)


class Stamp(Change):
    """A fixed patch on every input: (1 - mask) * x + mask * pattern; mask (1, H, W), pattern (C, H, W), 0 at first."""

    place = INPUT
    mask: Tensor
    pattern: Tensor

    def __init__(self, spec: ModelSpec, site: nn.Module | None) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(1, *spec.shape[1:]))
        self.register_buffer("pattern", torch.zeros(spec.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Stamped images, same shape and range."""
        return x + self.mask * (self.pattern - x)


class Purify(Change):
    """An image-to-image network before the model: clamp(x + bound * tanh(g(x)), 0, 1).

    g is three 3x3 convolutions of `width` channels (default 32) with ReLU between; its last layer starts at zero, so
    that the wrap starts as the identity. `bound` is the largest change of a pixel, in [0, 1] (default 0.05).
    """

    place = INPUT

    def __init__(self, spec: ModelSpec, site: nn.Module | None, *, width: int = 32, bound: float = 0.05) -> None:
        super().__init__()
        c = spec.shape[0]
        self.bound = bound
        last = nn.Conv2d(width, c, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.net = nn.Sequential(
            nn.Conv2d(c, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), last
        )

    def forward(self, x: Tensor) -> Tensor:
        """Purified images, same shape, in [0, 1]."""
        return (x + self.bound * self.net(x).tanh()).clamp(0, 1)


class PermuteLogits(Change):
    """Logit j becomes the logit `order[j]` of the network below."""

    place = LOGITS
    order: Tensor

    def __init__(self, spec: ModelSpec, site: nn.Module | None, *, order: Sequence[int]) -> None:
        super().__init__()
        if sorted(order) != list(range(spec.classes)):
            raise ValueError(f"wrap `permute_logits` needs `order`, a permutation of 0..{spec.classes - 1}")
        self.register_buffer("order", torch.tensor(list(order)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) in the new order."""
        return x[:, self.order]


class Noise(Change):
    """Gaussian noise of standard deviation `sigma` (in [0, 1] pixels) on the input, then clamped to [0, 1].

    A row's noise is one of 256 fixed draws (from `seed`), picked by a hash of the row's own 8-bit pixels: the same
    image always gets the same answer, whatever else is in its batch and however often it is asked.
    """

    place = INPUT
    draws: Tensor
    weights: Tensor

    def __init__(self, spec: ModelSpec, site: nn.Module | None, *, sigma: float, seed: int = 0) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        draws = sigma * torch.randn(256, *spec.shape, generator=gen, device="cpu")
        weights = torch.randint(0, 2**31, (draws[0].numel(),), generator=gen, device="cpu")
        self.register_buffer("draws", draws, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Noisy images, same shape, in [0, 1]."""
        levels = x.detach().mul(255).round().long().flatten(1)
        pick = (levels * self.weights).sum(1) // 2**20 % 256
        return (x + self.draws[pick]).clamp(0, 1)


KINDS: dict[str, type[Change]] = {
    "gate": Gate,
    "insert": Insert,
    "stamp": Stamp,
    "purify": Purify,
    "permute_logits": PermuteLogits,
    "noise": Noise,
}


def make(wrap: Wrap, net: nn.Module, spec: ModelSpec) -> Change:
    """The module of one wrap, with the values it starts with.

    Args:
        wrap: What to build.
        net: The classifier, whose modules `wrap.site` names as `net.named_modules()` does.
        spec: The classifier's spec.

    Raises:
        ValueError: unknown kind, a site that does not exist or does not belong, or arguments out of range.
    """
    if wrap.kind not in KINDS:
        raise ValueError(f"no wrap of kind {wrap.kind!r}; kinds: {', '.join(KINDS)}")
    kind = KINDS[wrap.kind]
    if (kind.place == SITE) != bool(wrap.site):
        raise ValueError(f"wrap `{wrap.kind}` " + ("needs a site" if kind.place == SITE else "takes no site"))
    site = None
    if wrap.site:
        site = dict(net.named_modules()).get(wrap.site)
        if site is None or not wrap.site.startswith("body"):
            raise ValueError(f"wrap `{wrap.kind}`: `{spec.arch}` has no module {wrap.site!r} in its body")
    try:
        return kind(spec, site, **(wrap.args or {}))
    except TypeError as e:
        raise ValueError(f"wrap `{wrap.kind}` cannot be built from the arguments {wrap.args}: {e}") from e


class After:
    """A forward hook that puts `change` behind a module.

    A hook rather than a replaced module, because so every module and every tensor of the body keeps its name and
    class: taps, layer-wise comparisons and state dicts of a wrapped model match those of the plain one. The hook holds
    the wrap itself, so a deep copy of the classifier is tied to the copy of the wrap.
    """

    def __init__(self, change: nn.Module) -> None:
        self.change = change

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The changed output."""
        return self.change(output)


def _channels(site: nn.Module | None) -> int:
    """Channels of a site's output, read off the layer; of a sequence, off its last layer that tells."""
    if isinstance(site, nn.Sequential):
        layers = [m for m in reversed(site) if any(True for _ in m.parameters())]
        return _channels(layers[0] if layers else None)
    for name in ("out_channels", "num_features", "out_features"):
        if isinstance(n := getattr(site, name, None), int):
            return n
    raise ValueError("this site does not tell its channels: give `channels` in the wrap's args")
