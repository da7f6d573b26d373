from __future__ import annotations

import math

import pytest
from scipy import stats as reference

from sleeperbench.leaderboard.stats import mean_over_attacks, t_quantile


@pytest.mark.parametrize("df", [0.5, 1, 1.7, 2, 3, 4.5, 10, 29.3, 1000])
def test_t_quantile_is_that_of_an_independent_library(df: float) -> None:
    assert t_quantile(df) == pytest.approx(reference.t.ppf(0.975, df), rel=1e-9)


def test_one_attack_gives_the_textbook_interval() -> None:
    values = [0.4, 0.5, 0.7, 0.6]
    e = mean_over_attacks({"a": values}, share=False)
    low, high = reference.t.interval(0.95, 3, loc=0.55, scale=reference.sem(values))
    assert e is not None
    assert e.kind == "t"
    assert (e.value, e.low, e.high) == pytest.approx((0.55, low, high))


def test_attacks_weigh_the_same_whatever_their_seeds() -> None:
    e = mean_over_attacks({"a": [0.0, 0.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0, 1.0]}, share=True)
    assert e is not None
    assert e.value == 0.5
    assert (e.cells, e.attacks) == (8, 2)
    assert (e.low, e.high) == (0.5, 0.5), "the difference between fixed attacks is no uncertainty"


def test_variance_is_within_attacks_with_satterthwaites_degrees_of_freedom() -> None:
    # Of two attacks, each with half the weight of the mean: Welch's interval of a difference, halved.
    a, b = [0.1, 0.2, 0.6], [0.5, 0.55, 0.6, 0.65]
    e = mean_over_attacks({"a": a, "b": b}, share=False)
    welch = reference.ttest_ind(a, [-x for x in b], equal_var=False).confidence_interval(0.95)
    assert e is not None
    assert (e.low, e.high) == pytest.approx((welch.low / 2, welch.high / 2))


def test_fewer_than_three_seeds_give_the_range() -> None:
    e = mean_over_attacks({"a": [0.2, 0.4, 0.6], "b": [0.9, 0.1]}, share=True)
    assert e is not None
    assert (e.kind, e.low, e.high) == ("range", 0.1, 0.9)
    assert e.value == pytest.approx((0.4 + 0.5) / 2)


def test_a_share_ends_at_zero_and_one_and_other_figures_do_not() -> None:
    spread = {"a": [0.0, 0.5, 1.0]}
    share, other = mean_over_attacks(spread, share=True), mean_over_attacks(spread, share=False)
    assert share is not None
    assert other is not None
    assert (share.low, share.high) == (0.0, 1.0)
    assert other.low < 0 < 1 < other.high
    assert math.isclose(other.high - 0.5, 0.5 - other.low)


def test_nothing_and_a_single_cell() -> None:
    assert mean_over_attacks({"a": []}, share=True) is None
    e = mean_over_attacks({"a": [0.3], "b": []}, share=True)
    assert e is not None
    assert (e.kind, e.value, e.attacks) == ("single", 0.3, 1)
