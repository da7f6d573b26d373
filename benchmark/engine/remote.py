"""A store at an fsspec URL: artifacts are downloaded to a cache folder, and committed by uploading the manifest last.

Its layout is that of a local store. A half uploaded artifact has no manifest and does not count. Two writers of one key
at a time, of which one lost its lease, may mix their files; the digests show it, and the artifact is computed again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleeperbench.data.roots import cache_folder
from sleeperbench.engine.manifest import parse_manifest
from sleeperbench.errors import BadInput


class Remote:
    """The file system behind a URL, as the store needs it.

    Args:
        url: `protocol://path`, of any protocol whose driver is installed.
        version: Store version that is wanted.
        create: Make a new store where there is none.

    Raises:
        BadInput: fsspec or the protocol's driver is missing, the place cannot be reached, or it is of another version.
    """

    def __init__(self, url: str, version: str, *, create: bool) -> None:
        try:
            import fsspec.core
        except ImportError as e:
            raise BadInput(f"the store {url} needs fsspec: pip install 'sleeperbench[remote]'") from e
        self.url = url
        self.cache: Path = cache_folder() / "stores" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        try:
            # Listings must not be remembered: other machines write to this store.
            self.fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
            self.root = root.rstrip("/")
            found = self._get("VERSION")
            if found is None and create:
                self._put("VERSION", version.encode())
                found = self._get("VERSION")
        except (ImportError, ValueError) as e:
            raise BadInput(f"cannot open the store {url}: {e}; install the driver of its protocol") from e
        except Exception as e:  # drivers raise errors of their own kinds
            raise BadInput(
                f"cannot reach the store {url}: {type(e).__name__}: {e}; mend that, or give another --store"
            ) from e
        if found is None:
            from sleeperbench.engine.store import NoStore

            raise NoStore(f"there is no store at {url}; name one with --store")
        if found.decode(errors="replace").strip() != version:
            raise BadInput(f"the store {url} is not of version {version}; give another --store")

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _get(self, name: str) -> bytes | None:
        try:
            data: bytes = self.fs.cat_file(self._at(name))
            return data
        except FileNotFoundError:
            return None

    def _put(self, name: str, data: bytes) -> None:
        self.fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(self._at(name), data)

    def _create(self, name: str, data: bytes) -> bool:
        """Write a file unless it is there; as exclusive as the file system can be."""
        self.fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        try:
            try:
                with self.fs.open(self._at(name), "xb") as f:
                    f.write(data)
            except (NotImplementedError, ValueError):  # a driver without exclusive opening
                self.fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def _drop(self, name: str, *, recursive: bool = False) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self._at(name), recursive=recursive)

    # ---- artifacts -------------------------------------------------------------------------------------------------
    def read(self, key: str) -> bytes | None:
        """The manifest's bytes, or None when there is none or it is torn."""
        data = self._get(f"{key[:2]}/{key}/manifest.json")
        try:
            return data if data is not None and parse_manifest(data, key) else None
        except ValueError:
            return None

    def download(self, key: str, folder: Path) -> None:
        """Copy the files that the manifest names, and the manifest, into a folder; what is missing stays missing."""
        data = self.read(key)
        if data is None:
            return
        for name in parse_manifest(data, key)["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.fs.get_file(self._at(f"{key[:2]}/{key}/{name}"), str(folder / name))
        (folder / "manifest.json").write_bytes(data)

    def push(self, key: str, folder: Path) -> bool:
        """Upload an artifact, its manifest last; False when another writer was first."""
        if self.read(key) is not None:
            return False
        base = f"{key[:2]}/{key}"
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json"):
            target = self._at(f"{base}/{file.relative_to(folder).as_posix()}")
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(file), target)
        data = (folder / "manifest.json").read_bytes()
        if not self._create(f"{base}/manifest.json", data):
            if self.read(key) is not None:
                return False
            self._put(f"{base}/manifest.json", data)  # a torn one of a killed writer
        return True

    def discard(self, key: str) -> None:
        """Remove an artifact, its manifest first."""
        self._drop(f"{key[:2]}/{key}/manifest.json")
        self._drop(f"{key[:2]}/{key}", recursive=True)

    def keys(self) -> Iterator[str]:
        """Keys of everything that has a manifest, sorted."""
        for path in sorted(self.fs.find(self.root)):
            parts = path.removeprefix(self.root).strip("/").split("/")
            if len(parts) == 3 and parts[2] == "manifest.json" and parts[1].startswith(parts[0]):
                yield parts[1]

    # ---- leases ----------------------------------------------------------------------------------------------------
    def create_lease(self, key: str, data: bytes) -> bool:
        """Write a lease unless there is one; whether this did."""
        return self._create(f"leases/{key}", data)

    def read_lease(self, key: str) -> bytes | None:
        """The lease's content, or None."""
        return self._get(f"leases/{key}")

    def renew_lease(self, key: str, data: bytes) -> None:
        """Make a lease young again."""
        self._put(f"leases/{key}", data)

    def lease_age(self, key: str) -> float:
        """Seconds since it was renewed, by this machine's clock; 0 when it is gone or the driver cannot tell."""
        try:
            when: Any = self.fs.modified(self._at(f"leases/{key}"))
        except (FileNotFoundError, NotImplementedError):
            return 0.0
        when = when if when.tzinfo else when.replace(tzinfo=dt.UTC)
        return float((dt.datetime.now(dt.UTC) - when).total_seconds())

    def drop_lease(self, key: str, data: bytes) -> None:
        """Remove the lease if this is still its content."""
        if self.read_lease(key) == data:
            self._drop(f"leases/{key}")

    def lease_keys(self) -> list[str]:
        """Keys that have a lease."""
        try:
            return sorted(p.rpartition("/")[2] for p in self.fs.find(self._at("leases")))
        except FileNotFoundError:
            return []
