from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Findings, Measurement
from sleeperbench.evaluators.accuracy import Accuracy, answers, headline, rating

NET = samples.ReadsPixel()


def case(**parts: Any) -> Any:
    test = samples.answering([1, 2, 3, 0], [1, 2, 3, 4])
    own = {"leak_test": None, "cover_test": None} | parts
    return SimpleNamespace(net=NET, test=test, controls={}, is_defended=True, ctx=samples.ctx(), **own)


def before(**values: float) -> dict[str, Findings]:
    return {"none": Findings(rows=tuple(Measurement(metric=m, value=v) for m, v in values.items()))}


def rows(findings: Findings) -> dict[tuple[str, str], Measurement]:
    return {(m.metric, m.qualifier): m for m in findings.rows}


def test_rating_of_published_figures() -> None:
    # Min et al. 2024, Table 3, BadNet: attacked 94.04/99.99, FST 93.89/0.78, PAM 92.11/1.14.
    assert rating(0.9999 - 0.0078, 0.9404 - 0.9389) == pytest.approx(0.9953, abs=5e-5)
    assert rating(0.9999 - 0.0114, 0.9404 - 0.9211) == pytest.approx(0.9846, abs=5e-5)
    assert rating(0, 0) == 0.5
    assert rating(-0.3, -0.1) == 0.5
    assert rating(1, 0) == 1
    assert rating(0, 1) == 0


def test_shares_and_ratings() -> None:
    # Targets 0; of five triggered rows two answer 0 and one its true label.
    c = case(bd_test=samples.rendered([0, 0, 3, 5, 6], [1, 2, 3, 4, 5], [0] * 5))
    c.controls = before(c_acc=1.0, asr=0.9, r_acc=0.1)
    found = rows(Accuracy().measure(c))
    assert (found["c_acc", ""].value, found["c_acc", ""].count, found["c_acc", ""].total) == (0.75, 3, 4)
    assert (found["asr", ""].value, found["asr", ""].count, found["asr", ""].total) == (0.4, 2, 5)
    assert (found["r_acc", ""].value, found["r_acc", ""].count) == (0.2, 1)
    assert found["der", ""].value == pytest.approx((0.5 - 0.25 + 1) / 2)
    assert found["rir", ""].value == pytest.approx((0.1 - 0.25 + 1) / 2)
    assert set(found) == {(m.name, "") for m in Accuracy.METRICS}


def test_rows_that_should_keep_their_label() -> None:
    # Spared classes 4 and 5: one of two goes to target 0. Covers: two of three keep their label.
    c = case(
        bd_test=samples.rendered([0], [1], [0]),
        leak_test=samples.rendered([0, 5], [4, 5], [0, 0]),
        cover_test=samples.rendered([1, 2, 0, 7], [1, 2, 3, 4], [0, 0, 0, 0]),
    )
    found = headline(Accuracy().measure(c))
    assert (found["asr_leak"], found["cover_acc"], found["cover_asr"]) == (0.5, 0.5, 0.25)
    plain = rows(Accuracy().measure(case(bd_test=samples.rendered([0], [1], [0]))))
    assert {plain[m, ""].reason for m in ("asr_source", "asr_leak", "cover_acc", "cover_asr")} == {"no_such_rows"}


def test_success_on_sources_is_that_of_triggers_that_spare_some_images() -> None:
    leak = samples.rendered([0, 5], [4, 5], [0, 0])
    one = rows(Accuracy().measure(case(bd_test=samples.rendered([0, 0, 3], [1, 2, 3], [0] * 3), leak_test=leak)))
    assert (one["asr_source", ""].count, one["asr_source", ""].total) == (2, 3) == (one["asr", ""].count, 3)
    # Three triggers, of which 0 and 2 spare images: 1 of 2 and 2 of 2; trigger 1 answers to all.
    bd = samples.rendered([0, 4, 1, 1, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])
    leak = samples.rendered([0, 5], [4, 5], [0, 0], [0, 2])
    found = rows(Accuracy().measure(case(bd_test=bd, leak_test=leak)))
    each = {q: m.value for (metric, q), m in found.items() if metric == "asr_source"}
    assert each == {"": 0.75, "trigger=0": 0.5, "trigger=2": 1.0, "stat=max": 1.0, "stat=min": 0.5}
    assert found["asr", ""].value == pytest.approx(2.5 / 3)


def test_spared_classes_come_apart() -> None:
    # Class 4: two of three go to the target, class 6: none of two.
    leak = samples.rendered([0, 6, 0, 4, 2], [4, 6, 4, 4, 6], [0] * 5)
    found = rows(Accuracy().measure(case(bd_test=samples.rendered([0], [1], [0]), leak_test=leak)))
    each = {q: (m.count, m.total) for (metric, q), m in found.items() if metric == "asr_leak"}
    assert each == {"": (2, 5), "class=4": (2, 3), "class=6": (0, 2)}
    two = samples.rendered([0, 6, 5, 4, 0], [4, 6, 4, 4, 6], [0, 0, 5, 5, 5], [0, 0, 2, 2, 2])
    found = rows(Accuracy().measure(case(bd_test=samples.rendered([0], [1], [0]), leak_test=two)))
    each = {q: (m.count, m.total) for (metric, q), m in found.items() if metric == "asr_leak" and "class" in q}
    assert each == {
        "class=4;trigger=0": (1, 1),
        "class=6;trigger=0": (0, 1),
        "class=4;trigger=2": (1, 2),
        "class=6;trigger=2": (0, 1),
    }


def test_undefended_cell_is_rated_a_half() -> None:
    c = case(bd_test=samples.rendered([0], [1], [0]))
    c.is_defended = False
    found = headline(Accuracy().measure(c))
    assert found["der"] == found["rir"] == 0.5


def test_ratings_need_the_undefended_cell() -> None:
    c = case(bd_test=samples.rendered([0], [1], [0]))
    for controls in ({}, before(c_acc=0.9)):
        c.controls = controls
        found = rows(Accuracy().measure(c))
        assert found["der", ""].value is None
        assert found["rir", ""].reason == "control_missing: none"
        assert found["asr", ""].value == 1


def test_without_trigger() -> None:
    found = rows(Accuracy().measure(case(bd_test=None)))
    assert found["c_acc", ""].value == 0.75
    for metric in ("asr", "r_acc", "der", "rir"):
        assert (found[metric, ""].value, found[metric, ""].reason) == (None, "no_trigger")


def test_all_to_all_wants_another_label_per_row() -> None:
    c = case(bd_test=samples.rendered([1, 2, 2, 9], [0, 1, 2, 9], [1, 2, 3, 0]))
    found = rows(Accuracy().measure(c))
    assert found["asr", ""].value == 0.5
    each = {q: (m.count, m.total) for (metric, q), m in found.items() if metric == "asr" and q}
    assert each == {"class=0": (1, 1), "class=1": (1, 1), "class=2": (0, 1), "class=9": (0, 1)}
    # A second trigger with one target: only the first is looked at class by class.
    both = samples.rendered([1, 2, 3, 3], [0, 1, 5, 6], [1, 2, 3, 3], [0, 0, 1, 1])
    mixed = rows(Accuracy().measure(case(bd_test=both)))
    assert {q for metric, q in mixed if metric == "asr" and "class" in q} == {"class=0;trigger=0", "class=1;trigger=0"}
    one = rows(Accuracy().measure(case(bd_test=samples.rendered([0, 0], [1, 2], [0, 0]))))
    assert not [q for metric, q in one if metric == "asr" and q], "one target: no classes"
    assert found["r_acc", ""].value == 0.5


def test_several_triggers_stand_apart_and_the_mean_is_over_triggers() -> None:
    # Trigger 0: 1 of 1 succeed; trigger 1: 1 of 4.
    c = case(bd_test=samples.rendered([0, 7, 3, 4, 5], [1, 2, 3, 4, 6], [0, 7, 7, 7, 7], [0, 1, 1, 1, 1]))
    found = rows(Accuracy().measure(c))
    assert found["asr", ""].value == pytest.approx((1 + 0.25) / 2)
    assert found["asr", ""].count is None
    assert [found["asr", f"trigger={i}"].value for i in (0, 1)] == [1, 0.25]
    assert (found["asr", "trigger=1"].count, found["asr", "trigger=1"].total) == (1, 4)
    assert (found["asr", "stat=max"].value, found["asr", "stat=min"].value) == (1, 0.25)
    assert found["r_acc", ""].value == pytest.approx((0 + 0.5) / 2)


def test_a_model_of_nans_answers_nothing() -> None:
    images = samples.answering([0, 200, 3], [0, 0, 3]).images
    assert answers(NET, images, samples.ctx()).tolist() == [0, -1, 3]
    c = case(bd_test=samples.rendered([200, 200], [0, 1], [2, 2]))
    found = headline(Accuracy().measure(c))
    assert found["asr"] == found["r_acc"] == 0


def test_forwards_are_counted() -> None:
    c = case(bd_test=samples.rendered([0, 1], [1, 2], [0, 0]))
    Accuracy().measure(c)
    assert c.ctx.cost.forwards == 6


def test_answers_do_not_depend_on_the_batch() -> None:
    net, test = samples.clean_net(), samples.digits()["test"]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    whole = answers(net, test.images, samples.ctx())
    assert torch.equal(answers(net, test.images[order], samples.ctx()), whole[order])
