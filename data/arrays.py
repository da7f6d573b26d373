"""Rows of a split as numpy arrays, their digest, and the plain layout `<root>/<name>/{train,test}.npz`."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sleeperbench.data.errors import DataError

SPLITS = ("train", "test")
DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """One split as it was read.

    Args:
        images: uint8, (N, C, H, W), values 0..255.
        labels: int64, (N,).
        ids: int64, (N,), stable row numbers; None stands for the positions 0..N-1.
        released: The files carry the release's own checksums.
        lossy: Images known to be lossy copies of the release's.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64] | None = None
    released: bool = False
    lossy: int = 0


def digest_arrays(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """sha256 over shape, pixels and labels, in row order."""
    h = hashlib.sha256(repr(tuple(int(n) for n in images.shape)).encode())
    h.update(np.ascontiguousarray(images).data)
    h.update(np.ascontiguousarray(labels.astype("<i8")).data)
    return h.hexdigest()


def check(arrays: Arrays, *, shape: tuple[int, int, int], classes: int, where: str) -> None:
    """Refuse rows that do not fit their data set.

    Raises:
        DataError: Dtype, shape, count or label range is off; the message names `where`.
    """
    images, labels = arrays.images, arrays.labels
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"{where}: images must be uint8 (N, C, H, W), not {images.dtype} {images.shape}")
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise DataError(f"{where}: labels must be int64 (N,), not {labels.dtype} {labels.shape}")
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels")
    if not len(labels):
        raise DataError(f"{where}: holds no rows")
    if tuple(images.shape[1:]) != shape:
        raise DataError(f"{where}: images are {images.shape[1:]} (C, H, W), the data set's are {shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{where}: labels run from {low} to {high}, the data set has classes 0..{classes - 1}")
    if arrays.ids is not None and len(np.unique(arrays.ids)) != len(labels):
        raise DataError(f"{where}: row ids are not one per row, each once")


def npz_files(root: Path, name: str) -> tuple[Path, ...]:
    """The files of the plain layout that are there."""
    return tuple(p for p in (root / name / f"{s}.npz" for s in SPLITS) if p.is_file())


def load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file; Python objects in it are refused, never unpickled."""
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except FileNotFoundError:
        raise DataError(f"{path} is missing: the plain layout has train.npz and test.npz side by side") from None
    except DAMAGED as e:
        hint = "it holds Python objects, which are never read" if "allow_pickle" in str(e) else f"{e}"
        raise DataError(f"{path} cannot be read as npz ({hint}): write it again with numpy.savez") from None


def read_npz(path: Path) -> Arrays:
    """One split of the plain layout.

    Keys: `images` uint8, (N, H, W) or (N, H, W, C); `labels` int64, (N,); optional `inexact`, positions of images
    that are lossy copies of the release. Further keys are left alone.

    Raises:
        DataError: Not an npz, a key is missing, or an array is of another kind.
    """
    found = load_npz(path)
    for key in ("images", "labels"):
        if key not in found:
            raise DataError(
                f"{path} has no array `{key}`: it needs images (uint8, N H W C or N H W) and labels (int64)"
            )
    images, labels = found["images"], found["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{path}: images must be uint8 (N, H, W) or (N, H, W, C), not {images.dtype} {images.shape}")
    if labels.dtype != np.int64:
        raise DataError(f"{path}: labels must be int64, not {labels.dtype}")
    images = images[..., None] if images.ndim == 3 else images
    return Arrays(
        images=np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
        labels=labels,
        lossy=len(found.get("inexact", ())),
    )


def write_npz(path: Path, arrays: Arrays, further: Mapping[str, NDArray[Any]]) -> None:
    """Write one split of the plain layout; `further` arrays go along under their own keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}.npz")
    try:
        found: dict[str, Any] = {**further, "images": arrays.images.transpose(0, 2, 3, 1), "labels": arrays.labels}
        np.savez(part, **found)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
