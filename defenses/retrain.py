"""Retrain: train anew on the rows that another defense keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class Retrain(Defense):
    """Train from scratch on the rows that the wrapped defense keeps, under its labels where it gives any.

    The suite's own recipe is taken with its epochs, as for the attacked model: fewer rows are fewer steps.
    """

    INFO = {
        "title": "Retraining on kept rows",
        "paper": "",
        "bibtex": "",
        "kind": "in_training",
        "version": 1,
        "api": 1,
        "micro": {},
        "wrapper": True,
    }
    ACCESS = Access(model="none", clean=0, train=True, control=True, inner="keep")

    def run(self, case: Case) -> Outcome:
        """The new model.

        Raises:
            NotApplicable: the wrapped defense marks no rows.
        """
        keep, relabel = case.inner.keep, case.inner.relabel
        if keep is None and relabel is None:
            raise NotApplicable("no_marks")
        rows = case.train if relabel is None else replace(case.train, labels=relabel)
        changed = 0 if relabel is None else int((relabel != case.train.labels).sum())
        rows = rows if keep is None else rows.rows(keep)
        net = build(case.spec, seed=case.ctx.derive("init"))
        fit(net, rows, case.recipe, case.ctx)
        return Outcome(model=pack(net), chosen={"kept": len(rows), "rows": len(case.train), "relabelled": changed})
