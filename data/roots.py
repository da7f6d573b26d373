"""Where data sets lie and where their decoded copies are kept."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The user's cache folder for this project: `$XDG_CACHE_HOME/sleeperbench`, else `~/.cache/sleeperbench`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sleeperbench"


def cache_folder() -> Path:
    """Where decoded arrays are kept: `$SLEEPERBENCH_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("SLEEPERBENCH_CACHE") or user_cache()).expanduser().absolute()


def data_root(root: Path | None = None) -> Path:
    """The data root: the argument, else `$SLEEPERBENCH_DATA`, else `data` in the user's cache folder."""
    return Path(root or os.environ.get("SLEEPERBENCH_DATA") or user_cache() / "data").expanduser().absolute()
