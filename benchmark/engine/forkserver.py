"""A warm process that has imported torch and nothing else of substance, and forks one child per defense.

Line JSON on standard input: {"folder", "log", "seconds", "memory"}; one line of JSON back: exit code, signal, time-out,
processor seconds and peak memory of the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

_KEEP = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


def main() -> None:
    """Serve until standard input closes."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        os.write(answers, json.dumps(_run(json.loads(line))).encode() + b"\n")


def _run(job: dict[str, Any]) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        try:
            _child(job)
        finally:
            os._exit(1)
    fd = os.pidfd_open(pid)
    ready, _, _ = select.select([fd], [], [], job["seconds"])
    os.close(fd)
    _kill_group(pid)  # on a time-out the child itself, else whatever it left running
    _, status, usage = os.wait4(pid, 0)
    _kill_group(pid)
    return {
        "timeout": not ready,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _child(job: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    folder = Path(job["folder"])
    scratch = folder / "scratch"
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, 4096)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(scratch)
    kept = {k: os.environ[k] for k in _KEEP if k in os.environ}
    os.environ.clear()
    os.environ.update(kept | {"HOME": str(scratch), "TMPDIR": str(scratch)})
    # RLIMIT_DATA and not RLIMIT_AS: torch reserves far more address space than it touches.
    if job["memory"] and not job.get("cuda"):
        limit = int(job["memory"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from sleeperbench.engine import child

    child.main(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
