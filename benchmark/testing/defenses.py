"""Checks of defenses: what comes back from disk, the second phase, and the engine's own child."""

from __future__ import annotations

import shutil
import weakref
from typing import Any

import torch
from torch import Tensor

from sleeperbench.contracts import Outcome
from sleeperbench.contracts.context import Cost
from sleeperbench.engine import artifacts
from sleeperbench.engine.outcomes import Failed as Refused
from sleeperbench.engine.questions import SOCKET, Asked, Desk, queried
from sleeperbench.engine.work import STATISTICS
from sleeperbench.kit.classifier import load
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import predict
from sleeperbench.testing import surroundings
from sleeperbench.testing.base import Failed, Skipped, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.sound import form
from sleeperbench.testing.stage import BASE, stage
from sleeperbench.testing.subject import Subject

MEMORY_MB = 2048
CHILD_SECONDS = 60.0


def _read_back(s: Subject) -> Outcome:
    folder = stage(BASE).place()
    artifacts.write_outcome(folder, s.answer())
    return artifacts.read_outcome(folder)


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
        again = _read_back(s)
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
    o: Outcome = s.answer()
    state = _read_back(s).state
    if state is None:
        raise Skipped("the outcome has no state: see `outputs`")
    at, method = stage(BASE), s.method()
    bd = artifacts.read_rendered(at.store.fetch(at.attacked) / "bd_test.safetensors", at.micro.test)
    assert bd is not None
    x = to_float(torch.cat([at.micro.test.images[:40], bd.data.images[:40]]))
    judged = o.model or at.model(at.attacked)
    net, given = load(judged), x.clone()
    access = vars(s.cls.ACCESS)  # type: ignore[attr-defined]
    judge: Any = net
    if queried(access):
        place, labels = at.place(), access["model"] == "labels"
        desk, judge = Desk(place, net, judged.spec, labels), Asked(place / SOCKET, judged.spec, labels, Cost())
        weakref.finalize(at, desk.close)
    before = surroundings.look()

    def score(rows: Tensor) -> Tensor:
        out = method.score(state, judge, rows)
        whole = isinstance(out, Tensor) and out.dim() in (1, 2) and len(out) == len(rows)
        hold(whole and out[:1].numel() in range(1, 2 + STATISTICS), f"score() gives {form(out)} for {len(rows)} images")
        return out.detach().double().cpu().view(len(rows), -1)

    try:
        whole = score(x)
        hold(bool(whole.isfinite().all()), "a score is not finite")
        back, parts = score(x.flip(0)).flip(0), torch.cat([score(p) for p in x.split(7)])
        alone = torch.cat([score(x[i : i + 1]) for i in (0, 41)])
    finally:
        changed = surroundings.moved(before)
        surroundings.put_back(before)
    hold(not changed, f"score() changes {', '.join(changed)}")
    unlike = differ(net, load(judged), "the net") or differ(x, given, "the images")
    hold(not unlike, f"after score() {unlike}")
    room = 1e-4 * max(1.0, float(whole.abs().max()))
    pairs = (("in reverse order", whole, back), ("in batches of 7", whole, parts), ("alone", whole[[0, 41]], alone))
    for how, a, b in pairs:
        bad = int(((a - b).abs() > room).any(1).sum())
        hold(not bad, f"asked {how}, {bad} of {len(a)} images get another score")


@check(
    "stamp_images",
    "defense",
    what="Second phase of generator-type inversion: stamp() gives images of the same shape in [0, 1], row by row.",
    remedy="Keep the generator in `state`, clamp to [0, 1], and treat each image by itself.",
)
def stamp_images(s: Subject) -> None:
    """Stamp the micro test images."""
    o: Outcome = s.answer()
    asked = [inv for inv in o.inverted if inv.uses_apply]
    state = _read_back(s).state
    if not asked or state is None:
        raise Skipped("no inverted trigger says uses_apply")
    x = to_float(stage(BASE).micro.test.images)
    for inv in asked:
        out = s.method().stamp(state, inv, x)
        hold(out.shape == x.shape and out.dtype == x.dtype, f"stamp() gives {form(out)}")
        hold(
            float(out.min()) >= 0 and float(out.max()) <= 1, f"stamp() gives pixels from {out.min():g} to {out.max():g}"
        )
        back = s.method().stamp(state, inv, x.flip(0)).flip(0)
        hold(torch.allclose(out, back, atol=1e-5), "stamp() gives other images in reverse order")


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
