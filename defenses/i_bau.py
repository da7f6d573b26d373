"""I-BAU: unlearn one perturbation for all images, and how it follows the weights, by an implicit hypergradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sleeperbench import Access, Defense, ImageSet, Outcome
from sleeperbench.contracts import Case, Ctx
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, pack
from sleeperbench.kit.pixels import to_float

NAMES = {f"round={i}": i for i in range(1, 6)}
"""What the honest choice tries, the least aggressive first: every round up to the authors' five."""
GROWTH = 10.0
"""How often |v| may be what it was after its first iteration."""


@dataclass(frozen=True, kw_only=True)
class IBAU(Defense):
    """Implicit backdoor adversarial unlearning (Zeng et al., ICLR 2022), with the settings of the authors' code.

    The clean rows are cut into batches once, in a random order; the last one may be short. delta (1, C, H, W) is one
    perturbation for all images, h(delta, theta) = -CE(f(x + delta), y) + penalty |delta|^2. In every round:

    1. delta = 0. `steps` times, on one batch after another and from the first again, a step of gradient descent with
       rate `ascent` on h, whose y are here the network's own answers at x. delta is neither projected nor cut to valid
       pixels.
    2. `steps` times, on the same batches b, with one Adam for all rounds, a step of all weights theta by the
       hypergradient g:
       a. L_o(delta, theta): CE on b under the true labels, delta added to `share` of its images, at least one.
       b. Phi(delta, theta) = delta - inner_step grad_delta h(delta, theta), h always on batch 0 under the true labels.
       c. v = 0; `iterations` times v <- (dPhi/ddelta)^T v + dL_o/ddelta, ended where v moves by less than 1e-10, and
          before |v| passes ten times |dL_o/ddelta|.
       d. g = dL_o/dtheta + (dPhi/dtheta)^T v.

    v is a truncated series sum_k (I - inner_step H)^k dL_o/ddelta, H the second derivative of h in delta. In a ReLU
    network the cross-entropy is convex in delta, so apart from the penalty no eigenvalue of I - inner_step H is below
    1: the series does not converge, and where it is cut is part of the method. `chosen` shows its `growth`, the largest
    |v| / |dL_o/ddelta| of a round (above ten where the series was cut early), `perturbation`, |delta|, and `updates`,
    those of the weights so far.

    All parameters get gradients. All layers run in eval mode: BatchNorm normalises by its running statistics, which
    stay. The last round's model is returned, or with `rounds` left out the one after most of 1 to 5 rounds that the
    honest rule accepts on the rows that `kit.candidates.split` holds out; all are then in the outcome's path, but for
    those from the first on whose weights are not finite.

    Differs: of a batch of less than 100 the authors perturb no image (the integer part of 1 %), which leaves step c
    without effect; here at least one. Their clean rows are 5,000 test images, whose one pass per round is kept as 50
    steps, 250 updates in five rounds, whatever the number of rows. Their series has no bound on its growth.

    Args:
        rounds: Rounds of steps 1 and 2; None for the honest choice.
        steps: Batches of step 1, and as many of step 2, per round.
        iterations: Terms of the series, the authors' K.
        lr: Adam's rate, constant.
        ascent: Rate of step 1, on pixels of [0, 1].
        inner_step: Rate inside Phi.
        penalty: Weight of the squared norm in h.
        share: Share of a batch's images that delta is added to.
        batch: Rows per batch.
    """

    INFO = {
        "title": "I-BAU",
        "paper": "https://arxiv.org/abs/2110.03735",
        "bibtex": "@inproceedings{zeng2022adversarial, title={Adversarial Unlearning of Backdoors via Implicit "
        "Hypergradient}, author={Zeng, Yi and Chen, Si and Park, Won and Mao, Z. Morley and Jin, Ming and Jia, Ruoxi}, "
        "booktitle={International Conference on Learning Representations}, year={2022}}",
        "kind": "repair",
        "version": 2,
        "api": 1,
        "micro": {"rounds": 1, "steps": 2},
        "effort": ["steps", "iterations"],
    }
    ACCESS = Access(clean=0.05)

    rounds: int | None = 5
    steps: int = 50
    iterations: int = 5
    lr: float = 1e-3
    ascent: float = 10.0
    inner_step: float = 0.1
    penalty: float = 0.001
    share: float = 0.01
    batch: int = 100

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; give at least 1, or leave it out")
        for name in ("steps", "iterations", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must lie in 0..1")

    def run(self, case: Case) -> Outcome:
        """The model after the last round, or the chosen one with all others in the path."""
        if self.rounds is not None:
            *_, (net, about) = self.unlearnt(case.net, case.clean, case.ctx, self.rounds)
            return Outcome(model=pack(net), chosen=about)
        rows, held = split(case)
        picked = pick(case.net, self.candidates(case, rows), held, ctx=case.ctx, what="round")
        if picked.name is None:
            return Outcome(chosen={"rounds": None, **picked.about}, path=picked.path)
        chosen = {"rounds": NAMES[picked.name], **picked.about}
        return Outcome(model=picked.path[picked.name], chosen=chosen, path=picked.path)

    def candidates(self, case: Case, rows: ImageSet) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """The model after every round, up to the last whose weights are finite."""
        made = self.unlearnt(case.net, rows, case.ctx, len(NAMES))
        try:
            for name, (net, about) in zip(NAMES, made, strict=True):
                yield name, net, about
        except FloatingPointError:
            return

    def unlearnt(
        self, net: Classifier, data: ImageSet, ctx: Ctx, rounds: int
    ) -> Iterator[tuple[Classifier, dict[str, Any]]]:
        """The same copy of `net` after each round, and what is told of the round.

        Raises:
            FloatingPointError: the weights are no longer finite.
        """
        net = copy.deepcopy(net).to(ctx.device).eval()
        weights = [p for p in net.parameters() if p.requires_grad]
        opt = torch.optim.Adam(weights, lr=self.lr)
        order = torch.randperm(len(data), generator=ctx.generator("order"))
        images, labels = to_float(data.images[order].to(ctx.device)), data.labels[order].to(ctx.device)
        batches = list(zip(images.split(self.batch), labels.split(self.batch), strict=True))
        # Every round goes through the same ones, from the first on.
        batches = list(islice(cycle(batches), self.steps))
        gen = ctx.generator("perturbed")
        for done in range(rounds):
            delta = self.ascend(net, [x for x, _ in batches], ctx)
            growth = max(self.update(net, weights, opt, delta, b, batches[0], gen, ctx) for b in batches)
            if not all(bool(w.isfinite().all()) for w in weights):
                raise FloatingPointError(f"weights are not finite after round {done + 1}: lower lr (now {self.lr:g})")
            ctx.progress(done + 1, rounds, "rounds")
            yield net, {"updates": (done + 1) * self.steps, "perturbation": float(delta.norm()), "growth": growth}

    def ascend(self, net: nn.Module, batches: Sequence[Tensor], ctx: Ctx) -> Tensor:
        """Step 1: delta (1, C, H, W)."""
        delta = torch.zeros_like(batches[0][:1])
        for x in batches:
            with torch.no_grad():
                answers = net(x).argmax(1)
            delta.requires_grad_()
            (down,) = torch.autograd.grad(self.inner(net, delta, x, answers), delta)
            delta = delta.detach() - self.ascent * down
            ctx.cost.forwards += 2 * len(x)
            ctx.cost.backwards += len(x)
        return delta

    def update(
        self,
        net: nn.Module,
        weights: Sequence[Tensor],
        opt: torch.optim.Optimizer,
        delta: Tensor,
        batch: tuple[Tensor, Tensor],
        first: tuple[Tensor, Tensor],
        gen: Generator,
        ctx: Ctx,
    ) -> float:
        """Step 2 on one batch; returns the series' growth, 0 where delta has no effect on L_o."""
        x, y = batch
        chosen = torch.randperm(len(x), generator=gen)[: max(1, int(len(x) * self.share))]
        where = torch.zeros(len(x), 1, 1, 1, device=x.device)
        where[chosen.to(x.device)] = 1
        grads, norms = hypergradient(
            delta,
            weights,
            lambda d: F.cross_entropy(net(x + where * d), y),
            lambda d: self.inner(net, d, *first),
            iterations=self.iterations,
            inner_step=self.inner_step,
            growth=GROWTH,
        )
        for w, g in zip(weights, grads, strict=True):
            w.grad = g
        opt.step()
        ctx.cost.forwards += len(x) + len(first[0])
        # A product with a derivative of Phi goes back through a pass forth and a pass back; the first, with v = 0, is
        # saved, and one more gives step d.
        ctx.cost.backwards += len(x) + (1 + 2 * len(norms)) * len(first[0])
        return norms[-1] / norms[0] if norms[0] else 0.0

    def inner(self, net: nn.Module, delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """h(delta, theta) on images x and labels y, a scalar."""
        return -F.cross_entropy(net(x + delta), y) + self.penalty * delta.square().sum()


def hypergradient(
    delta: Tensor,
    weights: Sequence[Tensor],
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    *,
    iterations: int,
    inner_step: float,
    growth: float = math.inf,
) -> tuple[list[Tensor], list[float]]:
    """Steps 2c and 2d: g per weight, and |v| after each iteration, also of one that went too far and was dropped.

    Args:
        delta: Where the inner problem stands; left without a gradient.
        weights: theta; they take part in `outer` and `inner` and keep their `grad`.
        outer: L_o as a function of delta.
        inner: h as a function of delta; twice differentiable.
        iterations: At most so many.
        inner_step: Rate inside Phi.
        growth: How often the length of the first v another may have.
    """
    delta = delta.detach().requires_grad_()
    # The fused kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        pull, *direct = torch.autograd.grad(outer(delta), [delta, *weights], materialize_grads=True)
        (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
        phi = delta - inner_step * slope
        v, norms = torch.zeros_like(pull), list[float]()
        for k in range(iterations):
            before = v
            v = pull + (torch.autograd.grad(phi, delta, before, retain_graph=True)[0] if k else before)
            norms.append(float(v.norm()))
            if norms[-1] > growth * norms[0]:
                v = before
                break
            if float((v - before).norm()) < 1e-10:
                break
        through = torch.autograd.grad(phi, weights, v, materialize_grads=True)
    return [d + t for d, t in zip(direct, through, strict=True)], norms
