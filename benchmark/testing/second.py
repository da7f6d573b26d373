"""The second phase of a defense on a micro case: score() and stamp(), asked about the same images in other company."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor

from sleeperbench.contracts import Outcome
from sleeperbench.contracts.context import Cost
from sleeperbench.engine import artifacts
from sleeperbench.engine.questions import SOCKET, Asked, Desk, queried
from sleeperbench.engine.work import STATISTICS
from sleeperbench.kit.classifier import load
from sleeperbench.kit.pixels import to_float
from sleeperbench.testing import surroundings
from sleeperbench.testing.base import Failed, called, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.sound import form
from sleeperbench.testing.stage import BASE, Variant, stage
from sleeperbench.testing.subject import Subject


def read_back(s: Subject, variant: Variant) -> Outcome:
    """The outcome of a micro case, written and read as the engine does."""
    folder = stage(variant).place()
    artifacts.write_outcome(folder, s.answer(variant))
    return artifacts.read_outcome(folder)


def second(s: Subject, variant: Variant) -> None:
    """What a defense has of a second phase, as it has to be on a micro case that it answered.

    Raises:
        Failed: it is not.
        NotApplicable: it declines.
    """
    if s.kind != "defense":
        return
    if s.info.get("scores"):
        scored(s, variant)
    stamped(s, variant)


def room(values: Tensor) -> float:
    """By how much two scores may differ and still count as the same."""
    return 1e-4 * max(1.0, float(values.abs().max()))


def _state(s: Subject, variant: Variant) -> Any:
    try:
        return read_back(s, variant).state
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise Failed(f"writing and reading the outcome raises {type(e).__name__}: {e}") from e


def scored(s: Subject, variant: Variant) -> Tensor:
    """Scores (N,) of clean and triggered test images, asked for once per method and micro case.

    Raises:
        Failed: they depend on other rows or change something, or score() raises.
        NotApplicable: score() declines.
    """
    return cast(Tensor, s.once(("scored", variant), lambda: _scored(s, variant)))


def _scored(s: Subject, variant: Variant) -> Tensor:
    o, state = s.answer(variant), _state(s, variant)
    at, method = stage(variant), s.method()
    bd = artifacts.read_rendered(at.store.fetch(at.attacked) / "bd_test.safetensors", at.micro.test)
    assert bd is not None
    n = 40 if variant == BASE else 14  # other cases show that it works: two batches of 7 of each sort are enough
    x = to_float(torch.cat([at.micro.test.images[:n], bd.data.images[:n]]))
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
        with called("score()"):
            out = method.score(state, judge, rows)
        whole = isinstance(out, Tensor) and out.dim() in (1, 2) and len(out) == len(rows)
        hold(whole and out[:1].numel() in range(1, 2 + STATISTICS), f"score() gives {form(out)} for {len(rows)} images")
        return out.detach().double().cpu().view(len(rows), -1)

    try:
        whole = score(x)
        hold(bool(whole.isfinite().all()), "a score is not finite")
        back, parts = score(x.flip(0)).flip(0), torch.cat([score(p) for p in x.split(7)])
        alone = torch.cat([score(x[i : i + 1]) for i in (0, n + 1)])
    finally:
        changed = surroundings.moved(before)
        surroundings.put_back(before)
    hold(not changed, f"score() changes {', '.join(changed)}")
    unlike = differ(net, load(judged), "the net") or differ(x, given, "the images")
    hold(not unlike, f"after score() {unlike}")
    pairs = (("in reverse order", whole, back), ("in batches of 7", whole, parts), ("alone", whole[[0, n + 1]], alone))
    for how, a, b in pairs:
        bad = int(((a - b).abs() > room(whole)).any(1).sum())
        hold(not bad, f"asked {how}, {bad} of {len(a)} images get another score")
    return whole[:, 0]


def stamped(s: Subject, variant: Variant) -> int:
    """How many inverted triggers are put on by stamp(); each on the micro test images.

    Raises:
        Failed: what comes out are no images, or they depend on each other, or stamp() raises.
        NotApplicable: stamp() declines.
    """
    o: Outcome = s.answer(variant)
    asked = [inv for inv in o.inverted if inv.uses_apply]
    state = _state(s, variant) if asked else None
    if state is None:
        return 0
    x = to_float(stage(variant).micro.test.images)
    for inv in asked:
        with called("stamp()"):
            out = s.method().stamp(state, inv, x)
            back = s.method().stamp(state, inv, x.flip(0))
        hold(out.shape == x.shape and out.dtype == x.dtype, f"stamp() gives {form(out)}")
        low, high = float(out.min()), float(out.max())
        hold(low >= 0 and high <= 1, f"stamp() gives pixels from {low:g} to {high:g}")
        same = back.shape == out.shape and torch.allclose(out, back.flip(0), atol=1e-5)
        hold(same, "stamp() gives other images in reverse order")
    return len(asked)
