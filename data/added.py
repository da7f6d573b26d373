"""Data sets of the user's own: copied into `<root>/<id>/{train,test}.npz`, described by `<root>/<id>/source.json`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from sleeperbench.data.arrays import SPLITS, Arrays, check, load_npz, npz_files, read_npz, write_npz
from sleeperbench.data.errors import DataError
from sleeperbench.data.folder import imagefolder_files, imagefolder_splits, read_imagefolder
from sleeperbench.data.source import Source

CARD = "source.json"
Splits = dict[str, tuple[Arrays, dict[str, NDArray[Any]]]]


def add_images(root: Path, name: str, folder: Path, size: int | None) -> Source:
    """Add an ImageFolder, `<folder>/{train,test}/<class>/*`; `val` stands in for a missing `test`.

    Args:
        root: Data root.
        name: Id of the new data set.
        folder: The pictures.
        size: Height and width that pictures are resized to; None when all have the same size already.

    Raises:
        DataError: The folder is laid out otherwise, or pictures differ in size and no `size` is given.
    """
    _free(root, name)
    pictures = imagefolder_files(folder)
    if not pictures:
        raise DataError(f"{folder} holds no pictures in train/<class>/ and test/<class>/")
    shape = _shape(pictures, size)
    train = imagefolder_splits(folder)["train"]
    classes = tuple(sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith(".")))
    splits: Splits = {s: (read_imagefolder(folder, s, shape, classes), {}) for s in SPLITS}
    return _write(root, name, classes, splits)


def add_arrays(root: Path, name: str, folder: Path) -> Source:
    """Add plain arrays, `<folder>/{train,test}.npz`; keys of a row's further facts (`inexact`, `track`) go along.

    Class names are the array `classes` (text) of train.npz, else the numbers 0 to the largest label.
    """
    _free(root, name)
    splits: Splits = {}
    names: tuple[str, ...] = ()
    for split in SPLITS:
        path = folder / f"{split}.npz"
        rows, found = read_npz(path), load_npz(path)
        if split == "train":
            names = tuple(str(c) for c in found.get("classes", range(int(rows.labels.max(initial=-1)) + 1)))
        splits[split] = (rows, {k: v for k, v in found.items() if k not in ("images", "labels", "classes")})
    return _write(root, name, names, splits)


def read_added(root: Path, name: str) -> Source:
    """The data set that `source.json` describes; its files are the plain arrays beside it.

    Raises:
        DataError: No such file, or not one that `add` wrote.
    """
    path = root / name / CARD
    try:
        card = json.loads(path.read_text())
        classes = tuple(str(c) for c in card["classes"])
        channels, height, width = (int(n) for n in card["shape"])
        mean, std = (tuple(float(v) for v in side) for side in card["norm"])
        pad, flip = int(card["pad"]), bool(card["flip"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({e!r}): add the data set again") from None
    if not classes or len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise DataError(f"{path} is damaged (classes or norm): add the data set again")
    return Source(
        name=name,
        title=name,
        shape=(channels, height, width),
        classes=classes,
        norm=(mean, std),
        pad=pad,
        flip=flip,
        train=None,
        test=None,
        where=f"{name}/{{train,test}}.npz",
        files=lambda r: npz_files(r, name),
        read=lambda r, split: read_npz(r / name / f"{split}.npz"),
    )


def _free(root: Path, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise DataError(f"`{name}` is no id: letters, digits, `_`, `-` and `.`, a letter or digit first")
    if (root / name).exists():
        raise DataError(f"{root / name} is there already: delete it or take another id")


def _shape(pictures: tuple[Path, ...], size: int | None) -> tuple[int, int, int]:
    sizes, modes = set(), set()
    for path in pictures:
        try:
            with Image.open(path) as picture:
                sizes.add(picture.size)
                modes.add(picture.mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise DataError(f"{path} is no readable picture ({e}): replace or delete it") from None
    if size is None and len(sizes) > 1:
        raise DataError(f"the pictures have {len(sizes)} different sizes: say `--size N` to resize all to N x N")
    width, height = (size, size) if size is not None else sizes.pop()
    return (1 if modes <= {"L", "1"} else 3), height, width


def _write(
    root: Path,
    name: str,
    classes: tuple[str, ...],
    splits: Splits,
) -> Source:
    channels, height, width = splits["train"][0].images.shape[1:]
    for split, (rows, _) in splits.items():
        check(rows, shape=(channels, height, width), classes=len(classes), where=f"{name}/{split}")
    card = {
        "name": name,
        "shape": [channels, height, width],
        "classes": classes,
        "norm": [[0.0] * channels, [1.0] * channels],
        "pad": 4,
        "flip": False,
    }
    try:
        for split, (rows, further) in splits.items():
            write_npz(root / name / f"{split}.npz", rows, further)
        part = root / name / f".{CARD}.{os.getpid()}"
        part.write_text(json.dumps(card, indent=1))
        part.replace(root / name / CARD)
    except OSError as e:
        raise DataError(f"{root / name} cannot be written ({e.strerror}): use another --data-root") from None
    return read_added(root, name)
