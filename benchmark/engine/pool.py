"""A small pool of long-lived worker processes: one task each at a time, deadlines, replacement of the lost."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    started: float = 0.0
    progress: tuple[int, int, str] = (0, 0, "")
    buffer: bytes = field(default=b"", repr=False)


class Pool:
    """Runs tasks in `slots` workers.

    Args:
        store: Folder of the store.
        devices: One device per slot, such as `["cpu", "cpu"]`.
        threads: Threads per worker; set before torch is imported.
        memory: Bytes of data that a worker or a defense may allocate; 0 for no limit.
    """

    def __init__(self, store: Path, devices: list[str], threads: int, memory: int) -> None:
        self.store, self.threads, self.memory = store, threads, memory
        self.selector = selectors.DefaultSelector()
        self.slots = [self._start(i, d) for i, d in enumerate(devices)]

    def _start(self, number: int, device: str) -> Slot:
        threads = str(self.threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
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
            "store": str(self.store),
            "threads": self.threads,
            "device": "cuda" if device.startswith("cuda") else device,
            "memory": self.memory,
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

    def submit(self, slot: Slot, task: Task, values: Mapping[str, str], log: Path) -> None:
        """Give a task to a free slot."""
        slot.task, slot.started, slot.progress = task, time.monotonic(), (0, 0, "")
        assert slot.process.stdin
        try:
            slot.process.stdin.write(
                json.dumps({"task": task.to_json(), "values": dict(values), "log": str(log)}).encode() + b"\n"
            )
            slot.process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker is gone; `wait` reports it lost

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
                task = slot.task
                code = self._replace(slot)
                if task is not None:
                    yield task, {"status": "lost", "reason": f"raised: the worker process ended ({code})"}
                continue
            slot.buffer += data
            *lines, slot.buffer = slot.buffer.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "progress" in message:
                    slot.progress = tuple(message["progress"])
                elif "done" in message and slot.task is not None:
                    task, slot.task = slot.task, None
                    yield task, message
        now = time.monotonic()
        for slot in self.busy():
            assert slot.task is not None
            if now - slot.started > slot.task.timeout + (GRACE if slot.task.role == "view" else 0.0):
                task = slot.task
                self._replace(slot)
                yield task, {"status": "timeout", "reason": f"budget: not done after {task.timeout:g} s"}

    def _replace(self, slot: Slot) -> str:
        assert slot.process.stdout
        self.selector.unregister(slot.process.stdout)
        code = self._kill(slot)
        self.slots[self.slots.index(slot)] = self._start(slot.number, slot.device)
        return code

    def _kill(self, slot: Slot) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(slot.process.pid, signal.SIGKILL)
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
