"""Artifacts as one file: an uncompressed zip whose bytes depend on the artifacts alone, and its careful reader."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from sleeperbench.engine.manifest import parse_manifest, safe_name
from sleeperbench.engine.store import VERSION, Store
from sleeperbench.errors import BadInput, Mismatch

EPOCH = (1980, 1, 1, 0, 0, 0)
MANIFEST_BYTES = 1 << 24
CHUNK = 1 << 20
_HEX = frozenset("0123456789abcdef")
_ENCRYPTED = 0x1


def export(store: Store, keys: Iterable[str], file: Path) -> int:
    """Write artifacts to a zip; equal artifacts give equal bytes. Returns its size in bytes.

    Raises:
        Mismatch: an artifact is damaged; nothing is written.
        BadInput: the file cannot be written.
    """
    tmp = ""
    try:
        fd, tmp = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(fd, "wb") as raw, zipfile.ZipFile(raw, "w") as zf:
            _add(zf, "VERSION", VERSION.encode())
            for key in sorted(keys):
                if problem := store.check(key):
                    raise Mismatch(f"artifact {key[:12]}: {problem}; `sleeperbench store check --remove` takes it out")
                folder = store.fetch(key)
                manifest = (folder / "manifest.json").read_bytes()
                for name in sorted([*parse_manifest(manifest, key)["files"], "manifest.json"]):
                    _copy(zf, f"{key[:2]}/{key}/{name}", folder / name)
        os.chmod(tmp, 0o644)
        os.replace(tmp, file)
    except OSError as e:
        raise BadInput(f"cannot write {file}: {e.strerror or e}; give another file, or free space") from e
    finally:
        Path(tmp).unlink(missing_ok=True) if tmp else None
    return file.stat().st_size


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system, info.external_attr, info.file_size = 3, (stat.S_IFREG | 0o644) << 16, size
    return info


def _add(zf: zipfile.ZipFile, name: str, data: bytes) -> None:
    zf.writestr(_entry(name, len(data)), data)


def _copy(zf: zipfile.ZipFile, name: str, source: Path) -> None:
    with source.open("rb") as f, zf.open(_entry(name, source.stat().st_size), "w") as out:
        shutil.copyfileobj(f, out, CHUNK)


def take_in(store: Store, file: Path) -> tuple[list[str], list[str]]:
    """Commit the artifacts of a zip; returns the keys that are new and those that were there already.

    Everything is checked before anything is written: names, sizes, and every byte against its manifest. Nothing of it
    is executed or unpickled.

    Raises:
        BadInput: not such a zip, of another store version, or one with names or sizes that no export writes.
        Mismatch: bytes that do not match their manifest.
    """
    try:
        with zipfile.ZipFile(file) as zf:
            found = _artifacts(zf, file)
            for key, names in found.items():
                _verify(zf, key, names)
            new: list[str] = []
            known: list[str] = []
            for key, names in found.items():
                with store.scratch() as folder:
                    (known if store.has(key) or not _commit(store, zf, key, names, folder) else new).append(key)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as e:
        raise BadInput(f"{file} is no store export ({e}); name a file that `sleeperbench store export` wrote") from e
    except OSError as e:
        raise BadInput(f"cannot import {file}: {e.strerror or e}; mend that, then import it again") from e
    return new, known


def _artifacts(zf: zipfile.ZipFile, file: Path) -> dict[str, dict[str, zipfile.ZipInfo]]:
    """Key -> file name -> entry, after refusing whatever an export cannot hold."""

    def refuse(what: str) -> BadInput:
        return BadInput(f"{file}: {what}; import only files that `sleeperbench store export` wrote")

    entries = zf.infolist()
    names = [e.filename for e in entries]
    if len(set(names)) < len(names):
        raise refuse(f"two entries are named {next(n for n in names if names.count(n) > 1)!r}")
    for e in entries:
        kind = stat.S_IFMT(e.external_attr >> 16)
        if e.is_dir() or kind not in (0, stat.S_IFREG):
            raise refuse(f"{e.filename!r} is a link, a folder or a device")
        if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size or e.flag_bits & _ENCRYPTED:
            raise refuse(f"{e.filename!r} is compressed or encrypted")
    # Stored entries cannot sum up to more than the file has, unless they overlap or lie about their size.
    if sum(e.file_size for e in entries) > file.stat().st_size:
        raise refuse("its entries claim more bytes than it has")
    versions = [e for e in entries if e.filename == "VERSION" and e.file_size < 100]
    version = zf.read(versions[0]).decode(errors="replace").strip() if versions else "unknown"
    if version != VERSION:
        raise refuse(f"it is of store version {version!r}, this is {VERSION}")
    found: dict[str, dict[str, zipfile.ZipInfo]] = {}
    for e in entries:
        if e in versions:
            continue
        head, _, rest = e.filename.partition("/")
        key, _, name = rest.partition("/")
        if len(key) != 64 or set(key) - _HEX or key[:2] != head or not (safe_name(name) or name == "manifest.json"):
            raise refuse(f"the name {e.filename!r} is no file of an artifact")
        found.setdefault(key, {})[name] = e
    return found


def _verify(zf: zipfile.ZipFile, key: str, entries: dict[str, zipfile.ZipInfo]) -> None:
    """Hold every byte of an artifact against its manifest."""
    if "manifest.json" not in entries or entries["manifest.json"].file_size > MANIFEST_BYTES:
        raise Mismatch(f"artifact {key[:12]}: it has no manifest, or one of more than {MANIFEST_BYTES} bytes")
    try:
        files: dict[str, Any] = parse_manifest(zf.read(entries["manifest.json"]), key)["files"]
    except ValueError as e:
        raise Mismatch(f"artifact {key[:12]}: {e}; nothing was imported") from e
    if set(files) != set(entries) - {"manifest.json"}:
        raise Mismatch(f"artifact {key[:12]}: its files are not those of its manifest; nothing was imported")
    for name, want in files.items():
        with zf.open(entries[name]) as f:
            if entries[name].file_size != want["size"] or _sha256(f) != want["sha256"]:
                raise Mismatch(f"artifact {key[:12]}: {name} does not match its digest; nothing was imported")


def _sha256(f: IO[bytes]) -> str:
    h = hashlib.sha256()
    while block := f.read(CHUNK):
        h.update(block)
    return h.hexdigest()


def _commit(store: Store, zf: zipfile.ZipFile, key: str, entries: dict[str, zipfile.ZipInfo], folder: Path) -> bool:
    for name, e in entries.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with zf.open(e) as f, target.open("xb") as out:
            shutil.copyfileobj(f, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
    return store.adopt(key, folder)
