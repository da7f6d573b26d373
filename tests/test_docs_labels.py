"""docs/labels.py: which label the inversion found, and what that has to do with the repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripts import script

from sleeperbench.schema import CELLS, arrow


@pytest.fixture
def labels() -> Any:
    return script("labels")


def model(found: int, asr: float | None, meant: int | None = 0, cell: str = "d/a/badnets@0.1/pam/s0") -> dict[str, Any]:
    return {"cell": cell, "found": found, "meant": meant, "asr": asr, "share": 0.5, "c_acc": 0.9, "flag": "reduced"}


def test_models_are_parted_by_whether_the_label_was_found(labels: Any) -> None:
    of = [model(0, 0.2), model(0, 0.5), model(3, 1.0), model(0, None, None)]
    assert labels.conclusion(of) == (
        "It found the attacker's label in 2 of 3 attacked models; where it did: 1 of 2 purified, O-ASR 20.0 to 50.0 %; "
        "where it did not: 0 of 1 purified, O-ASR 100.0 %."
    )
    assert labels.conclusion([model(0, 0.0)]) == (
        "It found the attacker's label in 1 of 1 attacked models; where it did: 1 of 1 purified, O-ASR 0.0 %."
    )


def test_the_inversion_by_itself_is_told_by_its_effort(labels: Any) -> None:
    def by_itself(found: int, flag: str) -> dict[str, Any]:
        return model(found, None) | {"defense": "bti~123456", "flag": flag}

    of = [by_itself(0, ""), by_itself(3, ""), by_itself(3, "reduced;tuned"), model(0, 0.1) | {"defense": "pam"}]
    assert labels.alone(of) == (
        " By itself, the model left as it is, it found the label with its published steps in 1 of 2, with fewer "
        "(`reduced`) in 0 of 1."
    )
    assert labels.alone(of[3:]) == ""
    assert labels.conclusion(of).startswith("It found the attacker's label in 1 of 1 attacked models")


def made(tmp_path: Path, seeds: list[int], secret_public: bool = True) -> tuple[Path, Path]:
    """A store and a run of PAM on one backdoored and one clean model, beside a repair that inverts nothing."""
    store, cells = tmp_path / "store", []
    for i, (attack, defense) in enumerate([("badnets", "pam"), ("none", "pam"), ("badnets", "ft")]):
        key = f"{i:02x}" * 32
        cell = {"cell": f"d/a/{attack}/{defense}/s1", "attack": attack, "defense": defense, "seed": 1, "c_acc": 0.9}
        cell |= {"asr": 0.1, "status": "ok", "flag": "", "defense_key": key}
        cells.append({c.name: None for c in CELLS} | cell)
        folder = store / key[:2] / key
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps({"chosen": {"target": 1, "share": 0.75}}))
    run = tmp_path / "run"
    run.mkdir()
    pq.write_table(pa.Table.from_pylist(cells, schema=arrow(CELLS)), run / "cells.parquet")
    (run / "run.json").write_text(json.dumps({"suite": {"secret_public": secret_public, "seeds": seeds}}))
    return store, run


def test_the_label_is_the_stores_and_the_attackers_that_of_the_seed(labels: Any, tmp_path: Path) -> None:
    found = {m["attack"]: m for m in labels.found(*made(tmp_path, [1]))}
    assert set(found) == {"badnets", "none"}
    assert [(m["found"], m["share"], m["meant"]) for m in found.values()] == [(1, 0.75, 1), (1, 0.75, None)]
    assert found["badnets"]["asr"] == 0.1


@pytest.mark.parametrize(("seeds", "public"), [([1, 3], True), ([1], False)])
def test_labels_that_are_not_published_are_not_guessed(
    labels: Any, tmp_path: Path, seeds: list[int], public: bool
) -> None:
    with pytest.raises(SystemExit, match="public suites alone"):
        labels.found(*made(tmp_path, seeds, public))
