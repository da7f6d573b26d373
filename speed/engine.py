"""What the engine itself costs: planning, a cached run, and the overhead of a trusted and of a forked task.

Plugins are toys that compute nothing, so that what is measured is the engine. Wall seconds on one worker; processor
seconds stand beside them, since another load on the machine stretches the first. Runs lie in memory (/dev/shm) where
that exists: a commit syncs four times, which is the disk's time and has a line of its own.

    python speed/engine.py [--tasks 10000] [--planned 100000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import plugins

EVALUATORS = 250
TOYS = '''from dataclasses import dataclass
from sleeperbench import Access, Defense, Evaluator, Findings, Measurement, Metric, Needs, Outcome


@dataclass(frozen=True, kw_only=True)
class Idle(Defense):
    """Does nothing."""
    INFO = {"title": "toy", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    ACCESS = Access(model="none", clean=0)
    variant: int = 0
    def run(self, case):
        return Outcome()

@dataclass(frozen=True, kw_only=True)
class Empty(Evaluator):
    """Measures nothing."""
    INFO = {"title": "toy", "version": 1, "api": 1, "kind": "toy", "paper": "", "bibtex": "", "micro": {}}
    NEEDS = Needs(outcome=(), trigger="none")
    METRICS = (Metric(name="nothing", unit="", low=0.0, high=1.0, better="none", doc="0"),)
    def measure(self, case):
        return Findings(rows=(Measurement(metric="nothing", value=0.0),))
'''
SUITE = """
schema = 1
name = "{name}"
[matrix]
datasets = ["digits"]
archs = ["small_cnn"]
attacks = {attacks}
rates = {rates}
defenses = {defenses}
evaluators = {evaluators}
seeds = {seeds}
[dataset.digits]
train = 200
test = 100
[train]
epochs = 1
{tail}
"""
PLAN = """
import json, resource, sys, time
from sleeperbench.cli.run import describe_dataset
from sleeperbench.engine.plan import Planner
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import build
registry = Registry.discover()
suite, _ = build(sys.argv[1], registry)
data = {n: describe_dataset(n) for n in suite.datasets}
start, cpu = time.perf_counter(), time.process_time()
plan = Planner(suite, registry, data).build()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
took = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps([len(plan.tasks), *took, peak]))
"""


def suite(folder: Path, name: str, tail: str = "", **matrix: object) -> Path:
    """Write a suite file; Python's lists of strings and numbers are TOML's."""
    file = folder / f"{name}.toml"
    file.write_text(SUITE.format(name=name, tail=tail, **{k: repr(v) for k, v in matrix.items()}))
    return file


def run(file: Path, folder: Path, env: dict[str, str], *more: str) -> tuple[float, float]:
    """Wall seconds and processor seconds (all processes) of one run."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "sleeperbench",
        "-q",
        "run",
        str(file),
        "--out",
        str(folder / file.stem),
        "--jobs",
        "1",
    ]
    subprocess.run([*command, *more], env=env, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def journal(out: Path, kind: str) -> list[dict[str, object]]:
    """The journal's lines of one kind of task."""
    lines = [json.loads(x) for x in (out / "tasks.jsonl").read_text().splitlines()]
    return [x for x in lines if x["kind"] == kind]


def sync_seconds(folder: Path) -> float:
    """Wall seconds of syncing one small new file."""
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        f.write(b"x" * 2000)
        f.flush()
        start = time.perf_counter()
        os.fsync(f.fileno())
        return time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks of the cached run")
    parser.add_argument("--planned", type=int, default=100_000, help="tasks to plan")
    args = parser.parse_args()
    table: list[tuple[str, str, str]] = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="speed-", dir=memory if os.access(memory, os.W_OK) else None) as tmp:
        folder = Path(tmp)
        names = [f"empty{i}" for i in range(EVALUATORS)]
        points = {
            "sleeperbench.defenses": {"idle": "toys:Idle"},
            "sleeperbench.evaluators": dict.fromkeys(names, "toys:Empty"),
        }
        path = plugins.install(folder, "toys", "1.0", {"toys.py": TOYS}, points)
        env = os.environ | {
            "PYTHONPATH": str(path),
            "OMP_NUM_THREADS": "1",
            "SLEEPERBENCH_CACHE": str(folder / "cache"),
        }

        # 2 attacks x 4 rates x 10 seeds, 7 tasks per cell of a repair and 3 per clean model of it.
        steps = f"[defense.ft]\nsteps = {list(range(1, args.planned // 270 + 1))}"
        matrix = {"rates": [0.01, 0.02, 0.05, 0.1], "seeds": list(range(10))}
        file = suite(
            folder,
            "planned",
            steps,
            attacks=["none", "badnets", "blended"],
            defenses=["none", "clean_model", "ft"],
            evaluators=["accuracy", "ra", "stealth"],
            **matrix,
        )
        answer = subprocess.run(
            [sys.executable, "-c", PLAN, str(file)], env=env, check=True, capture_output=True, text=True
        )
        n, wall, cpu, peak = json.loads(answer.stdout)
        table.append((f"planning {n} tasks", f"{wall:.1f} s ({cpu:.1f} s processor)", "20 s for 100,000"))
        table.append(("peak memory of it", f"{peak:.0f} MB", "1024 MB"))

        cells = max(1, args.tasks // EVALUATORS)
        file = suite(
            folder,
            "trusted",
            attacks=["none"],
            rates=[0.1],
            defenses=["none", "toys/idle"],
            evaluators=[f"toys/{n}" for n in names],
            seeds=list(range(cells // 2)),
        )
        run(file, folder, env, "--no-site")
        lines = journal(folder / "trusted", "evaluate")
        ends = sorted(float(str(x["time"])) for x in lines)
        # Evaluations come in stretches, one per model; the longest pauses are other tasks' and are left out.
        gaps = sorted(b - a for a, b in itertools.pairwise(ends))[: len(ends) - 2 * cells]
        table.append(("overhead per trusted task", f"{1000 * sum(gaps) / len(gaps):.1f} ms", "5 ms"))
        forked = [x["result"]["seconds"] for x in journal(folder / "trusted", "defense")[1:]]  # type: ignore[index]
        table.append(("overhead per forked task", f"{1000 * sum(forked) / len(forked):.0f} ms", "100 ms"))
        tasks = len(lines) + 3 * cells
        wall, cpu = run(file, folder, env, "--no-site")
        table.append(
            (f"cached run of {tasks} tasks, no site", f"{wall:.1f} s ({cpu:.1f} s processor)", "30 s for 10,000")
        )
        took = sorted(sync_seconds(Path(tempfile.gettempdir())) for _ in range(50))[25]
    table.append(
        (f"the four syncs of a commit in {tempfile.gettempdir()}", f"{4000 * took:.1f} ms", "none: the disk's")
    )
    width = max(len(a) for a, _, _ in table), max(len(b) for _, b, _ in table)
    print(f"{'what':{width[0]}}  {'measured':{width[1]}}  target")
    for what, measured, target in table:
        print(f"{what:{width[0]}}  {measured:{width[1]}}  {target}")


if __name__ == "__main__":
    main()
