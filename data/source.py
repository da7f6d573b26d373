"""What a data set must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sleeperbench.data.arrays import Arrays

Norm = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: what it is, where its files lie, how they are read.

    Args:
        name: Id, also the folder of the plain layouts below the data root.
        title: Name for people.
        shape: Channels, height, width.
        classes: Class names in label order.
        norm: Mean and standard deviation per channel, of pixels in [0, 1].
        pad: Zero padding of the random crop, pixels per side.
        flip: Whether training flips horizontally.
        train: Training rows of the release; None when there is no release.
        test: Test rows of the release.
        digests: `digest_arrays` of the released train and test split; None where the release could not be measured.
        licence: Terms of use.
        cite: Paper.
        download_bytes: What `download` fetches; 0 when there is none.
        where: The set's own layout below the data root, for messages; empty when it needs no file.
        files: (data root) -> the files that `read` opens, as far as they are there; their paths, sizes and times key
            the cache. None when the set needs no file.
        read: (data root, split) -> rows. Raises `DataError` for missing or damaged files.
        download: (data root) -> None; None when the set cannot be downloaded.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    norm: Norm
    pad: int
    flip: bool
    train: int | None
    test: int | None
    read: Callable[[Path, str], Arrays]
    files: Callable[[Path], tuple[Path, ...]] | None = None
    where: str = ""
    digests: tuple[str, str] | None = None
    licence: str = "not stated"
    cite: str = ""
    download_bytes: int = 0
    download: Callable[[Path], None] | None = None
