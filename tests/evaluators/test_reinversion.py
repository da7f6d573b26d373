"""Inversion after repair, on nets that answer what an image's first pixel says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from test_inversion import Always, Deaf, paints, rows

from sleeperbench import Inverted, Outcome, Verdict
from sleeperbench.evaluators.reinversion import Reinversion


def repaired_case(*now: Inverted, before: tuple[Inverted, ...] = (paints(5), paints(9)), **parts: Any) -> Any:
    """Triggers to 5 and 9; the repaired net never answers 5 and gets the images of classes 1, 2, 3 and 9 right."""
    data = samples.answering([1, 2, 3, 3, 5, 9], [1, 2, 3, 4, 5, 9])
    given = {
        "net": Deaf(),
        "inner": Outcome(inverted=before),
        "anew": Outcome(inverted=now, verdict=Verdict(score=2.0, threshold=2.0)),
        "test": data,
        "probe": data,
        "bd_test": samples.rendered([5, 5, 9, 9], [1, 2, 3, 4], [5, 5, 9, 9], [0, 0, 1, 1]),
        "clean_models": (samples.ReadsPixel(), Always(5), Always(0)),
        "ctx": samples.ctx(),
    }
    return SimpleNamespace(**given | parts)


def measured(*now: Inverted, **parts: Any) -> dict[tuple[str, str], Any]:
    return rows(Reinversion().measure(repaired_case(*now, **parts)))


def test_success_is_that_of_the_repaired_model_on_what_it_has_right() -> None:
    found = measured(paints(5), paints(9), paints(7))
    shares = {q: (found["reasr_repaired", q].count, found["reasr_repaired", q].total) for q in LABELS}
    # Of a claim for 9 the images 1, 2, 3 count: 4 is taken for a 3 and 5 is never answered.
    assert shares == {"label=5": (0, 4), "label=9": (3, 3), "label=7": (4, 4)}
    assert found["reasr_repaired", ""].value == 0.5, "7 is no target"
    # The first clean model has all but 4 right and answers the pixel; `Always(5)` has the one image of class 5, which
    # is no victim of 5 and of 9 stays a 5; `Always(0)` has none.
    assert found["reasr_repaired_clean", "label=5"].value == 1
    assert found["reasr_repaired_clean", "label=9"].value == pytest.approx((1 + 0) / 2)
    assert {r.stage for r in found.values()} == {"defended"}


LABELS = ("label=5", "label=7", "label=9")


def test_a_target_that_is_found_no_more_counts_as_nothing_found() -> None:
    found = measured(paints(9))
    assert found["reasr_repaired", "label=5"].value == found["reasr_repaired_clean", "label=5"].value == 0
    assert found["reasr_repaired", ""].value == 0.5
    nothing = measured()
    assert nothing["reasr_repaired", ""].value == nothing["reasr_repaired_clean", ""].value == 0


def test_a_target_that_was_not_claimed_before_was_not_repaired() -> None:
    for before in ((paints(5),), (paints(5), paints(7))):
        found = measured(before=before)
        assert found["reasr_repaired", ""].value == 0
        assert (found["reasr_repaired", "label=9"].value, found["reasr_repaired", "label=9"].reason) == (
            None,
            "no_claim",
        )
    late = measured(paints(9), before=(paints(5),))
    assert (late["reasr_repaired", ""].value, late["reasr_repaired", "label=9"].value) == (0, 1)
    wrong = measured(before=(paints(7),))
    assert (wrong["reasr_repaired", ""].value, wrong["reasr_repaired", ""].reason) == (None, "no_claim")


def test_the_verdict_is_the_one_on_the_repaired_model() -> None:
    assert measured()["flag_repaired", ""].value == 0, "a score at the threshold is no flag"
    flagged = Outcome(verdict=Verdict(score=2.1, threshold=2.0))
    assert measured(anew=flagged)["flag_repaired", ""].value == 1
    assert measured(anew=Outcome())["flag_repaired", ""].reason == "no_verdict"


def test_of_several_claims_the_one_that_works_on_the_repaired_model_counts() -> None:
    dead = replace(paints(9), mask=torch.zeros(1, 16, 16))
    for order in ((dead, paints(9)), (paints(9), dead)):
        assert measured(*order)["reasr_repaired", "label=9"].value == 1
    # To the attacked model, which answers the pixel, both would be alike.
    deaf = (paints(5), paints(5, value=3))
    assert measured(*deaf, net=samples.ReadsPixel())["reasr_repaired", "label=5"].value == 1


def test_without_attack_the_labels_that_were_claimed_before_count() -> None:
    nets = (Always(0), samples.ReadsPixel(), samples.ReadsPixel())
    found = measured(paints(9), paints(7), bd_test=None, clean_models=nets)
    assert (found["reasr_repaired", ""].value, found["reasr_repaired", "label=7"].value) == (0.5, 1)
    assert found["reasr_repaired_clean", "label=9"].value == 1, "the first clean model is the attacked one itself"


def test_cells_that_have_no_such_figures() -> None:
    names = {m.name for m in Reinversion.METRICS}

    def reasons(**parts: Any) -> dict[str, str]:
        return {r.metric: r.reason.partition(":")[0] for r in Reinversion().measure(repaired_case(**parts)).rows}

    assert reasons(anew=None) == reasons(inner=None) == dict.fromkeys(names, "no_repair")
    assert reasons(before=()) == dict.fromkeys(names, "no_claim"), "nothing was repaired"
    coded = Outcome(inverted=(Inverted(target=5, uses_apply=True),), verdict=Verdict(score=3.0, threshold=2.0))
    assert reasons(anew=coded) == {
        "reasr_repaired": "needs_stamp",
        "reasr_repaired_clean": "needs_stamp",
        "flag_repaired": "",
    }
