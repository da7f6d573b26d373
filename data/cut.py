"""The one cut of the training rows, made before anything is trained.

`pool` is what defenses draw clean rows from, `probe` what re-activation and exclusivity use, `rest` what models train
on. By default no model trains on the pool: a model remembers its training rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sleeperbench.data.errors import DataError
from sleeperbench.data.order import Positions, shuffled, stratified

PROBE_SHARE = 0.04
PROBE_LEAST = 256
VAL_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Positions into the training split: disjoint, together all rows.

    Args:
        pool: int64; every prefix holds the classes in proportion, so a smaller pool of the same seed is a prefix.
        probe: int64, likewise; does not depend on the pool's size.
        rest: int64, in random order.
    """

    pool: Tensor
    probe: Tensor
    rest: Tensor


def cut(labels: Tensor, *, seed: int, clean: float | int, classes: int) -> Cut:
    """Cut the training rows.

    Args:
        labels: int64, (N,), true labels.
        seed: Seed of the cut.
        clean: Size of the pool: a share of N in (0, 1), or a count.
        classes: Number of classes.

    Raises:
        DataError: Labels out of range, or too few rows for a pool, a probe and one row per class to train on.
    """
    y = labels.cpu().numpy()
    n = len(y)
    if n and not (y.min() >= 0 and y.max() < classes):
        raise DataError(f"labels run from {y.min()} to {y.max()}, the data set has classes 0..{classes - 1}")
    if isinstance(clean, float) and not 0 < clean < 1:
        raise DataError(f"clean = {clean}: a share must lie between 0 and 1; a count is a whole number")
    pool_size = round(clean * n) if isinstance(clean, float) else clean
    probe_size = min(max(round(PROBE_SHARE * n), PROBE_LEAST), n // 5)
    if pool_size < 1 or probe_size < 1 or n - pool_size - probe_size < classes:
        raise DataError(
            f"{n} training rows are too few for a pool of {pool_size}, a probe of {probe_size} and at least "
            f"{classes} to train on: use more rows or another `clean`"
        )
    probe = stratified(y, "probe", seed)[:probe_size]
    left = _without(np.arange(n), probe)
    pool = left[stratified(y[left], "pool", seed)[:pool_size]]
    left = _without(left, pool)
    rest = left[shuffled(len(left), "rest", seed)]
    return Cut(pool=torch.from_numpy(pool), probe=torch.from_numpy(probe), rest=torch.from_numpy(rest))


def split_tune_val(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split a defender's clean rows 80/20 with the classes in proportion.

    Args:
        labels: int64, (N,), labels of those rows.
        seed: Seed of the split.

    Returns:
        Positions (int64, ascending) to tune on and to validate on.

    Raises:
        DataError: Fewer than 2 rows.
    """
    n = len(labels)
    if n < 2:
        raise DataError(f"{n} clean rows cannot be split into rows to tune on and rows to validate on")
    val = np.sort(stratified(labels.cpu().numpy(), "val", seed)[: max(1, round(VAL_SHARE * n))])
    return torch.from_numpy(_without(np.arange(n), val)), torch.from_numpy(val)


def _without(rows: Positions, gone: Positions) -> Positions:
    return rows[~np.isin(rows, gone)]
