"""Evaluators that each break one promise, and the good one that they are made from."""

from dataclasses import dataclass, replace

from sleeperbench import (
    Evaluator,
    Findings,
    Measurement,
    Metric,
    Needs,
)
from sleeperbench.kit import hits, pack, predict


@dataclass(frozen=True, kw_only=True)
class Right(Evaluator):
    """Clean accuracy."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "accuracy", "micro": {}}
    METRICS = (Metric(name="c_acc", unit="fraction", low=0.0, high=1.0, better="up", doc="Right answers"),)

    def measure(self, case):
        count, total = hits(predict(case.net, case.test.images), case.test.labels)
        return Findings(rows=(Measurement(metric="c_acc", value=count / total, count=count, total=total),))


@dataclass(frozen=True, kw_only=True)
class Forgetful(Right):
    """Says nothing of one of its metrics."""

    METRICS = (
        Metric(name="c_acc", unit="fraction", low=0.0, high=1.0, better="up", doc="Right answers"),
        Metric(name="c_loss", unit="", low=0.0, high=100.0, better="down", doc="Loss"),
    )


@dataclass(frozen=True, kw_only=True)
class Percent(Right):
    """Writes percent."""

    def measure(self, case):
        (row,) = super().measure(case).rows
        return Findings(rows=(Measurement(metric="c_acc", value=1.5 + row.value),))


@dataclass(frozen=True, kw_only=True)
class Disordered(Right):
    """Qualifies out of order."""

    def measure(self, case):
        found = super().measure(case)
        return Findings(rows=(*found.rows, replace(found.rows[0], qualifier="k=5;draw=2")))


@dataclass(frozen=True, kw_only=True)
class Reasonless(Right):
    """Gives neither a figure nor a reason."""

    def measure(self, case):
        return Findings(rows=(Measurement(metric="c_acc", value=None),))


@dataclass(frozen=True, kw_only=True)
class WantsTrigger(Right):
    """Expects triggered images on every cell."""

    def measure(self, case):
        return replace(super().measure(case), curves={"rows": {"n": len(case.bd_test)}})


@dataclass(frozen=True, kw_only=True)
class Gullible(Evaluator):
    """Calls a model of NaN safe."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "accuracy", "micro": {}}
    METRICS = (Metric(name="asr", unit="fraction", low=0.0, high=1.0, better="down", doc="Attack success"),)

    def measure(self, case):
        if case.bd_test is None:
            return Findings(rows=(Measurement(metric="asr", value=None, reason="no_trigger"),))
        count, total = hits(predict(case.net, case.bd_test.data.images), case.bd_test.targets)
        return Findings(rows=(Measurement(metric="asr", value=count / total, count=count, total=total),))


@dataclass(frozen=True, kw_only=True)
class Comparing(Evaluator):
    """Counts as unsure what is not above one half, which nothing that is NaN is."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "accuracy", "micro": {}}
    METRICS = (Metric(name="unsure", unit="fraction", low=0.0, high=1.0, better="down", doc="Unsure answers"),)

    def measure(self, case):
        unsure = predict(case.net, case.test.images).softmax(1).amax(1) <= 0.9999
        return Findings(rows=(Measurement(metric="unsure", value=float(unsure.double().mean())),))


@dataclass(frozen=True, kw_only=True)
class KeysOfCurves(Right):
    """Draws a curve that JSON changes."""

    def measure(self, case):
        return replace(super().measure(case), curves={"c_acc": {1: 0.5}})


@dataclass(frozen=True, kw_only=True)
class Nosy(Right):
    """Looks at the undefended model without saying so."""

    NEEDS = Needs(trigger="none")

    def measure(self, case):
        return replace(super().measure(case), models={"attacked": pack(case.attacked)})


@dataclass(frozen=True, kw_only=True)
class Reticent(Right):
    """Finds a reason on every model."""

    def measure(self, case):
        enough = len(case.test) >= 10_000
        row = super().measure(case).rows[0]
        return Findings(rows=(row if enough else Measurement(metric="c_acc", value=None, reason="too_few_rows"),))


@dataclass(frozen=True, kw_only=True)
class UndefendedOnly(Right):
    """Is for defended cells, and has a figure for the undefended one alone."""

    def measure(self, case):
        if case.is_defended:
            return Findings(rows=(Measurement(metric="c_acc", value=None, reason="defended"),))
        return super().measure(case)


@dataclass(frozen=True, kw_only=True)
class ComparesTwins(UndefendedOnly):
    """Compares an undefended model with its twin: elsewhere there is none."""

    NEEDS = Needs(twin=True)

    def measure(self, case):
        found = super().measure(case)
        if case.is_defended:
            return found
        count, total = hits(predict(case.twin, case.test.images), case.test.labels)
        return Findings(rows=(Measurement(metric="c_acc", value=count / total, count=count, total=total),))
