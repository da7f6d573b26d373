"""docs/zoo.py: which columns stand in its table of detectors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import script


def figure(metric: str, value: float | None, qualifier: str = "", defense: str = "abs") -> dict[str, Any]:
    known = {
        "suite": "zoo",
        "scope": "zoo",
        "dataset": "digits",
        "defense": defense,
        "cell": f"digits/a/zoo/{defense}/s0",
    }
    ends = {"lower": None, "upper": None, "count": 1, "total": 4, "reason": ""}
    return known | ends | {"metric": metric, "value": value, "qualifier": qualifier}


PLAIN = ("det_auroc", "det_bacc", "det_tpr", "det_fpr")


@pytest.mark.parametrize("calibrated", [True, False])
def test_columns_are_those_that_tables_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool) -> None:
    """Tables of before `det_tpr_fpr5` have no column of it, nor have those with too few clean models."""
    zoo = script("zoo")
    rows = [figure(m, 0.25, defense=d) for m in PLAIN for d in ("abs", "istr")]
    rows += [figure("det_tpr_fpr5", 0.75 if calibrated else None), figure("det_missing", 0.5 if calibrated else None)]
    found = zoo.detectors(rows)
    assert list(zoo.beside(found)) == (["det_tpr_fpr5", "det_missing"] if calibrated else [])
    monkeypatch.setattr(zoo, "read_table", lambda path: rows if path.name == "measurements.parquet" else [])
    monkeypatch.setattr(zoo, "combined", lambda runs, rows, metrics: {"recipe": {"epochs": 3}})
    monkeypatch.setattr(zoo, "machine", lambda about: "torch")
    monkeypatch.setattr(zoo, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo.py", "small", "run", str(tmp_path)])
    (tmp_path / "tasks.jsonl").write_text("")
    (tmp_path / "measured").mkdir()
    assert zoo.main() == 0
    page = (tmp_path / "zoo.md").read_text()
    head, _, abs_, istr = [n for n in page.splitlines() if n.startswith("|")][:4]
    shown = [dict(zip(head.split(" | "), line.split(" | "), strict=True)) for line in (abs_, istr)]
    assert ("TPR at 5 % FPR" in shown[0], "at a threshold from the clean models" in page) == (calibrated, calibrated)
    if calibrated:
        assert [s["TPR at 5 % FPR"] for s in shown] == ["75.0", ""]
        assert [s["backdoored without verdict"] for s in shown] == ["50.0", ""]
    assert len(json.loads((tmp_path / "measured" / "small.json").read_text())["rows"]) == len(rows)
    assert "Detectors of inputs" not in page


def test_detectors_of_inputs_stand_by_attack() -> None:
    zoo = script("zoo")

    def row(metric: str, value: float | None, attack: str, seed: int, defense: str = "strip") -> dict[str, Any]:
        name = f"digits/a/{attack}@0.1/{defense}/s{seed}"
        known = {"dataset": "digits", "defense": defense, "attack": attack, "cell": name}
        return known | {"metric": metric, "value": value, "qualifier": ""}

    rows = [row("input_auroc", v, a, s) for v, a, s in ((0.9, "sig", 0), (0.5, "sig", 1), (1.0, "lf", 0))]
    rows += [row("input_tpr_fpr5", 0.25, "sig", 0), row("input_auroc", None, "lf", 1), row("asr", 1.0, "lf", 0)]
    used = zoo.inputs(rows)
    assert len(used) == 4
    head, _, line = zoo.by_model(used, {("digits", "strip"): (1.0, 3.0)})
    assert head == (
        "| data set | detector | models | AUROC | TPR at 5 % FPR | AUROC, lf | AUROC, sig | TPR at 5 % FPR, lf | "
        "TPR at 5 % FPR, sig | core-seconds a model |"
    )
    tprs = "|  | 25.0 (25 to 25) | 1.0 + 3.0 |"
    assert line == f"| digits | strip | 3 | 80.0 | 25.0 | 100.0 (100 to 100) | 70.0 (50 to 90) {tprs}"


def test_of_a_cell_that_several_runs_have_the_last_counts() -> None:
    zoo = script("zoo")
    first = [{"suite": "zoo", "cell": c, "value": 1} for c in "ab"]
    last = [{"suite": "zoo", "cell": "b", "value": 2}, {"suite": "zoo-inputs", "cell": "a", "value": 3}]
    assert [r["value"] for r in zoo.latest([first, last])] == [1, 2, 3]


def test_what_declined_is_told_with_its_reason() -> None:
    zoo = script("zoo")
    found = [
        {"defense": d, "attack": a, "status": s, "reason": r}
        for d, a, s, r in (
            ("ibd_psc", "badnets", "not_applicable", "error_not_reached: at most 0.2"),
            ("ibd_psc", "lf", "not_applicable", "error_not_reached: at most 0.3"),
            ("ibd_psc", "sig", "ok", ""),
            ("ibd_psc", "none", "not_applicable", "error_not_reached: at most 0.1"),
            ("ibd_psc", "wanet", "not_run", "attack_did_not_implant: mean ASR"),
            ("strip", "lf", "failed", "nan: x"),
        )
    ]
    assert zoo.declined(found, ["ibd_psc"]) == "ibd_psc on 2 models (`error_not_reached`)"
    assert zoo.declined(found, []) == ""
