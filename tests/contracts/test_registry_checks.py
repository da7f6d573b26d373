"""Every built-in method, and the toys of methods to come, against every check of its kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import toys

from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BrokenPlugin
from sleeperbench.testing import Subject, parametrize_with_checks
from sleeperbench.testing.base import KINDS
from sleeperbench.testing.report import subjects

REGISTRY = Registry.discover("none")
OWN = [p for p in REGISTRY.plugins if p.kind in KINDS]
OTHERS = {"toys/toy_ra": toys.ToyRa}
TOYS = [
    *(
        Subject(c)
        for c in (toys.Npd, toys.Strip, toys.Spectral, toys.Istr, toys.Lira, toys.Detect, toys.ToyRa, toys.Tba)
    ),
    Subject(toys.Retrain, inner=Subject(toys.Spectral)),
    Subject(toys.Qra, others=OTHERS),
]


def usable() -> list[Subject]:
    found = []
    for p in OWN:
        try:
            found += subjects(f"{p.kind}:{p.id}")
        except BrokenPlugin:
            continue  # the test below names it
    return found


@pytest.mark.parametrize("plugin", OWN, ids=lambda p: f"{p.kind}/{p.id}")
def test_a_built_in_method_can_be_loaded(plugin) -> None:
    assert REGISTRY.load(plugin.kind, plugin.id)


@parametrize_with_checks([*usable(), *TOYS])
def test_contract(method: Subject, check: Callable[[Subject], None]) -> None:
    check(method)
