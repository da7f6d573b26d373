"""Writes docs/seconds.md from runs of suite `paper-istr-seconds`: `python docs/seconds.py "COMMAND" RUN [RUN ...]`.

What a detector of models takes per clean row that it is given, batched and one class or row at a time, as IsTr (Sun et
al. 2025, table VII) tables time per sample with batching disabled. Seconds are those of evaluator `cost`'s rows: all of
the defense's own tasks, what it prepares once for all models among them. No figure of a run is made of them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from record import machine, provenance

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table
from sleeperbench.engine.work import clean_rows

DOCS = Path(__file__).resolve().parent
JUDGES = ("detection", "inversion")
Key = tuple[str, str, str, bool]
"""Data set, architecture, detector, and whether it was batched."""


def granted(about: Mapping[str, Any], dataset: str, asked: float | int) -> int:
    """Clean rows of a defense that declares `asked`, in the run that `about` (run.json) tells of."""
    suite = about["suite"]
    held: int = about["datasets"][dataset]["rows"]["train"]
    total = min(held, suite["dataset_rows"].get(dataset, {}).get("train", held))
    return clean_rows(asked, suite["access"]["clean"], total)


def took(rows: Iterable[Mapping[str, Any]], registry: Registry) -> dict[Key, list[tuple[float, float]]]:
    """(Seconds, core-seconds) of every model that a detector of models judged."""
    found: dict[Key, list[tuple[float, float]]] = {}
    for r in rows:
        if r["metric"] != "cost_forwards" or r["qualifier"] or r["value"] is None:
            continue
        name = r["defense"].partition("~")[0]
        if ":" in name:
            continue
        info = registry.get("defense", name).blueprint.info
        if info["kind"] in JUDGES and not info.get("scores"):
            params = json.loads(r["defense_params"])
            # Methods without the parameter take their classes one after another, or have no more than one pass.
            key = r["dataset"], r["arch"], name, bool(params.get("batched", True))
            found.setdefault(key, []).append((r["seconds"], r["cpu_seconds"]))
    return found


def table(found: Mapping[Key, Sequence[tuple[float, float]]], counts: Mapping[tuple[str, str], int]) -> list[str]:
    """A line per detector; `counts` are clean rows by data set and detector. Ratios are unbatched over batched."""
    head = ["data set", "detector", "models", "clean rows", "seconds a model", "core-seconds a model"]
    head += ["seconds a row", "unbatched: seconds a model", "seconds a row", "times as long"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for dataset, arch, name in sorted({key[:3] for key in found}):
        n = counts[dataset, name]
        shown = [dataset, name]
        many, alone = (found.get((dataset, arch, name, batched), ()) for batched in (True, False))
        seconds = [statistics.median(s for s, _ in part) if part else None for part in (many, alone)]
        shown += [str(len(many)), str(n)]
        shown += [_short(seconds[0]), _short(statistics.median(c for _, c in many) if many else None)]
        shown += [_short(_per(seconds[0], n)), _short(seconds[1]), _short(_per(seconds[1], n))]
        shown.append(f"{seconds[1] / seconds[0]:.1f}" if seconds[0] and seconds[1] else "")
        text.append("| " + " | ".join(shown) + " |")
    return text


def _per(seconds: float | None, rows: int) -> float | None:
    return seconds / rows if seconds is not None and rows else None


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> int:
    """Write the page."""
    command, *folders = sys.argv[1:]
    registry = Registry.discover("none")
    found: dict[Key, list[tuple[float, float]]] = {}
    counts: dict[tuple[str, str], int] = {}
    about: dict[str, Any] = {}
    for run in map(Path, folders):
        rows = read_table(run / "measurements.parquet")
        about = provenance(run, rows)
        whole = json.loads((run / "run.json").read_text())
        for key, each in took(rows, registry).items():
            found.setdefault(key, []).extend(each)
            asked = registry.get("defense", key[2]).blueprint.access.clean
            counts[key[0], key[2]] = granted(whole, key[0], asked)
    page = [
        *("# Seconds per sample", "", "Written by `docs/seconds.py` from the tables of:", "", f"`{command}`", ""),
        f"{machine(about)}. Medians over models. A row is one of the clean rows that the detector is given; unbatched "
        "is one class, candidate or row at a time (parameter `batched`). Times are of this machine, with whatever else "
        "it did, and hold what a detector prepares once for all models. Detectors without clean rows have no seconds "
        "a row.",
        *("", *table(found, counts)),
    ]
    (DOCS / "seconds.md").write_text("\n".join(page) + "\n")
    print(f"wrote docs/seconds.md: {len(counts)} detectors")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main())
