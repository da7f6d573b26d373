"""How figures and reasons read: the same everywhere on the site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sleeperbench.schema import CELLS, MEASUREMENTS, Column

COLUMNS: Mapping[str, Column] = {c.name: c for c in (*MEASUREMENTS, *CELLS)}

LABELS = {
    "c_acc": "C-Acc",
    "asr": "ASR",
    "r_acc": "R-Acc",
    "c_acc_attacked": "C-Acc before",
    "asr_attacked": "ASR before",
    "o_asr": "O-ASR",
    "p_asr": "P-ASR",
    "p_asr_net": "P-ASR net",
    "p_asr_ra": "P-ASR (RA)",
    "p_asr_qra": "P-ASR (QRA)",
    "c_acc_ra": "C-Acc (RA)",
    "asr_wba": "ASR (WBA)",
    "asr_bba": "ASR (BBA)",
    "asr_tba": "ASR (TBA)",
    "bec": "BEC",
    "reasr": "REASR",
    "reasr_clean": "REASR clean",
    "apd": "APD",
    "apd_rel": "APD rel.",
    "excl": "Excl",
    "der": "DER",
    "p_der": "P-DER",
    "det_score": "Score",
    "verdict": "Verdict",
}

BETTER = {
    **dict.fromkeys(("c_acc", "r_acc", "c_acc_ra", "reasr", "der", "p_der"), "Higher is better for the defender."),
    **dict.fromkeys(
        ("asr", "o_asr", "p_asr", "p_asr_net", "p_asr_ra", "p_asr_qra", "asr_wba", "asr_bba", "asr_tba", "apd"),
        "Lower is better for the defender.",
    ),
}

REASONS = {
    "needs_bn": "the method needs batch normalisation, which this architecture lacks",
    "attack_controls_training": "the attack controls training and leaves no training set to hand over",
    "opaque_model": "the repaired model keeps private code, so its weights and activations cannot be read",
    "no_trigger_range": "the trigger has no defined range of admissible changes",
    "no_static_trigger": "the trigger differs from image to image, so there is no one pattern to compare with",
    "no_trigger": "the method recovered no trigger",
    "ra_not_successful": "the retuning attack did not wake the model, and this figure builds on it",
    "other_architecture": "the two models are of different architectures",
    "attack_did_not_implant": "the attack did not plant a working backdoor, so nothing can be said about a defense",
    "not_purified": "O-ASR stays above 20 %: the backdoor is awake, so there is nothing to re-activate",
    "no_valid_budget": "no number of retuning images leaves clean models asleep",
    "not_a_descendant": "the model does not descend from the attacked one",
    "input_failed": "a task that this one builds on failed",
    "control_missing": "a control that this figure is compared with has none",
    "filtered": "left out by the run's own selection",
    "budget": "left out: the run's budget was spent",
    "raised": "the method raised an error",
    "nan": "the result was not a finite number",
    "wrong_shape": "the method returned something of the wrong shape",
    "undeclared_access": "the method asked for something that it had not declared",
}

STATUS_WORDS = {
    "ok": "measured",
    "not_applicable": "not applicable",
    "failed": "failed",
    "timeout": "ran out of time",
    "out_of_memory": "ran out of memory",
    "not_run": "not run",
}

FLAG_WORDS = {
    "weak": "the attack did not reach the implant gate",
    "tuned": "a setting of this row was found by trying; its suite says which",
    "collapsed": "the defense ruined the model: its figures count as the undefended model's in every mean",
    "snapshot": "the training set is a snapshot that the attack declared",
    "reduced": "fewer images, steps or draws than the protocol asks for",
    "stale": "measured with an earlier version of the method",
    "nondeterministic": "a repeat may differ in the last digits",
    "not_purified": "O-ASR stays above 20 %, so P-ASR enters no mean of woken models",
}


@dataclass(frozen=True)
class Shown:
    """A figure as a table shows it. `order` is the raw value, empty without one; `note` is a second line."""

    metric: str
    text: str
    order: str = ""
    title: str = ""
    note: str = ""
    empty: bool = False


def label(metric: str) -> str:
    """The heading of a metric."""
    return LABELS.get(metric, metric)


def is_share(metric: str, units: Mapping[str, str]) -> bool:
    """Whether a metric is a fraction that the site prints as per cent."""
    if metric in units:
        return units[metric] == "fraction"
    return metric == "excl" or (metric in COLUMNS and COLUMNS[metric].unit == "fraction")


def number(value: float, share: bool) -> str:
    """A figure as text: shares in per cent with one decimal, others with four significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if share:
        return f"{100 * value:.1f} %"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3e}"
    return f"{value:.4g}"


def span(low: float, high: float, share: bool) -> str:
    """An interval as text, without a unit."""
    if share:
        return f"{100 * low:.1f}–{100 * high:.1f}"
    return f"{number(low, False)} to {number(high, False)}"


def reason_word(reason: str) -> str:
    """The fixed word that a reason starts with, as words."""
    return reason.partition(":")[0].strip().replace("_", " ")[:28] or "no reason given"


def reason_text(reason: str) -> str:
    """A reason in full: its word, what that means, and its detail."""
    word, _, detail = reason.partition(":")
    parts = [word.strip().replace("_", " "), REASONS.get(word.strip(), ""), detail.strip()]
    return ": ".join(p for p in parts if p) or "no reason was recorded"


def status_text(row: Mapping[str, Any]) -> str:
    """A row's status in words, with its reason when it has no figures."""
    words = STATUS_WORDS.get(row["status"], row["status"])
    return words if row["status"] == "ok" else f"{words}: {reason_text(row['reason'] or '')}"


def status_short(row: Mapping[str, Any]) -> str:
    """A row's status in a few words."""
    words = STATUS_WORDS.get(row["status"], row["status"])
    return words if row["status"] == "ok" else f"{words}: {reason_word(row['reason'] or '')}"


def missing(metric: str, reason: str) -> Shown:
    """An empty field: the reason's word, with the whole of it in the title."""
    return Shown(metric, reason_word(reason), title=f"no figure: {reason_text(reason)}", empty=True)


def figure(
    metric: str,
    value: float,
    *,
    share: bool,
    interval: tuple[float, float] | None = None,
    counted: tuple[int, int] | None = None,
) -> Shown:
    """A figure with the Wilson interval of this one model and its counts, where they are known."""
    title = f"{label(metric)} {value!r}"
    note = ""
    if counted:
        title += f"; {counted[0]} of {counted[1]} images"
    if interval:
        note = span(*interval, share)
        title += f"; 95 % Wilson interval of this model on its test images: {note}{' %' if share else ''}"
    return Shown(metric, number(value, share), order=repr(value), title=title, note=note)
