"""Writes docs/zoo.md and its JSON from runs of suites `zoo*`: `python docs/zoo.py NAME "COMMAND" RUN [RUN ...]`.

How well each detector tells backdoored models from clean ones, at its own threshold and whatever the threshold; and
of runs of suite `zoo-inputs`, how well each tells triggered inputs from clean ones.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from record import aged, combined, machine

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table

DOCS = Path(__file__).resolve().parent
FIELDS = ("cell", "dataset", "defense", "metric", "qualifier", "value", "count", "total", "lower", "upper", "reason")
BESIDE = {
    "det_tpr_fpr5": "TPR at 5 % FPR",
    "det_fpr_fpr5": "FPR there",
    "det_missing": "backdoored without verdict",
    "det_missing_clean": "clean without verdict",
}
"""Columns of figures that tables before version 4 of detection_zoo lack."""
INPUTS = {"input_auroc": "AUROC", "input_tpr_fpr5": "TPR at 5 % FPR"}
"""What is said of detectors of inputs."""


def detectors(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[tuple[str, str], Mapping[str, Any]]]:
    """(data set, detector) -> its figures over the zoo, by (metric, qualifier), of those that judge models."""
    found: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for r in rows:
        if r["scope"] == "zoo" and r["metric"].startswith("det_"):
            found.setdefault((r["dataset"], r["defense"]), {})[r["metric"], r["qualifier"]] = r
    judged = (kv for kv in sorted(found.items()) if (row := kv[1].get(("det_tpr", ""))) and row["value"] is not None)
    return dict(judged)


def share(row: Mapping[str, Any] | None) -> str:
    """A share in % with its 95 % interval."""
    if row is None or row["value"] is None:
        return ""
    text = f"{100 * row['value']:.1f}"
    return text if row["lower"] is None else f"{text} ({100 * row['lower']:.0f} to {100 * row['upper']:.0f})"


def bounded(figures: Mapping[tuple[str, str], Mapping[str, Any]], metric: str, at: str = "") -> str:
    """A figure in %, with the bounds that stand in rows of their own; those of attack `at`, or pooled."""
    row = figures.get((metric, at))
    if row is None:
        return ""
    ends = {end: figures.get((metric, f"{at};stat={end}".lstrip(";"))) for end in ("lower", "upper")}
    return share({**row, **{name: end["value"] for name, end in ends.items() if end is not None}})


def beside(
    found: Mapping[tuple[str, str], Mapping[tuple[str, str], Mapping[str, Any]]],
) -> dict[str, str]:
    """Metric -> title of those of `BESIDE` that some detector has a figure of."""
    had = {metric for figures in found.values() for (metric, _), row in figures.items() if row["value"] is not None}
    return {metric: title for metric, title in BESIDE.items() if metric in had}


def kinds(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Label of a kind of clean models -> what was done to them."""
    found = {}
    for c in cells:
        if c["attack"].partition("~")[0] == "none":
            given = {k: v for k, v in json.loads(c["attack_params"]).items() if v}
            found[c["attack"]] = " + ".join(f"{k} {100 * v:g} %" for k, v in sorted(given.items())) or "plain"
    return found


def absent(cells: Sequence[Mapping[str, Any]]) -> str:
    """The attacks that did not implant, with the reason; a suite decides over its own seeds."""
    out: dict[tuple[str, str, str, str], set[int]] = {}
    for c in cells:
        if c["reason"].startswith("attack_did_not_implant"):
            place = (c["dataset"], c["attack"], c["suite"], c["reason"].partition(": ")[2])
            out.setdefault(place, set()).add(c["seed"])
    told = []
    for (dataset, attack, suite, reason), seeds in sorted(out.items()):
        there = sorted({c["suite"] for c in cells if (c["dataset"], c["attack"]) == (dataset, attack)} - {suite})
        beside = f"; over the seeds of `{', '.join(there)}` it implanted, and stands there" if there else ""
        told.append(f"{attack} on {dataset} in suite `{suite}` ({reason} over {len(seeds)} seeds{beside})")
    return "; ".join(told)


def took(
    rows: Sequence[Mapping[str, Any]], done: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str], tuple[float, float]]:
    """(data set, detector) -> core-seconds per model, and those prepared once for all models of a seed; medians.

    A model's are what evaluator `cost` has of it, less preparation, which counts there in full, or else those of the
    detector's own tasks `done`.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        if r["metric"] == "cost_forwards" and not r["qualifier"] and r["value"] is not None:
            found.setdefault((r["dataset"], r["defense"]), []).append(r["cpu_seconds"])
    own: dict[str, dict[tuple[str, str], list[float]]] = {"defense": {}, "prepare": {}}
    for line in done:
        if line["kind"] in own and line["status"] == "ok":
            place = (line["name"].partition("/")[0], line["plugin"])
            own[line["kind"]].setdefault(place, []).append(line["result"]["cpu_seconds"])
    once = {place: statistics.median(each) for place, each in own["prepare"].items()}
    whole = {place: statistics.median(each) - once.get(place, 0.0) for place, each in found.items()}
    alone = {place: statistics.median(each) for place, each in own["defense"].items()}
    return {place: (x, once.get(place, 0.0)) for place, x in (alone | whole).items()}


def timed(seconds: tuple[float, float] | None) -> str:
    """A model's core-seconds, and what was prepared once."""
    if seconds is None:
        return ""
    return f"{seconds[0]:.1f}" + (f" + {seconds[1]:.1f}" if seconds[1] else "")


def latest(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The rows of all runs; of a suite's cell that several have those of the last."""
    of = {(r["suite"], r["cell"]): i for i, table in enumerate(tables) for r in table}
    return [r for i, table in enumerate(tables) for r in table if of[r["suite"], r["cell"]] == i]


def declined(cells: Sequence[Mapping[str, Any]], names: Iterable[str]) -> str:
    """Detectors among `names` that had nothing to say of a backdoored model, with how often and why."""
    told: dict[tuple[str, str], int] = {}
    known = set(names)
    attacked = (c for c in cells if c["attack"].partition("~")[0] != "none" and c["status"] != "ok")
    for c in (c for c in attacked if c["defense"] in known):
        reason = c["reason"].partition(":")[0]
        if reason != "attack_did_not_implant":
            told[c["defense"], reason] = told.get((c["defense"], reason), 0) + 1
    return ", ".join(f"{d} on {n} models (`{reason}`)" for (d, reason), n in sorted(told.items()))


def inputs(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The figures of detectors of inputs, one per model."""
    return [r for r in rows if r["metric"] in INPUTS and not r["qualifier"] and r["value"] is not None]


def by_model(rows: Sequence[Mapping[str, Any]], seconds: Mapping[tuple[str, str], tuple[float, float]]) -> list[str]:
    """A line per detector of inputs: the mean over models, and of each attack with the lowest and the highest model."""
    attacks = sorted({r["attack"] for r in rows})
    heads = [f"{title}, {a}" for title in INPUTS.values() for a in attacks]
    text = ["| data set | detector | models | " + " | ".join([*INPUTS.values(), *heads]) + " | core-seconds a model |"]
    text.append("|---" * (4 + len(INPUTS) + len(heads)) + "|")
    for place in sorted({(r["dataset"], r["defense"]) for r in rows}):
        own = [r for r in rows if (r["dataset"], r["defense"]) == place]
        each = {
            m: {a: [100 * r["value"] for r in own if (r["metric"], r["attack"]) == (m, a)] for a in attacks}
            for m in INPUTS
        }
        whole = [statistics.fmean(v for of in each[m].values() for v in of) for m in INPUTS]
        parts = [
            f"{statistics.fmean(of):.1f} ({min(of):.0f} to {max(of):.0f})" if of else ""
            for m in INPUTS
            for of in each[m].values()
        ]
        cost = timed(seconds.get(place))
        models = str(len({r["cell"] for r in own}))
        text.append("| " + " | ".join([*place, models, *(f"{x:.1f}" for x in whole), *parts, cost]) + " |")
    return text


def main() -> int:
    """Write both files."""
    name, command, *folders = sys.argv[1:]
    runs = [Path(f) for f in folders]
    rows, cells = (
        latest([read_table(run / f"{table}.parquet") for run in runs]) for table in ("measurements", "cells")
    )
    found, clean, seen = detectors(rows), kinds(cells), inputs(rows)
    about = combined(runs, rows, {metric for figures in found.values() for metric, _ in figures} | INPUTS.keys())
    flags: dict[tuple[str, str], set[str]] = {}
    for c in (c for c in cells if c["status"] == "ok"):
        flags.setdefault((c["dataset"], c["defense"]), set()).update(filter(None, c["flag"].split(";")))
    done = (json.loads(text) for run in runs for text in (run / "tasks.jsonl").read_text().splitlines())
    seconds = took(rows, done)
    out = [{k: r[k] for k in FIELDS} for r in (*(r for f in found.values() for r in f.values()), *seen)]
    (DOCS / "measured" / f"{name}.json").write_text(
        json.dumps({"command": command} | about | {"clean_kinds": clean, "rows": out}, indent=1) + "\n"
    )
    names = dict(sorted(clean.items(), key=lambda kv: (kv[1] != "plain", kv[1])))
    head = ["data set", "detector", "models", "AUROC", "balanced accuracy", "TPR", "FPR"]
    head += [*(f"FPR {said}" for said in names.values())]
    more = beside(found)
    head += [*more.values(), "core-seconds a model", "flags"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    qualifiers = {q for f in found.values() for _, q in f if q.startswith("attack=") and ";" not in q}
    attacks = sorted(q.removeprefix("attack=") for q in qualifiers)
    by_attack = ["| data set | detector | " + " | ".join(attacks) + " |", "|---" * (2 + len(attacks)) + "|"]
    for (dataset, detector), f in found.items():
        models = f"{f['det_tpr', '']['total']} + {f['det_fpr', '']['total']}"
        cost = timed(seconds.get((dataset, detector)))
        apart = [share(f.get(("det_fpr", f"clean={label}"))) for label in names]
        figures = [
            *(bounded(f, m) for m in ("det_auroc", "det_bacc")),
            *(share(f[m, ""]) for m in ("det_tpr", "det_fpr")),
        ]
        figures += [*apart, *(share(f.get((m, ""))) for m in more), cost]
        figures.append("; ".join(sorted(flags.get((dataset, detector), set()))))
        text.append("| " + " | ".join([dataset, detector, models, *figures]) + " |")
        per_attack = [bounded(f, "det_auroc", f"attack={a}") for a in attacks]
        by_attack.append("| " + " | ".join([dataset, detector, *per_attack]) + " |")
    page = [
        *(
            "# Detectors over a zoo of models",
            "",
            "Written by `docs/zoo.py` from the tables of:",
            "",
            f"`{command}`",
            "",
        ),
        f"{machine(about)}, {about['recipe']['epochs']} epochs. In %, with 95 % intervals: Newcombe's for AUROC, "
        "Wilson's for shares, and for balanced accuracy Newcombe's of a difference of shares. The thresholds are the "
        "methods' own and were fixed before any model of the zoo was trained; Neural Cleanse's way from masks to a "
        "score changed after that (version 2), when version 1 had been seen on such a zoo. `reduced` is one that ran "
        "with less than its published effort. Behind a plus: what is prepared once for all models of a seed."
        + " TPR at 5 % FPR is at a threshold from the clean models of every other seed, on those of the seeds between."
        * ("det_tpr_fpr5" in more),
        "",
        f"Backdoored models are those whose attack implanted. Left out: {absent(cells) or 'none'}.",
        *aged(about.get("methods", {}), Registry.discover("none")),
        *("", *text, "", "AUROC of each attack against all clean models:", "", *by_attack),
        *_of_inputs(seen, seconds, cells),
        *("", f"All rows: [{name}.json](measured/{name}.json)."),
    ]
    (DOCS / "zoo.md").write_text("\n".join(page) + "\n")
    print(f"wrote docs/zoo.md and docs/measured/{name}.json: {len(found)} detectors")
    return 0


def _of_inputs(
    rows: Sequence[Mapping[str, Any]],
    seconds: Mapping[tuple[str, str], tuple[float, float]],
    cells: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The section on detectors of inputs; nothing where none ran."""
    if not rows:
        return []
    said = (
        "Clean and triggered test images, shuffled and unlabelled, on models whose attack implanted. Means over "
        "models, of each attack in brackets the lowest and the highest model. 50 is chance for AUROC, 5 for the other."
    )
    without = declined(cells, {r["defense"] for r in rows})
    more = ["", f"Without figures: {without}."] if without else []
    return ["", "## Detectors of inputs", "", said, "", *by_model(rows, seconds), *more]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main())
