"""NPD, neural polarizer: one inserted layer learns to let images pass and to stop what points into another class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Access, Defense, ImageSet, Outcome, TrainHooks
from sleeperbench.contracts import Case, Ctx, Model, NotApplicable, Wrap
from sleeperbench.kit import wraps
from sleeperbench.kit.candidates import pick, split
from sleeperbench.kit.classifier import Classifier, load, pack
from sleeperbench.kit.pgd import ascent
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.taps import taps
from sleeperbench.kit.tune import tune

NAMES = {f"eps={eps:g}": eps for eps in (1.0, 2.0, 3.0, 5.0)}
"""What the honest choice tries, the least aggressive first; the published bound is among them."""


@dataclass(frozen=True, kw_only=True)
class NPD(Defense):
    """Neural polarizer (Zhu et al., NeurIPS 2023), with the settings of BackdoorBench for CIFAR-10.

    1. A 1x1 convolution without bias, the identity at first, and a BatchNorm are inserted in front of the last
       convolution but one, which in a residual network is the first of the last block. All other weights stay.
    2. Warm-up: cross-entropy on clean rows with plain SGD; the inserted BatchNorm uses and gathers batch statistics.
    3. Per step, on a batch of B clean rows (x, y), p the answers of the network with its layer:
       a. yhat is the class with the largest logit at x other than y.
       b. delta = 0; up to `inner_steps` times delta <- P(delta - step sign(gradient of CE(f(x + delta), yhat))), P the
          projection of each row onto the Euclidean ball of radius `eps`; ended once more than `enough` of the batch
          is answered yhat. x + delta is cut to [0, 1], delta is not.
       c. A step on CE(f(x), y) + w1 CE(f(x + delta), c) + w2 N(r) + w3 N(yhat), where c are the present answers at x,
          r the class with the largest p(x + delta) other than y, and N(k) = -mean log(1.0001 - p_k(x + delta)).

    Only the inserted convolution and BatchNorm get gradients. All BatchNorm layers normalise by running statistics,
    which stay, but for the inserted one in step 2. It stops after `steps` and keeps the last weights. Images are not
    augmented. A step costs, per image, up to 1 + 2 `inner_steps` passes forth and 2 + `inner_steps` back. The repaired
    model is the network with its layer (a wrap); what wakes backdoors may tune both. With `eps` None the largest of 1,
    2, 3, 5 that the honest rule accepts on rows held out by `kit.candidates.split` is kept; all are in the path.

    Differs: epochs over 2,500 rows in batches of 128 are kept as steps. Momentum and decay of step 2 are 0, as there.
    The site is found by running the network: the module that answers last what that convolution is given. Where a
    residual block has no activation in front, that is the block before, so the shortcut passes through the layer too.
    The paper's c is the answer of the untouched network; the code takes the present one, and is followed.

    Args:
        eps: Largest Euclidean norm of a perturbation, in pixels of [0, 1]; None for the honest choice.
        step: Size of an inner step, in the same unit.
        inner_steps: Inner steps, at most.
        enough: Share of a batch.
        weights: w1, w2, w3.
        warm_steps: Updates of step 2.
        warm_lr: Learning rate there, constant.
        lr: Learning rate of step 3, constant; momentum 0.9.
        weight_decay: L2 factor on the inserted layer.
        steps: Updates of step 3.
        batch: Rows per update; all rows where there are fewer.
    """

    INFO = {
        "title": "Neural polarizer",
        "paper": "https://arxiv.org/abs/2306.16697",
        "bibtex": "@inproceedings{zhu2023neural, title={Neural Polarizer: A Lightweight and Effective Backdoor Defense "
        "via Purifying Poisoned Features}, author={Zhu, Mingli and Wei, Shaokui and Zha, Hongyuan and Wu, Baoyuan}, "
        "booktitle={Advances in Neural Information Processing Systems}, year={2023}}",
        "kind": "repair",
        "version": 1,
        "api": 1,
        "micro": {"warm_steps": 4, "steps": 6, "batch": 32},
        "effort": ["warm_steps", "steps", "inner_steps"],
    }
    ACCESS = Access(clean=0.05)
    REQUIRES = frozenset({"conv"})

    eps: float | None = 3.0
    step: float = 0.1
    inner_steps: int = 2
    enough: float = 0.6
    weights: tuple[float, float, float] = (0.4, 0.4, 0.4)
    warm_steps: int = 100
    warm_lr: float = 1e-4
    lr: float = 0.01
    weight_decay: float = 5e-4
    steps: int = 1000
    batch: int = 128

    def __post_init__(self) -> None:
        if self.eps is not None and self.eps <= 0:
            raise ValueError(f"eps is {self.eps}; it must be above 0, or be left out")
        if len(self.weights) != 3:
            raise ValueError(f"weights are {self.weights}; give three")

    def run(self, case: Case) -> Outcome:
        """The network with its polarizer and, where the bound was chosen, all candidates."""
        site, channels = place(case.net, case.clean, case.ctx)
        about = {"site": site, "channels": channels}
        if self.eps is not None:
            return Outcome(model=self.tuned(case, case.clean, self.eps, site, channels), chosen=about)
        rows, held = split(case)
        made = self.candidates(case, rows, site, channels)
        picked = pick(case.net, made, held, ctx=case.ctx, what="eps")
        best = None if picked.name is None else NAMES[picked.name]
        model = None if picked.name is None else picked.path[picked.name]
        return Outcome(model=model, chosen={"eps": best, **about, **picked.about}, path=picked.path)

    def candidates(
        self, case: Case, rows: ImageSet, site: str, channels: int
    ) -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        """One model per bound."""
        for name, eps in NAMES.items():
            yield name, load(self.tuned(case, rows, eps, site, channels), case.ctx.device), {}

    def tuned(self, case: Case, rows: ImageSet, eps: float, site: str, channels: int) -> Model:
        """The network with a polarizer trained on `rows` under one bound."""
        made = polarised(case.net, site, channels)
        warm = replace(case.ctx, seed=case.ctx.derive("warm"))
        made = tune(
            only_layer(load(made)),
            rows,
            ctx=warm,
            lr=self.warm_lr,
            steps=self.warm_steps,
            batch=self.batch,
            momentum=0.0,
            augment=False,
            hooks=WarmUp(),
        )
        return tune(
            only_layer(load(made)),
            rows,
            ctx=case.ctx,
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            weight_decay=self.weight_decay,
            augment=False,
            hooks=Polarise(self, eps),
        )


class WarmUp(TrainHooks):
    """Cross-entropy; the layer inserted last is in train mode, all else in eval mode."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """CE(f(x), y)."""
        with evaluating(net):
            cast(Classifier, net).wraps[-1].train()
            return F.cross_entropy(net(x), y)


class Polarise(TrainHooks):
    """Step 3."""

    def __init__(self, settings: NPD, eps: float) -> None:
        super().__init__()
        self.settings, self.eps = settings, eps

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        """The four terms."""
        with evaluating(net):
            logits = net(x).float()
            answers, aim = logits.argmax(1), runner_up(logits, y)
            delta = self.search(net, x, aim)
            attacked = net((x + delta).clamp(0, 1)).float()
        w1, w2, w3 = self.settings.weights
        terms = w1 * F.cross_entropy(attacked, answers) + w2 * never(attacked, runner_up(attacked, y))
        return F.cross_entropy(logits, y) + terms + w3 * never(attacked, aim)

    def search(self, net: nn.Module, x: Tensor, aim: Tensor) -> Tensor:
        """Step 3b: delta (N, C, H, W)."""

        def gain(delta: Tensor) -> Tensor:
            return -F.cross_entropy(net((x + delta).clamp(0, 1)).float(), aim)

        delta = torch.zeros_like(x)
        for i in range(self.settings.inner_steps):
            delta = ascent(gain, delta, eps=self.eps, step=self.settings.step, steps=1, norm="l2")
            if i + 1 < self.settings.inner_steps:  # after the last one nobody asks
                # With a graph: under autocast a pass without one would leave copies of the weights without one.
                reached = net((x + delta).clamp(0, 1)).argmax(1) == aim
                if float(reached.double().mean()) > self.settings.enough:
                    break
        return delta


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """The class with the largest logit other than `y`, int64 (N,)."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def never(logits: Tensor, k: Tensor) -> Tensor:
    """N(k) = -mean log(1.0001 - p_k), a scalar."""
    return -(1.0001 - logits.softmax(1).gather(1, k[:, None])).log().mean()


def place(net: Classifier, data: ImageSet, ctx: Ctx) -> tuple[str, int]:
    """The module that answers last what the last spatial convolution but one is given, and its channels.

    Raises:
        NotApplicable: there are fewer than two such convolutions, or no module answers that.
    """
    convs = taps(net).spatial_convs
    if len(convs) < 2:
        raise NotApplicable("needs_conv: two spatial convolutions")
    answered: list[tuple[str, Tensor]] = []
    found: list[tuple[str, int]] = []

    def watch(name: str) -> Any:
        return lambda module, inputs, out: answered.append((name, out))

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.extend((name, out.shape[1]) for name, out in answered if out is inputs[0])

    modules = [(n, m) for n, m in net.named_modules() if n.startswith("body.")]
    handles = [m.register_forward_hook(watch(n)) for n, m in modules]
    handles.append(net.get_submodule(convs[-2]).register_forward_pre_hook(enter))
    try:
        with evaluating(net), torch.no_grad():
            net(to_float(data.images[:1].to(ctx.device)))
    finally:
        for handle in handles:
            handle.remove()
    ctx.cost.forwards += 1
    if not found or sum(name == found[-1][0] for name, _ in answered) != 1:
        raise NotApplicable(f"no_site: {convs[-2]} is fed by no module of its own")
    return found[-1]


def polarised(net: Classifier, site: str, channels: int) -> Model:
    """The network with one more wrap: the new layer behind `site`."""
    wrap = Wrap(kind="insert", site=site, args={"layer": "conv1x1_bn", "channels": channels})
    with torch.random.fork_rng(devices=[]):  # a convolution draws its first weights, which the identity replaces
        layer = wraps.make(wrap, net, net.spec)
    plain, at = pack(net), len(net.spec.wraps)
    added = {f"wraps.{at}.{name}": tensor for name, tensor in layer.state_dict().items()}
    spec = replace(net.spec, wraps=(*net.spec.wraps, wrap))
    return Model(spec=spec, state={**plain.state, **added})


def only_layer(net: Classifier) -> Classifier:
    """The same network, in which the last wrap alone gets gradients."""
    net.requires_grad_(False)
    net.wraps[-1].requires_grad_(True)
    return net
