"""What a defense itself took: images through the network each way, and questions asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sleeperbench import EvalCase, Evaluator, Findings, Measurement, Metric, Needs


@dataclass(frozen=True, kw_only=True)
class SpentOnDefense(Evaluator):
    """Images that a defense sent through networks, and images that it asked a query-only model about.

    A count in images says how much work a method is, whatever machine it ran on. It is the sum over the tasks that the
    defense consists of; each also stands alone as `phase=run`, `phase=prepare` (what is done once for all models),
    `phase=wrapped` (what a wrapper wraps: the inversion under `unlearn:`, the cleansing under `retrain:`) and
    `phase=score` (the second phase of an input detector, over the images that it was asked about).

    Unlike other evaluators' rows, these carry in `seconds`, `cpu_seconds`, `peak_mb` and `device` what those tasks
    took, which is the defense's own time; it depends on the machine, so no figure is made of it.

    Left out: the attack, and the clean models that the engine trains for all (`references`). A wrapped task that
    several cells share counts in full in each.
    """

    INFO = {
        "title": "Cost",
        "paper": "",
        "bibtex": "",
        "kind": "cost",
        "version": 1,
        "api": 1,
        "micro": {},
    }
    NEEDS = Needs(outcome=("cost", "scores"), trigger="none")
    METRICS = (
        Metric(
            name="cost_forwards",
            unit="images",
            low=0.0,
            high=math.inf,
            better="none",
            doc="Images through a forward pass while the defense ran",
        ),
        Metric(
            name="cost_backwards",
            unit="images",
            low=0.0,
            high=math.inf,
            better="none",
            doc="Images through a backward pass while the defense ran",
        ),
        Metric(
            name="cost_queries",
            unit="images",
            low=0.0,
            high=math.inf,
            better="none",
            doc="Images that the defense asked a query-only model about",
        ),
    )

    def measure(self, case: EvalCase) -> Findings:
        """The three sums, and the same per phase."""
        rows = []
        for metric in self.METRICS:
            each = {p: getattr(c, metric.name.removeprefix("cost_")) for p, c in case.spent.items()}
            rows.append(Measurement(metric=metric.name, value=float(sum(each.values()))))
            rows += [Measurement(metric=metric.name, value=float(n), qualifier=f"phase={p}") for p, n in each.items()]
        return Findings(rows=tuple(rows))
