from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from synthetic import cell_row

from sleeperbench.leaderboard import terms
from sleeperbench.leaderboard.summary import Board, benign, boards, not_purified, role, tally, track, weak
from sleeperbench.leaderboard.tracks import MEASURED
from sleeperbench.schema import HEADLINE_METRICS

KEPT = {"kind": "", "reasr_net": None, **dict.fromkeys(MEASURED)}


def cell(attack: str, defense: str, seed: int, **more: Any) -> dict[str, Any]:
    row = cell_row(attack, None if attack == "none" else 0.1, defense, seed, **more)
    return row | {"flags": tuple(f for f in row["flag"].split(";") if f), "reasons": {}, "control": False} | KEPT | more


def board(*cells: dict[str, Any]) -> Board:
    (made,) = boards(cells)
    return made


UNDEFENDED = [cell("badnets", "none", s, o_asr=0.9 + s / 100, c_acc=0.95, p_der=0.5) for s in (0, 1)]


@pytest.mark.parametrize(
    ("defense", "access", "kind"),
    [
        ("none", "none", "control"),
        ("clean_model", "T4", "control"),
        ("clean_model~a1b2c3", "T4", "control"),
        ("exact_purification", "T4", "oracle"),
        ("ft", "T1", "defense"),
        ("none_of_these", "T1", "defense"),
    ],
)
def test_controls_and_oracles_are_no_contestants(defense: str, access: str, kind: str) -> None:
    c = cell("badnets", defense, 0, access=access)
    assert role(c) == kind
    assert track(c) == (access if kind == "defense" else "control")
    assert role(c | {"control": True}) == "control", "a defense may say that it is one"


@pytest.mark.parametrize("status", ["failed", "timeout", "out_of_memory"])
def test_a_failure_counts_as_undefended(status: str) -> None:
    good = cell("badnets", "ft", 0, o_asr=0.0)
    bad = cell("badnets", "ft", 1, status=status, reason="raised: x")
    mean = board(*UNDEFENDED, good, bad).mean([good, bad], "o_asr", {})
    assert mean.estimate is not None
    assert mean.estimate.value == pytest.approx((0.0 + 0.91) / 2)
    assert mean.as_none == 1


def test_a_collapsed_model_never_looks_like_a_win() -> None:
    ruined = cell("badnets", "ft", 1, o_asr=0.0, c_acc=0.1, p_der=0.9, bec=0.3, flag="collapsed")
    b = board(*UNDEFENDED, ruined)
    for metric, worst, as_none in (("o_asr", 0.91, 1), ("p_der", 0.5, 1), ("c_acc", 0.1, 0)):
        mean = b.mean([ruined], metric, {})
        assert mean.estimate is not None
        assert (mean.estimate.value, mean.as_none, mean.ruined) == (worst, as_none, 1 - as_none)
        assert mean.lost
    low = cell("badnets", "ft", 1, o_asr=0.95, c_acc=0.1, p_der=0.2, flag="collapsed")
    for metric, worst in (("o_asr", 0.95), ("p_der", 0.2)):
        mean = board(*UNDEFENDED, low).mean([low], metric, {})
        assert mean.estimate is not None
        assert (mean.estimate.value, mean.ruined) == (worst, 1), "no better for failing"
    assert b.mean([ruined], "bec", {}).estimate is None, "the undefended model has no figure to hold it against"


def test_a_clean_model_counts_with_its_own_accuracy() -> None:
    clean = [cell("none", "none", s, c_acc=0.95) for s in (0, 1)]
    ruined = cell("none", "ft", 0, c_acc=0.4, flag="collapsed")
    bad = cell("none", "ft", 1, status="failed", reason="raised: x")
    mean = board(*clean, ruined, bad).mean([ruined, bad], "c_acc", {})
    assert mean.estimate is not None
    assert (mean.estimate.value, mean.estimate.cells, mean.as_none, mean.ruined) == (0.4, 1, 0, 1)


def test_which_way_is_worse_is_what_the_evaluators_declare() -> None:
    declared = {}
    for file in sorted((Path(__file__).parents[2] / "evaluators").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Metric":
                said = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
                declared[said.get("name")] = said.get("better")
    asr = {"o_asr": declared["asr"], "p_asr": declared["p_asr_ra"], "p_der": declared["der"]}
    for metric in HEADLINE_METRICS:
        way = {"up": metric in terms.HIGHER, "down": metric in terms.LOWER}
        wanted = (declared | asr).get(metric, "none")
        assert [w for w, holds in way.items() if holds] == [wanted] * (wanted != "none"), metric


def test_what_was_measured_before_a_later_probe_failed_stands() -> None:
    late = cell("badnets", "ft", 0, o_asr=0.03, status="timeout", reason="budget")
    b = board(*UNDEFENDED, late)
    measured, missing = b.mean([late], "o_asr", {}), b.mean([late], "p_der", {})
    assert measured.estimate is not None
    assert missing.estimate is not None
    assert (measured.estimate.value, measured.as_none) == (0.03, 0)
    assert (missing.estimate.value, missing.as_none) == (0.5, 1)


def test_a_controls_failure_is_left_out() -> None:
    good = cell("badnets", "clean_model", 0, o_asr=0.02)
    bad = cell("badnets", "clean_model", 1, status="failed", reason="raised: x")
    ruined = cell("badnets", "exact_purification", 1, o_asr=0.0, flag="collapsed")
    b = board(*UNDEFENDED, good, bad, ruined)
    mean = b.mean([good, bad], "o_asr", {})
    assert mean.estimate is not None
    assert (mean.estimate.value, mean.as_none) == (0.02, 0)
    assert b.mean([ruined], "o_asr", {}).estimate is None


def test_a_failure_without_an_undefended_cell_has_no_figure() -> None:
    bad = cell("badnets", "ft", 5, status="failed", reason="raised: x")
    mean = board(*UNDEFENDED, bad).mean([bad], "o_asr", {})
    assert mean.estimate is None
    assert mean.reason == "raised"


def test_the_p_asr_of_an_awake_model_enters_no_mean() -> None:
    asleep = cell("badnets", "ft", 0, o_asr=0.2, p_asr=0.6)
    awake = cell("badnets", "ft", 1, o_asr=0.201, p_asr=1.0)
    assert not_purified(awake)
    assert not not_purified(asleep)
    mean = board(*UNDEFENDED, asleep, awake).mean([asleep, awake], "p_asr", {})
    assert mean.estimate is not None
    assert mean.estimate.value == 0.6
    alone = board(*UNDEFENDED, awake).mean([awake], "p_asr", {})
    assert (alone.estimate, alone.reason) == (None, "not_purified")


@pytest.mark.parametrize("more", [{"flag": "weak"}, {"status": "not_run", "reason": "attack_did_not_implant: 0.3"}])
def test_an_attack_that_did_not_implant_enters_no_mean(more: dict[str, Any]) -> None:
    c = cell("badnets", "ft", 0, o_asr=0.01, **more)
    b = board(c)
    assert weak(c)
    assert b.mean([c], "o_asr", {}).estimate is None
    assert list(b.not_implanted) == ["badnets at 10 %"]


def test_rates_are_settings_of_their_own_and_clean_models_are_none() -> None:
    b = board(cell("badnets", "ft", 0), cell("badnets", "ft", 1, rate=0.01), cell("none", "ft", 0))
    assert b.settings == ["badnets at 1 %", "badnets at 10 %"]


def test_hard_negatives_are_clean_models_too() -> None:
    cells = [cell("none", "ft", 0), cell("none~1ce2b1", "ft", 0), cell("badnets", "ft", 0)]
    assert [benign(c) for c in cells] == [True, True, False]
    assert board(*cells).settings == ["badnets at 10 %"]


@pytest.mark.parametrize("column", ["suite", "protocol", "dataset", "arch", "clean_source"])
def test_what_may_not_be_averaged_is_another_board(column: str) -> None:
    made = boards([cell("badnets", "ft", 0), cell("badnets", "ft", 1, **{column: "other"})])
    assert len(made) == 2
    assert len({b.title for b in made}) == 2


def test_the_tally_counts_each_status_once() -> None:
    cells = [
        *UNDEFENDED,
        cell("badnets", "ft", 0, status="failed", reason="raised"),
        cell("badnets", "ft", 1, o_asr=0.5, flag="collapsed"),
        cell("badnets", "ft", 2, status="not_applicable", reason="needs_bn"),
        cell("badnets", "strip", 0, kind="detection", o_asr=1.0),
        cell("badnets", "ft", 3, status="not_run", reason="filtered"),
        cell("wanet", "ft", 3, status="not_run", reason="attack_did_not_implant"),
    ]
    assert tally(cells) == {
        "cells": 8,
        "measured": 4,
        "failed": 1,
        "collapsed": 1,
        "not_purified": 3,
        "weak": 1,
        "judged": 1,
        "not_applicable": 1,
        "not_run": 1,
    }
