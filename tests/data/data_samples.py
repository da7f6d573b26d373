"""A small data set in the plain layout, and the source that describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sleeperbench.data.arrays import npz_files, read_npz
from sleeperbench.data.source import Source


def toy_source(name: str = "toy", **changes: Any) -> Source:
    facts: dict[str, Any] = {
        "name": name,
        "title": "Toy",
        "shape": (3, 4, 5),
        "classes": ("a", "b", "c"),
        "norm": ((0.0,) * 3, (1.0,) * 3),
        "pad": 0,
        "flip": False,
        "train": None,
        "test": None,
        "files": lambda root: npz_files(root, name),
        "read": lambda root, split: read_npz(root / name / f"{split}.npz"),
    }
    return Source(**facts | changes)


def toy_rows(n: int = 30, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8),
        "labels": np.arange(n, dtype=np.int64) % 3,
    }


def write_toy(root: Path, name: str = "toy", **further: np.ndarray[Any, Any]) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    np.savez(root / name / "train.npz", **toy_rows(30, 0) | further)
    np.savez(root / name / "test.npz", **toy_rows(12, 1))
    return root
