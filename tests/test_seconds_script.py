"""docs/seconds.py: seconds per clean row, batched and not, of detectors of models alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripts import script

from sleeperbench.engine.registry import Registry


def line(defense: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    told = {"metric": "cost_forwards", "qualifier": "", "value": 9.0, "dataset": "mnist", "arch": "mnist_cnn"}
    told |= {"defense": defense, "defense_params": "{}", "seconds": seconds, "cpu_seconds": 2.0}
    return told | more


def test_seconds_stand_by_detector_and_by_whether_it_was_batched() -> None:
    seconds, alone = script("seconds"), json.dumps({"batched": False})
    rows = [
        *(line("istr", s, defense_params=json.dumps({"batched": True})) for s in (4.0, 6.0, 50.0)),
        *(line("istr~0a1b2c", s, defense_params=alone) for s in (30.0, 42.0)),
        line("b3d", 100.0),
        line("istr", 1.0, qualifier="phase=run"),
        line("istr", 1.0, metric="cost_queries"),
        line("istr", 1.0, value=None),
        line("strip", 1.0),  # asks about inputs
        line("unlearn:istr", 1.0),
        line("ft", 1.0),
    ]
    found = seconds.took(rows, Registry.discover("none"))
    assert {key[2:]: [s for s, _ in each] for key, each in found.items()} == {
        ("istr", True): [4.0, 6.0, 50.0],
        ("istr", False): [30.0, 42.0],
        ("b3d", True): [100.0],
    }
    _, _, b3d, istr = seconds.table(found, {("mnist", "istr"): 500, ("mnist", "b3d"): 0})
    assert istr == "| mnist | istr | 3 | 500 | 6 | 2 | 0.012 | 36 | 0.072 | 6.0 |"
    assert b3d == "| mnist | b3d | 1 | 0 | 100 | 2 |  |  |  |  |"


@pytest.mark.parametrize(("asked", "rows"), [(0.05, 500), (0.01, 100), (0, 0), (100, 100)])
def test_clean_rows_are_what_the_suite_grants(asked: float | int, rows: int) -> None:
    suite = {"access": {"clean": 0.05}, "dataset_rows": {"mnist": {"train": 10000}}}
    about = {"suite": suite, "datasets": {"mnist": {"rows": {"train": 60000}}}}
    assert script("seconds").granted(about, "mnist", asked) == rows
