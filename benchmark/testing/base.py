"""What a check is: a name, one line of what it holds, one line of how to mend it, and a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeperbench.contracts.method import NotApplicable

if TYPE_CHECKING:
    from sleeperbench.testing.subject import Subject

KINDS = ("attack", "defense", "evaluator")


class Failed(AssertionError):
    """A check failed; the message says what was seen."""


class Skipped(Exception):
    """A check has nothing to look at; the message says why."""


@contextmanager
def called(name: str) -> Iterator[None]:
    """Turn what a method raises in `name` into Failed, so that the checker's own faults stay apart from it.

    Raises:
        Failed: the method raised; declining (NotApplicable) goes through.
    """
    try:
        yield
    except (Failed, Skipped, NotApplicable):
        raise
    except (Exception, SystemExit) as e:
        raise Failed(f"{name} raises {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e


@dataclass(frozen=True)
class Check:
    """A named check.

    Args:
        name: snake_case, unique among the checks of a kind.
        kinds: Kinds of method that it is for.
        what: One line: what holds of a method that passes.
        remedy: One line: how to mend one that fails.
        look: Returns a remark (or nothing); raises Failed or Skipped.
        full: Run under `--full` alone.
    """

    name: str
    kinds: tuple[str, ...]
    what: str
    remedy: str
    look: Callable[[Subject], str | None]
    full: bool = False


CHECKS: list[Check] = []
"""All checks, in the order in which they run."""


def check(
    name: str, kinds: str, *, what: str, remedy: str, full: bool = False
) -> Callable[[Callable[[Subject], str | None]], Callable[[Subject], str | None]]:
    """Enter a function into `CHECKS`; `kinds` are words, separated by spaces."""

    def enter(look: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        CHECKS.append(Check(name, tuple(kinds.split()), what, remedy, look, full))
        return look

    return enter


def hold(condition: object, seen: str) -> None:
    """Go on if `condition` is true.

    Raises:
        Failed: it is not.
    """
    if not condition:
        raise Failed(seen)
