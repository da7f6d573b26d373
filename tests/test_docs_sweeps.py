"""docs/sweeps.py: what varies, and what its tables say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import script


@pytest.fixture
def sweeps() -> Any:
    return script("sweeps")


def cell(attack: str = "badnets", defense: str = "none", seed: int = 0, **given: Any) -> dict[str, Any]:
    known = {"dataset": "d", "arch": "a", "rate": 0.1, "flag": "", "reason": "", "attack_params": "{}"}
    known |= {"c_acc": 0.9, "asr": 1.0, "p_asr": None, "defense_params": "{}"}
    return known | {"attack": attack, "defense": defense, "seed": seed} | given


def pruned(rate: float, label: str, **given: Any) -> dict[str, Any]:
    return cell(defense=label, defense_params=json.dumps({"rate": rate, "steps": 0}), **given)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([cell(rate=0.1), cell(rate=0.2)], ("rate", "", "poison rate")),
        ([cell(arch="a"), cell(arch="b")], ("arch", "", "architecture")),
        ([pruned(0.1, "fp"), pruned(0.2, "fp~1"), cell()], ("defense", "fp", "rate")),
        (
            [cell(), cell("badnets~1", attack_params='{"inner": {"cover": "noise"}}')],
            ("attack", "badnets", "cover"),
        ),
        # Clean models have no poison rate of their own.
        ([cell("none", rate=0.0), pruned(0.1, "fp"), pruned(0.2, "fp~1")], ("defense", "fp", "rate")),
    ],
)
def test_what_varies_is_found(sweeps: Any, cells: list[dict[str, Any]], expected: tuple[str, str, str]) -> None:
    assert sweeps.axis(cells) == expected


@pytest.mark.parametrize(
    "cells", [[cell(), cell(seed=1)], [cell(rate=0.1), cell(rate=0.2, arch="b")]], ids=["nothing", "two things"]
)
def test_a_run_that_is_no_sweep_is_refused(sweeps: Any, cells: list[dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="a sweep varies one thing"):
        sweeps.axis(cells)


def test_woken_models_are_the_purified_ones(sweeps: Any) -> None:
    of = [cell(asr=0.1, p_asr=0.8), cell(asr=0.9, p_asr=0.95), cell(asr=0.2, p_asr=0.4)]
    assert sweeps.entry(of, "p_asr") == "80.0, 40.0 (2 of 3)"
    assert sweeps.entry(of[1:2], "p_asr") == "not purified"
    assert sweeps.entry([cell(asr=0.1, reason="no_valid_budget: none")], "p_asr") == "no_valid_budget"
    assert sweeps.entry([], "p_asr") == ""


def test_marks_stand_by_the_attack_rate(sweeps: Any) -> None:
    of = [cell(asr=0.25, flag="collapsed;reduced"), cell(asr=0.75, flag="weak;collapsed")]
    assert sweeps.entry(of, "asr") == "25.0, 75.0 [1 weak] [2 collapsed]"
    assert sweeps.entry(of, "c_acc") == "90.0, 90.0"


def test_values_stand_across_in_order_and_the_rest_apart(sweeps: Any) -> None:
    about = {"axis": {"kind": "defense", "plugin": "fp", "name": "rate"}}
    cells = [pruned(0.5, "fp", asr=0.125), pruned(0.1, "fp~1", asr=0.25), cell(asr=0.75)]
    about["cells"] = [c | {"value": json.loads(c["defense_params"]).get("rate")} for c in cells]  # type: ignore[assignment]
    lines = sweeps.tables(about)
    at = lines.index("O-ASR:")
    assert lines[at + 2] == "| attack | defense | 0.1 | 0.5 | any |"
    assert lines[at + 4 : at + 6] == ["| badnets | none |  |  | 75.0 |", "| badnets | fp | 25.0 | 12.5 |  |"]
    assert not any("P-ASR" in line for line in lines), "no column without a figure"


def test_the_picture_is_the_same_each_time(sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()
    cells = [cell(rate=r, defense=d) | {"value": r} for r in (0.1, 0.01) for d in ("none", "ft")]
    about = {"axis": {"kind": "rate", "plugin": "", "name": "poison rate"}, "cells": cells}
    pictures = [(tmp_path / sweeps.picture("x", about)).read_bytes() for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert b"badnets" in pictures[0] and b"poison rate" in pictures[0]


def test_what_has_no_figure_is_told_once(sweeps: Any) -> None:
    failed = {
        "c_acc": None,
        "asr": None,
        "reason": "input_failed: defense d/a/none@0/ft_same_budget:clp/s0: no_cost: none",
    }
    cells = [
        cell(rate=r, defense=d) | {"value": r} | more for r in (0.1, 0.2) for d, more in (("ft", {}), ("x", failed))
    ]
    about = {"axis": {"kind": "rate", "plugin": "", "name": "poison rate"}, "cells": cells}
    lines = sweeps.tables(about)
    assert not any(line.startswith("| badnets | x") for line in lines)
    assert lines[-1] == "Without figures: x (no_cost: none)."
    assert sweeps.without(about | {"cells": cells[:1]}) == []


def test_a_sweep_behind_an_inversion_says_whether_it_found_the_label(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"meant": 0, "found": 3}, {"meant": 1, "found": 5}, {"meant": None, "found": 1}]
    (tmp_path / "labels.json").write_text(json.dumps({"runs": [{"suite": "sweep-a", "models": models}]}))
    monkeypatch.setattr(sweeps, "FILE", tmp_path / "labels.json")
    assert "label in 0 of 2 " in sweeps.inverted("sweep-a") and "nothing is said" in sweeps.inverted("sweep-a")
    models[0]["found"] = 0
    (tmp_path / "labels.json").write_text(json.dumps({"runs": [{"suite": "sweep-a", "models": models}]}))
    assert "label in 1 of 2 " in sweeps.inverted("sweep-a") and "nothing is said" not in sweeps.inverted("sweep-a")
    assert sweeps.inverted("sweep-b") == ""
