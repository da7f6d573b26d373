"""Every built-in method, and the toys of methods to come, against every check of its kind.

What takes longer (`sleeperbench check --full`) is shared out: a third of the built-in methods get one of its cases,
both chosen by a digest of their names, so that every case is tried on some. With SLEEPERBENCH_FULL set, as
`make test-full` does, each method gets all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import pytest
import toys

from sleeperbench.contracts.attack import Attack
from sleeperbench.engine import artifacts
from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BrokenPlugin
from sleeperbench.kit import hits, predict
from sleeperbench.kit.candidates import certifies
from sleeperbench.testing import Subject, parametrize_with_checks
from sleeperbench.testing.base import CHECKS, KINDS, Skipped
from sleeperbench.testing.general import tried
from sleeperbench.testing.stage import BASE, Variant, stage
from sleeperbench.testing.subject import installed

REGISTRY = Registry.discover("none")
OWN = [p for p in REGISTRY.plugins if p.kind in KINDS]
FULL = bool(os.environ.get("SLEEPERBENCH_FULL"))
MORE = {
    "preact": Variant(arch="micro_preact"),
    "vit": Variant(arch="micro_vit"),
    "1x43": Variant(channels=1, classes=43),
    "3x2": Variant(channels=3, classes=2),
    "child": None,
}
"""What `--full` adds; None is the engine's own child process."""
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
            found.append(installed(REGISTRY.load(p.kind, p.id), p.id, FULL))
        except BrokenPlugin:
            continue  # the test below names it
    return found


USABLE = usable()


def digest(method: Subject) -> int:
    return int(hashlib.sha256(str(method).encode()).hexdigest(), 16)


def chosen(method: Subject) -> str:
    """One of the cases of MORE that make a difference to it."""
    cases = [name for name in MORE if name != "child" or method.kind == "defense"]
    if method.kind == "attack" and method.cls.hooks is Attack.hooks:
        cases = [name for name in cases if MORE[name].arch == BASE.arch]  # it sees no classifier
    return cases[digest(method) // 3 % len(cases)]


THIRD = [m for m in USABLE if digest(m) % 3 == 0]


def test_the_base_case_is_backdoored_and_has_rows_enough_for_the_honest_rule() -> None:
    at = stage(BASE)
    bd = artifacts.read_rendered(at.store.fetch(at.attacked) / "bd_test.safetensors", at.micro.test)
    for key, low, high in ((at.attacked, 0.95, 1.0), (at.clean(0), 0.0, 0.05)):
        net = at.net(key)
        right, total = hits(predict(net, at.micro.test.images), at.micro.test.labels)
        turned, triggered = hits(predict(net, bd.data.images), bd.targets)
        assert right / total >= 0.95
        assert low <= turned / triggered <= high
    assert certifies(len(at.micro.pool))


@pytest.mark.parametrize("plugin", OWN, ids=lambda p: f"{p.kind}/{p.id}")
def test_a_built_in_method_can_be_loaded(plugin) -> None:
    assert REGISTRY.load(plugin.kind, plugin.id)


@parametrize_with_checks([*USABLE, *TOYS])
def test_contract(method: Subject, check: Callable[[Subject], None]) -> None:
    check(method)


@pytest.mark.skipif(FULL, reason="allowed: every method gets all cases")
@pytest.mark.parametrize("method", THIRD, ids=lambda m: f"{m}-{chosen(m)}")
def test_one_case_more(method: Subject) -> None:
    variant = MORE[chosen(method)]
    try:
        if variant is not None:
            tried(method, [variant])
        else:
            (child,) = [c for c in CHECKS if c.name == "child"]
            child.look(method)
    except Skipped as e:
        pytest.skip(f"allowed: {e}")


def test_every_case_is_somebody_s() -> None:
    assert {chosen(m) for m in THIRD} == set(MORE)
