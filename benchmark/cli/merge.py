"""`sleeperbench merge`: one run folder from several, such as the shards of a suite."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sleeperbench.errors import BadInput


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "merge",
        help="one run folder from several",
        description="Collects the rows of several run folders into a new one and builds its tables. A row that is in "
        "two of them is taken from the one named first. Needs no store.",
        epilog="Example: `sleeperbench merge runs/node1 runs/node2 --out runs/all`",
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="new run folder")


def main(args: argparse.Namespace) -> int:
    """Merge the runs."""
    from sleeperbench.engine import rows
    from sleeperbench.engine.lock import locked
    from sleeperbench.engine.store import write_atomic

    abouts: list[dict[str, Any]] = []
    for run in args.runs:
        try:
            abouts.append(json.loads((run / "run.json").read_bytes()))
        except (OSError, ValueError) as e:
            raise BadInput(f"{run} is no finished run folder (run.json: {e}); name folders that `run` wrote") from e
    protocols = {a["protocol"] for a in abouts}
    if len(protocols) > 1:
        raise BadInput(f"these runs follow protocols {sorted(protocols)}, which do not compare; merge equal ones")
    with locked(args.out):
        found, dropped = rows.unique(r for run in args.runs for r in rows.load_all(run))
        by_key: dict[str, list[dict[str, Any]]] = {}
        for r in found:
            by_key.setdefault(r["task_key"], []).append(r)
        (args.out / "rows").mkdir(exist_ok=True)
        for key, made in by_key.items():
            rows.save(args.out, key, made)
        rows.write_tables(args.out, found, abouts[0]["suite"]["gate"]["collapse_points"])
        plugins: dict[tuple[str, str], Any] = {}
        for run in reversed(args.runs):
            for p in json.loads((run / "plugins.json").read_bytes()):
                plugins[p["kind"], p["id"]] = p
            if (run / "media").is_dir():
                shutil.copytree(run / "media", args.out / "media", dirs_exist_ok=True)
        ordered = [plugins[k] for k in sorted(plugins)]
        write_atomic(args.out / "plugins.json", json.dumps(ordered, indent=1, sort_keys=True).encode())
        about = abouts[0] | {"merged": [a["counts"] for a in abouts], "exit": max(a["exit"] for a in abouts)}
        write_atomic(args.out / "run.json", json.dumps(about, indent=1, sort_keys=True).encode())
        shutil.copyfile(args.runs[0] / "suite.toml", args.out / "suite.toml")
    print(f"{len(found)} rows of {len(args.runs)} runs, {dropped} doubles left out", file=sys.stderr)
    print(args.out.absolute())
    return 0
