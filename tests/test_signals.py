"""What docs/findings.md says of suite `digits-signals`: its split, its statistic and its words."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from scripts import DOCS, script

from sleeperbench.engine.suite import shipped

SHIFT, HEAD = ("shift_target_net", ""), ("shift_target_net", "measure=head")


@pytest.fixture(scope="module")
def signals() -> Any:
    return script("signals")


@pytest.fixture
def drawn_figures(signals: Any) -> Any:
    """Repaired models of an attacked model, whose measures are noise but for those that a test sets."""

    def made(attack: str, seed: int, models: int = 6, **of_p: Any) -> list[dict[str, Any]]:
        rng = np.random.default_rng([seed, *attack.encode()])
        p = rng.permutation(models) / models + seed
        found = []
        for i in range(models):
            figures = {k: float(rng.random()) for keys in signals.MEASURES.values() for k in keys}
            figures |= {signals.P_ASR: float(p[i]), signals.O_ASR: 0.1 * float(rng.random()), signals.WEIGHTS: 0.5}
            figures |= {key: float(f(p[i], rng)) for key, f in of_p.get("keys", {}).items()}
            found.append({"attack": attack, "defense": f"d{i}", "seed": seed, "flags": set(), "figures": figures})
        return found

    return made


def pool(signals: Any, made: Any, **of_p: Any) -> list[dict[str, Any]]:
    """Models of every attack under every seed."""
    attacks = sorted(signals.DEVELOPED[0] | signals.HELD_OUT[0])
    return [c for a in attacks for s in (0, 1, 2) for c in made(a, s, **of_p)]


def test_the_split_is_of_the_suite_and_shares_nothing(signals: Any) -> None:
    suite = tomllib.loads(shipped()[signals.SUITE])
    (attacks, seeds), (others, other_seeds) = signals.DEVELOPED, signals.HELD_OUT
    assert not attacks & others and not seeds & other_seeds
    assert attacks | others == set(suite["matrix"]["attacks"]) - {"none"}
    assert seeds | other_seeds == set(suite["matrix"]["seeds"])
    assert set(signals.ORACLES) <= set(suite["matrix"]["defenses"])
    of = [{"attack": a, "seed": s} for a in ("badnets", "refool") for s in (0, 1)]
    assert [signals.part(of, p) for p in (signals.DEVELOPED, signals.HELD_OUT)] == [[of[0]], [of[3]]]


def test_every_measure_is_one_that_evaluators_write(signals: Any) -> None:
    from sleeperbench.evaluators.target_shift import MEASURES

    assert [q.removeprefix("measure=") for _, q in signals.VARIANTS.values()] == list(MEASURES)
    assert {k for keys in signals.MEASURES.values() for k in keys} | {signals.P_ASR} <= signals.kept()


def test_the_correlation_is_of_ranks_within_attacked_models(signals: Any, drawn_figures: Any) -> None:
    # Within each model the measure is P-ASR; between models it falls where P-ASR rises.
    of = [c for s in range(6) for c in drawn_figures("badnets", s, keys={SHIFT: lambda p, r, s=s: p - 10 * s})]
    own, again = signals.drawn(of, (SHIFT,))
    assert own == pytest.approx(1) and again == pytest.approx(1) and len(again) == signals.DRAWS
    assert spearmanr([c["figures"][SHIFT] for c in of], [c["figures"][signals.P_ASR] for c in of]).statistic < 0
    assert signals.told(own, again) == "1.00 (1.00 to 1.00)"
    # Of one attacked model it is Spearman's, of several of one size the mean of theirs.
    rhos = []
    for s in range(5):
        mine = [c for c in of if c["seed"] == s]
        rhos.append(spearmanr(*([c["figures"][k] for c in mine] for k in (HEAD, signals.P_ASR))).statistic)
        assert signals.drawn(mine, (HEAD,))[0] == pytest.approx(rhos[-1])
    found, again = signals.drawn([c for c in of if c["seed"] < 5], (HEAD,))
    assert found == pytest.approx(np.mean(rhos))
    low, high = signals.room(again)
    assert min(rhos) <= low < found < high <= max(rhos)
    assert low == pytest.approx(np.quantile([np.mean([rhos[i] for i in p]) for p in signals.picks(5)], 0.025))


def test_of_few_attacked_models_there_is_no_interval(signals: Any, drawn_figures: Any) -> None:
    four = [c for s in range(4) for c in drawn_figures("lf", s)]
    own, again = signals.drawn(four, (HEAD,))
    assert not math.isnan(own) and not len(again) and signals.told(own, again) == signals.plain(own)
    two = [*drawn_figures("sin_wave", 0, models=1), *drawn_figures("sin_wave", 1, models=1)]
    assert not len(signals.drawn(four + two, (HEAD,))[1]), "models alone rank nothing and count for nothing"
    for c in four:
        c["figures"][HEAD] = 1.0
    assert math.isnan(signals.drawn(four, (HEAD,))[0]) and math.isnan(signals.drawn([], (HEAD,))[0])
    # A model with one repaired one of its own adds nothing, and breaks nothing.
    alone = drawn_figures("sin_wave", 9, models=1)
    for c in four:
        c["figures"][HEAD] = c["figures"][signals.P_ASR]
    assert signals.drawn(four + alone, (HEAD,))[0] == pytest.approx(1)


def test_combinations_are_means_of_ranks(signals: Any, drawn_figures: Any) -> None:
    of = drawn_figures("lf", 0)
    for c, (o, b) in zip(of, [(0.0, 6), (0.01, 5), (0.02, 4), (0.1, 1), (0.11, 2), (0.12, 0)], strict=True):
        c["figures"][signals.O_ASR], c["figures"][signals.BEC] = o, float(b)
    ((x, _),) = signals.sides(of, signals.COMBINED["O-ASR and BEC"])
    # Ranks 1..6 and 6, 5, 4, 2, 3, 1: means 3.5, 3.5, 3.5, 3, 4, 3.5.
    assert x.tolist() == pytest.approx([0, 0, 0, -2.5 / 6, 2.5 / 6, 0])
    for n in range(4, 12):  # opposite orders add up to the same everywhere, whatever the rounding of n
        of = drawn_figures("lf", 0, models=n)
        for i, c in enumerate(of):
            c["figures"][signals.O_ASR], c["figures"][signals.BEC], c["figures"][SHIFT] = float(i), float(-i), float(i)
        ((x, _),) = signals.sides(of, signals.COMBINED["O-ASR and BEC"])
        assert x.tolist() == [0] * n


def test_populations_tell_apart_what_only_looks_safe(signals: Any, drawn_figures: Any) -> None:
    of = drawn_figures("badnets", 0, models=7)
    same, awake, fallen, oracle, anew, none, fine = of
    same["figures"][signals.WEIGHTS] = 0.99
    awake["figures"][signals.O_ASR] = 0.21
    fallen["flags"].add("collapsed")
    oracle["defense"] = "exact_purification~abc"
    for key in ("bec", ""), ("bec", "control=weights"):
        del anew["figures"][key]
    none["defense"] = "none"
    found = [choose(of) for choose in signals.POPULATIONS.values()]
    assert found[0] == [awake, fallen, oracle, fine]
    assert found[1] == [fallen, oracle, fine]
    assert found[2] == [fine] == signals.POPULATIONS[signals.ASKED](of)
    assert found[3] == [same, anew, fine]
    del fine["figures"][HEAD]
    assert signals.repaired([fine]) == []


def test_the_variant_is_chosen_on_one_part_and_judged_on_the_other(signals: Any, drawn_figures: Any) -> None:
    split = signals.DEVELOPED, signals.HELD_OUT

    def of(developed: Any, held_out: Any) -> list[dict[str, Any]]:
        found = []
        for keys, (attacks, seeds) in zip((developed, held_out), split, strict=True):
            found += [c for a in sorted(attacks) for s in sorted(seeds) for c in drawn_figures(a, s, keys=keys)]
        return found

    good, bad = (lambda p, rng: p), (lambda p, rng: -p)
    # `head` is best where it is developed, another where it is judged: that one is never asked.
    mixed = of({HEAD: good}, {SHIFT: good})
    assert signals.chosen(mixed) == "target shift, head"
    first, *rest = signals.verdict(mixed)
    assert first.startswith(
        "Chosen on the first part: target shift, head. On 48 held-out models that look safe, from 8 "
    )
    assert "no ranking is shown" in first
    assert any(s.startswith("Against target shift: -") and s.endswith("it is lower.") for s in rest)
    held = signals.verdict(of({HEAD: good}, {HEAD: good}))
    assert "is 1.00 (1.00 to 1.00): it ranks them." in held[0] and "Against BEC: " in held[2]
    assert all(s.endswith("it is higher.") for s in held[1:])
    assert "the wrong way" in signals.verdict(of({HEAD: good}, {HEAD: bad}))[0]
    assert "too few to judge" in signals.verdict(of({HEAD: good}, {})[:24])[0]
    with pytest.raises(ValueError, match="no model of the developing part"):
        signals.chosen(of({}, {})[24:])


def test_a_difference_is_taken_over_the_same_draws(signals: Any, drawn_figures: Any) -> None:
    of = [c for s in range(6) for c in drawn_figures("lf", s, keys={SHIFT: lambda p, rng: p})]
    assert signals.apart(of, (SHIFT,), (SHIFT,)) == (0, 0, 0)
    own, low, high = signals.apart(of, (SHIFT,), (HEAD,))
    assert own == pytest.approx(1 - signals.drawn(of, (HEAD,))[0]) and 0 < low < own < high


def test_defenses_are_counted_by_setting(signals: Any, drawn_figures: Any) -> None:
    of = drawn_figures("lf", 0, models=4)
    for c, p in zip(of, (0.1, 0.6, 0.9, 0.3), strict=True):
        c["defense"], c["figures"][signals.P_ASR], c["figures"][signals.NET] = "ft~1", p, p - 0.2
    of[2]["flags"].add("collapsed")
    of[3]["figures"][signals.O_ASR] = 0.5
    (line,) = signals.by_defense(of, {"ft~1": "lr 0.1"})[2:]
    assert line == "| ft | lr 0.1 | 1 | 3 | 1 | 1 | 35.0 | 15.0 |"


def test_attacked_models_without_p_asr_are_named(signals: Any, drawn_figures: Any) -> None:
    of = [*drawn_figures("badnets", 0), *drawn_figures("refool", 1), *drawn_figures("trojannn", 2)]
    for c in of:
        c["reasons"] = {}
        if c["attack"] == "refool":
            del c["figures"][signals.P_ASR]
            c["reasons"], c["defense"] = {"p_asr_ra": "no_valid_budget"}, "none"
    assert signals.without(of) == [
        "Without P-ASR, and so in no figure of the part held out: refool under seed 1 (`no_valid_budget`)."
    ]


def test_settings_are_those_that_differ(signals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"ft": {"lr": 0.01, "steps": 50}, "ft~1": {"lr": 0.1, "steps": 50}, "clp": {"u": 2.0}}
    rows = [{"defense": d, "defense_params": json.dumps(p)} for d, p in told.items()]
    monkeypatch.setattr(signals, "read_table", lambda path: rows)
    assert signals.settings([Path("run")]) == {"ft": "lr 0.01", "ft~1": "lr 0.1", "clp": ""}


def test_the_page_has_a_part_for_it(
    signals: Any, drawn_figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = script("findings")
    data_set, other, *_ = findings.PAGES
    first = json.loads((DOCS / "measured" / f"{data_set}.json").read_text())
    of = [
        c | {"dataset": "digits", "arch": "n", "reasons": {}, "room": 0.0, "cell": ""}
        for c in pool(signals, drawn_figures)
    ]
    about = {k: first[k] for k in ("versions", "recipe")} | {"command": "sleeperbench run it", "settings": {}}
    (tmp_path / "measured").mkdir()
    signalled = about | {"cells": findings.stored(of)}
    for name, data in ((data_set, first), (other, first | {"command": "on other data"}), (signals.SUITE, signalled)):
        (tmp_path / "measured" / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(findings, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["findings.py", "--again"])
    assert findings.main() == 0
    text = (tmp_path / "findings.md").read_text()
    assert text.startswith("# Findings") and "## Which defenses come back" in text
    tail = text[text.index("## What foretells") :]
    assert "| held out | weights changed | 8 | 48 |" in tail and "| developed on | weights changed | 4 | 24 |" in tail
    assert "- Chosen on the first part: target shift" in tail and "`sleeperbench run it`" in tail
    assert tail.count("| O-ASR and BEC |") == 3
    # A second data set has a page of its own, without that part.
    second = (tmp_path / f"{findings.PAGES[other]}.md").read_text()
    assert "`on other data`" in second and "## Which defenses come back" in second and "## What foretells" not in second
