"""The released Python batches of CIFAR-10 and CIFAR-100.

The batches are pickles, the only ones that this project opens. A pickle can run any code, so a batch is opened only
after its MD5 proved to be the release's, and then by an unpickler that can build numpy arrays and plain values alone.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sleeperbench.data.arrays import Arrays
from sleeperbench.data.errors import DataError

_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Closed(pickle.Unpickler):
    """Builds arrays, bytes, strings, numbers, lists and dicts; names nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"names {module}.{name}, which an image batch has no use for") from None


def read_batch(raw: bytes, where: str) -> dict[Any, Any]:
    """The dictionary of one batch, keys as bytes.

    Raises:
        DataError: Damaged, not a dictionary, or naming anything but numpy arrays; nothing it names is called.
    """
    try:
        batch = _Closed(io.BytesIO(raw), encoding="bytes").load()
    except Exception as e:  # a damaged pickle raises nearly anything
        raise DataError(f"{where} is refused ({e}): delete it and get the data set again") from None
    if not isinstance(batch, dict):
        raise DataError(f"{where} is refused (not a dictionary): delete it and get the data set again")
    return batch


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Where a release keeps its batches.

    Args:
        folder: Folder below the data root.
        md5: Per split, file name -> MD5 of the released file, in row order.
        key: Key of the labels.
    """

    folder: str
    md5: dict[str, dict[str, str]]
    key: bytes

    def files(self, root: Path) -> tuple[Path, ...]:
        """The batches that are there."""
        paths = (root / self.folder / name for split in self.md5.values() for name in split)
        return tuple(p for p in paths if p.is_file())

    def read(self, root: Path, split: str) -> Arrays:
        """One split, (N, 3, 32, 32), equal to the release.

        Raises:
            DataError: A batch is missing, or is not the released file.
        """
        images, labels = [], []
        for name, md5 in self.md5[split].items():
            path = root / self.folder / name
            try:
                raw = path.read_bytes()
            except OSError as e:
                raise DataError(f"{path} cannot be read ({e.strerror}): get the data set again") from None
            found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
            if found != md5:
                raise DataError(
                    f"{path} is not the released file (MD5 {found}, released {md5}) and is not opened: delete it and "
                    "get the data set again, or give the pixels as plain arrays"
                )
            batch = read_batch(raw, str(path))
            pixels, rows = batch.get(b"data"), batch.get(self.key)
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
                raise DataError(f"{path}: `data` is not uint8 (N, 3072): delete it and get the data set again")
            if not isinstance(rows, list) or not all(isinstance(y, int) for y in rows):
                raise DataError(f"{path}: `{self.key.decode()}` is not a list of labels: get the data set again")
            images.append(pixels.reshape(-1, 3, 32, 32))
            labels.append(np.asarray(rows, dtype=np.int64))
        return Arrays(images=np.concatenate(images), labels=np.concatenate(labels), released=True)


CIFAR10 = Batches(
    folder="cifar-10-batches-py",
    md5={
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    key=b"labels",
)
CIFAR100 = Batches(
    folder="cifar-100-python",
    md5={
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    key=b"fine_labels",
)
