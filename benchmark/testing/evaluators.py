"""Checks of evaluators: which figures they write, within which bounds, and what they say when there are none."""

from __future__ import annotations

from collections import Counter

from sleeperbench.contracts import Findings, Measurement
from sleeperbench.engine import artifacts
from sleeperbench.testing.base import Failed, Skipped, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.stage import BASE, stage
from sleeperbench.testing.subject import Subject


def _odd(s: Subject, found: Findings) -> str:
    names = [m.name for m in s.cls.METRICS]  # type: ignore[attr-defined]
    written = {r.metric for r in found.rows}
    if odd := sorted(written - set(names)):
        return f"it writes {', '.join(odd)}, which METRICS does not name"
    missing = [n for n in names if n not in written]
    return f"there is no row for {', '.join(missing)}, neither a figure nor a reason" if missing else ""


@check(
    "metrics",
    "evaluator",
    what="Every metric of METRICS has a row with a figure or a reason, and no other is written.",
    remedy="Add the name to METRICS, or write `Measurement(metric=..., value=None, reason=...)` where there is none.",
)
def metrics(s: Subject) -> None:
    """Compare names."""
    odd = _odd(s, s.answer())
    hold(not odd, odd)


@check(
    "bounds",
    "evaluator",
    what="Figures lie within the metric's low and high; of a share, value = count / total.",
    remedy="Correct the figure, or low and high in METRICS if they were wrong.",
)
def bounds(s: Subject) -> None:
    """Compare with METRICS."""
    known = {m.name: m for m in s.cls.METRICS}  # type: ignore[attr-defined]
    for row in s.answer().rows:
        m = known.get(row.metric)
        if m is None or row.value is None:
            continue
        inside = m.low <= row.value <= m.high
        hold(inside, f"{_of(row)} is {row.value:g}, outside {m.low:g}..{m.high:g}")
        if row.count is not None or row.total is not None:
            whole = row.count is not None and row.total and 0 <= row.count <= row.total
            hold(whole, f"{_of(row)} has count {row.count} of {row.total}")
            share = (row.count or 0) / (row.total or 1)
            hold(abs(share - row.value) < 1e-9, f"{_of(row)} is {row.value:g}, but {row.count} of {row.total}")


@check(
    "qualifiers",
    "evaluator",
    what="Qualifiers are `k=v` joined by `;` in key order, and no two rows have the same metric and qualifier.",
    remedy='Build them sorted: `";".join(f"{k}={v}" for k, v in sorted(parts.items()))`; the headline has none.',
)
def qualifiers(s: Subject) -> None:
    """Take them apart."""
    rows = s.answer().rows
    for row in rows:
        pairs = [p.split("=") for p in row.qualifier.split(";")] if row.qualifier else []
        good = all(len(p) == 2 and p[0] and p[1] for p in pairs)
        hold(good, f"{row.metric}: qualifier {row.qualifier!r} is not made of `k=v`")
        keys = [p[0] for p in pairs]
        hold(keys == sorted(set(keys)), f"{row.metric}: the keys of {row.qualifier!r} are not in order")
    for (metric, qualifier), n in Counter((r.metric, r.qualifier) for r in rows).items():
        hold(n == 1, f"{n} rows are {metric} with qualifier {qualifier!r}")


@check(
    "no_trigger",
    "evaluator",
    what="On attack `none` (no triggered images) it answers with rows and reasons.",
    remedy='Ask `if case.bd_test is None` first and give every metric that needs a trigger the reason "no_trigger".',
)
def no_trigger(s: Subject) -> None:
    """Measure a clean model."""
    needs = s.cls.NEEDS  # type: ignore[attr-defined]
    if needs.outcome == ("scores",):
        raise Skipped("nobody is asked about triggered images where there are none")
    before = _odd(s, s.answer())
    run = s.run(situation="zoo_no_trigger" if needs.scope == "zoo" else "no_trigger")
    hold(not (run.error or run.greedy), f"without a trigger it raises {run.error or run.greedy}")
    odd = _odd(s, run.answer) if run.answer is not None else ""
    hold(not odd or odd == before, f"without a trigger {odd}")


@check(
    "nan_model",
    "evaluator",
    what="A model whose weights are NaN gets no perfect score.",
    remedy="Count an answer that is not finite as right for nobody (a label of -1), or raise FloatingPointError; "
    "argmax over NaN is a class like any other.",
)
def nan_model(s: Subject) -> str:
    """Measure a ruined model."""
    s.answer()
    if "net" not in s.run().opened:
        raise Skipped("it does not look at the model")
    run = s.run(situation="nan_model")
    hold(not run.greedy, run.greedy)
    if run.answer is None:
        return run.declined or run.error
    known = {m.name: m for m in s.cls.METRICS}  # type: ignore[attr-defined]
    figures = [(known[r.metric], r) for r in run.answer.rows if r.metric in known and r.value is not None]
    best = {m.name: m.high if m.better == "up" else m.low for m, _ in figures if m.better != "none"}
    perfect = {_of(r) for m, r in figures if m.better == "up" and r.value == m.high}
    hold(not perfect, f"a model of NaN has the best {', '.join(sorted(perfect))}")
    # The lowest ASR alone is no praise where the accuracy beside it is nil.
    falls_short = any(r.metric in best and r.value != best[r.metric] for _, r in figures)
    hold(falls_short or not best, f"a model of NaN is perfect in {', '.join(sorted(best))}")
    return f"{len(figures)} figures"


@check(
    "save_load",
    "evaluator",
    what="Findings that are read back have the rows, curves and models that were written; pictures become PNG.",
    remedy="Keep to Measurement's fields, JSON in curves, uint8 (1 or 3, H, W) in pictures, and `kit.pack` for models.",
)
def save_load(s: Subject) -> None:
    """Write, read, compare."""
    found: Findings = s.answer()
    folder = stage(BASE).place()
    try:
        artifacts.write_findings(folder, found)
        again = artifacts.read_findings(folder)
    except (TypeError, ValueError, RuntimeError) as e:
        raise Failed(f"writing and reading raises {type(e).__name__}: {e}") from e
    for name in ("rows", "curves", "models"):
        unlike = differ(getattr(found, name), getattr(again, name), name)
        hold(not unlike, f"after writing and reading {unlike}")
    pictures = len(list(folder.glob("*.png")))
    hold(pictures == len(found.pictures), f"{len(found.pictures)} pictures become {pictures} files")


def _of(row: Measurement) -> str:
    return f"{row.metric} ({row.qualifier})" if row.qualifier else row.metric
