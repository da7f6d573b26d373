"""Means over attacks and seeds with their intervals, paired differences, and ranks that the data can tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

MIN_SEEDS = 3
LEVEL = 0.05
"""Chance at which two defenses that do not differ are told apart, over all pairs of a track together."""
DRAWS = 10_000
SAME = 1e-9
"""Figures nearer than this are the same: sums of other order differ in the last digits."""
Unit = tuple[str, int]
"""An attacked model: attack setting and seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over attacks of means over seeds. `kind` says what `low` and `high` are; `single` has neither."""

    value: float
    low: float
    high: float
    kind: Literal["t", "range", "single"]
    cells: int
    attacks: int


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function (Lentz's method), for x < (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or tiny)
    h = d
    for m in range(1, 500):
        for top in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / ((1.0 + top * d) or tiny)
            c = (1.0 + top / c) or tiny
            h *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return h


def _beta_share(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log) * _beta_fraction(a, b, x) / a
    return 1.0 - math.exp(log) * _beta_fraction(b, a, 1.0 - x) / b


def t_outside(t: float, df: float) -> float:
    """The share of Student's distribution of `df` > 0 degrees of freedom beyond -t and t."""
    return _beta_share(df / 2, 0.5, df / (df + t * t))


@lru_cache(maxsize=4096)
def t_quantile(df: float) -> float:
    """The t with 95 % of Student's distribution of `df` > 0 degrees of freedom between -t and t.

    Newton's method from the normal value below it: what lies outside falls and is convex, so no step goes too far.
    """
    t = 1.959963984540054
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    for _ in range(200):
        step = (t_outside(t, df) - LEVEL) / (2 * scale * (1 + t * t / df) ** (-(df + 1) / 2))
        t += step
        if abs(step) <= 1e-13 * t:
            break
    return t


def mean_over_attacks(
    groups: Mapping[str, Sequence[float]], *, share: bool, weights: Mapping[str, float] | None = None
) -> Estimate | None:
    """Mean over attacks of the means over seeds; None without a figure.

    The attacks are fixed and the seeds drawn, so the variance is that of seeds within attacks, with the degrees of
    freedom of Welch and Satterthwaite. With an attack of fewer than 3 seeds the range over all cells stands instead.

    Args:
        groups: Attack setting -> one figure per seed.
        share: The figure is a share, whose interval ends at 0 and 1.
        weights: Attack setting -> its weight, of any sum; without, all weigh the same.
    """
    filled = {s: list(v) for s, v in groups.items() if v}
    if not filled:
        return None
    n_cells, k = sum(map(len, filled.values())), len(filled)
    total = math.fsum(weights[s] for s in filled) if weights else float(k)
    weight = {s: (weights[s] if weights else 1.0) / total for s in filled}
    means = {s: math.fsum(v) / len(v) for s, v in filled.items()}
    value = math.fsum(weight[s] * m for s, m in means.items())
    every = [x for v in filled.values() for x in v]
    if n_cells == 1:
        return Estimate(value, value, value, "single", 1, 1)
    if min(map(len, filled.values())) < MIN_SEEDS:
        return Estimate(value, min(every), max(every), "range", n_cells, k)
    parts = {
        s: weight[s] ** 2 * math.fsum((x - means[s]) ** 2 for x in v) / (len(v) - 1) / len(v) for s, v in filled.items()
    }
    variance = math.fsum(parts.values())
    if variance <= 0.0:
        return Estimate(value, value, value, "t", n_cells, k)
    df = variance**2 / math.fsum(p**2 / (len(filled[s]) - 1) for s, p in parts.items())
    half = t_quantile(df) * math.sqrt(variance)
    low, high = value - half, value + half
    if share:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(value, low, high, "t", n_cells, k)


def net_p_der(asr_before: float, o_asr: float, p_asr_net: float, c_acc_before: float, c_acc: float) -> float:
    """Net P-DER: 1/2 where nothing was gained or lost, 1 where a certain backdoor is gone for good at no cost."""
    gain = max(0.0, asr_before - max(o_asr, p_asr_net))
    return (1 + gain - max(0.0, c_acc_before - c_acc)) / 2


def family_weights(families: Mapping[str, str]) -> dict[str, float]:
    """Weights with which a mean over attack settings is the mean over families of means over their settings."""
    size: dict[str, int] = {}
    for f in families.values():
        size[f] = size.get(f, 0) + 1
    return {s: 1 / (len(size) * size[f]) for s, f in families.items()}


def by_setting(scores: Mapping[Unit, float]) -> dict[str, list[float]]:
    """Attack setting -> its scores, in the order of seeds."""
    groups: dict[str, list[float]] = {}
    for setting, seed in sorted(scores):
        groups.setdefault(setting, []).append(scores[setting, seed])
    return groups


def paired(a: Mapping[Unit, float], b: Mapping[Unit, float], weights: Mapping[str, float]) -> Estimate | None:
    """Mean difference of two defenses over the attacked models that both have a score on, with its interval."""
    difference = {u: a[u] - b[u] for u in a if u in b}
    return mean_over_attacks(by_setting(difference), share=False, weights=weights)


def paired_p(
    differences: np.ndarray[Any, Any], strata: Sequence[int], weights: Sequence[float], draws: int, seed: int
) -> list[float]:
    """Two-sided p-values of weighted mean differences of 0, by a bootstrap over the seeds within attack settings.

    All pairs of defenses see the same draws. Each draw takes as many attacked models of every setting as there are,
    with replacement, and its statistic is the mean's distance from the observed mean over the draw's own standard
    error (bootstrap-t); draws without spread have no such statistic and are left out. Three seeds have few draws, so a
    p-value is never below that of the t test with Welch and Satterthwaite's degrees of freedom.

    Args:
        differences: One row per pair, one column per attacked model; the columns of a setting stand together.
        strata: Number of attacked models of each setting, at least 2 each.
        weights: Weight of each setting; they add up to 1.
        draws: Number of draws.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    pairs = len(differences)
    moved, squared = np.zeros((draws, pairs)), np.zeros((draws, pairs))
    mean, variance, freedom = np.zeros(pairs), np.zeros(pairs), np.zeros(pairs)
    first = 0
    for n, w in zip(strata, weights, strict=True):
        d = differences[:, first : first + n]
        first += n
        here = d.mean(1)
        part = w**2 * d.var(1, ddof=1) / n
        mean += w * here
        variance += part
        freedom += part**2 / (n - 1)
        shift = (d - here[:, None]).T
        counts = rng.multinomial(n, [1 / n] * n, size=draws).astype(float)
        m = counts @ shift / n
        moved += w * m
        squared += w**2 * np.maximum(counts @ shift**2 / n - m**2, 0.0) / (n - 1)
    error, errors = np.sqrt(variance), np.sqrt(squared)
    found = []
    for i in range(pairs):
        if abs(mean[i]) <= SAME:
            found.append(1.0)
            continue
        if error[i] <= SAME:
            found.append(1 / (draws + 1))
            continue
        statistic = abs(mean[i]) / error[i]
        some = squared[:, i] > 1e-12 * variance[i]  # a difference of sums leaves some 1e-16 where there is no spread
        far = some & (np.abs(moved[:, i]) >= (statistic - SAME) * errors[:, i])
        drawn = (1 + int(far.sum())) / (1 + int(some.sum()))
        found.append(max(drawn, t_outside(float(statistic), float(variance[i] ** 2 / freedom[i]))))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `p`."""
    adjusted = [0.0] * len(p)
    worst = 0.0
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: (p[i], i))):
        worst = max(worst, min(1.0, (len(p) - step) * p[i]))
        adjusted[i] = worst
    return adjusted


def rank_ranges(
    scores: Mapping[str, Mapping[Unit, float]], weights: Mapping[str, float], seed: int
) -> dict[str, tuple[int, int]]:
    """The ranks that each defense may have: from 1 + how many are surely better to how many are not surely worse.

    A defense is surely better where the paired bootstrap's p-value, adjusted by Holm over all pairs, is at most 5 %.

    Args:
        scores: Defense -> score of every attacked model; higher is better, and all have the same ones.
        weights: Attack setting -> its weight.
        seed: Seed of the bootstrap.
    """
    names = sorted(scores)
    units = sorted(next(iter(scores.values()))) if names else []
    order = list(dict.fromkeys(s for s, _ in units))
    strata = [sum(u[0] == s for u in units) for s in order]
    total = math.fsum(weights[s] for s in order)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    better: dict[str, set[str]] = {n: set() for n in names}
    if pairs and min(strata) >= MIN_SEEDS:
        table = np.array([[scores[a][u] - scores[b][u] for u in units] for a, b in pairs])
        draws = max(DRAWS, math.ceil(2 * len(pairs) / LEVEL))  # so that the smallest p-value can pass Holm's first step
        p: list[float] = []
        for at in range(0, len(pairs), 64):
            p += paired_p(table[at : at + 64], strata, [weights[s] / total for s in order], draws, seed)
        for (a, b), adjusted in zip(pairs, holm(p), strict=True):
            if adjusted <= LEVEL:
                ahead = math.fsum(
                    weights[s] / total / strata[order.index(s)] * (scores[a][s, i] - scores[b][s, i]) for s, i in units
                )
                better[b if ahead > 0 else a].add(a if ahead > 0 else b)
    worse = {n: sum(n in b for b in better.values()) for n in names}
    return {n: (1 + len(better[n]), len(names) - worse[n]) for n in names}


def duel(mine: float, other: float, lost: tuple[bool, bool] = (False, False)) -> int:
    """1 where the first wins, -1 where it loses, 0 where they are even; a failure loses a tie against what is none."""
    if abs(mine - other) > SAME:
        return 1 if mine > other else -1
    return lost[1] - lost[0]


def win_rates(
    scores: Mapping[str, Mapping[Unit, float]],
    weights: Mapping[str, float],
    lost: Mapping[str, Set[Unit]] = MappingProxyType({}),
) -> dict[str, float | None]:
    """Share of duels won, a tie counting half: against every other defense, on every attacked model that both have.

    Args:
        scores: Defense -> score of every attacked model; higher is better.
        weights: Attack setting -> its weight.
        lost: Defense -> the attacked models on which it failed: it loses ties there.
    """
    found: dict[str, float | None] = {}
    for a, mine in scores.items():
        shares = []
        for b, other in scores.items():
            failed = [lost.get(d, frozenset()) for d in (a, b)]
            duels = {
                u: 0.5 * (1 + duel(mine[u], other[u], (u in failed[0], u in failed[1]))) for u in mine if u in other
            }
            if a != b and (e := mean_over_attacks(by_setting(duels), share=True, weights=weights)):
                shares.append(e.value)
        found[a] = math.fsum(shares) / len(shares) if shares else None
    return found


def average_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each defense's rank by its mean score under an attack setting, 1 the best, ties shared, averaged over settings.

    Args:
        scores: Defense -> attack setting -> mean over seeds; all have the same settings.
    """
    names = list(scores)
    settings = list(next(iter(scores.values()))) if names else []
    ranks = dict.fromkeys(names, 0.0)
    for s in settings:
        for a in names:
            above = sum(scores[b][s] > scores[a][s] + SAME for b in names)
            level = sum(abs(scores[b][s] - scores[a][s]) <= SAME for b in names)
            ranks[a] += (above + (level + 1) / 2) / len(settings)
    return ranks


@lru_cache(maxsize=512)
def range_quantile(k: int) -> float:
    """The value that the range of `k` independent standard normal figures stays below with 95 %."""
    z = np.linspace(-8.5, 8.5, 3401)
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    def below(q: float) -> float:
        under = np.array([0.5 * math.erfc(-(x - q) / math.sqrt(2)) for x in z])
        return float(k * np.sum(density * (cdf - under) ** (k - 1)) * (z[1] - z[0]))

    low, high = 0.0, 12.0
    for _ in range(45):
        mid = (low + high) / 2
        low, high = (mid, high) if below(mid) < 1 - LEVEL else (low, mid)
    return (low + high) / 2


def critical_difference(k: int, n: int) -> float:
    """Nemenyi's critical difference of average ranks of `k` defenses over `n` attack settings at 5 % (Demsar 2006)."""
    return range_quantile(k) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))


def friedman_p(ranks: Iterable[float], n: int) -> float:
    """p-value that `k` defenses do not differ, from their average ranks over `n` settings (Iman and Davenport's F)."""
    given = list(ranks)
    k = len(given)
    chi = 12 * n / (k * (k + 1)) * (math.fsum(r * r for r in given) - k * (k + 1) ** 2 / 4)
    left = n * (k - 1) - chi
    if n < 2 or k < 2:
        return 1.0
    if left <= SAME:
        return 0.0
    f, a, b = (n - 1) * chi / left, k - 1, (k - 1) * (n - 1)
    return _beta_share(b / 2, a / 2, b / (b + a * f)) if f > 0 else 1.0


def placements(attacked: Mapping[Unit, float], clean: Sequence[float]) -> dict[Unit, float]:
    """Attacked model -> share of clean models that score below it, ties half: their mean is the AUROC."""
    return {u: sum((x > c) + 0.5 * (x == c) for c in clean) / len(clean) for u, x in attacked.items()} if clean else {}
