"""SCALE-UP: the answer to a triggered image survives when all its pixels are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.pixels import to_float


@dataclass(frozen=True, kw_only=True)
class ScaleUp(Defense):
    """Scaled prediction consistency, SPC, from hard labels (Guo et al., ICLR 2023).

    1. An input is multiplied by each factor n of `factors` and cut to [0, 1]; SPC is the share of these images that
       get the label of the input itself.
    2. `data_limited`: SPC of the clean rows is taken with their true labels in place of the answers; mean and standard
       deviation per class normalise the SPC of an input that gets that class. `data_free`: SPC itself.
    3. Inputs whose value exceeds `threshold` are called triggered.

    Scores are SPC or the normalised SPC. Steps of 1 / 5 are coarse: ties are common.

    Differs: BackdoorBox normalises by mean and deviation over all classes together; here, as in the paper, by class. A
    class with fewer than two clean rows takes both from all rows; one whose rows agree takes the deviation of all
    rows, and where those agree too, 1.

    Args:
        factors: What pixels are multiplied by.
        mode: `data_limited` or `data_free`.
        threshold: Value above which an input is called triggered.
    """

    INFO = {
        "title": "SCALE-UP",
        "paper": "https://arxiv.org/abs/2302.03251",
        "bibtex": "@inproceedings{guo2023scale, title={{SCALE-UP}: An Efficient Black-box Input-level Backdoor "
        "Detection via Analyzing Scaled Prediction Consistency}, author={Guo, Junfeng and Li, Yiming and Chen, Xun "
        "and Guo, Hanqing and Sun, Lichao and Liu, Cong}, booktitle={International Conference on Learning "
        "Representations}, year={2023}}",
        "kind": "detection",
        "version": 3,
        "api": 1,
        "micro": {},
        "scores": True,
        "traverses": False,
        "presumes": "a trigger that still works when its pixels are multiplied",
    }
    ACCESS = Access(model="labels", clean=0.05)

    factors: tuple[float, ...] = (3.0, 5.0, 7.0, 9.0, 11.0)
    mode: Literal["data_limited", "data_free"] = "data_limited"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 1:
            raise ValueError(f"factors are {self.factors}: give at least one, all above 1")
        if self.mode not in ("data_limited", "data_free"):
            raise ValueError(f"mode is {self.mode!r}; it may be 'data_limited' or 'data_free'")

    def run(self, case: Case) -> Outcome:
        """Mean and deviation of SPC per class, as the second phase needs them."""
        x, labels, classes = to_float(case.clean.images), case.clean.labels, case.spec.classes
        answer, scaled = case.net(x), self._scaled(case.net, x)
        spc = consistency(scaled, labels)
        mean, deviation = torch.zeros(classes), torch.ones(classes)
        if self.mode == "data_limited" and len(spc):
            mean, deviation = moments(spc, labels, classes)
        value = (consistency(scaled, answer) - mean[answer]) / deviation[answer]
        return Outcome(
            state=({"mean": mean, "deviation": deviation}, {}),
            alarm=self.threshold,
            chosen={
                "clean_spc": round(float(spc.mean()), 4) if len(spc) else None,
                "clean_flagged": round(float((value > self.threshold).double().mean()), 4) if len(spc) else None,
            },
        )

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: nn.Module, x: Tensor) -> Tensor:
        """SPC (N,), normalised by the class of the answer in mode `data_limited`."""
        answer = net(x)
        mean, deviation = (state[0][n].to(x.device) for n in ("mean", "deviation"))
        return (consistency(self._scaled(net, x), answer) - mean[answer]) / deviation[answer]

    def _scaled(self, net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Labels (factors, N) of the multiplied images."""
        return torch.stack([net((x * n).clamp(0, 1)) for n in self.factors])


def consistency(scaled: Tensor, labels: Tensor) -> Tensor:
    """SPC (N,): share of the answers to multiplied images, (factors, N), that are `labels`."""
    return (scaled == labels).float().mean(0)


def moments(spc: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (K,) of the values of each class; see `Differs` for classes without."""
    mean = torch.full((classes,), float(spc.mean()))
    whole = float(spc.std(unbiased=False)) or 1.0
    deviation = torch.full((classes,), whole)
    for c in range(classes):
        own = spc[labels == c]
        if len(own) > 1:
            mean[c], deviation[c] = own.mean(), float(own.std(unbiased=False)) or whole
    return mean, deviation
