"""The lock of a run folder: one run at a time, and the second one learns who holds it."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from sleeperbench.errors import BadInput


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`; the kernel lets go of it when the process ends, however it ends.

    Raises:
        BadInput: the folder cannot be written, is full, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / ".lock", "a+")  # noqa: SIM115 - held until the end of the run
    except OSError as e:
        raise BadInput(f"cannot write the run folder {folder}: {e.strerror}; give another one with --out") from e
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise BadInput(f"cannot lock {folder}: {e.strerror}; give a folder on another file system") from e
            f.seek(0)
            try:
                held = json.loads(f.read())
                who = f"pid {held['pid']} on {held['host']} since {held['since']}"
            except (ValueError, KeyError, TypeError):
                who = "another run"
            raise BadInput(f"{folder} is locked by {who}; wait for it, or give another --out") from None
        f.seek(0)
        f.truncate()
        since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        try:
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, f)
            f.flush()
        except OSError as e:
            raise BadInput(f"cannot write to the run folder {folder}: {e.strerror}; free some space") from e
        yield
