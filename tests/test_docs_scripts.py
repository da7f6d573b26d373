"""The scripts that write measured figures into docs/: what they take, how they show it, and what they keep."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from scripts import script

from sleeperbench.engine.registry import Registry


def row(metric: str, value: float | None, qualifier: str = "", **more: Any) -> dict[str, Any]:
    cell = "cifar10/small_resnet/badnets@0.05/ft/s0"
    told = {"cell": cell, "metric": metric, "value": value, "qualifier": qualifier, "flag": "", "reason": ""}
    known = {"dataset": "cifar10", "attack": "badnets", "defense": "ft", "seed": 0, "evaluator": "accuracy"}
    return told | known | {"scope": "cell", "lower": None, "upper": None, "cpu_seconds": 1.0, "task_key": metric} | more


# ---- measure.py ------------------------------------------------------------------------------------------------------
def test_measure_shows_shares_in_per_cent_and_the_defenses_own_time() -> None:
    measure = script("measure")
    rows = [
        row("c_acc", 0.5),
        row("c_acc", 0.9, "k=1"),  # a variant is another figure
        row("asr", None),
        row("cost_forwards", 128000.0, cpu_seconds=321.0),
        row("cost_forwards", 1.0, "phase=score", cpu_seconds=9.0),
    ]
    lines = measure._lines(rows, {rows[0]["cell"]: {"asr_attacked": 1.0}})
    head, rule, line = measure.table(lines, several=False)
    shown = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=False))
    assert set(rule) <= set("|-")
    assert shown["cell"] == "badnets@0.05/ft/s0"
    assert (shown["c_acc"], shown["asr_attacked"]) == ("50.0", "100.0")
    assert (shown["cost_forwards"], shown["cpu_seconds"]) == ("1.28e+05", "321")
    assert "asr" not in shown


def test_measure_asks_the_suite_for_the_method_and_its_controls() -> None:
    measure = script("measure")

    def values(argv: list[str], flag: str) -> list[str]:
        return [b for a, b in itertools.pairwise(argv) if a == flag]

    defense = measure.command("defense", "unlearn:neural_cleanse", "0,1")
    assert values(defense, "--attack") == ["none", "badnets", "blended"]
    assert values(defense, "--defense") == ["none", "clean_model", "unlearn:neural_cleanse"]
    attack = measure.command("attack", "wanet", "0")
    assert values(attack, "--attack")[-1] == "wanet"
    assert (values(attack, "--defense"), values(attack, "--evaluator")) == (["none"], ["accuracy", "stealth"])
    assert values(measure.command("evaluator", "ra", "0"), "--evaluator") == ["accuracy", "ra"]
    for name, supplied in (
        ("ra", ["ft"]),
        ("detection", ["neural_cleanse", "strip"]),
        ("inversion", ["neural_cleanse"]),
        ("stealth", []),
    ):
        assert values(measure.command("evaluator", name, "0"), "--defense") == ["none", *supplied]


def test_measure_lists_every_candidate() -> None:
    measure = script("measure")
    rows = [row("asr_path", 0.25, "t=0.20"), row("c_acc_path", 0.75, "t=0.20"), row("asr_path", None, "t=0.30")]
    assert measure.candidates(rows)[-1] == "| badnets@0.05/ft/s0 | t=0.20 | 75.0 | 25.0 |"
    assert measure.candidates(rows[2:]) == []


# ---- attacks.py ------------------------------------------------------------------------------------------------------
def test_attacks_stand_with_what_they_declare_and_a_figure_per_seed() -> None:
    attacks = script("attacks")
    rows = [
        row("asr", 0.5, defense="none", seed=1),
        row("asr", 0.25, defense="none", seed=0),
        row("asr", 1.0, defense="ft"),
        row("asr", 0.0, "trigger=1", defense="none"),
        row("linf", 0.2, defense="none"),
    ]
    cells = [
        {"attack": "badnets", "flag": "weak", "status": "ok", "reason": ""},
        {"attack": "sig", "flag": "", "status": "failed", "reason": "raised: E"},
    ]
    text = attacks.lines(rows, cells, Registry.discover("none"))
    found = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text[2:]}
    assert found["badnets"][1] == "90"
    assert found["badnets"][4] == "25.0, 50.0"
    assert found["badnets"][7] == "51"  # of 255
    assert found["badnets"][-1] == "weak |"
    assert found["sig"][-1] == "failed: raised: E |"
    assert attacks.published({"published_asr": {"value": 0.999, "setting": "s", "source": "t"}}) == "99.9 (s; t)"
    assert attacks.published({}) == ""
    assert attacks.weak([c | {"rate": 0.1} for c in cells]) == "badnets (1 of 2)"


# ---- zoo.py ----------------------------------------------------------------------------------------------------------
def test_the_zoo_takes_a_detectors_time_from_its_cost() -> None:
    zoo = script("zoo")
    done = [
        {"kind": "defense", "status": "ok", "name": "digits/x", "plugin": p, "result": {"cpu_seconds": 1.0}}
        for p in ("mntd", "strip")
    ]
    rows = [
        row("cost_forwards", 9.0, dataset="digits", defense="mntd", cpu_seconds=50.0),
        row("cost_forwards", 9.0, "phase=run", dataset="digits", defense="mntd", cpu_seconds=1.0),
    ]
    assert zoo.took(rows, done) == {("digits", "mntd"): [50.0], ("digits", "strip"): [1.0]}


def test_the_zoo_names_kinds_of_clean_models_and_what_was_left_out() -> None:
    zoo = script("zoo")
    cells = [
        {"attack": "none", "attack_params": "{}", "dataset": "digits", "reason": ""},
        {
            "attack": "none~1a",
            "attack_params": json.dumps({"stamped": 0.1, "noisy": 0.0}),
            "dataset": "d",
            "reason": "",
        },
        {"attack": "wanet", "dataset": "digits", "reason": "attack_did_not_implant: mean ASR 0.80 below 0.9"},
    ]
    assert zoo.kinds(cells) == {"none": "plain", "none~1a": "stamped 10 %"}
    assert zoo.absent(cells) == "wanet on digits (mean ASR 0.80 below 0.9)"
    assert zoo.share(row("det_tpr", 0.5, lower=0.1, upper=0.9)) == "50.0 (10 to 90)"
    assert zoo.share(row("det_tpr", None)) == zoo.share(None) == ""


# ---- record.py -------------------------------------------------------------------------------------------------------
def test_evaluation_time_leaves_the_defenses_out(tmp_path: Path) -> None:
    about = {"suite": {"name": "s", "recipe": {}}, "protocol": 1, "host": {}, "datasets": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    rows = [
        row("c_acc", 1.0, cpu_seconds=2.0, env='{"torch": "2", "source": "x"}'),
        row("asr", 1.0, cpu_seconds=3.0, env=""),
        row("cost_forwards", 1.0, evaluator="cost", cpu_seconds=1000.0, env=""),
    ]
    found = script("record").provenance(tmp_path, rows)
    assert found["evaluation_core_seconds"] == 5
    assert found["versions"] == {"torch": "2"}


@pytest.mark.parametrize("name", ["attacks", "zoo", "measure", "record"])
def test_every_script_says_what_it_does(name: str) -> None:
    assert "`" in (script(name).__doc__ or "")
