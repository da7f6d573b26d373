from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats as reference

from sleeperbench.leaderboard.stats import (
    MIN_SEEDS,
    average_ranks,
    critical_difference,
    duel,
    family_weights,
    friedman_p,
    holm,
    mean_over_attacks,
    net_p_der,
    paired,
    paired_p,
    placements,
    range_quantile,
    rank_ranges,
    t_quantile,
    win_rates,
)


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


def test_net_p_der_in_closed_form() -> None:
    assert net_p_der(0.97, 0.97, 0.9, 0.93, 0.93) == 0.5, "nothing gained, nothing lost: what no defense gets"
    assert net_p_der(1.0, 0.0, 0.0, 0.9, 0.9) == 1.0
    assert net_p_der(1.0, 0.0, 0.4, 0.9, 0.8) == pytest.approx((1 + 0.6 - 0.1) / 2), "asleep counts as the woken model"
    assert net_p_der(1.0, 0.5, 0.4, 0.9, 0.95) == pytest.approx(0.75), "accuracy that rises earns nothing"
    assert net_p_der(0.8, 0.9, 0.0, 0.9, 0.5) == pytest.approx(0.3), "an attack that grows costs nothing more"


def test_families_weigh_the_same_whatever_their_attacks() -> None:
    weights = family_weights({"a": "patch", "b": "patch", "c": "warp"})
    assert weights == {"a": 0.25, "b": 0.25, "c": 0.5}
    groups = {"a": [0.0, 0.2, 0.4], "b": [0.6, 0.6, 0.6], "c": [1.0, 0.9, 0.8]}
    e = mean_over_attacks(groups, share=True, weights=weights)
    assert e is not None
    assert e.value == pytest.approx(((0.2 + 0.6) / 2 + 0.9) / 2)
    parts = [0.25**2 * np.var(groups["a"], ddof=1) / 3, 0.0, 0.5**2 * np.var(groups["c"], ddof=1) / 3]
    df = sum(parts) ** 2 / sum(p**2 / 2 for p in parts)
    assert e.high - e.value == pytest.approx(reference.t.ppf(0.975, df) * math.sqrt(sum(parts)))


def test_a_paired_difference_is_that_of_a_paired_t_test() -> None:
    a = {("x", i): v for i, v in enumerate([0.5, 0.7, 0.6, 0.9])}
    b = {("x", i): v for i, v in enumerate([0.4, 0.65, 0.3, 0.8])}
    e = paired(a, b, {"x": 1.0})
    known = reference.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert e is not None
    assert (e.low, e.high) == pytest.approx((known.low, known.high))
    assert paired(a, {}, {"x": 1.0}) is None


def exact_p(strata: list[list[Fraction]]) -> tuple[float, float]:
    """The bootstrap-t's p-value over all draws there are, strata weighing the same, and that of the t test."""
    k = len(strata)

    def both(samples: list[list[Fraction]]) -> tuple[Fraction, list[Fraction]]:
        means = [sum(s) / len(s) for s in samples]
        spread = [sum((x - m) ** 2 for x in s) / (len(s) - 1) / len(s) for s, m in zip(samples, means, strict=True)]
        return sum(means) / k, [v / k**2 for v in spread]

    mean, parts = both(strata)
    far = count = 0
    for draw in itertools.product(*(itertools.product(s, repeat=len(s)) for s in strata)):
        m, found = both([list(d) for d in draw])
        v = sum(found)
        count += v > 0
        far += v > 0 and (m - mean) ** 2 * sum(parts) >= mean**2 * v
    df = sum(parts) ** 2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, strata, strict=True))
    return far / count, 2 * reference.t.sf(abs(mean) / math.sqrt(sum(parts)), float(df))


@pytest.mark.parametrize(
    "strata",
    [
        [[1, 2, 4]],
        [[5, 6, 7]],
        [[0, 1, 2, 9]],
        [[-1, 2, 4], [3, 3, 5]],
        [[2, 3, 4], [1, 5, 3]],
        [[10, 11, 12], [9, 12, 10]],
        [[0, 0, 9], [0, 1, 9]],
    ],
)
def test_the_bootstrap_agrees_with_all_draws_there_are(strata: list[list[int]]) -> None:
    exact, floor = exact_p([[Fraction(x) for x in s] for s in strata])
    flat = np.array([[float(x) for s in strata for x in s]])
    draws = 20_000
    (p,) = paired_p(flat, [len(s) for s in strata], [1 / len(strata)] * len(strata), draws, 3)
    slack = 4 * math.sqrt(max(exact * (1 - exact), 1e-4) / draws) + 2 / draws
    assert max(exact - slack, floor - 1e-9) <= p <= max(exact + slack, floor + 1e-9)


def test_the_bootstrap_at_its_ends() -> None:
    same = np.zeros((1, 6))
    steady = np.full((1, 6), 0.25)
    assert paired_p(same, [3, 3], [0.5, 0.5], 99, 0) == [1.0]
    assert paired_p(steady, [3, 3], [0.5, 0.5], 99, 0) == [0.01], "a difference that never varies is one"
    assert paired_p(same + 1e-15, [3, 3], [0.5, 0.5], 99, 0) == [1.0], "and the last digits are none"
    even = np.array([[0.3, 0.5, 0.7]])
    known = reference.ttest_1samp(even[0], 0).pvalue
    assert paired_p(even, [3], [1.0], 4000, 0) == [pytest.approx(known)], "few draws do not make few seeds many"


def test_holm_is_stepwise_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def drawn(
    rng: random.Random, levels: dict[str, float], settings: int, seeds: int
) -> dict[str, dict[tuple[str, int], float]]:
    shared = {(f"a{s}", i): rng.gauss(0, 0.05) for s in range(settings) for i in range(seeds)}
    return {d: {u: level + x + rng.gauss(0, 0.02) for u, x in shared.items()} for d, level in levels.items()}


def test_equal_defenses_are_told_apart_in_about_one_of_twenty_tables() -> None:
    rng = random.Random(5)
    weights = dict.fromkeys([f"a{s}" for s in range(5)], 0.2)
    wrong = 0
    for trial in range(60):
        ranks = rank_ranges(drawn(rng, dict.fromkeys("wxyz", 0.7), 5, 3), weights, trial)
        wrong += any(r != (1, 4) for r in ranks.values())
    assert wrong <= 8, "60 tables at 5 %: more than 8 has a chance of 0.5 %"


def test_ranks_are_ranges_that_hold_what_the_data_can_tell() -> None:
    scores = drawn(random.Random(1), {"best": 0.9, "good": 0.7, "alike": 0.705, "worst": 0.5}, 6, 3)
    weights = dict.fromkeys([f"a{s}" for s in range(6)], 1 / 6)
    ranks = rank_ranges(scores, weights, 0)
    assert ranks == {"best": (1, 1), "good": (2, 3), "alike": (2, 3), "worst": (4, 4)}
    assert rank_ranges(dict(reversed(scores.items())), weights, 0) == ranks, "the order of defenses changes nothing"


def test_pairing_takes_out_what_defenses_share() -> None:
    rng = random.Random(2)
    luck = {(f"a{s}", i): rng.gauss(0, 0.3) for s in range(4) for i in range(3)}
    scores = {
        d: {u: level + x + rng.gauss(0, 0.001) for u, x in luck.items()} for d, level in (("a", 0.0), ("b", 0.01))
    }
    weights = dict.fromkeys([f"a{s}" for s in range(4)], 0.25)
    assert rank_ranges(scores, weights, 0) == {"a": (2, 2), "b": (1, 1)}


def test_too_few_seeds_rank_nobody() -> None:
    scores = drawn(random.Random(1), {"best": 0.9, "worst": 0.1}, 6, MIN_SEEDS - 1)
    assert set(rank_ranges(scores, dict.fromkeys([f"a{s}" for s in range(6)], 1.0), 0).values()) == {(1, 2)}
    assert rank_ranges({}, {}, 0) == {}


def test_a_failure_loses_ties_against_what_is_none() -> None:
    assert [duel(0.5, 0.5, lost) for lost in ((False, False), (True, False), (False, True), (True, True))] == [
        0,
        -1,
        1,
        0,
    ]
    assert [duel(0.5, 0.4, (True, False)), duel(0.4, 0.5, (False, True))] == [1, -1], "a score goes before"
    one = {("a", 0): 0.5}
    assert win_rates({"x": one, "y": one}, {"a": 1.0}, {"x": {("a", 0)}}) == {"x": 0.0, "y": 1.0}


def test_win_rates_by_hand() -> None:
    a = {("x", 0): 1.0, ("x", 1): 0.5, ("y", 0): 0.2}
    b = {("x", 0): 0.0, ("x", 1): 0.5, ("y", 0): 0.3}
    weights = {"x": 0.5, "y": 0.5}
    rates = win_rates({"a": a, "b": b}, weights)
    assert rates == {"a": pytest.approx((0.75 + 0.0) / 2), "b": pytest.approx((0.25 + 1.0) / 2)}
    assert win_rates({"a": a}, weights) == {"a": None}


@pytest.mark.parametrize("k", [2, 3, 5, 10, 38])
def test_the_range_quantile_is_that_of_an_independent_library(k: int) -> None:
    assert range_quantile(k) == pytest.approx(reference.studentized_range.ppf(0.95, k, np.inf), abs=2e-4)


def test_critical_differences_are_those_of_demsars_table() -> None:
    # Demsar (2006), table 5: q of Nemenyi's test at 5 % for 2 to 10 classifiers.
    for k, q in zip(range(2, 11), [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164], strict=True):
        assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), abs=2e-3)


def test_average_ranks_and_friedman() -> None:
    rng = random.Random(0)
    scores = {d: {s: round(rng.random() + i / 4, 1) for s in "stuvw"} for i, d in enumerate("abcd")}
    ranks = average_ranks(scores)
    table = np.array([[-scores[d][s] for d in "abcd"] for s in "stuvw"])
    expected = np.mean([reference.rankdata(row) for row in table], 0)
    assert [ranks[d] for d in "abcd"] == pytest.approx(list(expected))
    plain = {d: {s: rng.random() for s in "stuvwxyz"} for d in "abc"}
    chi = reference.friedmanchisquare(*[[plain[d][s] for s in "stuvwxyz"] for d in "abc"]).statistic
    f = 7 * chi / (8 * 2 - chi)
    assert friedman_p(average_ranks(plain).values(), 8) == pytest.approx(reference.f.sf(f, 2, 14))
    assert friedman_p([1.0, 2.0, 3.0], 9) == 0.0


def test_placements_average_to_the_auroc() -> None:
    rng = random.Random(3)
    bad = {("x", i): round(rng.gauss(1, 1), 1) for i in range(20)}
    clean = [round(rng.gauss(0, 1), 1) for _ in range(15)]
    u = reference.mannwhitneyu(list(bad.values()), clean).statistic
    assert sum(placements(bad, clean).values()) / 20 == pytest.approx(u / (20 * 15))
    assert placements(bad, []) == {}
