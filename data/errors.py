"""The error of the data package. It stands here because data sets know nothing of the benchmark above them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(Exception):
    """Missing, damaged or unfit data: the message says what, where and how to mend it; no traceback is wanted."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names the closest known names, or all of them when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    return "known: " + ", ".join(known)
