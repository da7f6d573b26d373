"""A check of defenses and evaluators: that the base case makes them do what they are for.

What declines to act keeps every other promise without having shown anything: two answers that change nothing are equal.
The base case is made so that methods have something to do: its model is backdoored, and its clean rows are enough for
the honest rule to accept a model that lost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sleeperbench.contracts import NotApplicable, Outcome
from sleeperbench.engine import artifacts
from sleeperbench.kit.classifier import load
from sleeperbench.kit.predict import predict
from sleeperbench.testing.base import Failed, Skipped, check, hold
from sleeperbench.testing.second import room, scored
from sleeperbench.testing.sound import ANSWERS, sound
from sleeperbench.testing.stage import BASE, CLEAN, stage
from sleeperbench.testing.subject import Subject

SAME = 1e-3
"""A repaired model whose logits all lie within this share of the largest is the one that was handed over, rounded."""


@check(
    "acts",
    "defense evaluator",
    what=f"On the base case (a backdoored model, {CLEAN} clean rows) it does what INFO's kind is for: the repaired "
    "model answers otherwise, a cleanser drops, relabels or ranks rows, a judge tells classes, rows or inputs apart, "
    "claims a trigger, or gives the attacked model another score than a clean one, an evaluator has a figure of the "
    "kind of cell that it is for.",
    remedy="Give INFO['micro'] what takes effect: more steps or candidates, a lower bar (a share of hits, a "
    f"threshold), and a fixed setting where the honest choice wants more than {CLEAN} clean rows; what leaves models "
    "alone by design is of kind `control`.",
)
def acts(s: Subject) -> str:
    """See whether anything came of the base run."""
    s.answer()
    try:
        sound(s, BASE)
    except Failed as e:
        raise Skipped("the answer is not as it has to be: see `outputs`") from e
    if s.kind == "evaluator":
        return _measures(s)
    kind = str(s.info.get("kind"))
    if kind == "in_training":
        raise Skipped("what is trained anew answers otherwise, whatever was done")
    if kind not in ANSWERS:
        raise Skipped(f"kind `{kind}` promises nothing that can be looked for")
    acts = {"repair": _changes, "cleansing": _ranks}
    return acts.get(kind, _tells)(s, s.answer())


def _changes(s: Subject, o: Outcome) -> str:
    if o.opaque:
        raise Skipped("it gives no model, it only predicts")
    why = o.chosen.get("unchanged", "")
    hold(o.model is not None, f"it leaves the model as it is{f': {why}' if why else ''}")
    assert o.model is not None
    at = stage(BASE)
    bd = artifacts.read_rendered(at.store.fetch(at.attacked) / "bd_test.safetensors", at.micro.test)
    assert bd is not None
    x = torch.cat([at.micro.test.images, bd.data.images])
    after, before = predict(load(o.model), x), predict(load(at.model(at.attacked)), x)
    off = float((after - before).abs().max())
    turned = bool((after.argmax(1) != before.argmax(1)).any())
    differs = turned or not off <= SAME * max(1.0, float(before.abs().max()))
    words = f"its model answers as the one that it was handed, to {off:.2g} in a logit"
    hold(differs, f"{words}{f': {why}' if why else ''}")
    return f"logits differ by up to {off:.2g}"


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
        except (Failed, NotApplicable) as e:
            raise Skipped("score() is not as it has to be: see `score_rows`") from e
        if _unlike(scores):
            return "its scores of inputs differ"
    hold(v is not None, "it gives all inputs or rows the same score")
    assert v is not None
    if v.label_scores is not None:
        same = f"each of {len(v.label_scores)} labels has the score {float(v.label_scores[0]):g}"
        hold(_unlike(v.label_scores), f"it claims no trigger, and {same}")
        return "label scores differ"
    # Other architectures and numbers of classes would say nothing: a count of them is no judgement of the model.
    beside = s.run(situation="clean_model")
    hold(not beside.error, f"of a clean model it raises {beside.error}")
    if beside.answer is None or beside.answer.verdict is None:
        raise Skipped(f"there is no verdict of a clean model to compare with: {beside.declined or 'it gives none'}")
    clean = beside.answer.verdict.score
    unlike = _unlike(torch.tensor([v.score, clean], dtype=torch.float64))
    hold(unlike, f"its verdict is {v.score:g} of the attacked model, and {clean:g} of a clean one")
    return f"its verdict is {v.score:g} of the attacked model, {clean:g} of a clean one"


def _measures(s: Subject) -> str:
    """What compares an undefended model with its twin may have a figure for the undefended cell alone."""
    reasons: dict[str, str] = {}
    twin = s.cls.NEEDS.twin  # type: ignore[attr-defined]
    situations = [s.situation, "undefended"] if twin else [s.situation]
    for situation in situations:
        found = s.run(situation=situation).answer
        rows = [] if found is None else found.rows
        if n := sum(r.value is not None for r in rows):
            return f"{n} figures"
        reasons |= {r.metric: r.reason for r in rows}
    words = ", ".join(f"{m} ({r})" for m, r in reasons.items())
    raise Failed(f"it has no figure of an attacked model ({' or '.join(situations)}): {words}")


def _unlike(values: Tensor | None) -> bool:
    """Whether values differ by more than two answers about the same thing may."""
    if values is None or not values.numel():
        return False
    values = values.double()
    if not bool(values.isfinite().all()):
        return len(values.unique()) > 1
    return float(values.max() - values.min()) > room(values)
