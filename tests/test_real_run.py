"""A whole run on real images: small enough for CI, real enough to go through data, cut, training, RA and site."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleeperbench.cli import main
from sleeperbench.engine.rows import read_table

SUITE = """
schema = 1
name = "real"
[matrix]
datasets = ["cifar10"]
archs = ["small_cnn"]
attacks = ["none", "badnets"]
rates = [0.1]
defenses = ["none", "exact_purification"]
evaluators = ["accuracy", "ra", "stealth"]
seeds = [0]
[train]
epochs = 15
[dataset.cifar10]
train = 4000
test = 1000
[attack.badnets]
pattern = "random"
size = 6
corner = "upper_left"
offset = 2
[evaluator.ra]
k = 1
draws = 1
[evaluator.ra_budget]
ks = [1]
draws = 1
"""


@pytest.mark.real
def test_a_suite_runs_on_cifar10(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text(SUITE)
    assert main(["-q", "run", str(tmp_path / "real.toml"), "--out", str(tmp_path / "run"), "--keep-unimplanted"]) == 0
    cells = {r["cell"]: r for r in read_table(tmp_path / "run" / "cells.parquet")}
    attacked = cells["cifar10/small_cnn/badnets@0.1/none/s0"]
    cured = cells["cifar10/small_cnn/badnets@0.1/exact_purification/s0"]
    assert attacked["c_acc"] > 0.3, "ten classes: chance is 0.1"
    assert attacked["asr"] > 0.8
    assert cured["asr"] < attacked["asr"]
    assert attacked["p_asr_ra"] is not None
    assert attacked["rate_actual"] == pytest.approx(0.1, abs=1e-3)
    datasets = json.loads((tmp_path / "run" / "run.json").read_text())["datasets"]
    assert datasets["cifar10"]["canonical"] is not attacked["data_digest"].endswith("!")
    assert (tmp_path / "run" / "site" / "index.html").is_file()
