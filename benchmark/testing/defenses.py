"""Checks of defenses: what comes back from disk, the second phase, and the engine's own child."""

from __future__ import annotations

import shutil
from typing import Any

from sleeperbench.contracts import Outcome
from sleeperbench.engine import artifacts
from sleeperbench.engine.outcomes import Failed as Refused
from sleeperbench.kit.classifier import load
from sleeperbench.kit.predict import predict
from sleeperbench.testing.base import Failed, Skipped, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.second import read_back, scored, stamped
from sleeperbench.testing.stage import BASE, stage
from sleeperbench.testing.subject import Subject

MEMORY_MB = 2048
CHILD_SECONDS = 60.0


@check(
    "save_load",
    "defense",
    what="The outcome that is read back is the one that was written; a repaired model is rebuilt and answers alike.",
    remedy="Return models by `kit.pack` or `tune`; use string keys, finite numbers, lists and strings in `chosen` and "
    "in the JSON part of `state`.",
)
def save_load(s: Subject) -> None:
    """Write, read, compare, predict."""
    o: Outcome = s.answer()
    try:
        again = read_back(s, BASE)
        unlike = differ(o, again, "the outcome")
        hold(not unlike, f"after writing and reading {unlike}")
        test = stage(BASE).micro.test.images
        for name, model in {"the model": o.model, **o.path}.items():
            back = again.model if name == "the model" else again.path[name]
            if model is not None and back is not None:
                same = differ(predict(load(model), test), predict(load(back), test), f"the answers of {name}")
                hold(not same, f"after rebuilding {same}")
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise Failed(f"writing and reading raises {type(e).__name__}: {e}") from e


@check(
    "score_rows",
    "defense",
    what="Second phase: score() gives (N,) or (N, 1 + S) finite values that repeat, each from its own row alone, and "
    "leaves model and process as they were.",
    remedy="No statistics over the batch, no draws per call: fix overlays and thresholds in run() and keep them in "
    "`state`; put the net into eval mode with `kit.predict.evaluating`.",
)
def score_rows(s: Subject) -> None:
    """Ask about the same images in other company."""
    if not s.info.get("scores"):
        raise Skipped("it has no second phase")
    if s.answer().state is None:
        raise Skipped("the outcome has no state: see `outputs`")
    scored(s, BASE)


@check(
    "stamp_images",
    "defense",
    what="Second phase of generator-type inversion: stamp() gives images of the same shape in [0, 1], row by row.",
    remedy="Keep the generator in `state`, clamp to [0, 1], and treat each image by itself.",
)
def stamp_images(s: Subject) -> None:
    """Stamp the micro test images."""
    if not stamped(s, BASE):
        raise Skipped("no inverted trigger says uses_apply")


@check(
    "child",
    "defense",
    what=f"In the engine's own child process it answers within {CHILD_SECONDS:g} s and {MEMORY_MB} MB, as it does "
    "here.",
    remedy="Import only sleeperbench.contracts and sleeperbench.kit, write to `ctx.scratch` alone, and work in batches "
    "instead of keeping activations of all rows.",
    full=True,
)
def child(s: Subject) -> str:
    """Run it as a benchmark run does."""
    o, at = s.answer(), stage(BASE)
    task, used = s.task(at), list[dict[str, Any]]()
    early = {"prepare": task.preparation()} if s.info.get("prepares") else {}
    folder = at.place()
    for what, part in {**early, "run": task}.items():
        before = folder
        folder, about = at.staged(part, s.value)
        if used:
            shutil.copytree(before / "out", folder / "in" / "prepared")
        artifacts.write_json(folder / "in" / "case.json", about | {"what": what})
        try:
            used.append(at.child(folder, CHILD_SECONDS, MEMORY_MB << 20))
        except Refused as e:
            raise Failed(f"{e.status}: {e.reason}") from e
    peak = max(u["peak_mb"] for u in used)
    hold(peak <= MEMORY_MB, f"its peak is {peak:.0f} MB")
    unlike = differ(o, artifacts.read_outcome(folder / "out"), "the outcome")
    hold(not unlike, f"in the child {unlike}")
    return f"{sum(u['cpu_seconds'] for u in used):.1f} processor seconds, {peak:.0f} MB"
