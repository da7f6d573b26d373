"""The gate: which attacks count as implanted, and when that is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plugins
import pytest

from sleeperbench.engine.gate import Gate
from sleeperbench.engine.ledger import Ledger
from sleeperbench.engine.plan import Plan, Planner
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import build

GROUP = "digits/small_cnn/badnets@0.1"


def learn(gate: Gate, cell: str, **figures: float | None) -> None:
    rows = [{"cell": f"digits/small_cnn/{cell}", "metric": m, "qualifier": "", "value": v} for m, v in figures.items()]
    gate.learn(rows)


@pytest.fixture
def plan(make_plan: Any) -> Plan:
    made: Plan = make_plan(seeds=[0, 1])
    return made


@pytest.fixture
def gate(plan: Plan, registry: Registry) -> Gate:
    return Gate(plan, registry)


def fill(gate: Gate, asr: tuple[float | None, ...], acc: tuple[float | None, ...], clean: tuple[float, ...]) -> None:
    for s, (a, c, n) in enumerate(zip(asr, acc, clean, strict=True)):
        learn(gate, f"badnets@0.1/none/s{s}", asr=a, c_acc=c)
        learn(gate, f"none@0/none/s{s}", asr=None, c_acc=n)


@pytest.mark.parametrize(
    ("asr", "acc", "clean", "implanted"),
    [
        ((0.95, 0.95), (0.9, 0.9), (0.9, 0.9), True),
        ((0.9, 0.9), (0.9, 0.9), (0.9, 0.9), True),  # the bar itself is enough
        ((0.89, 0.90), (0.9, 0.9), (0.9, 0.9), False),
        ((0.85, 0.95), (0.9, 0.9), (0.9, 0.9), True),  # the mean counts, not each seed
        ((1.0, 1.0), (0.96, 0.96), (0.98, 0.98), True),  # exactly 2 points below
        ((1.0, 1.0), (0.95, 0.96), (0.98, 0.98), False),
        ((1.0, 1.0), (0.94, 1.0), (0.98, 0.98), True),
        ((1, 1), (1, 1), (1, 1), True),  # whole numbers are figures too
        ((None, 0.95), (None, 0.9), (0.9, 0.9), True),  # a seed that failed leaves the decision to the others
        ((None, 0.5), (None, 0.9), (0.9, 0.9), False),
        ((None, None), (None, None), (0.9, 0.9), False),
    ],
)
def test_truth_table(
    gate: Gate, asr: tuple[float, ...], acc: tuple[float, ...], clean: tuple[float, ...], implanted: bool
) -> None:
    fill(gate, asr, acc, clean)
    assert gate.open(GROUP) is implanted
    assert gate.closed() == ([] if implanted else [GROUP])
    assert bool(gate.why(GROUP)) is not implanted


def test_undecided_until_every_seed_and_every_clean_model_is_known(gate: Gate) -> None:
    steps = [
        ("badnets@0.1/none/s0", {"asr": 1.0, "c_acc": 0.9}),
        ("badnets@0.1/none/s1", {"asr": 1.0, "c_acc": 0.9}),
        ("none@0/none/s0", {"c_acc": 0.9}),
    ]
    for cell, figures in steps:
        learn(gate, cell, **figures)
        assert not gate.open(GROUP)
        assert gate.closed() == []
    learn(gate, "none@0/none/s1", c_acc=0.9)
    assert gate.open(GROUP)


def test_variants_of_a_metric_do_not_count(gate: Gate) -> None:
    fill(gate, (1.0, 1.0), (0.9, 0.9), (0.9, 0.9))
    row = {"cell": "digits/small_cnn/badnets@0.1/none/s0", "metric": "asr", "qualifier": "trigger=1", "value": 0.0}
    gate.learn([row])
    assert gate.open(GROUP)


def test_the_reason_says_what_is_missing(gate: Gate) -> None:
    fill(gate, (0.5, 0.6), (0.9, 0.9), (0.9, 0.9))
    assert gate.why(GROUP) == "mean ASR 0.550 is below 0.9"
    fill(gate, (1.0, 1.0), (0.8, 0.8), (0.9, 0.9))
    assert gate.why(GROUP) == "mean C-Acc lies 10.0 points below clean models"


@pytest.mark.parametrize(("rate", "bar"), [(0.1, 0.9), (0.05, 0.9), (0.011, 0.9), (0.01, 0.7), (0.005, 0.7)])
def test_small_rates_have_the_low_bar(make_plan: Any, registry: Registry, rate: float, bar: float) -> None:
    gate = Gate(make_plan(rates=[rate]), registry)
    assert gate.bar(f"digits/small_cnn/badnets@{rate:g}") == bar


@pytest.mark.parametrize(
    ("attack", "rate", "tail", "bar"),
    [
        ("multi_trigger", 0.1, "", 0.85),  # its own, which is lower
        ("adaptive_blend", 0.01, "", 0.5),
        ("belt:badnets", 0.1, "", 0.9),
        ("belt:badnets", 0.01, "", 0.7),
        ("belt:adaptive_blend", 0.1, "", 0.5),  # of the wrapped attack
        ("belt:sig", 0.1, "", 0.7),
        ("refool", 0.1, "", 0.9),
        ("refool", 0.1, '[attack.refool]\nlabels = "clean"\n', 0.7),
        ("belt:refool", 0.1, '[attack."belt:refool"]\nlabels = "clean"\n', 0.7),
        ("badnets", 0.1, "[gate]\nimplant_asr = 0.95\n", 0.9),  # what the attack says of itself holds
    ],
)
def test_an_attacks_own_bar_counts_where_it_is_lower(
    make_plan: Any, registry: Registry, attack: str, rate: float, tail: str, bar: float
) -> None:
    gate = Gate(make_plan(attacks=["none", attack], rates=[rate], tail=tail), registry)
    assert [gate.bar(group) for group in gate.groups] == [bar]


@pytest.mark.parametrize(
    ("attack", "section"),
    [("badnets", "badnets"), ("belt:badnets", '"belt:badnets"')],
    ids=["plain", "wrapped"],
)
@pytest.mark.parametrize(
    ("asr", "clean", "opens"),
    [
        (0.665, 0.7, True),  # 0.95 of what clean models get right
        (0.66, 0.7, False),
        (0.95, 1.0, True),
        (0.9, 1.0, True),  # the bar of other attacks is enough
        (0.89, 1.0, False),
    ],
)
def test_an_all_to_all_attack_is_asked_for_no_more_than_a_clean_models_accuracy_allows(
    make_plan: Any, registry: Registry, attack: str, section: str, asr: float, clean: float, opens: bool
) -> None:
    for targets, expected in (("all_to_all", opens), ("all_to_one", asr >= 0.9)):
        tail = f'[attack.{section}]\ntargets = "{targets}"\n'
        gate = Gate(make_plan(attacks=["none", attack], tail=tail), registry)
        (group,) = gate.groups
        learn(gate, f"{group.rpartition('/')[2]}/none/s0", asr=asr, c_acc=clean)
        assert not gate.open(group), "undecided without the clean models' figure"
        learn(gate, "none@0/none/s0", asr=None, c_acc=clean)
        assert gate.open(group) is expected


def test_without_clean_models_an_all_to_all_attack_has_the_bar_of_any_other(make_plan: Any, registry: Registry) -> None:
    gate = Gate(make_plan(attacks=["badnets"], tail='[attack.badnets]\ntargets = "all_to_all"\n'), registry)
    learn(gate, "badnets@0.1/none/s0", asr=0.89, c_acc=0.5)
    assert gate.why(GROUP) == "mean ASR 0.890 is below 0.9"


def test_clean_label_attacks_have_the_low_bar(
    suite_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_plan: Any
) -> None:
    source = (
        "from dataclasses import dataclass\nfrom sleeperbench import Attack\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Quiet(Attack):\n"
        '    """Leaves labels alone."""\n'
        '    INFO = {"title": "Q", "version": 1, "api": 1, "kind": "data_poisoning", "clean_label": True}\n'
    )
    entries = {"sleeperbench.attacks": {"quiet": "quiets:Quiet"}}
    monkeypatch.syspath_prepend(str(plugins.install(tmp_path, "quiets", "1.0", {"quiets.py": source}, entries)))
    registry = Registry.discover("all")
    suite, _ = build(str(suite_file(attacks=["none", "quiets/quiet"])), registry)
    plan = Planner(suite, registry, make_plan().datasets).build()
    assert Gate(plan, registry).bar("digits/small_cnn/quiets/quiet@0.1") == 0.7


def test_the_suites_bars_count(make_plan: Any, registry: Registry) -> None:
    gate = Gate(make_plan(tail="[gate]\nimplant_asr = 0.4\nimplant_asr_low = 0.2\n", rates=[0.1, 0.01]), registry)
    assert (gate.bar(GROUP), gate.bar("digits/small_cnn/badnets@0.01")) == (0.4, 0.2)


def test_without_clean_models_asr_alone_decides(make_plan: Any, registry: Registry) -> None:
    gate = Gate(make_plan(attacks=["badnets"]), registry)
    learn(gate, "badnets@0.1/none/s0", asr=0.95, c_acc=0.1)
    assert gate.open(GROUP)


def test_without_a_figure_for_asr_every_gate_is_open(make_plan: Any, registry: Registry) -> None:
    assert Gate(make_plan(evaluators=["stealth"]), registry).open(GROUP)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("attack_did_not_implant: mean ASR 0.8 is below 0.9", False),
        ("input_failed: evaluate ra x: attack_did_not_implant: mean ASR 0.8 is below 0.9", False),
        ("input_failed: attack x: raised: RuntimeError", True),
    ],
)
def test_rows_that_a_gate_decided_are_not_kept_for_the_next_run(reason: str, kept: bool) -> None:
    """--keep-unimplanted opens the gate: what waited behind it is computed then."""
    row = {"cell": "c", "reason": reason}
    ledger: Any = SimpleNamespace(rows={"k": [row]}, uses={"k": [(SimpleNamespace(name="c"), None)]})
    assert Ledger.saved(ledger, "k") == ([row] if kept else None)
