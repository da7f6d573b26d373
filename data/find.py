"""Which data sets there are: the shipped ones, plugins' and the user's own."""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from sleeperbench.data.added import CARD, read_added
from sleeperbench.data.errors import DataError, nearest
from sleeperbench.data.roots import data_root
from sleeperbench.data.source import Source

GROUP = "sleeperbench.datasets"


def names(root: Path | None = None) -> list[str]:
    """Ids of all data sets, the shipped first; a plugin's is `dist/id`. Nothing is imported."""
    return [*_registered(), *_added(data_root(root))]


def sources(root: Path | None = None) -> dict[str, Source]:
    """All data sets that can be used; a broken plugin is left out here and explained by `find_source`."""
    found = {}
    for name in names(root):
        try:
            found[name] = find_source(name, root)
        except DataError:
            continue
    return found


def find_source(name: str, root: Path | None = None) -> Source:
    """The data set of that id.

    Raises:
        DataError: Unknown (the nearest names are given), or a plugin that cannot be imported.
    """
    registered = _registered()
    if name in registered:
        return _import(name, registered[name])
    if name in _added(data_root(root)):
        return read_added(data_root(root), name)
    raise DataError(f"no data set `{name}`: {nearest(name, names(root))}")


def _registered() -> dict[str, EntryPoint]:
    """Entry points by id, the shipped first, as far as SLEEPERBENCH_PLUGINS admits them."""
    admitted = os.environ.get("SLEEPERBENCH_PLUGINS") or "all"
    chosen = {_plain(d) for d in admitted.split(",")}
    found = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: not _shipped(p)):
        dist = _plain(point.dist.name) if point.dist else "unknown"
        if _shipped(point):
            found[point.name] = point
        elif admitted == "all" or dist in chosen:
            found[f"{dist}/{point.name}"] = point
    return found


def _import(name: str, point: EntryPoint) -> Source:
    try:
        source = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a plugin may raise anything, or call sys.exit
        raise DataError(f"the data set `{name}` cannot be imported from {point.value}: {e!r}") from None
    if not isinstance(source, Source):
        raise DataError(f"the data set `{name}`: {point.value} is a {type(source).__name__}, not a Source")
    return dataclasses.replace(source, name=name)


def _added(root: Path) -> list[str]:
    try:
        return sorted(p.parent.name for p in root.glob(f"*/{CARD}"))
    except OSError:
        return []


def _shipped(point: EntryPoint) -> bool:
    return point.dist is not None and _plain(point.dist.name) == "sleeperbench"


def _plain(dist: str) -> str:
    return dist.strip().lower().replace("_", "-")
