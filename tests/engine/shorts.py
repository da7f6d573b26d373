"""A suite of many short tasks: toys of another distribution, tiny trainings, and what tests of runs share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plugins
from warm import Process

from sleeperbench.engine.rows import read_table
from sleeperbench.schema import VOLATILE

INFO = '{"title": "toy", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}'
TOYS = f'''import os, time
from dataclasses import dataclass
from pathlib import Path
from sleeperbench import Access, Defense, Evaluator, Findings, Measurement, Metric, Needs, Outcome, Verdict

@dataclass(frozen=True, kw_only=True)
class Idle(Defense):
    """Answers with a verdict that its seed decides; waits for a file to vanish, if one is named."""
    INFO = {INFO}
    ACCESS = Access(model="none", clean=0)
    wait: str = ""
    def run(self, case):
        while self.wait and Path(self.wait).exists():
            time.sleep(0.02)
        return Outcome(verdict=Verdict(score=float(case.ctx.seed % 97), threshold=50.0))

@dataclass(frozen=True, kw_only=True)
class Fails(Defense):
    """Raises, and notes in a file that it was tried."""
    INFO = {INFO}
    ACCESS = Access(model="none", clean=0)
    note: str = ""
    how: str = "raise"
    def run(self, case):
        with open(self.note, "a") as f:
            f.write("tried ")
        if self.how == "raise":
            raise RuntimeError("on purpose")
        return Outcome()

@dataclass(frozen=True, kw_only=True)
class Number(Evaluator):
    """A figure that its seed decides."""
    INFO = {INFO}
    NEEDS = Needs(outcome=("verdict",), trigger="none")
    METRICS = (Metric(name="number", unit="", low=0.0, high=1e9, better="none", doc="toy"),)
    def measure(self, case):
        return Findings(rows=(Measurement(metric="number", value=float(case.ctx.seed % 1009)),))

@dataclass(frozen=True, kw_only=True)
class Gate(Evaluator):
    """Every attack implants."""
    INFO = {INFO}
    NEEDS = Needs(outcome=(), trigger="none")
    METRICS = (
        Metric(name="asr", unit="", low=0.0, high=1.0, better="down", doc="toy"),
        Metric(name="c_acc", unit="", low=0.0, high=1.0, better="up", doc="toy"),
    )
    def measure(self, case):
        return Findings(rows=(Measurement(metric="asr", value=0.95), Measurement(metric="c_acc", value=0.9)))

@dataclass(frozen=True, kw_only=True)
class Dies(Evaluator):
    """Kills its worker so many times, counted in a file, then measures."""
    INFO = {INFO}
    NEEDS = Needs(outcome=(), trigger="none")
    METRICS = (Metric(name="lives", unit="", low=0.0, high=1e9, better="none", doc="toy"),)
    note: str = ""
    times: int = 0
    def measure(self, case):
        with open(self.note, "a") as f:
            f.write("x")
        if os.path.getsize(self.note) <= self.times:
            os.kill(os.getpid(), 9)
        return Findings(rows=(Measurement(metric="lives", value=float(os.path.getsize(self.note))),))

@dataclass(frozen=True, kw_only=True)
class Menagerie(Evaluator):
    """Counts a zoo."""
    INFO = {INFO}
    NEEDS = Needs(scope="zoo", outcome=("verdict",), trigger="none", clean_models=1)
    METRICS = (
        Metric(name="zoo_bad", unit="", low=0.0, high=1e9, better="none", doc="toy"),
        Metric(name="zoo_clean", unit="", low=0.0, high=1e9, better="none", doc="toy"),
        Metric(name="zoo_score", unit="", low=0.0, high=1e9, better="none", doc="toy"),
    )
    def measure(self, case):
        bad = [c for c in case.cells if c["backdoored"]]
        assert all(set(c) == {{"cell", "attack", "seed", "backdoored", "outcome"}} for c in case.cells)
        assert all((c["attack"] != "none") == c["backdoored"] for c in case.cells)
        assert len(case.clean_models) == 1
        score = sum(c["outcome"].verdict.score for c in case.cells)
        figures = {{"zoo_bad": len(bad), "zoo_clean": len(case.cells) - len(bad), "zoo_score": score}}
        series = [{{"label": "bad", "x": [0], "y": [len(bad)]}}]
        curve = {{"title": "Zoo", "x_label": "x", "y_label": "y", "series": series}}
        rows = tuple(Measurement(metric=k, value=float(v)) for k, v in figures.items())
        return Findings(rows=rows, curves={{"members": curve}})
'''
EVALUATORS = [f"short/n{i}" for i in range(5)]
DEFENSES = ["none", "short/idle"]


def install(folder: Path) -> Path:
    """The toys as a distribution `short`; returns the folder for PYTHONPATH."""
    points = {
        "sleeperbench.defenses": {"idle": "short:Idle", "fails": "short:Fails"},
        "sleeperbench.evaluators": {f"n{i}": "short:Number" for i in range(5)}
        | {"gate": "short:Gate", "dies": "short:Dies", "menagerie": "short:Menagerie"},
    }
    return plugins.install(folder, "short", "1.0", {"short.py": TOYS}, points)


def suite(file: Path, tail: str = "", **matrix: Any) -> Path:
    """Write a suite of short tasks."""
    given: Mapping[str, Any] = {
        "datasets": ["digits"],
        "archs": ["small_cnn"],
        "attacks": ["none", "badnets"],
        "rates": [0.1],
        "defenses": DEFENSES,
        "evaluators": ["short/gate", *EVALUATORS],
        "seeds": [0, 1],
    } | matrix
    lines = "\n".join(f"{k} = {v!r}" for k, v in given.items())
    small = "[dataset.digits]\ntrain = 200\ntest = 100\n[train]\nepochs = 1\nbatch = 64\n"
    file.write_text(f'schema = 1\nname = "short"\n[matrix]\n{lines}\n{small}{tail}')
    return file


def command(file: Path, out: Path, *more: object) -> list[str]:
    """The command that runs a suite into `out`, on one worker."""
    fixed = [sys.executable, "-m", "sleeperbench", "run", str(file), "--out", str(out), "--no-site", "--jobs", "1"]
    return [*fixed, *map(str, more)]


def tables(out: Path) -> list[list[dict[str, Any]]]:
    """Both tables without their volatile columns."""
    found = [read_table(out / f"{name}.parquet") for name in ("measurements", "cells")]
    return [[{k: v for k, v in row.items() if k not in VOLATILE} for row in table] for table in found]


def stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def family(root: int) -> dict[int, str]:
    """A process and everything below it, by number, with its start time."""
    # Polls ask for this: the parents of all processes on the machine would take ten times as long.
    assert next(Path("/proc/self/task").glob("*/children"), None), "a kernel without CONFIG_PROC_CHILDREN"
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        if fields := stat(pid):
            found[pid] = fields[19]
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += map(int, children.read_text().split())
    return found


def alive(processes: Mapping[int, str]) -> list[int]:
    """Which of them still run, and who else is in a session that one of them leads."""
    found = [p for p, start in processes.items() if (s := stat(p)) and s[0] not in "ZX" and s[19] == start]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (s := stat(int(entry.name))) and s[0] not in "ZX" and int(s[3]) in processes:
            found.append(int(entry.name))
    return sorted(set(found))


def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for something; its last value."""
    end = time.monotonic() + seconds
    while not (value := what()) and time.monotonic() < end:
        select_pause()
    return value


def select_pause() -> None:
    """A short pause of a poll."""
    signal.sigtimedwait([], 0.02)


def kill_group(process: Process) -> None:
    """SIGKILL to the whole process group, as a batch system does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
