"""Data sets as in-memory image sets: read, download, digest, cut.

Light names (`sleeperbench.data.catalog`) import no torch; `ImageSet` and the readers do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "sleeperbench.data":
    raise ImportError("import sleeperbench.data, not data")

if TYPE_CHECKING:
    from sleeperbench.data.images import ImageSet

__all__ = ["ImageSet"]


def __getattr__(name: str) -> Any:
    if name == "ImageSet":
        return importlib.import_module("sleeperbench.data.images").ImageSet
    raise AttributeError(f"module 'sleeperbench.data' has no attribute {name!r}")
