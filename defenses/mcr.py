"""MCR: a point on a low-loss curve between the suspicious model and its fine-tuned copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.batchnorm import refresh
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, load, pack
from sleeperbench.kit.tune import tune

POINTS = tuple(i / 10 for i in range(1, 10))
"""0.1, 0.2, ... 0.9: interior points of the curve, the nearest to the suspicious model first."""


@dataclass(frozen=True, kw_only=True)
class MCR(Defense):
    """Mode connectivity repair (Zhao, Chen, Das, Ramamurthy, Lin, ICLR 2020).

    1. Endpoints: w_1 is the suspicious model, w_2 its copy after fine-tuning on clean rows.
    2. Train the middle point w of the quadratic Bezier curve phi(t) = (1-t)^2 w_1 + 2t(1-t) w + t^2 w_2, starting half
       way: per batch of clean rows t ~ U(0, 1), loss CE(phi(t)) + weight_decay/2 |phi(t)|^2.
    3. Take phi(t) for an interior t and estimate BatchNorm's running statistics anew on the clean rows.

    Gradients: all parameters of w_2, then of w alone; the ends stay. BatchNorm: batch statistics in both trainings;
    the running ones of step 3 come from one pass without augmentation. Stop: after the given steps. Cost: a pass
    forward and one back per image of both trainings, one forward per image and point for statistics, and the held-out
    rows once per point.

    `t`, unless given, is the largest of 0.1, 0.2 ... 0.9, the farthest from w_1, that the honest rule accepts on rows
    that no training saw; all points are kept in the outcome's path.

    Differs: the authors connect two independently trained backdoored models; a defender with one suspicious model has
    a fine-tuned copy for the other end, as in BackdoorBench. Published 100 epochs of 2,500 CIFAR-10 rows are kept as
    steps. The curve's rate falls along a cosine; the authors' stays for half of the epochs and then falls to 1 %.
    BackdoorBench trains the curve at 3e-5, which hardly moves it, and deploys t = 0.1.

    Args:
        t: Point on the curve, between 0 (suspicious) and 1 (fine-tuned); None for the honest choice.
        lr: Learning rate of the fine-tuned end at the start.
        steps: Updates of the fine-tuned end.
        batch: Rows per update of the fine-tuned end; all rows where there are fewer.
        curve_lr: Learning rate of the curve at the start.
        curve_steps: Updates of the curve.
        curve_batch: Rows per update of the curve; all rows where there are fewer.
        weight_decay: L2 factor on phi(t) while the curve is trained; the fine-tuned end has 5e-4.
    """

    INFO = {
        "title": "Mode connectivity repair",
        "paper": "https://arxiv.org/abs/2005.00060",
        "bibtex": "@inproceedings{zhao2020bridging, title={Bridging Mode Connectivity in Loss Landscapes and "
        "Adversarial Robustness}, author={Zhao, Pu and Chen, Pin-Yu and Das, Payel and Ramamurthy, Karthikeyan "
        "Natesan and Lin, Xue}, booktitle={International Conference on Learning Representations}, year={2020}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"t": 0.5, "steps": 8, "batch": 32, "curve_steps": 8, "curve_batch": 32},
        "effort": ["steps", "curve_steps"],
        "presets": {"reduced": {"steps": 800, "curve_steps": 1600}},
    }
    ACCESS = Access(clean=0.05)

    t: float | None = None
    lr: float = 0.01
    steps: int = 1000
    batch: int = 256
    curve_lr: float = 0.01
    curve_steps: int = 2000
    curve_batch: int = 128
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        if self.t is not None and not 0 < self.t < 1:
            raise ValueError(f"t is {self.t}; it must lie between 0 and 1, or be left out")

    def run(self, case: Case) -> Outcome:
        """The model at one point of the curve and, where the point was chosen, those at all."""
        if self.t is not None:
            curve = self.curve(case.net, case.clean, case.ctx)
            net = at(self.t, curve, case.net, case.clean, case.ctx)
            return Outcome(model=pack(net), chosen={"t": self.t})
        rows, held = split(case)
        curve = self.curve(case.net, rows, case.ctx)
        nothing: dict[str, Any] = {}
        made = ((f"t={t:.1f}", at(t, curve, case.net, rows, case.ctx), nothing) for t in POINTS)
        picked = pick(case.net, made, held, ctx=case.ctx, what="t")
        if picked.name is None:
            return Outcome(chosen={"t": None, **picked.about}, path=picked.path)
        chosen: dict[str, Any] = {"t": float(picked.name.removeprefix("t=")), **picked.about}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=picked.path)

    def curve(self, net: Classifier, data: ImageSet, ctx: Ctx) -> Bezier:
        """The curve from `net` to its fine-tuned copy, its middle trained."""
        end = tune(
            net,
            data,
            ctx=replace(ctx, seed=ctx.derive("end")),
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            weight_decay=5e-4,
            schedule="cosine",
        )
        middle = copy.deepcopy(net).to(ctx.device)
        start, stop = weights(middle), weights(load(end, ctx.device))
        with torch.no_grad():
            for name, p in middle.named_parameters():
                p.copy_((start[name] + stop[name]) / 2)
        model = tune(
            middle,
            data,
            ctx=replace(ctx, seed=ctx.derive("curve")),
            lr=self.curve_lr,
            steps=self.curve_steps,
            batch=self.curve_batch,
            schedule="cosine",
            hooks=Train(start, stop, self.weight_decay, ctx.generator("t")),
        )
        return Bezier(start=start, middle=weights(load(model, ctx.device)), end=stop)


@dataclass(frozen=True, kw_only=True)
class Bezier:
    """A quadratic Bezier curve through parameter space, by parameter name."""

    start: Mapping[str, Tensor]
    middle: Mapping[str, Tensor]
    end: Mapping[str, Tensor]

    def __call__(self, t: float) -> dict[str, Tensor]:
        """phi(t)."""
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
        return {name: a * w + b * self.middle[name] + c * self.end[name] for name, w in self.start.items()}


class Train(TrainHooks):
    """Train the network that `fit` holds as the middle of a curve."""

    def __init__(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], decay: float, gen: Generator) -> None:
        super().__init__()
        self.start, self.end, self.decay, self.gen = start, end, decay, gen

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE(phi(t)) + decay/2 |phi(t)|^2 at a random t."""
        t = float(torch.rand((), generator=self.gen))
        point = Bezier(start=self.start, middle=dict(net.named_parameters()), end=self.end)(t)
        norm = torch.stack([w.square().sum() for w in point.values()]).sum()
        return F.cross_entropy(functional_call(net, point, (x,)), y) + self.decay / 2 * norm


def weights(net: Classifier) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def at(t: float, curve: Bezier, net: Classifier, data: ImageSet, ctx: Ctx) -> Classifier:
    """The network at phi(t): what is no parameter is as in `net`, but for running statistics, estimated on `data`."""
    made = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in curve(t).items():
            made.get_parameter(name).copy_(value)
    if any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in made.modules()):
        made = load(refresh(made, data.images, batch=256, ctx=ctx), ctx.device)
    return made
