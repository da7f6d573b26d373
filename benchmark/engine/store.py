"""Content store: one folder per task key, committed by its manifest, which is written last.

A killed writer leaves only a folder under `tmp/`. The first writer of a key wins; nothing is ever overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sleeperbench.errors import BadInput

VERSION = "1"


class Damaged(Exception):
    """A payload does not match its manifest; the artifact has been set aside and must be recomputed."""

    def __init__(self, key: str, detail: str) -> None:
        super().__init__(f"artifact {key[:12]}: {detail}")
        self.key = key


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, also after a power cut."""
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise


class Store:
    """A folder of artifacts.

    Args:
        root: Created when missing.

    Raises:
        BadInput: the folder cannot be written, or holds a store of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self._verified: set[str] = set()
        try:
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
            version = self.root / "VERSION"
            if not version.exists():
                write_atomic(version, VERSION.encode())
            found = version.read_text(errors="replace").strip()
        except OSError as e:
            raise BadInput(f"cannot write the store {self.root}: {e.strerror}; give another folder with --store") from e
        if found != VERSION:
            raise BadInput(f"the store {self.root} is of version {found}, this is {VERSION}; give another --store")

    def path(self, key: str) -> Path:
        """Folder of an artifact, present or not."""
        return self.root / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether the artifact is committed."""
        return (self.path(key) / "manifest.json").is_file()

    def manifest(self, key: str) -> dict[str, Any]:
        """The manifest: key, inputs, task, files, env, result.

        Raises:
            Damaged: it cannot be read; the artifact has been set aside.
        """
        try:
            m: dict[str, Any] = json.loads((self.path(key) / "manifest.json").read_bytes())
            if m["key"] != key:
                raise ValueError("manifest of another key")
            m["files"], m["result"]
            if digest_of_manifest(m) != m["digest"]:
                raise ValueError("manifest does not match its own digest")
            return m
        except (OSError, ValueError, KeyError, TypeError) as e:
            self.discard(key)
            raise Damaged(key, f"manifest unreadable ({e})") from e

    def check(self, key: str) -> str:
        """What is wrong with an artifact, or an empty string. Reads every byte."""
        try:
            m = json.loads((self.path(key) / "manifest.json").read_bytes())
            if m["key"] != key or digest_of_manifest(m) != m["digest"]:
                return "manifest does not match its own digest"
            folder = self.path(key)
            for name, want in m["files"].items():
                file = folder / name
                if not file.is_file():
                    return f"{name} is missing"
                if file.stat().st_size != want["size"] or file_digest(file) != want["sha256"]:
                    return f"{name} does not match its digest"
        except (OSError, ValueError, KeyError, TypeError) as e:
            return f"manifest unreadable ({e})"
        return ""

    def fetch(self, key: str) -> Path:
        """The folder of an artifact whose bytes match its manifest; checked once per process.

        Raises:
            Damaged: they do not; the artifact has been set aside.
        """
        if key not in self._verified:
            problem = self.check(key)
            if problem:
                self.discard(key)
                raise Damaged(key, problem)
            self._verified.add(key)
        return self.path(key)

    def keys(self) -> Iterator[str]:
        """Keys of all committed artifacts, sorted."""
        for sub in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for folder in sorted(sub.iterdir()):
                if (folder / "manifest.json").is_file():
                    yield folder.name

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder on the store's file system, removed afterwards unless committed."""
        folder = self.root / "tmp" / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, key: str, folder: Path, *, task: Mapping[str, Any], env: Any, result: Any) -> dict[str, Any]:
        """Make `folder` the artifact of `key`; returns the manifest that stands, ours or an earlier writer's."""
        files = {}
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            _sync(file)
            files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": file_digest(file)}
        m = {"key": key, "task": task, "files": files, "env": env, "result": result}
        m["digest"] = digest_of_manifest(m)
        write_atomic(folder / "manifest.json", json.dumps(m, indent=1, sort_keys=True).encode())
        target = self.path(key)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(folder, target)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.has(key):
                return self.manifest(key)
            self.discard(key)  # a folder without manifest cannot come from us; set it aside and try once more
            os.rename(folder, target)
        _sync(target.parent)
        self._verified.add(key)
        return self.manifest(key)

    def discard(self, key: str) -> None:
        """Take an artifact out of the store, atomically."""
        self._verified.discard(key)
        aside = self.root / "tmp" / f"aside-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            os.rename(self.path(key), aside)
        shutil.rmtree(aside, ignore_errors=True)


def digest_of_manifest(m: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its `digest`."""
    body = {k: v for k, v in m.items() if k != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
