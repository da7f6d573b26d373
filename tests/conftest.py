"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported by anything: many small tests are slower on two threads than on one.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
