"""`sleeperbench show`: everything a run knows of one cell."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from sleeperbench.errors import BadInput, nearest


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "show",
        help="everything a run knows of one cell",
        description="Prints all measurements of one cell, its media and the command that reproduces it.",
        epilog="Example: `sleeperbench show digits/small_resnet/badnets@0.1/ft/s0 --results runs/quick`",
    )
    p.add_argument("cell", metavar="CELL", help="dataset/arch/attack@rate/defense/s<seed>")
    p.add_argument("--results", type=Path, required=True, metavar="RUN", help="run folder")
    p.add_argument("--json", action="store_true", help="as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the cell."""
    from sleeperbench.engine.rows import read_table
    from sleeperbench.engine.suite import shipped
    from sleeperbench.schema import CELLS, reproduce

    cells = {r["cell"]: r for r in read_table(args.results / "cells.parquet")}
    if args.cell not in cells:
        raise BadInput(f"no cell `{args.cell}` in {args.results}: {nearest(args.cell, cells)}")
    rows = [r for r in read_table(args.results / "measurements.parquet") if r["cell"] == args.cell]
    folder = args.results / "media" / hashlib.sha256(args.cell.encode()).hexdigest()[:12]
    media = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    line = cells[args.cell]
    # A suite of the user's own is known by its file alone, of which the run folder has a copy.
    suite = line["suite"] if line["suite"] in shipped() else args.results / "suite.toml"
    command = shlex.join(["sleeperbench", *reproduce(line, str(suite)), "--out", "runs/one"])
    if args.json:
        answer = {"cell": args.cell, "identity": line, "measurements": rows, "media": media, "command": command}
        print(json.dumps(answer, indent=1, default=str))
        return 0
    print(args.cell)
    docs = {c.name: c.doc for c in CELLS}
    for name, value in line.items():
        if isinstance(value, float) and name != "seconds":
            print(f"  {name:<16} {value:.4f}  {docs[name]}")
    print(f"{'evaluator':<12} {'metric':<12} {'qualifier':<24} {'value':>8}  95 % interval   status")
    for r in rows:
        value = "" if r["value"] is None else f"{r['value']:.4f}"
        span = "" if r["lower"] is None else f"{r['lower']:.4f}-{r['upper']:.4f}"
        why = f"{r['status']} {r['reason']}".strip()
        print(f"{r['evaluator']:<12} {r['metric']:<12} {r['qualifier']:<24} {value:>8}  {span:<15} {why}")
    print(f"media: {folder if media else 'none'}")
    print(f"reproduce: {command}")
    return 0
