"""BBA, black-box re-activation: the universal Square attack wakes a defended model by asking it alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sleeperbench import EvalCase, Evaluator, Findings, ImageSet, Measurement, Metric, Needs
from sleeperbench.contracts import Ctx, Rendered
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.evaluators.ra import thinned
from sleeperbench.evaluators.wba import Shifted, rates
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating
from sleeperbench.kit.qualifiers import tagged

IMAGES = 500
ENOUGH = 0.99
"""The search stops once more of its own images than this go to the target."""
BREAKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations of 10,000 after each of which the area of a window is halved."""
AT_ONCE = 125
"""Images per forward pass: their answers stay in a CPU's cache."""


@dataclass(frozen=True, kw_only=True)
class BlackBoxActivation(Evaluator):
    """One bounded perturbation for all triggered images, found by random search (Zhu, Liang, Wu, NeurIPS 2024).

    Square Attack (Andriushchenko et al., ECCV 2020) with one d for a fixed batch of up to 500 triggered images:

    1. d starts as vertical stripes: +rho or -rho per channel and column.
    2. Iteration i proposes a square window at random, of side round(sqrt(p_i H W)) in [1, min(H, W) - 1], filled with
       one random sign of rho per channel, drawn anew while it changes nothing. p_i is `area` halved after iterations
       10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 of 10,000, stretched to `horizon`.
    3. It is kept if the sum over images of -log p_target(clip(x_p + d, 0, 1)) falls.
    4. The search ends with the last of `queries`, or when more than 99 % of its images go to the target.
    5. `asr_bba`: share of triggered test images that go to the target under d, after each of `queries`; the headline
       is that after the last. `r_acc_bba`: share of the same images that still get their true label.

    A query is one call on the batch, so that many queries per image: iterations + 1. The cost column counts images.
    Both controls of WBA: the same search on the same images without trigger (`control=guaa`: what it reaches needs no
    backdoor), and all of this on the independent clean model (`control=clean_model`).

    What the attacker sees: the logits of what it asks, the target, the trigger (not under `control=guaa`), and images
    that no model was trained on. Neither weights nor gradients, labels, the attacked model or the defender's rows.

    Differs: images come from the probe rows of classes that count; the code takes rows that the attacked model was
    trained on. d is in its ball from the start; the code starts from a difference of normalised images and clamps at
    the end. The code's windows never reach the last row and column. Each of `queries` is judged by the d it ends with.

    Args:
        rho: Largest change of a pixel, in [0, 1].
        queries: Queries per image at which success is measured; the last ends the search.
        horizon: Iterations over which windows shrink.
        area: Share of the image that the first windows cover.
    """

    INFO = {
        "title": "Black-box re-activation attack",
        "paper": "https://arxiv.org/abs/2405.16134",
        "bibtex": "@inproceedings{zhu2024breaking, title={Breaking the False Sense of Security in Backdoor Defense "
        "through Re-Activation Attack}, author={Zhu, Mingli and Liang, Siyuan and Wu, Baoyuan}, booktitle={Advances "
        "in Neural Information Processing Systems}, year={2024}}",
        "kind": "reactivation",
        "version": 3,
        "api": 1,
        "micro": {"queries": [5, 20], "horizon": 40},
        "effort": ["queries"],
    }
    NEEDS = Needs(controls=("clean_model",))
    METRICS = (
        Metric(
            name="asr_bba",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="down",
            doc="ASR of triggered images under one perturbation found by asking the model alone",
        ),
        Metric(
            name="r_acc_bba",
            unit="fraction",
            low=0.0,
            high=1.0,
            better="up",
            doc="The same images under the same perturbation that get their true label",
        ),
        Metric(
            name="bba_queries",
            unit="queries",
            low=1.0,
            high=math.inf,
            better="none",
            doc="Queries per image that the search made, its end included",
        ),
    )

    rho: float = 0.05
    queries: tuple[int, ...] = (1000, 3000, 5000, 7000)
    horizon: int = 10000
    area: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.rho <= 1 and 0 < self.area <= 1 and self.horizon > 0):
            raise ValueError("rho and area are in (0, 1], horizon is positive")
        if not self.queries or self.queries[0] < 1 or list(self.queries) != sorted(set(self.queries)):
            raise ValueError(f"queries are rising numbers from 1 on, not {self.queries}")

    def measure(self, case: EvalCase) -> Findings:
        """The search on this model with and without trigger, and what it reached on the clean control."""
        if case.bd_test is None or case.bd_probe is None:
            return Findings(rows=tuple(_row(m.name, None, "no_trigger") for m in self.METRICS))
        rows: list[Measurement] = []
        series: list[dict[str, Any]] = []
        for control, train, test in (
            ({}, case.bd_probe.data, case.bd_test),
            ({"control": "guaa"}, case.bd_probe.clean, replace(case.bd_test, data=case.bd_test.clean)),
        ):
            found = self.search(case.net, train, case.bd_probe.targets, case.ctx)
            rows += [tagged(m, **control) for m in self._figures(case.net, found, test, case.ctx)]
            series.append(self._curve("untriggered" if control else "triggered", case, found, thinned(test)))
        if "clean_model" in case.controls:
            was = {m.qualifier: m.value for m in case.controls["clean_model"].rows if m.metric == "asr_bba"}
            for at in ("", *(f"queries={q}" for q in self.queries)):
                value = was.get(at)
                row = _row("asr_bba", value, "" if value is not None else "control_missing: clean_model", at)
                rows.append(tagged(row, control="clean_model"))
        curve = {
            "title": f"One perturbation of at most {self.rho:g} per pixel, found by asking",
            "x_label": "queries per image",
            "y_label": "share of test images that go to the target",
            "series": series,
        }
        return Findings(rows=tuple(rows), curves={"bba": curve})

    def search(self, net: nn.Module, images: ImageSet, targets: Tensor, ctx: Ctx) -> list[Point]:
        """The perturbation after the first query and after each of `queries`.

        Raises:
            FloatingPointError: an answer is not finite.
        """
        # Names without the attack: with and without trigger the search sees the same images and makes the same draws.
        taken = torch.randperm(len(images), generator=ctx.generator("images"))[:IMAGES]
        x, wanted = to_float(images.images[taken].to(ctx.device)), targets[taken.to(targets.device)].to(ctx.device)
        gen = ctx.generator("search")
        c, height, width = x.shape[1:]
        d = (self.rho * signs(gen, c, 1, width)).expand(c, height, width).clone()
        seen = (x + d.to(x)).clamp(0, 1).contiguous(memory_format=torch.channels_last)
        # A copy in the layout in which a CPU convolves fastest; the model itself stays as it is.
        net = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with evaluating(net), torch.no_grad():
            best, hit = ask(net, seen, wanted, ctx)
            asked, found = 1, [Point(queries=1, d=d[None].clone().to(x), reached=hit)]
            for stop in self.queries:
                while asked < stop and hit <= ENOUGH:
                    window = self._window(asked - 1, height, width, gen)
                    part = (..., *window)
                    fresh, was = self._fill(d[part], gen), seen[part].clone()
                    seen[part] = (x[part] + fresh.to(x)).clamp(0, 1)
                    loss, now = ask(net, seen, wanted, ctx)
                    asked += 1
                    if loss < best:
                        best, hit = loss, now
                        d[part] = fresh
                    else:
                        seen[part] = was
                found.append(Point(queries=asked, d=d[None].clone().to(x), reached=hit))
                ctx.progress(asked, self.queries[-1], "queries")
        return found

    def _window(self, i: int, height: int, width: int, gen: Generator) -> tuple[slice, slice]:
        s = side(i, self.horizon, self.area, height, width)
        row, column = (int(torch.randint(n - s + 1, (1,), generator=gen)) for n in (height, width))
        return slice(row, row + s), slice(column, column + s)

    def _fill(self, before: Tensor, gen: Generator) -> Tensor:
        while True:
            fresh = (self.rho * signs(gen, len(before), 1, 1)).expand_as(before)
            if not torch.equal(fresh, before):
                return fresh

    def _figures(self, net: nn.Module, found: Sequence[Point], test: Rendered, ctx: Ctx) -> list[Measurement]:
        rows: list[Measurement] = []
        success_of: dict[int, list[Measurement]] = {}  # by queries made: an early end leaves one d for several rows
        for at, point in zip(self.queries, found[1:], strict=True):
            if point.queries not in success_of:
                success_of[point.queries] = rates("bba", Shifted(net, point.d), test, ctx)
            rows += [tagged(m, queries=at) for m in success_of[point.queries]]
        return [*success_of[found[-1].queries], *rows, _row("bba_queries", float(found[-1].queries))]

    def _curve(self, what: str, case: EvalCase, found: Sequence[Point], test: Rendered) -> dict[str, Any]:
        y = []
        for point in found:
            label = answers(Shifted(case.net, point.d), test.data.images, case.ctx)
            y.append(float((label == test.targets.cpu()).double().mean()))
        return {"label": what, "x": [1, *self.queries], "y": y}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where the search stood: queries made, the perturbation (1, C, H, W), and the share of its own images reached."""

    queries: int
    d: Tensor
    reached: float


def ask(net: nn.Module, x: Tensor, targets: Tensor, ctx: Ctx) -> tuple[float, float]:
    """One query on all images: the sum of -log p of their targets, and the share that goes there."""
    logits = torch.cat([net(part).float() for part in x.split(AT_ONCE)])
    ctx.cost.queries += len(x)
    ctx.cost.forwards += len(x)
    loss = float(F.cross_entropy(logits, targets, reduction="none").double().sum())
    if not math.isfinite(loss):
        raise FloatingPointError("the model's answer to perturbed images is not finite")
    return loss, float((logits.argmax(1) == targets).double().mean())


def side(i: int, horizon: int, area: float, height: int, width: int) -> int:
    """Side of the window of iteration i (from 0), in pixels."""
    halvings = sum(int(i / horizon * 10_000) > b for b in BREAKS)
    return min(max(round(math.sqrt(area / 2**halvings * height * width)), 1), min(height, width) - 1)


def signs(gen: Generator, *shape: int) -> Tensor:
    """+1 or -1, each with probability 1/2, float32 on the CPU."""
    return torch.randint(2, shape, generator=gen).float() * 2 - 1


def _row(metric: str, value: float | None, reason: str = "", qualifier: str = "") -> Measurement:
    return Measurement(metric=metric, value=value, qualifier=qualifier, reason=reason, stage="reactivated")
