"""Writes docs/NAME.md and its JSON from runs of undefended attacks: `python docs/attack_pages.py NAME RUN "COMMAND"`.

What each attack declares, what its paper printed, and what was measured, side by side; then the bookkeeping of success:
on the images that count, on those that the attack spares, under covers, by trigger and by class. Further pairs of
`RUN "COMMAND"` add runs of other attacks or settings on the same data, such as all-to-all; of a cell that several runs
have, the first one's figures stand. `--keep` behind them keeps what the JSON has of other cells, with what made it.

Each attack's page then shows its lines of all such files under one heading. `python docs/attack_pages.py` alone renews
all pages from the JSONs.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import aged, machine, older, provenance

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
CELL = ("cell", "attack", "rate", "flag", "status", "reason", "attack_params")
HEAD = "## Declared, published, measured"
"""On the page of an attack, in front of a section `## Measured` where somebody wrote one."""
_SMALL = 0.1
"""Share of false positives up to which HCB's patch counts as bound to its feature."""
_ALIVE = 0.9
"""ASR from which a trigger among several is not spoken of by itself."""
Figures = Mapping[str, Mapping[tuple[str, str], Mapping[int, float]]]
"""Attack -> (metric, qualifier) -> seed -> value."""


def plain(attack: str) -> str:
    """The id in an attack's label, which may have a digest of its parameters and a rate behind it."""
    return attack.partition(" at ")[0].partition("~")[0]


def told(attack: str, other: Mapping[str, Sequence[str]]) -> str:
    """A label with its settings, as `differing` gives them, in place of their digest."""
    return ", ".join([attack.partition("~")[0], *other.get(attack, [])])


def figures(rows: Sequence[Mapping[str, Any]]) -> Figures:
    """What was measured on undefended models."""
    found: dict[str, dict[tuple[str, str], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in rows:
        if r["defense"] == "none" and r["value"] is not None:
            found[r["attack"]][r["metric"], r["qualifier"]][r["seed"]] = r["value"]
    return found


def published(infos: Sequence[Mapping[str, Any]], inner: str = "", settings: str = "") -> str:
    """The printed ASR in % with its setting, from the INFO of an attack and of what it wraps, outermost first.

    A wrapper prints what its paper has of the attack that it wraps, or nothing. `settings` are the line's own: the
    printed figures are all of one target class, so that a line of `all_to_all` has none.
    """
    said = infos[0].get("published_asr") if "all_to_all" not in settings else None
    if isinstance(said, dict) and "value" not in said:
        said = said.get(inner)
    return f"{100 * said['value']:.1f} ({said['setting']}; {said['source']})" if isinstance(said, dict) else ""


def declared(infos: Sequence[Mapping[str, Any]]) -> str:
    """The lowest ASR in % at which one of them counts as implanted, as the gate has it."""
    own = [i["implant_asr"] for i in infos if "implant_asr" in i]
    return f"{100 * min(own):.0f}" if own else ""


def span(values: Mapping[int, float] | Sequence[float], scale: float, digits: int) -> str:
    """One figure per seed."""
    ordered = [v for _, v in sorted(values.items())] if isinstance(values, Mapping) else values
    return ", ".join(f"{scale * v:.{digits}f}" for v in ordered)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(x) + " |" for x in body)]


def lines(rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], registry: Registry) -> list[str]:
    """One line per attack, with its rate where rates differ."""
    found = figures(rows)
    rates: dict[str, set[str]] = defaultdict(set)
    for c in cells:
        rates[c["attack"]] |= {f"{100 * c['rate']:g}"} if c["rate"] else set()
    several = len(set().union(*rates.values())) > 1
    flags: dict[str, set[str]] = defaultdict(set)
    for c in cells:
        flags[c["attack"]] |= set(filter(None, c["flag"].split(";")))
        if c["status"] != "ok":
            flags[c["attack"]].add(missing(c))
    settings = {c["attack"]: c["attack_params"] for c in cells}
    other = differing(cells)
    body = []
    for attack in sorted(flags):
        name = plain(attack)
        infos = [p.blueprint.info for p in registry.chain("attack", name)]
        measured = [span(found[attack].get((m, ""), {}), s, d) for m, (_, s, d) in SHOWN.items()]
        bar = "" if attack == "none" else declared(infos)
        said = published(infos, name.partition(":")[2], settings[attack])
        rate = [", ".join(sorted(rates[attack]))] if several else []
        body.append(
            [", ".join([name, *other.get(attack, [])]), *rate, bar, said, *measured, "; ".join(sorted(flags[attack]))]
        )
    head = ["attack", *(["rate, %"] if several else []), "declared", "published"]
    return table([*head, *(name for name, _, _ in SHOWN.values()), "flags"], body)


def missing(cell: Mapping[str, Any]) -> str:
    """Which seed of a line has no figure, and why: where the method declined, in a word."""
    seed, why = cell["cell"].rpartition("/s")[2], cell["reason"]
    return f"seed {seed}: {cell['status']} ({why if cell['status'] == 'failed' else why.partition(':')[0]})"


def differing(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Attacks of a sweep -> their parameters that differ from the plain one's, as `key=value`.

    Where no plain one ran, or it ran before it had a parameter, the default stands for it.
    """
    settings = {c["attack"]: json.loads(c["attack_params"]) for c in cells}
    registry = Registry.discover("none")
    fields = {n: registry.chain("attack", n)[0].blueprint.fields for n in {plain(a) for a in settings if "~" in a}}
    bare = {n: {k: f.default for k, f in of.items()} | settings.get(n, {}) for n, of in fields.items()}
    return {
        a: [f"{k}={v}" for k, v in p.items() if v != bare.get(plain(a), {}).get(k)]
        for a, p in settings.items()
        if "~" in a
    }


def weak(cells: Sequence[Mapping[str, Any]]) -> str:
    """The attacks that did not implant, and how many did."""
    other = differing(cells)
    flags = {told(c["attack"], other): "weak" in c["flag"].split(";") for c in cells if c["rate"]}
    names = "; ".join(sorted(a for a, is_weak in flags.items() if is_weak))
    return f"{names or 'none'} ({sum(flags.values())} of {len(flags)})"


# ---- Bookkeeping of success ------------------------------------------------------------------------------------------
def qualified(of: Mapping[tuple[str, str], Mapping[int, float]], metric: str, key: str) -> dict[str, dict[int, float]]:
    """The rows of a metric whose one qualifier is `key`: its value -> seed -> figure."""
    start = f"{key}="
    return {
        q.removeprefix(start): dict(v)
        for (m, q), v in of.items()
        if m == metric and q.startswith(start) and ";" not in q
    }


def largest(parts: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Per seed the largest of several figures."""
    seeds = {s for v in parts.values() for s in v}
    return {s: max(v[s] for v in parts.values() if s in v) for s in seeds}


def smallest(parts: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Per seed the smallest of several figures."""
    seeds = {s for v in parts.values() for s in v}
    return {s: min(v[s] for v in parts.values() if s in v) for s in seeds}


def sparing(found: Figures, other: Mapping[str, Sequence[str]]) -> list[str]:
    """Attacks that work on some images only: success where it is meant, and the leak on the images that they spare."""
    body = []
    for attack, of in sorted(found.items()):
        if ("asr_leak", "") not in of or qualified(of, "asr", "trigger"):
            continue
        worst = largest(qualified(of, "asr_leak", "class"))
        covers = [span(of.get((m, ""), {}), 100, 1) for m in ("cover_asr", "cover_acc")]
        body.append(
            [told(attack, other), *(span(v, 100, 1) for v in (of["asr", ""], of["asr_leak", ""], worst)), *covers]
        )
    head = ["attack", "ASR where it counts", "leak", "leak, worst class", "covers: to the target", "covers: own label"]
    return table(head, body) if body else []


def triggers(found: Figures, members: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]]) -> list[str]:
    """Attacks with several triggers: the mean, the worst and each, with the leak of those that spare some images."""
    body = []
    for attack, of in sorted(found.items()):
        each, leaks = qualified(of, "asr", "trigger"), qualified(of, "asr_leak", "trigger")
        if not each:
            continue
        label = told(attack, other)
        body.append([label, "mean", span(of["asr", ""], 100, 1), span(of.get(("asr_leak", ""), {}), 100, 1)])
        body.append([label, "worst", span(smallest(each), 100, 1), span(largest(leaks), 100, 1)])
        for i, values in sorted(each.items(), key=lambda x: int(x[0])):
            name = members[attack][int(i)] if attack in members else ""
            leak = span(leaks.get(i, {}), 100, 1)
            body.append([label, f"{i}{f': {name}' if name else ''}", span(values, 100, 1), leak])
    return table(["attack", "trigger", "ASR", "leak"], body) if body else []


def covers(found: Figures, other: Mapping[str, Sequence[str]]) -> list[str]:
    """How many covers keep their label, beside C-Acc and ASR; `other` as `differing` gives it."""
    body = [
        [
            told(attack, other),
            *(span(of.get((m, ""), {}), 100, 1) for m in ("cover_acc", "cover_asr", "c_acc", "asr")),
        ]
        for attack, of in sorted(found.items())
        if ("cover_acc", "") in of
    ]
    return table(["attack", "covers: own label", "covers: to the target", "C-Acc", "ASR"], body) if body else []


def classes(found: Figures) -> list[str]:
    """All-to-all attacks: success per true class, and the worst."""
    body = []
    for attack, of in sorted(found.items()):
        each = qualified(of, "asr", "class")
        if each:
            inside = ", ".join(
                f"{k}: {100 * statistics.mean(v.values()):.1f}"
                for k, v in sorted(each.items(), key=lambda x: int(x[0]))
            )
            figures_ = [span(v, 100, 1) for v in (of["c_acc", ""], of["asr", ""], smallest(each))]
            body.append([plain(attack), *figures_, inside])
    return (
        table(["attack", "C-Acc", "ASR", "ASR, worst class", "ASR by true class, mean of the seeds"], body)
        if body
        else []
    )


def mean(found: Figures, attack: str, metric: str) -> float | None:
    """Over seeds."""
    values = found.get(attack, {}).get((metric, ""), {})
    return statistics.mean(values.values()) if values else None


def separability(found: Figures, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What silhouettes say of BELT's and Adaptive's promises: verdicts follow from the figures alone."""
    text, lower = [], {"belt": 0, "beltpp": 0}
    faint = {c["attack"] for c in cells if "weak" in c["flag"].split(";")}

    def marked(attack: str, value: float) -> str:
        return f"{value:.2f}{' (weak)' if attack in faint else ''}"

    body, below = [], 0
    for inner in sorted({a.partition(":")[2] for a in found if ":" in a}):
        names = (inner, f"belt:{inner}", f"beltpp:{inner}")
        values = [mean(found, a, "silhouette") for a in names]
        if None in values:
            continue
        bare, plus, pluses = (v for v in values if v is not None)
        body.append([inner, *(marked(a, v) for a, v in zip(names, (bare, plus, pluses), strict=True))])
        lower["belt"] += plus < bare
        lower["beltpp"] += pluses < bare
        below += pluses < plus
    if body:
        text += [
            *(
                "BELT's «+» should stand out in the features, and «++», which has a centre loss, should not. Means:",
                "",
            ),
            *table(["wrapped", "plain", "+", "++"], body),
            "",
            f"«++» lies below «+» in {below} of {len(body)} attacks: that order is "
            f"{'seen' if below == len(body) else 'not seen'} here. Against the plain attack «+» lies lower in "
            f"{lower['belt']} and «++» in {lower['beltpp']} of {len(body)}.",
            "",
        ]
    reference = {a: v for a in ("badnets", "blended") if (v := mean(found, a, "silhouette")) is not None}
    adaptive = sorted(a for a in found if plain(a) in ("adaptive_blend", "adaptive_patch"))
    own = {a: v for a in adaptive if (v := mean(found, a, "silhouette")) is not None}
    others = [v for a in found if a not in own and a not in faint if (v := mean(found, a, "silhouette")) is not None]
    if own and reference:
        text += ["Adaptive-Blend and Adaptive-Patch are made not to stand out:", ""]
    for attack, value in own.items() if reference else ():
        beside = "; ".join(f"{'below' if value < v else 'not below'} {a}'s {v:.2f}" for a, v in reference.items())
        under = sum(v < value for v in others)
        text.append(
            f"- {attack}, {marked(attack, value)}: {beside}; {under} of the {len(others)} other attacks that implanted "
            "lie lower still."
        )
    return text


def prose(found: Figures, members: Mapping[str, Sequence[str]]) -> list[str]:
    """What stands out in the tables of HCB and of attacks with several triggers."""
    text = []
    hcb = found.get("hcb", {})
    if hcb:
        leak, feature = hcb["asr_leak", ""], hcb["cover_asr", ""]
        worst = max(leak.values())
        text.append(
            f"hcb's patch without the feature (FPR-NES) takes {span(leak, 100, 1)} % of the images to the target, the "
            f"feature without the patch (FPR-ES) {span(feature, 100, 1)} %. "
            + (
                f"The patch does not need the feature on up to {100 * worst:.0f} %."
                if worst > _SMALL
                else "Both are few."
            )
        )
    for attack, of in sorted(found.items()):
        each = qualified(of, "asr", "trigger")
        lowest = smallest(each)
        if not each or min(lowest.values()) >= _ALIVE:
            continue
        worst_of = {s: min(each, key=lambda i: each[i].get(s, 2.0)) for s in lowest}
        names = ", ".join(
            f"{members[attack][int(i)] if attack in members else f'trigger {i}'} at {100 * each[i][s]:.1f} %"
            for s, i in sorted(worst_of.items())
        )
        text.append(f"The mean of {attack}, {span(of['asr', ''], 100, 1)} %, hides its worst trigger: {names}.")
    return text


# ---- The JSON: parts, each what one command made ---------------------------------------------------------------------
def part(run: Path, command: str) -> dict[str, Any]:
    """What a run measured of undefended models, with its provenance."""
    rows = read_table(run / "measurements.parquet")
    cells = [c for c in read_table(run / "cells.parquet") if c["defense"] == "none"]
    params = {c["attack"]: json.loads(c["attack_params"]) for c in cells}
    suite = json.loads((run / "run.json").read_text())["suite"]
    ways = {k: suite[k] for k in ("injection", "append") if suite.get(k)}
    return {
        "command": command,
        **provenance(run, rows),
        **ways,
        "cells": [{k: c[k] for k in CELL} for c in cells],
        "members": {a: p["members"] for a, p in params.items() if "members" in p},
        "rows": [{k: r[k] for k in FIELDS} for r in rows if r["defense"] == "none"],
    }


def way(part: Mapping[str, Any]) -> list[str]:
    """How the attacks came into the models, where they were not trained on poisoned rows in place from the start."""
    said = []
    if how := part.get("injection"):
        epochs, lr = how["epochs"], how["lr"]
        said.append(f"Injected into benignly trained models by {epochs} epochs of fine-tuning at a rate of {lr:g}.")
    if part.get("append"):
        said.append("Poisoned rows stand beside their clean ones.")
    return said


def together(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts without the cells that an earlier one has; those that have nothing left are dropped."""
    known: set[str] = set()
    left = []
    for one in parts:
        rows = [r for r in one["rows"] if r["cell"] not in known]
        mine = {r["cell"] for r in rows}
        known |= mine
        if mine:
            left.append(one | {"rows": rows, "cells": [c for c in one["cells"] if c["cell"] in mine]})
    return left


def by_rate(
    rows: list[dict[str, Any]], cells: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and cells whose attacks carry their rate in the label where there are several."""
    rates: dict[str, set[float]] = defaultdict(set)
    for c in cells:
        rates[c["attack"]].add(c["rate"])
    rate = {c["cell"]: c["rate"] for c in cells}

    def named(x: dict[str, Any]) -> dict[str, Any]:
        many = len(rates[x["attack"]]) > 1
        return x | {"attack": f"{x['attack']} at {100 * rate[x['cell']]:g} %"} if many else x

    return [named(r) for r in rows], [named(c) for c in cells]


def kept(registry: Registry) -> dict[str, list[list[str]]]:
    """Per attack its lines of every docs/measured/attacks-*.json, for its page; a wrapper's with what it wraps."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for file in sorted((DOCS / "measured").glob("attacks-*.json")):
        parts = json.loads(file.read_text())["parts"]
        whole = differing([c for one in parts for c in one["cells"]])
        of_cell = {c["cell"]: (c, one) for one in parts for c in one["cells"]}
        cells: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
        for r in (r for one in parts for r in one["rows"]):
            cells[r["attack"], r["cell"].partition("/")[0], of_cell[r["cell"]][0]["rate"]].append(
                r | {"defense": "none"}
            )
        for (attack, data, rate), rows in sorted(cells.items()):
            name = plain(attack)
            infos = [p.blueprint.info for p in registry.chain("attack", name)]
            of = figures(rows)[attack]
            # Of a wrapper "attack/OUTER:INNER" has the outer one's version; the inner one's is that of its own line.
            methods = {f"attack/{name}", f"attack/{name.partition(':')[2]}"}
            sources = [of_cell[r["cell"]][1].get("methods", {}) for r in rows]
            old = any(older({m: v for m, v in source.items() if m in methods}, registry) for source in sources)
            flags = sorted({f for r in rows for f in r["flag"].split(";") if f})
            flags += sorted(
                {
                    missing(c)
                    for c, _ in of_cell.values()
                    if (c["attack"], c["rate"]) == (attack, rate) and c["status"] != "ok"
                }
            )
            flags += ["of an earlier version"] if old else []
            label = ", ".join([name, *whole.get(attack, [])])
            said = published(infos, name.partition(":")[2], label)
            shown = [span(of.get((m, ""), {}), scale, n) for m, (_, scale, n) in SHOWN.items()]
            setting = f"{data} {100 * rate:g} %" if rate else data
            bar = declared(infos) if rate else ""
            line = [label, setting, bar, said, *shown, "; ".join(flags)]
            if line not in found[name.partition(":")[0]]:  # a clean model that two runs trained alike
                found[name.partition(":")[0]].append(line)
    return found


def pages(registry: Registry) -> list[str]:
    """Write the section of each attack's page, in front of `## Measured` where there is one; returns the attacks."""
    head = ["attack", "data, rate", "declared", "published", *(name for name, _, _ in SHOWN.values()), "flags"]
    files = sorted(f.stem for f in (DOCS / "measured").glob("attacks-*.json"))
    several = ", ".join(f"[{f.partition('-')[2].replace('-', ' ')}](../{f}.md)" for f in files)
    found = kept(registry)
    for attack, body in found.items():
        page = DOCS / "methods" / f"{attack}.md"
        own = re.sub(rf"\n{HEAD}\n.*?(?=\n## |\Z)", "", page.read_text(), flags=re.DOTALL)
        before, mark, measured = own.partition("\n## Measured\n")
        text = [before.rstrip(), "", HEAD, "", *table(head, body), ""]
        text += [f"Shares in %, a figure per seed; what the columns mean and how it was run: {several}."]
        page.write_text("\n".join(text) + "\n" + mark + measured)
    return sorted(found)


def section(title: str, says: str, body: Sequence[str]) -> list[str]:
    """A heading, a sentence and what stands under them; nothing where there is nothing to show."""
    return ["", f"## {title}", "", *([says, ""] if says else []), *body] if any(body) else []


def page(name: str, parts: Sequence[Mapping[str, Any]], registry: Registry) -> list[str]:
    """docs/NAME.md from what the JSON holds."""
    rows = [r | {"defense": "none"} for one in parts for r in one["rows"]]
    rows, cells = by_rate(rows, [c for one in parts for c in one["cells"]])
    found = figures(rows)
    members = {a: m for one in parts for a, m in one["members"].items()}
    sets = ", ".join(sorted({c["cell"].split("/")[0] for c in cells}))
    archs = ", ".join(sorted({c["cell"].split("/")[1] for c in cells}))
    rates = ", ".join(f"{100 * r:g} %" for r in sorted({c["rate"] for c in cells if c["rate"]}, reverse=True))
    epochs = ", ".join(sorted({str(one["recipe"]["epochs"]) for one in parts}))
    made = []
    for one in parts:
        own = {m: v for m, v in one.get("methods", {}).items() if m.startswith("attack/")}
        used = {f"attack/{plain(c['attack'])}" for c in one["cells"]}
        old = aged({m: v for m, v in own.items() if m in used}, registry)
        notes = [
            f"The copy of {n} differs from its release: {d['note']}."
            for n, d in one.get("datasets", {}).items()
            if d.get("note")
        ]
        made.append(" ".join([f"- `{one['command']}`", f"({machine(one)}).", *way(one), *notes, *old]))
    bare = {a: of for a, of in found.items() if "~" not in a}
    return [
        *("# Attacks: declared, published, measured", "", "Written by `docs/attack_pages.py` from the tables of:", ""),
        *made,
        *("", f"{sets}, {archs}, rate {rates}, {epochs} epochs. One figure per seed; shares in %.", ""),
        "*Declared* is the ASR at which the attack counts as implanted, of a wrapper and what it wraps the lower; "
        "below it, below the suite's bar and, all to all, below 0.95 of clean C-Acc, or where C-Acc lies more than 2 "
        "points below a clean model's, a row is `weak` and no defense gets credit. *Published* figures are of other "
        "data, networks and lengths of training: they say what the attack is known for, not what this run should "
        "reach; a wrapper has those of its own paper. *Silhouette* is near 1 where triggered images lie apart from the "
        "target class's own in the last layer's features, near 0 where they overlap.",
        *("", f"Flagged `weak`, for their ASR or their C-Acc: {weak(cells)}."),
        *("", *lines(rows, cells, registry)),
        *section(
            "Where an attack should work, and where not",
            "A source-specific attack (tact, cassock) counts on images of its source classes; *leak* is the share of "
            "the other classes' triggered images that get the target all the same. hcb counts on images with feature "
            "and patch; its leak is that of the patch without the feature, its covers have the feature without it.",
            sparing(found, differing(cells)),
        ),
        *section(
            "Several triggers",
            "The headline ASR, which the bar is held against, is the mean over triggers; a dead one hides in it.",
            triggers(found, members, differing(cells)),
        ),
        *(x for p in prose(found, members) for x in ("", p)),
        *section(
            "Covers",
            "Images as the attack covers them: weaker, partial or jittered triggers, meant to keep their label. Where "
            "fewer do than C-Acc, and more get the target, the trigger works beyond its exact form.",
            covers(found, differing(cells)),
        ),
        *section("All-to-all", "", classes(found)),
        *section("Do poisoned samples stand apart?", "", separability(bare, cells)),
        *("", f"All rows: [{name}.json](measured/{name}.json)."),
    ]


def written(name: str, runs: Sequence[tuple[Path, str]], *, keep: bool) -> None:
    """Write the JSON from pairs of run and command, and all pages; `keep` what the JSON has of other cells."""
    parts = [part(run, command) for run, command in runs]
    target = DOCS / "measured" / f"{name}.json"
    if keep and target.exists():
        parts += json.loads(target.read_text())["parts"]
    target.write_text(json.dumps({"parts": together(parts)}) + "\n")
    shown()


def shown() -> None:
    """Write all pages from the JSONs."""
    registry = Registry.discover("none")
    for file in sorted((DOCS / "measured").glob("attacks-*.json")):
        text = page(file.stem, json.loads(file.read_text())["parts"], registry)
        (DOCS / f"{file.stem}.md").write_text("\n".join(text) + "\n")
        print(f"wrote docs/{file.stem}.md")
    print(f"wrote the pages of {', '.join(pages(registry))}")


def main(argv: Sequence[str]) -> int:
    """Take the arguments."""
    words = [a for a in argv if a != "--keep"]
    if not words:
        shown()
    elif len(words) < 3 or len(words) % 2 == 0:
        sys.exit(__doc__)
    else:
        runs = [(Path(run), command) for run, command in zip(words[1::2], words[2::2], strict=True)]
        written(words[0], runs, keep="--keep" in argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
