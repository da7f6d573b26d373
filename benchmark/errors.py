"""Errors that reach a user: one message that says what, where and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SleeperBenchError(Exception):
    """Base of all errors that the command line prints without a traceback."""

    exit_code = 1


class BadInput(SleeperBenchError):
    """Usage, unknown name, missing data, unwritable or locked folder, no space."""

    exit_code = 2


class BrokenPlugin(SleeperBenchError):
    """A plugin that the run needs cannot be imported, or is of another API."""

    exit_code = 3


class Mismatch(SleeperBenchError):
    """A check, digest or repetition did not match."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names the closest known names, or lists a few of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {shown or 'none'}"
