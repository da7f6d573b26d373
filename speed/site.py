"""What the site costs: seconds and peak memory of a build, the size of its pages, all held against a baseline.

The baseline is named in the output and runs on the same machine just before: reading both tables into Python's rows
with pyarrow and nothing more, which any builder has to do. Another load on the machine stretches both, so the ratio
says more than the seconds. Tables are made up (tests/leaderboard/synthetic.py); the build is a process of its own, as
`sleeperbench site` runs: with two cores and many cells it has a second process write the pages of cells. `--cores 1`
keeps it to one. The memory of two processes is added up, though they share a part of it.

    python speed/site.py [--cells 20000] [--measurements 200000] [--cores 2] [--run DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "leaderboard"))

import synthetic

BASELINE = """
import pyarrow.parquet as pq
rows = [len(pq.read_table(f"{folder}/{name}.parquet").to_pylist()) for name in ("cells", "measurements")]
"""
BUILD = """
from pathlib import Path
from sleeperbench.leaderboard.build import build
build([Path(folder)], Path(out))
rows = []
"""
MEASURED = """
import json, os, resource, sys, time
folder, out, cores = sys.argv[1:]
if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(cores)])
start, cpu = time.perf_counter(), time.process_time()
%s
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
other = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + other.ru_maxrss) / 1024
print(json.dumps([wall, cpu, other.ru_utime + other.ru_stime, peak, rows]))
"""


def measure(code: str, folder: Path, out: Path, cores: int) -> tuple[float, float, float, float, list[int]]:
    """Wall seconds, processor seconds of a process that runs `code` and of its children, peak MB, what it counted."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED % code, str(folder), str(out), str(cores)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    wall, cpu, other, peak, rows = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu, other, peak, rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--measurements", type=int, default=200_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--run", type=Path, help="a run folder to use in place of a made-up one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="speed-") as tmp:
        folder = args.run or synthetic.sized_run(Path(tmp) / "run", args.cells, args.measurements)
        out = Path(tmp) / "site"
        base_wall, base_cpu, _, base_peak, (cells, rows) = measure(BASELINE, folder, out, 1)
        wall, cpu, other, peak, _ = measure(BUILD, folder, out, args.cores)
        pages = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*.html")}
        largest = max(pages, key=lambda p: pages[p])
        packed = sum(p.stat().st_size for p in (out / "data").iterdir())
    table = [
        (f"baseline: {cells} cells and {rows} measurements to rows", f"{base_wall:.1f} s ({base_cpu:.1f} s cpu)", ""),
        (f"build of {len(pages)} pages", f"{wall:.1f} s ({cpu:.1f} + {other:.1f} s cpu)", "60 s for 20,000 cells"),
        ("ratio to the baseline, processor seconds", f"{(cpu + other) / base_cpu:.1f}", ""),
        ("peak memory of the build", f"{peak:.0f} MB ({base_peak:.0f} MB baseline)", "2048 MB"),
        (f"largest page, {largest}", f"{pages[largest] / 1000:.0f} kB", "300 kB"),
        ("the packed cells", f"{packed / 1e6:.1f} MB", "none: read in the background"),
    ]
    width = max(len(a) for a, _, _ in table), max(len(b) for _, b, _ in table)
    print(f"{'what':{width[0]}}  {'measured':{width[1]}}  target")
    for what, measured, target in table:
        print(f"{what:{width[0]}}  {measured:{width[1]}}  {target}")


if __name__ == "__main__":
    main()
