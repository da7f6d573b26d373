"""Runs checks and says how they went: for the command, for a script, and for pytest."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BadInput, Mismatch, nearest
from sleeperbench.testing import defenses, evaluators, general, poisoning, purpose, triggers  # noqa: F401  they enter their checks
from sleeperbench.testing.base import CHECKS, KINDS, Check, Failed, Skipped
from sleeperbench.testing.subject import Subject


@dataclass(frozen=True)
class Result:
    """How one check went.

    Args:
        check: What ran.
        status: `ok`, `failed` or `skipped`.
        seconds: Wall time; a run that several checks look at counts for the first.
        message: What was seen, why it was skipped, or a remark.
    """

    check: Check
    status: str
    seconds: float
    message: str


class CheckFailed(Mismatch, AssertionError):
    """Checks failed; the message has, for each, what was seen and how to mend it."""


def checks_of(subject: Subject) -> list[Check]:
    """The checks that a method has to pass, those of every kind first."""
    mine = [c for c in CHECKS if subject.kind in c.kinds and (subject.full or not c.full)]
    return sorted(mine, key=lambda c: len(c.kinds) == 1)


def perform(subject: Subject, check: Check) -> Result:
    """Run one check."""
    start = time.perf_counter()
    try:
        status, message = "ok", check.look(subject) or ""
    except Skipped as e:
        status, message = "skipped", str(e)
    except Failed as e:
        status, message = "failed", str(e)
    except (Exception, SystemExit) as e:
        # Whatever a method raises where a check calls it (apply, restore, score) is its failure.
        status, message = "failed", f"it raises {type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return Result(check, status, time.perf_counter() - start, message)


def results(subject: Subject) -> Iterator[Result]:
    """Run all checks of a method."""
    return (perform(subject, c) for c in checks_of(subject))


def mending(failed: Iterable[Result]) -> str:
    """Two lines per failure: what was seen, and how to mend it."""
    return "\n".join(f"{r.check.name}: {r.message}\n    mend: {r.check.remedy}" for r in failed)


def table() -> str:
    """All checks as the Markdown table of docs/check.md."""
    lines = ["| check | of | what it holds | how to mend it |", "|---|---|---|---|"]
    for c in sorted(CHECKS, key=lambda c: KINDS.index(c.kinds[0]) if len(c.kinds) == 1 else -1):
        kinds = "all" if c.kinds == KINDS else ", ".join(c.kinds)
        lines.append(f"| `{c.name}` | {kinds}{' (`--full`)' * c.full} | {c.what} | {c.remedy} |")
    return "\n".join(lines) + "\n"


def subjects(id: str, *, full: bool = False) -> list[Subject]:
    """The methods that an id names, one per kind; with `attack:`, `defense:` or `evaluator:` in front, that kind alone.

    Raises:
        BadInput: there is none.
        BrokenPlugin: it cannot be read or imported.
    """
    registry = Registry.discover()
    head, colon, rest = id.partition(":")
    kinds = (head,) if colon and head in KINDS else KINDS
    name = rest if colon and head in KINDS else id
    first, _, inner = name.partition(":")
    found: list[Subject] = []
    for kind in kinds:
        known = {p.id for p in registry.of(kind)}  # type: ignore[arg-type]
        if first not in known:
            continue
        if inner:
            registry.chain(kind, name)  # type: ignore[arg-type]
        wrapped = subjects(f"{kind}:{inner}")[0] if inner else None
        cls = registry.load(kind, first)  # type: ignore[arg-type]
        found.append(Subject(cls, id=name, inner=wrapped, full=full))
    if not found:
        every = {p.id for kind in kinds for p in registry.of(kind)}  # type: ignore[arg-type]
        raise BadInput(f"no {' or '.join(kinds)} `{first}`: {nearest(first, every)}")
    return found


def check_method(method: type | Subject, kind: str, **options: Any) -> list[Result]:
    """Run all checks on a class.

    Raises:
        CheckFailed: some failed; the message says what was seen and how to mend it.
    """
    subject = method if isinstance(method, Subject) else Subject(method, **options)
    if subject.kind != kind:
        raise BadInput(f"{subject.cls.__name__} is no {kind} but an {subject.kind}: use check_{subject.kind}")
    found = list(results(subject))
    failed = [r for r in found if r.status == "failed"]
    if failed:
        raise CheckFailed(f"{subject} fails {len(failed)} of {len(found)} checks\n{mending(failed)}")
    return found


def parametrize_with_checks(methods: Sequence[type | str | Subject], *, full: bool = False) -> Any:
    """A pytest decorator: the test gets `method` and `check` and calls `check(method)`, once per method and check.

    Args:
        methods: Classes, ids of installed plugins, or Subjects.
        full: Also what takes longer.
    """
    import pytest

    found: list[Subject] = []
    for m in methods:
        found += (
            subjects(m, full=full) if isinstance(m, str) else [m if isinstance(m, Subject) else Subject(m, full=full)]
        )
    pairs = [pytest.param(s, functools.partial(_in_pytest, c), id=f"{s}-{c.name}") for s in found for c in checks_of(s)]
    return pytest.mark.parametrize(("method", "check"), pairs)


def _in_pytest(check: Check, method: Subject) -> None:
    import pytest

    result = perform(method, check)
    if result.status == "skipped":
        pytest.skip(f"allowed: {result.message}")
    if result.status == "failed":
        raise CheckFailed(mending([result]))
