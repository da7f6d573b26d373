"""The base of every plugin: a frozen dataclass of JSON-able parameters with literal metadata."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class NotApplicable(Exception):
    """A method declines this case; the message is the row's reason, such as `no_trigger`."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A plugin. Subclasses are frozen keyword-only dataclasses whose fields are JSON-able and have literal defaults.

    `INFO` is a literal, read from the source without importing it: `title`, `paper`, `bibtex`, `kind`, `version`
    (raised whenever a figure may move), `api`, `micro` (parameters for one core-second, same algorithm).
    `ACCESS`, `NEEDS` and `REQUIRES` are literal too (a call with literal arguments).
    """

    INFO: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Any:
        """The method with these parameters; JSON lists become tuples.

        Raises:
            ValueError: a parameter is unknown or out of range.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(params) - names)
        if unknown:
            raise ValueError(f"{cls.__name__} has no parameter {unknown[0]!r}; it has: {', '.join(sorted(names))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in params.items()})

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Raise ValueError if these parameters cannot work on (C, H, W) images of so many classes; run beforehand."""
