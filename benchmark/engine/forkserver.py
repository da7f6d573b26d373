"""A warm process that has imported torch and nothing else of substance, and forks one child per defense.

Line JSON on standard input: {"folder", "seconds", "memory", "cuda", "share", "file_bytes", "command"}; one line of JSON
back: exit code, signal, time-out, processor seconds and peak memory of the child. What the child prints comes through a
pipe into `<folder>.log`, of which the middle is left out beyond `LOG_BYTES`. With a `command` (level `bwrap`) the child
becomes that command, and torch is never imported here.

It is started with an environment, a working folder and arguments that name no run, store or attack: all of them are
the child's own, for `/proc/self` and `/proc/<parent>` show them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from sleeperbench.engine.sandbox import drop_capabilities

LOG_BYTES = 1 << 20
"""Bytes of a child's output that are kept: one half from its beginning, one from its end."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Serve until standard input closes; the argument is the level."""
    if sys.argv[1:] == ["process"]:
        import torch
        import torch._dynamo  # the first optimiser imports it, which takes longer than many a defense

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if sys.path[0] == os.getcwd():  # `-m` put it there; it is no place to import from
        del sys.path[0]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        os.write(answers, json.dumps(_run(json.loads(line))).encode() + b"\n")


class _Log:
    """A file that takes the beginning and the end of what is written."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.room, self.cut, self.end = LOG_BYTES // 2, 0, b""

    def write(self, data: bytes) -> None:
        os.write(self.fd, data[: self.room])
        kept = self.end + data[self.room :]
        self.room -= min(self.room, len(data))
        self.end = kept[-LOG_BYTES // 2 :]
        self.cut += len(kept) - len(self.end)

    def close(self) -> None:
        if self.cut:
            os.write(self.fd, f"\n... {self.cut} bytes left out ...\n".encode())
        os.write(self.fd, self.end)
        os.close(self.fd)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    output, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _child(job, theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(theirs)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    log = _Log(job["folder"] + ".log")
    timeout = _watch(pid, output, log, job["seconds"])
    _kill(pid)  # on a time-out the child itself, else whatever it left running
    _, status, usage = os.wait4(pid, 0)
    usages = [usage, *_kill_orphans()]
    _drain(output, log)
    log.close()
    os.close(output)
    return {
        "timeout": timeout,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
        "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in usages),
        "peak_mb": max(u.ru_maxrss for u in usages) / 1024,
    }


def _watch(pid: int, output: int, log: _Log, seconds: float) -> bool:
    """Read what the child prints until it ends; whether its time was up first."""
    os.set_blocking(output, False)
    ended = os.pidfd_open(pid)
    deadline = time.monotonic() + seconds
    waiting = [ended, output]
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(waiting, [], [], left)
            if ended in ready:
                return False
            if output in ready and not _drain(output, log, chunks=16):
                waiting.remove(output)  # closed by the child, which goes on
        return True
    finally:
        os.close(ended)


def _drain(output: int, log: _Log, chunks: int = 1024) -> bool:
    """Read what is there, at most so many chunks; False at the end of the pipe."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(chunks):
            data = os.read(output, 1 << 16)
            if not data:
                return False
            log.write(data)
    return True


def _kill(pid: int) -> None:
    """End a process and its group; it has not been waited for, so the number is still its own."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _kill_orphans() -> list[resource.struct_rusage]:
    """End what the child left in other groups and sessions, for a subreaper inherits it; returns what it used.

    Bubblewrap leaves the process that did the work, so without this its cost would be missing.
    """
    usages: list[resource.struct_rusage] = []
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        pids = []
        with contextlib.suppress(OSError):
            pids = [int(p) for p in children.read_text().split()]
        for pid in pids:
            _kill(pid)
        try:
            found, _, usage = os.wait4(-1, 0 if pids else os.WNOHANG)
        except ChildProcessError:
            return usages
        if not found:
            return usages
        usages.append(usage)


def _child(job: dict[str, Any], output: int) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    folder = Path(job["folder"])
    scratch = folder / "scratch"
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(scratch)
    _limit(job)
    if job["command"]:
        os.execv(job["command"][0], job["command"])
    os.environ |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
    tempfile.tempdir = None  # whoever asked before has fixed the system's
    drop_capabilities()
    from sleeperbench.engine import child

    child.main(folder, job["share"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _limit(job: dict[str, Any]) -> None:
    # RLIMIT_DATA and not RLIMIT_AS: torch reserves far more address space than it touches.
    if job["memory"] and not job["cuda"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
