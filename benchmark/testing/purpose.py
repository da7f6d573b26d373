"""A check of defenses and evaluators: that the base case makes them do what they are for.

What declines to act keeps every other promise without having shown anything: two answers that change nothing are equal.
The base case is made so that methods have something to do: its model is backdoored, and its clean rows are enough for
the honest rule to accept a model that lost nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sleeperbench.contracts import Outcome
from sleeperbench.engine import artifacts
from sleeperbench.kit.classifier import load
from sleeperbench.kit.predict import predict
from sleeperbench.testing.base import Skipped, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.second import scored
from sleeperbench.testing.sound import ANSWERS, sound
from sleeperbench.testing.stage import BASE, CLEAN, Variant, stage
from sleeperbench.testing.subject import Subject

OTHERS = (Variant(arch="micro_nobn"), Variant(channels=1, classes=2), Variant(classes=43))
"""Cases that a verdict without label scores is compared with; checks `architectures` and `shapes` run them anyway."""


@check(
    "acts",
    "defense evaluator",
    what=f"On the base case (a backdoored model, {CLEAN} clean rows) it does what INFO's kind is for: the repaired "
    "model answers otherwise, a cleanser drops, relabels or ranks rows, a judge tells classes, rows, inputs or models "
    "apart or claims a trigger, an evaluator has a figure.",
    remedy="Give INFO['micro'] what takes effect: more steps or candidates, a lower bar (a share of hits, a "
    f"threshold), and a fixed setting where the honest choice wants more than {CLEAN} clean rows; what leaves models "
    "alone by design is of kind `control`.",
)
def acts(s: Subject) -> str:
    """See whether anything came of the base run."""
    s.answer()
    try:
        sound(s, BASE)
    except AssertionError as e:
        raise Skipped("the answer is not as it has to be: see `outputs`") from e
    if s.kind == "evaluator":
        return _measures(s)
    kind = str(s.info.get("kind"))
    if kind not in ANSWERS:
        raise Skipped(f"kind `{kind}` promises nothing that can be looked for")
    acts = {"repair": _changes, "in_training": _changes, "cleansing": _ranks}
    return acts.get(kind, _tells)(s, s.answer())


def _changes(s: Subject, o: Outcome) -> str:
    if o.opaque:
        raise Skipped("it gives no model, it only predicts")
    why = o.chosen.get("unchanged", "")
    hold(o.model is not None, f"it leaves the model as it is{f': {why}' if why else ''}")
    assert o.model is not None
    at = stage(BASE)
    test = at.micro.test.images
    same = not differ(predict(load(o.model), test), predict(load(at.model(at.attacked)), test))
    hold(not same, f"its model answers bit for bit as the one that it was handed{f': {why}' if why else ''}")
    return ""


def _marks(o: Outcome) -> str:
    """What was done to training rows."""
    at = stage(BASE)
    if o.keep is not None and not bool(o.keep.all()):
        return f"drops {int((~o.keep).sum())} of {len(o.keep)} rows"
    labels = artifacts.read_set(at.store.fetch(at.attacked), at.micro.train).data.labels
    if o.relabel is not None and (n := int((o.relabel != labels).sum())):
        return f"relabels {n} of {len(labels)} rows"
    return "ranks rows" if _unlike(o.suspicion) else ""


def _ranks(s: Subject, o: Outcome) -> str:
    done = _marks(o)
    hold(done, "it keeps all rows with their labels, and its suspicion, if any, is the same for all")
    return done


def _tells(s: Subject, o: Outcome) -> str:
    """An honest judge may flag nothing; but then something was compared, and came out unlike."""
    v = o.verdict
    if o.inverted or (v is not None and v.pairs is not None and len(v.pairs)):
        return f"claims {len(o.inverted)} triggers" if o.inverted else "names pairs"
    if done := _marks(o):
        return done
    if s.info.get("scores") and o.state is not None:
        try:
            scores = scored(s, BASE)
        except Exception as e:  # whatever score() raises
            raise Skipped("score() is not as it has to be: see `score_rows`") from e
        if _unlike(scores):
            return "its scores of inputs differ"
    hold(v is not None, "it gives all inputs or rows the same score")
    assert v is not None
    if v.label_scores is not None:
        same = f"each of {len(v.label_scores)} labels has the score {float(v.label_scores[0]):g}"
        hold(_unlike(v.label_scores), f"it claims no trigger, and {same}")
        return "label scores differ"
    others: list[Any] = [s.run(variant).answer for variant in OTHERS]
    others = [a.verdict.score for a in others if a is not None and a.verdict is not None]
    hold(not others or set(others) != {v.score}, f"its verdict is {v.score:g} on all {1 + len(others)} models")
    return "its verdicts of other models differ" if others else ""


def _measures(s: Subject) -> str:
    """An evaluator of defended cells may have a figure for the undefended one alone."""
    reasons: dict[str, str] = {}
    situations = [s.situation, "undefended"] if s.situation == "repaired" else [s.situation]
    for situation in situations:
        found = s.run(situation=situation).answer
        rows = [] if found is None else found.rows
        if n := sum(r.value is not None for r in rows):
            return f"{n} figures"
        reasons |= {r.metric: r.reason for r in rows}
    words = ", ".join(f"{m} ({r})" for m, r in reasons.items())
    hold(False, f"it has no figure of an attacked model: {words}")
    return ""


def _unlike(values: Tensor | None) -> bool:
    return values is not None and len(values.unique()) > 1
