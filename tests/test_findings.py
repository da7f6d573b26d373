"""The rules by which docs/findings.md is written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr, t
from scripts import DOCS, script


@pytest.fixture(scope="module")
def findings() -> Any:
    return script("findings")


def cell(asr: float | None, p_asr: float | None, control: float = 0.05, *flags: str) -> dict[str, Any]:
    figures = {("asr", ""): asr, ("p_asr_ra", ""): p_asr, ("p_asr_ra", "control=clean_model"): control}
    return {"figures": {k: v for k, v in figures.items() if v is not None}, "flags": set(flags)}


@pytest.mark.parametrize(
    ("of", "word"),
    [
        (cell(0.21, 0.99), "not purified"),
        (cell(0.20, 0.50), "comes back"),
        (cell(0.05, 0.25), "comes back"),  # 5 times the clean model's
        (cell(0.05, 0.24), "stays"),
        (cell(0.05, 0.0, 0.0), "stays"),  # 5 times nothing is nothing
        (cell(0.05, 0.99, 0.05, "collapsed"), "comes back (collapsed)"),
        (cell(0.05, None) | {"reasons": {"p_asr_ra": "no_valid_budget"}}, "no figure (no_valid_budget)"),
        (cell(0.21, None) | {"reasons": {"p_asr_ra": "no_valid_budget"}}, "not purified"),
        (
            cell(1.0, None) | {"reasons": {"p_asr_ra": "model_unchanged: it judges"}},
            "no figure (model_unchanged: it judges)",
        ),
        (cell(0.4, None, 0.05, "weak") | {"reasons": {"p_asr_ra": "weak_attack"}}, "no figure (weak_attack)"),
        (cell(None, None) | {"reasons": {"p_asr_ra": "nan: x"}}, "no figure (nan: x)"),
    ],
)
def test_the_rule_of_coming_back(findings: Any, of: dict[str, Any], word: str) -> None:
    assert findings.pattern([of]) == f"1 {word}"
    assert findings.pattern([of, of, cell(0.9, 0.9)]) in (f"2 {word}, 1 not purified", "3 not purified")


def test_a_reason_is_that_of_the_step_which_failed_first(findings: Any) -> None:
    """Not the names of the steps between, which no two seeds share."""
    told = "input_failed: evaluate ra d/a/blended@0.05/unlearn:istr/s0: input_failed: defense clean_model (control): "
    assert findings.cause(f"{told}attack_did_not_implant: mean ASR 0.485 is below 0.9") == "attack_did_not_implant"
    assert findings.cause(f"{told}nan: loss is nan: lower lr") == "nan: loss is nan: lower lr"
    assert findings.cause("no_valid_budget: 2 of 3") == "no_valid_budget: 2 of 3"


def test_models_that_were_not_purified_enter_no_mean(findings: Any) -> None:
    def seed(i: int, asr: float, p: float) -> dict[str, Any]:
        made = model("badnets", "pam", i, asr=asr, p_asr_ra=p, p_asr_ra__control_k0=p / 2, p_asr_net=p - 0.05)
        made["figures"] |= {("p_asr_ra", "control=clean_model"): 0.05, ("c_acc", ""): 0.9}
        return made

    def row(*of: dict[str, Any]) -> list[str]:
        head, _, line = findings.superficial(of)
        told = dict(zip(head.split(" | "), line.split(" | "), strict=True))
        return [told[n] for n in ("P-ASR (RA)", "k = 0", "net of controls", "P-ASR of those not purified")]

    awake = [seed(0, 0.21, 0.9), seed(1, 1.0, 1.0)]
    assert row(*awake) == ["", "", "", "90.0 to 100.0"]
    assert row(*awake, seed(2, 0.20, 0.6)) == ["60.0 (1 of 3)", "30.0 (1 of 3)", "55.0 (1 of 3)", "90.0 to 100.0"]
    few = [seed(i, 0.1, 0.6) for i in (2, 3, 4)]
    assert row(*awake, *few) == ["60.0 (3 of 5)", "30.0 (3 of 5)", "55.0 (3 of 5)", "90.0 to 100.0"]
    assert row(*few) == ["60.0", "30.0", "55.0", ""]
    assert " | 5.0, 5.0 | " in findings.superficial(awake)[2], "the clean model's column is of all seeds"


def test_what_is_said_of_defenses_that_purify(findings: Any) -> None:
    def at(name: str, seed: int, asr: float, p: float | None, *flags: str) -> dict[str, Any]:
        made = model("badnets", name, seed, {"p_asr_ra": "no_budget"}, asr=asr) | {"flags": set(flags)}
        if p is not None:
            made["figures"] |= {findings.P_ASR: p, findings.NET: p / 2, ("p_asr_ra", "control=clean_model"): 0.02}
        return made

    clean = [at("clean_model", s, 0.01, 0.02 + s / 100) for s in (0, 1)]
    of = [at("none", 0, 1.0, 1.0), *clean, at("ft", 0, 0.9, 0.95), at("ft", 1, 0.21, 0.95)]
    of += [at("sam", 0, 0.2, 0.6), at("sam", 1, 0.9, 0.99), at("sam", 2, 0.1, 0.1), at("sam", 3, 0.1, 0.04)]
    of += [at("fst", 0, 0.0, 0.7, "collapsed"), at("mute", 0, 0.1, None), at("calm", 0, 0.1, 0.09)]
    of += [at("exact_purification", s, 0.0, 0.05 + s / 100) for s in (0, 1)]
    (said,) = findings.about_repairs(of)
    assert said == (
        "badnets: 3 defenses beside exact_purification and pam purify in some seed without collapse. Of the models of "
        "1 some come back: sam (3 of 4 seeds, 2 of 3 back, P-ASR 4.0 to 60.0 %, net 2.0 to 30.0 %). Of the models of 1 "
        "none comes back: calm (1 of 1 seeds, 0 of 1 back, P-ASR 9.0 %, net 4.5 %). Of the models of 1 none has P-ASR: "
        "mute (1 of 1 seeds, no P-ASR: no_budget). Against these: exact_purification (2 of 2 seeds, 0 of 2 back, P-ASR "
        "5.0 to 6.0 %, net 2.5 to 3.0 %); pam (not run). The clean model under the same attack: P-ASR 2.0 to 3.0 %. "
        "Only with collapse: fst."
    )
    awake = [at("pam", 0, 0.9, 0.9), at("exact_purification", 0, 0.1, 0.6)]
    (said,) = findings.about_repairs([*clean, *awake])
    assert said.startswith("badnets: 0 defenses beside")
    assert "exact_purification (1 of 1 seeds, 1 of 1 back, P-ASR 60.0 %, net 30.0 %); pam (0 of 1 seeds)." in said
    for c in of:
        c["flags"].add("weak")
    assert findings.about_repairs(of) == [], "an attack that did not implant"


def test_mean_and_interval_are_students(findings: Any) -> None:
    mean, room = findings.mean_and_room([1.0, 2.0, 3.0])
    assert (mean, room) == (2.0, pytest.approx(4.302652730 / math.sqrt(3)))
    assert math.isnan(findings.mean_and_room([1.0])[1])
    assert findings.shown([0.11, 0.12, 0.13]) == "12.0 (9.5 to 14.5)"
    assert findings.shown([0.0, 0.9, 0.99]) == "63.0 (0.0 to 100.0)", "a share has no interval beyond its bounds"
    assert (findings.shown([0.5]), findings.shown([0.5, 0.25]), findings.shown([])) == ("50.0", "50.0, 25.0", "")


def test_rank_is_spearmans(findings: Any) -> None:
    def at(x: float, y: float) -> dict[str, Any]:
        return {"figures": {("bec", ""): x, ("p_asr_ra", ""): y}}

    pairs = [(1.0, 0.1), (2.0, 0.3), (3.0, 0.2), (4.0, 0.9)]
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, 1, 0.
    assert findings.rank([at(*p) for p in pairs], ("bec", "")) == pytest.approx(1 - 6 * 2 / (4 * 15))
    tied = [(1.0, 0.1), (2.0, 0.3), (2.0, 0.3), (2.0, 0.2), (0.5, 0.9)]
    assert findings.rank([at(*p) for p in tied], ("bec", "")) == pytest.approx(spearmanr(tied).statistic)
    assert math.isnan(findings.rank([at(1, 0.1), at(1, 0.2), at(1, 0.3)], ("bec", "")))
    assert math.isnan(findings.rank([at(1, 0.1), at(2, 0.2)], ("bec", "")))


# ---- BEC beside its controls -----------------------------------------------------------------------------------------
def model(attack: str, defense: str, seed: int, reasons: Any = None, **figures: float) -> dict[str, Any]:
    """A cell; `bec__control_random` stands for (bec, control=random)."""
    told = {}
    for name, value in figures.items():
        metric, _, qualifier = name.partition("__")
        told[metric, qualifier.replace("control_", "control=").replace("_model", ";model=")] = value
    where = {"dataset": "d", "arch": "a", "attack": attack, "defense": defense, "seed": seed}
    return (
        where
        | {"cell": f"{attack}/{defense}/{seed}", "flags": {"tuned"}, "reasons": reasons or {}, "room": 0.01}
        | {"figures": told}
    )


def family(seed: int, gap: float) -> list[dict[str, Any]]:
    """An attacked model with three repaired ones; one has its weights, of two BEC is `gap` above random channels."""
    kept = model(
        "badnets", "rnp", seed, bec=1.0, bec__control_random=1.0, bec__control_weights=1.0, asr=1.0, p_asr_ra=1
    )
    moved = [
        model(
            *("badnets", name, seed),
            bec=bec,
            bec__control_random=bec - gap,
            bec__control_weights=w,
            asr=asr,
            p_asr_ra=p,
        )
        for name, bec, w, asr, p in (("ft", 0.8, 0.98, 0.9, 0.3), ("fst", 0.2, 0.3, 0.1, 0.4 + seed / 100))
    ]
    return [kept, *moved]


def test_cells_come_back_from_the_stored_ones(findings: Any) -> None:
    of = [model("badnets", "ft", 0, {"tac": "no_trigger"}, bec=0.5, bec__control_random=0.25)]
    again = findings.restored(json.loads(json.dumps(findings.stored(of))))
    assert again == of


def test_the_pages_are_those_of_the_stored_figures(findings: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "measured").mkdir()
    kept = [p for n in (*findings.PAGES, findings.signals.SUITE) if (p := DOCS / "measured" / f"{n}.json").exists()]
    for p in kept:
        (tmp_path / "measured" / p.name).write_text(p.read_text())
    monkeypatch.setattr(findings, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["findings.py", "--again"])
    assert findings.main() == 0
    pages = [page for name, page in findings.PAGES.items() if name in {p.stem for p in kept}]
    assert pages and sorted(p.stem for p in tmp_path.glob("*.md")) == sorted(pages)
    texts = [(tmp_path / f"{page}.md").read_text() for page in pages]
    assert texts == [(DOCS / f"{page}.md").read_text() for page in pages]
    assert all(f"measured/{p.name}" in "".join(texts) for p in kept)


def test_models_with_the_attacked_models_weights_are_taken_out(findings: Any) -> None:
    of = family(0, 0.1) + family(1, 0.3)
    assert [findings.changed(c) for c in of[:3]] == [False, True, True]
    still = {"bec": 0.99, "bec__control_weights": 0.99}
    assert findings.changed(model("badnets", "x", 0, **still)) is False
    for moved in ({"bec": 0.98}, {"bec__control_weights": 0.98}):  # BatchNorm's statistics move features alone
        assert findings.changed(model("badnets", "x", 0, **still | moved)) is True
    assert findings.changed(model("badnets", "npd", 0, bec=1.0)) is True, "tensors were added"
    head, _, *lines = findings.predictions(of)
    assert "all 6" in head and "| changed, 4" in head and "changed and purified, 2" in head
    bec = next(line for line in lines if line.startswith("| BEC |")).strip("| ").split(" | ")
    every, moved = (findings.rank(c, findings.BEC) for c in (of, [c for c in of if findings.changed(c)]))
    assert every > 0.3 > 0 > moved
    assert (bec[1], bec[2]) == (f"{every:.2f}", f"{moved:.2f}")
    (said,) = findings.about_rank(of)
    assert (
        said.startswith("2 of the 6 repaired models with P-ASR and BEC are unchanged")
        and f"BEC {moved:.2f} instead of {every:.2f}" in said
    )


def test_a_distance_that_saw_not_all_tensors_is_no_figure(findings: Any) -> None:
    def run(version: int | list[int]) -> list[dict[str, Any]]:
        told = {"asr": 0.1, "p_asr_ra": 0.5, "bec__control_weights": 1.0}
        more = [
            model("badnets", d, 0, bec=b, bec__control_random=b, **told)
            for d, b in (("npd", 0.6), ("npd~1", 0.5), ("bn_refresh", 0.9))
        ]
        return list(findings.weighed(family(0, 0.1) + more, version))

    old, new = run(2), run(3)
    assert [c["defense"] for c in old if findings.WEIGHTS not in c["figures"]] == ["npd", "npd~1"]
    assert all(findings.WEIGHTS in c["figures"] for c in new)
    assert run([2, 3]) == old, "runs of both versions"
    # They stand in every row but that of weights, and are told apart there.
    head, _, *lines = findings.predictions(old)
    assert "all 6" in head and "| changed, 5" in head and "changed and purified, 4" in head
    (weights,) = [line for line in lines if line.startswith("| BEC, distance of weights")]
    assert weights.startswith("| BEC, distance of weights (of 4, 3 and 2) | ")
    seen = [c for c in old if findings.WEIGHTS in c["figures"]]
    assert weights.split(" | ")[1] == f"{findings.rank(seen, findings.WEIGHTS):.2f}"
    assert len(findings.compared(old, findings.BEC)) == 5 and len(findings.compared(old, findings.WEIGHTS)) == 3
    asleep = [line.split(" | ")[-2:] for line in findings.asleep(old) if "npd |" in line]
    assert asleep == [["0.60", " |"]]
    assert "(of " not in "".join(findings.predictions(new))


def test_bec_that_saw_no_gate_is_no_figure(findings: Any) -> None:
    def run(version: int, **own: int) -> Any:
        one = model("badnets", "fine_pruning~1", 0, asr=0.1, p_asr_ra=0.5, bec=0.9, bec__control_weights=1.0)
        (c,) = findings.weighed([one | own], version)
        return c["figures"]

    assert set(run(3)) == {findings.O_ASR, findings.P_ASR}
    assert set(run(4)) == set(run(3, bec=4)) == {findings.O_ASR, findings.P_ASR, findings.BEC, findings.WEIGHTS}
    assert set(run(4, bec=3)) == set(run(3)), "a cell's own version goes before that of its run"


def test_a_later_version_of_bec_stands_for_all_of_its_figures(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(qualifier: str, value: float | None, version: int) -> dict[str, Any]:
        own = {"cell": "x", "dataset": "d", "arch": "a", "attack": "badnets", "defense": "fine_pruning", "seed": 0}
        figure = {"metric": "bec", "qualifier": qualifier, "value": value, "reason": "", "flag": "", "scope": "cell"}
        return own | figure | {"lower": None, "upper": None, "evaluator": "bec", "method_version": version}

    runs = {
        "old": [row("", 1.0, 3), row("control=weights", 0.9, 3)],
        "new": [row("", 0.4, 4), row("control=weights", None, 4)],
    }
    monkeypatch.setattr(findings, "read_table", lambda p: runs[p.parent.name] if p.stem == "measurements" else [])
    for order in (("old", "new"), ("new", "old")):
        (c,) = findings.cells([Path(name) for name in order])
        assert (c["figures"], c["bec"]) == ({("bec", ""): 0.4}, 4)


def test_intervals_leave_out_models_without_the_figure(findings: Any) -> None:
    of = [model("badnets", f"d{i}", 0, bec=i, bec__control_weights=i, p_asr_ra=p)
          for i, p in enumerate([0.1, 0.3, 0.2, 0.5, 0.4, 0.9])]  # fmt: skip
    whole = findings.bootstrap(findings.grouped(of[:5], findings.defense), findings.WEIGHTS)
    del of[5]["figures"][findings.WEIGHTS]
    assert findings.bootstrap(findings.grouped(of, findings.defense), findings.WEIGHTS) == whole != ""
    del of[4]["figures"][findings.WEIGHTS]
    assert findings.bootstrap(findings.grouped(of, findings.defense), findings.WEIGHTS) == ""


def test_the_gap_to_a_placebo_is_a_mean_over_attacked_models(findings: Any) -> None:
    random = findings.PLACEBOS["BEC, random channels"]
    of = family(0, 0.1) + family(1, 0.2) + family(2, 0.3)
    of[1]["figures"]["bec", "control=random"] -= 0.1  # one of the two models of one attacked model
    moved = findings.compared(of, random)
    assert len(moved) == 6
    assert findings.gaps(moved, random) == pytest.approx([0.15, 0.2, 0.3])
    room = t.ppf(0.975, 2) * 0.0763762615825973 / math.sqrt(3)
    assert findings.interval([0.15, 0.2, 0.3]) == f"0.22 ± {room:.2f}"
    assert "BEC is higher" in findings.about_placebos(of)[0]
    of[-1]["figures"]["bec", "control=random"] += 2
    assert "no difference is shown" in findings.about_placebos(of)[0]


@pytest.mark.parametrize(
    ("twin", "words"),
    [
        ((0.5, 0.5), "recognises the same backdoor trained anew: 0.50, 0.50"),
        ((0.5, 0.1), "does not reliably recognise"),
        ((0.2, -0.3), "does not recognise"),  # equal to the largest clean one is not above it
    ],
)
def test_a_twin_is_recognised_above_all_clean_models(findings: Any, twin: tuple[float, float], words: str) -> None:
    clean = {"bec__control_clean_model0": -0.1, "bec__control_clean_model1": 0.2}
    of = [model("badnets", "none", i, bec__control_twin=v, **clean) for i, v in enumerate(twin)]
    (said,) = findings.about_twins(of)
    assert words in said
    assert findings.twins(of)[2].split(" | ")[3] == "-0.10 to 0.20 |"


@pytest.mark.parametrize("name", ["paper-safety-cpu", "paper-safety-cpu-cifar10", "digits-repairs"])
def test_what_the_pages_of_bec_and_target_shift_say_of_every_data_set(findings: Any, name: str) -> None:
    about = json.loads((DOCS / "measured" / f"{name}.json").read_text())
    of = findings.weighed(findings.restored(about["cells"]), about["methods"]["evaluator/bec"])
    random, untriggered, weights = findings.PLACEBOS.values()

    def beside(key: tuple[str, str]) -> float:
        return float(findings.rank(findings.compared(of, key), findings.BEC, key))

    for key in (random, untriggered):
        mean, room = findings.mean_and_room(findings.gaps(findings.compared(of, key), key))
        assert mean <= room and beside(key) > beside(weights)
    assert "does not reliably recognise" in findings.about_twins(of)[0]
    assert beside(findings.VARIANTS["BEC, unbiased"]) > 0.99 and beside(findings.VARIANTS["BEC, mean of layers"]) > 0.97

    _, used = findings.ranking(of)
    moved = [c for c in used if findings.changed(c)]
    for mine in (used, moved):
        for key in (findings.NET_SHIFT, findings.BEC):
            assert findings.rank(mine, findings.O_ASR) > findings.rank(mine, key)
    assert findings.rank(moved, findings.NET_SHIFT) > findings.rank(moved, findings.BEC)
    better = findings.rank(used, findings.NET_SHIFT) > findings.rank(used, findings.BEC)
    assert better is (name != "paper-safety-cpu")
    if not better:
        assert (len(used) - len(moved), len(used)) == (21, 90)
    few = [c for c in moved if findings.purified(c)]
    woken, quiet = ([c for c in few if (c["figures"][findings.P_ASR] >= 0.5) is s] for s in (True, False))
    for key in (findings.BEC, findings.NET_SHIFT):
        (a, b), (c, d) = ((min(v), max(v)) for v in (findings.values(woken, key), findings.values(quiet, key)))
        assert max(a, c) < min(b, d)

    def above(models: list[Any]) -> float:
        clean = [max(findings.of_clean(c, "shift_target_clean", "")) for c in models]
        shift = [c["figures"][findings.SHIFT] for c in models]
        return sum(x > y for x, y in zip(shift, clean, strict=True)) / len(models)

    told = findings.repaired(of, findings.SHIFT, findings.O_ASR)
    assert above(findings.undefended(of, findings.SHIFT)) == 1
    assert above([c for c in told if not findings.purified(c)]) > 0.95
    assert 0 < above([c for c in told if findings.purified(c)]) < 1


def test_chance_alone_reaches_a_correlation(findings: Any) -> None:
    # Spearman's exact two-sided critical values: none for four points, 1 for five, 0.886 for six, 0.786 for seven.
    assert math.isnan(findings.needed(4)) and math.isnan(findings.needed(9))
    assert [round(findings.needed(n), 3) for n in (5, 6, 7)] == [1.0, 0.886, 0.786]


def test_no_interval_of_fewer_groups_than_five(findings: Any) -> None:
    of = [
        model("badnets", f"d{i}", seed, bec=i + seed / 10, p_asr_ra=[0.1, 0.3, 0.2, 0.5, 0.4][i])
        for i in range(5)
        for seed in (0, 1)
    ]
    assert findings.bootstrap(findings.grouped(of, findings.attacked), findings.BEC) == ""
    low, high = map(float, findings.bootstrap(findings.grouped(of, findings.defense), findings.BEC).split(" to "))
    assert low < findings.rank(of, findings.BEC) < high


def test_what_is_said_of_purified_models(findings: Any) -> None:
    of = [
        model(
            *("badnets", f"d{i}", 0),
            bec=bec,
            bec__control_weights=0.5,
            asr=0.1,
            p_asr_ra=p,
            shift_target_net=p,
        )
        for i, (bec, p) in enumerate([(0.1, 0.6), (0.2, 0.5), (0.3, 0.4), (0.5, 0.2), (0.4, 0.3)])
    ]
    none, first, second = findings.about_sleepers(of)
    assert none.startswith("5 changed models with P-ASR and BEC are purified. 0 of them collapsed")
    assert "Among these 5 BEC ranks P-ASR with -1.00" in first
    assert "reach 1.00 in size" in first and "that of BEC, target shift, net of clean models does" in first
    assert "at least 50 %: 2, BEC 0.10 to 0.20" in second and "The 3 below it: BEC 0.30 to 0.50" in second
    of[0]["figures"]["bec", ""] = 0.25
    assert "that of target shift, net of clean models does" in findings.about_sleepers(of)[1]
    assert "too few" in findings.about_sleepers(of[:2])[1]
    for c in of[:3]:
        c["flags"].add("collapsed")
    assert (
        "3 of them collapsed" in findings.about_sleepers(of)[0]
        and "are 1 of d3, 1 of d4" in findings.about_sleepers(of)[0]
    )
    assert "| badnets | d0 (collapsed) | 0 |" in "\n".join(findings.asleep(of))


def test_a_collapse_stands_in_the_table_of_cells_alone(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"cell": "a", "dataset": "d", "arch": "n", "attack": "badnets", "defense": "fst", "seed": 0}
    row = own | {"scope": "cell", "qualifier": "", "reason": "", "lower": None, "upper": None, "flag": "tuned"}
    rows = [row | {"metric": m, "value": v} for m, v in (("asr", 0.0), ("p_asr_ra", 0.1))]
    files = {"measurements.parquet": rows, "cells.parquet": [own | {"flag": "collapsed;tuned"}]}
    monkeypatch.setattr(findings, "read_table", lambda path: files[path.name])
    (found,) = findings.cells([Path("run")])
    assert found["flags"] == {"collapsed", "tuned"}
    assert findings.pattern([found]) == "1 stays (collapsed)"


def test_a_reduced_evaluator_makes_no_reduced_defense(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"cell": "a", "dataset": "d", "arch": "n", "attack": "badnets", "defense": "fst", "seed": 0}
    row = own | {"scope": "cell", "qualifier": "", "reason": "", "lower": None, "upper": None, "flag": "reduced"}
    files = {
        "measurements.parquet": [row | {"metric": "p_asr_ra", "value": 0.1}],
        "cells.parquet": [own | {"flag": ""}],
    }
    monkeypatch.setattr(findings, "read_table", lambda path: files[path.name])
    assert findings.cells([Path("run")])[0]["flags"] == set()
    files["cells.parquet"] = [own | {"flag": "reduced"}]
    assert findings.cells([Path("run")])[0]["flags"] == {"reduced"}


def test_what_is_said_of_the_shift(findings: Any) -> None:
    clean = {("shift_target_clean", f"model={i}"): v for i, v in enumerate((0.1, 0.2))}
    of = [model("badnets", "none", 0, shift_target=0.9, asr=1.0), model("lc", "none", 0, shift_target=0.2, asr=1.0)]
    of += [model("badnets", "ft", 0, shift_target=0.8, asr=0.9), model("badnets", "fst", 0, shift_target=0.1, asr=0.0)]
    for c in of:
        c["figures"] |= clean
    (said,) = findings.about_shift(of)
    assert "in 1 of 2 attacked models" in said
    assert "in 1 of 1 repaired models that still answer" in said and "in 0 of 1 purified models" in said


def test_an_attack_that_did_not_implant_has_no_attacked_model(findings: Any) -> None:
    strong, faint = (model(attack, "none", 0, bec=1.0) for attack in ("badnets", "blended"))
    faint["flags"] = {"tuned", "weak"}
    assert findings.undefended([strong, faint], findings.BEC) == [strong]


def test_settings_stand_in_the_place_of_a_labels_digest(findings: Any) -> None:
    of = [{"defense": d} for d in ("bnp", "bnp~4ce114", "anp~123456", "odd", "odd~654321")]
    named = [c["defense"] for c in findings.plainly_named(of, {"bnp~4ce114": "u 3.0", "anp~123456": "steps 5"})]
    assert named == ["bnp", "bnp (u 3.0)", "anp", "odd", "odd~654321"]
