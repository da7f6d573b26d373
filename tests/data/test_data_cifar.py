from __future__ import annotations

import hashlib
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sleeperbench.data import cifar
from sleeperbench.data.errors import DataError


class _Python2(pickle._Pickler):  # type: ignore[misc,name-defined]
    """Writes what the released batches hold: protocol 2 with byte strings, and numpy's module of that time."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, obj: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    def save_str(self, obj: str) -> None:
        self.write(b"U" + bytes([len(obj)]) + obj.encode())
        self.memoize(obj)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str
    dispatch[type] = save_global


def write_batches(root: Path, labels: list[int]) -> tuple[cifar.Batches, np.ndarray[Any, Any]]:
    """Batches in the released form, and the layout with their MD5s."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    folder = root / cifar.CIFAR10.folder
    folder.mkdir(parents=True)
    md5: dict[str, dict[str, str]] = {}
    for split, name in (("train", "data_batch_1"), ("test", "test_batch")):
        with (folder / name).open("wb") as f:
            _Python2(f, protocol=2).dump({"batch_label": "x", "labels": labels, "data": pixels})
        md5[split] = {name: hashlib.md5((folder / name).read_bytes()).hexdigest()}
    return replace(cifar.CIFAR10, md5=md5), pixels


def test_released_batches_are_read_in_order(tmp_path: Path) -> None:
    batches, pixels = write_batches(tmp_path, [3, 1, 2])
    raw = (tmp_path / batches.folder / "test_batch").read_bytes()
    assert b"numpy.core.multiarray" in raw
    assert len(batches.files(tmp_path)) == 2
    rows = batches.read(tmp_path, "test")
    assert rows.labels.tolist() == [3, 1, 2]
    assert rows.images.shape == (3, 3, 32, 32)
    assert (rows.images[2, 1, 4, 7], rows.images[1, 2, 0, 5]) == (pixels[2, 1024 + 4 * 32 + 7], pixels[1, 2048 + 5])
    assert (rows.images.reshape(3, 3072) == pixels).all()
    assert rows.released


def test_a_batch_with_another_md5_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, _ = write_batches(tmp_path, [0])
    path = tmp_path / batches.folder / "test_batch"
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setattr(cifar, "read_batch", lambda *_: pytest.fail("opened"))
    with pytest.raises(DataError, match=r"test_batch is not the released file"):
        batches.read(tmp_path, "test")


class _Bomb:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_batch_is_refused_and_does_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    raw = pickle.dumps({"data": _Bomb(os.mkdir, str(mark))}, protocol=protocol)
    pickle.loads(raw)
    assert mark.is_dir()  # the bomb works
    mark.rmdir()
    with pytest.raises(DataError, match=r"batch is refused \(names posix.mkdir"):
        cifar.read_batch(raw, "batch")
    assert not mark.exists()


@pytest.mark.parametrize("call", [eval, getattr, np.frombuffer, np.load, __import__], ids=lambda call: call.__name__)
def test_nothing_but_arrays_is_admitted(call: Any) -> None:
    with pytest.raises(DataError, match="refused"):
        cifar.read_batch(pickle.dumps(_Bomb(call, "1")), "batch")


@pytest.mark.parametrize(
    "raw", [b"", b"\x80\x02", b"garbage", pickle.dumps([1])], ids=["empty", "head", "text", "list"]
)
def test_damaged_batches_are_refused(raw: bytes) -> None:
    with pytest.raises(DataError, match="batch is refused"):
        cifar.read_batch(raw, "batch")
