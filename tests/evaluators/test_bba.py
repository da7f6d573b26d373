from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Findings, Measurement
from sleeperbench.contracts import Rendered
from sleeperbench.evaluators.bba import BlackBoxActivation, side
from sleeperbench.evaluators.wba import rates
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.qualifiers import tagged


class Gate(nn.Module):
    """Class 1 where the 2x2 corner adds up to more than `limit`, else class 0."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        over = 20 * (x[:, 0, :2, :2].sum((1, 2)) - self.limit)
        return torch.stack([-over, over], 1)


def gated(n: int) -> Rendered:
    """Dark images; the trigger lifts the four corner pixels to 0.8."""
    clean = samples.random_images(n, (1, 4, 4), 2)
    clean = replace(clean, images=clean.images // 2, labels=torch.zeros(n, dtype=torch.int64))
    bad = clean.images.clone()
    bad[:, :, :2, :2] = 204
    targets = torch.ones(n, dtype=torch.int64)
    return Rendered(data=replace(clean, images=bad), clean=clean, targets=targets, trigger_id=targets * 0)


def case(net: Any, control: bool = True, **parts: Any) -> Any:
    was = Findings(
        rows=(
            Measurement(metric="asr_bba", value=0.2),
            Measurement(metric="asr_bba", value=0.1, qualifier="queries=5"),
            Measurement(metric="asr_bba", value=0.9, qualifier="control=guaa;queries=60"),
        )
    )
    known = {
        "net": net,
        "bd_probe": gated(40),
        "bd_test": gated(30),
        "controls": {"clean_model": was} if control else {},
        "ctx": samples.ctx(3),
    }
    return SimpleNamespace(**known | parts)


def values(found: Findings) -> dict[tuple[str, str], float | None]:
    return {(m.metric, m.qualifier): m.value for m in found.rows}


def test_windows_shrink_as_square_attack_says() -> None:
    # p0 = 0.1 on 32x32, halved after 10, 50, 200, ... of 10,000 iterations.
    starts = {0: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for i, divisor in starts.items():
        assert side(i, 10_000, 0.1, 32, 32) == max(1, round(math.sqrt(0.1 / divisor * 1024))), i
        if i:
            assert side(i - 1, 10_000, 0.1, 32, 32) == max(1, round(math.sqrt(0.1 / (divisor // 2) * 1024)))
    assert side(20, 1000, 0.1, 32, 32) == side(200, 10_000, 0.1, 32, 32)
    assert side(0, 10_000, 1.0, 32, 20) == 19 and side(9999, 10_000, 0.1, 4, 4) == 1


def reference(net: nn.Module, b: BlackBoxActivation, x: Tensor, t: Tensor, gen: torch.Generator) -> tuple[Tensor, int]:
    """The same search with nothing kept between queries, image by image, and the number of images asked."""
    c, height, width = x.shape[1:]

    def sign(*shape: int) -> Tensor:
        return b.rho * (torch.randint(2, shape, generator=gen).float() * 2 - 1)

    def loss(d: Tensor) -> float:
        with torch.no_grad():
            return sum(
                float(F.cross_entropy(net((i + d).clamp(0, 1)[None]), y[None])) for i, y in zip(x, t, strict=True)
            )

    d = sign(c, 1, width).repeat(1, height, 1)
    best, images = loss(d), len(x)
    for i in range(b.queries[-1] - 1):
        s = side(i, b.horizon, b.area, height, width)
        row, column = (int(torch.randint(n - s + 1, (1,), generator=gen)) for n in (height, width))
        new = d.clone()
        while torch.equal(new, d):
            new[:, row : row + s, column : column + s] = sign(c, 1, 1)
        value = loss(new)
        images += len(x)
        if value < best:
            d, best = new, value
    return d, images


def test_it_is_the_search_of_one_image_at_a_time() -> None:
    net = build(samples.SPEC, 4).eval()
    data = samples.random_images(7, (1, 16, 16))
    targets = torch.tensor([3, 0, 1, 1, 9, 2, 5])
    b, ctx = BlackBoxActivation(queries=(9, 25), horizon=40, rho=0.1), samples.ctx(3)
    found = b.search(net, data, targets, ctx)
    taken = torch.randperm(7, generator=samples.ctx(3).generator("images"))
    d, images = reference(net, b, to_float(data.images[taken]), targets[taken], samples.ctx(3).generator("search"))
    assert torch.equal(found[-1].d[0], d)
    assert ctx.cost.queries == ctx.cost.forwards == images == 25 * 7 and ctx.cost.backwards == 0
    # It moved, in its ball and nowhere inside it.
    assert not torch.equal(found[0].d, found[1].d) and not torch.equal(found[1].d, found[2].d)
    assert torch.allclose(found[-1].d.abs(), torch.tensor(0.1))
    assert found[0].d[0, 0].unique(dim=0).shape[0] == 1, "it starts with vertical stripes"


def test_it_only_ever_keeps_what_lowers_the_objective() -> None:
    data = samples.random_images(5, (1, 16, 16))
    net = build(samples.SPEC, 1).eval()
    x, t = to_float(data.images), torch.zeros(5, dtype=torch.int64)
    found = BlackBoxActivation(queries=tuple(range(2, 41)), horizon=60).search(net, data, t, samples.ctx())
    with torch.no_grad():
        losses = [float(F.cross_entropy(net((x + p.d).clamp(0, 1)), t)) for p in found]
    pairs = list(itertools.pairwise(losses))
    assert all(b <= a + 1e-6 for a, b in pairs) and losses[-1] < losses[0]
    kept = [not torch.equal(p.d, q.d) for p, q in itertools.pairwise(found)]
    assert all((b < a) == k for (a, b), k in zip(pairs, kept, strict=True)) and any(kept) and not all(kept)


@pytest.mark.parametrize(("limit", "woken"), [(3.1, 1.0), (3.35, 1.0), (3.45, 0.0)])
def test_it_wakes_what_lies_within_its_reach_and_counts_its_queries(limit: float, woken: float) -> None:
    # Triggered corners add up to 3.2 and can gain 4 rho = 0.2; untriggered ones to 2 at most.
    c = case(Gate(limit))
    found = BlackBoxActivation(queries=(5, 60), horizon=60, area=0.3).measure(c)
    v = values(found)
    assert v["asr_bba", ""] == v["asr_bba", "queries=60"] == woken
    assert v["asr_bba", "control=guaa"] == v["asr_bba", "control=guaa;queries=60"] == 0
    own, other = v["bba_queries", ""], v["bba_queries", "control=guaa"]
    # It stops as soon as all its images are there; without trigger it never gets there.
    assert own is not None and other == 60 and (own < 60) == bool(woken)
    assert c.ctx.cost.queries == 40 * (own + 60)
    # Two classes: what does not go to the target gets its true label.
    assert v["r_acc_bba", ""] == v["r_acc_bba", "queries=60"] == 1 - woken and v["r_acc_bba", "control=guaa"] == 1
    assert v["asr_bba", "control=clean_model"] == 0.2 and v["asr_bba", "control=clean_model;queries=5"] == 0.1
    reasons = {m.qualifier: m.reason for m in found.rows}
    assert reasons["control=clean_model;queries=60"] == "control_missing: clean_model"
    series = {s["label"]: s for s in found.curves["bba"]["series"]}
    assert series["triggered"]["x"] == [1, 5, 60] and series["triggered"]["y"][-1] == woken
    assert {m.stage for m in found.rows} == {"reactivated"}


def test_with_and_without_trigger_it_makes_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    search = BlackBoxActivation.search

    def watched(self: Any, net: Any, images: Any, targets: Any, ctx: Any) -> Any:
        found = search(self, net, images, targets, ctx)
        seen.append((images, found[0].d))
        return found

    monkeypatch.setattr(BlackBoxActivation, "search", watched)
    c = case(Gate(3.4), False)
    rows = BlackBoxActivation(queries=(3,)).measure(c).rows
    (own, start), (other, same) = seen
    assert own is c.bd_probe.data and other is c.bd_probe.clean and torch.equal(start, same)
    assert not any("clean_model" in m.qualifier for m in rows)
    assert {m.total for m in rows if m.metric in ("asr_bba", "r_acc_bba")} == {30}


def test_an_image_of_another_wrong_class_counts_in_neither_rate() -> None:
    test = samples.rendered([1, 1, 1, 2, 0, 0], labels=[0, 0, 0, 0, 0, 2], targets=[1] * 6)
    by_metric = {m.metric: m for m in rates("bba", samples.ReadsPixel(), test, samples.ctx())}
    assert [(by_metric[m].count, by_metric[m].total) for m in ("asr_bba", "r_acc_bba")] == [(3, 6), (1, 6)]


def test_several_triggers_have_their_own_rows() -> None:
    bd = replace(gated(30), trigger_id=torch.arange(30) % 2)
    v = values(BlackBoxActivation(queries=(2, 3)).measure(case(Gate(3.1), False, bd_test=bd)))
    assert {"", "trigger=0", "queries=2;trigger=1", "queries=3;stat=max", "control=guaa;queries=2;trigger=0"} <= {
        q for _, q in v
    }


def test_reasons_and_refusals() -> None:
    for parts in ({"bd_test": None}, {"bd_probe": None}):
        rows = BlackBoxActivation().measure(case(Gate(3.4), **parts)).rows
        metrics = ("asr_bba", "r_acc_bba", "bba_queries")
        assert [(m.metric, m.reason) for m in rows] == [(m, "no_trigger") for m in metrics]
    with pytest.raises(FloatingPointError):
        BlackBoxActivation(queries=(2,)).measure(case(Gate(math.nan)))
    for bad in ({"rho": 0.0}, {"area": 2.0}, {"queries": ()}, {"queries": (5, 5)}, {"queries": (0,)}, {"horizon": 0}):
        with pytest.raises(ValueError, match=r"rho and area|rising"):
            BlackBoxActivation(**bad)


def test_settings_are_the_published_ones() -> None:
    b = BlackBoxActivation()
    assert (b.rho, b.queries, b.horizon, b.area) == (0.05, (1000, 3000, 5000, 7000), 10_000, 0.1)


def test_a_qualifier_keeps_its_order() -> None:
    row = Measurement(metric="m", value=1.0, qualifier="queries=5")
    assert tagged(tagged(row, trigger=1), control="guaa").qualifier == "control=guaa;queries=5;trigger=1"
