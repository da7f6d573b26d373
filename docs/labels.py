"""Writes which label BTI's inversion found in repairs: `python docs/labels.py "COMMAND" STORE RUN [RUN ...]`.

BTI and PAM push a model away from the images of a generator. Whether it leads to the attacker's label is what they
stand on, and no table of a run holds it: it is in `chosen` of what the store keeps of the repair. Each call puts a
run's models into docs/measured/inverted-labels.json, and the section `## Labels found` of docs/methods/bti.md is
written from all of them; `python docs/labels.py --again` does that alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import machine, methods, provenance
from signals import PURIFIED

from sleeperbench.engine.artifacts import read_json
from sleeperbench.engine.rows import read_table
from sleeperbench.engine.task import PUBLIC_TARGETS

DOCS = Path(__file__).resolve().parent
FILE, PAGE, HEAD = DOCS / "measured" / "inverted-labels.json", DOCS / "methods" / "bti.md", "## Labels found"
ALONE, REPAIRS = "bti", ("bti_u", "bti_sam", "pam")
"""The inversion by itself, which leaves the model as it is, and what begins with it."""


def found(store: Path, run: Path) -> list[dict[str, Any]]:
    """Each repaired model of a run with the label that the inversion found in it.

    Args:
        store: Folder of the run's store, which keeps `chosen` of every repair.
        run: A run of all-to-one attacks of a public suite, whose labels are published for these seeds.
    """
    about = json.loads((run / "run.json").read_text())
    if not about["suite"]["secret_public"] or {*about["suite"]["seeds"]} - {*PUBLIC_TARGETS}:
        sys.exit(f"{run}: the attackers' labels are known of public suites alone, for seeds {list(PUBLIC_TARGETS)}")
    models = []
    for c in read_table(run / "cells.parquet"):
        plugin, key = c["defense"].partition("~")[0], c["defense_key"]
        if c["status"] != "ok" or plugin not in (ALONE, *REPAIRS):
            continue
        chosen = read_json(store / key[:2] / key / "outcome.json")["chosen"]
        meant = None if c["attack"].partition("~")[0] == "none" else PUBLIC_TARGETS[c["seed"]]
        model = {k: c[k] for k in ("cell", "dataset", "defense", "attack", "rate", "seed", "c_acc", "asr", "flag")}
        model |= {"found": chosen["target"], "share": chosen["share"], "meant": meant}
        models.append(model | ({"c_acc": None, "asr": None} if plugin == ALONE else {}))
    return models


def spread(of: Sequence[Mapping[str, Any]]) -> str:
    """O-ASR of some models in words, with how many of them are purified."""
    figures = sorted(100 * m["asr"] for m in of)
    pure = sum(m["asr"] <= PURIFIED for m in of)
    ends = f"{figures[0]:.1f}" if len(figures) == 1 else f"{figures[0]:.1f} to {figures[-1]:.1f}"
    return f"{pure} of {len(of)} purified, O-ASR {ends} %"


def conclusion(models: Sequence[Mapping[str, Any]]) -> str:
    """What the label has to do with the repair, over all attacked models."""
    attacked = [m for m in models if m["meant"] is not None and m["asr"] is not None]
    hit = [m for m in attacked if m["found"] == m["meant"]]
    missed = [m for m in attacked if m["found"] != m["meant"]]
    parts = [f"{words}: {spread(of)}" for words, of in (("where it did", hit), ("where it did not", missed)) if of]
    return f"It found the attacker's label in {len(hit)} of {len(attacked)} attacked models; {'; '.join(parts)}."


def alone(models: Sequence[Mapping[str, Any]]) -> str:
    """How often the inversion by itself finds the label, by its effort."""
    of = [m for m in models if m["defense"].partition("~")[0] == ALONE and m["meant"] is not None]
    parts = []
    for words, reduced in (("with its published steps", False), ("with fewer (`reduced`)", True)):
        mine = [m for m in of if ("reduced" in m["flag"].split(";")) is reduced]
        if mine:
            parts.append(f"{words} in {sum(m['found'] == m['meant'] for m in mine)} of {len(mine)}")
    return f" By itself, the model left as it is, it found the label {', '.join(parts)}." if parts else ""


def section(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The page's section."""
    models = [m | {"suite": r["suite"]} for r in runs for m in r["models"]]
    text = [
        HEAD,
        "",
        "Written by `docs/labels.py`: the label that most of the generator's images got, in repairs that begin with "
        f"this inversion. {conclusion(models)}{alone(models)} A model counts as purified at an O-ASR of at most 20 %. "
        "Rows of one model, such as those of a sweep over what comes after the inversion, share their inversion.",
        "",
        "| suite | cell | found | of the clean rows | attacker's | C-Acc | O-ASR | flags |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in sorted(models, key=lambda m: (m["suite"], m["cell"])):
        meant = "" if m["meant"] is None else m["meant"]
        asr = "" if m["asr"] is None else f"{100 * m['asr']:.1f}"
        c_acc = "" if m["c_acc"] is None else f"{100 * m['c_acc']:.1f}"
        shares = f"{100 * m['share']:.1f} % | {meant} | {c_acc} | {asr}"
        flags = m["flag"].replace(";", ", ")
        text.append(f"| {m['suite']} | {m['cell']} | {m['found']} | {shares} | {flags} |")
    told = "; ".join(f"`{r['command']}` ({machine(r)})" for r in runs)
    return [*text, "", f"From {told}. All figures: [inverted-labels.json](../measured/inverted-labels.json).", ""]


def main() -> int:
    """Add a run, unless the page alone is wanted, and write the section."""
    known = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    if sys.argv[1:] != ["--again"]:
        command, store, *runs = sys.argv[1:]
        known = [r for r in known if r["command"] != command]
        rows = read_table(Path(runs[0]) / "measurements.parquet")
        about = provenance(Path(runs[0]), rows) | {"methods": methods(Path(runs[0]))}
        about["methods"] = {k: v for k, v in about["methods"].items() if k.partition("/")[2] in (ALONE, *REPAIRS)}
        models = [m for run in runs for m in found(Path(store), Path(run))]
        known.append({"command": command} | about | {"models": models})
        known.sort(key=lambda r: r["command"])
        FILE.write_text(json.dumps({"runs": known}, indent=1) + "\n")
    before, _, after = PAGE.read_text().partition(HEAD + "\n")
    rest = after.partition("\n## ")[2]
    PAGE.write_text(before + "\n".join(section(known)) + f"\n## {rest}")
    print(f"wrote {HEAD[3:].lower()} of docs/methods/bti.md from {len(known)} runs")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or (sys.argv[1] != "--again" and len(sys.argv) < 4):
        sys.exit(__doc__)
    sys.exit(main())
