from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Findings, Measurement, Outcome, Verdict
from sleeperbench.evaluators.detection import Detection, auroc, roc, threshold_at


def case(verdict: Verdict | None = None, **parts: Any) -> Any:
    known = {
        "outcome": Outcome(verdict=verdict),
        "spec": samples.SPEC,
        "bd_test": samples.rendered([0, 0], [1, 2], [3, 3]),
        "answers": None,
        "asked": None,
    }
    return SimpleNamespace(**known | parts)


def rows(findings: Findings) -> dict[str, Measurement]:
    assert all(not m.qualifier for m in findings.rows)
    assert len(findings.rows) == len(Detection.METRICS)
    return {m.metric: m for m in findings.rows}


def pairwise(positive: Tensor, negative: Tensor) -> float:
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive.tolist() for n in negative.tolist())
    return wins / (len(positive) * len(negative))


def test_auroc_of_known_orders() -> None:
    def of(positive: list[float], negative: list[float]) -> float:
        return auroc(torch.tensor(positive), torch.tensor(negative))

    assert of([3, 4], [1, 2]) == 1
    assert of([1, 2], [3, 4]) == 0
    assert of([1, 1, 1], [1, 1]) == 0.5
    assert of([2, 4], [1, 3]) == 0.75
    assert of([2, 3], [2, 1]) == pytest.approx(7 / 8)
    assert of([0], [float("-1e30"), 1e30]) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_auroc_against_all_pairs(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    # Few distinct scores, hence many ties; group sizes differ.
    positive = torch.randint(8, (57,), generator=gen).double() + seed
    negative = torch.randint(8, (31,), generator=gen).double()
    assert auroc(positive, negative) == pytest.approx(pairwise(positive, negative))


def test_threshold_leaves_at_most_the_share_above_it() -> None:
    clean = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert threshold_at(clean, 1) == 989  # 990..999 are above
    assert threshold_at(clean, 5) == 949
    assert threshold_at(clean[clean < 99], 1) == 98  # 1 % of 99 is none
    assert threshold_at(torch.ones(500), 5) == 1
    for percent in (1, 5, 7, 29):  # shares that are no exact float
        for n in (100, 300, 700):
            above = torch.arange(float(n)) > threshold_at(torch.arange(float(n)), percent)
            assert int(above.sum()) == n * percent // 100


def test_roc_encloses_the_auroc() -> None:
    gen = torch.Generator().manual_seed(0)
    positive = torch.randint(20, (60,), generator=gen).double() + 5
    negative = torch.randint(20, (40,), generator=gen).double()
    x, y = roc(positive, negative)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    area = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))
    assert area == pytest.approx(pairwise(positive, negative))
    assert len(x) == 1 + len(torch.cat([positive, negative]).unique())
    for scores in (torch.rand(98, generator=gen), torch.rand(99, generator=gen), torch.rand(1000, generator=gen)):
        x, y = roc(scores, scores.new_zeros(1))
        assert len(x) == len(y) == 100
        assert x == sorted(x) and y == sorted(y)
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_inputs() -> None:
    # 200 clean scores 0..199, asked in a shuffled order with 4 triggered ones.
    scores = torch.cat([torch.arange(200.0), torch.tensor([250.0, 197.5, 189.0, 3.0])])
    asked = torch.arange(204) >= 200
    order = torch.randperm(204, generator=torch.Generator().manual_seed(0))
    findings = Detection().measure(case(answers=scores[order], asked=asked[order]))
    found = rows(findings)
    # Two of 200 may exceed 197, ten may exceed 189; a score equal to the threshold does not count.
    assert (found["input_tpr_fpr1"].count, found["input_tpr_fpr1"].total) == (2, 4)
    assert (found["input_tpr_fpr5"].count, found["input_tpr_fpr5"].total) == (2, 4)
    assert found["input_auroc"].value == pytest.approx((200 + 198 + 189.5 + 3.5) / 800)
    curve = findings.curves["roc"]
    (line,) = curve["series"]
    assert len(line["x"]) == len(line["y"]) == 100
    assert curve["title"] == "Inputs: 4 triggered against 200 clean"
    assert found["det_score"].reason == found["label_acc"].reason == "no_verdict"
    called = ("input_tpr", "input_fpr", "input_acc")
    assert [(found[m].value, found[m].reason) for m in called] == [(None, "no_alarm")] * 3
    judged = case(answers=scores[order], asked=asked[order], outcome=Outcome(alarm=189.0))
    found = rows(Detection().measure(judged))
    # Above 189 lie 250 and 197.5, and ten clean scores; 189 itself, of either kind, does not.
    assert [(found[m].count, found[m].total) for m in called] == [(2, 4), (10, 200), (192, 204)]
    assert (found["input_tpr_fpr1"].count, found["input_tpr_fpr5"].count) == (2, 2), (
        "the ranking has nothing to do with it"
    )


def test_five_percent_lies_below_one_percent() -> None:
    scores = torch.cat([torch.arange(200.0), torch.tensor([195.0])])
    found = rows(Detection().measure(case(answers=scores, asked=torch.arange(201) == 200)))
    assert (found["input_tpr_fpr1"].value, found["input_tpr_fpr5"].value) == (0, 1)


def test_verdict() -> None:
    for score, flag in ((2.5, 1.0), (2.0, 0.0), (-7.0, 0.0)):  # flagged iff above the threshold
        found = rows(Detection().measure(case(Verdict(score=score, threshold=2.0))))
        assert (found["det_score"].value, found["det_flag"].value) == (score, flag)
        assert found["label_tpr"].reason == "no_label_scores"


def test_labels_against_the_true_targets() -> None:
    # True targets 3 and 5; named are 3 and 7. Score 2 at class 8 equals the threshold.
    scores = torch.tensor([0, 0, 9, 9, 0, 1, 0, 3, 2, 0.0])
    scores[2] = 1
    bd = samples.rendered([0, 0, 0], [1, 2, 4], [3, 3, 5])
    found = rows(Detection().measure(case(Verdict(score=9, threshold=2, label_scores=scores), bd_test=bd)))
    assert [(found[m].count, found[m].total) for m in ("label_acc", "label_tpr", "label_fpr")] == [
        (8, 10),
        (1, 2),
        (1, 8),
    ]
    assert found["label_acc"].value == 0.8


def test_labels_of_a_clean_model_are_all_negatives() -> None:
    scores = torch.zeros(10)
    scores[4] = 5
    found = rows(Detection().measure(case(Verdict(score=5, threshold=2, label_scores=scores), bd_test=None)))
    assert (found["label_acc"].value, found["label_fpr"].value) == (0.9, 0.1)
    assert (found["label_tpr"].value, found["label_tpr"].reason) == (None, "no_trigger")
    assert found["input_auroc"].reason == "no_trigger"


def test_labels_where_every_class_is_a_target() -> None:
    bd = samples.rendered([0] * 10, list(range(10)), [(i + 1) % 10 for i in range(10)])
    verdict = Verdict(score=5, threshold=2, label_scores=torch.arange(10.0))
    found = rows(Detection().measure(case(verdict, bd_test=bd)))
    assert (found["label_acc"].value, found["label_tpr"].value) == (0.7, 0.7)
    assert (found["label_fpr"].value, found["label_fpr"].reason) == (None, "no_other_class")


def test_label_scores_of_another_size_are_refused() -> None:
    found = rows(Detection().measure(case(Verdict(score=5, threshold=2, label_scores=torch.zeros(4)))))
    assert found["label_acc"].reason == "wrong_shape: label scores are (4,) for 10 classes"


def pairs_of(said: list[list[int]], **parts: Any) -> dict[str, Measurement]:
    pairs = torch.tensor(said, dtype=torch.int64).view(-1, 2)
    return rows(Detection().measure(case(Verdict(score=9, threshold=2, pairs=pairs), **parts)))


def counts(found: dict[str, Measurement]) -> list[tuple[int | None, int | None]]:
    return [(found[m].count, found[m].total) for m in ("pair_acc", "pair_tpr", "pair_fpr")]


def test_pairs_of_a_source_specific_backdoor() -> None:
    # Class 1 goes to 3; class 2 to 3 and, by another trigger, to 5. A pair said twice counts once, one of a class with
    # itself not at all.
    bd = samples.rendered([0, 0, 0, 1], [1, 1, 2, 2], [3, 3, 3, 5])
    assert counts(pairs_of([[1, 3], [1, 3], [2, 4], [6, 6], [3, 1]], bd_test=bd)) == [(86, 90), (1, 3), (2, 87)]


def test_pairs_of_an_all_to_one_backdoor_have_every_other_class_as_source() -> None:
    bd = samples.rendered([0] * 9, [i for i in range(10) if i != 3], [3] * 9)
    assert counts(pairs_of([[i, 3] for i in range(10) if i != 3], bd_test=bd)) == [(90, 90), (9, 9), (0, 81)]
    assert counts(pairs_of([], bd_test=bd)) == [(81, 90), (0, 9), (0, 81)], "silence is right on most pairs"


def test_pairs_of_a_clean_model_are_all_negatives() -> None:
    found = pairs_of([[0, 1], [4, 5]], bd_test=None)
    assert (found["pair_acc"].count, found["pair_fpr"].count, found["pair_fpr"].total) == (88, 2, 90)
    assert (found["pair_tpr"].value, found["pair_tpr"].reason) == (None, "no_trigger")


def test_pairs_where_there_is_no_other() -> None:
    spec = replace(samples.SPEC, classes=2)
    found = pairs_of([[0, 1]], bd_test=samples.rendered([0, 0], [0, 1], [1, 0]), spec=spec)
    assert (found["pair_acc"].value, found["pair_tpr"].value) == (0.5, 0.5)
    assert (found["pair_fpr"].value, found["pair_fpr"].reason) == (None, "no_other_pair")


def test_pairs_that_are_none() -> None:
    assert pairs_of([[0, 10]])["pair_acc"].reason == "wrong_shape: a pair is not of classes 0..9"
    assert pairs_of([[-1, 3]])["pair_tpr"].reason == "wrong_shape: a pair is not of classes 0..9"
    odd = Verdict(score=9, threshold=2, pairs=torch.zeros(3, dtype=torch.int64))
    assert rows(Detection().measure(case(odd)))["pair_fpr"].reason == "wrong_shape: pairs are (3,), not (P, 2)"
    assert rows(Detection().measure(case(Verdict(score=9, threshold=2))))["pair_acc"].reason == "no_pairs"


def test_a_repair_has_reasons_and_loads_no_network() -> None:
    # The case has no `net`, so that reaching for it would raise.
    findings = Detection().measure(case())
    found = rows(findings)
    assert all(m.value is None for m in findings.rows)
    assert {m.reason for m in findings.rows} == {"no_verdict", "no_scores"}
    assert found["input_auroc"].reason == found["input_acc"].reason == "no_scores"
    assert not findings.curves
    assert Detection.INFO["brings"] == ["detection_zoo"]
    assert "model" not in Detection.NEEDS.outcome
