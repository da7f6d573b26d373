"""Reproducible orders of rows: the same on every machine and with every version of numpy and torch."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


def random_keys(n: int, *salt: object) -> NDArray[np.uint64]:
    """One pseudo-random 64-bit number per row.

    SplitMix64 (Steele, Lea, Flood 2014) over the row number, started at a digest of the salt. Library generators
    keep no stream fixed across versions, and a published subset must stay the same subset.

    Args:
        n: Rows.
        salt: What tells this order from others, such as a purpose and a seed.
    """
    start = np.frombuffer(hashlib.sha256(repr(salt).encode()).digest()[:8], dtype="<u8").astype(np.uint64)
    with np.errstate(over="ignore"):
        z = start + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(n: int, *salt: object) -> Positions:
    """The positions 0..n-1 in random order."""
    return np.argsort(random_keys(n, *salt), kind="stable").astype(np.int64)


def stratified(labels: NDArray[np.int64], *salt: object) -> Positions:
    """A random order of all rows in which every prefix holds the classes in proportion.

    The r-th row of a class of n rows, in random order, is placed at (r + 1/2) / n on the unit interval; rows sort by
    that place, ties at random. A prefix of k rows of a balanced set so holds floor or ceil of k / classes of each.

    Args:
        labels: int64, (N,).
        salt: What tells this order from others.

    Returns:
        int64 positions, (N,).
    """
    keys = random_keys(len(labels), *salt)
    by_class = np.lexsort((keys, labels))
    counts = np.unique(labels, return_counts=True)[1]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(labels))
    place[by_class] = (rank + 0.5) / np.repeat(counts, counts)
    return np.lexsort((keys, place)).astype(np.int64)
