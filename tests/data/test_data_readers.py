from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import toy_rows, toy_source, write_toy
from PIL import Image

from sleeperbench.data.arrays import check, digest_arrays, read_npz
from sleeperbench.data.bundled import read_digits
from sleeperbench.data.catalog import digits, mnist
from sleeperbench.data.errors import DataError
from sleeperbench.data.folder import read_gtsrb, read_imagefolder, read_tiny
from sleeperbench.data.idx import read_idx


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path, n: int = 6) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        (raw / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(x)))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(y))
    return x, y


def test_idx_compressed_and_plain(tmp_path: Path) -> None:
    x, y = write_mnist(tmp_path)
    assert mnist.files is not None
    assert len(mnist.files(tmp_path)) == 4
    for split in ("train", "test"):
        rows = mnist.read(tmp_path, split)
        assert (rows.images[:, 0] == x).all()
        assert (rows.labels == y).all()
        check(rows, shape=mnist.shape, classes=10, where="here")


@pytest.mark.parametrize("cut", [3, 9, 20, -1])
def test_truncated_idx_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    whole = idx_bytes(np.ones((2, 3, 3), dtype=np.uint8))
    for name, raw in (("a-ubyte", whole[:cut]), ("b-ubyte.gz", gzip.compress(whole)[:cut])):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=name):
            read_idx(tmp_path / name)


def test_idx_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack(">HBBI", 0, 13, 1, 2) + b"\0" * 8)
    with pytest.raises(DataError, match="not an idx file of unsigned bytes"):
        read_idx(tmp_path / "x")


def test_digits_are_doubled_pixels_with_disjoint_ids() -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    train, test = (read_digits(Path("/nowhere"), s) for s in ("train", "test"))
    assert train.ids is not None
    assert test.ids is not None
    assert sorted([*train.ids.tolist(), *test.ids.tolist()]) == list(range(1797))
    assert (len(train.labels), len(test.labels)) == (digits.train, digits.test)
    for rows in (train, test):
        assert rows.ids is not None
        assert (rows.labels == raw.target[rows.ids]).all()
        for dy in (0, 1):
            for dx in (0, 1):
                small = rows.images[:, 0, dy::2, dx::2].astype(float)
                assert np.abs(small - raw.images[rows.ids] * 255 / 16).max() <= 0.5
    spread = np.bincount(test.labels) / np.bincount(raw.target)
    assert (np.abs(spread - 360 / 1797) < 0.01).all()
    assert (digest_arrays(train.images, train.labels), digest_arrays(test.images, test.labels)) == digits.digests


def test_npz_grey_and_colour(tmp_path: Path) -> None:
    write_toy(tmp_path, inexact=np.array([3, 4]), track=np.zeros(30))
    rows, raw = read_npz(tmp_path / "toy" / "train.npz"), toy_rows()
    assert (rows.images == raw["images"].transpose(0, 3, 1, 2)).all()
    assert rows.lossy == 2
    np.savez(tmp_path / "grey.npz", images=raw["images"][..., 0], labels=raw["labels"])
    assert read_npz(tmp_path / "grey.npz").images.shape == (30, 1, 4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.array([{}, {}], dtype=object)}, "Python objects"),
        ({"images": np.zeros((30, 4, 5, 3))}, "must be uint8"),
        ({"images": np.zeros((30, 4), dtype=np.uint8)}, "must be uint8"),
        ({"labels": np.zeros(30, dtype=np.int32)}, "must be int64"),
    ],
)
def test_unfit_npz_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **toy_rows() | changes)
    with pytest.raises(DataError, match=message) as e:
        read_npz(path)
    assert str(path) in str(e.value)


def test_truncated_or_keyless_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=toy_rows()["images"])
    with pytest.raises(DataError, match="no array `labels`"):
        read_npz(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as npz"):
        read_npz(path)
    with pytest.raises(DataError, match="is missing"):
        read_npz(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.full(30, 3)}, "labels run from 3 to 3"),
        ({"labels": np.full(30, -1)}, "labels run from -1"),
        ({"labels": np.zeros(29, dtype=np.int64)}, "30 images but 29 labels"),
        ({"images": np.zeros((30, 1, 4, 5), dtype=np.uint8)}, r"\(1, 4, 5\)"),
        ({"images": np.zeros((0, 3, 4, 5), dtype=np.uint8), "labels": np.zeros(0, dtype=np.int64)}, "no rows"),
        ({"images": np.zeros((30, 3, 4, 5))}, "must be uint8"),
        ({"ids": np.zeros(30, dtype=np.int64)}, "ids"),
    ],
)
def test_rows_that_do_not_fit_their_source(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    rows = read_npz(write_toy(tmp_path) / "toy" / "train.npz")
    check(rows, shape=(3, 4, 5), classes=3, where="toy")
    with pytest.raises(DataError, match=message):
        check(replace(rows, **changes), shape=(3, 4, 5), classes=3, where="toy")


def test_the_digest_sees_every_byte_and_the_shape() -> None:
    x, y = np.zeros((2, 1, 2, 3), dtype=np.uint8), np.zeros(2, dtype=np.int64)
    seen = {digest_arrays(x, y), digest_arrays(x.reshape(2, 1, 3, 2), y)}
    for k in range(x.size):
        one = x.copy()
        one.flat[k] = 1
        seen.add(digest_arrays(one, y))
    for k in range(2):
        other = y.copy()
        other[k] = 1
        seen.add(digest_arrays(x, other))
    assert len(seen) == 2 + 12 + 2
    assert digest_arrays(x, y) == hashlib.sha256(b"(2, 1, 2, 3)" + bytes(12) + bytes(16)).hexdigest()


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (5, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_imagefolder_sorts_classes_and_resizes(tmp_path: Path) -> None:
    for k, name in enumerate(("x", "y", "z")):
        picture(tmp_path / "train" / name / "1.png", (k, 10, 20))
        picture(tmp_path / "val" / name / "deep" / "1.png", (k, 10, 20), size=(50, 40))
    for split in ("train", "test"):
        rows = read_imagefolder(tmp_path, split, (3, 4, 5), ("a", "b", "c"))
        assert rows.labels.tolist() == [0, 1, 2]
        assert rows.images[:, :, 3, 4].tolist() == [[0, 10, 20], [1, 10, 20], [2, 10, 20]]
    named = read_imagefolder(tmp_path, "train", (3, 4, 5), ("z", "x", "y"))
    assert named.images[:, 0, 0, 0].tolist() == [2, 0, 1]
    with pytest.raises(DataError, match="3 class folders"):
        read_imagefolder(tmp_path, "train", (3, 4, 5), ("a", "b"))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "1.png", (1, 2, 3))
    bad = tmp_path / "train" / "a" / "2.png"
    bad.write_bytes((tmp_path / "train" / "a" / "1.png").read_bytes()[:50])
    picture(tmp_path / "test" / "a" / "1.png", (1, 2, 3))
    with pytest.raises(DataError, match=r"2\.png is no readable picture"):
        read_imagefolder(tmp_path, "train", (3, 4, 5), ("a",))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_deep_pictures_are_refused_not_clipped(tmp_path: Path, mode: str) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new(mode, (5, 4)).save(tmp_path / split / "a" / "1.tif")
    with pytest.raises(DataError, match="more than 8 bits"):
        read_imagefolder(tmp_path, "train", (1, 4, 5), ("a",))


def test_gtsrb_archive(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    for k in range(2):
        picture(base / "GTSRB" / "Training" / f"0000{k}" / "00000_00000.ppm", (k, 0, 0), size=(30, 33))
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"0000{k}.ppm", (k + 5, 0, 0))
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00001.ppm;5;0\n00000.ppm;5;1\n")
    train = read_gtsrb(tmp_path, "train", (3, 32, 32), ("s", "t"))
    test = read_gtsrb(tmp_path, "test", (3, 32, 32), ("s", "t"))
    assert train.images[:, 0, 0, 0].tolist() == train.labels.tolist() == [0, 1]
    assert test.images[:, 0, 0, 0].tolist() == [6, 5]
    assert test.labels.tolist() == [0, 1]
    (base / "GT-final_test.csv").write_text("Filename;Width\n00001.ppm;5\n")
    with pytest.raises(DataError, match=r"GT-final_test\.csv is damaged"):
        read_gtsrb(tmp_path, "test", (3, 32, 32), ("s", "t"))


def test_tiny_archive(tmp_path: Path) -> None:
    base = tmp_path / "tiny-imagenet-200"
    for k, name in enumerate(("n1", "n2")):
        picture(base / "train" / name / "images" / f"{name}_0.png", (k, 0, 0))
        picture(base / "val" / "images" / f"val_{k}.png", (k, 0, 0))
    (base / "val" / "val_annotations.txt").write_text("val_1.png\tn1\t0\nval_0.png\tn2\t0\n")
    train = read_tiny(tmp_path, "train", (3, 4, 5), ("n1", "n2"))
    test = read_tiny(tmp_path, "test", (3, 4, 5), ("n1", "n2"))
    assert train.images[:, 0, 0, 0].tolist() == train.labels.tolist() == [0, 1]
    assert test.images[:, 0, 0, 0].tolist() == [1, 0]
    assert test.labels.tolist() == [0, 1]
    (base / "val" / "val_annotations.txt").write_text("val_1.png\tn7\t0\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt is missing or damaged"):
        read_tiny(tmp_path, "test", (3, 4, 5), ("n1", "n2"))


def test_shipped_sources_hold_together() -> None:
    from sleeperbench.data import catalog

    for name in ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "gtsrb", "tiny_imagenet"):
        source = getattr(catalog, name)
        assert source.name == name
        assert len(set(source.classes)) == len(source.classes)
        assert len(source.norm[0]) == len(source.norm[1]) == source.shape[0]
        assert source.flip == (name == "cifar10")
        assert source.pad == {16: 1, 28: 2}.get(source.shape[1], 4)
        assert bool(source.download) == bool(source.download_bytes) == (name != "digits")
    assert toy_source().digests is None
