"""Images as files: ImageFolder, the GTSRB archive and the Tiny ImageNet archive.

Every picture is decoded by Pillow, converted to grey or RGB, and resized to the data set's shape by Pillow's bilinear
filter (antialiased when it shrinks), the whole picture without a crop. Pictures of the right size are left as they are.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sleeperbench.data.arrays import SPLITS, Arrays
from sleeperbench.data.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff")
Shape = tuple[int, int, int]


def pictures_below(folder: Path) -> tuple[Path, ...]:
    """All picture files below a folder, sorted by path."""
    found = [
        os.path.join(at, name)  # strings: tens of thousands of Path objects are slow to sort
        for at, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
    return tuple(Path(p) for p in sorted(found))


def read_pictures(paths: Sequence[Path], labels: Sequence[int], shape: Shape) -> Arrays:
    """Decode pictures into one array.

    Raises:
        DataError: A file is missing or no picture.
    """
    channels, height, width = shape
    images = np.empty((len(paths), channels, height, width), dtype=np.uint8)
    for k, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                if picture.mode[0] in "IF":
                    raise ValueError(f"mode {picture.mode}: more than 8 bits per channel, which 0..255 cannot hold")
                flat = picture.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise DataError(f"{path} is no readable picture ({e}): replace or delete it") from None
        if flat.size != (width, height):
            flat = flat.resize((width, height), Image.Resampling.BILINEAR)
        images[k] = np.atleast_3d(np.asarray(flat)).transpose(2, 0, 1)
    return Arrays(images=images, labels=np.asarray(labels, dtype=np.int64))


def class_folders(folder: Path, classes: Sequence[str]) -> list[Path]:
    """The folders of the classes in label order: by name when they carry the class names, else sorted.

    Raises:
        DataError: Not one folder per class.
    """
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if {p.name for p in found} == set(classes):
        return [folder / c for c in classes]
    if len(found) != len(classes):
        raise DataError(f"{folder} holds {len(found)} class folders, the data set has {len(classes)} classes")
    return found


def imagefolder_splits(folder: Path) -> dict[str, Path]:
    """Split -> folder of an ImageFolder; `val` stands in for a missing `test`."""
    found = {s: folder / s for s in SPLITS if (folder / s).is_dir()}
    if "test" not in found and (folder / "val").is_dir():
        found["test"] = folder / "val"
    return found


def imagefolder_files(folder: Path) -> tuple[Path, ...]:
    """All pictures of both splits; none unless both are there."""
    found = imagefolder_splits(folder)
    return tuple(p for s in SPLITS for p in pictures_below(found[s])) if len(found) == len(SPLITS) else ()


def read_imagefolder(folder: Path, split: str, shape: Shape, classes: Sequence[str]) -> Arrays:
    """One split of `<folder>/{train,test}/<class>/**`, rows by class, then by path."""
    return _read_classes(class_folders(imagefolder_splits(folder)[split], classes), shape)


def _read_classes(folders: Sequence[Path], shape: Shape) -> Arrays:
    rows = [(p, label) for label, at in enumerate(folders) for p in pictures_below(at)]
    return read_pictures([p for p, _ in rows], [label for _, label in rows], shape)


def gtsrb_files(root: Path) -> tuple[Path, ...]:
    """The files of the GTSRB archive as torchvision unpacks it."""
    table = root / "gtsrb" / "GT-final_test.csv"
    return (*pictures_below(root / "gtsrb" / "GTSRB"), *((table,) if table.is_file() else ()))


def read_gtsrb(root: Path, split: str, shape: Shape, classes: Sequence[str]) -> Arrays:
    """One split: train by class and file name, test in the order of its table."""
    base = root / "gtsrb"
    train, test = base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images"
    table = base / "GT-final_test.csv"
    for needed in (train, test, table):
        if not needed.exists():
            raise DataError(f"{needed} is missing: get the data set again")
    if split == "train":
        return _read_classes(class_folders(train, classes), shape)
    try:
        with table.open(newline="") as f:
            rows = list(csv.DictReader(f, delimiter=";"))
        paths, labels = [test / r["Filename"] for r in rows], [int(r["ClassId"]) for r in rows]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{table} is damaged ({e!r}): get the data set again") from None
    return read_pictures(paths, labels, shape)


def tiny_files(root: Path) -> tuple[Path, ...]:
    """The files of the Tiny ImageNet archive; its test pictures have no labels and are left out."""
    base = root / "tiny-imagenet-200"
    table = base / "val" / "val_annotations.txt"
    found = (*pictures_below(base / "train"), *pictures_below(base / "val" / "images"))
    return (*found, *((table,) if table.is_file() else ()))


def read_tiny(root: Path, split: str, shape: Shape, classes: Sequence[str]) -> Arrays:
    """One split: train by class and file name; `test` is the labelled validation rows, in the order of their table."""
    base = root / "tiny-imagenet-200"
    if split == "train":
        return _read_classes([base / "train" / name for name in classes], shape)
    label = {name: k for k, name in enumerate(classes)}
    table = base / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t") for line in table.read_text().splitlines() if line]
        paths, labels = [base / "val" / "images" / r[0] for r in rows], [label[r[1]] for r in rows]
    except (OSError, ValueError, KeyError, IndexError) as e:
        raise DataError(f"{table} is missing or damaged ({e!r}): get the data set again") from None
    return read_pictures(paths, labels, shape)
