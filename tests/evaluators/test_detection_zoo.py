from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sleeperbench import Findings, Measurement, Outcome, Verdict
from sleeperbench.evaluators.detection_zoo import DetectionZoo, balanced, bounds


def cell(attack: str, score: float | None, threshold: float = 2.0, seed: int = 0) -> dict[str, Any]:
    verdict = None if score is None else Verdict(score=score, threshold=threshold)
    return {
        "cell": f"d/a/{attack}@0/x/s{seed}",
        "attack": attack,
        "seed": seed,
        "backdoored": not attack.startswith("none"),
        "outcome": Outcome(verdict=verdict),
    }


def measure(*cells: dict[str, Any]) -> tuple[dict[tuple[str, str], Measurement], Findings]:
    findings = DetectionZoo().measure(SimpleNamespace(cells=cells))
    found = {(m.metric, m.qualifier): m for m in findings.rows}
    assert len(found) == len(findings.rows)
    return found, findings


ZOO = (
    *(cell("none", s) for s in (0.0, 1.0, 1.5, 4.0)),
    *(cell("badnets", s) for s in (3.0, 5.0)),
    *(cell("wanet", s) for s in (1.5, 0.5, 2.0)),
)
BOUNDED = ("det_bacc", "det_auroc")


def test_pooled_figures() -> None:
    found, _ = measure(*ZOO)
    # Flagged: one of four clean models; both of badnets, none of wanet (2.0 is not above the threshold).
    shares = {m: (found[m, ""].count, found[m, ""].total) for m in ("det_acc", "det_tpr", "det_fpr")}
    assert shares == {"det_acc": (5, 9), "det_tpr": (2, 5), "det_fpr": (1, 4)}
    assert found["det_bacc", ""].value == pytest.approx((2 / 5 + 3 / 4) / 2)
    # Of 20 pairs: 3.0 beats 3, 5.0 beats 4, 1.5 beats 2 and ties 1, 0.5 beats 1, 2.0 beats 3.
    assert found["det_auroc", ""].value == pytest.approx((3 + 4 + 2.5 + 1 + 3) / 20)
    assert found["det_auroc", ""].count is None


def test_each_attack_stands_against_all_clean_models() -> None:
    found, findings = measure(*ZOO)
    assert (found["det_tpr", "attack=badnets"].value, found["det_tpr", "attack=wanet"].value) == (1, 0)
    assert (found["det_acc", "attack=wanet"].count, found["det_acc", "attack=wanet"].total) == (3, 7)
    assert found["det_bacc", "attack=badnets"].value == pytest.approx((1 + 3 / 4) / 2)
    assert found["det_auroc", "attack=badnets"].value == pytest.approx(7 / 8)
    assert found["det_auroc", "attack=wanet"].value == pytest.approx(6.5 / 12)
    assert found["det_auroc", "stat=macro"].value == pytest.approx((7 / 8 + 6.5 / 12) / 2)
    assert found["det_tpr", "stat=macro"].value == 0.5
    assert ("det_fpr", "attack=wanet") not in found
    assert [s["label"] for s in findings.curves["roc"]["series"]] == ["all attacks", "badnets", "wanet"]
    assert findings.curves["roc"]["title"] == "Models: 5 backdoored against 4 clean"


def test_hard_negatives_are_clean_models_and_stand_apart_as_well() -> None:
    found, _ = measure(*ZOO, cell("none~ab", 3.0), cell("none~ab", 2.5), cell("none~ab", 0.5))
    assert (found["det_fpr", ""].count, found["det_fpr", ""].total) == (3, 7)
    assert (found["det_fpr", "clean=none"].count, found["det_fpr", "clean=none"].total) == (1, 4)
    assert (found["det_fpr", "clean=none~ab"].count, found["det_fpr", "clean=none~ab"].total) == (2, 3)
    # Of the 20 pairs above 13.5; of 15 new ones 3.0 beats 2 and ties 1, 5.0 beats 3, 1.5 and 2.0 beat 1, 0.5 ties 1.
    assert found["det_auroc", ""].value == pytest.approx((13.5 + 2.5 + 3 + 1 + 0.5 + 1) / 35)


def test_the_threshold_is_each_verdict_s_own() -> None:
    found, _ = measure(cell("none", 3.0, threshold=5.0), cell("badnets", 1.0, threshold=0.5))
    assert (found["det_tpr", ""].value, found["det_fpr", ""].value, found["det_auroc", ""].value) == (1, 0, 0)


def test_cells_without_a_verdict_are_left_out() -> None:
    found, _ = measure(*ZOO, cell("badnets", None), cell("none", None))
    assert (found["det_acc", ""].count, found["det_acc", ""].total) == (5, 9)


def test_models_without_a_verdict_are_counted() -> None:
    """Whether the detector gave none, or failed so that there is no cell; an attack that did not implant has none."""
    clean = [cell(kind, 1.0, seed=s) for s in range(4) for kind in ("none", "none~ab")][:-1]  # a timeout on one
    attacked = [cell("badnets", 3.0 if s else None, seed=s) for s in range(4)]
    found, _ = measure(*clean, *attacked, cell("wanet", 3.0, seed=2))
    assert (found["det_missing", ""].count, found["det_missing", ""].total) == (1 + 3, 8)
    assert (found["det_missing_clean", ""].count, found["det_missing_clean", ""].total) == (1, 8)
    found, _ = measure(cell("badnets", None), cell("badnets", 1.0, seed=1))
    assert (found["det_missing", ""].count, found["det_missing", ""].total) == (1, 2)
    assert found["det_missing_clean", ""].value is None


def zoo_of(seeds: int, kinds: int = 4) -> list[dict[str, Any]]:
    """Clean models of even seeds score up to 100, of odd ones up to 150; attacked ones of even seeds 1000."""
    clean = [
        cell(f"none~{k}", (37 * (s * kinds + k)) % 101 * (1.0 + s % 2 / 2), seed=s)
        for s in range(seeds)
        for k in range(kinds)
    ]
    strong = [cell("badnets", 1000.0 if s % 2 == 0 else 60.0 + 10 * s, seed=s) for s in range(seeds)]
    return [*clean, *strong, *(cell("wanet", 1000.0 if s % 2 == 0 else 50.0, seed=s) for s in range(seeds))]


def test_a_threshold_from_clean_models_of_every_other_seed_is_held_against_the_others() -> None:
    zoo = zoo_of(10)
    found, _ = measure(*zoo)
    clean = [(c["seed"] % 2, c["outcome"].verdict.score) for c in zoo if not c["backdoored"]]
    scores = [[s for odd, s in clean if odd == half] for half in (0, 1)]
    assert len(scores[0]) == len(scores[1]) == 20
    threshold = sorted(scores[0])[-2]  # of 20 one may lie above
    assert sum(s > threshold for s in scores[0]) == 1
    held = [s > threshold for s in scores[1]]
    assert (found["det_fpr_fpr5", ""].count, found["det_fpr_fpr5", ""].total) == (sum(held), 20) and sum(held) > 0
    strong = sum(60 + 10 * s > threshold for s in (1, 3, 5, 7, 9))
    assert 0 < strong < 5
    assert (found["det_tpr_fpr5", "attack=badnets"].count, found["det_tpr_fpr5", "attack=badnets"].total) == (strong, 5)
    assert found["det_tpr_fpr5", "attack=wanet"].value == 0
    assert (found["det_tpr_fpr5", ""].count, found["det_tpr_fpr5", ""].total) == (strong, 10)
    assert found["det_tpr_fpr5", "stat=macro"].value == pytest.approx(strong / 10)


@pytest.mark.parametrize(("seeds", "kinds"), [(9, 4), (1, 40)])
def test_few_clean_models_or_one_seed_validate_no_threshold(seeds: int, kinds: int) -> None:
    found, _ = measure(*zoo_of(seeds, kinds))
    for metric in ("det_tpr_fpr5", "det_fpr_fpr5"):
        assert found[metric, ""].value is None
        assert found[metric, ""].reason.startswith(f"too_few_clean_models: {seeds * kinds} of {seeds} seeds")
    assert found["det_auroc", ""].value is not None


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([], "no_verdict"),
        ([cell("badnets", None), cell("none", None)], "no_verdict"),
        ([cell("badnets", 3.0), cell("none", None)], "one_class: no verdict on a clean model"),
        ([cell("none", 3.0), cell("none", 1.0)], "one_class: no verdict on a backdoored model"),
    ],
)
def test_reasons(cells: list[dict[str, Any]], reason: str) -> None:
    found, findings = measure(*cells)
    assert set(found) == {(m.name, "") for m in DetectionZoo.METRICS}
    told = {(m.value, m.reason) for m in findings.rows if not m.metric.startswith("det_missing")}
    assert told == {(None, reason)}
    assert not findings.curves


def test_outcomes_are_read_one_at_a_time_and_once() -> None:
    class Cells:
        def __init__(self) -> None:
            self.read: list[int] = []

        def __getitem__(self, i: int) -> dict[str, Any]:
            if i >= len(ZOO):
                raise IndexError(i)
            self.read.append(i)
            return ZOO[i]

    cells = Cells()
    DetectionZoo().measure(SimpleNamespace(cells=cells))
    assert cells.read == list(range(len(ZOO)))


@pytest.mark.parametrize(("value", "m", "n"), [(0.675, 5, 4), (0.5, 10, 10), (0.9, 50, 25), (0.97, 3, 3)])
def test_bounds_are_where_the_score_test_just_accepts(value: float, m: int, n: int) -> None:
    def variance(t: float) -> float:  # Hanley and McNeil 1982, with both sizes (m + n) / 2 outside the product
        size = (m + n) / 2
        q1, q2 = t / (2 - t), 2 * t * t / (1 + t)
        return (t * (1 - t) + (size - 1) * (q1 - t * t) + (size - 1) * (q2 - t * t)) / (m * n)

    low, high = bounds(value, m, n)
    assert 0 < low < value < high < 1
    for end in (low, high):
        assert abs(value - end) == pytest.approx(1.959964 * math.sqrt(variance(end)), rel=1e-5)


# Newcombe 1998, table II, contrasts (a) to (h) by method 10: x / m, y / n, lower and upper bound of the difference.
NEWCOMBE = (
    ((56, 70, 48, 80), (0.0524, 0.3339)),
    ((9, 10, 3, 10), (0.1705, 0.8090)),
    ((6, 7, 2, 7), (0.0582, 0.8062)),
    ((5, 56, 0, 29), (-0.0381, 0.1926)),
    ((0, 10, 0, 20), (-0.1611, 0.2775)),
    ((0, 10, 0, 10), (-0.2775, 0.2775)),
    ((10, 10, 0, 20), (0.6791, 1.0000)),
    ((10, 10, 0, 10), (0.6075, 1.0000)),
)


@pytest.mark.parametrize(("counts", "difference"), NEWCOMBE)
def test_bounds_of_balanced_accuracy_are_newcombe_s(
    counts: tuple[int, int, int, int], difference: tuple[float, float]
) -> None:
    x, m, y, n = counts
    low, high = balanced(x / m, m, y / n, n)
    assert (2 * low - 1, 2 * high - 1) == pytest.approx(difference, abs=6e-5)


def test_balanced_accuracy_and_auroc_have_bounds_pooled_and_per_attack() -> None:
    found, _ = measure(*ZOO)
    for prefix, sizes in (("", (5, 4)), ("attack=badnets;", (2, 4)), ("attack=wanet;", (3, 4))):
        at = prefix.rstrip(";")
        shares = found["det_tpr", at].value, found["det_fpr", ""].value
        ends = tuple(tuple(found[m, f"{prefix}stat={s}"].value for s in ("lower", "upper")) for m in BOUNDED)
        assert ends == (
            balanced(shares[0], sizes[0], shares[1], sizes[1]),
            bounds(found["det_auroc", at].value, *sizes),
        )
        for metric, (low, high) in zip(BOUNDED, ends, strict=True):
            assert 0 <= low <= found[metric, at].value <= high <= 1
    assert {m for m, q in found if "stat=lower" in q} == set(BOUNDED)
    assert ("det_bacc", "stat=macro") in found


def test_few_models_separated_without_a_mistake_prove_little() -> None:
    assert bounds(1.0, 3, 3) == (pytest.approx(0.501, abs=1e-3), 1.0)
    assert bounds(1.0, 50, 50)[0] > 0.94
    assert bounds(0.0, 10, 10) == (0.0, pytest.approx(1 - bounds(1.0, 10, 10)[0]))
    found, _ = measure(cell("none", 0.0), cell("badnets", 3.0))
    low, value, high = (found["det_auroc", q].value for q in ("stat=lower", "", "stat=upper"))
    assert low < 0.5 < value == high == 1
