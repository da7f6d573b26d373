"""Trigger inversion with mask and pattern, for all classes at once; and putting recovered triggers on images."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.defense import Inverted
from sleeperbench.kit.pixels import to_float

_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Stamped images per pass through the net: larger is slower on a CPU's caches, and too large for a card's memory."""
_IMPROVED = 0.99
"""A best norm that is not below this share of the one before counts as no improvement (BackdoorBench)."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """What `optimise_masks` found, one entry per target.

    Args:
        mask: float32 (K, 1, H, W) in [0, 1].
        pattern: float32 (K, C, H, W) in [0, 1].
        norm: float32 (K,), sum of the mask; NaN where the wanted success was never reached ("not inverted").
        success: float32 (K,), share of the images that this mask and pattern send to the target.
    """

    mask: Tensor
    pattern: Tensor
    norm: Tensor
    success: Tensor


def optimise_masks(
    net: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    ctx: Ctx,
    epochs: int,
    batch: int,
    lr: float,
    weight: float,
    factor: float,
    patience: int,
    success: float,
    stop_after: int,
    at_once: int = 0,
    start: tuple[Tensor, Tensor] | None = None,
) -> Masks:
    """Per target, the smallest mask and pattern that send all images there (Wang et al., S&P 2019).

    Minimises mean CE(f((1 - m) x + m p), t) + w |m|_1 by Adam (betas 0.5 and 0.9) over u and v with
    m = (tanh(u) + 1) / 2, p = (tanh(v) + 1) / 2; m and p start uniform in [0, 1]. All targets share the images of a
    step; the losses are summed over targets, which share no parameter, and averaged over images.

    After each pass over the images, with s the share of hits during the pass:

    - s >= `success` and the mask is smaller than any kept before: mask and pattern are kept;
    - `patience` passes in a row with s >= `success`: w is multiplied by `factor`; as many below it: w is divided by
      factor^1.5;
    - a target stops once w has gone both up and down and its kept norm has not fallen by 1 % for `stop_after` passes.

    The net runs in eval mode on the images as they are. Costs count every stamped image forward and back.

    Args:
        net: Classifier of [0, 1] images; left untouched.
        images: uint8 (N, C, H, W), shared by all targets.
        targets: int64 (K,), the class each mask aims at.
        ctx: Seed, device, costs, progress.
        epochs: Passes over the images.
        batch: Images per update; the last batch of a pass may be short.
        lr: Learning rate of Adam.
        weight: w at the start.
        factor: See above.
        patience: See above.
        success: Share of the images, 0..1.
        stop_after: Passes; see above.
        at_once: Targets per pass through the net, at least one; 0 takes as many as the device likes. It changes the
            masks by rounding alone: what takes targets one after another pays for each of them.
        start: Masks (K, 1, H, W) and patterns (K, C, H, W) between 0 and 1 to start from in place of uniform noise.

    Returns:
        Kept masks on the CPU; where none was kept, those of the last pass, with a norm of NaN.

    Raises:
        ValueError: no images.
    """
    if not len(images):
        raise ValueError("no images to optimise masks on")
    device = ctx.device
    net = copy.deepcopy(net).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.eval().requires_grad_(False)
    x, aims = to_float(images.to(device)), targets.to(device)
    k, (c, h, w) = len(targets), images.shape[1:]
    gen = ctx.generator("masks")
    first = start or [torch.rand(k, n, h, w, generator=gen) for n in (1, c)]
    u, v = (_raw(share).to(device).requires_grad_() for share in first)
    adam = torch.optim.Adam([u, v], lr=lr, betas=(0.5, 0.9))
    kept_u, kept_v = u.detach().clone(), v.detach().clone()
    schedule = _Schedule(k, weight, factor, patience, success, stop_after, device)
    live = torch.arange(k, device=device)
    classes = at_once or max(1, _AT_ONCE[device.type if device.type in _AT_ONCE else "cpu"] // batch)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=ctx.generator("masks order", epoch)).to(device)
        hit = torch.zeros(k, device=device)
        for rows in order.split(batch):
            adam.zero_grad()
            seen = x[rows]
            for part in live.split(classes):
                mask = _squash(u[part])
                logits = _logits(net, seen, mask, _squash(v[part]))
                wanted = aims[part, None].expand(-1, len(rows))
                error = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / len(rows)
                (error + (schedule.weight[part] * mask.flatten(1).sum(1)).sum()).backward()  # type: ignore[no-untyped-call]
                hit[part] += (logits.argmax(2) == wanted).sum(1)
            adam.step()
            ctx.cost.forwards += len(live) * len(rows)
            ctx.cost.backwards += len(live) * len(rows)
        with torch.no_grad():
            better = schedule.after(hit / len(x), _squash(u).flatten(1).sum(1))
            # A target that never succeeds shows its last mask.
            moved = better | (schedule.best.isinf() & ~schedule.stopped)
            kept_u[moved], kept_v[moved] = u[moved], v[moved]
        ctx.progress(epoch + 1, epochs, "invert")
        live = (~schedule.stopped).nonzero().flatten()
        if not len(live):
            break
    mask, pattern = _squash(kept_u), _squash(kept_v)
    return Masks(
        mask=mask.cpu(),
        pattern=pattern.cpu(),
        norm=torch.where(schedule.best.isfinite(), mask.flatten(1).sum(1), torch.nan).cpu(),
        success=_success(net, x, mask, pattern, aims, batch, ctx).cpu(),
    )


class _Schedule:
    """Weights, counters and best norms of K targets, as vectors; each target goes its own way."""

    def __init__(
        self, k: int, weight: float, factor: float, patience: int, success: float, stop_after: int, device: torch.device
    ) -> None:
        self.factor, self.patience, self.success, self.stop_after = factor, patience, success, stop_after
        self.weight = torch.full((k,), weight, device=device)
        self.best, self.reference = (torch.full((k,), torch.inf, device=device) for _ in range(2))
        self.good, self.bad, self.stalled = (torch.zeros(k, dtype=torch.int64, device=device) for _ in range(3))
        self.rose, self.fell, self.stopped = (torch.zeros(k, dtype=torch.bool, device=device) for _ in range(3))

    def after(self, share: Tensor, norm: Tensor) -> Tensor:
        """Take in one pass: share of hits and norm, both (K,); returns which masks to keep, bool (K,)."""
        reached = share >= self.success
        better = ~self.stopped & reached & (norm < self.best)
        self.best = torch.where(better, norm, self.best)

        improved = self.best < _IMPROVED * self.reference
        self.stalled = torch.where(improved | self.best.isinf(), 0, self.stalled + 1)
        self.reference = torch.minimum(self.reference, self.best)
        self.stopped = self.stopped | (self.rose & self.fell & (self.stalled >= self.stop_after))

        self.good, self.bad = torch.where(reached, self.good + 1, 0), torch.where(reached, 0, self.bad + 1)
        up, down = self.good >= self.patience, self.bad >= self.patience
        self.weight = torch.where(up, self.weight * self.factor, self.weight)
        self.weight = torch.where(down, self.weight / self.factor**1.5, self.weight)
        self.good, self.bad = self.good.masked_fill(up, 0), self.bad.masked_fill(down, 0)
        self.rose, self.fell = self.rose | up, self.fell | down
        return better


def apply(trigger: Inverted, x: Tensor) -> Tensor:
    """Images with a recovered trigger: (1 - mask) x + mask pattern, or x + delta; clamped to [0, 1].

    Args:
        trigger: With mask and pattern, or with delta.
        x: float32 [0, 1] (N, C, H, W).

    Raises:
        ValueError: it has neither.
    """
    if trigger.mask is not None and trigger.pattern is not None:
        mask, pattern = trigger.mask.to(x), trigger.pattern.to(x)
        return ((1 - mask) * x + mask * pattern).clamp(0, 1)
    if trigger.delta is not None:
        return (x + trigger.delta.to(x)).clamp(0, 1)
    raise ValueError("the recovered trigger has neither mask and pattern nor delta")


def appliable(trigger: Inverted) -> bool:
    """Whether `apply` can put it on images: no code of its own, and mask and pattern or delta."""
    whole = trigger.mask is not None and trigger.pattern is not None
    return not trigger.uses_apply and (whole or trigger.delta is not None)


def _raw(share: Tensor) -> Tensor:
    """What `_squash` turns into `share`; 0 and 1 themselves lie at infinity."""
    return torch.atanh((2 * share - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def _squash(raw: Tensor) -> Tensor:
    return (raw.tanh() + 1) / 2


def _logits(net: nn.Module, x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Logits (K, B, classes) of images (B, C, H, W) under K masks (K, 1, H, W) and patterns (K, C, H, W)."""
    stamped = x + mask[:, None] * (pattern[:, None] - x)
    flat = stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return net(flat).float().unflatten(0, (len(mask), len(x)))


@torch.no_grad()
def _success(net: nn.Module, x: Tensor, mask: Tensor, pattern: Tensor, aims: Tensor, batch: int, ctx: Ctx) -> Tensor:
    """Share (K,) of the images that each mask and pattern sends to its aim."""
    ctx.cost.forwards += len(aims) * len(x)
    shares = []
    for m, p, aim in zip(mask, pattern, aims, strict=True):
        hits = [(_logits(net, part, m[None], p[None]).argmax(2) == aim).sum() for part in x.split(batch)]
        shares.append(torch.stack(hits).sum() / len(x))
    return torch.stack(shares)
