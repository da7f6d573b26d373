"""Decoded arrays on disk, written once and memory-mapped ever after.

A data set is decoded into `<cache>/<name>-<digest12>/`: per split `images.npy` (uint8, N C H W), `labels.npy` and
`ids.npy`, and `meta.json` with the size and sha256 of each. The folder is written aside and renamed when whole. The
digest in its name covers paths, sizes and times of the source files: changed sources are decoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sleeperbench.data.arrays import SPLITS, check, digest_arrays
from sleeperbench.data.errors import DataError
from sleeperbench.data.locate import Found, locate, missing
from sleeperbench.data.roots import cache_folder, data_root
from sleeperbench.data.source import Source

READERS = 1  # raise when a reader gives other rows for the same files
_META = "meta.json"
_KINDS = ("images", "labels", "ids")
_checked: set[tuple[str, int]] = set()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A decoded data set.

    Args:
        source: The data set.
        folder: Its folder in the cache.
        meta: What `meta.json` says: per split counts, digests and lossy images, per file size and sha256.
    """

    source: Source
    folder: Path
    meta: Mapping[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Rows per split."""
        return {s: self.meta["splits"][s]["count"] for s in SPLITS}

    @property
    def digests(self) -> dict[str, str]:
        """`digest_arrays` per split."""
        return {s: self.meta["splits"][s]["digest"] for s in SPLITS}

    @property
    def canonical(self) -> bool:
        """True when both splits are known to equal the release."""
        return not self.note

    @property
    def note(self) -> str:
        """What a result on these rows must say; empty when they equal the release."""
        splits, source = self.meta["splits"], self.source
        lossy = sum(splits[s]["lossy"] for s in SPLITS)
        if lossy:
            return f"{lossy} images lossy"
        for split, rows in zip(SPLITS, (source.train, source.test), strict=True):
            if rows is not None and splits[split]["count"] != rows:
                return f"{split} has {splits[split]['count']} of {rows} rows"
        if source.digests is not None:
            same = tuple(self.digests[s] for s in SPLITS) == source.digests
            return "" if same else "pixels or labels differ from the release"
        if all(splits[s]["released"] for s in SPLITS):
            return ""
        return "no release to compare with" if source.train is None else "could not be compared with the release"

    def arrays(self, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images, uint8 (N, C, H, W), memory-mapped copy on write, and labels, int64 (N,)."""
        images = np.load(self._intact(f"{split}.images.npy"), mmap_mode="c", allow_pickle=False)
        return images, np.load(self._intact(f"{split}.labels.npy"), allow_pickle=False)

    def ids(self, split: str) -> NDArray[np.int64]:
        """Stable row numbers, int64 (N,)."""
        return np.load(self._intact(f"{split}.ids.npy"), allow_pickle=False)

    def _intact(self, name: str) -> Path:
        """The path of a cached file, compared with `meta.json`: its size always, its sha256 once per process."""
        path, facts = self.folder / name, self.meta["files"][name]
        try:
            stat = path.stat()
            mark = (str(path), stat.st_mtime_ns)
            whole = stat.st_size == facts["size"]
            if whole and mark not in _checked:
                whole = _sha256(path) == facts["sha256"]
        except OSError as e:
            raise DataError(f"{path} cannot be read ({e.strerror}): {self._mend()}") from None
        if not whole:
            raise DataError(f"{path} is damaged (it does not fit {_META}): {self._mend()}")
        _checked.add(mark)
        return path

    def _mend(self) -> str:
        return f"run `sleeperbench data get {self.source.name} --again`"


def prepare(source: Source, root: Path | None = None, *, again: bool = False) -> Prepared:
    """Decode a data set into the cache, or find it there.

    Args:
        source: Data set.
        root: Data root; see `roots.data_root`.
        again: Delete what is cached of it and decode anew.

    Raises:
        DataError: The data are missing, damaged or unfit, or the cache cannot be written.
    """
    root = data_root(root)
    found = locate(source, root)
    if found is None:
        raise DataError(missing(source, root))
    stem = source.name.replace("/", "--")
    if again:
        drop(stem)
    folder = cache_folder() / f"{stem}-{_key(source, found)}"
    if not (folder / _META).is_file():
        try:
            _build(folder, source, found)
        except OSError as e:
            raise DataError(
                f"the decoded arrays cannot be written to {folder.parent} ({e.strerror}): free some space, or set "
                "SLEEPERBENCH_CACHE to a folder that can be written"
            ) from None
    return Prepared(source=source, folder=folder, meta=_meta(folder / _META, source))


def drop(stem: str) -> None:
    """Delete every cached copy of a data set; `meta.json` first, so that no half of it is ever taken for whole."""
    base = cache_folder()
    pattern = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{12}}")
    for folder in sorted(base.iterdir()) if base.is_dir() else ():
        if pattern.fullmatch(folder.name):
            (folder / _META).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _meta(path: Path, source: Source) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        splits = all(meta["splits"][s].keys() >= {"count", "digest", "lossy", "released"} for s in SPLITS)
        files = all(meta["files"][f"{s}.{k}.npy"].keys() >= {"size", "sha256"} for s in SPLITS for k in _KINDS)
        if splits and files:
            return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f"{path} is damaged: run `sleeperbench data get {source.name} --again`")


def _key(source: Source, found: Found) -> str:
    stats = [(str(p), (stat := p.stat()).st_size, stat.st_mtime_ns) for p in found.files]
    facts = [READERS, source.name, source.shape, source.classes, found.layout, stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _build(folder: Path, source: Source, found: Found) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        meta: dict[str, Any] = {"name": source.name, "layout": found.layout, "splits": {}, "files": {}}
        for split in SPLITS:
            try:
                rows = found.read(split)
            except OSError as e:
                raise DataError(f"{e.filename or source.name} cannot be read ({e.strerror or e})") from None
            check(rows, shape=source.shape, classes=len(source.classes), where=f"{source.name}/{split}")
            ids = np.arange(len(rows.labels), dtype=np.int64) if rows.ids is None else rows.ids
            meta["splits"][split] = {
                "count": len(rows.labels),
                "digest": digest_arrays(rows.images, rows.labels),
                "lossy": rows.lossy,
                "released": rows.released,
            }
            for kind, array in zip(_KINDS, (rows.images, rows.labels, ids), strict=True):
                path = aside / f"{split}.{kind}.npy"
                with path.open("wb") as f:
                    np.save(f, np.ascontiguousarray(array), allow_pickle=False)
                    f.flush()
                    os.fsync(f.fileno())
                meta["files"][path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        with (aside / _META).open("w") as g:
            json.dump(meta, g, indent=1)
            g.flush()
            os.fsync(g.fileno())
        _commit(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _commit(aside: Path, folder: Path) -> None:
    """Rename into place; another process that was first keeps its equal copy, a half-deleted folder makes way."""
    try:
        aside.rename(folder)
    except OSError:
        if (folder / _META).is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    entry = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
