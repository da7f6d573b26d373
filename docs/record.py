"""Writes what a run measured into docs/measured: one JSON with provenance, one table to read.

`python docs/record.py RUN NAME "COMMAND"` writes docs/measured/NAME.json and NAME.md from the run's tables alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table

ROOT = Path(__file__).resolve().parent / "measured"
SHOWN = ("c_acc", "asr", "r_acc", "der", "p_asr_ra", "p_asr_net", "c_acc_ra", "cover_acc", "input_auroc", "reasr")
PLAIN = ("det_score", "det_flag", "silhouette", "apd_rel")
"""Columns that are no shares. A column stands where a cell has a figure."""
CONTROLS = ("clean_model", "clean_defended", "placebo", "k0")


def record(run: Path, name: str, command: str) -> None:
    """Write both files."""
    cells = read_table(run / "cells.parquet")
    rows = read_table(run / "measurements.parquet")
    kept = ("cell", "evaluator", "metric", "qualifier", "value", "count", "total", "lower", "upper", "status", "reason")
    out = {"command": command} | provenance(run, rows) | spent(run)
    figures = [json.dumps({k: r[k] for k in kept if r[k] is not None}) for r in rows]
    ROOT.mkdir(exist_ok=True)
    # A figure is a line: with a line per key the file of suite quick would be above a megabyte.
    head = json.dumps(out, indent=1).removesuffix("\n}")
    body = ",\n  ".join(figures)
    (ROOT / f"{name}.json").write_text(f'{head},\n "measurements": [\n  {body}\n ]\n}}\n')
    (ROOT / f"{name}.md").write_text(_page(name, out, cells, rows))


def provenance(run: Path, rows: list[dict]) -> dict:
    """Where figures come from: suite, versions, machine, data, recipe, and the time their evaluation took."""
    about = json.loads((run / "run.json").read_text())
    env = json.loads(next(r["env"] for r in rows if r["env"]))
    env.pop("source", None)  # of one method alone
    spent = (r for r in rows if r["evaluator"] != "cost")  # its rows carry the defense's own time
    cpu = {r["task_key"]: r["cpu_seconds"] for r in spent if r["cpu_seconds"] is not None}
    return {
        "suite": about["suite"]["name"],
        "protocol": about["protocol"],
        "versions": env,
        "host": about["host"],
        "datasets": about["datasets"],
        "train_rows": {
            n: about["suite"]["dataset_rows"].get(n, {}).get("train") or d["rows"]["train"]
            for n, d in about["datasets"].items()
        },
        "recipe": about["suite"]["recipe"],
        "methods": methods(run),
        "evaluation_core_seconds": round(sum(cpu.values())),
    }


def combined(runs: Sequence[Path], rows: Sequence[Mapping[str, Any]], metrics: Collection[str]) -> dict[str, Any]:
    """Provenance of runs that are read as one: the first's, with the methods and the evaluation time of all.

    Args:
        runs: Run folders of one suite.
        rows: The measurements of all of them.
        metrics: Those that are used; the evaluators that gave them stand with the methods.
    """
    found: dict[str, set[int]] = {}
    for run in runs:
        for method, version in methods(run).items():
            found.setdefault(method, set()).add(version)
    for r in rows:
        if r["metric"] in metrics and r["value"] is not None:
            found.setdefault(f"evaluator/{r['evaluator']}", set()).add(r["method_version"])
    return provenance(runs[0], list(rows)) | {
        "methods": {m: next(iter(v)) if len(v) == 1 else sorted(v) for m, v in sorted(found.items())}
    }


def spent(run: Path) -> dict[str, int]:
    """Core-seconds of all tasks that the run computed, and seconds from the first one's start to the last one's end."""
    file = run / "tasks.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {x["key"]: x for x in lines if x["result"]}.values()
    if not done:  # all of it lay in the store
        return {}
    return {
        "tasks": len(done),
        "task_core_seconds": round(sum(x["result"].get("cpu_seconds") or 0 for x in done)),
        "task_wall_seconds": round(max(x["time"] for x in done) - min(x["result"]["started"] for x in done)),
    }


def methods(run: Path) -> dict[str, int]:
    """kind/id -> version of the attacks and defenses that a run used."""
    used = json.loads((run / "plugins.json").read_text())
    return {f"{p['kind']}/{p['id']}": p["method_version"] for p in used if p["kind"] in ("attack", "defense")}


def older(versions: Mapping[str, int | list[int]], registry: Registry) -> list[str]:
    """Built-in methods whose version has risen since a run, by kind/id; several versions where runs differ."""
    found = []
    for method, version in sorted(versions.items()):
        kind, _, name = method.partition("/")
        outer = name.partition(":")[0]
        now = {p.id: p.blueprint.info["version"] for p in registry.of(kind) if p.id == outer}
        had = version if isinstance(version, list) else [version]
        if outer in now and had != [now[outer]]:
            told = " and ".join(filter(None, (", ".join(map(str, had[:-1])), str(had[-1]))))
            found.append(f"`{name}` ({told}, now {now[outer]})")
    return found


def aged(versions: Mapping[str, int | list[int]], registry: Registry) -> list[str]:
    """The sentence of a page whose run had earlier versions; nothing where it had none."""
    old = older(versions, registry)
    return [f"Measured with an earlier version of {', '.join(old)}."] if old else []


def machine(about: Mapping[str, Any]) -> str:
    """What computed a run, from its provenance: torch, kind of processor."""
    v = about["versions"]
    return f"torch {v['torch']}, {v['machine']} {v['cpu']}"


def cause(reason: str) -> str:
    """Why there is no figure; of a step whose input failed, why that did, however many steps lie between.

    The names of these steps, which no two seeds share, are left out, and the ASR beside `attack_did_not_implant`, which
    is a mean over the seeds that a step waited for.
    """
    found = re.sub(r"^(input_failed: (?:(?!: ).)*: )+", "", reason)
    return found.partition(":")[0] if found.startswith("attack_did_not_implant:") else found


def _page(name: str, out: dict, cells: list[dict], rows: list[dict]) -> str:
    text = [f"# Measured: {name}", "", f"`{out['command']}`", ""]
    host, v = out["host"], out["versions"]
    where = f"{host['cores']} cores ({host['machine']}, {v['cpu']}), torch {v['torch']}, Python {v['python']}"
    text.append(f"{where}. Shares in %.")
    if "tasks" in out:
        took = f"{out['task_core_seconds']} core-seconds, {out['task_wall_seconds']} seconds from the first to the last"
        text[-1] += f" The {out['tasks']} tasks that it computed took {took}."
    named = {m.partition("/")[2]: v for m, v in sorted(out["methods"].items())}  # `none` is of both kinds
    versions = ", ".join(f"{name} {v}" for name, v in named.items())
    text.append(f"Versions of attacks and defenses: {versions}.")
    for n, d in out["datasets"].items():
        if not d["canonical"]:
            text.append(f"The copy of {n} differs from its release: {d['note']}.")
    controls: dict[tuple[str, str], float] = {}
    figures: dict[tuple[str, str], float] = {}
    for r in rows:
        if not r["qualifier"] and r["value"] is not None:
            figures[r["cell"], r["metric"]] = r["value"]
        if r["metric"] == "p_asr_ra" and r["qualifier"].startswith("control=") and r["value"] is not None:
            controls[r["cell"], r["qualifier"].removeprefix("control=")] = r["value"]
    measured = {metric for _, metric in figures}
    shares, plain = [m for m in SHOWN if m in measured], [m for m in PLAIN if m in measured]
    asked = CONTROLS if controls else ()
    head = ["cell", *shares, *(f"RA: {c}" for c in asked), *plain, "flags"]
    text += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for c in cells:
        values = [figures.get((c["cell"], m)) for m in shares] + [controls.get((c["cell"], k)) for k in asked]
        shown = ["" if x is None else f"{100 * x:.1f}" for x in values]
        own = [figures.get((c["cell"], m)) for m in plain]
        shown += ["" if x is None else f"{x:.3g}" for x in own]
        text.append("| " + " | ".join([c["cell"], *shown, c["flag"]]) + " |")
    budgets = [r for r in rows if r["metric"] == "ra_k"]
    if budgets:
        text += ["", "RA's number of poisoned images, by the rule on clean models:", ""]
        for r in budgets:
            k = f"none: {r['reason']}" if r["value"] is None else f"k = {r['value']:.0f}"
            text.append(f"- {r['cell']}: {k}")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    record(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
