"""Training anew on the defender's clean rows: what these rows are worth without the suspicious model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.train import fit


@dataclass(frozen=True, kw_only=True)
class ScratchOnClean(Defense):
    """Train a new network on the clean rows alone (control).

    A repair that is not more accurate than this one saved nothing of the model that it was given, and no backdoor can
    be left here: none of its weights comes from the attacked model.

    The suite's recipe (rate, decay, schedule, augmentation) is taken with as many steps as plain fine-tuning takes.

    Args:
        steps: Updates; those of `ft`.
        batch: Rows per update; all rows where there are fewer.
    """

    INFO = {
        "title": "Scratch on clean rows",
        "paper": "",
        "bibtex": "",
        "kind": "repair",
        "control": True,
        "version": 1,
        "api": 1,
        "micro": {"steps": 20, "batch": 64},
        "effort": ["steps"],
        "descends": False,
    }
    ACCESS = Access(model="none", clean=0.05)

    steps: int = 1000
    batch: int = 256

    def run(self, case: Case) -> Outcome:
        """The new model; all clean rows are trained on, since nothing is chosen."""
        net = build(case.spec, seed=case.ctx.derive("init"))
        fit(net, case.clean, replace(case.recipe, batch=self.batch), case.ctx, steps=self.steps)
        return Outcome(model=pack(net))
