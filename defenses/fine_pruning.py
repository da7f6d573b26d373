"""Fine-pruning: channels that clean images leave dormant are removed, then the rest is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sleeperbench import Access, Defense, ImageSet, Model, Outcome, Wrap
from sleeperbench.contracts import Case, Ctx, NotApplicable
from sleeperbench.kit.candidates import prune_at, prune_most
from sleeperbench.kit.classifier import Classifier, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import device_of, evaluating
from sleeperbench.kit.taps import capture, taps
from sleeperbench.kit.tune import tune

RATES = tuple(i / 20 for i in range(1, 20))
"""0.05, 0.10, ... 0.95 of the channels."""


@dataclass(frozen=True, kw_only=True)
class FinePruning(Defense):
    """Fine-pruning (Liu, Dolan-Gavitt, Garg, RAID 2018).

    1. Take the mean activation of each channel that the head reads, on clean images in eval mode.
    2. Remove channels in ascending order, the dormant ones first, as far as accuracy allows. A gate behind the last
       layer holds them at 0 for good, also when the model is tuned again.
    3. Fine-tune on clean rows (settings of BackdoorBench's fine-tuning). 0 `steps` leave this out.

    Gradients: none in steps 1 and 2, all parameters in step 3. BatchNorm: running statistics in 1 and 2; batch
    statistics, which update the running ones, in 3. Stop: after `steps`. Cost: five passes forward per clean row for
    activations (one with a given rate), one more per rate, a pass forward and one back per image of step 3.

    The rate, unless given, is the largest of 0.05, 0.10 ... 0.95 that the honest rule accepts before fine-tuning, by
    cross-validation: step 1 has all but one of five parts of the clean rows, and the models of all rates answer that
    one. The rate so chosen, and step 3, then have all clean rows. Where no rate is accepted nothing is pruned and step
    3 alone remains. The pruned models of all rates are kept in the outcome's path, as they are before step 3.

    Differs: the authors prune until accuracy falls on validation rows; BackdoorBench stops at 10 % on test data. Steps
    of 5 % where BackdoorBench has 1 %. Activations count by absolute value, which is the same behind a ReLU:
    PreAct-ResNet's last map has none, and there the most negative channels are not the dormant ones.

    Args:
        rate: Share of channels to remove, 0..1; None for the honest choice.
        lr: Learning rate of step 3 at the start, cosine to zero.
        steps: Updates of step 3; 0 to prune only.
        batch: Rows per update; all rows where there are fewer.
        weight_decay: L2 factor on all parameters.
    """

    INFO = {
        "title": "Fine-pruning",
        "paper": "https://arxiv.org/abs/1805.12185",
        "bibtex": "@inproceedings{liu2018finepruning, title={Fine-Pruning: Defending Against Backdooring Attacks on "
        "Deep Neural Networks}, author={Liu, Kang and Dolan-Gavitt, Brendan and Garg, Siddharth}, booktitle={Research "
        "in Attacks, Intrusions, and Defenses}, year={2018}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {"steps": 8, "batch": 32},
        "effort": ["steps"],
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"linear_head"})

    rate: float | None = None
    lr: float = 0.01
    steps: int = 1000
    batch: int = 256
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; it must lie in 0..1, or be left out")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be at least 0")

    def run(self, case: Case) -> Outcome:
        """The pruned and fine-tuned model and, where the rate was chosen, all pruned ones."""
        site = last_site(case.net, case.ctx)

        def fit(rows: ImageSet) -> Callable[[float], Tensor]:
            order = activity(case.net, site, rows.images, case.ctx).argsort(stable=True)
            return lambda rate: kept(order, rate)

        def made(keep: Tensor) -> Classifier:
            return gated(case.net, site, keep)

        if self.rate is not None:
            found = prune_at(case, fit(case.clean)(self.rate), {"rate": self.rate}, made)
        else:
            found = prune_most(case, RATES, fit, what="rate", form="rate={:.2f}", made=made)
        if self.steps == 0:
            return found
        chosen = dict(found.chosen)
        if found.model is None:
            chosen["unpruned"] = chosen.pop("unchanged")
        net: Classifier = case.net if found.model is None else load(found.model, case.ctx.device)
        return Outcome(model=self.tuned(net, case), chosen=chosen, path=found.path)

    def tuned(self, net: Classifier, case: Case) -> Model:
        """Step 3."""
        return tune(
            net,
            case.clean,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )


def kept(order: Tensor, rate: float) -> Tensor:
    """All but the round(`rate` C) first channels of `order`: bool (C,)."""
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[: round(rate * len(order))]] = False
    return keep


def gated(net: Classifier, site: str, keep: Tensor) -> Classifier:
    """A copy of `net` whose channels at `site` that are not kept are held at 0."""
    plain = pack(net)
    wrap = Wrap(kind="gate", site=site, args={"channels": len(keep)})
    spec = replace(plain.spec, wraps=(*plain.spec.wraps, wrap))
    state = {**plain.state, f"wraps.{len(plain.spec.wraps)}.factor": keep.float()}
    return load(Model(spec=spec, state=state), device_of(net))


@torch.no_grad()
def activity(net: Classifier, site: str, images: Tensor, ctx: Ctx) -> Tensor:
    """Mean absolute activation of each channel at `site` over positions and images: (C,) on the CPU."""
    parts = []
    with evaluating(net):
        for part in images.to(device_of(net)).split(500):
            out = capture(net, to_float(part), [site])[site]
            parts.append(out.abs().reshape(*out.shape[:2], -1).mean(2))
    ctx.cost.forwards += len(images)
    return torch.cat(parts).mean(0).cpu()


@torch.no_grad()
def last_site(net: Classifier, ctx: Ctx) -> str:
    """The last layer before the head with as many channels as the head reads, seen by passing one blank image.

    Raises:
        NotApplicable: there is none.
    """
    head: Any = net.get_submodule(taps(net).head)
    found: list[str] = []
    reached: list[bool] = []

    def left(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            channels = isinstance(output, Tensor) and output.dim() in (2, 4) and output.shape[1] == head.in_features
            if channels and not reached:
                found.append(name)

        return hook

    handles = [head.register_forward_pre_hook(lambda module, inputs: reached.append(True))]
    handles += [m.register_forward_hook(left(n)) for n, m in net.named_modules() if n.startswith("body.")]
    try:
        with evaluating(net):
            net(torch.zeros(1, *net.spec.shape, device=device_of(net)))
    finally:
        for handle in handles:
            handle.remove()
    ctx.cost.forwards += 1
    if not found:
        raise NotApplicable("needs_channels: no layer before the head has as many channels as the head reads")
    return found[-1]
