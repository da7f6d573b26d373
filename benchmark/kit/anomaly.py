"""The anomaly index: how far a value lies from the median, in robust deviations."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 6
"""Fewer values have no outliers worth the name: among 2 to 5 the deviation is that of one or two of them."""
_INFINITE = 1e6


def anomaly_index(values: Tensor) -> Tensor:
    """(value - median) / (1.4826 median |value - median|) of each value, signed: negative below the median.

    The median of an even number is the mean of the middle two (as in NumPy; torch takes the lower). Where the deviation
    is 0, values at the median get 0 and others plus or minus infinity. NaNs stay NaN and count nowhere. Fewer than six
    values that are not NaN all get 0.

    Args:
        values: (K,), such as one mask size per class.

    Returns:
        float64 (K,), on the CPU.
    """
    values = values.detach().double().cpu()
    known = values[~values.isnan()]
    if len(known) < LEAST:
        return torch.where(values.isnan(), values, 0.0)
    gap = values - _median(known)
    deviation = 1.4826 * _median((known - _median(known)).abs())
    return torch.where(gap == 0, 0.0, gap / deviation)


def smallness(sizes: Tensor, works: Tensor) -> Tensor:
    """How far below the median each class's trigger lies, in robust deviations: the larger, the more suspicious.

    Every size counts in median and deviation, also that of a trigger that does not work: where all classes but one
    resist, that one is the outlier. A trigger that does not work makes no class suspicious, whatever its size.

    Args:
        sizes: (K,), of each class's smallest working trigger, or of the last one tried.
        works: bool (K,), whether it reaches the class.

    Returns:
        float64 (K,), on the CPU, between -1e6 and 1e6; at most 0 for a trigger that does not work.
    """
    index = bounded(-anomaly_index(sizes))
    return torch.where(works.cpu(), index, index.clamp_max(0))


def bounded(index: Tensor) -> Tensor:
    """Scores that can be ranked and stored: NaN becomes the lowest of the others (0 without any), infinities 1e6.

    Args:
        index: (K,), such as anomaly indices, where NaN says that nothing was found.
    """
    known = index[~index.isnan()]
    lowest = float(known.min()) if len(known) else 0.0
    return index.nan_to_num(nan=lowest).clamp(-_INFINITE, _INFINITE)


def _median(values: Tensor) -> Tensor:
    ordered = values.sort().values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
