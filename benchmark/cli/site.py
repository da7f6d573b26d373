"""`sleeperbench site`: result tables in, static site out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "site",
        help="render the leaderboard of one or several runs",
        description="Render the leaderboard of one or several run folders as plain files that need no server. "
        "Where two runs hold the same cell of one suite, the first one named counts.",
    )
    parser.add_argument("--results", nargs="+", required=True, type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the site")


def main(args: argparse.Namespace) -> int:
    """Render the site and say where it is.

    Raises:
        BadInput: a run has no readable tables of this schema, or the folder cannot be written.
    """
    from sleeperbench.leaderboard.build import build

    index = build(args.results, args.out)
    print(f"site: {index.resolve()}")
    return 0
