"""Image sets in memory, and published subsets of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from sleeperbench.data.arrays import SPLITS
from sleeperbench.data.cache import prepare
from sleeperbench.data.errors import DataError, nearest
from sleeperbench.data.find import find_source
from sleeperbench.data.images import ImageSet
from sleeperbench.data.order import stratified
from sleeperbench.data.source import Source

MEMORY_SHARE = 0.25
"""Splits whose pixels take more than this share of the machine's memory stay memory-mapped."""


def machine_memory() -> int:
    """Physical memory in bytes; 0 where the system does not say, so that everything stays memory-mapped."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def load(source: str | Source, split: str, root: Path | None = None) -> ImageSet:
    """One split of a data set, decoded once and cached.

    Args:
        source: Id or data set.
        split: `train` or `test`.
        root: Data root; see `roots.data_root`.

    Raises:
        DataError: Unknown name, or data that are missing, damaged or unfit.
    """
    if split not in SPLITS:
        raise DataError(f"no split `{split}`: {nearest(split, SPLITS)}")
    source = find_source(source, root) if isinstance(source, str) else source
    prepared = prepare(source, root)
    images, labels = prepared.arrays(split)
    if images.nbytes <= MEMORY_SHARE * machine_memory():
        images = np.array(images)
    return ImageSet(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        ids=torch.from_numpy(prepared.ids(split)),
        classes=source.classes,
        name=source.name,
        split=split,
        digest=prepared.digests[split],
        canonical=prepared.canonical,
    )


def subset(data: ImageSet, n: int, seed: int = 0) -> ImageSet:
    """`n` rows with the classes in proportion, in source order; smaller subsets of a seed lie within larger ones.

    Raises:
        DataError: `n` is below 1 or above the number of rows.
    """
    if not 1 <= n <= len(data):
        raise DataError(f"a subset of {n} rows was asked of {data.name}/{data.split}, which has {len(data)}")
    chosen = stratified(data.labels.numpy(), "subset", seed)[:n]
    return data.rows(torch.from_numpy(np.sort(chosen)))
