"""Writes docs/NAME.md and its JSON from a run of suite `attacks`: `python docs/attacks.py RUN NAME "COMMAND"`.

What each attack declares, what its paper printed, and what this run measured, side by side; then the bookkeeping of
success: on the images that count, on those that the attack spares, under covers, by trigger and by class. Pairs of
`RUN "COMMAND"` behind these add runs of other settings, such as all-to-all, whose rows go into the same JSON.

Each attack's page then shows its lines of all such files under one heading; `python docs/attacks.py` alone renews the
pages.
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

from record import aged, machine, methods, older, provenance

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
HEAD = "## Declared, published, measured"
"""On the page of an attack, in front of what `make measure` writes there."""
_SMALL = 0.1
"""Share of false positives up to which HCB's patch counts as bound to its feature."""
Figures = Mapping[str, Mapping[tuple[str, str], Mapping[int, float]]]
"""Attack -> (metric, qualifier) -> seed -> value."""


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
            flags[c["attack"]].add(f"{c['status']}: {c['reason']}")
    settings = {c["attack"]: c["attack_params"] for c in cells}
    body = []
    for attack in sorted(flags):
        plain = attack.partition("~")[0]
        infos = [p.blueprint.info for p in registry.chain("attack", plain)]
        measured = [span(found[attack].get((m, ""), {}), s, d) for m, (_, s, d) in SHOWN.items()]
        bar = "" if attack == "none" else declared(infos)
        said = published(infos, plain.partition(":")[2], settings[attack])
        rate = [", ".join(sorted(rates[attack]))] if several else []
        body.append([attack, *rate, bar, said, *measured, "; ".join(sorted(flags[attack]))])
    head = ["attack", *(["rate, %"] if several else []), "declared", "published"]
    return table([*head, *(name for name, _, _ in SHOWN.values()), "flags"], body)


def differing(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Attacks of a sweep -> their parameters that differ from the plain one's, as `key=value`."""
    settings = {c["attack"]: json.loads(c["attack_params"]) for c in cells}
    return {
        a: [f"{k}={v}" for k, v in p.items() if v != settings[a.partition("~")[0]].get(k)]
        for a, p in settings.items()
        if "~" in a
    }


def weak(cells: Sequence[Mapping[str, Any]]) -> str:
    """The attacks that did not implant, and how many did."""
    flags = {c["attack"]: "weak" in c["flag"].split(";") for c in cells if c["rate"]}
    names = ", ".join(sorted(a for a, is_weak in flags.items() if is_weak))
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


def sparing(found: Figures) -> list[str]:
    """Attacks that work on some images only: success where it is meant, and the leak on the images that they spare."""
    body = []
    for attack, of in sorted(found.items()):
        if ("asr_leak", "") not in of or qualified(of, "asr", "trigger"):
            continue
        worst = largest(qualified(of, "asr_leak", "class"))
        covers = [span(of.get((m, ""), {}), 100, 1) for m in ("cover_asr", "cover_acc")]
        body.append(
            [attack, span(of["asr", ""], 100, 1), span(of["asr_leak", ""], 100, 1), span(worst, 100, 1), *covers]
        )
    head = ["attack", "ASR where it counts", "leak", "leak, worst class", "covers: to the target", "covers: own label"]
    return table(head, body) if body else []


def triggers(found: Figures, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Attacks with several triggers: the mean, the worst and each, with the leak of those that spare some images."""
    body = []
    for attack, of in sorted(found.items()):
        each, leaks = qualified(of, "asr", "trigger"), qualified(of, "asr_leak", "trigger")
        if not each:
            continue
        body.append([attack, "mean", span(of["asr", ""], 100, 1), span(of.get(("asr_leak", ""), {}), 100, 1)])
        body.append([attack, "worst", span(smallest(each), 100, 1), span(largest(leaks), 100, 1)])
        for i, values in sorted(each.items(), key=lambda x: int(x[0])):
            name = members[attack][int(i)] if attack in members else ""
            leak = span(leaks.get(i, {}), 100, 1)
            body.append([attack, f"{i}{f': {name}' if name else ''}", span(values, 100, 1), leak])
    return table(["attack", "trigger", "ASR", "leak"], body) if body else []


def covers(found: Figures) -> list[str]:
    """Attacks with covers: how many of these keep their label, beside C-Acc and ASR."""
    body = [
        [attack, *(span(of.get((m, ""), {}), 100, 1) for m in ("cover_acc", "cover_asr", "c_acc", "asr"))]
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
            body.append([attack.partition("~")[0], *figures_, inside])
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

    def told(attack: str, value: float) -> str:
        return f"{value:.2f}{' (weak)' if attack in faint else ''}"

    body, below = [], 0
    for inner in sorted({a.partition(":")[2] for a in found if ":" in a}):
        names = (inner, f"belt:{inner}", f"beltpp:{inner}")
        values = [mean(found, a, "silhouette") for a in names]
        if None in values:
            continue
        plain, plus, pluses = (v for v in values if v is not None)
        body.append([inner, *(told(a, v) for a, v in zip(names, (plain, plus, pluses), strict=True))])
        lower["belt"] += plus < plain
        lower["beltpp"] += pluses < plain
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
    own = {a: v for a in ("adaptive_blend", "adaptive_patch") if (v := mean(found, a, "silhouette")) is not None}
    others = [v for a in found if a not in own and a not in faint if (v := mean(found, a, "silhouette")) is not None]
    if own and reference:
        text += ["Adaptive-Blend and Adaptive-Patch are made not to stand out:", ""]
    for attack, value in own.items() if reference else ():
        beside = "; ".join(f"{'below' if value < v else 'not below'} {a}'s {v:.2f}" for a, v in reference.items())
        under = sum(v < value for v in others)
        text.append(
            f"- {attack}, {told(attack, value)}: {beside}; {under} of the {len(others)} other attacks that implanted "
            "lie lower still."
        )
    return text


def prose(found: Figures, members: Mapping[str, Sequence[str]]) -> list[str]:
    """What stands out in the tables of HCB and of the hybrid attack."""
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
    hybrid = found.get("hybrid", {})
    each = qualified(hybrid, "asr", "trigger")
    if each:
        worst = {s: min(each, key=lambda i: each[i].get(s, 2.0)) for s in hybrid["asr", ""]}
        names = ", ".join(
            f"{members['hybrid'][int(i)] if 'hybrid' in members else i} at {100 * each[i][s]:.1f} %"
            for s, i in sorted(worst.items())
        )
        text.append(f"The mean of hybrid, {span(hybrid['asr', ''], 100, 1)} %, hides its worst trigger: {names}.")
    return text


def kept(registry: Registry) -> dict[str, list[list[str]]]:
    """Per attack its lines of every docs/measured/attacks-*.json, for its page; a wrapper's with what it wraps."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for file in sorted((DOCS / "measured").glob("attacks-*.json")):
        whole = json.loads(file.read_text())
        cells: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
        for r in whole["rows"]:
            data, _, at, *_ = r["cell"].split("/")
            cells[r["attack"], data, at.partition("@")[2]].append(r | {"defense": "none"})
        for (attack, data, rate), rows in sorted(cells.items()):
            plain = attack.partition("~")[0]
            infos = [p.blueprint.info for p in registry.chain("attack", plain)]
            of = figures(rows)[attack]
            # Of a wrapper "attack/OUTER:INNER" has the outer one's version; the inner one's is that of its own line.
            parts = {f"attack/{plain}", f"attack/{plain.partition(':')[2]}"}
            versions = {m: v for m, v in whole.get("methods", {}).items() if m in parts}
            flags = sorted({f for r in rows for f in r["flag"].split(";") if f})
            flags += ["of an earlier version"] if older(versions, registry) else []
            name = ", ".join([plain, *whole.get("settings", {}).get(attack, [])])
            said = published(infos, plain.partition(":")[2], name)
            shown = [span(of.get((m, ""), {}), scale, n) for m, (_, scale, n) in SHOWN.items()]
            share = float(rate or 0)
            setting = f"{data} {100 * share:g} %" if share else data
            bar = declared(infos) if share else ""
            line = [name, setting, bar, said, *shown, "; ".join(flags)]
            if line not in found[plain.partition(":")[0]]:  # a clean model that two runs trained alike
                found[plain.partition(":")[0]].append(line)
    return found


def pages(registry: Registry) -> list[str]:
    """Write the section of each attack's page, in front of what `make measure` wrote; returns the attacks."""
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


def main() -> int:
    """Write both files."""
    run, name, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rows, cells = read_table(run / "measurements.parquet"), read_table(run / "cells.parquet")
    about = provenance(run, rows)
    stored = [{k: r[k] for k in FIELDS} for r in rows if r["defense"] == "none"]
    more = [(Path(a), b) for a, b in zip(sys.argv[4::2], sys.argv[5::2], strict=True)]
    added = [r for path, _ in more for r in read_table(path / "measurements.parquet") if r["defense"] == "none"]
    commands = {"command": command} | ({"more_commands": [b for _, b in more]} if more else {})
    known = {(r["cell"], r["metric"], r["qualifier"]) for r in stored}
    stored += [{k: r[k] for k in FIELDS} for r in added if (r["cell"], r["metric"], r["qualifier"]) not in known]
    others = {} if not more else {"settings": differing([c for p, _ in more for c in read_table(p / "cells.parquet")])}
    (DOCS / "measured" / f"{name}.json").write_text(json.dumps(commands | about | others | {"rows": stored}) + "\n")
    registry = Registry.discover("none")
    found = figures(rows)
    settings = {c["attack"]: json.loads(c["attack_params"]) for c in cells}
    members = {a: p["members"] for a, p in settings.items() if "members" in p}
    old = aged({m: v for m, v in methods(run).items() if m.startswith("attack/")}, registry)
    sets = ", ".join(sorted({c["dataset"] for c in cells}))
    rates = ", ".join(sorted({f"{100 * c['rate']:g} %" for c in cells if c["rate"]}))
    all_to_all = classes(figures([r for r in [*rows, *added] if r["attack"] != "none"]))
    text = [
        *("# Attacks: declared, published, measured", "", "Written by `docs/attacks.py` from the tables of:", ""),
        *(part for c in (command, *(b for _, b in more)) for part in (f"`{c}`", "")),
        f"{sets}, {', '.join(sorted({c['arch'] for c in cells}))}, rate {rates}, {about['recipe']['epochs']} epochs, "
        f"{machine(about)}. One figure per seed; shares in %.",
        "",
        "*Declared* is the ASR at which the attack counts as implanted, of a wrapper and what it wraps the lower; "
        "below it, below the suite's bar and, all to all, below 0.95 of clean C-Acc, a row is `weak` and no defense "
        "gets credit. *Published* figures are of other data, networks and lengths of training: they say what the "
        "attack is known for, not what this run should reach; a wrapper has those of its own paper. *Silhouette* is "
        "near 1 where triggered images lie apart from the target class's own in the last layer's features, near 0 "
        "where they overlap.",
        *("", f"Below their bar, and so `weak`: {weak(cells)}."),
        *(x for sentence in old for x in ("", sentence)),
        *("", *lines(rows, cells, registry)),
        *section(
            "Where an attack should work, and where not",
            "A source-specific attack (tact, cassock) counts on images of its source classes; *leak* is the share of "
            "the other classes' triggered images that get the target all the same. hcb counts on images with feature "
            "and patch; its leak is that of the patch without the feature, its covers have the feature without it.",
            sparing(found),
        ),
        *section(
            "Several triggers",
            "The headline ASR is the mean over triggers; a dead one hides in it.",
            triggers(found, members),
        ),
        *(x for p in prose(found, members) for x in ("", p)),
        *section(
            "Covers",
            "Images as the attack covers them: weaker, partial or jittered triggers, meant to keep their label. Where "
            "fewer do than C-Acc, and more get the target, the trigger works beyond its exact form.",
            covers(found),
        ),
        *section("All-to-all", "", all_to_all),
        *section("Do poisoned samples stand apart?", "", separability(found, cells)),
        *("", f"All rows: [{name}.json](measured/{name}.json)."),
    ]
    (DOCS / f"{name}.md").write_text("\n".join(text) + "\n")
    print(f"wrote docs/{name}.md and docs/measured/{name}.json: {len(cells)} cells")
    pages(registry)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(f"wrote the pages of {', '.join(pages(Registry.discover('none')))}")
        sys.exit(0)
    if len(sys.argv) < 4 or len(sys.argv) % 2:
        sys.exit(__doc__)
    sys.exit(main())
