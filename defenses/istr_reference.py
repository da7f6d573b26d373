"""IsTr with a clean model at hand, in place of one trained on the defender's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.classifier import load
from sleeperbench.kit.isolation import outcome
from sleeperbench.kit.row_slices import isolate_rows
from sleeperbench.kit.slices import Settings, isolate


@dataclass(frozen=True, kw_only=True)
class IsTrReference(Defense):
    """DMS-Steps whose benign reference is an independent clean model (Sun et al. 2025).

    1. The benign reference f_s is a clean model trained on the same task, as the paper has it; it is supplied.
    2. Steps 2 to 6 of `istr`: Steps, label mutation, maps E against f_s, slices, verdict.

    Differs: as `istr`, of which it drops the training on few rows. An independent clean model answers most of the
    question by itself, so this stands in an access class of its own, T1R, apart from methods with clean rows alone.

    Args:
        steps: Iterations of Steps.
        step: Their length, in pixels of [0, 1].
        targeted: Descend to every label in turn instead; claims then go by areas alone.
        slices: `topdown`; `adaptive`, the middle slice of eq. 7; or `fixed`, that of the paper's (0.01, 0.05).
        delta: What a window changes: the row's own `steps`, or `invert` its pixels.
        maps: One map and slice per `label`, the mean over 40 rows; or per `row`, as eq. 6 and 7 are written. Closest
            to the paper's text is `row` with `adaptive` or `fixed`, and `invert`.
        labels: Labels that are sliced, those that most rows turn into.
        natural: Also hand over triggers of natural backdoors: success of at least 0.7 on at most 40 % of the pixels.
    """

    INFO = {
        "title": "IsTr with a clean model",
        "paper": "https://arxiv.org/abs/2508.04094",
        "bibtex": "@article{sun2025isolate, title={Isolate Trigger: Detecting and Eliminating Adaptive Backdoor "
        "Attacks}, author={Sun, Chengrui and Zhang, Hua and Gao, Haoran and Wang, Shang and Tian, Zian and Zhao, "
        "Jianjin and Li, Qi and Zhu, Hongliang and Shen, Zongliang and Fu, Anmin}, "
        "journal={arXiv preprint arXiv:2508.04094}, year={2025}}",
        "kind": "inversion",
        "version": 3,
        "api": 1,
        "micro": {"steps": 6, "step": 0.1, "labels": 1},
        "effort": ["steps", "labels"],
        "traverses": False,
        "presumes": "all images or all of a class with the same trigger; nothing of its size, place or number",
    }
    ACCESS = Access(clean=0.05, references=1)

    steps: int = 20
    step: float = 0.05
    targeted: bool = False
    slices: Literal["topdown", "adaptive", "fixed"] = "topdown"
    delta: Literal["steps", "invert"] = "steps"
    maps: Literal["label", "row"] = "label"
    labels: int = 10
    natural: bool = False

    def __post_init__(self) -> None:
        Settings.of(self)
        if self.maps not in ("label", "row"):
            raise ValueError(f"maps is {self.maps!r}; it must be label or row")

    def run(self, case: Case) -> Outcome:
        """As `istr`, against the supplied model."""
        reference = load(case.references[0], case.ctx.device)
        look = isolate_rows if self.maps == "row" else isolate
        return outcome(look(case, reference, Settings.of(self)), natural=self.natural)
