"""`sleeperbench compare-paper`: a run against what a paper printed and claims."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeperbench.errors import BadInput

if TYPE_CHECKING:
    from sleeperbench.published.judge import Judged, Line
    from sleeperbench.published.paper import Paper

MISMATCH = 4


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run beside a paper, as all three forms of the answer show it."""

    suite: str
    run: Path
    paper: Paper
    about: Mapping[str, Any]
    judged: list[Judged]
    printed: list[dict[str, Any]]
    counts: Mapping[str, int]


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "compare-paper",
        help="hold a run against what a paper printed and claims",
        description="Says of every claim of the suite's paper whether it holds in a run, with our figure and its "
        "interval over seeds, the printed one, and how the two settings differ; then every printed figure beside "
        "ours. Exit code 4 if a claim does not hold, else 0; what was not run never counts as holding. "
        "docs/papers.md has the rules.",
        epilog="Example: `sleeperbench compare-paper paper-safety-cpu --results runs/paper-safety-cpu`",
    )
    p.add_argument("suite", metavar="SUITE", help="a paper's suite, such as paper-safety; the run may be of another")
    p.add_argument("--results", type=Path, required=True, metavar="RUN", help="run folder")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as Markdown")


def main(args: argparse.Namespace) -> int:
    """Print the comparison."""
    from sleeperbench.engine.rows import read_table
    from sleeperbench.published.judge import FAILS, HOLDS, NOT_RUN, figures, judge
    from sleeperbench.published.paper import of_suite
    from sleeperbench.published.results import Results

    paper = of_suite(args.suite)
    about = _about(args.results)
    results = Results(read_table(args.results / "measurements.parquet"))
    judged = judge(paper, results, about)
    counts = {v: sum(j.verdict == v for j in judged) for v in (HOLDS, FAILS, NOT_RUN)}
    printed = figures(paper, results, about)
    c = Comparison(
        suite=args.suite, run=args.results, paper=paper, about=about, judged=judged, printed=printed, counts=counts
    )
    if args.json:
        print(json.dumps(_answer(c), indent=1))
    else:
        print("\n".join(_markdown(c) if args.markdown else _text(c)))
    for j in judged:
        if j.verdict == FAILS:
            print(f"does not hold: {j.claim.id}: {j.claim.says}", file=sys.stderr)
    return MISMATCH if counts[FAILS] else 0


def _about(run: Path) -> Mapping[str, Any]:
    try:
        about = json.loads((run / "run.json").read_bytes())
    except (OSError, ValueError) as e:
        raise BadInput(f"{run} is no finished run folder (run.json: {e}); name a folder that `run` wrote") from e
    if not isinstance(about, dict) or not isinstance(about.get("suite"), dict):
        raise BadInput(f"{run / 'run.json'} does not say which suite was run; name a folder that `run` wrote")
    return about


def _answer(c: Comparison) -> dict[str, Any]:
    claims = [
        {
            "id": j.claim.id,
            "says": j.claim.says,
            "where": j.claim.where,
            "ours": j.claim.ours,
            "share": j.claim.share,
            "verdict": j.verdict,
            "lines": [dataclasses.asdict(line) for line in j.lines],
        }
        for j in c.judged
    ]
    return {
        "suite": c.suite,
        "run_suite": c.about["suite"].get("name"),
        "paper": {
            "id": c.paper.id,
            "title": c.paper.title,
            "source": c.paper.source,
            "unconfirmed": list(c.paper.unconfirmed),
        },
        "counts": dict(c.counts),
        "claims": claims,
        "figures": c.printed,
    }


def _text(c: Comparison) -> Iterator[str]:
    yield f"{c.paper.title} ({c.paper.source})"
    yield f"run {c.run}, suite {c.about['suite'].get('name')}; figures are fractions unless the metric has a unit"
    for j in c.judged:
        yield ""
        yield f"{j.verdict.upper()}: {j.claim.id}: {j.claim.says} ({j.claim.where})"
        if j.claim.ours:
            yield f"  ours: {j.claim.ours}"
        if j.claim.share < 1:
            yield f"  asked of {j.claim.share:g} of the cells"
        for line in j.lines:
            yield f"  {line.verdict:<13} {line.unit}: {_said(line, j)}"
        for differs, units in _grouped(j).items():
            yield f"  differs from the print ({units}): {differs}"
    if c.printed:
        yield ""
        yield "printed figures"
        for f in c.printed:
            yield f"  {f['unit']} {f['metric']}: {_side(f['ours'])}; printed {f['published']:.4g} (table {f['table']})"
    for note in c.paper.unconfirmed:
        yield f"unconfirmed: {note}"
    yield ""
    yield "claims: " + ", ".join(f"{n} {v}" for v, n in c.counts.items())


def _markdown(c: Comparison) -> Iterator[str]:
    yield f"# {_cell(c.paper.title)}"
    yield ""
    yield f"Source: <{c.paper.source}>. Run of suite `{c.about['suite'].get('name')}`. Claims: " + ", ".join(
        f"{n} {v}" for v, n in c.counts.items()
    )
    yield ""
    yield "| claim | verdict | cells that hold | do not | not run | outside |"
    yield "|---|---|---|---|---|---|"
    for j in c.judged:
        numbers = " | ".join(str(j.count(v)) for v in ("holds", "does not hold", "not run", "outside"))
        yield f"| `{j.claim.id}` {_cell(j.claim.says)} ({_cell(j.claim.where)}) | {j.verdict} | {numbers} |"
    for j in c.judged:
        yield ""
        yield f"## {j.claim.id}: {j.verdict}"
        yield ""
        yield _cell(j.claim.says) + (f" Ours: {_cell(j.claim.ours)}" if j.claim.ours else "")
        yield ""
        yield "| cell | verdict | figures |"
        yield "|---|---|---|"
        for line in j.lines:
            yield f"| {_cell(line.unit)} | {line.verdict} | {_cell(_said(line, j))} |"
        for differs, units in _grouped(j).items():
            yield ""
            yield f"Differs from the print ({_cell(units)}): {_cell(differs)}"
    if c.printed:
        yield ""
        yield "## Printed figures"
        yield ""
        yield "| cell | metric | ours | printed | table | differs |"
        yield "|---|---|---|---|---|---|"
        for f in c.printed:
            parts = [f["unit"], f["metric"], _side(f["ours"]), f"{f['published']:.4g}", f["table"]]
            yield "| " + " | ".join(_cell(p) for p in (*parts, "; ".join(f["differs"]))) + " |"
    for note in c.paper.unconfirmed:
        yield ""
        yield f"Unconfirmed: {_cell(note)}"


def _said(line: Line, judged: Judged) -> str:
    """The two sides of a line, or why there is no verdict, and what was printed."""
    parts = []
    if line.reason:
        parts.append(line.reason)
    if line.left is not None and line.left["mean"] is not None and line.right is not None:
        right = "bound" if line.right["what"] == "bound" else line.right["what"]
        plus = f" + {line.right['plus']:g}" if line.right.get("plus") else ""
        value = "?" if line.right["mean"] is None else _side(line.right)
        parts.append(f"{_side(line.left)} {judged.claim.compared.test} {value}{plus} ({right})")
    if line.difference is not None and line.difference["firm"] is False:
        parts.append("within the spread of the seeds")
    if line.published is not None:
        sides = [line.published.get(k) for k in ("left", "right")]
        said = " against ".join(f"{v:.4g}" for v in sides if v is not None)
        doubt = f", unconfirmed: {line.published['unconfirmed']}" if line.published["unconfirmed"] else ""
        where = f"table {line.published['table']}" if line.published["table"] else "text"
        parts.append(f"printed {said or 'no figure'} ({where}{doubt})")
    return "; ".join(parts)


def _side(side: Mapping[str, Any]) -> str:
    if side["mean"] is None:
        return f"not run: {side['reason']}"
    if side["what"] == "bound" or side["interval"] == "single":
        return f"{side['mean']:.4g}"
    return f"{side['mean']:.4g} [{side['lower']:.4g}, {side['upper']:.4g}]"


def _grouped(judged: Judged) -> dict[str, str]:
    """What differs from the print, and the cells of which that is said."""
    found: dict[str, list[str]] = {}
    for line in judged.lines:
        if line.differs:
            found.setdefault("; ".join(line.differs), []).append(line.unit)
    return {d: units[0] if len(units) == 1 else f"{len(units)} cells" for d, units in found.items()}


def _cell(text: str) -> str:
    """Text of others in a cell of a Markdown table: one line, no bar, nothing that a browser reads as a tag."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
