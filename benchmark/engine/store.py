"""Content store: one folder per task key, committed by its manifest, which is written last.

A killed writer leaves only a folder under `tmp/`. The first writer of a key wins; nothing is ever overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sleeperbench.engine.lease import LeaseFolder, LeasePlace
from sleeperbench.engine.manifest import digest_of_manifest, dump_manifest, file_digest, parse_manifest, problem_in
from sleeperbench.errors import BadInput

VERSION = "1"


class Damaged(Exception):
    """An artifact is gone or does not match its manifest; it has been taken out and must be computed again."""

    def __init__(self, key: str, detail: str) -> None:
        super().__init__(f"artifact {key[:12]}: {detail}")
        self.key = key


class NoStore(BadInput):
    """There is no store at the place that was named."""


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file so that a reader sees the old or the new content, with `sync` also after a power cut."""
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            if sync:
                f.flush()
                os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise


class Store:
    """A folder of artifacts, or an fsspec URL and the folder that caches it on this machine.

    Args:
        where: A folder, created when missing, or a URL such as `s3://bucket/store`.
        verify: Check an artifact every time it is fetched, not once per process.
        create: Make a new store where there is none.

    Raises:
        NoStore: there is none, and none may be made.
        BadInput: it cannot be written, or is of another version.
    """

    def __init__(self, where: Path | str, *, verify: bool = False, create: bool = True) -> None:
        self.where, self.verify = str(where), verify
        self.remote = None
        if "://" in self.where:
            from sleeperbench.engine.remote import Remote

            self.remote = Remote(self.where, VERSION, create=create)
            where, create = self.remote.cache, True
        self.root = Path(where).absolute()
        self.leases: LeasePlace = self.remote or LeaseFolder(self.root / "leases")
        self._verified: set[str] = set()
        version = self.root / "VERSION"
        if not create and not version.is_file():
            raise NoStore(f"there is no store at {self.root}; name one with --store")
        try:
            if not version.exists():
                self.root.mkdir(parents=True, exist_ok=True)
                write_atomic(version, VERSION.encode())
            found = version.read_text(errors="replace").strip()
        except OSError as e:
            raise self.unwritable(e) from e
        if found != VERSION:
            raise BadInput(f"the store {self.root} is of version {found}, this is {VERSION}; give another --store")

    def unwritable(self, e: OSError) -> BadInput:
        """The error that a user reads when the store cannot be written."""
        return BadInput(
            f"cannot write the store {self.where}: {e.strerror or e}; mend that, or give another folder with --store"
        )

    def probe(self) -> None:
        """Write and remove a file.

        Raises:
            BadInput: the store is full, read-only or somebody else's.
        """
        try:
            with self.scratch() as folder:
                (folder / "probe").write_bytes(b"probe")
        except OSError as e:
            raise self.unwritable(e) from e

    def path(self, key: str) -> Path:
        """Folder of an artifact on this machine, present or not."""
        return self.root / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether the artifact is committed."""
        if self.remote:
            return self.remote.read(key) is not None
        return (self.path(key) / "manifest.json").is_file()

    def manifest(self, key: str) -> dict[str, Any]:
        """The manifest: key, inputs, task, files, env, result.

        Raises:
            Damaged: it cannot be read; the artifact has been taken out.
        """
        if self.remote:
            data = self.remote.read(key)
            if data is None:
                raise Damaged(key, "it is missing")
            return parse_manifest(data, key)
        try:
            return parse_manifest((self.path(key) / "manifest.json").read_bytes(), key)
        except (OSError, ValueError) as e:
            self.discard_damaged(key)
            raise Damaged(key, str(e)) from e

    def check(self, key: str) -> str:
        """What is wrong with an artifact, or an empty string. Reads every byte."""
        if not self.remote:
            return problem_in(self.path(key), key)
        with self.scratch() as folder:
            self.remote.download(key, folder)
            return problem_in(folder, key)

    def fetch(self, key: str) -> Path:
        """The folder of an artifact whose bytes match its manifest; checked once per process unless `verify`.

        Raises:
            Damaged: they do not; the artifact has been taken out.
        """
        path = self.path(key)
        if key in self._verified and not self.verify and (path / "manifest.json").is_file():
            return path
        if self.remote:
            self._cache(key)
        elif problem := problem_in(path, key):
            self.discard_damaged(key)
            raise Damaged(key, problem)
        self._verified.add(key)
        return path

    def _cache(self, key: str) -> None:
        """Bring an artifact of the remote store onto this machine unless the same one is here intact."""
        assert self.remote
        manifest = self.path(key) / "manifest.json"
        same = manifest.is_file() and manifest.read_bytes() == self.remote.read(key)
        if same and not problem_in(self.path(key), key):
            return
        with self.scratch() as folder:
            self.remote.download(key, folder)
            if problem := problem_in(folder, key):
                self.discard(key)
                raise Damaged(key, problem)
            self._remove(key)
            self._place(key, folder)

    def keys(self) -> Iterator[str]:
        """Keys of all committed artifacts, sorted."""
        if self.remote:
            yield from self.remote.keys()
            return
        for sub in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for folder in sorted(sub.iterdir()):
                if (folder / "manifest.json").is_file():
                    yield folder.name

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder on the store's file system, removed afterwards unless committed."""
        folder = self.root / "tmp" / uuid.uuid4().hex
        folder.mkdir(parents=True)
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
        write_atomic(folder / "manifest.json", dump_manifest(m))
        self.adopt(key, folder)
        return self.manifest(key)

    def adopt(self, key: str, folder: Path) -> bool:
        """Take in a folder that has its manifest; False when another writer was first."""
        for place in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
            _sync(place)
        if self.remote:
            if not self.remote.push(key, folder):
                return False
            self._remove(key)
        if self._place(key, folder):
            self._verified.add(key)
            return True
        return False

    def _place(self, key: str, folder: Path) -> bool:
        target = self.path(key)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(folder, target)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (target / "manifest.json").is_file():
                return False
            self._remove(key)  # a folder without manifest cannot come from us; take it out and try once more
            os.rename(folder, target)
        _sync(target.parent)
        return True

    def discard(self, key: str) -> None:
        """Take an artifact out of the store, atomically."""
        if self.remote:
            self.remote.discard(key)
        self._remove(key)

    def discard_damaged(self, key: str) -> None:
        """Take a damaged artifact out, but not the good one that another process put in its place meanwhile."""
        if self.remote:
            self.discard(key)
        else:
            self._remove(key, only_damaged=True)

    def _remove(self, key: str, *, only_damaged: bool = False) -> None:
        self._verified.discard(key)
        aside = self.root / "tmp" / f"aside-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            aside.parent.mkdir(exist_ok=True)
            os.rename(self.path(key), aside)
            if only_damaged and not problem_in(aside, key):
                os.rename(aside, self.path(key))
        shutil.rmtree(aside, ignore_errors=True)
