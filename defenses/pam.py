"""PAM, path-aware minimisation: fine-tuning whose loss is low all along the way back to the attacked model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, ImageSet, Outcome
from sleeperbench.contracts import Case, Ctx
from sleeperbench.contracts.models import Model
from sleeperbench.kit.benign import RELEASED, Effort, Inversion, Reversed, rounds, settled
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, load, pack
from sleeperbench.kit.sharp import shifted
from sleeperbench.kit.tune import tune

RHOS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Distances of the paper's table 10."""


@dataclass(frozen=True, kw_only=True)
class PAM(Defense):
    """Path-aware minimisation (Min et al., NeurIPS 2024, algorithm 1).

    1. W_0 are the attacked weights, kept through all rounds.
    2. BTI's inversion on the present network (see `bti`) gives a generator of reversed images.
    3. In each batch int(0.2 B) + 1 rows are replaced by reversed ones under their true labels.
    4. W_d = W_0 - W over all parameters; the gradient of the cross-entropy is taken at W + rho W_d / (|W_d| + 1e-12),
       one norm over all of them, and applied at W by SGD. In the first step W_d is 0 and so is the shift.
    5. Steps 2 to 4 are repeated for `rounds` rounds.
    6. BatchNorm's running statistics, which step 4 took at the shifted weights, are estimated anew at the last ones,
       in one pass over the clean rows.

    All parameters get gradients. BatchNorm is in train mode under step 4. The last weights are kept. The path also
    holds them with the statistics of step 4 (`released`), so that evaluator `selection` measures both.

    Differs: the released code leaves out step 6, keeps SGD's momentum from round to round, and turns the generator's
    gradients off in step 4 of the first round for good, so that later rounds do not train it; here they do. What
    differs in the inversion stands at `bti`. The paper takes rho 0.5 for Blended and SSBA and 0.9 for BadNets and
    LC, which a defender cannot know; here it is 0.5 for all, or with `rho` left out the largest of 0.1, 0.3 ... 0.9
    that the honest rule accepts on rows held out. rho is an absolute distance, so it means something else on another
    architecture: `chosen` shows |W_d| at the end beside it. Epochs of 2,500 rows in batches of 128 are kept as steps;
    an epoch drops its last short batch.

    Args:
        rho: Distance from W towards W_0, and past it while |W_d| is smaller; None for the honest choice.
        rounds: Rounds of inversion and repair.
        steps: Updates of step 4 per round; 30 epochs.
        lr: Learning rate of SGD, momentum 0.1, no weight decay.
        share: Share of a batch that is reversed.
        pretrain_steps: Updates of the generator towards the identity; 50 epochs.
        mask_steps: Updates of the mask per round; 20 epochs.
        generator_steps: Updates of the generator per round; 30 epochs.
        width: Filters of the first level of the generator, a U-Net of four.
    """

    INFO = {
        "title": "PAM",
        "paper": "https://arxiv.org/abs/2410.09838",
        "bibtex": "@inproceedings{min2024uncovering, title={Uncovering, Explaining, and Mitigating the Superficial "
        "Safety of Backdoor Defense}, author={Min, Rui and Qin, Zeyu and Zhang, Nevin L. and Shen, Li and Cheng, "
        "Minhao}, booktitle={Advances in Neural Information Processing Systems}, year={2024}}",
        "kind": "repair",
        "version": 3,
        "api": 1,
        "micro": {"rounds": 1, "steps": 2, "pretrain_steps": 2, "mask_steps": 2, "generator_steps": 2, "width": 2},
        "effort": ["rounds", "steps", "pretrain_steps", "mask_steps", "generator_steps"],
        "presets": {"reduced": {"pretrain_steps": 80, "mask_steps": 32, "generator_steps": 48, "steps": 48}},
    }
    ACCESS = Access(clean=0.05)

    rho: float | None = 0.5
    rounds: int = 3
    steps: int = 600
    lr: float = 0.01
    share: float = 0.2
    pretrain_steps: int = 1000
    mask_steps: int = 400
    generator_steps: int = 600
    width: int = 32

    def __post_init__(self) -> None:
        if self.rho is not None and self.rho < 0:
            raise ValueError(f"rho is {self.rho}; it must be at least 0, or be left out")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; at least 1 is needed")

    def run(self, case: Case) -> Outcome:
        """The repaired model, as released and with statistics of its own, and, where rho was chosen, all candidates."""
        if self.rho is not None:
            net, about = self.repaired(case, case.clean, self.rho)
            model = settled(net, case.clean, case.ctx)
            return Outcome(model=model, chosen=about, path={f"rho={self.rho:g}": model, RELEASED: pack(net)})
        rows, held = split(case)
        released: dict[str, Model] = {}
        picked = pick(case.net, self.candidates(case, rows, released), held, ctx=case.ctx, what="rho")
        if picked.name is None:
            return Outcome(chosen={"rho": None, **picked.about}, path=picked.path)
        chosen = {"rho": picked.about["candidates"][picked.name]["rho"], **picked.about}
        path = {**picked.path, RELEASED: released[picked.name]}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=path)

    def candidates(
        self, case: Case, rows: ImageSet, released: dict[str, Model]
    ) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """One model per rho; `released` gets each as it was before step 6."""
        for rho in RHOS:
            name = f"rho={rho:g}"
            net, about = self.repaired(case, rows, rho)
            released[name] = pack(net)
            yield name, load(settled(net, rows, case.ctx), case.ctx.device), about

    def repaired(self, case: Case, rows: ImageSet, rho: float) -> tuple[Classifier, dict[str, Any]]:
        """The network after all rounds on `rows`, and what is told of it."""
        start = [p.detach().clone() for p in case.net.parameters()]

        def minimise(net: Classifier, inversion: Inversion, ctx: Ctx) -> Model:
            hooks = PathAware(start, rho, inversion, self.share)
            return tune(net, rows, ctx=ctx, lr=self.lr, steps=self.steps, momentum=0.1, hooks=hooks)

        effort = Effort(
            pretrain=self.pretrain_steps, mask=self.mask_steps, generate=self.generator_steps, width=self.width
        )
        *_, (net, inversion) = rounds(case.net, rows, case.ctx, effort, self.rounds, minimise)
        gone = torch.stack([(s.to(p.device) - p).norm() for s, p in zip(start, net.parameters(), strict=True)]).norm()
        told = {"rho": rho, "distance": float(gone.detach()), "target": inversion.target, "share": inversion.share}
        return net, told


class PathAware(Reversed):
    """A step by the gradient at a point towards the attacked weights."""

    def __init__(self, start: Sequence[Tensor], rho: float, inversion: Inversion, share: float) -> None:
        super().__init__(inversion.generator, share)
        self.start, self.rho = start, rho

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Gradient at the shifted weights, update of the original ones."""
        params = list(net.parameters())
        opt.zero_grad(set_to_none=True)
        with shifted(params, path_shift(self.start, params, self.rho)):
            loss = self.loss(net, x, y, mark)
            loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        return loss.detach()


@torch.no_grad()
def path_shift(start: Sequence[Tensor], params: Sequence[Tensor], rho: float) -> list[Tensor]:
    """The shift rho W_d / (|W_d| + 1e-12) with W_d = start - params, one norm over all tensors."""
    back = [s.to(p.device) - p for s, p in zip(start, params, strict=True)]
    norm = torch.stack([b.norm() for b in back]).norm() + 1e-12
    return [b * (rho / norm) for b in back]
