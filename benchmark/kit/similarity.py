"""How alike two networks see the same images: trigger-activated change (TAC) and linear centred kernel alignment (CKA).

CKA compares answers of n rows with d values each. Its products are d x d where d < n and n x n otherwise, so the cost
grows with the square of the smaller of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.taps import capture, taps
from sleeperbench.kit.wraps import SITE, Change, Gate

HELD = 512 << 20
"""Bytes of answers that `compare` keeps per model; layers beyond it take a forward pass of their own."""
CONSTANT = 1e-14
"""A share of the sum of squares below which what is left after centring is rounding."""
Layers = list[float]
"""CKA per layer, NaN where it is undefined."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison, see `centred`.

    Args:
        rows: Centred features (n, d) where d < n, else None.
        gram: Their products (n, n), where d >= n, else None.
        squares: Squared length of each centred row, float64 (n,).
        own: The side against itself: squared Frobenius norm of its Gram matrix. Not a number where all rows are equal
            or a value is not finite.
    """

    rows: Tensor | None
    gram: Tensor | None
    squares: Tensor
    own: float

    def against(self, other: Side) -> float:
        """Sum over all pairs of rows of the product of both sides' Gram matrices."""
        if self.rows is not None and other.rows is not None:
            return _squared(self.rows.T @ other.rows)
        if self.gram is not None and other.gram is not None:
            return float((self.gram.double() * other.gram).sum())
        rows, gram = (self.rows, other.gram) if self.rows is not None else (other.rows, self.gram)
        assert rows is not None and gram is not None
        return float(((gram @ rows).double() * rows).sum())


def centred(x: Tensor) -> Side:
    """One side of a comparison, so that several can be made with it. Products are in the dtype of `x`, sums in float64.

    Args:
        x: (n, ...) features of n rows, flattened per row.
    """
    flat = x.flatten(1)
    mean = flat.mean(0, dtype=torch.float64)
    rows = flat - mean.to(flat.dtype)
    small = rows.shape[1] < len(rows)
    products = rows.T @ rows if small else rows @ rows.T
    squares = rows.double().square().sum(1) if small else products.diagonal().double()
    left = float(squares.sum())
    # NaN fails this comparison too.
    varies = left > CONSTANT * (left + len(rows) * float(mean.square().sum()))
    own = _squared(products) if varies and math.isfinite(left) else math.nan
    return Side(rows=rows if small else None, gram=None if small else products, squares=squares, own=own)


def cka(x: Tensor | Side, y: Tensor | Side, *, debiased: bool = False) -> float:
    """Linear CKA of two sets of features of the same n rows, 0..1 (debiased: -1..1); NaN where one side is constant.

    It does not change under orthogonal maps, scaling and shifts of either side. Of independent features it is about
    d / (d + n), so a value says nothing without a baseline; the debiased form is 0 there.

    Args:
        x: Features (n, ...), or what `centred` made of them.
        y: The same of the other side.
        debiased: With the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al. 2020, eq. 3); n at least 4.

    Raises:
        ValueError: different numbers of rows, or too few.
    """
    a, b = (v if isinstance(v, Side) else centred(v) for v in (x, y))
    n = len(a.squares)
    if len(b.squares) != n or n < (4 if debiased else 2):
        raise ValueError(f"{n} and {len(b.squares)} rows: CKA needs the same rows, at least {4 if debiased else 2}")
    if math.isnan(a.own) or math.isnan(b.own):
        return math.nan
    if not debiased:
        return min(1.0, a.against(b) / math.sqrt(a.own * b.own))
    left, right = _hsic1(a.own, a, a), _hsic1(b.own, b, b)
    # Both are squared lengths, not below 0 but for rounding.
    return min(1.0, _hsic1(a.against(b), a, b) / math.sqrt(left * right)) if left > 0 and right > 0 else math.nan


def _hsic1(cross: float, a: Side, b: Side) -> float:
    """The unbiased estimator of HSIC.

    It does not change when a side is shifted, so the sides may be centred; then the rows of a Gram matrix add up to 0,
    and with its diagonal k set to zero to -k, which leaves sums over the two diagonals.
    """
    n = len(a.squares)
    both = float(a.squares @ b.squares)
    sums = float(a.squares.sum()) * float(b.squares.sum())
    return (cross - both + sums / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def activations(
    net: Classifier, images: Tensor, names: Sequence[str], *, batch: int = 250, ctx: Ctx | None = None
) -> dict[str, Tensor]:
    """What layers answer, as (N, channels, places), on the network's device; eval mode, no gradients.

    Args:
        net: A classifier.
        images: uint8 (N, C, H, W).
        names: Layers, or `penultimate`, as for `capture`.
        batch: Images per forward pass.
        ctx: Where the forward passes are counted.
    """
    device, parts = device_of(net), []
    with evaluating(net), torch.no_grad():
        for part in images.split(batch):
            found = capture(net, to_float(part.to(device)), names)
            parts.append({name: by_channel(net, name, answer) for name, answer in found.items()})
    if ctx is not None:
        ctx.cost.forwards += len(images)
    return {name: torch.cat([p[name] for p in parts]) for name in names}


def tac(
    net: Classifier,
    clean: Tensor,
    triggered: Tensor,
    names: Sequence[str],
    *,
    batch: int = 250,
    ctx: Ctx | None = None,
) -> dict[str, Tensor]:
    """Trigger-activated change of every channel of some layers by the 2-norm; see `changes`."""
    return changes(net, clean, triggered, names, kinds=("l2",), batch=batch, ctx=ctx)["l2"]


KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda change: change.norm(dim=2),
    "l1sum": lambda change: change.abs().sum(2),
}
"""Definitions of TAC: how large the change (N, channels, places) of a channel is on an image, (N, channels)."""


def changes(
    net: Classifier,
    clean: Tensor,
    triggered: Tensor,
    names: Sequence[str],
    *,
    kinds: Sequence[str] = tuple(KINDS),
    batch: int = 250,
    ctx: Ctx | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Kind -> layer -> trigger-activated change of every channel, float64 (channels,) on the CPU.

    TAC[k] = mean over image pairs of the size, by one of `KINDS`, of the difference that the trigger makes in channel
    k. Sums run over batches, so only one batch of answers is in memory.

    Args:
        net: A classifier.
        clean: uint8 (N, C, H, W).
        triggered: The same images with trigger, in the same order.
        names: Layers.
        kinds: Names in `KINDS`.
        batch: Pairs at a time.
        ctx: Where the forward passes are counted.

    Raises:
        ValueError: no pairs.
    """
    if not len(clean) or clean.shape != triggered.shape:
        raise ValueError(f"{len(clean)} clean and {len(triggered)} triggered images are no pairs")
    summed: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for x, y in zip(clean.split(batch), triggered.split(batch), strict=True):
        before, after = (activations(net, v, names, batch=batch, ctx=ctx) for v in (x, y))
        for name in names:
            change = (after[name] - before[name]).double()
            for kind, by in summed.items():
                more = KINDS[kind](change).sum(0).cpu()
                by[name] = by[name] + more if name in by else more
    return {kind: {name: total / len(clean) for name, total in by.items()} for kind, by in summed.items()}


def strongest(change: Tensor, share: float) -> Tensor:
    """Positions of the max(1, int(share C)) largest values of (C,); of equal ones the first."""
    return change.argsort(descending=True, stable=True)[: max(1, int(share * len(change)))]


def sites(net: Classifier, image: Tensor) -> dict[str, list[str]]:
    """Where two networks are compared, names of layers by site.

    `conv` are the spatial convolutions of `taps`, without them the MLPs of a transformer's blocks. `post_bn` are the
    first BatchNorm layers that run after each of these convolutions.

    Args:
        net: A classifier.
        image: uint8 (1, C, H, W); layers are watched while it passes.
    """
    found = taps(net)
    convs = list(found.spatial_convs)
    if not convs:
        inside = [name for name, _ in net.named_modules() if name.endswith(".mlp")]
        return {"conv": [n for n in inside if n.startswith(tuple(f"{s}." for s in found.stages))], "post_bn": []}
    ran: list[str] = []
    watched = {*convs, *found.batch_norms}
    handles = [
        module.register_forward_pre_hook(_note(ran, name)) for name, module in net.named_modules() if name in watched
    ]
    try:
        with torch.no_grad():
            net(to_float(image.to(device_of(net))))
    finally:
        for handle in handles:
            handle.remove()
    behind = []
    for name in convs:
        after = (n for n in ran[ran.index(name) + 1 :] if n not in convs)
        behind += list(after)[:1]
    return {"conv": convs, "post_bn": list(dict.fromkeys(behind))}


def held_behind(net: Classifier, image: Tensor, last: str) -> Tensor:
    """What holds the channels of a layer behind which no other is watched: (C,) factors, all 1 where nothing does.

    Gates that act between this layer and the head keep its channels or take them out, and no answer of it or of a layer
    before it shows that. Their factors are multiplied. Of a change that is no gate, or of other channels than the
    layer's, nothing is known: all factors are not a number.

    Args:
        net: A classifier.
        image: uint8 (1, C, H, W); layers are watched while it passes.
        last: The last layer that is watched.
    """
    ran: list[tuple[str, int]] = []
    at_site = [c for c in net.wraps if cast(Change, c).place == SITE]
    watched = [(last, net.get_submodule(last)), *((f"wrap{i}", c) for i, c in enumerate(at_site))]
    handles = [module.register_forward_hook(_note_width(ran, name, net, last)) for name, module in watched]
    try:
        with evaluating(net), torch.no_grad():
            net(to_float(image.to(device_of(net))))
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in ran]
    found = torch.ones(ran[names.index(last)][1])
    for name, _ in ran[names.index(last) + 1 :]:
        change = at_site[int(name.removeprefix("wrap"))]
        if isinstance(change, Gate) and len(change.factor) == len(found):
            found = found * change.factor.cpu()
        else:
            found = torch.full_like(found, torch.nan)
    return found


def compare(
    reference: Classifier,
    models: Mapping[str, Classifier],
    images: Tensor,
    names: Sequence[str],
    cuts: Sequence[Mapping[str, Tensor]],
    ctx: Ctx,
    held: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> list[tuple[dict[str, Layers], dict[str, Layers]]]:
    """CKA of several models to one, layer by layer, in the same channels of both.

    Args:
        reference: What all are compared with.
        models: By label.
        images: uint8 (N, C, H, W), at least 4.
        names: Layers.
        cuts: Choices of channels: layer -> their positions.
        ctx: Where the forward passes are counted.
        held: Model label -> layer -> (C,) factors that its channels are multiplied with, see `held_behind`.

    Returns:
        For each choice (biased, debiased), each model label -> CKA per layer in the order of `names`.
    """
    found: list[tuple[dict[str, Layers], dict[str, Layers]]] = [
        ({m: [] for m in models}, {m: [] for m in models}) for _ in cuts
    ]
    for group in _groups(reference, images, names):
        own = activations(reference, images, group, ctx=ctx)
        sides: list[dict[str, Side]] = [{n: centred(own[n][:, cut[n]]) for n in group} for cut in cuts]
        del own
        for label, net in models.items():
            seen = activations(net, images, group, ctx=ctx)
            for n, factors in held.get(label, {}).items():
                if n in seen:
                    seen[n] = seen[n] * factors.to(seen[n].device)[:, None]
            for cut, side, (biased, debiased) in zip(cuts, sides, found, strict=True):
                for n in group:
                    other = centred(seen[n][:, cut[n]])
                    biased[label].append(cka(side[n], other))
                    debiased[label].append(cka(side[n], other, debiased=True))
    return found


def by_channel(net: Classifier, name: str, answer: Tensor) -> Tensor:
    """A layer's answer as (N, channels, places): channels come second after convolutions, last in transformers."""
    if answer.dim() == 4 and isinstance(net.get_submodule(name), nn.Conv2d | nn.BatchNorm2d):
        return answer.flatten(2)
    return answer.flatten(1, -2).transpose(1, 2) if answer.dim() > 2 else answer[:, :, None]


def _squared(x: Tensor) -> float:
    return float(x.double().square().sum())


def _groups(net: Classifier, images: Tensor, names: Sequence[str]) -> list[list[str]]:
    """Layers in order, as many together as `HELD` bytes of answers to all images allow."""
    if not names:
        return []
    with torch.no_grad():
        one = capture(net, to_float(images[:1].to(device_of(net))), names)
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = one[name].nbytes * len(images)
        if not groups or size > room:
            groups.append([])
            room = HELD
        groups[-1].append(name)
        room -= size
    return groups


def _note_width(ran: list[tuple[str, int]], name: str, net: Classifier, last: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ran.append((name, by_channel(net, name, output).shape[1] if name == last else 0))

    return hook


def _note(ran: list[str], name: str) -> Callable[..., None]:
    return lambda module, inputs: ran.append(name)
