"""What one test process makes and all others of the same run find."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def common(factory: pytest.TempPathFactory) -> Path:
    """The folder of this run that all its test processes see."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process that asks fills, while others wait; nobody may change it afterwards.

    Args:
        factory: Where the folders of this process are.
        name: Of the folder.
        make: Fills it; what raises leaves it to the next that asks.
    """
    base = common(factory)
    folder, done = base / name, base / f"{name}.made"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
