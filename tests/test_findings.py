"""The rules by which docs/findings.md is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scripts import script


@pytest.fixture(scope="module")
def findings() -> Any:
    return script("findings")


def cell(asr: float | None, p_asr: float | None, control: float = 0.05, *flags: str) -> dict[str, Any]:
    figures = {("asr", ""): asr, ("p_asr_ra", ""): p_asr, ("p_asr_ra", "control=clean_model"): control}
    return {"figures": {k: v for k, v in figures.items() if v is not None}, "flags": set(flags)}


@pytest.mark.parametrize(
    ("of", "word"),
    [
        (cell(0.21, 0.99), "not purified"),
        (cell(0.20, 0.50), "comes back"),
        (cell(0.05, 0.25), "comes back"),  # 5 times the clean model's
        (cell(0.05, 0.24), "stays"),
        (cell(0.05, 0.0, 0.0), "stays"),  # 5 times nothing is nothing
        (cell(0.05, 0.99, 0.05, "collapsed"), "collapsed"),
        (cell(0.05, None) | {"reasons": {"p_asr_ra": "no_valid_budget"}}, "no figure (no_valid_budget)"),
    ],
)
def test_the_rule_of_coming_back(findings: Any, of: dict[str, Any], word: str) -> None:
    assert findings.pattern([of]) == f"1 {word}"
    assert findings.pattern([of, of, cell(0.9, 0.9)]) in (f"2 {word}, 1 not purified", "3 not purified")


def test_mean_and_interval_are_students(findings: Any) -> None:
    mean, room = findings.mean_and_room([1.0, 2.0, 3.0])
    assert (mean, room) == (2.0, pytest.approx(4.302652730 / math.sqrt(3)))
    assert math.isnan(findings.mean_and_room([1.0])[1])
    assert findings.shown([0.01, 0.02, 0.03]) == "2.0 ± 2.5"
    assert (findings.shown([0.5]), findings.shown([0.5, 0.25]), findings.shown([])) == ("50.0", "50.0, 25.0", "")


def test_rank_is_spearmans(findings: Any) -> None:
    def at(x: float, y: float) -> dict[str, Any]:
        return {"figures": {("bec", ""): x, ("p_asr_ra", ""): y}}

    pairs = [(1.0, 0.1), (2.0, 0.3), (3.0, 0.2), (4.0, 0.9)]
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, 1, 0.
    assert findings.rank([at(*p) for p in pairs], ("bec", "")) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(findings.rank([at(1, 0.1), at(1, 0.2), at(1, 0.3)], ("bec", "")))
