"""Clean model: an independent model that never had a backdoor, in place of the attacked one."""

from __future__ import annotations

from dataclasses import dataclass

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case


@dataclass(frozen=True, kw_only=True)
class CleanModel(Defense):
    """An independently trained clean model: what each probe does to a model that never had a backdoor (oracle)."""

    INFO = {
        "title": "Clean model",
        "paper": "",
        "bibtex": "",
        "kind": "control",
        "version": 1,
        "api": 1,
        "micro": {},
    }
    ACCESS = Access(model="none", clean=0, references=1, oracle=True)

    def run(self, case: Case) -> Outcome:
        """The first reference model."""
        return Outcome(model=case.references[0])
