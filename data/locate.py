"""Which layout of a data set is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sleeperbench.data.arrays import Arrays, npz_files, read_npz
from sleeperbench.data.folder import imagefolder_files, read_imagefolder
from sleeperbench.data.source import Source


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a data set's rows will be read from."""

    layout: str
    files: tuple[Path, ...]
    read: Callable[[str], Arrays]


def locate(source: Source, root: Path) -> Found | None:
    """Where the rows of a data set lie below the data root; None when nowhere.

    Plain arrays come first, then the set's own layout, then an ImageFolder. Nothing is downloaded.
    """
    npz = npz_files(root, source.name)
    if npz:
        return Found(layout="arrays", files=npz, read=lambda s: read_npz(root / source.name / f"{s}.npz"))
    own = source.files(root) if source.files else ()
    if own or source.files is None:
        return Found(layout="own", files=own, read=lambda s: source.read(root, s))
    base = root / source.name
    pictures = imagefolder_files(base)
    if not pictures:
        return None
    return Found(
        layout="imagefolder", files=pictures, read=lambda s: read_imagefolder(base, s, source.shape, source.classes)
    )


def missing(source: Source, root: Path) -> str:
    """The message for data that are not there."""
    own = f", {root / source.where}" if source.where else ""
    way = f"run `sleeperbench data get {source.name}`, or put" if source.download else "put"
    return (
        f"no data for `{source.name}` under {root}: looked for {root / source.name}/{{train,test}}.npz{own} and "
        f"{root / source.name}/{{train,test}}/<class>/*: {way} the files there, or set SLEEPERBENCH_DATA"
    )
