"""No suite for a CPU gives a method less time than docs/presets.md counts for its published effort."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeperbench.engine.suite import Suite, build, shipped

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"
ROW = re.compile(r"^\| `(\w+)` \| ([\d,.]+)", re.MULTILINE)
COUNTED = {name: 60 * float(minutes.replace(",", "")) for name, minutes in ROW.findall(DOCS.read_text())}
"""Core-seconds at the published effort, 10,000 images of CIFAR-10 through small_resnet."""


def over(suite: Suite, registry: Any) -> Iterator[tuple[str, float]]:
    """Defenses whose counted cost exceeds the suite's time for a task, unless an effort of theirs is reduced."""
    for v in suite.defenses:
        params = v.params
        for plugin in registry.chain("defense", v.id):
            b, own = plugin.blueprint, params
            params = params.get("inner", {})
            less = any(own[n] < b.fields[n].default for n in b.info.get("effort", ()) if own[n] is not None)
            cost = COUNTED.get(plugin.id.rpartition(":")[2], 0.0)
            if not less and cost > suite.budget["task_seconds"]:
                yield v.label, cost


def for_a_cpu() -> Iterator[str]:
    """Shipped suites with one thread per task, but for those on digits, which are far smaller than what is counted."""
    for name, text in shipped().items():
        raw = tomllib.loads(text)
        if raw["budget"]["threads"] == 1 and raw["matrix"]["datasets"] != ["digits"]:
            yield name


def test_the_table_is_read_and_names_methods_with_a_preset(registry: Any) -> None:
    assert COUNTED["pam"] == 123 * 60 and COUNTED["dbd"] == 1540 * 60
    presets = {p.id for p in registry.of("defense") if "presets" in p.blueprint.info}
    assert set(COUNTED) == presets


@pytest.mark.parametrize("name", sorted(for_a_cpu()))
def test_what_is_counted_fits(registry: Any, name: str) -> None:
    assert list(over(build(name, registry)[0], registry)) == []


def test_a_dear_method_is_found_also_under_a_wrapper(make_suite: Any, registry: Any) -> None:
    named = ["pam", "retrain:ct", "ft"]
    time = "[budget]\nthreads = 1\ntask_seconds = 3600\n"
    found = dict(over(make_suite(datasets=["fashion_mnist"], defenses=named, tail=time), registry))
    assert found == {"pam": 123 * 60, "retrain:ct": 76 * 60}
    less = '[defense.pam]\npreset = "reduced"\n[defense."retrain:ct"]\npreset = "reduced"\n'
    assert not dict(over(make_suite(datasets=["fashion_mnist"], defenses=named, tail=time + less), registry))
