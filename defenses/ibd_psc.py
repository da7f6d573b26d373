"""IBD-PSC: the answer to a triggered image stays sure when the last BatchNorm layers are amplified."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, NotApplicable
from sleeperbench.kit.classifier import Classifier
from sleeperbench.kit.gates import channels
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating

_BATCH = 500
"""Images at a time."""


@dataclass(frozen=True, kw_only=True)
class IBDPSC(Defense):
    """Parameter-oriented scaling consistency, PSC, of an input (Hou et al., ICML 2024).

    1. F_k is the model with weight and bias of its last k BatchNorm layers times `factor`; running statistics stay.
    2. The first k = 1, 2, ... at which F_k is wrong on more than the share `error` of the clean rows is k_0.
    3. PSC of an input: the mean probability that F_k, k = k_0 ... k_0 + `models` - 1, give to the label y of the
       model itself. Where fewer layers are left, the model with all of them amplified counts for each k beyond.
    4. Inputs whose PSC exceeds `threshold` are called triggered.

    Scores are the log-odds of PSC, ln(PSC / (1 - PSC)): the same order, but PSC itself is 1 in floating point for all
    inputs that the amplified models are sure enough of. Layers are counted in the order in which the architecture holds
    them, those of shortcuts among them.

    Differs: released code looks for k_0 as in step 2, but then takes F_k for k_0 + 1 ... k_0 + n. It does not try to
    amplify all layers, which here may be k_0, and ends with an error where no k is found; here it declines. It scores
    by PSC in float32 and calls equality triggered too.

    Args:
        factor: What weights and biases are multiplied by, above 1; the paper's omega.
        models: Amplified models that PSC is the mean over; the paper's n.
        error: Share of clean rows that the first of them must get wrong, 0 to below 1; the paper's xi.
        threshold: PSC above which an input is called triggered, between 0 and 1.
    """

    INFO = {
        "title": "IBD-PSC",
        "paper": "https://arxiv.org/abs/2405.09786",
        "bibtex": "@inproceedings{hou2024ibd, title={{IBD-PSC}: Input-level Backdoor Detection via Parameter-oriented "
        "Scaling Consistency}, author={Hou, Linshan and Feng, Ruili and Hua, Zhongyun and Luo, Wei and Zhang, Leo Yu "
        "and Li, Yiming}, booktitle={International Conference on Machine Learning}, pages={18992--19022}, "
        "year={2024}}",
        "kind": "detection",
        "version": 3,
        "api": 1,
        "micro": {"factor": 3.0, "error": 0.2},
        "effort": ["models"],
        "scores": True,
        "traverses": False,
        "presumes": "a trigger whose label stays sure when weights grow; nothing of its shape",
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"bn"})

    factor: float = 1.5
    models: int = 5
    error: float = 0.6
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.factor > 1 or self.models < 1:
            raise ValueError(f"factor is {self.factor}, models {self.models}: give more than 1, and at least 1")
        if not 0 <= self.error < 1:
            raise ValueError(f"error is {self.error}: give a share from 0 to below 1")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}: give a probability between 0 and 1")

    def run(self, case: Case) -> Outcome:
        """The number k_0 of layers to begin with, as the second phase needs it.

        Raises:
            NotApplicable: no BatchNorm layer with a weight, no clean rows, or too few of them are wrong, however many
                layers are amplified.
        """
        net, rows, ctx = case.net, len(case.clean), case.ctx
        names = list(channels(net))
        if not rows:
            raise NotApplicable("too_few_clean_rows: 0")
        x, labels = to_float(case.clean.images.to(device_of(net))), case.clean.labels.cpu()
        errors: list[float] = []
        for k in range(1, len(names) + 1):
            answers = self.logits(net, names[-k:], x).argmax(1).cpu()
            errors.append(float((answers != labels).double().mean()))
            ctx.cost.forwards += rows
            if errors[-1] > self.error:
                break
        else:
            worst = f"{max(errors):.3f} of the clean rows wrong with up to {len(names)} layers amplified"
            raise NotApplicable(f"error_not_reached: at most {worst}, not above {self.error:g}")
        first = len(errors)
        odds, alarm = self.consistency(net, first, x), math.log(self.threshold / (1 - self.threshold))
        ctx.cost.forwards += rows * (1 + len(self.amplified(first, len(names))))
        return Outcome(
            state=({}, {"first": first}),
            alarm=alarm,
            chosen={
                "layers": len(names),
                "first": first,
                "clean_error": round(errors[-1], 4),
                "clean_psc": round(float(odds.sigmoid().mean()), 4),
                "clean_flagged": round(float((odds > alarm).double().mean()), 4),
            },
        )

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: Classifier, x: Tensor) -> Tensor:
        """Log-odds of PSC (N,), float64; above those of the threshold is an alarm."""
        return self.consistency(net, state[1]["first"], x)

    def consistency(self, net: Classifier, first: int, x: Tensor) -> Tensor:
        """Log-odds of PSC (N,), float64, of images (N, C, H, W) in [0, 1], beginning with the last `first` layers."""
        names = list(channels(net))
        label = self.logits(net, [], x).argmax(1, keepdim=True)
        sure, unsure = [], []
        for k, times in self.amplified(first, len(names)).items():
            z = self.logits(net, names[-k:], x)
            margin = z.gather(1, label).squeeze(1) - z.scatter(1, label, -torch.inf).logsumexp(1)
            # Shares of the label and of the others, both as logarithms: their quotient needs no 1 - PSC.
            sure.append(F.logsigmoid(margin) + math.log(times))
            unsure.append(F.logsigmoid(-margin) + math.log(times))
        return torch.stack(sure).logsumexp(0) - torch.stack(unsure).logsumexp(0)

    def amplified(self, first: int, layers: int) -> Counter[int]:
        """How many layers each of the models amplifies, and how often that number occurs."""
        return Counter(min(k, layers) for k in range(first, first + self.models))

    def logits(self, net: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
        """Logits (N, K), float64, of the model with the named layers amplified; the net itself stays."""
        tensors = {f"{n}.{t}": net.get_submodule(n).get_parameter(t) for n in names for t in ("weight", "bias")}
        with evaluating(net), torch.no_grad():
            louder = {name: self.factor * t for name, t in tensors.items()}
            parts = [functional_call(net, louder, (part,)).double() for part in x.split(_BATCH)]
        return torch.cat(parts)
