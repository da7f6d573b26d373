"""No defense: the attacked model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """The attacked model unchanged: what every defense is compared with."""

    INFO = {
        "title": "No defense",
        "paper": "",
        "bibtex": "",
        "kind": "control",
        "version": 1,
        "api": 1,
        "micro": {},
    }
    ACCESS = Access(model="none", clean=0)

    def run(self, case: Case) -> Outcome:
        """Nothing."""
        return Outcome()
