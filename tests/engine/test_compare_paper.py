"""`compare-paper`: what a claim means, on hand-made tables, and that the shipped figures have the form."""

from __future__ import annotations

import configparser
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from sleeperbench.engine import rows
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import Variant, build, shipped
from sleeperbench.errors import BadInput
from sleeperbench.published import paper as published
from sleeperbench.published.judge import (
    FAILS,
    HOLDS,
    NOT_RUN,
    OUTSIDE,
    differences,
    figures,
    judge,
    spearman,
)
from sleeperbench.published.paper import TO, Faulty, Paper, of_suite, papers, read, ref
from sleeperbench.published.results import RATELESS, Results, Unit
from sleeperbench.schema import MEASUREMENTS

ROOT = Path(__file__).parents[2]
HEAD = 'schema = 1\ntitle = "T"\nsource = "https://example.org"\nsuites = ["smoke"]\n'
TABLE = """
[[table]]
id = "1"
what = "w"
row = "defense"
column = "attack"
columns = ["badnets", "blended"]
metrics = ["asr", "p_asr_ra"]
unit = "%"
[table.rows]
none = ["100/-", "99.5/-"]
ft = ["2/80", "-/60.5"]
[table.setting]
dataset = "digits"
arch = "net"
rate = 0.1
epochs = 100
rows = 50000
clean = 0.02
note = ["by hand"]
attack.badnets = { size = 3 }
defense.ft = { lr = 0.01 }
evaluator.ra = { draws = 3 }
"""
ABOUT: dict[str, Any] = {
    "suite": {
        "name": "tiny",
        "recipe": {"epochs": 8},
        "access": {"clean": 0.05, "clean_source": "heldout"},
        "dataset_rows": {},
        "seeds": [0, 1, 2],
        "evaluators": [{"id": "ra", "params": {"draws": 1}}],
    },
    "datasets": {"digits": {"rows": {"train": 1437}}},
}


def row(cell: str, metric: str, value: Any, **more: Any) -> dict[str, Any]:
    """One row of measurements: `cell` as dataset/arch/attack@rate/defense/s0."""
    dataset, arch, attack, defense, seed = cell.split("/")
    name, _, rate = attack.partition("@")
    blank: dict[str, Any] = {c.name: "" if c.type == "str" else None for c in MEASUREMENTS}
    ok = isinstance(value, (int, float))
    made = {
        "dataset": dataset,
        "arch": arch,
        "attack": name,
        "attack_params": "{}",
        "rate": float(rate or 0),
        "defense": defense,
        "defense_params": "{}",
        "seed": int(seed[1:]),
        "cell": cell,
        "metric": metric,
        "value": float(value) if ok else None,
        "status": "ok" if ok else "not_applicable",
        "reason": "" if ok else str(value),
        "task_key": f"{cell}-{metric}",
    }
    return blank | made | more


def seeds(unit: str, metric: str, *values: Any, **more: Any) -> list[dict[str, Any]]:
    """Rows of one unit, seeds 0, 1, ..."""
    return [row(f"digits/net/{unit}/s{i}", metric, v, **more) for i, v in enumerate(values)]


def one(claim: str, found: list[dict[str, Any]], table: str = "") -> Any:
    """The verdict on one claim."""
    text = HEAD + table + '\n[[claim]]\nid = "c"\nsays = "s"\nwhere = "w"\n' + claim
    (judged,) = judge(read("p", text), Results(found), ABOUT)
    return judged


def claim(**keys: Any) -> str:
    """A claim's TOML; values are written as they are but strings, which get quotes."""
    return "\n".join(f"{k} = {v if k in ('than', 'given') else json.dumps(v)}" for k, v in keys.items())


SLEEPS = claim(metric="p_asr_ra", attack="badnets", defense="ft", test="<=", value=0.2)


@pytest.mark.parametrize(
    ("test", "value", "verdict"),
    [
        ("<=", 0.2, HOLDS),
        ("<", 0.2, FAILS),
        (">=", 0.2, HOLDS),
        (">", 0.2, FAILS),
        ("<", 0.21, HOLDS),
        (">", 0.19, HOLDS),
        (">=", 0.21, FAILS),
        ("<=", 0.19, FAILS),
    ],
)
def test_a_bound_on_the_mean_over_seeds(test: str, value: float, verdict: str) -> None:
    found = seeds("badnets@0.1/ft", "p_asr_ra", 0.1, 0.2, 0.3)  # 0.6 / 3 differs from 0.2 in its last digit
    judged = one(claim(metric="p_asr_ra", attack="badnets", defense="ft", test=test, value=value), found)
    assert judged.verdict == verdict
    assert judged.lines[0].left["seeds"] == [0, 1, 2]


def test_the_interval_is_students_and_says_how_firm_a_verdict_is() -> None:
    judged = one(SLEEPS, seeds("badnets@0.1/ft", "p_asr_ra", 0.1, 0.2, 0.15))
    (line,) = judged.lines
    half = 4.302652729911275 * 0.05 / math.sqrt(3)
    assert (line.left["lower"], line.left["upper"]) == pytest.approx((0.15 - half, 0.15 + half))
    assert line.difference["firm"] is False
    (line,) = one(SLEEPS, seeds("badnets@0.1/ft", "p_asr_ra", 0.1, 0.11, 0.12)).lines
    assert (line.verdict, line.difference["firm"]) == (HOLDS, True)
    (line,) = one(SLEEPS, seeds("badnets@0.1/ft", "p_asr_ra", 0.1, 0.3)).lines
    assert (line.left["interval"], line.left["lower"], line.left["upper"]) == ("range", 0.1, 0.3)
    assert line.difference["firm"] is None


def test_two_sides_are_paired_by_seed() -> None:
    wakes = claim(metric="p_asr_ra", attack="badnets", defense="ft", test=">", than='{ defense = "clean_model" }')
    control = seeds("badnets@0.1/clean_model", "p_asr_ra", 0.1, 0.2, "missing")
    judged = one(wakes, seeds("badnets@0.1/ft", "p_asr_ra", 0.2, 0.3, 0.0) + control)
    assert judged.verdict == HOLDS  # the third seed would turn the mean, and has no other side
    assert judged.lines[0].difference["seeds"] == [0, 1]
    assert judged.lines[0].difference["mean"] == pytest.approx(0.1)
    more = one(wakes + "\nplus = 0.11", seeds("badnets@0.1/ft", "p_asr_ra", 0.2, 0.3, 0.0) + control)
    assert more.verdict == FAILS
    apart = one(wakes, [row("digits/net/badnets@0.1/ft/s5", "p_asr_ra", 0.9), *control])
    assert (apart.verdict, apart.lines[0].reason) == (NOT_RUN, "the two sides share no seed")


def test_than_inherits_what_it_leaves_open() -> None:
    found = [*seeds("badnets@0.1/ft", "asr_wba", 0.9), *seeds("badnets@0.1/ft", "asr_guaa", 0.2)]
    found += [*seeds("blended@0.1/ft", "asr_wba", 0.1), *seeds("blended@0.1/ft", "asr_guaa", 0.3)]
    found += seeds("badnets@0.1/nad", "c_acc", 0.9)  # not the unit's own defense
    judged = one(claim(metric="asr_wba", test=">", than='{ metric = "asr_guaa" }'), found)
    assert [(line.unit, line.verdict) for line in judged.lines] == [
        ("digits/net/badnets@0.1/ft", HOLDS),
        ("digits/net/blended@0.1/ft", FAILS),
    ]
    assert judged.verdict == FAILS
    rates = [*seeds("badnets@0.1/ft", "asr", 0.9), *seeds("badnets@0.01/ft", "asr", 0.2)]
    judged = one(claim(metric="asr", rate=0.1, defense="ft", test=">", than="{ rate = 0.01 }"), rates)
    assert [line.verdict for line in judged.lines] == [HOLDS]
    clean = [*seeds("badnets@0.1/nc", "det_score", 3.0), *seeds("none/nc", "det_score", 1.0)]
    judged = one(claim(metric="det_score", attack="badnets", defense="nc", test=">", than='{ attack = "none" }'), clean)
    assert judged.verdict == HOLDS
    judged = one(claim(metric="det_score", attack="none", defense="nc", test="<", than='{ attack = "badnets" }'), clean)
    assert judged.verdict == HOLDS


def test_open_choices_take_all_but_the_controls() -> None:
    found = [r for d in ("ft", "none", "clean_model", "strip") for r in seeds(f"badnets@0.1/{d}", "bec", 0.5)]
    found += [*seeds("none/ft", "bec", 0.5), *seeds("badnets@0.1/nc", "bec", "no_model")]
    judged = one(claim(metric="bec", test=">", value=0.1), found)
    assert [line.unit for line in judged.lines] == ["digits/net/badnets@0.1/ft", "digits/net/badnets@0.1/strip"]


def test_what_is_named_and_absent_is_not_run() -> None:
    both = claim(metric="p_asr_ra", attack=["badnets", "lc"], defense=["ft", "pam"], test="<=", value=0.2)
    judged = one(both, seeds("badnets@0.1/ft", "p_asr_ra", 0.1))
    assert judged.verdict == NOT_RUN
    assert [(line.unit, line.verdict) for line in judged.lines] == [
        ("digits/net/badnets@0.1/ft", HOLDS),
        ("digits/net/badnets@0.1/pam", NOT_RUN),
        ("digits/net/lc@0.1", NOT_RUN),
    ]
    awake = one(both, seeds("badnets@0.1/ft", "p_asr_ra", 0.9))
    assert awake.verdict == FAILS  # one counterexample settles it, whatever was not run


def test_why_there_is_no_figure() -> None:
    judged = one(SLEEPS, seeds("badnets@0.1/ft", "p_asr_ra", "no_trigger"))
    assert judged.lines[0].reason.endswith("p_asr_ra: not_applicable: no_trigger")
    failed = seeds("badnets@0.1/ft", "p_asr_ra", "raised: ValueError", status="failed")
    assert "failed: raised: ValueError" in one(SLEEPS, failed).lines[0].reason
    other = seeds("badnets@0.1/ft", "asr", 0.1)
    assert "not measured" in one(SLEEPS, other).lines[0].reason


@pytest.mark.parametrize(
    ("share", "values", "verdict"),
    [
        (1.0, (0.1, 0.1, 0.1, 0.1), HOLDS),
        (1.0, (0.1, 0.1, 0.1, "x"), NOT_RUN),
        (0.75, (0.1, 0.1, 0.1, 0.9), HOLDS),
        (0.75, (0.1, 0.1, 0.1, "x"), HOLDS),
        (0.75, (0.1, 0.1, "x", 0.9), NOT_RUN),
        (0.75, (0.1, "x", 0.9, 0.9), FAILS),
        (0.75, (0.1, 0.1, 0.9, 0.9), FAILS),
        (0.5, (0.1, 0.1, 0.9, 0.9), HOLDS),
    ],
)
def test_a_share_of_the_units(share: float, values: tuple[Any, ...], verdict: str) -> None:
    names = [f"d{i}" for i in range(4)]
    found = [r for n, v in zip(names, values, strict=True) for r in seeds(f"badnets@0.1/{n}", "apd", v)]
    told = claim(metric="apd", attack="badnets", defense=names, test="<", value=0.2, share=share)
    assert one(told, found).verdict == verdict


def test_a_condition_puts_units_outside_a_claim() -> None:
    wakes = claim(
        metric="p_asr_ra",
        attack=["badnets", "blended"],
        defense="ft",
        test=">",
        value=0.5,
        given='[{ metric = "asr", test = "<=", value = 0.2 }]',
    )
    purified = [*seeds("badnets@0.1/ft", "asr", 0.1), *seeds("badnets@0.1/ft", "p_asr_ra", 0.9)]
    awake = [*seeds("blended@0.1/ft", "asr", 0.8), *seeds("blended@0.1/ft", "p_asr_ra", 0.3)]
    judged = one(wakes, purified + awake)
    assert (judged.verdict, [line.verdict for line in judged.lines]) == (HOLDS, [HOLDS, OUTSIDE])
    assert "asr 0.8, not <= 0.2" in judged.lines[1].reason
    alone = one(wakes, [*purified[1:], *awake])
    assert (alone.verdict, [line.verdict for line in alone.lines]) == (NOT_RUN, [NOT_RUN, OUTSIDE])
    assert "condition unknown" in alone.lines[0].reason
    nobody = claim(metric="p_asr_ra", test=">", value=0.5, given='[{ metric = "asr", test = "<=", value = 0.2 }]')
    assert one(nobody, awake).verdict == NOT_RUN
    elsewhere = claim(
        metric="p_asr_ra",
        attack="blended",
        test=">",
        value=0.2,
        given='[{ metric = "asr", defense = "none", test = ">=", value = 0.9 }]',
    )
    assert one(elsewhere, awake + seeds("blended@0.1/none", "asr", 0.95)).verdict == HOLDS
    assert one(elsewhere, awake + seeds("blended@0.1/none", "asr", 0.5)).verdict == NOT_RUN


def test_a_condition_is_asked_of_every_seed_by_itself() -> None:
    sleeps = SLEEPS + '\ngiven = [{ metric = "asr", test = "<=", value = 0.2 }]'
    woken = seeds("badnets@0.1/ft", "p_asr_ra", 0.1, 0.9, 0.15, 0.16)
    (line,) = one(sleeps, woken + seeds("badnets@0.1/ft", "asr", 0.0, 0.6, 0.1, 0.2)).lines
    # The mean over all four would be 0.3275, and their mean ASR 0.225.
    assert (line.verdict, line.left["seeds"], line.difference["seeds"]) == (HOLDS, [0, 2, 3], [0, 2, 3])
    assert line.left["mean"] == pytest.approx(0.41 / 3)
    assert line.reason == "without seed 1: asr 0.6, not <= 0.2"
    (line,) = one(sleeps, woken + seeds("badnets@0.1/ft", "asr", 0.3, 0.6, 0.3, 0.3)).lines
    assert (line.verdict, line.reason) == (OUTSIDE, "condition not met: asr 0.375, not <= 0.2")
    # A mean ASR of at most 0.2 lets no seed in that was not purified.
    (line,) = one(sleeps, woken + seeds("badnets@0.1/ft", "asr", 0.0, 0.5, 0.0, 0.0)).lines
    assert (line.verdict, line.left["seeds"]) == (HOLDS, [0, 2, 3])
    # Two conditions, of which each lets in one seed.
    asr = seeds("badnets@0.1/ft", "asr", 0.0, 0.6) + seeds("badnets@0.1/pam", "asr", 0.6, 0.0)
    both = sleeps.replace("}]", '}, { metric = "asr", defense = "pam", test = "<=", value = 0.2 }]')
    (line,) = one(both, woken[:2] + asr).lines
    assert (line.verdict, line.reason.count("not <= 0.2")) == (OUTSIDE, 2)
    # Where one fails under some seed and nobody measured the other, the claim may speak of the rest.
    (line,) = one(both, woken[:2] + asr[:2]).lines
    assert (line.verdict, line.reason.startswith("condition unknown: ")) == (NOT_RUN, True)
    (line,) = one(both, woken[1:2] + asr[:2]).lines
    assert (line.verdict, line.reason) == (OUTSIDE, "condition not met: asr 0.6, not <= 0.2")
    (line,) = one(both, [*woken[:2], asr[0], asr[3]]).lines
    assert (line.verdict, line.reason) == (NOT_RUN, "condition unknown: of no seed are all told")
    # A seed whose condition nobody measured does not count; alone it leaves the claim open.
    some = seeds("badnets@0.1/ft", "asr", 0.1)
    (line,) = one(sleeps, woken + some).lines
    assert (line.left["seeds"], line.reason) == ([0], "without seed 1, 2, 3")
    (line,) = one(sleeps, woken[1:] + some).lines
    assert (line.verdict, line.left["mean"]) == (NOT_RUN, None)


def test_the_other_side_stands_over_the_same_seeds() -> None:
    than = claim(
        metric="p_asr_ra",
        attack="badnets",
        defense="ft",
        test=">",
        than='{ defense = "clean_model" }',
        given='[{ metric = "asr", test = "<=", value = 0.2 }]',
    )
    found = seeds("badnets@0.1/ft", "p_asr_ra", 0.5, 0.0) + seeds("badnets@0.1/ft", "asr", 0.1, 0.9)
    (line,) = one(than, found + seeds("badnets@0.1/clean_model", "p_asr_ra", 0.1, 0.9)).lines
    assert (line.verdict, line.right["mean"], line.right["seeds"]) == (HOLDS, 0.1, [0])


def test_a_pool_of_woken_models_is_over_the_purified_ones_seed_by_seed() -> None:
    found = [*seeds("badnets@0.1/a", "p_asr_qra", 0.3, 0.5), *seeds("badnets@0.1/b", "p_asr_qra", 0.9, 0.7)]
    found += [*seeds("badnets@0.1/a", "asr", 0.1, 0.1), *seeds("badnets@0.1/b", "asr", 0.8, 0.2)]
    pooled = claim(
        metric="p_asr_qra", attack="badnets", defense=["a", "b"], pool="mean", test=">", than='{ metric = "asr" }'
    )
    (line,) = one(pooled, found).lines
    assert line.left["mean"] == pytest.approx((0.3 + 0.6) / 2)
    assert line.right["mean"] == pytest.approx((0.1 + 0.15) / 2)  # of the same units under each seed
    awake = [r for r in found if (r["metric"], r["defense"]) != ("asr", "b")]
    (line,) = one(pooled, awake + seeds("badnets@0.1/b", "asr", 0.8, 0.8)).lines
    assert (line.left["mean"], "1 of them never purified" in line.left["what"]) == (pytest.approx(0.4), True)
    (line,) = one(pooled, awake).lines
    assert (line.verdict, "b: asr: not measured" in line.reason) == (NOT_RUN, True)
    # Of the other side of a claim too.
    below = claim(
        metric="p_asr_qra", attack="badnets", defense="pam", test="<", than='{ defense = ["a", "b"], pool = "max" }'
    )
    (line,) = one(below, found + seeds("badnets@0.1/pam", "p_asr_qra", 0.2, 0.6)).lines
    assert line.right["mean"] == pytest.approx((0.3 + 0.7) / 2)


def test_why_a_claim_has_no_unit() -> None:
    found = seeds("badnets@0.1/ft", "asr", 0.1)
    told = claim(metric="asr_bba", qualifier="queries=7000", test=">", value=0.5)
    for more, reason in (
        ("", "asr_bba[queries=7000]: not measured"),
        ('\ndataset = "digits"\narch = "net"', "asr_bba[queries=7000]: not measured"),
        ('\narch = "vgg"', "the run has digits with net"),
        ('\ndataset = ["cifar10", "gtsrb"]', "the run has digits with net"),
    ):
        assert [(n.verdict, n.reason) for n in one(told + more, found).lines] == [(NOT_RUN, reason)]
    assert one(told, []).lines[0].reason == "the run has no figures"


def test_claims_on_what_woke_speak_of_purified_models() -> None:
    """The claims of the safety paper on P-ASR, but for those on clean models, whose ASR nothing lowered."""
    for c in papers()["superficial-safety"].claims:
        left = c.compared.left
        if left.metric == "p_asr_ra" and left.defenses != (ref("clean_model"),):
            named = [g.left.defenses for g in c.given if (g.left.metric, g.test, g.value) == ("asr", "<=", 0.2)]
            than = c.compared.than
            other = than.defenses if than and not than.pool and than.defenses != (ref("clean_model"),) else None
            assert None in named and other in named, c.id


def test_what_the_protocol_gives_no_figure_is_outside_a_claim() -> None:
    found = [*seeds("badnets@0.1/a", "q", 0.6, 0.6), *seeds("badnets@0.1/b", "q", *["ra_not_successful"] * 2)]
    found += [*seeds("badnets@0.1/a", "asr", 0.1, 0.1), *seeds("badnets@0.1/b", "asr", 0.9, 0.9)]
    each = one(claim(metric="q", attack="badnets", defense=["a", "b"], test=">", value=0.5), found)
    assert (each.verdict, [line.verdict for line in each.lines]) == (HOLDS, [HOLDS, OUTSIDE])
    assert "ra_not_successful" in each.lines[1].reason
    # Both means are over the units that have the figure.
    pooled = claim(
        metric="q", attack="badnets", defense=["a", "b"], pool="mean", test=">=", than='{ metric = "asr" }', plus=0.5
    )
    (line,) = one(pooled, found).lines
    assert (line.verdict, line.left["mean"], line.right["mean"]) == (HOLDS, 0.6, 0.1)
    assert "over 1 units, without 1 " in line.left["what"]
    nobody = [r for r in found if "/b/" in r["cell"]]
    (line,) = one(pooled.replace('["a", "b"]', '"b"'), nobody).lines
    assert (line.verdict, line.reason) == (OUTSIDE, "the protocol gives none of its units a figure")
    # What failed, or was not asked everywhere, is no such thing.
    for other in (["raised"] * 2, ["ra_not_successful", "raised"]):
        rest = [*found[:2], *seeds("badnets@0.1/b", "q", *other), *found[4:]]
        assert one(pooled, rest).verdict == NOT_RUN
    status = [r | ({"status": "failed"} if r["reason"] else {}) for r in found]
    assert one(pooled, status).verdict == NOT_RUN


def test_pools() -> None:
    found = [r for d, v in (("a", 0.1), ("b", 0.4)) for r in seeds(f"badnets@0.1/{d}", "asr", v, v + 0.1)]
    lowest = claim(
        metric="asr", attack="badnets", defense="pam", test="<", than='{ defense = ["a", "b"], pool = "min" }'
    )
    assert one(lowest, found + seeds("badnets@0.1/pam", "asr", 0.05, 0.1)).verdict == HOLDS
    assert one(lowest, found + seeds("badnets@0.1/pam", "asr", 0.2, 0.2)).verdict == FAILS
    absent = one(lowest, found[:2] + seeds("badnets@0.1/pam", "asr", 0.05))
    assert absent.verdict == NOT_RUN
    both = claim(metric="asr", attack="badnets", defense=["a", "b"], pool="mean", test="<=", value=0.3)
    judged = one(both, found)
    assert judged.verdict == HOLDS
    assert judged.lines[0].left["mean"] == pytest.approx(0.3)
    assert (judged.lines[0].left["lower"], judged.lines[0].left["upper"]) == pytest.approx((0.25, 0.35))
    rise = claim(
        metric="q", attack="badnets", defense=["a", "b"], pool="mean", test=">=", than='{ metric = "asr" }', plus=0.3
    )
    woken = [r for d in ("a", "b") for r in seeds(f"badnets@0.1/{d}", "q", 0.6, 0.6)]
    assert one(rise, found + woken).verdict == HOLDS  # 0.6 against 0.3 + 0.3
    assert one(rise.replace("0.3", "0.31"), found + woken).verdict == FAILS
    largest = claim(metric="asr", attack="badnets", defense=["a", "b"], pool="max", test=">", value=0.44)
    assert one(largest, found).verdict == HOLDS


def test_variants_by_their_parameters() -> None:
    found = seeds("badnets@0.1/pam", "asr", 0.3, defense_params='{"rho": 0.5}')
    found += seeds("badnets@0.1/pam~abc123", "asr", 0.1, defense_params='{"rho": 0.9}')
    down = claim(metric="asr", attack="badnets", defense="pam{rho=0.9}", test="<", than='{ defense = "pam{rho=0.5}" }')
    assert one(down, found).verdict == HOLDS
    assert len(one(claim(metric="asr", attack="badnets", defense="pam", test=">", value=0), found).lines) == 1
    assert len(one(claim(metric="asr", attack="badnets", defense="pam{}", test=">", value=0), found).lines) == 2
    several = claim(metric="asr", attack="badnets", defense="pam", test=">", than='{ defense = "pam{}" }')
    judged = one(several, found)
    assert (judged.verdict, judged.lines[0].reason.split(": ")[-1]) == (NOT_RUN, "means several cells")
    inner = '{"cover": "mask", "inner": {"size": 6}}'
    covers = seeds("belt:badnets@0.1/none", "excl", 0.8, attack_params=inner)
    found = one(
        claim(metric="excl", attack='belt:badnets{cover="mask", size=6}', defense="none", test=">", value=0), covers
    )
    assert found.verdict == HOLDS
    absent = claim(metric="excl", attack='belt:badnets{cover="noise"}', defense="none", test=">", value=0)
    assert one(absent, covers).verdict == NOT_RUN


def test_zoos_and_qualifiers() -> None:
    found = seeds("zoo/mntd", "det_auroc", 0.9, qualifier="attack=badnets")
    found += seeds("zoo/mntd", "det_auroc", 0.7, qualifier="attack=belt:badnets")
    told = claim(
        metric="det_auroc",
        qualifier="attack=belt:badnets",
        attack="zoo",
        defense="mntd",
        test="<",
        than='{ qualifier = "attack=badnets" }',
    )
    assert one(told, found).verdict == HOLDS


def test_a_qualifier_belongs_to_its_metric() -> None:
    found = seeds("badnets@0.1/ft", "asr_bba", 0.9, qualifier="queries=7000")
    found += [*seeds("badnets@0.1/ft", "asr_bba", 0.3, qualifier="queries=1000"), *seeds("badnets@0.1/ft", "asr", 0.1)]
    given = '[{ metric = "asr", test = "<", value = 0.2 }]'
    told = {"metric": "asr_bba", "qualifier": "queries=7000", "test": ">", "given": given}
    for than in ('{ qualifier = "queries=1000" }', '{ metric = "asr" }'):
        assert one(claim(**told, than=than), found).verdict == HOLDS
    assert one(claim(**told, than='{ metric = "asr", qualifier = "queries=7000" }'), found).verdict == NOT_RUN
    pooled = claim(metric="asr_bba", qualifier="queries=7000", pool="mean", test=">", than='{ metric = "asr" }')
    assert one(pooled, found).lines[0].right["mean"] == pytest.approx(0.1)


def test_data_sets_and_architectures_are_judged_apart() -> None:
    found = [row(f"{d}/net/badnets@0.1/ft/s0", "p_asr_ra", v) for d, v in (("digits", 0.1), ("mnist", 0.9))]
    judged = one(SLEEPS, found)
    assert [(line.unit.split("/")[0], line.verdict) for line in judged.lines] == [("digits", HOLDS), ("mnist", FAILS)]
    assert one(SLEEPS + '\ndataset = "digits"', found).verdict == HOLDS
    nowhere = one(SLEEPS + '\ndataset = "cifar10"', found)
    assert (nowhere.verdict, nowhere.lines[0].reason) == (NOT_RUN, "the run has digits with net, mnist with net")


def test_empty_tables_leave_every_claim_open() -> None:
    assert one(SLEEPS, []).verdict == NOT_RUN
    for paper in papers().values():
        assert {j.verdict for j in judge(paper, Results([]), {"suite": {}})} <= {NOT_RUN}
        assert figures(paper, Results([]), {"suite": {}}) == []


def test_hostile_tables() -> None:
    twice = seeds("badnets@0.1/ft", "p_asr_ra", 0.1) + seeds("badnets@0.1/ft", "p_asr_ra", 0.9)
    judged = one(SLEEPS, twice)
    assert (judged.verdict, "seed 0 has several figures" in judged.lines[0].reason) == (NOT_RUN, True)
    same = seeds("badnets@0.1/ft", "p_asr_ra", 0.1) * 2
    assert one(SLEEPS, same).verdict == HOLDS
    for bad in (math.nan, math.inf, -math.inf):
        judged = one(SLEEPS, seeds("badnets@0.1/ft", "p_asr_ra", bad))
        assert (judged.verdict, "not finite" in judged.lines[0].reason) == (NOT_RUN, True)
    lied = seeds("badnets@0.1/ft", "p_asr_ra", "x", status="ok")
    assert one(SLEEPS, lied).verdict == NOT_RUN
    unspoken = seeds("badnets@0.1/ft", "p_asr_ra", 0.1, status="failed")
    assert one(SLEEPS, unspoken).verdict == NOT_RUN
    for wrong in ({"seed": "0"}, {"value": "0.1"}, {"attack_params": "{"}, {"attack_params": "[1]"}):
        with pytest.raises(BadInput, match="table of measurements"):
            Results([seeds("badnets@0.1/ft", "p_asr_ra", 0.1)[0] | wrong])
    with pytest.raises(BadInput, match="no column `value`"):
        Results([{k: v for k, v in twice[0].items() if k != "value"}])


def test_printed_figures_stand_beside_ours() -> None:
    told = claim(metric="p_asr_ra", table="1", attack=["badnets", "blended"], defense="ft", test=">", value=0.5)
    found = [*seeds("badnets@0.1/ft", "p_asr_ra", 0.7), *seeds("blended@0.1/ft", "p_asr_ra", 0.6)]
    judged = one(told, found, TABLE)
    assert [line.published["left"] for line in judged.lines] == [0.8, 0.605]
    paper = read("p", HEAD + TABLE)
    beside = figures(paper, Results(found), ABOUT)
    assert {(f["unit"], f["metric"], f["published"], f["ours"]["mean"]) for f in beside} == {
        ("digits/net/badnets@0.1/ft", "asr", 0.02, None),
        ("digits/net/badnets@0.1/ft", "p_asr_ra", 0.8, 0.7),
        ("digits/net/blended@0.1/ft", "p_asr_ra", 0.605, 0.6),
    }
    woken = claim(metric="asr", table="1", attack="badnets", defense="ft", test="<", than='{ defense = "none" }')
    both = [*seeds("badnets@0.1/ft", "asr", 0.1), *seeds("badnets@0.1/none", "asr", 0.9)]
    (line,) = one(woken, both, TABLE).lines
    assert (line.published["left"], line.published["right"]) == (0.02, 1.0)


def test_differences_of_setting() -> None:
    found = seeds("badnets@0.1/ft", "asr", 0.1, attack_params='{"size": 6}', defense_params='{"lr": 0.01}')
    setting = read("p", HEAD + TABLE).tables["1"].setting
    unit = Unit("digits", "net", "badnets", 0.1, "ft")
    assert list(differences(setting, unit, Results(found), ABOUT)) == [
        "epochs 8 instead of 100",
        "rows 1437 instead of 50000",
        "clean 0.05 instead of 0.02",
        "by hand",
        "attack badnets: size 6 instead of 3",
        "ra: draws 1 instead of 3",
    ]
    other = Unit("mnist", "cnn", "badnets", 0.05, "ft")
    said = list(differences(setting, other, Results(found), ABOUT))
    assert said[:3] == ["dataset mnist instead of digits", "arch cnn instead of net", "rate 0.05 instead of 0.1"]
    bare = list(differences(setting, unit, Results([]), {"suite": {}}))
    assert "epochs of the data set instead of 100" in bare


def test_the_table_of_the_units_own_setting_is_taken() -> None:
    second = TABLE.replace('id = "1"', 'id = "2"').replace("rate = 0.1", "rate = 0.01").replace("2/80", "2/70")
    told = claim(metric="p_asr_ra", table=["1", "2"], attack="badnets", defense="ft", test=">", value=0.5)
    found = [*seeds("badnets@0.1/ft", "p_asr_ra", 0.7), *seeds("badnets@0.01/ft", "p_asr_ra", 0.7)]
    judged = one(told, found + seeds("badnets@0.3/ft", "p_asr_ra", 0.7), TABLE + second)
    printed = {line.unit.split("@")[1]: (line.published["table"], line.published["left"]) for line in judged.lines}
    assert printed == {"0.01/ft": ("2", 0.7), "0.1/ft": ("1", 0.8), "0.3/ft": ("1", 0.8)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense = 1", "unknown key `nonsense`"),
        (claim(test=">", value=1), "`metric` is missing"),
        (claim(metric="asr", value=1), "`test` is missing"),
        (claim(metric="asr", test="=", value=1), "test is '='"),
        (claim(metric="asr", test=">"), "one of value and than"),
        (claim(metric="asr", test=">", value=1, than='{ defense = "ft" }'), "one of value and than"),
        (claim(metric="asr", test=">", than="{}"), "must name what differs"),
        (claim(metric="asr", test=">", than='{ defense = ["a", "b"] }'), "say by `pool`"),
        (claim(metric="asr", test=">", than='{ test = ">" }'), "unknown key `test`"),
        (claim(metric="asr", test=">", value=1, plus=1), "`plus` belongs to `than`"),
        (claim(metric="asr", test=">", value=True), "is no number"),
        (claim(metric="asr", test=">", value="1"), "is no number"),
        (claim(metric="asr", test=">", value=1, share=0), "share"),
        (claim(metric="asr", test=">", value=1, share=1.1), "share"),
        (claim(metric="asr", test=">", value=1, pool="median"), "pool is 'median'"),
        (claim(metric="asr", test=">", value=1, attack=[]), "attack is empty"),
        (claim(metric="asr", test=">", value=1, defense="a b"), "is no method"),
        (claim(metric="asr", test=">", value=1, defense="pam{rho}"), "pam{rho}"),
        (claim(metric="asr", test=">", value=1, table="9"), "names table 9"),
        (
            claim(metric="asr", test=">", value=1, given='[{ metric = "x", test = ">", share = 1 }]'),
            "unknown key `share`",
        ),
        (claim(metric="asr", test=">", value=1, pool="min", given='[{ test = ">", value = 1 }]'), "pooled figures"),
    ],
)
def test_a_claim_without_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(Faulty, match=re.escape(said)):
        one(text, [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('column = "attack"', 'column = "defense"', "that is no table"),
        ('"2/80"', '"2"', "wanted 2 figures"),
        ('"2/80"', '"2/x"', "wanted numbers or -"),
        ('ft = ["2/80", "-/60.5"]', 'ft = ["2/80"]', "1 cells for 2 columns"),
        ('unit = "%"', 'unit = "points"', "unit is 'points'"),
        ("epochs = 100", "epoch = 100", "unknown key `epoch`"),
        ("rate = 0.1", "rates = { badnets = 0.1 }", "`rate` is missing"),
        ("rate = 0.1", 'rate = 0.1\nrates = { badnets = "0.2" }', "is no number"),
        ('arch = "net"\n', "", "`arch` is missing"),
        ('metrics = ["asr", "p_asr_ra"]\n', "", "`metrics` belong"),
        ('what = "w"\n', "", "`what` is missing"),
    ],
)
def test_a_table_without_form_is_refused(old: str, new: str, said: str) -> None:
    assert old in TABLE
    with pytest.raises(Faulty, match=re.escape(said)):
        read("p", HEAD + TABLE.replace(old, new))
    with pytest.raises(Faulty, match="stands twice"):
        read("p", HEAD + TABLE + TABLE)
    with pytest.raises(Faulty, match="reads 1"):
        read("p", HEAD.replace("schema = 1", "schema = 2"))


def test_shipped_papers_name_what_there_is() -> None:
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    points = cfg["options.entry_points"]
    known = {
        kind: {line.split("=")[0].strip() for line in points[f"sleeperbench.{kind}s"].strip().splitlines()}
        for kind in ("attack", "defense")
    }
    metrics = {m for f in (ROOT / "evaluators").glob("*.py") for m in re.findall(r'name="(\w+)"', f.read_text())}
    found = papers()
    assert {"superficial-safety", "reactivation", "istr", "belt", "backdoorbench"} <= set(found)
    for paper in found.values():
        assert set(paper.suites) <= set(shipped())
        for f in (f for t in paper.tables.values() for f in t.figures):
            assert f.metric in metrics, f
            for kind in ("attack", "defense"):
                named = getattr(f, kind)
                assert named is None or set(named.id.split(":")) <= known[kind] | {"zoo"}, named
        for c in paper.claims:
            sides = [c.compared, *c.given]
            assert set(c.compared.left.to) <= known["defense"], c
            others = [o for s in sides for o in (s.than, s.beside) if o is not None]
            for choice in [s.left for s in sides] + others:
                assert choice.metric is None or choice.metric in metrics, choice
                for kind, refs in (("attack", choice.attacks), ("defense", choice.defenses)):
                    for r in refs or ():
                        assert set(r.id.split(":")) <= known[kind] | {"zoo", TO}, r


@pytest.mark.parametrize(
    ("suite", "table", "attack", "defense", "metric", "value"),
    [
        ("paper-safety", "3", "blended", "anp", "p_asr_ra", 0.5493),
        ("paper-safety", "6", "badnets", "clean_model", "p_asr_ra", 0.0211),
        ("paper-safety", "9", "ssba", "pam{rho=0.4}", "p_asr_ra", 0.1426),
        ("paper-safety", "3", "ssba", "pam{rho=0.5}", "p_asr_ra", 0.0331),
        ("paper-safety", "3", "lc", "pam{rho=0.9}", "p_asr_ra", 0.0831),
        ("paper-istr", "IV-mnist", "multi_trigger", "unlearn:mesa", "asr", 0.52715),
        ("paper-istr", "5.1-gtsrb", "sin_wave", "istr", "pair_acc", 0.97),
        ("paper-istr", "5.4-mnist", "multi_trigger{triggers=4}", "istr", "pair_tpr", 0.8647),
        ("paper-belt", "II-cifar10", "beltpp:badnets", "none", "excl", 0.8709),
        ("paper-belt", "IV-gtsrb", "belt:iad", "moth", "asr", 0.7730),
        ("zoo-belt", "III", "zoo", "mntd", "det_auroc[attack=belt:badnets]", 0.7581),
        ("zoo-belt", "III-scores", "beltpp:badnets", "mntd", "det_score", 7.55),
        ("sweep-excl-switches", "V", "beltpp:badnets", "none", "bound", 6.36),
        ("sweep-excl-switches", "V", "belt:badnets", "none", "bound[direction=off]", 6.41),
        ("sweep-excl-switches", "V", "belt:badnets", "none", "bound[dynamic=off]", 6.39),
        ("sweep-excl-switches", "V", "belt:badnets", "none", "bound[direction=off;dynamic=off]", 6.19),
    ],
)
def test_printed_figures(suite: str, table: str, attack: str, defense: str, metric: str, value: float) -> None:
    (found,) = [
        f
        for f in of_suite(suite).tables[table].figures
        if (str(f.attack), str(f.defense), f.metric + f"[{f.qualifier}]" * bool(f.qualifier))
        == (attack, defense, metric)
    ]
    assert found.value == pytest.approx(value)


def test_accuracy_of_istr_is_over_pairs_and_labels_serve_correlations_alone() -> None:
    paper = papers()["istr"]
    printed = {f.metric for t in paper.tables.values() for f in t.figures}
    assert {m for m in printed if m.startswith(("pair_", "label_"))} == {"pair_acc", "pair_tpr"}
    counted = [(c.compared.left.metric, c) for c in paper.claims]
    named = [c for m, c in counted if m in ("pair_acc", "pair_tpr")]
    assert {c.compared.left.metric for c in named} == {"pair_acc", "pair_tpr"}
    # Of the methods that the correlations are over, IsTr alone names pairs.
    assert {d.id for c in named for d in c.compared.left.defenses or ()} == {"istr", "istr_reference"}
    labels = [c for m, c in counted if str(m).startswith("label_")]
    assert [c.compared.over for c in labels] == ["defense"] * 3


def test_claims_of_a_paper_hold_in_its_own_tables() -> None:
    """Printed figures taken for a run: claims fail where the paper is at odds with itself, and only there."""
    for paper in papers().values():
        for table in paper.tables.values():
            made = []
            for f in table.figures:
                s, a, d = table.setting, f.attack or ref("none"), f.defense or ref("none")
                rate = "" if a.id in RATELESS else f"@{s.get('rates', {}).get(a.id, s.get('rate', 0.1))}"
                made.append(
                    row(f"{s['dataset']}/{s['arch']}/{a.id}{rate}/{d.id}/s0", f.metric, f.value, qualifier=f.qualifier)
                    | {"attack": a.id + ("~x" if a.params else ""), "defense": d.id + (f"~{d}" if d.params else "")}
                    | {"attack_params": json.dumps(a.params or {}), "defense_params": json.dumps(d.params or {})}
                )
            for judged in judge(paper, Results(made), {"suite": {}}):
                known = (paper.id, table.id, judged.claim.id) in OWN_EXCEPTIONS
                assert (judged.verdict == FAILS) == known, (table.id, judged)


OWN_EXCEPTIONS = {
    ("belt", "II-tiny", "plain-patch-is-not-exclusive"),
}
"""Claims that a paper makes of its main data set, against its own figures elsewhere."""


def test_suites_of_a_paper_are_named_by_it() -> None:
    named = [s for p in papers().values() for s in p.suites]
    assert len(named) == len(set(named))
    assert {s for s in shipped() if s.startswith(("paper-", "sweep-excl"))} <= set(named)
    page = (ROOT / "docs" / "papers.md").read_text()
    for paper in papers().values():
        (line,) = [n for n in page.splitlines() if n.startswith(f"| `{paper.id}` |")]
        assert set(paper.suites) == {s for s in re.findall(r"`([\w-]+)`", line)[1:] if s}
    assert {of_suite(s).id for s in ("sweep-excl", "sweep-excl-covers", "sweep-excl-switches")} == {"belt"}


def test_the_share_of_models_that_wake_is_that_of_the_printed_table_where_fewest_do() -> None:
    paper = papers()["superficial-safety"]
    (told,) = [c for c in paper.claims if c.id == "purified-models-wake"]
    wake: dict[str, list[bool]] = {}
    for table in (paper.tables[t] for t in told.tables):
        woken = {(str(f.attack), str(f.defense)): f.value for f in table.figures if f.metric == "p_asr_ra"}
        wake[table.id] = [
            woken[attack, defense] - woken[attack, "clean_model"] > told.compared.plus
            for attack, defense in woken
            if ref(defense) in (told.compared.left.defenses or ())
        ]
    assert {t: (sum(w), len(w)) for t, w in wake.items() if not all(w)} == {"5": (17, 20), "6": (18, 19), "7": (13, 14)}
    assert told.share == min(sum(w) / len(w) for w in wake.values())
    assert sum(map(sum, wake.values())) / sum(map(len, wake.values())) == pytest.approx(106 / 111)


def beside(paper: str, told: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What is printed beside the units of a shipped claim, by unit: table, left, right."""
    judged = {j.claim.id: j for j in judge(papers()[paper], Results(found), {"suite": {}})}[told]
    return {
        line.unit: (line.published["table"], *(round(line.published[side], 6) for side in ("left", "right")))
        for line in judged.lines
        if line.published and line.left
    }


def test_printed_figures_come_from_the_table_of_the_units_network_and_rate() -> None:
    cells = ("timm:resnet18/badnets@0.05", "timm:resnet50/badnets@0.05", "timm:resnet18/badnets@0.01")
    cells += ("timm:resnet50/badnets@0.1", "small_cnn/badnets@0.1")
    found = [row(f"cifar10/{c}/{d}/s0", "p_asr_ra", 0.9) for c in cells for d in ("i_bau", "clean_model")]
    found += [row(f"cifar10/{c}/i_bau/s0", "asr", 0.1) for c in cells]
    found += [row("tiny_imagenet/net/badnets@0.1/fst/s0", m, 0.1) for m in ("p_asr_ra", "asr")]
    found += [row("tiny_imagenet/net/badnets@0.1/clean_model/s0", "p_asr_ra", 0.1)]
    assert beside("superficial-safety", "purified-models-wake", found) == {
        "cifar10/timm:resnet18/badnets@0.05/i_bau": ("3", 1.0, 0.002),
        "cifar10/timm:resnet50/badnets@0.05/i_bau": ("5", 0.1794, 0.041),
        "cifar10/timm:resnet18/badnets@0.01/i_bau": ("7", 0.9567, 0.015),
        # No table has these settings: the nearest, by data set, then architecture, then rate.
        "cifar10/timm:resnet50/badnets@0.1/i_bau": ("5", 0.1794, 0.041),
        "cifar10/small_cnn/badnets@0.1/i_bau": ("4", 1.0, 0.002),
        "tiny_imagenet/net/badnets@0.1/fst": ("9", 0.9349, 0.0076),
    }


def test_printed_figures_of_belt_stand_beside_the_rates_of_their_attacks() -> None:
    cells = ("gtsrb/timm:vgg11_bn", "cifar10/timm:resnet18")
    attacks = ("belt:iad@0.02", "iad@0.02", "belt:iad@0.1", "iad@0.1")
    found = [row(f"{c}/{a}/none/s0", "excl", 0.5) for c in cells for a in attacks]
    told = beside("belt", "exclusivity-lifted-iad", found)
    assert told["gtsrb/timm:vgg11_bn/belt:iad@0.02/none"] == ("II-gtsrb", 0.4889, 0.1484)
    assert told["cifar10/timm:resnet18/belt:iad@0.02/none"] == ("II-cifar10", 0.2967, 0.0618)
    paper, results = papers()["belt"], Results(found)
    for attack, rate, said in (
        ("belt:iad", 0.02, []),
        ("belt:iad", 0.1, ["rate 0.1 instead of 0.02"]),
        ("beltpp:ssba", 0.1, []),
        ("badnets", 0.1, ["rate 0.1 instead of 0.01"]),
        ("badnets~abc", 0.01, []),
        ("iad~abc", 0.02, []),
    ):
        unit = Unit("cifar10", "timm:resnet18", attack, rate, "none")
        for table in ("II-cifar10", "IV-cifar10"):
            differs = differences(paper.tables[table].setting, unit, results, {"suite": {}})
            assert [d for d in differs if d.startswith("rate")] == said, (attack, rate)


def test_printed_figures_of_pam_stand_beside_its_rho() -> None:
    variants = (("pam", 0.5), ("pam~abc", 0.9), ("pam~def", 0.4))
    found = [
        row(f"{d}/timm:resnet18/{a}@0.05/{w}/s0", "p_asr_ra", 0.1, defense_params=json.dumps({"rho": rho}))
        for d in ("cifar10", "tiny_imagenet")
        for a in ("badnets", "blended")
        for w, rho in variants
    ]
    told = [
        (f["unit"].replace("timm:resnet18/", ""), f["published"])
        for f in figures(papers()["superficial-safety"], Results(found), {"suite": {}})
        if (f["metric"], f["table"]) in (("p_asr_ra", "3"), ("p_asr_ra", "9"))
    ]
    assert sorted(told) == [
        ("cifar10/badnets@0.05/pam~abc", pytest.approx(0.039)),
        ("cifar10/blended@0.05/pam", pytest.approx(0.0269)),
        ("tiny_imagenet/badnets@0.05/pam~def", pytest.approx(0.0781)),
        ("tiny_imagenet/blended@0.05/pam~def", pytest.approx(0.0037)),
    ]
    claims = [c for c in papers()["superficial-safety"].claims if c.id.startswith("pam-") and c.tables]
    assert len(claims) == 6
    for c in claims:
        (pam,) = c.compared.left.defenses or ()
        printed = {
            f.attack
            for t in c.tables
            for f in papers()["superficial-safety"].tables[t].figures
            if f.defense == pam and f.metric == "p_asr_ra"
        }
        assert printed == set(c.compared.left.attacks or ()), c.id


def test_claims_on_purified_models_of_reactivation_are_asked_of_the_papers_defenses() -> None:
    seven = {"ft", "unlearn:neural_cleanse", "i_bau", "ft_sam", "sau", "nad", "fst"}
    claims = {c.id: c for c in papers()["reactivation"].claims}
    named = {n: {str(d) for d in c.compared.left.defenses or ()} for n, c in claims.items()}
    assert {n for n, d in named.items() if not d <= seven} == {
        "clean-models-hold-none",
        "white-box-low-on-clean-models",
        "white-box-wakes-after-seam-and-ct",
    }
    assert all(named.values())
    assert sum(d == seven for d in named.values()) == 10
    cka = claims["reactivated-is-original"].compared.left
    assert (cka.attacks, cka.defenses) == ((ref("badnets"), ref("blended")), (ref("i_bau"), ref("ft_sam")))
    # Nothing is asked of a control such as exact purification.
    found = [
        row(f"cifar10/net/badnets@0.1/{d}/s0", m, 0.1) for d in ("exact_purification", "seam") for m in ("bec", "asr")
    ]
    (judged,) = [j for j in judge(papers()["reactivation"], Results(found), ABOUT) if j.claim.id == "backdoors-remain"]
    assert {line.verdict for line in judged.lines} == {NOT_RUN}


def test_claims_that_istr_makes_on_digits_are_asked_of_digits_alone() -> None:
    for told in ("four-triggers", "four-triggers-are-named", "four-triggers-are-repaired", "strip-with-the-trigger"):
        (c,) = [c for c in papers()["istr"].claims if c.id == told]
        assert c.compared.left.datasets == ("mnist",)


BY_HAND = {f"{what}-{a}" for what in ("exclusivity-lifted", "centre-loss-lifts-further") for a in ("ssba", "iad")}
"""Claims on attacks of other rates, which suite paper-belt takes with `--attack` and `--rate`."""


def test_printed_figures_of_a_zoo_stand_beside_those_of_a_run() -> None:
    found = [
        row("digits/small_cnn/zoo/mntd/s0", "det_auroc", v, qualifier=f"attack={a}")
        for a, v in (("badnets", 0.9), ("belt:badnets", 0.7), ("beltpp:badnets", 0.6))
    ]
    found += [
        row(f"digits/small_cnn/{a}/mntd/s0", "det_score", v)
        for a, v in (("none", -1.0), ("badnets@0.1", 2.0), ("belt:badnets@0.1", 0.5), ("beltpp:badnets@0.1", 2.5))
    ]
    about = ABOUT | {"suite": {}}
    judged = {j.claim.id: j for j in judge(papers()["belt"], Results(found), about) if "mntd" in j.claim.id}
    lines = {n: j.lines[0] for n, j in judged.items()}
    told = {n: (k.verdict, *(round(k.published[side], 6) for side in ("left", "right"))) for n, k in lines.items()}
    assert told == {
        "mntd-loses-on-belt": (HOLDS, 0.7581, 0.9563),
        "mntd-loses-on-beltpp": (HOLDS, 0.7761, 0.9563),
        "mntd-scores-plain-badnets-above-clean": (HOLDS, 12.14, 3.46),
        "mntd-scores-belt-below-plain": (HOLDS, 7.34, 12.14),
        "mntd-scores-beltpp-below-plain": (FAILS, 7.55, 12.14),
    }
    assert any("logits" in d for d in lines["mntd-scores-belt-below-plain"].differs)


def test_some_suite_decides_every_claim_of_belt() -> None:
    registry, paper = Registry.discover("none"), papers()["belt"]
    wanted = set()
    for left, than in ((c.compared.left, c.compared.than) for c in paper.claims):
        wanted |= {(left.metric, left.qualifier or "")}
        wanted |= {(than.metric or left.metric, than.qualifier or "")} if than is not None else set()
    decided = set()
    for name in paper.suites:
        suite, _ = build(name, registry)
        there = {m.name for e in suite.evaluators for m in registry.get("evaluator", e.id).blueprint.metrics}
        switched = any(e.params.get("ablations") for e in suite.evaluators)
        zoo = [Variant(id="zoo", label="zoo", params={})]
        made = [
            row(f"{d}/{arch}/{a.label}{'' if a.id in ('none', 'zoo') else '@0.1'}/{w.label}/s0", m, 0.5, qualifier=q)
            | {"attack_params": json.dumps(a.params), "defense_params": json.dumps(w.params)}
            for d, arch in itertools.product(suite.datasets, suite.archs)
            for a, w in itertools.product([*suite.attacks, *zoo], suite.defenses)
            for m, q in wanted
            if m in there and (switched or "=off" not in q)
        ]
        decided |= {j.claim.id for j in judge(paper, Results(made), {"suite": {}}) if j.verdict != NOT_RUN}
    assert {c.id for c in paper.claims} - decided == BY_HAND


def test_a_printed_figure_may_be_of_a_variant_of_a_metric() -> None:
    table = TABLE.replace('column = "attack"', 'column = "metric"').replace(
        'columns = ["badnets", "blended"]\nmetrics = ["asr", "p_asr_ra"]', 'columns = ["bound", "bound[a=off;b=off]"]'
    )
    table = table.replace('["100/-", "99.5/-"]', '["100", "99.5"]').replace('["2/80", "-/60.5"]', '["2", "60.5"]')
    table = table.replace("[table.rows]", 'attack = "badnets"\n[table.rows]')
    told = claim(
        metric="bound",
        table="1",
        attack="badnets",
        defense="ft",
        test=">",
        than='{ qualifier = "a=off;b=off" }',
    )
    off = seeds("badnets@0.1/ft", "bound", 0.4, qualifier="a=off;b=off")
    judged = one(told, [*seeds("badnets@0.1/ft", "bound", 0.5), *off], table)
    assert judged.verdict == HOLDS
    assert (judged.lines[0].published["left"], judged.lines[0].published["right"]) == (0.02, 0.605)
    beside = figures(read("p", HEAD + table), Results(off), ABOUT)
    assert {(f["metric"], f["ours"]["mean"], f["published"]) for f in beside if f["unit"].endswith("ft")} == {
        ("bound", None, 0.02),
        ("bound[a=off;b=off]", 0.4, 0.605),
    }


def test_references() -> None:
    assert str(ref('belt:badnets{cover="mask", size=6}')) == 'belt:badnets{cover="mask", size=6}'
    assert (ref("ft").params, ref("ft{}").params) == (None, {})
    assert ref("ft").fits("ft", {}) and not ref("ft").fits("ft~123456", {}) and ref("ft{}").fits("ft~123456", {})
    assert not ref("ft{lr=0.1}").fits("ft", {"lr": 0.2}) and not ref("ft{lr=0.1}").fits("ft", {})


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Writes a run folder from rows."""

    def write(found: list[dict[str, Any]]) -> Path:
        for r in found:
            r["started"] = 0.0
        rows.write_tables(tmp_path, found)
        (tmp_path / "run.json").write_text(json.dumps(ABOUT))
        return tmp_path

    return write


def stand_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    paper: Paper = read("p", HEAD + TABLE + text)
    monkeypatch.setattr(published, "papers", lambda: {"p": paper})


CLAIM = '[[claim]]\nid = "sleeps"\nsays = "It <b>sleeps</b> | well."\nwhere = "table 1"\ntable = "1"\n'


def test_command(cli: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, CLAIM + SLEEPS)
    folder = run(seeds("badnets@0.1/ft", "p_asr_ra", 0.1, 0.12, 0.11))
    answer = cli("compare-paper", "smoke", "--results", folder)
    assert (answer.code, answer.err) == (0, "")
    assert "HOLDS: sleeps" in answer.out
    assert "0.11 [" in answer.out
    assert "printed 0.8 (table 1)" in answer.out
    assert "epochs 8 instead of 100" in answer.out
    assert answer.out.splitlines()[-1] == "claims: 1 holds, 0 does not hold, 0 not run"
    told = json.loads(cli("compare-paper", "smoke", "--results", folder, "--json").out)
    assert told["counts"] == {HOLDS: 1, FAILS: 0, NOT_RUN: 0}
    assert (told["run_suite"], told["claims"][0]["lines"][0]["left"]["seeds"]) == ("tiny", [0, 1, 2])
    assert [f["published"] for f in told["figures"]] == [0.02, 0.8]
    shown = cli("compare-paper", "smoke", "--results", folder, "--markdown").out
    assert "It &lt;b>sleeps&lt;/b> \\| well." in shown
    assert "<b>" not in shown
    assert "| digits/net/badnets@0.1/ft | holds | 0.11 [" in shown


def test_command_when_a_claim_does_not_hold(cli: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, CLAIM + SLEEPS)
    folder = run(seeds("badnets@0.1/ft", "p_asr_ra", 0.8))
    for form in ((), ("--json",), ("--markdown",)):
        answer = cli("compare-paper", "smoke", "--results", folder, *form)
        assert answer.code == 4
        assert answer.err.startswith("does not hold: sleeps")


def test_command_when_nothing_was_run(cli: Any, run: Any) -> None:
    folder = run([])
    for suite, paper in ((s, p) for p in papers().values() for s in p.suites):
        answer = cli("compare-paper", suite, "--results", folder)
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.splitlines()[-1] == f"claims: 0 holds, 0 does not hold, {len(paper.claims)} not run"


def test_command_on_bad_input(cli: Any, run: Any, tmp_path: Path) -> None:
    assert "did you mean `paper-safety" in cli("compare-paper", "paper-safty", "--results", tmp_path).err
    answer = cli("compare-paper", "paper-safety", "--results", tmp_path / "absent")
    assert (answer.code, "no finished run folder" in answer.err) == (2, True)
    folder = run([])
    (folder / "run.json").write_text("[]")
    assert cli("compare-paper", "paper-safety", "--results", folder).code == 2
    (folder / "run.json").write_text(json.dumps(ABOUT))
    (folder / "measurements.parquet").write_text("not parquet")
    answer = cli("compare-paper", "paper-safety", "--results", folder)
    assert (answer.code, "cannot read the table" in answer.err) == (2, True)


METHODS = ("abs", "nc", "mesa", "istr")
ALONG = (
    claim(
        metric="apd",
        attack=["badnets"],
        defense=list(METHODS),
        test=">",
        value=0.0,
        over="defense",
    )
    + '\nwith = { metric = "asr", defense = ["unlearn:abs", "unlearn:nc", "unlearn:mesa", "unlearn:istr"] }'
)


def inverters(metric: str, by: dict[str, tuple[Any, ...]], attack: str = "badnets") -> list[dict[str, Any]]:
    """Rows of one metric by defense, a figure per seed."""
    return [r for d, values in by.items() for r in seeds(f"{attack}@0.1/{d}", metric, *values)]


def test_a_rank_correlation_over_methods_is_spearmans_seed_by_seed() -> None:
    apd = {"abs": (0.1, 0.4), "nc": (0.2, 0.1), "mesa": (0.3, 0.2), "istr": (0.3, 0.3)}
    asr = {"unlearn:abs": (0.5, 0.1), "unlearn:nc": (0.7, 0.2), "unlearn:mesa": (0.6, 0.2), "unlearn:istr": (0.9, 0.1)}
    judged = one(ALONG, inverters("apd", apd) + inverters("asr", asr))
    (line,) = judged.lines
    assert line.unit == "digits/net/badnets@0.1: apd with asr"
    per_seed = [float(spearmanr([v[s] for v in apd.values()], [v[s] for v in asr.values()]).statistic) for s in (0, 1)]
    assert per_seed[0] > 0 > per_seed[1]
    assert line.left["mean"] == pytest.approx(sum(per_seed) / 2)
    assert (line.left["lower"], line.left["upper"]) == pytest.approx((per_seed[1], per_seed[0]))
    assert (judged.verdict, line.left["seeds"]) == (HOLDS if sum(per_seed) > 0 else FAILS, [0, 1])
    turned = one(ALONG.replace('">"', '"<"'), inverters("apd", apd) + inverters("asr", asr))
    assert {judged.verdict, turned.verdict} == {HOLDS, FAILS}


def test_a_correlation_names_what_is_missing_and_needs_three_points() -> None:
    apd = inverters("apd", {"abs": (0.1,), "nc": (0.2,), "mesa": (0.3,)})
    asr = inverters("asr", {"unlearn:abs": (0.1,), "unlearn:nc": (0.2,), "unlearn:mesa": (0.3,)})
    (line,) = one(ALONG, apd + asr).lines
    assert (line.verdict, line.left["mean"]) == (HOLDS, pytest.approx(1.0))
    assert line.reason == "without istr"
    (line,) = one(ALONG, apd + asr[:2]).lines
    assert line.verdict == NOT_RUN
    assert "fewer than 3 points have both figures; mesa (no such cell in the run); istr (no" in line.reason
    level = inverters("asr", {f"unlearn:{m}": (0.2,) for m in METHODS})
    (line,) = one(ALONG, apd + level).lines
    assert (line.verdict, "the same figure everywhere" in line.reason) == (NOT_RUN, True)


def test_a_correlation_over_attacks_stands_beside_the_printed_one() -> None:
    attacks = {"badnets": (0.005, 0.1), "sin_wave": (0.2, 0.3), "multi_trigger": (0.002, 0.2)}
    found = [r for a, (x, y) in attacks.items() for r in inverters("apd", {"istr": (x,)}, a)]
    found += [r for a, (x, y) in attacks.items() for r in inverters("asr", {"unlearn:istr": (y,)}, a)]
    paper = papers()["istr"]
    here = [r | {"dataset": "mnist", "arch": "mnist_cnn"} for r in found]
    judged = {j.claim.id: j for j in judge(paper, Results(here), ABOUT)}["near-triggers-repair-over-tasks"]
    (line,) = judged.lines
    assert line.left["mean"] == pytest.approx(0.5)
    assert line.published["left"] == pytest.approx(1.0)  # 0.0052 0.2290 0.0026 beside 0.10 2.17 0.04
    assert line.published["table"].startswith("5.1-mnist, IV-mnist")


def test_printed_figures_of_six_tasks_rise_together() -> None:
    """As the claim's own words say of section 5.1 and table IV."""
    figures = [f for t in papers()["istr"].tables.values() for f in t.figures]
    told = {(f.table.partition("-")[2], f.attack.id, f.metric): f.value for f in figures if str(f.defense) == "istr"}
    left = {
        (f.table.partition("-")[2], f.attack.id): f.value
        for f in figures
        if str(f.defense) == "unlearn:istr" and f.metric == "asr"
    }
    points = [(v, left[d, a]) for (d, a, m), v in told.items() if m == "apd"]
    assert len(points) == 6
    assert spearman(points) == pytest.approx(1.0)


CARRIED = claim(metric="p_asr_qra", attack="badnets", defense=["ft", "pam"], to=["ft", "pam", "fst"], test=">")


def test_what_is_carried_to_other_models_leaves_out_a_models_own() -> None:
    found = [r for d in ("ft", "pam") for o in ("ft", "pam") for r in seeds(
        f"badnets@0.1/{d}", "p_asr_qra", 0.9 if d == o else 0.3, qualifier=f"on={o}"
    )]  # fmt: skip
    found += seeds("badnets@0.1/ft", "asr", 0.1) + seeds("badnets@0.1/pam", "asr", 0.4)
    text = CARRIED + '\nthan = { metric = "asr", defense = "{to}" }'
    lines = {line.unit.partition("@0.1/")[2]: line for line in one(text, found).lines}
    assert {k: v.verdict for k, v in lines.items()} == {
        "ft on pam": FAILS,  # 0.3 against pam's own 0.4
        "ft on fst": NOT_RUN,
        "pam on ft": HOLDS,
        "pam on fst": NOT_RUN,
    }
    given = text + '\ngiven = [{ metric = "asr", defense = "{to}", test = "<=", value = 0.2 }]'
    lines = {line.unit.partition("@0.1/")[2]: line for line in one(given, found).lines}
    assert (lines["ft on pam"].verdict, lines["pam on ft"].verdict) == (OUTSIDE, HOLDS)
    pooled = claim(
        metric="p_asr_qra",
        attack="badnets",
        defense=["ft", "pam"],
        to=["ft", "pam"],
        pool="mean",
        test=">",
        printed=0.321,
        than='{ metric = "asr" }',
    )
    (line,) = one(pooled, found).lines
    assert (line.verdict, line.reason) == (OUTSIDE, "none of its units was purified")  # of no pair both models were
    purified = [r for r in found if r["metric"] != "asr"] + seeds("badnets@0.1/ft", "asr", 0.1)
    (line,) = one(pooled, purified + seeds("badnets@0.1/pam", "asr", 0.2)).lines
    assert line.left["mean"] == pytest.approx(0.3)
    assert line.right["mean"] == pytest.approx(0.15)
    assert line.published == {"table": "", "unconfirmed": "", "left": 0.321}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (ALONG.replace('over = "defense"', 'over = "seed"'), "which is defense or attack"),
        (ALONG.replace('over = "defense"\n', ""), "needs `with`, and `over`"),
        (ALONG.replace(', "unlearn:istr"', ""), "3 defenses for 4"),
        (ALONG + '\ngiven = [{ metric = "asr", test = "<", value = 1 }]', "no condition of its own"),
        (CARRIED + '\nvalue = 0.1\nqualifier = "on=ft"', "drop `qualifier`"),
        (claim(metric="asr", defense="ft", test=">", than='{ metric = "asr", defense = "{to}" }'), "stands for"),
        (CARRIED.replace('["ft", "pam"]', '["{to}"]', 1) + "\nvalue = 0.1", "stands for"),
        (claim(metric="asr", test=">", value=0.1, printed="much"), "is no number"),
    ],
)
def test_faulty_correlations_and_carried_figures(wrong: str, said: str) -> None:
    with pytest.raises(Faulty, match=said):
        one(wrong, [])


def test_a_qualifier_may_name_the_units_own_defense() -> None:
    found = [r for d in ("ft", "nad") for r in seeds(f"badnets@0.1/{d}", "asr_tba", 0.9, qualifier=f"source={d}@net2")]
    found += seeds("badnets@0.1/nad", "asr_tba", 0.1, qualifier="source=ft@net2")
    told = claim(metric="asr_tba", qualifier="source={defense}@net2", defense=["ft", "nad"], test=">", value=0.5)
    assert [line.verdict for line in one(told, found).lines] == [HOLDS, HOLDS]
    assert one(told.replace("net2", "net3"), found).verdict == NOT_RUN
