"""Runs a method's evidence on real data and writes it beside the published figures: `make measure METHOD=kind/id`.

A repair: suite `paper-safety-cpu` (Fashion-MNIST and CIFAR-10, 10,000 rows each, small_cnn), BadNets and Blended at
5 %, three seeds, beside `bn_refresh` and, unless it is a control itself, `ft_same_budget:ID`: fine-tuning with as many
images. Another defense, a wrapper or an evaluator: suite `cpu` on
CIFAR-10 (10,000 rows, small_resnet), the same attacks, seeds 0 and 1. Both with the method's published steps, or, of a
defense that would take more than ten core-minutes, those of its preset `reduced` (docs/presets.md; `--published` for
the published ones). An attack: suite `attacks-colour` (CIFAR-10, 10,000 rows, small_cnn, at 10 %, with clean labels at
5 %), seed 0, beside a clean model.

Writes docs/measured/<kind>-<id>.json and the section `## Measured` of docs/methods/<id>.md; an attack's figures join
those of the other attacks, docs/attacks-cifar10.md (docs/attack_pages.py). What the store holds already is not computed
again, so several methods share their attacked models.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attack_pages
from record import aged, machine, provenance

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table

DOCS = Path(__file__).resolve().parent
ATTACKS = ("none", "badnets", "blended")
ATTACKS_PAGE = "attacks-cifar10"
SHARES = (
    *("c_acc_attacked", "asr_attacked", "c_acc", "asr", "r_acc", "p_asr_ra", "p_asr_net", "det_flag", "label_tpr"),
    *("label_fpr", "reasr", "reasr_clean", "mask_iou", "input_auroc", "input_tpr_fpr1", "input_tpr_fpr5"),
    *("asr_oracle", "c_acc_oracle"),
)
"""Shown in %."""
PLAIN = (
    *("det_score", "apd", "apd_raw", "apd_rel", "psnr", "ssim", "linf", "ra_k"),
    *("cost_forwards", "cost_backwards", "cost_queries", "cpu_seconds", "wake_cost", "bba_queries"),
)
ATTACKED = ("c_acc_attacked", "asr_attacked")
DEFENDED = ("c_acc", "asr")
"""What an evaluator's table has of its cells beside its own figures."""
KEPT = ("cell", "scope", "evaluator", "metric", "qualifier", "value", "count", "total", "status", "reason", "flag")
KEPT += ("cpu_seconds",)  # the time of a defense, on its cost
USUAL = {"qualifier": "", "reason": "", "flag": "", "status": "ok", "scope": "cell"}
"""What a row of a JSON has where it does not say."""
HEAD = "## Measured"
SUPPLIERS = {"model": "ft", "verdict": "neural_cleanse", "inverted": "neural_cleanse", "scores": "strip"}
"""Part of an outcome -> a defense that has it, for an evaluator that measures it."""
PRESET = "reduced"
_TOGETHER = 3
UNMATCHED = {"ft", "ft_same_budget", "bn_refresh", "distil_fresh", "scratch_on_clean", "input_noise"}
"""Repairs without fine-tuning of the same budget beside them: itself, other controls, and one that trains nothing."""
LASTING = ("accuracy", "cost", "ra", "ra_budget", "selection")
"""What is measured of a repair."""
UNDERNEATH = frozenset({"bec", "target_shift"})
"""Evaluators whose figures of a defense stand in the findings, beside their controls."""


def controls(kind: str, name: str) -> list[str]:
    """What stands beside a method in its table.

    Of a repair new BatchNorm statistics and as much fine-tuning, of a cleansing the model trained on what it left.
    """
    if kind != "defense" or name == "bn_refresh":
        return []
    outer = Registry.discover("none").chain("defense", name)[0]
    if outer.blueprint.info["kind"] == "cleansing":
        return [f"retrain:{name}"]
    if outer.blueprint.info["kind"] != "repair":
        return []
    # What knows the attack (track T4) is a control, whatever it costs.
    matched = outer.id not in UNMATCHED and outer.blueprint.access.track() != "T4"
    return ["bn_refresh", *([f"ft_same_budget:{name}"] if matched else [])]


def repairs(kind: str, name: str) -> bool:
    """Whether the method is a repair by itself, which suite paper-safety-cpu asks whether it lasts."""
    if kind != "defense" or ":" in name:
        return False
    return Registry.discover("none").get("defense", name).blueprint.info["kind"] == "repair"


def command(kind: str, name: str, seeds: str, *, published: bool = False) -> list[str]:
    """The arguments of `sleeperbench` that measure a method."""
    if kind == "attack":
        attacks = ["none", name] if name != "none" else ["none"]
        return ["run", "attacks-colour", *_flags("attack", attacks), "--seeds", seeds, "--keep-unimplanted"]
    attacks = list(ATTACKS)
    defenses = ["none", "clean_model", *controls(kind, name)] if kind == "defense" else ["none"]
    if kind == "defense" and name not in defenses:
        defenses.append(name)
    evaluators = [*LASTING] if repairs(kind, name) else []
    if kind == "evaluator":
        evaluators = sorted({"accuracy", name})
        needs = Registry.discover("none").get("evaluator", name).blueprint.needs
        parts = needs.outcome if needs.scope == "cell" else ()
        defenses += sorted({SUPPLIERS[part] for part in parts if part in SUPPLIERS})
    place = ["paper-safety-cpu"] if repairs(kind, name) else ["cpu", "--dataset", "cifar10"]
    argv = ["run", *place, "--seeds", seeds, "--keep-unimplanted"]
    for flag, values in (("attack", attacks), ("defense", defenses), ("evaluator", evaluators)):
        argv += _flags(flag, values)
    preset = "published" if published else PRESET  # suites name presets too
    for each in (name, *controls(kind, name)) if kind == "defense" else ():
        chain = Registry.discover("none").chain("defense", each)
        if any(PRESET in p.blueprint.info.get("presets", {}) for p in chain):
            argv += ["--set", f"defense.{each}.preset={preset}"]
    return argv


def _flags(name: str, values: Iterable[str]) -> list[str]:
    return [part for v in values for part in (f"--{name}", v)]


def plugin(label: str | None) -> str:
    """The id in a row's label, which has a digest where the parameters are not the suite's."""
    return (label or "").partition("~")[0]


def draw(row: Mapping[str, Any]) -> str:
    """Which repetition a row is of; empty for a figure over all."""
    found = re.search(r"\bdraw=(\d+)", row["qualifier"])
    return found[1] if found else ""


def collect(run: Path, kind: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance, and the rows of a run that speak of the method."""
    rows = read_table(run / "measurements.parquet")
    begun = {r["seed"] for r in rows if r["value"] is not None}
    rows = [r for r in rows if r["seed"] in begun]  # a folder may have been planned with more
    if kind == "evaluator":
        rows = [r for r in rows if r["evaluator"] == name]
        told = {r["cell"] for r in rows if r["value"] is not None}
        # Why a repaired model has no figure is told, unless nothing was attacked.
        attacked = {r["cell"] for r in rows if r["defense"] != "none" and plugin(r["attack"]) != "none"}
        rows = [r for r in rows if r["cell"] in told | attacked]
        if len({d for r in rows if (d := draw(r))}) == 1:  # one draw alone is its mean, which has a row
            rows = [r for r in rows if not draw(r)]
    else:
        known = {name, *controls(kind, name)}
        rows = [r for r in rows if plugin(r[kind]) in known and r["evaluator"] not in UNDERNEATH]
        if not any(r["metric"] == "det_flag" and r["value"] is not None for r in rows):  # it judges no model
            rows = [r for r in rows if r["scope"] != "zoo"]
    if repairs(kind, name):
        shown = [r for r in rows if not r["qualifier"] or r["metric"].endswith("_path")]
        rows = [r for r in shown if r["evaluator"] in LASTING]
    own = rows if kind == "evaluator" else [r for r in rows if plugin(r[kind]) == name]
    if not own:
        sys.exit(f"{run} has no rows of {kind} `{name}`")
    # What a cell is flagged for beside its neighbours, such as `collapsed`, stands in the other table alone.
    beside = {c["cell"]: c["flag"] for c in read_table(run / "cells.parquet")}

    def flags(r: Mapping[str, Any]) -> str:
        return ";".join(sorted({*r["flag"].split(";"), *beside.get(r["cell"], "").split(";")} - {""}))

    about = provenance(run, rows)
    if kind == "evaluator":
        about["methods"] |= {f"evaluator/{name}": own[0]["method_version"]}
    return about, [r | {"flag": flags(r)} for r in rows]


def _lines(rows: list[dict[str, Any]], attacked: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Cell -> its figures without qualifier, its flags, or why it has no figure, and the undefended model's figures."""
    lines: dict[str, dict[str, Any]] = {}
    told = {r["cell"] for r in rows if r["value"] is not None}
    for r in rows:
        line = lines.setdefault(r["cell"], {"flags": r["flag"]})
        if r["cell"] not in told:
            why = r["reason"].partition(":")[0]
            line["flags"] = ";".join(sorted({*line["flags"].split(";"), why} - {""}))
        if not r["qualifier"] and r["value"] is not None:
            line[r["metric"]] = r["value"]
            if r["metric"] == "cost_forwards":  # whose row carries the defense's own time
                line["cpu_seconds"] = r["cpu_seconds"]
    for cell, line in lines.items():
        line |= attacked.get(cell, {})
    return lines


def table(lines: dict[str, dict[str, Any]], *, several: bool) -> list[str]:
    """One line per cell: its figures, in the order above; of `several` runs, which one it is of."""
    place = common_place(lines)
    shown = [m for m in (*SHARES, *PLAIN) if any(m in v for v in lines.values())]
    if not any(v.get("cost_queries") for v in lines.values()):
        shown = [m for m in shown if m != "cost_queries"]
    known = {*SHARES, *PLAIN, "flags", "origin"}
    shown += sorted({m for v in lines.values() for m in v} - known)
    head = ["cell", *shown, "flags", *(["run"] if several else [])]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell, mine in over_seeds(lines).items():
        told = [[_shown(m, line.get(m)) or "–" for line in mine] for m in shown]
        values = [("" if each[0] == "–" else each[0]) if len(set(each)) == 1 else ", ".join(each) for each in told]
        flags = sorted({f for line in mine for f in line["flags"].split(";")} - {""})
        ends = [";".join(flags), *([", ".join(sorted({str(line["origin"]) for line in mine}))] if several else [])]
        text.append("| " + " | ".join([cell.removeprefix(place), *values, *ends]) + " |")
    return text


def over_seeds(lines: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its line; three seeds or more of one cell stand in one line, in the order of seeds."""
    found: dict[str, list[str]] = {}
    for cell in sorted(lines, key=lambda c: (c.rpartition("/s")[0], int(c.rpartition("/s")[2]))):
        found.setdefault(cell.rpartition("/s")[0], []).append(cell)
    joined: dict[str, list[dict[str, Any]]] = {}
    for name, cells in found.items():
        joined |= {name: [lines[c] for c in cells]} if len(cells) >= _TOGETHER else {c: [lines[c]] for c in cells}
    return joined


def common_place(cells: Iterable[str]) -> str:
    """`dataset/arch/` of cells that share it, which need not say it each; else nothing."""
    places = {"/".join(cell.split("/")[:2]) + "/" for cell in cells}
    return places.pop() if len(places) == 1 else ""


def candidates(rows: list[dict[str, Any]]) -> list[str]:
    """One line per model that the defense chose among, where evaluator `selection` measured them."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for r in rows:
        if r["metric"].endswith("_path") and r["value"] is not None:
            found.setdefault((r["cell"], r["qualifier"]), {})[r["metric"].removesuffix("_path")] = r["value"]
    if not found:
        return []
    place = common_place(cell for cell, _ in found)
    by_cell: dict[str, list[str]] = {}
    for (cell, name), v in sorted(found.items()):
        figures = [_shown(m, v[m]) for m in ("c_acc", "asr") if m in v]
        by_cell.setdefault(cell.removeprefix(place), []).append(f"{name}: {' / '.join(figures)}")
    return [
        "",
        "All candidates, on 2,000 test images each, C-Acc / ASR:",
        "",
        *("| cell | candidates |", "|---|---|"),
        *(f"| {cell} | {', '.join(told)} |" for cell, told in by_cell.items()),
    ]


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if metric in PLAIN else f"{100 * value:.1f}"


def write(runs: list[Path], kind: str, name: str, said: str, *, keep: bool) -> None:
    """The JSON and the section of the method's page.

    Args:
        runs: Run folders; their rows stand side by side.
        kind: `attack`, `defense` or `evaluator`.
        name: Its id.
        said: The command that made the runs.
        keep: Keep what the JSON has of cells that these runs do not, under `earlier`.
    """
    file = f"{kind}-{name.replace(':', '-')}"
    target = DOCS / "measured" / f"{file}.json"
    collected = [collect(run, kind, name) for run in runs]
    about, rows = collected[0][0], [{k: r[k] for k in KEPT} for _, rows in collected for r in rows]
    for other, _ in collected[1:]:  # runs on different data sets stand side by side
        for key in ("datasets", "train_rows", "methods"):
            about[key] |= other[key]
    cells = [c for run in runs for c in read_table(run / "cells.parquet") if c["defense"] != "none"]
    beside = (*ATTACKED, *(DEFENDED if kind == "evaluator" else ()))
    attacked = {c["cell"]: {k: c[k] for k in beside if c.get(k) is not None} for c in cells}
    about["attacked"] = {r["cell"]: attacked[r["cell"]] for r in rows if attacked.get(r["cell"])}
    earlier: list[dict[str, Any]] = []
    if keep and target.exists():
        before = stored(target)
        known = {r["cell"] for r in rows}
        for part in (before, *before.pop("earlier", [])):
            part["measurements"] = [r for r in part["measurements"] if r["cell"] not in known]
            known |= {r["cell"] for r in part["measurements"]}
            if part["measurements"]:
                earlier.append(part)
    out = {"command": said} | about | {"measurements": rows} | ({"earlier": earlier} if earlier else {})
    for part in (out, *earlier):
        part["measurements"] = [dense(r, kind) for r in part["measurements"]]
    # A row is a line, without what is usual in it, so that a file stays below the megabyte that it may have here.
    text = json.dumps(out, indent=1)
    target.write_text(re.sub(r"\n +\{(\n [^{}]*)\}", lambda m: "\n  " + _one_line(m[0]), text) + "\n")
    show(kind, name)


def _one_line(row: str) -> str:
    return json.dumps(json.loads(row), separators=(",", ":"))


def dense(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A row without what `USUAL` says, figures to nine digits; seconds where they are a defense's own."""
    known = {"evaluator"} if kind == "evaluator" else set()
    if not row["metric"].startswith("cost_"):
        known.add("cpu_seconds")
    row = {k: v for k, v in row.items() if k not in known}
    told = {k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in row.items()}
    return {k: v for k, v in told.items() if v != USUAL.get(k)}


def stored(file: Path) -> dict[str, Any]:
    """What `write` wrote, with what `dense` left out of a row."""
    found: dict[str, Any] = json.loads(file.read_text())
    for part in (found, *found.get("earlier", [])):
        part["measurements"] = [dict.fromkeys(KEPT) | USUAL | r for r in part["measurements"]]
    return found


def show(kind: str, name: str) -> None:
    """The section of the method's page, from its JSON."""
    file = f"{kind}-{name.replace(':', '-')}"
    out = stored(DOCS / "measured" / f"{file}.json")
    parts = [out, *out.get("earlier", [])]
    page = DOCS / "methods" / f"{name.replace(':', '-')}.md"
    if not page.exists() and ":" in name:
        page = DOCS / "methods" / f"{name.partition(':')[0]}.md"
    before_it = page.read_text().partition(f"\n{HEAD}")[0].rstrip()
    text, registry, lines = [before_it, "", HEAD, ""], Registry.discover("none"), {}
    for n, part in enumerate(parts, 1):
        number = f"{n}. " if len(parts) > 1 else ""
        text += [" ".join([f"{number}`{part['command']}`", _source(part), *aged(part["methods"], registry)]), ""]
        for cell, line in _lines(part["measurements"], part["attacked"]).items():
            lines[cell] = line | {"origin": n}
    told = [r for part in parts for r in part["measurements"]]
    if any(len(mine) > 1 for mine in over_seeds(lines).values()):
        text += [
            "Three seeds or more in one cell, in their order; one figure where all are equal, – where there is none.",
            "",
        ]
    text += [*table(lines, several=len(parts) > 1), *candidates(told)]
    text += ["", f"All rows: [{file}.json](../measured/{file}.json)."]
    page.write_text("\n".join(text) + "\n")
    print(f"wrote {page.relative_to(DOCS.parent)} from docs/measured/{file}.json")


def _source(about: dict[str, Any]) -> str:
    """What a run was made of, in a sentence or two."""
    found = {m[1] for r in about["measurements"] if (m := re.search(r"@([\d.]+)", r["cell"]))} - {"0"}
    rates = ", ".join(f"{100 * float(x):g}" for x in sorted(found, key=float))
    said = [f"{n}, {rows:,} rows" for n, rows in about["train_rows"].items()]
    parts = [
        *said,
        f"{about['recipe']['epochs']} epochs",
        *([f"rate {rates} %"] if rates else []),
    ]
    notes = [
        f"The copy of {n} differs from its release: {d['note']}." for n, d in about["datasets"].items() if d["note"]
    ]
    whole = f"(suite `{about['suite']}`: {', '.join(parts)}), {machine(about)}. Shares in %. {' '.join(notes)}"
    return whole.strip()


def main() -> int:
    """Run, unless a run folder is given, and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("method", help="kind/id, such as defense/anp or defense/unlearn:neural_cleanse")
    p.add_argument("--seeds", default="", help="default 0,1; of a repair 0,1,2, of an attack 0")
    p.add_argument("--published", action="store_true", help="the published effort, also where there is a preset")
    p.add_argument("--out", type=Path, default=Path("runs/measure"), help="folder of run folders and their store")
    p.add_argument("--run", type=Path, nargs="+", help="take the figures of these run folders and compute nothing")
    p.add_argument("--keep", action="store_true", help="keep the figures of cells that are not measured now")
    p.add_argument("--again", action="store_true", help="write the page anew from the JSON and compute nothing")
    p.add_argument("--command", default="", help="with --run: the command that made it, to stand beside the figures")
    args = p.parse_args()
    kind, _, name = args.method.partition("/")
    if kind not in ("attack", "defense", "evaluator") or not name:
        p.error(f"{args.method}: write attack/ID, defense/ID or evaluator/ID")
    if args.again:
        attack_pages.shown() if kind == "attack" else show(kind, name)
        return 0
    usual = "0" if kind == "attack" else "0,1,2" if repairs(kind, name) else "0,1"
    argv = command(kind, name, args.seeds or usual, published=args.published)
    runs = args.run or [args.out / f"{kind}-{name.replace(':', '-')}"]
    if args.run is None:
        whole = [sys.executable, "-m", "sleeperbench", *argv, "--no-site", "--out", str(runs[0])]
        code = subprocess.run(whole).returncode
        if code not in (0, 1):
            return code
    said = args.command or "sleeperbench " + " ".join(argv)
    if kind == "attack":
        attack_pages.written(ATTACKS_PAGE, [(run, said) for run in runs], keep=True)
    else:
        write(runs, kind, name, said, keep=args.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
