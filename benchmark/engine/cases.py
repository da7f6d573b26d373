"""What methods are handed: cases opened from exactly what was declared; anything else raises `UndeclaredAccess`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sleeperbench.contracts.defense import UndeclaredAccess


class Declared:
    """A case whose properties are opened when first asked for.

    Args:
        what: Shown in messages, such as `ACCESS of Gentle`.
        parts: Name -> function that opens it; only what was declared stands here.
        offered: Every name that could be declared.
    """

    def __init__(self, what: str, parts: Mapping[str, Callable[[], Any]], offered: tuple[str, ...]) -> None:
        self._what, self._parts, self._offered = what, dict(parts), offered

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._parts:
            value = self._parts[name]()
            self.__dict__[name] = value
            return value
        if name in self._offered:
            raise UndeclaredAccess(f"{name} is not declared in the {self._what}")
        raise AttributeError(f"a case has no {name!r}; it has: {', '.join(self._offered)}")


DEFENSE_PARTS = (
    "net",
    "spec",
    "clean",
    "tune",
    "val",
    "train",
    "references",
    "oracle",
    "inner",
    "spent",
    "marks",
    "prepared",
    "recipe",
    "ctx",
)
EVAL_PARTS = (
    "net",
    "spec",
    "attacked",
    "twin",
    "again",
    "anew",
    "descends",
    "outcome",
    "inner",
    "test",
    "probe",
    "bd_test",
    "bd_probe",
    "bd_train",
    "decoy_test",
    "decoy_probe",
    "leak_test",
    "cover_test",
    "oracle",
    "clean_models",
    "defended_clean",
    "controls",
    "peers",
    "surrogates",
    "evaluators",
    "settings",
    "cells",
    "answers",
    "beside",
    "asked",
    "stamps",
    "spent",
    "recipe",
    "is_defended",
    "ctx",
)
