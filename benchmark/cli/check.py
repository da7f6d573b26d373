"""`sleeperbench check`: whether a method keeps the contract."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

WORDS = {"ok": "ok", "failed": "FAIL", "skipped": "skip"}


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "check",
        help="whether a method keeps the contract",
        description="Runs an attack, a defense or an evaluator on small cases and checks its declarations, its "
        "answers, that it repeats itself, and that it changes nothing that is not its own. One line per check (ok, "
        "FAIL, or skip with the reason); after them, for every failure, what was seen and how to mend it. "
        "docs/check.md explains every check.",
        epilog="Examples: `sleeperbench check ft`, `sleeperbench check dist/gentle --full`. An id that exists in "
        "several kinds is checked in each; `attack:none` means one of them. `wrapper:inner` wraps that inner method, "
        "`wrapper` alone something made up. Exit codes: 0 all pass, 4 a check failed, 2 unknown id, 3 broken plugin.",
    )
    p.add_argument("id", metavar="ID", help="id of a method, as `sleeperbench list` prints it")
    p.add_argument(
        "--full", action="store_true", help="all architectures and shapes, and a defense's own child process"
    )
    p.add_argument("--json", action="store_true", help="one JSON array of rows")


def main(args: argparse.Namespace) -> int:
    """Check and print; 4 when a check failed."""
    import torch

    from sleeperbench.testing.report import mending, results, subjects

    torch.set_num_threads(1)  # what a task gets in a suite, and what makes runs repeat themselves
    rows, failed = [], []
    for subject in subjects(args.id, full=args.full):
        if not args.json:
            print(subject)
        for r in results(subject):
            row = {"check": r.check.name, "status": r.status, "seconds": round(r.seconds, 3), "message": r.message}
            rows.append(row | {"method": str(subject)})
            if r.status == "failed":
                failed.append(r)
            if not args.json:
                print(f"  {WORDS[r.status]:<5} {r.check.name:<18} {r.seconds:6.2f} s  {r.message}".rstrip(), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    elif failed:
        print(mending(failed))
    if failed and not args.quiet:
        print(f"{len(failed)} of {len(rows)} checks failed", file=sys.stderr)
    return 4 if failed else 0
