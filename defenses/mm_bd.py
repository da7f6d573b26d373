"""MM-BD: the target of a backdoor is the class whose logit can be raised furthest above all others, by any image."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome, Verdict
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.anomaly import LEAST

_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Images per pass through the net, at most."""
_SMALLEST = 1e-300
"""Where a p-value is cut off, so that its logarithm is finite."""


@dataclass(frozen=True, kw_only=True)
class MMBD(Defense):
    """Maximum margin backdoor detection (Wang, Xiang, Miller, Kesidis, S&P 2024); without any data.

    1. For every class c, `starts` images uniform in [0, 1] ascend the margin z_c - max over k != c of z_k by gradient
       steps of length `lr` times the gradient; the net sees them cut to [0, 1]. A class stops after `steps` steps, or
       when the sum of its margins has changed by less than the share `tolerance` of the last.
    2. r_c is the largest margin of the class's images.
    3. A gamma distribution (shape, location and scale, by maximum likelihood) is fitted to all r but the largest. With
       F its distribution function, p = 1 - F(r_max)^K.
    4. Backdoored iff p < `level`; the suspected target is the class of r_max.

    The score is -log10 p and the threshold -log10 `level`. Each class's own score is that of its r_c under the same F.
    The margins of all classes stand in `chosen`.

    Differs: the authors name a momentum of 0.2, but make a new optimiser at each step, so that it never acts; here it
    is left out. p = 1 - F^K is computed from 1 - F, which does not round to 0 or 1. Fewer than six classes leave no
    null to fit, and margins that admit no fit are declined.

    Args:
        starts: Images per class.
        steps: Gradient steps, at most.
        lr: Step length, in pixels per unit of the gradient.
        tolerance: Relative change of a class's sum of margins below which it stops.
        level: p-value below which the model is backdoored.
    """

    INFO = {
        "title": "Maximum margin backdoor detection",
        "paper": "https://arxiv.org/abs/2205.06900",
        "bibtex": "@inproceedings{wang2024mmbd, title={{MM-BD}: Post-Training Detection of Backdoor Attacks with "
        "Arbitrary Backdoor Pattern Types Using a Maximum Margin Statistic}, author={Wang, Hang and Xiang, Zhen and "
        "Miller, David J. and Kesidis, George}, booktitle={IEEE Symposium on Security and Privacy}, year={2024}}",
        "kind": "detection",
        "version": 1,
        "api": 1,
        "micro": {"starts": 2, "steps": 5},
        "effort": ["starts", "steps"],
        "traverses": True,
        "presumes": "one target, whose logit can be raised further than any other; nothing of the trigger's shape",
    }
    ACCESS = Access(clean=0)

    starts: int = 30
    steps: int = 300
    lr: float = 0.01
    tolerance: float = 1e-5
    level: float = 0.05

    def __post_init__(self) -> None:
        if min(self.starts, self.steps) < 1 or self.lr <= 0:
            raise ValueError("starts, steps and lr must be positive")
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie in (0, 1), not {self.level}")

    def run(self, case: Case) -> Outcome:
        """The verdict, with a score per class.

        Raises:
            NotApplicable: too few classes, or margins that no gamma distribution fits.
        """
        if case.spec.classes < LEAST:
            raise NotApplicable(f"too_few_classes: {case.spec.classes}; the null needs {LEAST}")
        margins = self.margins(case.net, case.spec.classes, case.spec.shape, case.ctx)
        scores = -p_values(margins).clamp(min=_SMALLEST).log10()
        return Outcome(
            verdict=Verdict(score=float(scores.max()), threshold=-math.log10(self.level), label_scores=scores),
            chosen={"margins": [round(r, 4) for r in margins.tolist()], "target": int(margins.argmax())},
        )

    def margins(self, net: nn.Module, classes: int, shape: tuple[int, int, int], ctx: Ctx) -> Tensor:
        """The r of every class, float64 (K,), on the CPU; all classes that have not stopped share a pass."""
        net = copy.deepcopy(net).to(ctx.device).eval().requires_grad_(False)
        x = torch.rand(classes, self.starts, *shape, generator=ctx.generator("starts")).to(ctx.device)
        best = torch.zeros(classes, dtype=torch.float64)
        last = torch.full((classes,), 1000.0, dtype=torch.float64)
        live = torch.arange(classes)
        per = max(1, _AT_ONCE.get(ctx.device.type, 256) // self.starts)
        for step in range(self.steps):
            for part in live.split(per):
                rows = part.to(ctx.device)
                seen = x[rows].requires_grad_()
                found = margin(net(seen.flatten(0, 1).clamp(0, 1)), rows.repeat_interleave(self.starts))
                # Each image has its own margin, so the gradient of the sum is that of each.
                (slope,) = torch.autograd.grad(found.sum(), seen)
                x[rows] += self.lr * slope
                best[part] = found.detach().view(len(part), -1).amax(1).double().cpu()
                total = found.detach().view(len(part), -1).double().sum(1).cpu()
                live = live[~torch.isin(live, part[(total - last[part]).abs() / last[part].abs() < self.tolerance])]
                last[part] = total
                ctx.cost.forwards += len(found)
                ctx.cost.backwards += len(found)
            ctx.progress(step + 1, self.steps, "margins")
            if not len(live):
                break
        return best


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, (N,)."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)


def p_values(margins: Tensor) -> Tensor:
    """1 - F(r_c)^K per class, F the gamma distribution fitted to all margins but the largest; float64 (K,).

    Raises:
        NotApplicable: no gamma distribution fits these margins.
    """
    null = np.delete(margins.double().numpy(), int(margins.argmax()))
    try:
        with np.errstate(all="ignore"):
            shape, loc, scale = stats.gamma.fit(null)
            beyond = stats.gamma.sf(margins.double().numpy(), shape, loc=loc, scale=scale)
            p = -np.expm1(len(margins) * np.log1p(-beyond))
    except (ValueError, RuntimeError) as e:
        raise NotApplicable(f"no_null: {e}") from e
    if not np.isfinite(p).all():
        raise NotApplicable("no_null: the margins admit no gamma distribution")
    return torch.from_numpy(p)
