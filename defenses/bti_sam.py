"""BTI with a sharpness-aware step: flatness in place of PAM's path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case, Ctx
from sleeperbench.contracts.models import Model
from sleeperbench.kit.benign import RELEASED, Effort, Inversion, Reversed, rounds, settled
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.sharp import sam_shift, shifted
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class BTISAM(Defense):
    """PAM's data and loop with SAM's shift instead of the path's (Min et al., NeurIPS 2024, table 11).

    As `pam`, but the gradient is taken at W + rho g / (|g| + 1e-12), g the gradient at W: two passes per step. The
    authors' point is that flatness alone does not keep the backdoor from being woken.

    All parameters get gradients; BatchNorm is in train mode, its running statistics move in both passes. At the end
    they are estimated anew in one pass over the clean rows; the path also holds the model as it was before
    (`released`).

    Differs: the paper does not give rho; 0.05 is that of plain SAM's own paper (Foret et al. 2021), fixed beforehand,
    and the default of the released optimiser. The released code holds this variant but never calls it, and leaves the
    statistics as they are at the end. What differs in the rounds stands at `pam`, in the inversion at `bti`. Epochs of
    2,500 rows in batches of 128 are kept as steps; an epoch drops its last short batch.

    Args:
        rho: Radius of the shift, not adaptive.
        rounds: Rounds of inversion and repair.
        steps: Updates per round; 30 epochs.
        lr: Learning rate of SGD, momentum 0.1, no weight decay.
        share: Share of a batch that is reversed.
        pretrain_steps: Updates of the generator towards the identity; 50 epochs.
        mask_steps: Updates of the mask per round; 20 epochs.
        generator_steps: Updates of the generator per round; 30 epochs.
        width: Filters of the first level of the generator, a U-Net of four.
    """

    INFO = {
        "title": "BTI with SAM",
        "paper": "https://arxiv.org/abs/2410.09838",
        "bibtex": "@inproceedings{min2024uncovering, title={Uncovering, Explaining, and Mitigating the Superficial "
        "Safety of Backdoor Defense}, author={Min, Rui and Qin, Zeyu and Zhang, Nevin L. and Shen, Li and Cheng, "
        "Minhao}, booktitle={Advances in Neural Information Processing Systems}, year={2024}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {"rounds": 1, "steps": 2, "pretrain_steps": 2, "mask_steps": 2, "generator_steps": 2, "width": 2},
        "effort": ["rounds", "steps", "pretrain_steps", "mask_steps", "generator_steps"],
        "presets": {"reduced": {"pretrain_steps": 77, "mask_steps": 30, "generator_steps": 46, "steps": 46}},
    }
    ACCESS = Access(clean=0.05)

    rho: float = 0.05
    rounds: int = 3
    steps: int = 600
    lr: float = 0.01
    share: float = 0.2
    pretrain_steps: int = 1000
    mask_steps: int = 400
    generator_steps: int = 600
    width: int = 32

    def run(self, case: Case) -> Outcome:
        """The model after the last round, as released and with statistics of its own."""

        def flatten(net: Classifier, inversion: Inversion, ctx: Ctx) -> Model:
            hooks = Sharpness(self.rho, inversion, self.share)
            return tune(net, case.clean, ctx=ctx, lr=self.lr, steps=self.steps, momentum=0.1, hooks=hooks)

        effort = Effort(
            pretrain=self.pretrain_steps, mask=self.mask_steps, generate=self.generator_steps, width=self.width
        )
        *_, (net, inversion) = rounds(case.net, case.clean, case.ctx, effort, self.rounds, flatten)
        chosen = {"target": inversion.target, "share": inversion.share}
        model = settled(net, case.clean, case.ctx)
        return Outcome(model=model, chosen=chosen, path={f"rho={self.rho:g}": model, RELEASED: pack(net)})


class Sharpness(Reversed):
    """A sharpness-aware step on the partly reversed batch."""

    def __init__(self, rho: float, inversion: Inversion, share: float) -> None:
        super().__init__(inversion.generator, share)
        self.rho = rho

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """Gradient at the sharpest point nearby, update of the original weights."""
        params = list(net.parameters())
        grads = torch.autograd.grad(self.loss(net, x, y, mark), params)
        opt.zero_grad(set_to_none=True)
        with shifted(params, sam_shift(params, grads, self.rho, adaptive=False)):
            loss = self.loss(net, x, y, mark)
            loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        return loss.detach()
