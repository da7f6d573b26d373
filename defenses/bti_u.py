"""BTI-DBF (U): unlearning of what the inversion by decoupled benign features makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome
from sleeperbench.contracts import Case, Ctx
from sleeperbench.contracts.models import Model
from sleeperbench.kit.benign import Effort, Inversion, Reversed, rounds
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class BTIUnlearning(Defense):
    """Unlearn the images of BTI-DBF's generator (Xu et al., ICLR 2024, variant U).

    The generator is brought near the identity once. Then, in every round:

    1. The mask of benign features, and the generator against the others, on the network as it is (see `bti`); from the
       second round on the generator also aims, by a cross-entropy that no bound takes away, at the label that its
       images got most often after the first. Its Adam lives through all rounds.
    2. Fine-tuning of all weights with Adam, BatchNorm in train mode: int(0.1 B) + 1 rows of each batch are replaced by
       the generator's images x~ under their true labels; loss CE(f(x~), y) + MSE(phi(x), phi(x~)) over the whole batch,
       phi the last stage's answer, gradients through both.

    The last round's model is returned, or with `rounds` left out the one after most rounds that the honest rule accepts
    on rows held out from all of this.

    Differs: the released code keeps step 2's Adam through all rounds; here every round has its own. What differs in the
    inversion stands at `bti`. Images are cut to [0, 1]. Epochs of 2,500 rows in batches of 128 are kept as steps; an
    epoch drops its last short batch. Crop and flip are the recipe's, in step 2 alone.

    Args:
        rounds: Rounds of inversion and unlearning, 5 as released; None for the honest choice among 1 to 5.
        pretrain_steps: Updates of the generator towards the identity; 50 epochs.
        mask_steps: Updates of the mask per round; 20 epochs.
        generator_steps: Updates of the generator per round; 30 epochs.
        steps: Updates of step 2 per round; 30 epochs.
        lr: Learning rate of step 2.
        share: Share of a batch that is replaced.
        bound: Largest mean squared change of an image, in normalised units.
        width: Filters of the first level of the generator, a U-Net of four.
    """

    INFO = {
        "title": "BTI-DBF (U)",
        "paper": "https://openreview.net/forum?id=Tw9wemV6cb",
        "bibtex": "@inproceedings{xu2024towards, title={Towards Reliable and Efficient Backdoor Trigger Inversion via "
        "Decoupling Benign Features}, author={Xu, Xiong and Huang, Kunzhe and Li, Yiming and Qin, Zhan and Ren, Kui}, "
        "booktitle={International Conference on Learning Representations}, year={2024}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {"rounds": 1, "pretrain_steps": 2, "mask_steps": 2, "generator_steps": 2, "steps": 2, "width": 2},
        "effort": ["pretrain_steps", "mask_steps", "generator_steps", "steps"],
        "presets": {"reduced": {"pretrain_steps": 53, "mask_steps": 21, "generator_steps": 32, "steps": 32}},
    }
    ACCESS = Access(clean=0.05)

    rounds: int | None = 5
    pretrain_steps: int = 1000
    mask_steps: int = 400
    generator_steps: int = 600
    width: int = 32
    steps: int = 600
    lr: float = 1e-4
    share: float = 0.1
    bound: float = 0.3

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; give at least 1, or leave it out")

    def run(self, case: Case) -> Outcome:
        """The model after the last round, or the chosen one with all others in the path."""
        if self.rounds is not None:
            *_, (net, inversion) = self.repaired(case, case.clean, self.rounds)
            return Outcome(model=pack(net), chosen=about(inversion))
        rows, held = split(case)
        made = ((f"round={i + 1}", net, about(inv)) for i, (net, inv) in enumerate(self.repaired(case, rows, 5)))
        picked = pick(case.net, made, held, ctx=case.ctx, what="round")
        model = None if picked.name is None else picked.path[picked.name]
        return Outcome(model=model, chosen={"round": picked.name, **picked.about}, path=picked.path)

    def repaired(self, case: Case, rows: ImageSet, count: int) -> Iterator[tuple[Classifier, Inversion]]:
        """The network after each round, made on `rows`."""

        def unlearn(net: Classifier, inversion: Inversion, ctx: Ctx) -> Model:
            hooks = Unlearning(inversion, self.share)
            return tune(net, rows, ctx=ctx, lr=self.lr, steps=self.steps, optimiser="adam", hooks=hooks)

        effort = Effort(
            pretrain=self.pretrain_steps,
            mask=self.mask_steps,
            generate=self.generator_steps,
            width=self.width,
            bound=self.bound,
        )
        return rounds(case.net, rows, case.ctx, effort, count, unlearn)


class Unlearning(Reversed):
    """Cross-entropy on the partly reversed batch, and how far its features lie from those of the batch as it was."""

    def __init__(self, inversion: Inversion, share: float) -> None:
        super().__init__(inversion.generator, share)
        self.site, self.cost = inversion.site, inversion.ctx.cost

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps the batch as it was for the loss."""
        self.original = x
        return super().batch(x, y, ids, step)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE(f(x~), y) + MSE(phi(x), phi(x~))."""
        found: list[Tensor] = []
        handle = net.get_submodule(self.site).register_forward_hook(lambda m, i, out: found.append(out.clone()))
        try:
            logits = net(x)
            net(self.original)
        finally:
            handle.remove()
        # The trainer counts gradients that enter by the logits; those of the second pass enter here.
        found[1].register_hook(self.enter)
        return F.cross_entropy(logits, y) + F.mse_loss(found[1], found[0])

    def enter(self, grad: Tensor) -> None:
        """Count a gradient's rows."""
        self.cost.backwards += len(grad)


def about(inversion: Inversion) -> dict[str, Any]:
    """What a cell page shows of the inversion."""
    return {"target": inversion.target, "share": inversion.share}
