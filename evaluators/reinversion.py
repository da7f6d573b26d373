"""Inversion once more: what an inverter still finds in the model that was repaired with its triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeperbench import EvalCase, Evaluator, Findings, Inverted, Measurement, Metric, Needs
from sleeperbench.evaluators.inversion import at_label, hits_of, mean, on_clean_models, one_per_label, share_of
from sleeperbench.kit.masks import appliable
from sleeperbench.kit.recovered import stamped

_OWN, _CLEAN, _FLAG = "reasr_repaired", "reasr_repaired_clean", "flag_repaired"


@dataclass(frozen=True, kw_only=True)
class Reinversion(Evaluator):
    """Whether a repair by unlearning took the backdoor away, or only the trigger that it was made with.

    1. The method that the repair wraps (`unlearn:istr`: istr) runs again, on the repaired model, with the same settings
       and the same access as before.
    2. Success of the triggers that it claims now, on the repaired model, over the held-out test images that this model
       classifies correctly and whose label is not the claimed one (of a source-specific claim: its source class);
       images are rounded to 8 bit. Of several claims for one label the one with the most success on the probe rows
       counts.
    3. The same triggers on independent clean models: what any model of this kind gives away.

    Headlines are means over the true targets that were claimed before the repair, one that is not claimed any more
    counting as 0; without attack over all labels claimed before, which were natural backdoors. Other labels that are
    claimed now stand beside them as `label=...` alone.

    A target that was not claimed before was not repaired, so it has no figure, nor has a repair that was made with
    nothing.

    Differs: the IsTr paper measures repairs by ASR and accuracy alone.
    """

    INFO = {
        "title": "Inversion after repair",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, "
        "journal={arXiv preprint arXiv:2508.04094}, year={2025}}",
        "kind": "inversion",
        "version": 1,
        "api": 1,
        "micro": {},
    }
    NEEDS = Needs(outcome=("model", "inverted"), clean_models=3, anew=True)
    METRICS = (
        Metric(
            name="reasr_repaired",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="down",
            doc="Test images that the repaired model classifies correctly, and with a trigger found in it as its label",
        ),
        Metric(
            name="reasr_repaired_clean",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="none",
            doc="reasr_repaired of the same triggers on independent clean models, mean over models",
        ),
        Metric(
            name="flag_repaired",
            unit="",
            low=0.0,
            high=1.0,
            better="down",
            doc="1 where the method still calls the repaired model backdoored, else 0",
        ),
    )

    def measure(self, case: EvalCase) -> Findings:
        """Success by label and as a mean, on the repaired model and on clean ones, and the verdict."""
        before, now = case.inner, case.anew
        if before is None or now is None:
            return _nothing((_OWN, _CLEAN, _FLAG), "no_repair")
        if not before.inverted:
            return _nothing((_OWN, _CLEAN, _FLAG), "no_claim")
        verdict = Measurement(metric=_FLAG, value=None, reason="no_verdict")
        if now.verdict is not None:
            verdict = Measurement(metric=_FLAG, value=float(now.verdict.score > now.verdict.threshold))
        usable = [claim for claim in now.inverted if appliable(claim)]
        if len(usable) < len(now.inverted):
            reason = "needs_stamp: a trigger found now has neither mask nor delta"
            return Findings(rows=(*_nothing((_OWN, _CLEAN), reason).rows, replace(verdict, stage="defended")))
        rows = _rows(usable, before.inverted, case)
        return Findings(rows=tuple(replace(row, stage="defended") for row in (*rows, verdict)))


def _rows(claims: Sequence[Inverted], before: Sequence[Inverted], case: EvalCase) -> list[Measurement]:
    """Success of the claims by label, and the means over the labels that count."""
    wanted, passed = sorted({claim.target for claim in before}), []
    if case.bd_test is not None:
        true = sorted(int(t) for t in case.bd_test.targets.unique())
        wanted, passed = [t for t in true if t in wanted], [t for t in true if t not in wanted]
    found = one_per_label(claims, case.net, case, stamped)
    rows = [at_label(m, label, 0.0) for label in wanted if label not in found for m in (_OWN, _CLEAN)]
    rows += [at_label(m, label, None, "no_claim") for label in passed if label not in found for m in (_OWN, _CLEAN)]
    for label, claim in found.items():
        rows.append(share_of(_OWN, hits_of(case.net, claim, case, stamped), label))
        rows.append(on_clean_models(_CLEAN, claim, case, stamped))
    return rows + [mean(m, rows, wanted) for m in (_OWN, _CLEAN)]


def _nothing(metrics: Sequence[str], reason: str) -> Findings:
    return Findings(rows=tuple(Measurement(metric=m, value=None, reason=reason, stage="defended") for m in metrics))
