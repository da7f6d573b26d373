"""Writes docs/attacks.md and its JSON from a run of suite `attacks`: `python docs/attacks.py RUN NAME "COMMAND"`.

What each attack declares, what its paper printed, and what this run measured, side by side.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import machine, provenance

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table

DOCS = Path(__file__).resolve().parent
SHOWN = {
    "c_acc": ("C-Acc", 100.0, 1),
    "asr": ("ASR", 100.0, 1),
    "psnr": ("PSNR, dB", 1.0, 1),
    "ssim": ("SSIM", 1.0, 3),
    "linf": ("L_inf, of 255", 255.0, 0),
    "silhouette": ("silhouette", 1.0, 2),
}
FIELDS = ("cell", "attack", "seed", "metric", "qualifier", "value", "count", "total", "status", "reason", "flag")


def published(entry: Mapping[str, Any]) -> str:
    """The printed ASR in % with its setting; several papers' figures are not averaged."""
    said = entry.get("published_asr")
    return f"{100 * said['value']:.1f} ({said['setting']}; {said['source']})" if isinstance(said, dict) else ""


def span(values: Sequence[float], scale: float, digits: int) -> str:
    """One figure per seed."""
    return ", ".join(f"{scale * v:.{digits}f}" for v in values)


def lines(rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], registry: Registry) -> list[str]:
    """One line per attack."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    flags: dict[str, set[str]] = defaultdict(set)
    for r in rows:
        if r["defense"] != "none" or r["qualifier"]:
            continue
        if r["value"] is not None:
            found[r["attack"]][r["metric"]][r["seed"]] = r["value"]
    for c in cells:
        flags[c["attack"]] |= set(filter(None, c["flag"].split(";")))
        if c["status"] != "ok":
            flags[c["attack"]].add(f"{c['status']}: {c['reason']}")
    head = ["attack", "declared", "published", *(name for name, _, _ in SHOWN.values()), "flags"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for attack in sorted(flags):
        wrapper, _, inner = attack.partition("~")[0].partition(":")
        info = registry.get("attack", inner or wrapper).blueprint.info
        figures = [span([v for _, v in sorted(found[attack][m].items())], s, d) for m, (_, s, d) in SHOWN.items()]
        declared = "" if attack == "none" else f"{100 * info['implant_asr']:.0f}"
        said = published(registry.get("attack", wrapper).blueprint.info)
        text.append("| " + " | ".join([attack, declared, said, *figures, "; ".join(sorted(flags[attack]))]) + " |")
    return text


def weak(cells: Sequence[Mapping[str, Any]]) -> str:
    """The attacks that did not implant, and how many did."""
    flags = {c["attack"]: "weak" in c["flag"].split(";") for c in cells if c["rate"]}
    names = ", ".join(sorted(a for a, is_weak in flags.items() if is_weak))
    return f"{names or 'none'} ({sum(flags.values())} of {len(flags)})"


def main() -> int:
    """Write both files."""
    run, name, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rows, cells = read_table(run / "measurements.parquet"), read_table(run / "cells.parquet")
    about = provenance(run, rows)
    kept = [{k: r[k] for k in FIELDS} for r in rows if r["defense"] == "none"]
    (DOCS / "measured" / f"{name}.json").write_text(json.dumps({"command": command} | about | {"rows": kept}) + "\n")
    sets = ", ".join(sorted({c["dataset"] for c in cells}))
    rates = ", ".join(sorted({f"{100 * c['rate']:g} %" for c in cells if c["rate"]}))
    text = [
        *("# Attacks: declared, published, measured", "", "Written by `docs/attacks.py` from the tables of:", ""),
        *(f"`{command}`", ""),
        f"{sets}, {', '.join(sorted({c['arch'] for c in cells}))}, rate {rates}, {about['recipe']['epochs']} epochs, "
        f"{machine(about)}. One figure per seed; shares in %.",
        "",
        "*Declared* is the ASR at which the attack counts as implanted; below it a row is `weak` and no defense gets "
        "credit. *Published* figures are of other data, networks and lengths of training: they say what the attack is "
        "known for, not what this run should reach. *Silhouette* is near 1 where triggered images lie apart from the "
        "target class's own in the last layer's features, near 0 where they overlap.",
        *("", f"Below their declared level, and so `weak`: {weak(cells)}."),
        *("", *lines(rows, cells, Registry.discover("none")), "", f"All rows: [{name}.json](measured/{name}.json)."),
    ]
    (DOCS / "attacks.md").write_text("\n".join(text) + "\n")
    print(f"wrote docs/attacks.md and docs/measured/{name}.json: {len(cells)} cells")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main())
