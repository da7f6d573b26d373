"""Checks that every attack, defense and evaluator has to pass, built-in or not: `sleeperbench check ID`, or in pytest.

from sleeperbench.testing import parametrize_with_checks

@parametrize_with_checks([Gentle])
def test_contract(method, check):
    check(method)
"""

from __future__ import annotations

from collections.abc import Mapping

from sleeperbench.testing.report import CheckFailed, Result, check_method, parametrize_with_checks
from sleeperbench.testing.subject import Subject

__all__ = [
    "CheckFailed",
    "Result",
    "Subject",
    "check_attack",
    "check_defense",
    "check_evaluator",
    "parametrize_with_checks",
]


def check_attack(attack: type | Subject, *, full: bool = False) -> list[Result]:
    """Run all checks on an attack.

    Args:
        attack: Its class.
        full: Also other architectures and shapes.

    Raises:
        CheckFailed: says what was seen and how to mend it.
    """
    return check_method(attack, "attack", full=full)


def check_defense(defense: type | Subject, *, inner: type | None = None, full: bool = False) -> list[Result]:
    """Run all checks on a defense.

    Args:
        defense: Its class.
        inner: For a wrapper: the class that it wraps; without one it gets an invented answer with all parts.
        full: Also other architectures and shapes, and the engine's child process.

    Raises:
        CheckFailed: says what was seen and how to mend it.
    """
    return check_method(defense, "defense", inner=Subject(inner) if inner else None, full=full)


def check_evaluator(
    evaluator: type | Subject, *, others: Mapping[str, type] | None = None, full: bool = False
) -> list[Result]:
    """Run all checks on an evaluator.

    Args:
        evaluator: Its class.
        others: By id, the evaluators whose findings it reads and which are not installed.
        full: Also other architectures and shapes.

    Raises:
        CheckFailed: says what was seen and how to mend it.
    """
    return check_method(evaluator, "evaluator", others=others, full=full)
