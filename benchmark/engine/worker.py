"""A trusted worker: lives on between tasks, keeps data sets open, hands every defense to a forked child.

Line JSON on standard input: {"task", "values", "log"} per task; line JSON back: {"ready"}, {"progress"} and, once per
task, {"done", "status", "reason", "result"}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PROGRESS_SECONDS = 0.5


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no worker outlives a killed run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class ForkServer:
    """The worker's end of a fork server: started when the first defense comes, replaced when it dies."""

    def __init__(self, memory: int, cuda: bool) -> None:
        self.memory, self.cuda = memory, cuda
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, folder: Path, log: Path, seconds: float) -> dict[str, Any]:
        """Run `child.main` on `folder` in a forked child; returns how it ended and what it used."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sleeperbench.engine.forkserver"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                preexec_fn=die_with_parent,
            )
        assert self.process.stdin and self.process.stdout
        job = {"folder": str(folder), "log": str(log), "seconds": seconds, "memory": self.memory, "cuda": self.cuda}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return {"timeout": False, "signal": 0, "code": -1, "cpu_seconds": 0.0, "peak_mb": 0.0}
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """Serve tasks until standard input closes."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.buffer.readline())
    import torch

    from sleeperbench.engine.loading import be_deterministic
    from sleeperbench.engine.store import Store
    from sleeperbench.engine.task import Task
    from sleeperbench.engine.work import Work

    torch.set_num_threads(setup["threads"])
    be_deterministic(setup["device"])
    if setup["memory"] and setup["device"] == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (setup["memory"], setup["memory"]))
    fork = ForkServer(setup["memory"], setup["device"] != "cpu")
    work = Work(Store(Path(setup["store"])), torch.device(setup["device"]), fork)

    def say(**message: Any) -> None:
        answers.write(json.dumps(message).encode() + b"\n")

    last = 0.0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            say(progress=[done, total, what])

    work.progress = progress
    say(ready=os.getpid())
    for line in sys.stdin.buffer:
        job = json.loads(line)
        task = Task.from_json(job["task"])
        say(**_one(work, task, job))


def _one(work: Any, task: Any, job: dict[str, Any]) -> dict[str, Any]:
    from sleeperbench.engine.child import describe
    from sleeperbench.engine.store import Damaged
    from sleeperbench.engine.work import Failed

    log = Path(job["log"])
    saved = os.dup(1), os.dup(2)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    base = {"done": task.key, "result": None}
    try:
        return base | {"status": "ok", "reason": "", "result": work.run(task, job["values"], log)}
    except Failed as e:
        return base | {"status": e.status, "reason": e.reason}
    except Damaged as e:
        return base | {"status": "damaged", "reason": str(e), "key": e.key}
    except OSError as e:
        traceback.print_exc()
        if e.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            return base | {"status": "no_space", "reason": f"{e.strerror}: {e.filename or ''}"}
        return base | describe(e)
    except Exception as e:
        traceback.print_exc()
        return base | describe(e)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])


if __name__ == "__main__":
    main()
