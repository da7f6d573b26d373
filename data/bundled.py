"""The digits that come with scikit-learn: no file, no network.

Differs: the 8x8 originals are enlarged to 16x16, each pixel to a block of 2x2 (nearest neighbour), since a 3x3 trigger
on 8x8 pixels would be a large part of the picture. Grey levels 0..16 become round(level * 255 / 16).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sleeperbench.data.arrays import Arrays
from sleeperbench.data.order import stratified

TEST_ROWS = 360


def read_digits(root: Path, split: str) -> Arrays:
    """One split; ids are the positions among scikit-learn's 1797 rows.

    The 360 test rows are a stratified draw (`order.stratified`, salt `digits`, `test`); both splits keep
    scikit-learn's order. `root` is not looked at.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    labels = found.target.astype(np.int64)
    test = np.isin(np.arange(len(labels)), stratified(labels, "digits", "test")[:TEST_ROWS])
    ids = np.flatnonzero(test if split == "test" else ~test).astype(np.int64)
    grey = np.rint(found.images[ids] * (255 / 16)).astype(np.uint8)
    return Arrays(images=grey.repeat(2, axis=1).repeat(2, axis=2)[:, None], labels=labels[ids], ids=ids)
