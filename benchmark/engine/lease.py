"""Leases: who is computing a task now, so that runs on one store share the work.

An optimisation only: a lost or stolen lease costs double work, never a wrong artifact, because the store's first writer
wins. A lease is a small file, created exclusively, renewed while its owner lives and removed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

BEAT = 10.0
"""Seconds between two renewals."""
MISSED = 3
"""Beats after which a lease that was not renewed may be taken."""


class LeasePlace(Protocol):
    """Where leases lie: a folder, or the remote store."""

    def create_lease(self, key: str, data: bytes) -> bool:
        """Write a lease unless there is one; whether this did."""

    def read_lease(self, key: str) -> bytes | None:
        """The lease's content, or None."""

    def renew_lease(self, key: str, data: bytes) -> None:
        """Make a lease young again."""

    def lease_age(self, key: str) -> float:
        """Seconds since it was renewed; 0 when it is gone."""

    def drop_lease(self, key: str, data: bytes) -> None:
        """Remove the lease if this is still its content."""

    def lease_keys(self) -> list[str]:
        """Keys that have a lease."""


class LeaseFolder:
    """Leases as files of a folder, renewed by their modification time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_lease(self, key: str, data: bytes) -> bool:
        """Write a lease unless there is one; whether this did."""
        self.folder.mkdir(exist_ok=True)
        try:
            fd = os.open(self.folder / key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        return True

    def read_lease(self, key: str) -> bytes | None:
        """The lease's content, or None."""
        try:
            return (self.folder / key).read_bytes()
        except OSError:
            return None

    def renew_lease(self, key: str, data: bytes) -> None:
        """Make a lease young again."""
        os.utime(self.folder / key)

    def lease_age(self, key: str) -> float:
        """Seconds since it was renewed; 0 when it is gone."""
        try:
            return time.time() - (self.folder / key).stat().st_mtime
        except OSError:
            return 0.0

    def drop_lease(self, key: str, data: bytes) -> None:
        """Remove the lease if this is still its content."""
        aside = self.folder / f".{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            # Renamed before it is read: of two that find it stale, one takes it and the other leaves the new one alone.
            os.rename(self.folder / key, aside)
            if aside.read_bytes() != data:
                os.link(aside, self.folder / key)
        with contextlib.suppress(OSError):
            os.unlink(aside)

    def lease_keys(self) -> list[str]:
        """Keys that have a lease."""
        return sorted(p.name for p in self.folder.glob("[0-9a-f]*"))


class Leases:
    """Takes leases for one process.

    Args:
        place: Where they lie.
    """

    def __init__(self, place: LeasePlace) -> None:
        self.place = place
        self.run = ""  # what a person reads as the owner: the run folder

    @contextlib.contextmanager
    def hold(self, key: str) -> Iterator[bool]:
        """Hold the lease of a key, renewed by a thread; gives False when another living process has it."""
        data = json.dumps(identity() | {"run": self.run, "token": uuid.uuid4().hex}).encode()
        if not self._take(key, data):
            yield False
            return
        stop = threading.Event()
        beats = threading.Thread(target=self._renew, args=(key, data, stop), name=f"lease {key[:12]}", daemon=True)
        beats.start()
        try:
            yield True
        finally:
            stop.set()
            beats.join()
            self.place.drop_lease(key, data)

    def _take(self, key: str, data: bytes) -> bool:
        for _ in range(3):
            if self.place.create_lease(key, data):
                return True
            seen = self.place.read_lease(key)
            if seen is not None and not stale(self.place, key, seen):
                return False
            if seen is not None:
                self.place.drop_lease(key, seen)
        return False

    def _renew(self, key: str, data: bytes, stop: threading.Event) -> None:
        while not stop.wait(BEAT):
            with contextlib.suppress(OSError):
                if self.place.read_lease(key) != data:
                    return  # taken by another, who thought this process dead
                self.place.renew_lease(key, data)


def stale(place: LeasePlace, key: str, data: bytes) -> bool:
    """Whether nobody renews a lease any more: three beats missed, or its owner on this host is dead."""
    if place.lease_age(key) > MISSED * BEAT:
        return True
    try:
        owner = json.loads(data)
        same = all(owner[k] == v for k, v in _host().items())
        return bool(same and _host()["boot"] and _start(owner["pid"]) != owner["start"])
    except (ValueError, KeyError, TypeError):
        return False


def clear(place: LeasePlace) -> int:
    """Drop the leases of the dead and say how many: who is killed just after a commit leaves one behind."""
    dropped = 0
    for key in place.lease_keys():
        seen = place.read_lease(key)
        if seen is not None and stale(place, key, seen):
            place.drop_lease(key, seen)
            dropped += 1
    return dropped


def identity() -> dict[str, Any]:
    """The calling process as leases name it; the start time tells it from a later one of the same number."""
    return _host() | {"pid": os.getpid(), "start": _start(os.getpid())}


@functools.cache
def _host() -> dict[str, str]:
    """What must be equal before a process number says anything: host, boot, process namespace."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _start(pid: int) -> str:
    """Start time of a living process in clock ticks since boot; empty when it is dead or cannot be seen."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
