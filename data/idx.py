"""The idx layout of MNIST and Fashion-MNIST: `<root>/<folder>/raw/train-images-idx3-ubyte[.gz]` and its three peers."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sleeperbench.data.arrays import DAMAGED, Arrays
from sleeperbench.data.errors import DataError

_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _find(root: Path, folder: str, stem: str) -> Path | None:
    for name in (f"{stem}.gz", stem):
        path = root / folder / "raw" / name
        if path.is_file():
            return path
    return None


def idx_files(root: Path, folder: str) -> tuple[Path, ...]:
    """The files of the set that are there, compressed ones first."""
    stems = [stem for pair in _STEMS.values() for stem in pair]
    return tuple(p for p in (_find(root, folder, stem) for stem in stems) if p)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of one idx file of unsigned bytes.

    Raises:
        DataError: Not such a file, truncated, or longer than its header says.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
            raw = f.read()
    except DAMAGED as e:
        raise DataError(f"{path} is damaged ({e}): delete it and get the data set again") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path} is not an idx file of unsigned bytes: delete it and get the data set again")
    start = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[k : k + 4], "big") for k in range(4, start, 4))
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path} is truncated or too long: its header promises {math.prod(shape)} bytes, it has "
            f"{len(raw) - start}: delete it and get the data set again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_idx_split(root: Path, folder: str, split: str) -> Arrays:
    """One split: grey images (N, 1, H, W) and their labels."""
    found = []
    for stem in _STEMS[split]:
        path = _find(root, folder, stem)
        if path is None:
            raise DataError(f"{root / folder / 'raw'} has neither {stem}.gz nor {stem}: get the data set again")
        found.append(read_idx(path))
    images, labels = found
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(f"{root / folder / 'raw'}: {_STEMS[split][0]} and its labels are not images and labels")
    return Arrays(images=images[:, None], labels=labels.astype(np.int64))
