"""A small pool of long-lived worker processes: jobs of tasks, deadlines, replacement of the lost."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeperbench.engine import sandbox
from sleeperbench.engine.casefiles import make_cases, remove_cases
from sleeperbench.engine.task import Task
from sleeperbench.engine.worker import die_with_parent

GRACE = 30.0
"""Seconds beyond a task's time-out before its worker is killed; a forked child is killed at the time-out itself."""


@dataclass
class Slot:
    """One worker process and what it is doing."""

    number: int
    device: str
    process: subprocess.Popen[bytes]
    task: Task | None = None
    rest: deque[Task] = field(default_factory=deque)
    """Tasks of the same job that come after `task`."""
    started: float = 0.0
    progress: tuple[int, int, str] = (0, 0, "")
    buffer: bytes = field(default=b"", repr=False)


class Pool:
    """Runs tasks in `slots` workers.

    Args:
        store: Folder or URL of the store.
        run: Run folder, which leases name as the owner.
        verify: Check artifacts every time they are read.
        devices: One device per slot, such as `["cpu", "cpu"]`.
        threads: Threads per worker; set before torch is imported.
        memory: Bytes of data that a worker or a defense may allocate; 0 for no limit.
        level: What a defense can reach: one of `sandbox.LEVELS`.
    """

    def __init__(
        self, store: str, run: Path, devices: list[str], threads: int, memory: int, *, verify: bool, level: str
    ) -> None:
        self.level, self.cases = level, make_cases()
        self.shares = {d: 1 / devices.count(d) for d in devices}
        self.store, self.run, self.threads, self.memory, self.verify = store, run, threads, memory, verify
        self.selector = selectors.DefaultSelector()
        self.slots = [self._start(i, d) for i, d in enumerate(devices)]

    def _start(self, number: int, device: str) -> Slot:
        threads = str(self.threads)
        env = (
            sandbox.MALLOC
            | os.environ
            | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        )
        env["PYTHONHASHSEED"] = "0"  # one order of sets in every process
        index = device.partition(":")[2]
        env["CUDA_VISIBLE_DEVICES"] = (
            index if device.startswith("cuda") and index else env.get("CUDA_VISIBLE_DEVICES", "")
        )
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        elif not index:
            env.pop("CUDA_VISIBLE_DEVICES")
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        process = subprocess.Popen(
            [sys.executable, "-m", "sleeperbench.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        slot = Slot(number=number, device=device, process=process)
        assert process.stdin and process.stdout
        setup = {
            "store": self.store,
            "run": str(self.run.absolute()),
            "verify": self.verify,
            "threads": self.threads,
            "device": "cuda" if device.startswith("cuda") else device,
            "memory": self.memory,
            "share": self.shares[device],
            "level": self.level,
            "cases": str(self.cases),
        }
        process.stdin.write(json.dumps(setup).encode() + b"\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        self.selector.register(process.stdout, selectors.EVENT_READ, slot)
        return slot

    def free(self) -> Slot | None:
        """A slot without a task, or None."""
        return next((s for s in self.slots if s.task is None), None)

    def busy(self) -> list[Slot]:
        """Slots at work."""
        return [s for s in self.slots if s.task is not None]

    def submit(self, slot: Slot, job: Sequence[tuple[Task, Mapping[str, str], Path]], alone: bool = False) -> None:
        """Give tasks to a free slot, each with its entry points and its log.

        Args:
            slot: A free one.
            job: They are done one after the other and answered one by one.
            alone: Nothing else runs, so that they may have a device to themselves.
        """
        slot.rest = deque(task for task, _, _ in job)
        self._next(slot)
        lines = [
            json.dumps({"task": task.to_json(), "values": dict(values), "log": str(log), "alone": alone}).encode()
            for task, values, log in job
        ]
        assert slot.process.stdin
        try:
            slot.process.stdin.write(b"\n".join(lines) + b"\n")
            slot.process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker is gone; `wait` reports it lost

    @staticmethod
    def _next(slot: Slot) -> None:
        slot.task = slot.rest.popleft() if slot.rest else None
        slot.started, slot.progress = time.monotonic(), (0, 0, "")

    def wait(self, seconds: float) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Tasks that ended within so many seconds, with their answer; `lost` and `timeout` are statuses too."""
        for key, _ in self.selector.select(seconds):
            slot: Slot = key.data
            assert slot.process.stdout
            try:
                data = os.read(slot.process.stdout.fileno(), 1 << 20)
            except BlockingIOError:
                continue
            if not data:
                code = self._replace(slot)
                yield from self._lost(slot, {"status": "lost", "reason": f"raised: the worker process ended ({code})"})
                continue
            slot.buffer += data
            *lines, slot.buffer = slot.buffer.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "progress" in message:
                    slot.progress = tuple(message["progress"])
                elif "done" in message and slot.task is not None:
                    if message["status"] == "out_of_memory":
                        # What it holds in pieces it would not get back, so the next try would start from less.
                        self._replace(slot)
                        yield from self._lost(slot, message)
                        break
                    task = slot.task
                    self._next(slot)
                    yield task, message
        now = time.monotonic()
        for slot in self.busy():
            assert slot.task is not None
            if now - slot.started > slot.task.timeout + (GRACE if slot.task.role == "view" else 0.0):
                reason = f"budget: not done after {slot.task.timeout:g} s"
                self._replace(slot)
                yield from self._lost(slot, {"status": "timeout", "reason": reason})

    @staticmethod
    def _lost(slot: Slot, answer: dict[str, Any]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """The answer of the task that a lost worker had, and of those that waited behind it."""
        if slot.task is not None:
            yield slot.task, answer
        for task in slot.rest:
            yield task, {"status": "returned", "reason": ""}

    def _replace(self, slot: Slot) -> str:
        assert slot.process.stdout
        self.selector.unregister(slot.process.stdout)
        code = self._kill(slot)
        self.slots[self.slots.index(slot)] = self._start(slot.number, slot.device)
        return code

    def _kill(self, slot: Slot) -> str:
        try:
            os.killpg(slot.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # gone, or so new that it leads no group yet
            slot.process.kill()
        code = slot.process.wait()
        for pipe in (slot.process.stdin, slot.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End all workers."""
        for slot in self.slots:
            self._kill(slot)
        self.selector.close()
        remove_cases(self.cases)
