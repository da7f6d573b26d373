"""What foretells that a defended model wakes: the part of docs/findings.md on suite `digits-signals`.

`python docs/findings.py digits-signals "COMMAND" RUN [RUN ...]` writes docs/measured/digits-signals.json from a run and
renders the page. What was fixed before a figure was read stands first: the split, the measures, the combinations, and
the rule by which one variant of target shift is taken from the models of one part and judged on those of another.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import machine
from scipy.stats import rankdata

from sleeperbench.engine.rows import read_table

Key = tuple[str, str]
Cell = dict[str, Any]

# ---- fixed before any figure was read --------------------------------------------------------------------------------
SUITE = "digits-signals"
DEVELOPED: tuple[frozenset[str], frozenset[int]] = (frozenset({"badnets", "blended", "sin_wave", "lf"}), frozenset({0}))
"""Attacks and seeds whose models the variant of target shift is chosen on."""
HELD_OUT: tuple[frozenset[str], frozenset[int]] = (
    frozenset({"trojannn", "refool", "adaptive_blend", "multi_trigger"}),
    frozenset({1, 2}),
)
"""Other attacks under other seeds, on which it is judged, once."""
NET = ("p_asr_net", "")
P_ASR, O_ASR, BEC, WEIGHTS = ("p_asr_ra", ""), ("asr", ""), ("bec", ""), ("bec", "control=weights")
REFERENCES: dict[str, Key] = {
    "O-ASR": O_ASR,
    "BEC": BEC,
    "BEC, random channels": ("bec", "control=random"),
    "BEC, images without trigger": ("bec", "control=clean_inputs"),
    "BEC, distance of weights": WEIGHTS,
}
VARIANTS: dict[str, Key] = {
    f"target shift{', ' + m.replace('_', ' ') if m else ''}": ("shift_target_net", f"measure={m}" if m else "")
    for m in ("", "size", "whitened", "whitened_size", "head", "stages", "stages_size")
}
"""All net of clean models."""
COMBINED: dict[str, tuple[Key, ...]] = {
    "O-ASR and BEC": (O_ASR, BEC),
    "O-ASR and target shift": (O_ASR, VARIANTS["target shift"]),
    "O-ASR, BEC and target shift": (O_ASR, BEC, VARIANTS["target shift"]),
}
"""Means of the ranks among the models that come from one attacked model."""
MEASURES: dict[str, tuple[Key, ...]] = {n: (k,) for n, k in (REFERENCES | VARIANTS).items()} | COMBINED
LINEAGE = frozenset(n for n, keys in MEASURES.items() if any(k[0] == "bec" for k in keys))
"""Measures that models trained anew do not have."""
PURIFIED, BACK, NEAR = 0.20, 0.50, 0.99
"""As in the first part: O-ASR of purified models, P-ASR of woken ones, weights that did not change."""
ORACLES = frozenset({"exact_purification"})
DRAWS, FEWEST = 2000, 5
"""Bootstrap over attacked models; not of fewer than `FEWEST`."""
# ----------------------------------------------------------------------------------------------------------------------


def attacked(c: Cell) -> tuple[str, int]:
    """Which attacked model a cell's model comes from."""
    return c["attack"], c["seed"]


def part(of: Sequence[Cell], split: tuple[frozenset[str], frozenset[int]]) -> list[Cell]:
    """The cells of these attacks under these seeds."""
    return [c for c in of if c["attack"] in split[0] and c["seed"] in split[1]]


def repaired(of: Sequence[Cell]) -> list[Cell]:
    """Models of a defense that have P-ASR, O-ASR and every variant of target shift."""
    wanted = (P_ASR, O_ASR, *VARIANTS.values())
    real = (c for c in of if c["attack"] != "none" and c["defense"] not in ("none", "clean_model"))
    return [c for c in real if all(k in c["figures"] for k in wanted)]


def moved(of: Sequence[Cell]) -> list[Cell]:
    """Those that descend from the attacked model, have BEC and its placebos, and other weights than it.

    A model with tensors beside the attacked one's, such as a gate, is another one; it has no distance of weights.
    """
    there = having(repaired(of), [k for k in REFERENCES.values() if k != WEIGHTS])
    return [c for c in there if c["figures"].get(WEIGHTS, 0.0) < NEAR]


def having(of: Sequence[Cell], keys: Iterable[Key]) -> list[Cell]:
    """Those that have all of these figures."""
    wanted = list(keys)
    return [c for c in of if all(k in c["figures"] for k in wanted)]


def purified(of: Sequence[Cell]) -> list[Cell]:
    """Those that the trigger fails on."""
    return [c for c in of if c["figures"][O_ASR] <= PURIFIED]


def whole(of: Sequence[Cell]) -> list[Cell]:
    """Those that the protocol does not call collapsed, and that no oracle made."""
    return [c for c in of if "collapsed" not in c["flags"] and c["defense"].partition("~")[0] not in ORACLES]


POPULATIONS: dict[str, Callable[[Sequence[Cell]], list[Cell]]] = {
    "weights changed": moved,
    "of these purified": lambda of: purified(moved(of)),
    "of these whole, no oracle": lambda of: whole(purified(moved(of))),
    "purified, whole, no oracle, trained anew too": lambda of: whole(purified(repaired(of))),
}
ASKED = "of these whole, no oracle"
"""Models that look safe: what the variant is chosen and judged on."""


# ---- the statistic ---------------------------------------------------------------------------------------------------
def places(values: Sequence[float]) -> np.ndarray:
    """Ranks between -1/2 and 1/2 with mean 0; equal figures share their mean rank."""
    return (rankdata(values) - (len(values) + 1) / 2) / max(1, len(values))


def sides(of: Sequence[Cell], keys: Sequence[Key]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ranks of a measure and of P-ASR among the models of each attacked model; a combination is the mean of ranks."""
    groups: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for c in of:
        groups[attacked(c)].append(c)
    found = []
    for mine in (groups[k] for k in sorted(groups)):
        # Sums of whole and half ranks are exact, so that equal ones stay equal.
        ranks = np.sum([rankdata([c["figures"][k] for c in mine]) for k in keys], axis=0)
        found.append((places(ranks), places([c["figures"][P_ASR] for c in mine])))
    return found


def sums(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(Attacked models, 3): products of x and y, of x, and of y with themselves."""
    return np.array([[x @ y, x @ x, y @ y] for x, y in pairs]).reshape(-1, 3)


def correlation(parts: np.ndarray) -> np.ndarray:
    """From sums (..., 3) over attacked models: the correlation of ranks within attacked models; NaN of a constant."""
    xy, xx, yy = np.moveaxis(parts, -1, 0)
    size = np.sqrt(xx * yy)
    found: np.ndarray = np.where(size > 0, xy / np.where(size > 0, size, 1), math.nan)
    return found


def picks(models: int) -> np.ndarray:
    """Which attacked models each draw of the bootstrap takes: the same for all measures."""
    return np.random.default_rng(0).integers(models, size=(DRAWS, models))


def drawn(of: Sequence[Cell], keys: Sequence[Key]) -> tuple[float, np.ndarray]:
    """The correlation, and that of every draw of attacked models.

    No draws are made where fewer than `FEWEST` attacked models have repaired ones that differ in both figures.
    """
    parts = sums(sides(having(of, keys), keys))
    telling = int((parts[:, 1:] > 0).all(1).sum())
    own = float(correlation(parts.sum(0))) if len(parts) else math.nan
    again = correlation(parts[picks(len(parts))].sum(1)) if telling >= FEWEST else np.array([])
    return own, again


def room(again: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of draws; NaN without any."""
    known = again[~np.isnan(again)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return float(low), float(high)


def chosen(of: Sequence[Cell]) -> str:
    """The variant of target shift that ranks P-ASR best on the models it is developed on; the first of equal ones.

    Raises:
        ValueError: none of them ranks anything there.
    """
    models = POPULATIONS[ASKED](part(of, DEVELOPED))
    found = {name: drawn(models, (key,))[0] for name, key in VARIANTS.items()}
    known = {name: v for name, v in found.items() if not math.isnan(v)}
    if not known:
        raise ValueError("no variant of target shift can be chosen: no model of the developing part is purified")
    return max(known, key=known.__getitem__)


def apart(of: Sequence[Cell], first: Sequence[Key], second: Sequence[Key]) -> tuple[float, float, float]:
    """The difference of two measures' correlations and its 95 % interval, over the same draws."""
    of = having(of, (*first, *second))
    (a, draws_a), (b, draws_b) = drawn(of, first), drawn(of, second)
    return a - b, *room(draws_a - draws_b if len(draws_a) == len(draws_b) else np.array([]))


# ---- from a run ------------------------------------------------------------------------------------------------------
def kept() -> set[Key]:
    """Figures that the page needs."""
    shifts = {("shift_target", ""), *(("shift_target_clean", f"model={i}") for i in range(3))}
    return {k for keys in MEASURES.values() for k in keys} | {P_ASR, NET} | shifts


def settings(runs: Sequence[Path]) -> dict[str, str]:
    """Label of a defense -> those of its parameters in which defenses of its name differ."""
    told: dict[str, dict[str, Any]] = {}
    for run in runs:
        for c in read_table(run / "cells.parquet"):
            told[c["defense"]] = json.loads(c["defense_params"])
    found = {}
    for label, params in told.items():
        alike = [p for other, p in told.items() if other.partition("~")[0] == label.partition("~")[0]]
        differ = [n for n, v in params.items() if any(p.get(n) != v for p in alike)]
        found[label] = ", ".join(f"{n} {params[n]}" for n in differ)
    return found


# ---- the page --------------------------------------------------------------------------------------------------------
def plain(value: float) -> str:
    """A figure without unit, empty for none; zero has no sign."""
    text = "" if math.isnan(value) else f"{value:.2f}"
    return text.removeprefix("-") if text and not float(text) else text


def told(own: float, again: np.ndarray) -> str:
    """`figure (low to high)`."""
    low, high = room(again)
    return plain(own) + ("" if math.isnan(low) or math.isnan(own) else f" ({plain(low)} to {plain(high)})")


def table(head: Sequence[object], body: Sequence[Sequence[object]]) -> list[str]:
    """A table of the page."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *body)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def splits(of: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The parts that the page tells apart."""
    return {"developed on": part(of, DEVELOPED), "held out": part(of, HELD_OUT), "both": both(of)}


def both(of: Sequence[Cell]) -> list[Cell]:
    """The cells of the two parts; a whole run has others."""
    return [*part(of, DEVELOPED), *part(of, HELD_OUT)]


def without(of: Sequence[Cell]) -> list[str]:
    """Attacked models of which no repaired one has P-ASR, with the reason."""
    why: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for name, cells in splits(of).items():
        if name == "both":
            continue
        known = {attacked(c) for c in cells if P_ASR in c["figures"]}
        for c in cells:
            if c["defense"] == "none" and attacked(c) not in known:
                why[name][c["attack"], str(c["seed"])] = c["reasons"].get("p_asr_ra") or "no reason stored"
    return [
        f"Without P-ASR, and so in no figure of the part {name}: "
        + ", ".join(f"{a} under seed {s} (`{reason}`)" for (a, s), reason in sorted(found.items()))
        + "."
        for name, found in why.items()
    ]


def counts(of: Sequence[Cell]) -> list[str]:
    """How many models stand behind every figure, and how many of them woke."""
    body = []
    for split, cells in splits(of).items():
        for name, choose in POPULATIONS.items():
            mine = choose(cells)
            woken = sum(c["figures"][P_ASR] >= BACK for c in mine)
            body.append([split, name, len({attacked(c) for c in mine}), len(mine), woken])
    return table(["part", "models", "attacked models", "repaired", f"P-ASR of {100 * BACK:.0f} % or more"], body)


def correlations(cells: Sequence[Cell]) -> list[str]:
    """Every measure's correlation with P-ASR in one part, by population."""
    body = []
    for name, keys in MEASURES.items():
        row: list[object] = [name]
        for label, choose in POPULATIONS.items():
            open_to = name not in LINEAGE or "trained anew" not in label
            row.append(told(*drawn(choose(cells), keys)) if open_to else "")
        body.append(row)
    return table(["measure", *POPULATIONS], body)


def by_defense(of: Sequence[Cell], settings: Mapping[str, str]) -> list[str]:
    """What became of every defense over the attacked models."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for c in of:
        if c["attack"] != "none" and c["defense"] != "clean_model" and {P_ASR, O_ASR} <= set(c["figures"]):
            groups[c["defense"]].append(c)
    body = []
    for label in sorted(groups, key=lambda n: (n.partition("~")[0], settings.get(n, ""))):
        mine = groups[label]
        clean = purified(mine)
        fine = [c for c in clean if "collapsed" not in c["flags"]]
        woken = sum(c["figures"][P_ASR] >= BACK for c in fine)
        models = len({attacked(c) for c in mine})
        shown = [label.partition("~")[0], settings.get(label, ""), models, len(clean), len(clean) - len(fine), woken]
        body.append([*shown, middle(fine, P_ASR), middle(fine, NET)])
    head = ["defense", "setting", "attacked models", "purified", "of these collapsed", "of the others woken"]
    return table([*head, "their median P-ASR", "net of controls"], body)


def middle(of: Sequence[Cell], key: Key) -> str:
    """The median in %, of those that have the figure."""
    known = [c["figures"][key] for c in of if key in c["figures"]]
    return f"{100 * float(np.median(known)):.1f}" if known else ""


def verdict(of: Sequence[Cell]) -> list[str]:
    """What the held-out models say of the variant that was chosen."""
    name = chosen(of)
    keys = MEASURES[name]
    models = POPULATIONS[ASKED](part(of, HELD_OUT))
    own, again = drawn(models, keys)
    low, high = room(again)
    if math.isnan(own) or math.isnan(low):
        return [f"Chosen: {name}. The held-out models are too few to judge it."]
    holds = "it ranks them" if low > 0 else "it ranks them the wrong way" if high < 0 else "no ranking is shown"
    said = [
        f"Chosen on the first part: {name}. On {len(models)} held-out models that look safe, from "
        f"{len({attacked(c) for c in models})} attacked ones, its rank correlation with P-ASR is {told(own, again)}: "
        f"{holds}."
    ]
    for other in (*REFERENCES, "target shift"):
        if other == name:
            continue
        gap, bottom, top = apart(models, keys, MEASURES[other])
        if math.isnan(bottom):
            continue
        word = "it is higher" if bottom > 0 else "it is lower" if top < 0 else "no difference is shown"
        said.append(f"Against {other}: {plain(gap)} ({plain(bottom)} to {plain(top)}), {word}.")
    return said


def section(about: Mapping[str, Any], all_cells: Sequence[Cell], recognised: Sequence[str]) -> list[str]:
    """The part of the page; `recognised` says what target shift does on attacked models."""
    seeds = sorted({c["seed"] for c in all_cells})
    groups = sorted({c["attack"] for c in all_cells} - {"none"})
    first, second = ([", ".join(sorted(s[0])), ", ".join(map(str, sorted(s[1])))] for s in (DEVELOPED, HELD_OUT))
    title = "## What foretells that a model wakes"
    cells = both(all_cells)
    return [
        *(title, "", "From the tables of:", "", *(f"`{c}`" for c in about["command"].split(" && ")), ""),
        f"digits, small_cnn, {len(groups)} attacks, seeds {', '.join(map(str, seeds))}, {about['recipe']['epochs']} "
        f"epochs, {machine(about)}. Defenses have one or two fixed settings, mild and strong, below their published "
        "effort, so that models of all kinds come out: the last table judges these settings alone.",
        "",
        f"Fixed beforehand, in `docs/signals.py`: a variant of [target shift](methods/target_shift.md) is chosen on "
        f"{first[0]} under seed {first[1]} and judged once on {second[0]} under seeds {second[1]}. The variants are "
        "net of clean models; combinations are means of ranks. Models that look safe are purified (O-ASR of at most "
        "20 %), did not collapse, and were made by no oracle. Changed after figures had been read, because BEC did not "
        "see what Fine-pruning's gate removes: `bec` sees it from version 4 on, and models with added tensors, which "
        "have no distance of weights, stand in all rows but that one's. So the suite ran a second time, with the "
        "methods' later versions: the held-out attacks and seeds are no longer unseen, and what is chosen and judged "
        "below is no fresh test. The first time `stages` was chosen and no ranking by it was shown.",
        *("", *counts(cells), "", *(x for line in without(cells) for x in (line, ""))),
        "Spearman's rank correlation with P-ASR under the retuning attack, within attacked models: figures are ranked "
        "among the models that come from one attacked model, so that attacks whose triggers are easier to learn do not "
        "count as signal. In brackets 95 % of a bootstrap over attacked models, which share data and, within a seed, "
        f"clean models; none is made of fewer than {FEWEST}, and of so few as here they are too narrow.",
        *("", "Held out:", "", *correlations(part(all_cells, HELD_OUT))),
        *(
            "",
            "Developed on, where the variant with the highest figure in the third column was taken:",
            "",
            *correlations(part(all_cells, DEVELOPED)),
        ),
        *("", "Both:", "", *correlations(cells), ""),
        *(f"- {sentence}" for sentence in (*verdict(cells), *recognised)),
        *("", "What became of each defense, in both parts:", ""),
        *by_defense(cells, about["settings"]),
        *("", f"All figures: [{SUITE}.json](measured/{SUITE}.json)."),
    ]
