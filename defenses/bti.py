"""BTI-DBF's inversion: a generator that moves what is not benign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeperbench import Access, Defense, Inverted, Outcome, Verdict
from sleeperbench.contracts import Case
from sleeperbench.kit.benign import Effort, Generator, Inversion
from sleeperbench.kit.predict import evaluating


@dataclass(frozen=True, kw_only=True)
class BTI(Defense):
    """Backdoor trigger inversion by decoupling benign features (Xu et al., ICLR 2024).

    1. A U-Net is brought near the identity: in the image, in the features and in the answers.
    2. A mask over the last stage's features is learnt with which alone the labels are found and with whose complement
       they are lost.
    3. The U-Net then moves the other features and leaves the masked ones, with the image's change bounded.
    4. The label that most of its images get is claimed; the trigger is the U-Net.
    5. Verdict: score is the share of the clean rows that get that label.

    Differs: the paper has no verdict; the threshold, 0.7 of the clean rows, is a rule of thumb from small trials of
    others, fixed beforehand. The mask is learnt in eval mode, where the released code lets BatchNorm drift. Images are
    neither cropped nor flipped, where its loader does both. Of the answers in step 1 it takes the cross-entropy of the
    clean one, softmaxed twice, against the generated one as the target; here the clean one is the target, and the
    softmax is taken once. The bound is taken in the units of the network's own normalisation, as there. Images are cut
    to [0, 1]. One round.

    Args:
        pretrain_steps: Updates of step 1; 50 epochs of 2,500 rows in batches of 128.
        mask_steps: Updates of step 2; 20 epochs.
        generator_steps: Updates of step 3; 30 epochs.
        bound: Largest mean squared change of an image, in normalised units.
        share: Share of the clean rows above which the verdict is «backdoored», 0..1.
        width: Filters of the first level of the generator, a U-Net of four.
    """

    INFO = {
        "title": "BTI-DBF, inversion",
        "paper": "https://openreview.net/forum?id=Tw9wemV6cb",
        "bibtex": "@inproceedings{xu2024towards, title={Towards Reliable and Efficient Backdoor Trigger Inversion via "
        "Decoupling Benign Features}, author={Xu, Xiong and Huang, Kunzhe and Li, Yiming and Qin, Zhan and Ren, Kui}, "
        "booktitle={International Conference on Learning Representations}, year={2024}}",
        "kind": "inversion",
        "version": 2,
        "api": 1,
        "stamps": True,
        "micro": {"pretrain_steps": 2, "mask_steps": 2, "generator_steps": 2, "width": 2},
        "effort": ["pretrain_steps", "mask_steps", "generator_steps"],
        "traverses": False,
        "presumes": "one target and features that no label needs; nothing of the trigger's shape",
    }
    ACCESS = Access(clean=0.05)

    pretrain_steps: int = 1000
    mask_steps: int = 400
    generator_steps: int = 600
    width: int = 32
    bound: float = 0.3
    share: float = 0.7

    def run(self, case: Case) -> Outcome:
        """The claimed label with its generator, and the verdict."""
        effort = Effort(
            pretrain=self.pretrain_steps,
            mask=self.mask_steps,
            generate=self.generator_steps,
            width=self.width,
            bound=self.bound,
        )
        inversion = Inversion(case.net, case.clean, case.ctx, effort)
        inversion.pretrain()
        inversion.look(case.net)
        answers = torch.bincount(inversion.answers(), minlength=case.spec.classes).double() / len(case.clean)
        chosen = {"target": inversion.target, "share": inversion.share}
        state = {k: v.cpu() for k, v in inversion.generator.state_dict().items()}
        return Outcome(
            verdict=Verdict(score=inversion.share, threshold=self.share, label_scores=answers),
            inverted=(Inverted(target=inversion.target, uses_apply=True),),
            state=(state, {"channels": case.spec.shape[0], "width": self.width}),
            chosen=chosen,
        )

    def stamp(self, state: tuple[Mapping[str, Tensor], Any], inv: Inverted, x: Tensor) -> Tensor:
        """The generator's images."""
        generator = Generator(state[1]["channels"], state[1]["width"]).to(x.device)
        generator.load_state_dict(dict(state[0]))
        with evaluating(generator), torch.no_grad():
            out: Tensor = generator(x)
        return out.clamp(0, 1)
