"""BatchNorm refresh: what re-estimated statistics alone do."""

from __future__ import annotations

from dataclasses import dataclass

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.batchnorm import refresh


@dataclass(frozen=True, kw_only=True)
class BNRefresh(Defense):
    """Re-estimate BatchNorm's running statistics on clean rows and change no weight.

    A control: fine-tuning refreshes these statistics too, and this row says how much of its effect they explain.

    Args:
        batch: Rows per batch, of which each gives one mean and variance.
    """

    INFO = {
        "title": "BatchNorm refresh",
        "paper": "",
        "bibtex": "",
        "kind": "repair",
        "control": True,
        "version": 1,
        "api": 1,
        "micro": {},
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"bn"})

    batch: int = 256

    def run(self, case: Case) -> Outcome:
        """The model with fresh statistics; all clean rows are used, since nothing is chosen."""
        return Outcome(model=refresh(case.net, case.clean.images, batch=self.batch, ctx=case.ctx))
