"""A trusted worker: lives on between tasks, keeps data sets open, hands every defense to a forked child.

Line JSON on standard input: {"task", "values", "log"} per task; line JSON back: {"ready"}, {"progress"} and, once per
task, {"done", "status", "reason", "result"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sleeperbench.engine import sandbox
from sleeperbench.engine.casefiles import answer_bytes, read_progress, renew_cases

PROGRESS_SECONDS = 0.5
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no worker outlives a killed run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_private() -> None:
    """Keep processes of the same user out of this one's memory, environment and descriptors; root gets in."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


class Lost(Exception):
    """The fork server ended, which says nothing about the defense it was running."""


class ForkServer:
    """The worker's end of a fork server: started when the first defense comes, replaced when it dies.

    Args:
        level: `process` or `bwrap`.
        memory: Bytes of data that a child on the CPU may allocate; 0 for no limit.
        cuda: Whether children work on an NVIDIA device.
        share: Share of the device's memory that a child may take.
        hidden: Folders that no child may come upon.
    """

    def __init__(self, level: str, *, memory: int, cuda: bool, share: float, hidden: Sequence[Path]) -> None:
        self.level, self.memory, self.cuda, self.share, self.hidden = level, memory, cuda, share, hidden
        self.progress: Callable[[int, int, str], None] = lambda done, total, what: None
        self.process: subprocess.Popen[bytes] | None = None
        # Kept from before any task: later, descriptor 2 is the log of one.
        self.errors = os.dup(2)
        self.code = sandbox.code_folders() if level == "bwrap" else []

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "sleeperbench.engine.forkserver", self.level],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            preexec_fn=die_with_parent,
            env=sandbox.environment(),
            cwd="/",
        )

    def __call__(self, folder: Path, log: Path, seconds: float) -> dict[str, Any]:
        """Run `child.main` on `folder` in a process of its own; returns how it ended and what it used.

        Raises:
            Lost: the fork server died.
        """
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin and self.process.stdout
        command = None
        if self.level == "bwrap":
            hidden = [*self.hidden, folder.parent]
            command = sandbox.command(folder, code=self.code, hidden=hidden, cuda=self.cuda, share=self.share)
        job = {"folder": str(folder), "seconds": seconds, "memory": self.memory, "cuda": self.cuda}
        job |= {"share": self.share, "file_bytes": answer_bytes(self.memory) // 2, "command": command}
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        while not select.select([self.process.stdout], [], [], PROGRESS_SECONDS)[0]:
            if told := read_progress(folder / "progress"):
                self.progress(*told)
        line = self.process.stdout.readline()
        # The child writes beside its case, so that it never learns where a run keeps its logs.
        written = Path(f"{folder}.log")
        with contextlib.suppress(FileNotFoundError), log.open("ab") as f:
            f.write(written.read_bytes())
            written.unlink()
        if not line:
            raise Lost("raised: the fork server ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """Serve tasks until standard input closes."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.buffer.readline())
    keep_private()
    import torch

    from sleeperbench.engine.loading import be_deterministic
    from sleeperbench.engine.store import Store
    from sleeperbench.engine.task import Task
    from sleeperbench.engine.work import Work

    torch.set_num_threads(setup["threads"])
    be_deterministic(setup["device"])
    if setup["memory"] and setup["device"] == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (setup["memory"], setup["memory"]))
    cuda = setup["device"] != "cpu"
    store = Store(setup["store"], verify=setup["verify"])
    fork = ForkServer(
        setup["level"],
        memory=setup["memory"],
        cuda=cuda,
        share=setup["share"],
        hidden=[store.root, Path(setup["run"])],
    )
    work = Work(store, torch.device(setup["device"]), fork)
    work.leases.run = setup["run"]
    work.cases, work.memory = Path(setup["cases"]), setup["memory"]

    def say(**message: Any) -> None:
        answers.write(json.dumps(message).encode() + b"\n")

    last = 0.0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            say(progress=[done, total, what])

    work.progress = fork.progress = progress
    say(ready=os.getpid())
    for line in sys.stdin.buffer:
        job = json.loads(line)
        task = Task.from_json(job["task"])
        if cuda:
            fork.share = 1.0 if job["alone"] else setup["share"]
            torch.cuda.set_per_process_memory_fraction(fork.share)
        say(**_one(work, task, job))


def _one(work: Any, task: Any, job: dict[str, Any]) -> dict[str, Any]:
    from sleeperbench.engine.child import describe
    from sleeperbench.engine.outcomes import Failed
    from sleeperbench.engine.store import Damaged
    from sleeperbench.engine.work import Leased

    log = Path(job["log"])
    saved = os.dup(1), os.dup(2)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    base = {"done": task.key, "result": None}
    try:
        renew_cases(work.cases)
        result, computed = work.run(task, job["values"], log)
        return base | {"status": "ok", "reason": "", "result": result, "computed": computed}
    except Leased:
        return base | {"status": "leased", "reason": "another run computes it"}
    except Lost as e:
        return base | {"status": "lost", "reason": str(e)}
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
