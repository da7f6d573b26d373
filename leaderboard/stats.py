"""Means over attacks and seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

MIN_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over attacks of means over seeds. `kind` says what `low` and `high` are; `single` has neither."""

    value: float
    low: float
    high: float
    kind: Literal["t", "range", "single"]
    cells: int
    attacks: int


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function (Lentz's method), for x < (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or tiny)
    h = d
    for m in range(1, 500):
        for top in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / ((1.0 + top * d) or tiny)
            c = (1.0 + top / c) or tiny
            h *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return h


def _beta_share(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log) * _beta_fraction(a, b, x) / a
    return 1.0 - math.exp(log) * _beta_fraction(b, a, 1.0 - x) / b


@lru_cache(maxsize=4096)
def t_quantile(df: float) -> float:
    """The t with 95 % of Student's distribution of `df` > 0 degrees of freedom between -t and t."""
    low, high = 0.0, 1.0
    while _beta_share(df / 2, 0.5, df / (df + high * high)) > 0.05:
        high *= 2.0
    for _ in range(200):
        mid = (low + high) / 2
        outside = _beta_share(df / 2, 0.5, df / (df + mid * mid))
        low, high = (mid, high) if outside > 0.05 else (low, mid)
    return (low + high) / 2


def mean_over_attacks(groups: Mapping[str, Sequence[float]], *, share: bool) -> Estimate | None:
    """Mean over attacks of the means over seeds; None without a figure.

    The attacks are fixed and the seeds drawn, so the variance is that of seeds within attacks, with the degrees of
    freedom of Welch and Satterthwaite. With an attack of fewer than 3 seeds the range over all cells stands instead.

    Args:
        groups: Attack setting -> one figure per seed.
        share: The figure is a share, whose interval ends at 0 and 1.
    """
    filled = [list(v) for v in groups.values() if v]
    if not filled:
        return None
    n_cells, k = sum(map(len, filled)), len(filled)
    means = [math.fsum(v) / len(v) for v in filled]
    value = math.fsum(means) / k
    every = [x for v in filled for x in v]
    if n_cells == 1:
        return Estimate(value, value, value, "single", 1, 1)
    if min(map(len, filled)) < MIN_SEEDS:
        return Estimate(value, min(every), max(every), "range", n_cells, k)
    parts = [
        math.fsum((x - m) ** 2 for x in v) / (len(v) - 1) / len(v) / k**2 for v, m in zip(filled, means, strict=True)
    ]
    total = math.fsum(parts)
    if total <= 0.0:
        return Estimate(value, value, value, "t", n_cells, k)
    df = total**2 / math.fsum(p**2 / (len(v) - 1) for v, p in zip(filled, parts, strict=True))
    half = t_quantile(df) * math.sqrt(total)
    low, high = value - half, value + half
    if share:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(value, low, high, "t", n_cells, k)
