"""`sleeperbench merge`: one run folder from several, such as the shards of a suite."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
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
    from sleeperbench.engine.lock import locked

    abouts = [_read(run, "run.json") for run in args.runs]
    protocols = {a["protocol"] for a in abouts}
    if len(protocols) > 1:
        raise BadInput(f"these runs follow protocols {sorted(protocols)}, which do not compare; merge equal ones")
    if (args.out / "run.json").exists() and "merged" not in _read(args.out, "run.json"):
        raise BadInput(f"{args.out} is a run folder of its own; give --out a new one")
    if args.out.resolve() in [run.resolve() for run in args.runs]:
        raise BadInput(f"{args.out} is one of the runs to merge; give --out a new folder")
    plugins: dict[tuple[str, str], Any] = {}
    for run in reversed(args.runs):
        for p in _read(run, "plugins.json"):
            plugins[p["kind"], p["id"]] = p
    with locked(args.out):
        try:
            found, dropped = _merge(args, abouts, [plugins[k] for k in sorted(plugins)])
        except OSError as e:
            raise BadInput(f"cannot write {args.out}: {e.strerror or e}; mend that, or give another --out") from e
    print(f"{found} rows of {len(args.runs)} runs, {dropped} doubles left out", file=sys.stderr)
    print(args.out.absolute())
    return 0


def _read(run: Path, name: str) -> Any:
    try:
        return json.loads((run / name).read_bytes())
    except (OSError, ValueError) as e:
        raise BadInput(f"{run} is no finished run folder ({name}: {e}); name folders that `run` wrote") from e


def _standing(runs: Sequence[Path]) -> tuple[list[dict[str, Any]], int]:
    """Rows of several runs, where the first run that has an evaluator's figures on a cell counts."""
    from sleeperbench.engine import rows

    kept: list[dict[str, Any]] = []
    owner: dict[tuple[str, str], Path] = {}
    dropped = 0
    for run in runs:
        found, _ = rows.unique(rows.load_all(run))
        own = [r for r in found if owner.setdefault((r["cell"], r["evaluator"]), run) == run]
        dropped += len(found) - len(own)
        kept += own
    return kept, dropped


def _merge(args: argparse.Namespace, abouts: list[dict[str, Any]], plugins: list[Any]) -> tuple[int, int]:
    """Write the new run folder; returns how many rows it has and how many doubles were left out."""
    from sleeperbench.engine import rows
    from sleeperbench.engine.store import write_atomic

    found, dropped = _standing(args.runs)
    by_key: dict[str, list[dict[str, Any]]] = {}
    for r in found:
        by_key.setdefault(r["task_key"], []).append(r)
    (args.out / "rows").mkdir(exist_ok=True)
    for key, made in by_key.items():
        rows.save(args.out, key, made)
    rows.drop_superseded(args.out, found)
    rows.write_tables(args.out, found, abouts[0]["suite"]["gate"]["collapse_points"])
    for run in reversed(args.runs):
        if (run / "media").is_dir():
            shutil.copytree(run / "media", args.out / "media", dirs_exist_ok=True)
    write_atomic(args.out / "plugins.json", json.dumps(plugins, indent=1, sort_keys=True).encode())
    about = abouts[0] | {"merged": [a["counts"] for a in abouts], "exit": max(a["exit"] for a in abouts)}
    shutil.copyfile(args.runs[0] / "suite.toml", args.out / "suite.toml")
    write_atomic(args.out / "run.json", json.dumps(about, indent=1, sort_keys=True).encode())
    return len(found), dropped
