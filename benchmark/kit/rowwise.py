"""Random numbers per row: the same for a row wherever it stands and whatever else is in its batch."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its 64-bit constants written as signed numbers: int64 products wrap alike.
_STEP = -7046029254386353131
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))


def uniform(gen: Generator, ids: Tensor, n: int) -> Tensor:
    """`n` numbers of U[0, 1) per row, which depend on the seed of `gen` and the row's id alone.

    `gen` itself is not advanced, and the numbers are equal on every device.

    Args:
        gen: Only its `initial_seed()` is read.
        ids: int64 (N,), 0 or more.
        n: Numbers per row.

    Returns:
        float32 (N, n) on the device of `ids`.
    """
    seed = torch.tensor(gen.initial_seed(), device=ids.device)
    start = _mix(_mix(seed) ^ ids)[:, None]
    bits = _mix(start + torch.arange(1, n + 1, device=ids.device) * _STEP)
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24  # 24 bits: what a float32 below 1 can hold exactly


def _mix(z: Tensor) -> Tensor:
    """64 bits scrambled; `>>` keeps the sign, so the bits that it copies in are masked off."""
    for shift, factor in _MIX:
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))
