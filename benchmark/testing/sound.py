"""Whether an answer is well-formed, by kind of method; shared by the base case and all others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sleeperbench.contracts import (
    Backdoor,
    Defense,
    Findings,
    Inverted,
    Mark,
    Measurement,
    Outcome,
    PoisonedSet,
    Role,
    Verdict,
)
from sleeperbench.engine.outcomes import Failed as Refused
from sleeperbench.kit.pixels import to_float
from sleeperbench.testing.base import Failed, called, hold
from sleeperbench.testing.hooked import hooked
from sleeperbench.testing.stage import Variant, stage
from sleeperbench.testing.subject import Made, Subject


def sound(s: Subject, variant: Variant) -> None:
    """Look at the answer on a micro case, once for all checks.

    Raises:
        Failed: a part of it has the wrong type, shape or values.
    """
    look = {"attack": _attack, "defense": _defense, "evaluator": _evaluator}[s.kind]
    s.once(("sound", variant), lambda: look(s, variant))


def trains(s: Subject, variant: Variant) -> None:
    """Train with an attack's hooks.

    Raises:
        Failed: it raises, or a batch or a loss is not as it has to be.
    """
    if s.kind == "attack" and (found := hooked(s, variant)) is not None:
        hold(not found.trouble, f"training with the hooks: {found.trouble}")


def form(value: Any) -> str:
    """Type and shape, in words."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _attack(s: Subject, variant: Variant) -> None:
    made: Made = s.answer(variant)
    hold(isinstance(made.backdoor, Backdoor), f"prepare returns {type(made.backdoor).__name__}, not a Backdoor")
    p = made.poisoned
    hold(isinstance(p, PoisonedSet), f"poison returns {type(p).__name__}, not a PoisonedSet")
    n = len(p.data)
    forms = {"mark": torch.int64, "trigger_id": torch.int64, "true_labels": torch.int64, "appended": torch.bool}
    for name, dtype in forms.items():
        t = getattr(p, name)
        good = isinstance(t, Tensor) and t.shape == (n,) and t.dtype == dtype
        hold(good, f"PoisonedSet.{name} is not {dtype} of shape ({n},)")
    hold(set(p.mark.tolist()) <= {int(m) for m in Mark}, f"PoisonedSet.mark holds {sorted(set(p.mark.tolist()))}")
    hold(p.data.shape == variant.shape, f"poisoned images are {p.data.shape}, not {variant.shape}")
    bad = (p.data.labels < 0) | (p.data.labels >= variant.classes)
    hold(not bool(bad.any()), f"poisoned labels are outside 0..{variant.classes - 1}")
    test = stage(variant).micro.test
    for trigger in made.backdoor.triggers:
        hold(isinstance(trigger.name, str) and trigger.name, "a trigger has no name")
        for role in Role:
            x, gen = to_float(test.images), torch.Generator().manual_seed(5)
            at = f"trigger {trigger.name}, role {role}"
            with called(f"{at}: apply"):
                out = trigger.apply(x, test.labels, test.ids, role, gen)
            good = isinstance(out, Tensor) and out.dtype == torch.float32 and out.shape == x.shape
            hold(good, f"{at}: apply gives {form(out)}, not float32 {tuple(x.shape)}")
            hold(bool(out.isfinite().all()), f"{at}: a pixel is not finite")
            hold(torch.equal(x, to_float(test.images)), f"{at}: apply writes into the images that it gets")


def _defense(s: Subject, variant: Variant) -> None:
    o: Outcome = s.answer(variant)
    hold(isinstance(o, Outcome), f"run returns {type(o).__name__}, not an Outcome")
    at = stage(variant)
    task = s.task(at)
    try:
        at.judge(o, task, at.staged(task, s.value)[0])
    except Refused as e:
        raise Failed(e.reason) from e
    for name, dtype in (("keep", torch.bool), ("relabel", torch.int64)):
        t = getattr(o, name)
        hold(t is None or t.dtype == dtype, f"Outcome.{name} is {getattr(t, 'dtype', '')}, not {dtype}")
    if o.suspicion is not None:
        hold(o.suspicion.is_floating_point(), f"Outcome.suspicion is {o.suspicion.dtype}, not float")
    if o.relabel is not None:
        bad = (o.relabel < 0) | (o.relabel >= variant.classes)
        hold(not bool(bad.any()), f"Outcome.relabel is outside 0..{variant.classes - 1}")
    if o.keep is not None:
        hold(bool(o.keep.any()), "Outcome.keep keeps no row at all")
    if o.alarm is not None:
        good = isinstance(o.alarm, int | float) and math.isfinite(o.alarm)
        hold(good, f"Outcome.alarm is {o.alarm!r}, not a finite float")
    if o.verdict is not None:
        _verdict(o.verdict, variant)
    for inv in o.inverted:
        _inverted(inv, variant)
    _fits(s, o)


def _verdict(v: Verdict, variant: Variant) -> None:
    for name in ("score", "threshold"):
        value = getattr(v, name)
        hold(
            isinstance(value, int | float) and math.isfinite(value), f"Verdict.{name} is {value!r}, not a finite float"
        )
    if v.label_scores is not None:
        shape = tuple(v.label_scores.shape)
        hold(shape == (variant.classes,), f"Verdict.label_scores is {shape}, not ({variant.classes},)")
    if v.pairs is not None:
        shape = tuple(v.pairs.shape)
        hold(len(shape) == 2 and shape[1] == 2, f"Verdict.pairs is {shape}, not (P, 2)")


def _inverted(inv: Inverted, variant: Variant) -> None:
    classes = range(variant.classes)
    hold(
        inv.target in classes and (inv.source is None or inv.source in classes),
        f"Inverted.target {inv.target} is no class",
    )
    hold((inv.mask is None) == (inv.pattern is None), "Inverted has one of mask and pattern only")
    forms = (inv.mask is not None, inv.delta is not None, inv.uses_apply)
    hold(sum(forms) == 1, "Inverted must have mask and pattern, or delta, or uses_apply: exactly one of them")
    shapes = {"mask": (1, *variant.shape[1:]), "pattern": variant.shape, "delta": variant.shape}
    for name, shape in shapes.items():
        t = getattr(inv, name)
        if t is None:
            continue
        hold(tuple(t.shape) == shape, f"Inverted.{name} is {tuple(t.shape)}, not {shape}")
        low = -1.0 if name == "delta" else 0.0
        hold(float(t.min()) >= low and float(t.max()) <= 1, f"Inverted.{name} is outside {low:g}..1")


ANSWERS: dict[str, tuple[str, Callable[[Outcome], object]]] = {
    # An honest choice may leave the model as it is, and then says so.
    "repair": ("a model, or what was chosen instead", lambda o: o.model or o.opaque or o.path or o.chosen),
    "in_training": ("a model", lambda o: o.model or o.opaque),
    "cleansing": ("keep or relabel", lambda o: o.keep is not None or o.relabel is not None),
    "detection": ("a verdict, suspicion or state", lambda o: o.verdict or o.suspicion is not None or o.state),
    "inversion": ("a verdict or inverted triggers", lambda o: o.verdict or o.inverted),
}
"""What an answer of INFO's kind holds; other kinds are not asked."""


def _fits(s: Subject, o: Outcome) -> None:
    kind = str(s.info.get("kind"))
    if kind in ANSWERS:
        words, has = ANSWERS[kind]
        hold(has(o), f"INFO['kind'] is {kind!r}, but the answer holds no more than {_parts(o)}: it needs {words}")
    own = {n for n in ("prepare", "score", "stamp", "predict") if getattr(s.cls, n) is not getattr(Defense, n)}
    hold(bool(s.info.get("scores")) == ("score" in own), "INFO['scores'] is True if and only if score() is written")
    early = bool(s.info.get("prepares"))
    hold(early == ("prepare" in own), "INFO['prepares'] is True if and only if prepare() is written")
    hold("score" not in own or o.state is not None, "score() is written, but the outcome gives it no state")
    hold("score" in own or o.alarm is None, "Outcome.alarm is a threshold of scores, but score() is not written")
    hold(not o.opaque or "predict" in own, "the outcome is opaque, but predict() is not written")
    hold(bool(s.info.get("stamps")) == ("stamp" in own), "INFO['stamps'] is True if and only if stamp() is written")
    uses = any(inv.uses_apply for inv in o.inverted)
    hold(not uses or "stamp" in own, "an inverted trigger says uses_apply, but stamp() is not written")


def _parts(o: Outcome) -> str:
    names = [n for n, v in vars(o).items() if isinstance(v, Tensor) or v]
    return ", ".join(names) or "nothing"


def _evaluator(s: Subject, variant: Variant) -> None:
    found: Findings = s.answer(variant)
    hold(isinstance(found, Findings), f"measure returns {type(found).__name__}, not Findings")
    for row in found.rows:
        hold(isinstance(row, Measurement), f"a row is a {type(row).__name__}, not a Measurement")
        good = row.value is None or (isinstance(row.value, int | float) and not isinstance(row.value, bool))
        hold(good, f"{row.metric}: its value is {row.value!r}, not a number or None")
        finite = row.value is None or math.isfinite(row.value)
        hold(finite, f"{row.metric}: its value is {row.value}, which is not finite")
        hold((row.value is None) == bool(row.reason), f"{row.metric}: it has both or neither of a value and a reason")
        hold(row.stage in ("", "attacked", "defended", "reactivated"), f"{row.metric}: stage is {row.stage!r}")
    for name, picture in found.pictures.items():
        good = picture.dtype == torch.uint8 and picture.dim() == 3 and len(picture) in (1, 3)
        hold(good, f"picture {name} is {picture.dtype} {tuple(picture.shape)}, not uint8 (1 or 3, H, W)")
