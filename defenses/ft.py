"""Fine-tuning on the defender's clean rows."""

from __future__ import annotations

from dataclasses import dataclass

from sleeperbench import Access, Defense, Outcome
from sleeperbench.contracts import Case
from sleeperbench.kit.tune import tune


@dataclass(frozen=True, kw_only=True)
class FineTuning(Defense):
    """Train all weights further on clean rows (settings of BackdoorBench).

    SGD with momentum 0.9 and a cosine from `lr` to zero, training augmentation, BatchNorm in train mode; the last
    weights are kept. All clean rows are trained on, since nothing is chosen on them.

    Differs: the published 100 epochs on 2,500 CIFAR-10 rows in batches of 256 are 1,000 steps, and steps are kept
    whatever the number of rows; an epoch drops its last short batch. The learning rate is fixed, not chosen.

    Args:
        lr: Learning rate at the start.
        steps: Updates.
        batch: Rows per update; all rows where there are fewer.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "Fine-tuning",
        "paper": "https://arxiv.org/abs/2206.12654",
        "bibtex": "@inproceedings{wu2022backdoorbench, title={BackdoorBench: A Comprehensive Benchmark of Backdoor "
        "Learning}, author={Wu, Baoyuan and Chen, Hongrui and Zhang, Mingda and Zhu, Zihao and Wei, Shaokui and Yuan, "
        "Danni and Shen, Chao}, booktitle={NeurIPS Datasets and Benchmarks Track}, year={2022}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"steps": 20, "batch": 64},
        "effort": ["steps"],
    }
    ACCESS = Access(clean=0.05)

    lr: float = 0.01
    steps: int = 1000
    batch: int = 256
    weight_decay: float = 5e-4

    def run(self, case: Case) -> Outcome:
        """The fine-tuned model."""
        model = tune(
            case.net,
            case.clean,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )
        return Outcome(model=model)
