"""Writes docs/sweeps.md and its JSON from runs of a suite `sweep-*`: `python docs/sweeps.py "COMMAND" RUN [RUN ...]`.

What a suite varies (a parameter of an attack or a defense, the poison rate, the architecture) stands across, attacks
and defenses down. `python docs/sweeps.py --again` renders what docs/measured/sweep-*.json hold. A mean is over the
seeds of one cell; P-ASR is that of purified models alone, as everywhere.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from findings import shown
from labels import FILE
from record import aged, cause, combined, machine
from signals import PURIFIED

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table

DOCS = Path(__file__).resolve().parent
METRICS = {"c_acc": "C-Acc", "asr": "O-ASR", "p_asr": "P-ASR of purified models"}
FACTS = ("dataset", "arch", "attack", "defense", "rate", "seed", *METRICS, "flag", "reason")
RATE, ARCH = "poison rate", "architecture"
Key = tuple[str, str]


def plugin(label: str) -> str:
    """The id in a label, which has a digest where the parameters are not the suite's first ones."""
    return label.partition("~")[0]


def flat(text: str) -> dict[str, Any]:
    """Parameters from a table's JSON, those of a wrapped plugin among the wrapper's."""
    found: dict[str, Any] = json.loads(text or "{}")
    return found | flat(json.dumps(found["inner"])) if isinstance(found.get("inner"), dict) else found


def axis(cells: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """What varies over a run's cells: (`rate`, `arch`, `attack` or `defense`, plugin, name of the value).

    Raises:
        SystemExit: If it is not one thing.
    """
    real = [c for c in cells if plugin(c["attack"]) != "none"]
    found = {("rate", "", RATE)} if len({c["rate"] for c in real}) > 1 else set()
    if len({c["arch"] for c in real}) > 1:
        found |= {("arch", "", ARCH)}
    for kind in ("attack", "defense"):
        forms: dict[str, dict[str, dict[str, Any]]] = {}
        for c in real:
            forms.setdefault(plugin(c[kind]), {})[c[kind]] = flat(c[f"{kind}_params"])
        for name, variants in forms.items():
            keys = {k for p in variants.values() for k in p}
            told = {k: {json.dumps(p.get(k), sort_keys=True) for p in variants.values()} for k in keys}
            found |= {(kind, name, k) for k, values in told.items() if len(values) > 1 and k not in ("inner", "preset")}
    if len(found) != 1:
        sys.exit(f"a sweep varies one thing; here vary {sorted(found) or 'none'}")
    return found.pop()


def collected(runs: Sequence[Path], said: str) -> dict[str, Any]:
    """Provenance and cells of a suite's runs, each with its value on the axis; None where the axis does not touch it.

    Where two runs have a cell, the one named first counts.
    """
    rows = [r for run in runs for r in read_table(run / "measurements.parquet")]
    named: dict[str, dict[str, Any]] = {}
    for run in runs:
        for c in read_table(run / "cells.parquet"):
            named.setdefault(c["cell"], c)
    cells = list(named.values())
    kind, of, name = axis(cells)

    def value(c: Mapping[str, Any]) -> Any:
        if kind in ("rate", "arch"):
            return c[kind]
        return flat(c[f"{kind}_params"]).get(name) if plugin(c[kind]) == of else None

    kept = [{k: c[k] for k in FACTS} | {"value": value(c)} for c in cells if plugin(c["attack"]) != "none"]
    clean = [c["c_acc"] for c in cells if plugin(c["attack"]) == "none" and c["defense"] == "none"]
    return {
        "command": said,
        **combined(runs, rows, METRICS),
        "axis": {"kind": kind, "plugin": of, "name": name},
        "clean_c_acc": [v for v in clean if v is not None],
        "cells": kept,
    }


def values(about: Mapping[str, Any]) -> list[Any]:
    """All values on the axis, numbers in order, words as they came."""
    found = list(dict.fromkeys(c["value"] for c in about["cells"] if c["value"] is not None))
    return sorted(found) if all(isinstance(v, int | float) for v in found) else found


def lines(about: Mapping[str, Any]) -> dict[Key, dict[Any, list[Mapping[str, Any]]]]:
    """(attack, defense) -> value (None: the axis does not touch it) -> cells, one per seed."""
    found: dict[Key, dict[Any, list[Mapping[str, Any]]]] = {}
    for c in about["cells"]:
        found.setdefault((plugin(c["attack"]), plugin(c["defense"])), {}).setdefault(c["value"], []).append(c)
    return dict(sorted(found.items(), key=lambda kv: (kv[0][0], kv[0][1] != "none", kv[0][1])))


def counted(of: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Figures over seeds: of P-ASR those of purified models."""
    there = [c for c in of if c[metric] is not None]
    return [c[metric] for c in there if metric != "p_asr" or (c["asr"] is not None and c["asr"] <= PURIFIED)]


def entry(of: Sequence[Mapping[str, Any]], metric: str) -> str:
    """One field: the figure over seeds, what it is marked for, or why there is none."""
    if not of:
        return ""
    figures = counted(of, metric)
    if not figures:
        if metric == "p_asr" and any(c["asr"] is not None and c["asr"] > PURIFIED for c in of):
            return "not purified"
        return next((told.partition(":")[0] for c in of if (told := cause(c["reason"]))), "")
    few = metric == "p_asr" and len(figures) < len(of)
    text = shown(figures) + (f" ({len(figures)} of {len(of)})" if few else "")
    marks = [(f, sum(f in c["flag"].split(";") for c in of)) for f in ("weak", "collapsed")]
    return text + "".join(f" [{n} {f}]" for f, n in marks if n and metric == "asr")


def tables(about: Mapping[str, Any]) -> list[str]:
    """A table per metric."""
    across, text = values(about), []
    for metric, title in METRICS.items():
        if not any(c[metric] is not None for c in about["cells"]):
            continue
        named = [spelt(about, v) for v in across] + (["any"] if any(None in at for at in lines(about).values()) else [])
        text += ["", f"{title}:", "", f"| attack | defense | {' | '.join(named)} |", "|---" * (2 + len(named)) + "|"]
        for (attack, defense), at in lines(about).items():
            fields = [entry(at.get(v, []), metric) for v in [*across, None]][: len(named)]
            if any(counted(of, metric) for of in at.values()):
                text.append(f"| {attack} | {defense} | {' | '.join(fields)} |")
    return text + without(about)


def without(about: Mapping[str, Any]) -> list[str]:
    """What has no figure at all, with the reasons."""
    told: dict[str, set[str]] = {}
    for (_, defense), at in lines(about).items():
        of = [c for cells in at.values() for c in cells]
        if all(c[m] is None for c in of for m in METRICS):
            told.setdefault(defense, set()).update(filter(None, (cause(c["reason"]) for c in of)))
    if not told:
        return []
    return ["", "Without figures: " + ", ".join(f"{d} ({'; '.join(sorted(r))})" for d, r in sorted(told.items())) + "."]


def spelt(about: Mapping[str, Any], value: Any) -> str:
    """A value of the axis as text."""
    if about["axis"]["kind"] == "rate":
        return f"{100 * value:g} %"
    return f"{value:g}" if isinstance(value, int | float) else str(value).partition(":")[2] or str(value)


def picture(name: str, about: Mapping[str, Any]) -> str:
    """A picture per attack: O-ASR drawn through, C-Acc dashed, means over seeds with the seeds' ends."""
    across, drawn = values(about), lines(about)
    attacks = list(dict.fromkeys(a for a, _ in drawn))
    numbers = all(isinstance(v, int | float) for v in across)
    at = {v: float(v) if numbers else float(i) for i, v in enumerate(across)}
    with plt.rc_context({"svg.hashsalt": name, "font.size": 9, "svg.fonttype": "none"}):
        fig, axes = plt.subplots(1, len(attacks), figsize=(3.6 * len(attacks) + 1.6, 3.4), sharey=True, squeeze=False)
        names = sorted({d for _, d in drawn if any(v is not None for v in drawn_values(drawn, d))})
        names = [
            d for d in names if any(counted(of, "asr") for (_, n), at in drawn.items() if n == d for of in at.values())
        ]
        colours = {d: plt.get_cmap("tab10")(i % 10) for i, d in enumerate(names)}
        for ax, attack in zip(axes[0], attacks, strict=True):
            for (a, d), by_value in drawn.items():
                if a != attack or d not in colours:
                    continue
                for metric, style in (("asr", "-"), ("c_acc", "--")):
                    dots = [(at[v], 100 * x) for v in across if v in by_value for x in [mean(by_value[v], metric)]]
                    dots = [(x, y) for x, y in dots if not math.isnan(y)]
                    ax.plot(*zip(*dots, strict=True), style, marker=".", color=colours[d]) if dots else None
            ax.set_title(attack, fontsize=9)
            ax.set_xlabel(about["axis"]["name"])
            ax.set_ylim(-3, 103)
            if numbers and about["axis"]["kind"] == "rate":
                ax.set_xscale("log")
            ax.set_xticks(list(at.values()), [spelt(about, v) for v in across], rotation=40)
            ax.minorticks_off()
            ax.grid(alpha=0.25)
        axes[0][0].set_ylabel("O-ASR —, C-Acc - -, %")
        handles = [plt.Line2D([], [], color=c, label=d) for d, c in colours.items()]
        fig.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        file = f"images/{name}.svg"
        fig.savefig(DOCS / file, bbox_inches="tight", metadata={"Date": None})
        plt.close(fig)
    return file


def drawn_values(drawn: Mapping[Key, Mapping[Any, Any]], defense: str) -> list[Any]:
    """The values at which a defense stands, over all attacks."""
    return [v for (_, d), at in drawn.items() if d == defense for v in at]


def mean(of: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Mean over seeds; NaN without a figure."""
    there = counted(of, metric)
    return sum(there) / len(there) if there else math.nan


def inverted(suite: str) -> str:
    """What docs/labels.py knows of a suite's repairs that begin with an inversion; nothing of others."""
    runs = json.loads(FILE.read_text())["runs"]
    of = [m for r in runs if r["suite"] == suite for m in r["models"] if m["meant"] is not None]
    if not of:
        return ""
    hit = sum(m["found"] == m["meant"] for m in of)
    rest = "" if hit else ", so that nothing is said here of a repair that knows the right one"
    found = f"{hit} of {len(of)} ([labels](methods/bti.md#labels-found))"
    return f" The inversion found the attacker's label in {found}{rest}."


def section(name: str, about: Mapping[str, Any], registry: Registry) -> list[str]:
    """A sweep's part of the page."""
    sets = ", ".join(sorted({c["dataset"] for c in about["cells"]}))
    archs = ", ".join(sorted({c["arch"] for c in about["cells"]}))
    seeds = sorted({c["seed"] for c in about["cells"]})
    trained = ", ".join(f"{n:,} rows" for n in about["train_rows"].values())
    of = about["axis"]["plugin"]
    varied = f"`{about['axis']['name']}`" + (f" of `{of}`" if of else "")
    # Clean models of several architectures are no seeds of one; row clean_model has each.
    told = about["clean_c_acc"] and about["axis"]["kind"] != "arch"
    clean = f" A clean model: C-Acc {shown(about['clean_c_acc'])}." if told else ""
    less = sorted({plugin(c["defense"]) for c in about["cells"] if "reduced" in c["flag"].split(";")})
    clean += inverted(about["suite"])
    if less:
        clean += f" With less than their published effort (`reduced`): {', '.join(less)}."
    return [
        f"## {about['suite']}: {varied}",
        "",
        f"`{about['command']}`",
        "",
        f"{sets} ({trained}), {archs}, seeds {', '.join(map(str, seeds))}, {about['recipe']['epochs']} epochs, "
        f"{machine(about)}.{clean}",
        *aged(about["methods"], registry),
        *("", f"![O-ASR and C-Acc over {about['axis']['name']}]({picture(name, about)})"),
        *tables(about),
        *("", f"All cells: [{name}.json](measured/{name}.json).", ""),
    ]


def main() -> int:
    """Write a sweep's JSON, unless the page alone is wanted, and the page."""
    if sys.argv[1:] != ["--again"]:
        if len(sys.argv) < 3:
            sys.exit(__doc__)
        about = collected([Path(run) for run in sys.argv[2:]], sys.argv[1])
        head = json.dumps({k: v for k, v in about.items() if k != "cells"}, indent=1).removesuffix("\n}")
        body = ",\n".join(json.dumps(c) for c in about["cells"])
        (DOCS / "measured" / f"{about['suite']}.json").write_text(f'{head},\n "cells": [\n{body}\n ]\n}}\n')
    files = sorted((DOCS / "measured").glob("sweep-*.json"))
    registry = Registry.discover("none")
    text = [
        "# Sweeps",
        "",
        "Written by `docs/sweeps.py` from finished runs of suites `sweep-*`: what varies stands across. Shares in %; "
        "of three seeds or more their mean with Student's 95 % interval, of fewer the seeds' own figures. P-ASR is of "
        f"purified models alone (O-ASR of at most {100 * PURIFIED:.0f} %), with their number where it is not all. "
        "*weak*: the attack did not implant. *collapsed*: the repair lost more than 10 points of accuracy, or half of "
        "robust accuracy. *any*: what the sweep does not touch. Lines are means over seeds.",
        "",
    ]
    for file in files:
        text += section(file.stem, json.loads(file.read_text()), registry)
    (DOCS / "sweeps.md").write_text("\n".join(text).rstrip() + "\n")
    print(f"wrote docs/sweeps.md from {', '.join(f.stem for f in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
