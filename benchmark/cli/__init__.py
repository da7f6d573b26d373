"""The `sleeperbench` command: one file per sub-command; nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from sleeperbench import __version__

COMMANDS = ("run", "list", "show", "site", "merge", "store", "data", "check", "compare-paper", "doctor")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    p = argparse.ArgumentParser(
        prog="sleeperbench",
        description="Backdoor attacks and defenses on image classifiers: is the backdoor gone, or only asleep?",
        epilog="Start with `sleeperbench run quick --out runs/quick`. Every command explains itself with --help. "
        "Results go to standard output, progress to standard error. Exit codes: 0 done, 1 some cells failed, "
        "2 bad input or environment, 3 broken plugin, 4 mismatch, 130 interrupted.",
    )
    p.add_argument("--version", action="version", version=f"sleeperbench {__version__}")
    p.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    sub = p.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        _module(name).add_parser(sub)
    return p


def _module(command: str) -> Any:
    return importlib.import_module(f"sleeperbench.cli.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        code: int = _module(args.command).main(args)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as e:
        code = getattr(e, "exit_code", 0)
        if not code or args.verbose:
            raise
        print(f"sleeperbench: {e}", file=sys.stderr)
        return code
