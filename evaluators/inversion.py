"""Recovered triggers: whether they work, how near they come to the true ones, and what a repair leaves of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sleeperbench import EvalCase, Evaluator, Findings, Inverted, Measurement, Metric, Needs
from sleeperbench.contracts import NotApplicable, Rendered
from sleeperbench.data.images import ImageSet
from sleeperbench.evaluators.accuracy import answers, share
from sleeperbench.kit.masks import appliable
from sleeperbench.kit.recovered import Stamper, difference, picture, some, stamped, victims

_PAIRS = 100
_DISTANCES = ("apd", "apd_rel", "apd_raw", "mask_iou")
_OWN = ("reasr", "reasr_any", "reasr_clean", *_DISTANCES)
_REPAIR = {"reasr_before": "attacked", "reasr_after": "defended"}
"""Metrics of a repair that is made with recovered triggers, and the model that each is measured on."""
_NONE_RIGHT = "none_right"
_EMPTY = torch.zeros(0, dtype=torch.bool)
Stamp = Callable[[Inverted, ImageSet, str], Tensor]
"""(claim, images, part of the case they are of) -> uint8 images with the recovered trigger."""


@dataclass(frozen=True, kw_only=True)
class Inversion(Evaluator):
    """What the triggers that a defense claims to have recovered are worth.

    All images are held-out test images; those with a recovered trigger are rounded to 8 bit. Success is measured on
    the undefended model over the images whose label is not the claimed one (of a source-specific claim: its source
    class) and that it classifies correctly without a trigger; on a clean model over those that this one does. Distance
    is measured on up to 100 pairs per true target, spread evenly over the triggered test images.

    Headlines are means over the true targets; a true target without a claim counts as an empty trigger: success 0, the
    distance of doing nothing. Claims of other labels stand beside them as `label=...` alone. Without a true trigger
    (attack `none`) success is the mean over claimed labels, which are natural backdoors. Of several claims for one
    label the one with the most success on the probe rows counts, never the nearest one.

    Of a repair that is made with the triggers of the method it wraps (`unlearn:istr`) the success of these same
    triggers is measured on the undefended model and on the repaired one, on the same images, as means over the labels
    they lead to. Without attack that says whether natural backdoors are gone.

    An inverter that claims nothing says so by `chosen["claimed"]`; a defense without that and without recovered
    triggers has none of the other figures (`no_inversion`).
    """

    INFO = {
        "title": "Recovered triggers",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, "
        "journal={arXiv preprint arXiv:2508.04094}, year={2025}}",
        "kind": "inversion",
        "version": 5,
        "api": 1,
        "micro": {},
    }
    NEEDS = Needs(outcome=("inverted", "model"), undefended=True, clean_models=3, trigger="live")
    METRICS = (
        Metric(
            name="reasr",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="up",
            doc="Test images that the attacked model classifies correctly, and with the recovered trigger as its label",
        ),
        Metric(
            name="reasr_any",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="The same images that the attacked model misclassifies with the recovered trigger, whatever the label",
        ),
        Metric(
            name="reasr_clean",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="reasr of the same recovered triggers on independent clean models, mean over models",
        ),
        Metric(
            name="apd",
            unit="",
            low=0.0,
            high=1.0,
            better="down",
            doc="Mean absolute pixel difference between images with recovered and with true trigger",
        ),
        Metric(
            name="apd_rel",
            unit="",
            low=0.0,
            high=1000.0,
            better="down",
            doc="apd relative to that of an empty trigger; below 1 is better than nothing",
        ),
        Metric(
            name="apd_raw",
            unit="",
            low=0.0,
            high=1.0,
            better="down",
            doc="Mean absolute difference of mask times pattern",
        ),
        Metric(
            name="mask_iou",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="up",
            doc="Intersection over union of the recovered mask above 0.5 and the true trigger's pixels",
        ),
        Metric(
            name="reasr_before",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="Test images with a trigger that a repair was made with that get its label from the undefended model",
        ),
        Metric(
            name="reasr_after",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="down",
            doc="The same images that get its label from the repaired model",
        ),
    )

    def measure(self, case: EvalCase) -> Findings:
        """All rows, and a picture of true against recovered triggers."""
        outcome = case.outcome
        if not outcome.inverted and "claimed" not in outcome.chosen:
            return Findings(rows=(*_nothing(_OWN, "no_inversion"), *_repair(case)))
        unrepaired = _nothing(_REPAIR, "no_repair")
        stamp = Stamper(case)
        if not all(stamp.knows(claim) for claim in outcome.inverted):
            reason = "needs_stamp: a recovered trigger has neither mask nor delta"
            return Findings(rows=(*_nothing(_OWN, reason), *unrepaired))
        claims = one_per_label(outcome.inverted, case.attacked, case, stamp)
        true = [] if case.bd_test is None else sorted(int(t) for t in case.bd_test.targets.unique())
        rows = [row for claim in claims.values() for row in _success(claim, case, stamp)]
        lost = [t for t in true if t not in claims]
        rows += [at_label(m, t, 0.0) for t in lost for m in ("reasr", "reasr_any", "reasr_clean")]
        wanted = true or list(claims)
        rows += [mean(m, rows, wanted) for m in ("reasr", "reasr_any", "reasr_clean")]
        if case.bd_test is None:
            rows += [Measurement(metric=m, value=None, reason="no_trigger") for m in _DISTANCES]
        else:
            for label in true:
                rows += _distances(claims.get(label), label, case.bd_test, _static(case, label), stamp)
            apd, empty = mean("apd", rows, true), mean("apd", rows, true, ";trigger=none")
            # Of the means, so that a faint trigger among several does not decide it.
            rows += [apd, empty, _relative(apd.value, empty.value)]
            rows += [mean(m, rows, true) for m in ("apd_raw", "mask_iou")]
        found = (*(replace(row, stage="attacked") for row in rows), *unrepaired)
        if not claims:
            return Findings(rows=found)
        sheet, factor = picture(case, claims, true, stamp)
        return Findings(rows=found, pictures={"recovered": sheet}, curves={"recovered": {"residual_factor": factor}})


def _nothing(metrics: Iterable[str], reason: str) -> list[Measurement]:
    return [Measurement(metric=m, value=None, reason=reason, stage=_REPAIR.get(m, "attacked")) for m in metrics]


def _repair(case: EvalCase) -> list[Measurement]:
    """Success of the wrapped method's triggers before and after the repair that was made with them."""
    inner = case.inner
    if inner is None or (not inner.inverted and "claimed" not in inner.chosen):
        return _nothing(_REPAIR, "no_repair")
    if not inner.inverted:
        return _nothing(_REPAIR, "no_claim")
    usable = [claim for claim in inner.inverted if appliable(claim)]
    if not usable:
        return _nothing(_REPAIR, "needs_stamp: no recovered trigger has a mask or a delta")
    rows: list[Measurement] = []
    claims = one_per_label(usable, case.attacked, case, stamped)
    for label, claim in claims.items():
        data = _right(case.attacked, claim, case)
        images = stamped(claim, data) if len(data) else data.images
        for metric, net in (("reasr_before", case.attacked), ("reasr_after", case.net)):
            rows.append(share_of(metric, answers(net, images, case.ctx) == label if len(data) else _EMPTY, label))
    rows += [mean(metric, rows, list(claims)) for metric in _REPAIR]
    return [replace(row, stage=_REPAIR[row.metric]) for row in rows]


def one_per_label(inverted: Sequence[Inverted], net: nn.Module, case: EvalCase, stamp: Stamp) -> dict[int, Inverted]:
    """The claims by label; of several for one label the one that works best on `net` and the probe rows."""
    claims: dict[int, Inverted] = {}
    for label in sorted({claim.target for claim in inverted}):
        same = [claim for claim in inverted if claim.target == label]
        if len(same) > 1:
            hits = [hits_of(net, claim, case, stamp, "probe").double().mean().nan_to_num() for claim in same]
            same = [same[int(torch.stack(hits).argmax())]]
        claims[label] = same[0]
    return claims


def _success(claim: Inverted, case: EvalCase, stamp: Stamper) -> list[Measurement]:
    """Rows of one claim: on the attacked model, and on clean ones."""
    label, data = claim.target, _right(case.attacked, claim, case)
    after = answers(case.attacked, stamp(claim, data), case.ctx) if len(data) else torch.zeros(0)
    return [
        share_of("reasr", after == label, label),
        share_of("reasr_any", after != data.labels.cpu(), label),
        on_clean_models("reasr_clean", claim, case, stamp),
    ]


def on_clean_models(metric: str, claim: Inverted, case: EvalCase, stamp: Stamp) -> Measurement:
    """Success of a claim's trigger on independent clean models, mean over models."""
    # Replica 0 of attack `none` is the attacked model itself where there is no attack.
    nets = case.clean_models if case.bd_test is not None else case.clean_models[1:]
    hits = [hit.double().mean() for net in nets if len(hit := hits_of(net, claim, case, stamp))]
    clean = float(torch.stack(hits).mean()) if hits else None
    return at_label(metric, claim.target, clean, "" if hits else _NONE_RIGHT)


def _right(net: nn.Module, claim: Inverted, case: EvalCase, part: str = "test") -> ImageSet:
    """The victims of a claim in `part` that a model classifies correctly without a trigger."""
    data = victims(claim, case.probe if part == "probe" else case.test)
    right = answers(net, data.images, case.ctx) == data.labels.cpu() if len(data) else _EMPTY
    return data.rows(right.to(data.labels.device))


def hits_of(net: nn.Module, claim: Inverted, case: EvalCase, stamp: Stamp, part: str = "test") -> Tensor:
    """Whether the recovered trigger sends each image of `_right` to the claimed label, bool (n,)."""
    data = _right(net, claim, case, part)
    return answers(net, stamp(claim, data, part), case.ctx) == claim.target if len(data) else _EMPTY


def share_of(metric: str, hit: Tensor, label: int) -> Measurement:
    """Row of one label: the share of `hit`, or that no image was classified correctly."""
    return share(metric, hit, f"label={label}") if len(hit) else at_label(metric, label, None, _NONE_RIGHT)


def _distances(
    claim: Inverted | None, label: int, bd_test: Rendered, static: Sequence[tuple[Tensor, Tensor]], stamp: Stamper
) -> list[Measurement]:
    """Rows of one true target: how far the claim, or nothing, lies from its triggers."""
    rows = some(bd_test.targets == label, _PAIRS)
    clean, triggered = bd_test.clean.rows(rows), bd_test.data.images[rows]
    apd = difference(clean.images if claim is None else stamp(claim, clean), triggered)
    empty = difference(clean.images, triggered)
    found = [
        at_label("apd", label, apd),
        at_label("apd", label, empty, also=";trigger=none"),
        _relative(apd, empty, f"label={label}"),
    ]
    if not static or (claim is not None and claim.mask is None):
        reason = "no_mask" if static else "no_static_trigger"
        return [*found, *(at_label(m, label, None, reason) for m in ("apd_raw", "mask_iou"))]
    raw, overlap = zip(*(_shapes(claim, mask, pattern) for mask, pattern in static), strict=True)
    return [
        *found,
        at_label("apd_raw", label, sum(raw) / len(raw)),
        at_label("mask_iou", label, sum(overlap) / len(overlap)),
    ]


def _shapes(claim: Inverted | None, mask: Tensor, pattern: Tensor) -> tuple[float, float]:
    """`apd_raw` and `mask_iou` of a claim with a mask, or of nothing, against a true mask and pattern."""
    own, paint = torch.zeros_like(mask), pattern
    if claim is not None and claim.mask is not None and claim.pattern is not None:
        own, paint = claim.mask, claim.pattern
    there, found = mask > 0, own > 0.5
    union = int((there | found).sum())
    return float((own * paint - mask * pattern).abs().mean()), int((there & found).sum()) / max(1, union)


def _static(case: EvalCase, label: int) -> list[tuple[Tensor, Tensor]]:
    """(mask, pattern) of the triggers that ask for `label`; empty if one of them has none."""
    assert case.bd_test is not None
    ids = case.bd_test.trigger_id[case.bd_test.targets == label].unique().tolist()
    try:
        shapes = [case.oracle.triggers[i].static() for i in ids]
    except NotApplicable:  # an imported record holds pictures of its trigger alone
        return []
    return [] if None in shapes else [(s[0].cpu(), s[1].cpu()) for s in shapes if s is not None]


def at_label(metric: str, label: int, value: float | None, reason: str = "", also: str = "") -> Measurement:
    """Row of one label."""
    return Measurement(metric=metric, value=value, qualifier=f"label={label}{also}", reason=reason)


def mean(metric: str, rows: Sequence[Measurement], labels: Sequence[int], also: str = "") -> Measurement:
    """The headline: mean of the rows of `labels`; that of one label keeps its counts."""
    name = also.lstrip(";")
    mine = [r for r in rows if r.metric == metric and r.qualifier in {f"label={t}{also}" for t in labels}]
    if not mine:
        return Measurement(metric=metric, value=None, qualifier=name, reason="no_claim")
    if len(mine) == 1:
        return replace(mine[0], qualifier=name)
    values = [r.value for r in mine if r.value is not None]
    if len(values) < len(mine):
        reason = next(r.reason for r in mine if r.value is None)
        return Measurement(metric=metric, value=None, qualifier=name, reason=reason)
    return Measurement(metric=metric, value=sum(values) / len(values), qualifier=name)


def _relative(apd: float | None, empty: float | None, qualifier: str = "") -> Measurement:
    """`apd_rel`; nothing where the true trigger changes no pixel."""
    if apd is None or not empty:
        return Measurement(metric="apd_rel", value=None, qualifier=qualifier, reason="unchanged")
    return Measurement(metric="apd_rel", value=apd / empty, qualifier=qualifier)
