"""FT-SAM: fine-tuning that looks for flat minima."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Model
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.sharp import sam_shift, shifted, still_statistics
from sleeperbench.kit.tune import tune

NAMES = {f"rho={rho:g}": rho for rho in (0.5, 1.0, 2.0, 4.0, 8.0)}
"""What the honest choice tries, the least aggressive first: the published radii lie among them."""


@dataclass(frozen=True, kw_only=True)
class FTSAM(Defense):
    """Sharpness-aware fine-tuning (Zhu et al., ICCV 2023), with the settings of BackdoorBench.

    Minimises the largest loss at weights near w, over | eps / |w| | <= rho (one norm over all tensors). Per step, on a
    batch of clean rows, cropped and flipped:

    1. g, the gradient of the loss at w.
    2. eps = rho w^2 g / (| |w| g | + 1e-12); without `adaptive` rho g / (| g | + 1e-12).
    3. g', the gradient at w + eps on the same batch; w gets its exact values back.
    4. An SGD step (momentum 0.9, weight decay at w) with g'.

    The loss is cross-entropy against 1 - `smoothing` for the label and the rest spread evenly over the other classes.
    All parameters are tuned, biases and BatchNorm's among them. BatchNorm normalises by the batch in both passes and
    updates its running statistics in the first alone. It stops after `steps` and keeps the last weights. A step costs
    two passes forth and two back per image. With a given `rho` all clean rows are trained on. With None every radius of
    0.5, 1, 2, 4, 8 is tried on the rows that `kit.candidates.split` leaves, and the largest that the honest rule
    accepts on the others is kept; all are in the outcome's path, but for those that diverge.

    Differs: the published 100 epochs on 2,500 CIFAR-10 rows in batches of 256 are kept as 1,000 steps, whatever the
    number of rows. The cosine falls to zero over all steps; BackdoorBench moves it per batch with a period in epochs,
    so there it swings up and down. Rows are not balanced over classes beyond what the pool is. The published code can
    also take off a part of g across g'; its factor there is 0, and it is left out.

    Args:
        rho: Radius, in units of the weights' own size where `adaptive`; None for the honest choice.
        adaptive: Scale each weight's shift by its size. Plain radii are another scale: about 0.05 to 0.5.
        smoothing: Share of the label's mass that goes to the other classes, 0..1.
        lr: Learning rate at the start of the cosine.
        steps: Updates.
        batch: Rows per update; all rows where there are fewer.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "FT-SAM",
        "paper": "https://arxiv.org/abs/2304.11823",
        "bibtex": "@inproceedings{zhu2023enhancing, title={Enhancing Fine-Tuning Based Backdoor Defense with "
        "Sharpness-Aware Minimization}, author={Zhu, Mingli and Wei, Shaokui and Shen, Li and Fan, Yanbo and Wu, "
        "Baoyuan}, booktitle={IEEE/CVF International Conference on Computer Vision}, year={2023}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"steps": 10, "batch": 64},
        "effort": ["steps"],
        "presets": {"reduced": {"steps": 800}},
    }
    ACCESS = Access(clean=0.05)

    rho: float | None = 2.0
    adaptive: bool = True
    smoothing: float = 0.1
    lr: float = 0.01
    steps: int = 1000
    batch: int = 256
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.rho is not None and self.rho < 0:
            raise ValueError(f"rho is {self.rho}; it must be at least 0, or be left out")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must lie in 0..1, without 1")

    def run(self, case: Case) -> Outcome:
        """The tuned model and, where the radius was chosen, all candidates."""
        if self.rho is not None:
            return Outcome(model=self.tuned(case, case.clean, self.rho))
        rows, held = split(case)
        picked = pick(case.net, self.candidates(case, rows), held, ctx=case.ctx, what="rho")
        if picked.name is None:
            return Outcome(chosen={"rho": None, **picked.about}, path=picked.path)
        chosen = {"rho": NAMES[picked.name], **picked.about}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=picked.path)

    def candidates(self, case: Case, rows: ImageSet) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """One model per radius at which training stays finite."""
        for name, rho in NAMES.items():
            try:
                model = self.tuned(case, rows, rho)
            except FloatingPointError:
                continue
            yield name, load(model, case.ctx.device), {}

    def tuned(self, case: Case, rows: ImageSet, rho: float) -> Model:
        """The model after fine-tuning on `rows` at one radius."""
        return tune(
            case.net,
            rows,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
            hooks=SharpnessAware(rho, self.adaptive, self.smoothing),
        )


class SharpnessAware(TrainHooks):
    """The gradient of the smoothed loss at the shifted weights, applied to the original ones."""

    def __init__(self, rho: float, adaptive: bool, smoothing: float) -> None:
        super().__init__()
        self.rho, self.adaptive, self.smoothing = rho, adaptive, smoothing

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Cross-entropy against 1 - s for the label and s / (K - 1) for every other class."""
        logits = net(x)
        k = logits.shape[1]
        # torch spreads its share over all K classes, the label's own among them.
        return F.cross_entropy(logits, y, label_smoothing=min(1.0, self.smoothing * k / (k - 1)))

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Two passes and one update; the loss is that at the original weights."""
        opt.zero_grad(set_to_none=True)
        loss = self.loss(net, x, y, mark)
        loss.backward()  # type: ignore[no-untyped-call]
        moved = [p for p in net.parameters() if p.grad is not None]
        up = sam_shift(moved, [p.grad for p in moved if p.grad is not None], self.rho, adaptive=self.adaptive)
        opt.zero_grad(set_to_none=True)
        with shifted(moved, up), still_statistics(net):
            self.loss(net, x, y, mark).backward()  # type: ignore[no-untyped-call]
        opt.step()
        return loss.detach()
