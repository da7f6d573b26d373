"""Checks of attacks: which rows are poisoned and what is told of them, and whether the hooks keep SNAPSHOT's word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sleeperbench.contracts.attack import Mark, Role
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.kit.poison import stamp
from sleeperbench.testing.base import Skipped, called, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.hooked import hooked
from sleeperbench.testing.stage import BASE, RATE, stage
from sleeperbench.testing.subject import Made, Subject


def _set(s: Subject) -> tuple[Made, Any, Tensor, Tensor, Tensor]:
    """The poisoned set, the clean rows, which of these each row came from, and the marks DIRTY and CLEAN."""
    made: Made = s.answer()
    train, _ = stage(BASE).attackable
    p = made.poisoned
    foreign = ~torch.isin(p.data.ids, train.ids)
    if bool(foreign.any()):
        raise Skipped("there are rows with ids that the training set does not have: see `poisoned_ids`")
    where = torch.searchsorted(train.ids, p.data.ids)
    return made, train, where, p.mark == Mark.DIRTY, p.mark == Mark.CLEAN


@check(
    "poisoned_ids",
    "attack",
    what="Rows keep their slots and ids; only rows marked `appended` come on top, and these are poisoned.",
    remedy="Replace rows in place (`kit.poison.poison`), or append copies with `appended` True; never move rows.",
)
def poisoned_ids(s: Subject) -> None:
    """Compare the ids with the training set's."""
    p = s.answer().poisoned
    train, _ = stage(BASE).attackable
    lost = train.ids[~torch.isin(train.ids, p.data.ids)]
    hold(not len(lost), f"{len(lost)} rows of the training set are gone")
    own = p.data.ids[~p.appended]
    hold(torch.equal(own, train.ids), f"the {len(own)} rows not marked `appended` are not the training rows in order")
    hold(torch.isin(p.data.ids, train.ids).all(), "appended rows have ids that the training set does not have")
    hold(not bool((p.appended & (p.mark == Mark.CLEAN)).any()), "appended rows are marked CLEAN")


@check(
    "poisoned_rows",
    "attack",
    what="Only eligible rows are poisoned; marks, trigger ids and true labels say of every row what was done to it.",
    remedy="Choose among `eligible`; set mark, trigger_id and true_labels of the chosen rows together; leave every "
    "other row's image and label as they are.",
)
def poisoned_rows(s: Subject) -> None:
    """Compare with the clean rows."""
    made, train, where, dirty, clean = _set(s)
    p, eligible = made.poisoned, stage(BASE).attackable[1]
    taboo = ~eligible[where] & ~clean
    hold(not bool(taboo.any()), f"{int(taboo.sum())} rows are poisoned that are not eligible")
    hold(torch.equal(p.true_labels, train.labels[where]), "true_labels are not the labels before poisoning")
    hold(bool((p.trigger_id[clean] == -1).all()), "rows marked CLEAN have a trigger_id")
    known = (p.trigger_id[dirty] >= 0) & (p.trigger_id[dirty] < max(1, len(made.backdoor.triggers)))
    hold(bool(known.all()), "rows marked DIRTY have no trigger_id of a trigger")
    same = (p.data.images == train.images[where]).flatten(1).all(1)
    hold(bool(same[clean].all()), f"{int((~same & clean).sum())} rows marked CLEAN have changed pixels")
    odd = ~dirty & (p.data.labels != train.labels[where])
    hold(not bool(odd.any()), f"{int(odd.sum())} rows not marked DIRTY have a changed label")


@check(
    "poisoned_labels",
    "attack",
    what="Rows marked DIRTY have the label that their trigger asks for.",
    remedy="Label them with `trigger.targets.target(true labels)`; a clean-label attack chooses rows that have it.",
)
def poisoned_labels(s: Subject) -> None:
    """Ask each trigger's target map."""
    made, _, _, dirty, _ = _set(s)
    p = made.poisoned
    for i, trigger in enumerate(made.backdoor.triggers):
        rows = dirty & (p.trigger_id == i)
        wrong = p.data.labels[rows] != trigger.targets.target(p.true_labels[rows])
        hold(
            not bool(wrong.any()),
            f"trigger {trigger.name}: {int(wrong.sum())} of {int(rows.sum())} rows are mislabelled",
        )


@check(
    "poisoned_pixels",
    "attack",
    what="Rows marked DIRTY are `stamp(clean rows, trigger, Role.TRAIN, ctx)` to the 8-bit level: training and test "
    "triggers differ only as Role says.",
    remedy="Poison through `kit.poison.stamp` or `poison`, and let `apply` do under Role.TRAIN what training does.",
)
def poisoned_pixels(s: Subject) -> None:
    """Stamp the clean rows and compare."""
    made, train, where, dirty, _ = _set(s)
    p = made.poisoned
    ctx = s.ctx(stage(BASE))
    for i, trigger in enumerate(made.backdoor.triggers):
        rows = dirty & (p.trigger_id == i)
        expected = stamp(train.rows(where[rows]), trigger, Role.TRAIN, ctx).images
        far = (p.data.images[rows].int() - expected.int()).abs().flatten(1)
        # One level, since a rounding may fall either way with another batch.
        wrong = (far > 1).any(1) if far.numel() else torch.zeros(0, dtype=torch.bool)
        hold(
            not bool(wrong.any()), f"trigger {trigger.name}: {int(wrong.sum())} of {len(wrong)} rows are not its stamp"
        )


@check(
    "poison_rate",
    "attack",
    what="round(rate N) rows are marked DIRTY, or all that may be if these are fewer; rate 0 leaves the set clean, "
    "rate 1 poisons or is refused, and a positive rate that rounds to no row is refused.",
    remedy="Count over all rows, not over the eligible, with `kit.poison.rows_at`; appended rows and covers come on "
    "top; refuse with a ValueError or NotApplicable that says why.",
)
def poison_rate(s: Subject) -> str:
    """Count."""
    made, train, _, dirty, _ = _set(s)
    method, at = s.method(), stage(BASE)
    train, eligible = at.attackable
    got, wanted, spread = int(dirty.sum()), round(RATE * len(train)), len(made.backdoor.triggers)
    zero = method.poison(train, made.backdoor, eligible, 0.0, s.ctx(at))
    hold(not bool((zero.mark != Mark.CLEAN).any()), "rate 0 poisons rows")
    if not spread or s.snapshot == "none":
        hold(not got, f"{got} rows are marked DIRTY, though there is nothing to poison with")
        return "nothing is poisoned"
    hold(got <= wanted + spread, f"rate {RATE} of {len(train)} rows is {wanted}, but {got} are marked DIRTY")
    may = torch.zeros_like(eligible)
    for trigger in made.backdoor.triggers:
        there = trigger.targets.target(train.labels) == train.labels
        may |= there if s.info.get("clean_label") else trigger.targets.counts(train.labels, train.ids)
    least = min(wanted, int((may & eligible).sum())) - spread
    hold(got >= max(1, least), f"rate {RATE} of {len(train)} rows is {wanted}, but only {got} are marked DIRTY")
    most = _dirty_at(1.0, s, made)
    hold(most is None or got <= most <= len(train), f"at rate 1 {most} rows are marked DIRTY")
    few = 0.4 / len(train)
    none = _dirty_at(few, s, made)
    hold(none is None, f"rate {few:.2g} of {len(train)} rows is no row, but is not refused: {none} are marked DIRTY")
    return f"{got} of {len(train)} rows"


def _dirty_at(rate: float, s: Subject, made: Made) -> int | None:
    """How many rows are marked DIRTY at another rate; None where the attack refuses it.

    Raises:
        Failed: it raises something else.
    """
    at = stage(BASE)
    train, eligible = at.attackable
    with called(f"poison() at rate {rate:.2g}"):
        try:
            p = s.method().poison(train, made.backdoor, eligible, rate, s.ctx(at))
        except (ValueError, NotApplicable):
            return None
        return int((p.mark == Mark.DIRTY).sum())


@check(
    "snapshot",
    "attack",
    what="SNAPSHOT is honest: `exact` has no hook that changes images or labels, `declared` has one, `none` leaves "
    "the set clean; hooks train with finite losses, images of whole 8-bit levels in [0, 1] and true marks.",
    remedy='Set SNAPSHOT to "declared" (poison gives a set that stands for what hooks do) or "none"; return float '
    "images in [0, 1], rounded to levels (`kit.generators.straight_through` keeps gradients), int64 labels and marks "
    "from `batch`.",
)
def snapshot(s: Subject) -> str:
    """Train a few steps with the hooks."""
    made: Made = s.answer()
    kind = s.snapshot
    found = hooked(s, BASE)
    if kind == "none":
        marked = bool((made.poisoned.mark != Mark.CLEAN).any())
        hold(not marked, 'SNAPSHOT is "none", but poison gives poisoned rows')
    hold(kind != "declared" or found is not None, 'SNAPSHOT is "declared", but there are no hooks that poison')
    if found is None:
        return f"{kind}, no hooks"
    hold(not found.trouble, f"training with the hooks: {found.trouble}")
    hold(not (found.poisons and kind == "exact"), 'SNAPSHOT is "exact", but the hooks poison batches')
    hold(
        found.poisons or kind != "declared", 'SNAPSHOT is "declared", but the hooks leave images and labels as they are'
    )
    marked = bool((found.marks != Mark.CLEAN).any())
    hold(marked or kind != "declared", "the hooks poison batches, but `batch` marks no row")
    again = hooked(s, BASE, 1)
    assert again is not None
    hold(not again.moved, f"training with the hooks changes {', '.join(again.moved)}")
    unlike = differ(found.net, again.net)
    hold(not unlike, f"two trainings with the hooks under one seed differ: {unlike}")
    return kind
