"""The folders that defenses get, and what they left there: looked at before it is read.

Imports nothing but the standard library: the controller uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

JSON_BYTES = 16 << 20
"""Largest JSON file of an answer."""
STALE_SECONDS = 86400.0
"""Age after which the folder of a run that was killed is swept away."""
_PREFIX = "sleeperbench-"


class Unusable(Exception):
    """An answer that is not read: too large, or not made of plain files."""


def make_cases() -> Path:
    """A new folder for the cases of one run, below the system's temporary folder.

    It can be entered and not listed, so that a defense that looks around does not come upon another one's case.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    folder.chmod(0o300)
    return folder


def renew_cases(folder: Path) -> None:
    """Make the folder of `make_cases` anew if something that tidies temporary folders took it during a long run.

    Raises:
        PermissionError: somebody else owns what lies there now.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o300)
    about = folder.lstat()
    if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode):
        raise PermissionError(f"{folder} was taken by another user: start the run again, and see who may write there")


def remove_cases(folder: Path) -> None:
    """Remove the folder of `make_cases` with what is left in it."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    remove(folder)


def remove(folder: Path) -> None:
    """Remove a tree, also folders in it that were made unreadable."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir():
        os.chmod(folder, 0o700)
        for root, names, _ in os.walk(folder):
            for path in (os.path.join(root, n) for n in names):
                if not os.path.islink(path):  # chmod would change what it points to
                    os.chmod(path, 0o700)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove folders of runs that were killed: their process is gone and they are old."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
            pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
            about = folder.lstat()
            old = time.time() - about.st_mtime > STALE_SECONDS
            mine = about.st_uid == os.getuid() and stat.S_ISDIR(about.st_mode)
            if old and mine and pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                remove_cases(folder)


def read_plain(path: Path, limit: int = JSON_BYTES) -> bytes | None:
    """The bytes of a file that a defense may have written; None when it is missing.

    Raises:
        Unusable: it is a link, a pipe or larger than `limit`.
    """
    try:
        # Neither follows a link nor waits for the other end of a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise Unusable(f"raised: {path.name} is not a plain file ({e.strerror})") from e
    with os.fdopen(fd, "rb") as f:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise Unusable(f"raised: {path.name} is not a plain file")
        if about.st_size > limit:
            raise Unusable(f"budget: {path.name} has {about.st_size} bytes, {limit} are allowed")
        return f.read(limit)


def check_answer(folder: Path, limit: int) -> None:
    """Look at all files of an answer before any is opened.

    Raises:
        Unusable: something is neither a plain file nor a folder, or all together exceed `limit` bytes.
    """
    total, todo = 0, [folder]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(about.st_mode):
                    todo.append(Path(entry.path))
                    continue
                if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
                    raise Unusable(f"raised: the answer's {entry.name} is not a plain file")
                if entry.name.endswith(".json") and about.st_size > JSON_BYTES:
                    raise Unusable(
                        f"budget: the answer's {entry.name} has {about.st_size} bytes, {JSON_BYTES} are allowed"
                    )
                total += about.st_size
    if total > limit:
        raise Unusable(f"budget: the answer has {total} bytes, {limit} are allowed")


def answer_bytes(memory: int) -> int:
    """Bytes of a whole answer under a memory limit: what is larger could not be read back."""
    return memory or 4 << 30


def read_progress(path: Path) -> tuple[int, int, str] | None:
    """What a running defense reported last."""
    with contextlib.suppress(Unusable, ValueError, TypeError):
        done, total, what = json.loads(read_plain(path, 1000) or b"null")
        return int(done), int(total), str(what)
    return None
