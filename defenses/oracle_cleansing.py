"""Oracle cleansing: the poisoned rows themselves, as no detector can name them better."""

from __future__ import annotations

from dataclasses import dataclass

from sleeperbench import Access, Defense, Mark, Outcome
from sleeperbench.contracts import Case


@dataclass(frozen=True, kw_only=True)
class OracleCleansing(Defense):
    """Drop exactly the rows that carry a working trigger (oracle).

    `retrain:oracle_cleansing` is what any cleanser could reach at best. Covers stay: they carry their true labels.
    """

    INFO = {
        "title": "Oracle cleansing",
        "paper": "",
        "bibtex": "",
        "kind": "cleansing",
        "version": 1,
        "api": 1,
        "micro": {},
        "traverses": False,
        "presumes": "nothing: it is told which rows carry the trigger",
    }
    ACCESS = Access(model="none", clean=0, train=True, oracle=True)

    def run(self, case: Case) -> Outcome:
        """All rows but the poisoned ones; a row's suspicion is 1 or 0."""
        dirty = case.marks == Mark.DIRTY
        return Outcome(keep=~dirty, suspicion=dirty.double(), chosen={"dropped": int(dirty.sum())})
