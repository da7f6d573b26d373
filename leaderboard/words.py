"""How figures and reasons read: the same everywhere on the site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from sleeperbench.leaderboard import terms
from sleeperbench.schema import CELLS, MEASUREMENTS, Column

COLUMNS: Mapping[str, Column] = {c.name: c for c in (*MEASUREMENTS, *CELLS)}


class Shown(NamedTuple):
    """A figure as a table shows it. `order` is the raw value, empty without one; `note` is a second line."""

    metric: str
    text: str
    order: str = ""
    title: str = ""
    note: str = ""
    empty: bool = False


def label(metric: str) -> str:
    """The heading of a metric."""
    return terms.LABELS.get(metric, metric)


def is_share(metric: str, units: Mapping[str, str]) -> bool:
    """Whether a metric is a fraction that the site prints as per cent."""
    if metric in terms.NO_SHARES:
        return False
    if metric in units:
        return units[metric] == "fraction"
    return metric == "excl" or metric in terms.FRACTIONS or (metric in COLUMNS and COLUMNS[metric].unit == "fraction")


def number(value: float, share: bool) -> str:
    """A figure as text: shares in per cent with one decimal, others with four significant digits.

    From 10,000 to a billion it is a whole number with commas.
    """
    if not math.isfinite(value):
        return "not finite"
    if share:
        return f"{100 * value:.1f} %"
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3e}"
    if abs(value) >= 9999.5:  # below, four digits hold all of it
        return f"{value:,.0f}"
    return f"{value:.4g}"


def points(value: float) -> str:
    """A difference of two shares as text: it is in percentage points, not in per cent."""
    return f"{100 * value:.1f} points"


def span(low: float, high: float, share: bool) -> str:
    """An interval as text, without a unit."""
    if share:
        return f"{100 * low:.1f}{'–' if low >= 0 else ' to '}{100 * high:.1f}"
    return f"{number(low, False)} to {number(high, False)}"


def reason_word(reason: str) -> str:
    """The fixed word that a reason starts with, as words."""
    return reason.partition(":")[0].strip().replace("_", " ")[:28] or "no reason given"


MEANINGS: Mapping[str, str] = {
    **{reason_word(word): text for word, text in terms.REASONS.items()},
    **{word.replace("_", " "): text for word, text in terms.FLAG_WORDS.items()},
}
"""Words that stand in empty fields and on badges -> what they mean."""


def reason_text(reason: str, qualifier: str = "") -> str:
    """A reason in full: its word, what that means in a row of this qualifier, and its detail."""
    word, _, detail = reason.partition(":")
    of_source = any(p.startswith("source=") for p in qualifier.split(";"))
    meanings = {**terms.REASONS, **terms.OF_SOURCE} if of_source else terms.REASONS
    parts = [word.strip().replace("_", " "), meanings.get(word.strip(), ""), detail.strip()]
    return ": ".join(p for p in parts if p) or "no reason was recorded"


def status_text(row: Mapping[str, Any]) -> str:
    """A row's status in words, with its reason when it has no figures. Rows are cells or measurements."""
    words = terms.STATUS_WORDS.get(row["status"], row["status"])
    if row["status"] == "ok":
        return words
    return f"{words}: {reason_text(row['reason'] or '', row.get('qualifier') or '')}"


def status_short(row: Mapping[str, Any]) -> str:
    """A row's status in a few words."""
    words = terms.STATUS_WORDS.get(row["status"], row["status"])
    return words if row["status"] == "ok" else f"{words}: {reason_word(row['reason'] or '')}"


@lru_cache(maxsize=100_000)
def missing(metric: str, reason: str) -> Shown:
    """An empty field: the reason's word, with the whole of it in the title. Without a verdict that is the reason."""
    if metric == "verdict":
        reason = reason or "no_verdict"
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
