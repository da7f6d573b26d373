"""Writes docs/claims.md and its JSON from finished runs: `python docs/claims.py NAME PAPER "COMMAND" RUN [RUN ...]`.

Holds runs of one suite, such as one per seed, against what a paper claims, as `compare-paper` does. The page has every
docs/measured/claims-*.json, of which this writes claims-NAME.json; `python docs/claims.py --again` renders it alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from record import aged, combined, machine

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.rows import read_table
from sleeperbench.published.judge import FAILS, HOLDS, NOT_RUN, OUTSIDE, Judged, Line, judge
from sleeperbench.published.paper import Claim, of_suite
from sleeperbench.published.results import Results

DOCS = Path(__file__).resolve().parent
VERDICTS = (HOLDS, FAILS, NOT_RUN)
SIDE = ("what", "mean", "lower", "upper", "interval", "seeds", "plus")


def held(paper_name: str, runs: Sequence[Path]) -> dict[str, Any]:
    """What the page needs of runs that are held against a paper."""
    rows = [r for run in runs for r in read_table(run / "measurements.parquet")]
    abouts = [json.loads((run / "run.json").read_text()) for run in runs]
    suite = abouts[0]["suite"] | {"seeds": sorted({s for a in abouts for s in a["suite"]["seeds"]})}
    paper = of_suite(paper_name)
    judged = judge(paper, Results(rows), abouts[0] | {"suite": suite})
    flags = flagged(c for run in runs for c in read_table(run / "cells.parquet"))
    trained = {d: n["train"] for d, n in suite.get("dataset_rows", {}).items() if "train" in n}
    used = {m for j in judged if any(line.verdict in (HOLDS, FAILS) for line in j.lines) for m in metrics(j.claim)}
    return {
        "about": combined(runs, rows, used),
        "paper": {"id": paper.id, "title": paper.title, "source": paper.source},
        "seeds": suite["seeds"],
        "rows": {d: trained.get(d, n["rows"]["train"]) for d, n in abouts[0]["datasets"].items()},
        "counts": {v: sum(j.verdict == v for j in judged) for v in VERDICTS},
        "differs": differs(judged),
        "claims": [claim(j, flags) for j in judged],
    }


def metrics(of: Claim) -> set[str]:
    """Metrics that a claim compares or asks of its units."""
    sides = [of.compared, *of.given]
    named = [choice for s in sides for choice in (s.left, s.than, s.beside) if choice is not None]
    return {choice.metric for choice in named if choice.metric}


def claim(j: Judged, flags: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A claim with its units: figures of those that were told, counted reasons of the others."""
    told = [line for line in j.lines if line.verdict in (HOLDS, FAILS)]
    rest = [line for line in j.lines if line.verdict not in (HOLDS, FAILS)]
    return {
        "id": j.claim.id,
        "says": j.claim.says,
        "where": j.claim.where,
        "metric": j.claim.compared.left.metric,
        "ours": j.claim.ours,
        "share": j.claim.share,
        "test": j.claim.compared.test,
        "verdict": j.verdict,
        "units": {v: j.count(v) for v in (*VERDICTS, OUTSIDE)},
        "lines": [unit(line, flags.get(line.unit, ())) for line in told],
        "absent": dict(Counter(line.reason for line in rest).most_common()),
    }


def unit(line: Line, flags: Sequence[str]) -> dict[str, Any]:
    """One unit's figures, both sides, and what was printed."""
    printed = line.published or {}
    return {
        "unit": line.unit,
        "verdict": line.verdict,
        "flags": list(flags),
        "left": side(line.left),
        "right": side(line.right),
        "firm": None if line.difference is None else line.difference["firm"],
        **({"reason": line.reason} if line.reason else {}),
        "printed": {
            k: printed[k] for k in ("table", "left", "right", "unconfirmed") if printed.get(k) not in (None, "")
        },
    }


def side(of: Mapping[str, Any] | None) -> dict[str, Any]:
    """A side of a comparison, without what it does not have."""
    return {k: v for k, v in (of or {}).items() if k in SIDE and v is not None}


def flagged(cells: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Unit -> flags of its cells, those that a cell has beside its neighbours, such as `collapsed`, among them."""
    found: dict[str, set[str]] = {}
    for c in cells:
        found.setdefault(c["cell"].rpartition("/")[0], set()).update(filter(None, c["flag"].split(";")))
    return {name: sorted(flags) for name, flags in found.items() if flags}


def differs(judged: Iterable[Judged]) -> list[str]:
    """How the settings of the units that were told differ from the printed ones."""
    return list(
        dict.fromkeys(d for j in judged for line in j.lines if line.verdict in (HOLDS, FAILS) for d in line.differs)
    )


# ---- the page --------------------------------------------------------------------------------------------------------
def shown(of: Mapping[str, Any]) -> str:
    """A side in figures; the interval is Student's from three seeds on, else the range."""
    if "mean" not in of:
        return ""
    text = f"{of['mean']:.3g}"
    if "lower" in of and of.get("interval") != "single":
        text += f" ({of['lower']:.3g} to {of['upper']:.3g})"
    return text


def figure(line: Mapping[str, Any]) -> str:
    """Our side, whether it differs from the other within the spread of the seeds, and which seeds are not in it."""
    text = shown(line["left"]) + (" within the spread of the seeds" if line["firm"] is False else "")
    return text + (f"; {line['reason']}" if line.get("reason") else "")


def other(line: Mapping[str, Any], test: str) -> str:
    """`> 0.2`, or `> 0.5 (0.4 to 0.6), what it is`."""
    right = line["right"]
    text = f"{test} {shown(right)}" + (f" + {right['plus']:g}" if right.get("plus") else "")
    return text if right.get("what") == "bound" else f"{text}, {right.get('what', '')}"


def printed(line: Mapping[str, Any]) -> str:
    """The printed figures of both sides, with their table."""
    p = line["printed"]
    values = " against ".join(f"{p[k]:.3g}" for k in ("left", "right") if k in p)
    return " ".join(
        filter(None, [values or ("no figure" if p else ""), f"(table {p['table']})" if "table" in p else ""])
    )


def short(reasons: Mapping[str, int]) -> str:
    """The most frequent reason; of a long list its first two entries, and how many more."""
    parts = next(iter(reasons), "").split("; ")
    return "; ".join(parts[:2]) + (f"; and {len(parts) - 2} more" if len(parts) > 2 else "")


def cell(text: object) -> str:
    """Text in a cell of a table."""
    return str(text).replace("|", "\\|").replace("<", "&lt;")


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    """A table of the page, or nothing for no rows."""
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (head, *body)]
    return [] if len(lines) == 1 else ["", lines[0], "|---" * len(head) + "|", *lines[1:]]


def section(name: str, run: Mapping[str, Any]) -> list[str]:
    """One run against its paper."""
    claims, about = run["claims"], run["about"]
    sets = ", ".join(f"{n} ({rows} training rows)" for n, rows in run["rows"].items())
    text = ["", f"## {name}: {run['paper']['title']}", "", f"<{run['paper']['source']}>, `{run['command']}`"]
    text += [
        "",
        f"{sets}, seeds {', '.join(map(str, run['seeds']))}, {about['recipe']['epochs']} epochs, {machine(about)}.",
        *aged(about.get("methods", {}), Registry.discover("none")),
    ]
    told = [c for c in claims if c["lines"]]
    text += table(
        ["claim", "verdict", "units that hold", "do not", "not run", "outside"],
        (
            [f"`{c['id']}` {c['says']} ({c['where']})", c["verdict"], *(c["units"][v] for v in (*VERDICTS, OUTSIDE))]
            for c in told
        ),
    )
    text += table(
        ["claim", "unit", "holds", "ours", "asked", "printed", "flags"],
        (
            [
                *(f"`{c['id']}`", line["unit"], "yes" if line["verdict"] == HOLDS else "no"),
                figure(line),
                *(other(line, c["test"]), printed(line), ", ".join(line["flags"])),
            ]
            for c in told
            for line in c["lines"]
        ),
    )
    bounds = [f"`{c['id']}`: {c['ours']}" for c in told if c["ours"]]
    text += ["", "Bounds and readings that are ours: " + "; ".join(bounds) + "."] if bounds else []
    text += ["", "Differs from the print: " + "; ".join(run["differs"]) + "."] if run["differs"] else []
    resting = [f"`{c['id']}`" for c in told if c["metric"] == "bec"]
    if resting:
        text += ["", f"On BEC alone: {', '.join(resting)}. What BEC says beside its controls stands in [findings]"]
        text[-1] += "(findings.md#bec-beside-its-controls)."
    absent = [c for c in claims if not c["lines"]]
    if absent:
        text += ["", f"Not run at all, {len(absent)} of {len(claims)}:", ""]
        text += [f"- `{c['id']}` {c['says']} ({c['where']}): {cell(short(c['absent']))}" for c in absent]
    return text


def page(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The whole page."""
    return [
        "# Claims of the papers",
        "",
        "Written by `docs/claims.py`: what finished runs say of papers' claims, as `sleeperbench compare-paper` does. "
        "[Papers](papers.md) has the rules. A claim holds where all its units do, or the share that it asks for; "
        "it does not where that cannot be reached any more; else it is not run. None of these runs has a paper's size: "
        "read a verdict with what differs, and with its flags (`weak`: the attack did not implant well; `tuned`: a "
        "setting of it was found by trying; `collapsed`: in some seed the repair lost more than 10 points of accuracy, "
        "or half of robust accuracy). A claim on purified models is asked of them alone, seed by seed: a figure names "
        "the seeds that are not in it. Figures are fractions but for metrics with a unit; in brackets Student's 95 % "
        "interval of three seeds or more, else the range.",
        *table(
            ["run", "paper", "suite", "claims", "hold", "do not hold", "not run"],
            (
                [name, run["paper"]["id"], run["about"]["suite"], len(run["claims"]), *run["counts"].values()]
                for name, run in found.items()
            ),
        ),
        *(line for name, run in found.items() for line in section(name, run)),
        "",
        "All figures: " + ", ".join(f"[claims-{n}.json](measured/claims-{n}.json)" for n in found) + ".",
    ]


def main() -> int:
    """Write both files, or the page alone."""
    measured = DOCS / "measured"
    if sys.argv[1:] != ["--again"]:
        name, paper, command, *folders = sys.argv[1:]
        runs = [Path(f) for f in folders]
        out = {"command": command} | held(paper, runs)
        (measured / f"claims-{name}.json").write_text(json.dumps(out, indent=1) + "\n")
    found = {p.stem.removeprefix("claims-"): json.loads(p.read_text()) for p in sorted(measured.glob("claims-*.json"))}
    (DOCS / "claims.md").write_text("\n".join(page(found)) + "\n")
    print(f"wrote docs/claims.md: {', '.join(found)}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] != ["--again"] and len(sys.argv) < 5:
        sys.exit(__doc__)
    sys.exit(main())
