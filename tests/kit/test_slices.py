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

from sleeperbench.evaluators.evidence import curve, sheet
from sleeperbench.kit import slices
from sleeperbench.kit.isolation import curves, outcome
from sleeperbench.kit.slices import (
    Isolation,
    Settings,
    Slice,
    Trial,
    climb,
    gap_maps,
    isolate,
    label_scores,
    leaning,
    middle,
    mutation,
    separation,
    suspected,
    thresholds,
    top,
    two_means,
    windows,
)


class Slope(nn.Module):
    """Two classes, w x and -w x, over all pixels."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        z = (x * self.w).sum((1, 2, 3))
        return torch.stack([z, -z], 1)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int, classes: int = 4, size: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(2 * size * size, 16), nn.Tanh(), nn.Linear(16, classes))
    net[1].weight.data *= 3
    return net.eval().requires_grad_(False)


def trial(area: float, success: float) -> Trial:
    return Trial(mask=torch.ones(2, 2, dtype=torch.bool), area=area, delta=torch.full((1, 2, 2), area), success=success)


def piece(label: int, *trials: Trial, goal: float = 0.9) -> Slice:
    return Slice(label=label, gaps=torch.zeros(2, 2), trials=trials, goal=goal)


def test_steps_of_a_linear_model_are_the_signs_of_its_weights() -> None:
    w, x = rand(2, 4, 4) - 0.5, rand(5, 2, 4, 4, seed=1)
    y = torch.tensor([0, 1, 0, 1, 1])
    away = torch.where(y == 0, -1.0, 1.0).view(-1, 1, 1, 1)
    ctx = samples.ctx()
    moved = climb(Slope(w), x, y, steps=3, step=0.05, ctx=ctx)
    assert torch.allclose(moved, (x + 0.15 * away * w.sign()).clamp(0, 1) - x, atol=1e-6)
    assert (ctx.cost.forwards, ctx.cost.backwards) == (15, 15)
    back = climb(Slope(w), x, y, steps=3, step=0.05, ctx=ctx, towards=True)
    assert torch.allclose(back, (x - 0.15 * away * w.sign()).clamp(0, 1) - x, atol=1e-6)
    where = torch.zeros(4, 4, dtype=torch.bool)
    where[1, 2] = True
    inside = climb(Slope(w), x, y, steps=3, step=0.05, ctx=ctx, where=where)
    assert torch.equal(inside, torch.where(where, moved, torch.zeros(())))
    assert climb(Slope(w), x[:0], y[:0], steps=3, step=0.05, ctx=ctx).shape == (0, 2, 4, 4)


def test_steps_follow_the_loop() -> None:
    net, x, y = mlp(0), rand(4, 2, 8, 8), torch.tensor([0, 1, 2, 3])
    t = torch.zeros_like(x)
    for _ in range(5):
        for i in range(4):
            seen = (x[i : i + 1] + t[i : i + 1]).requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(net(seen), y[i : i + 1]), seen)
            t[i] = (x[i] + t[i] + 0.1 * g[0].sign()).clamp(0, 1) - x[i]
    assert torch.allclose(climb(net, x, y, steps=5, step=0.1, ctx=samples.ctx()), t, atol=1e-5)


def test_rows_one_at_a_time_go_the_same_way() -> None:
    net, x, y = mlp(0).double(), rand(7, 2, 8, 8).double(), torch.arange(7) % 4
    passes: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    found = [climb(net, x, y, steps=5, step=0.1, ctx=samples.ctx(), at_once=n) for n in (256, 1, 3)]
    assert passes == [7] * 5 + [1] * 35 + [3] * 10 + [1] * 5
    assert torch.allclose(found[0], found[1], atol=1e-9) and torch.allclose(found[0], found[2], atol=1e-9)


def test_label_mutation_counts_kept_rows() -> None:
    gen = torch.Generator().manual_seed(0)
    labels, answer = (torch.randint(5, (60,), generator=gen) for _ in range(2))
    labels[labels == 4] = 0
    kept = torch.rand(60, generator=gen) > 0.3
    found = mutation(F.one_hot(answer, 5).bool(), labels, kept)
    for m, n in itertools.product(range(4), range(5)):
        mine = [a for a, y, k in zip(answer.tolist(), labels.tolist(), kept.tolist(), strict=True) if k and y == m]
        assert float(found[m, n]) == pytest.approx(0 if m == n else sum(a == n for a in mine) / len(mine))
    assert bool(found[4].isnan().all())
    column = [float(found[m, 2]) for m in (0, 1, 3)]
    assert float(leaning(found)[2]) == pytest.approx(sum(column) / 3)
    assert leaning(torch.full((3, 3), torch.nan)).tolist() == [0, 0, 0]


def test_two_means_is_the_best_split_of_all() -> None:
    def inner(part: list[float]) -> float:
        return sum((v - sum(part) / len(part)) ** 2 for v in part)

    for seed in range(20):
        values = rand(7, seed=seed).square().tolist()
        splits = [s for r in range(1, 7) for s in itertools.combinations(range(7), r)]
        cost = {
            s: inner([values[i] for i in s]) + inner([v for i, v in enumerate(values) if i not in s]) for s in splits
        }
        best = min(cost, key=lambda s: cost[s])
        high = max(best, tuple(i for i in range(7) if i not in best), key=lambda s: max(values[i] for i in s))
        assert two_means(torch.tensor(values)).nonzero().flatten().tolist() == sorted(high)
    assert two_means(torch.tensor([0.5, 0.5, 0.5])).tolist() == [False] * 3
    assert two_means(torch.tensor([0.1, 0.9, 0.9, 0.1])).tolist() == [False, True, True, False]


def test_suspects_are_high_and_above_the_floor() -> None:
    rates = torch.tensor([[0.0, 0.8, 0.1, 0.0], [0.2, 0.0, 0.1, 0.1], [0.3, 0.4, 0.0, 0.02], [torch.nan] * 4])
    # In row 1 the high cluster lies below the floor; a class without rows suspects nothing.
    assert suspected(rates.double()).nonzero().tolist() == [[0, 1], [2, 0], [2, 1]]


def test_windows_cover_every_pixel() -> None:
    for side, wide, count in ((32, 4, 15), (16, 2, 15), (28, 3, 14), (9, 2, 8)):
        found = windows(side, side)
        assert found.shape == (count * count, side, side)
        assert bool((found.flatten(1).sum(1) == wide * wide).all())
        assert int(found.sum(0).min()) >= 1
        assert len({tuple(w.flatten().tolist()) for w in found}) == len(found)


def test_maps_follow_equation_6() -> None:
    net, reference = mlp(0), mlp(1)
    x, ctx = rand(3, 2, 8, 8), samples.ctx()
    delta = rand(3, 2, 8, 8, seed=5) - x
    gaps, benign = gap_maps(net, reference, x, delta, ctx)
    total, theirs, covered = (torch.zeros(8, 8) for _ in range(3))
    negative = 0
    for top_, left in itertools.product(range(7), range(7)):
        covered[top_ : top_ + 2, left : left + 2] += 1
        for i in range(3):
            seen = x[i].clone()
            seen[:, top_ : top_ + 2, left : left + 2] += delta[i, :, top_ : top_ + 2, left : left + 2]
            f, s = (
                (n(x[i][None]).softmax(1) - n(seen[None]).softmax(1)).square().sum().sqrt() for n in (net, reference)
            )
            negative += int(f < s)
            total[top_ : top_ + 2, left : left + 2] += max(0.0, float(f - s)) / 3
            theirs[top_ : top_ + 2, left : left + 2] += float(s) / 3
    assert 20 < negative < 127  # of 147, so that the cut at 0 matters
    assert torch.allclose(gaps, total / covered, atol=1e-5)
    assert torch.allclose(benign, theirs / covered, atol=1e-5)
    assert ctx.cost.forwards == 2 * 3 * 50


def slow_separation(upper: Tensor, between: Tensor, benign: Tensor) -> float:
    def points(part: Tensor) -> list[tuple[int, int]]:
        return [(i, j) for i in range(part.shape[0]) for j in range(part.shape[1]) if part[i, j]]

    def shape(part: Tensor) -> tuple[float, float, float]:
        p = points(part)
        a, b = (sum(q[k] for q in p) / len(p) for k in (0, 1))
        return a, b, sum(math.hypot(i - a, j - b) for i, j in p) / len(p)

    a, b, radius = shape(between)
    total = 0.0
    for part in (upper, benign):
        c, e, other = shape(part)
        d, r = math.hypot(c - a, e - b), abs(other - radius)
        total += (d + r) / (d * r + 1e-6)
    return total


def test_equation_7_and_its_order() -> None:
    gaps, benign = (rand(9, 9, seed=seed).square() * 0.1 for seed in (3, 4))
    found = thresholds(gaps, benign)
    cuts = torch.quantile(gaps.flatten(), torch.linspace(0.2, 0.98, 12)).tolist()
    wanted = {}
    for low, high in itertools.combinations(cuts, 2):
        sets = [gaps >= high, (gaps > low) & (gaps < high), benign >= high]
        if int(sets[2].sum()) < 4:
            sets[2] = benign >= benign.flatten().sort(descending=True).values[4]  # 5 % of 81 pixels, rounded up
        if min(int(part.sum()) for part in sets) >= 4:
            wanted[low, high] = slow_separation(*sets)
            assert separation(*sets) == pytest.approx(wanted[low, high], rel=1e-6)
    assert found == sorted(wanted, key=lambda pair: wanted[pair])
    assert len(found) > 20
    assert thresholds(torch.zeros(9, 9), benign) == []


def test_slices() -> None:
    gaps = torch.tensor([[0.0, 0.3], [0.02, 0.05]])
    assert top(gaps, 0.3).tolist() == [[False, True], [False, True]]
    assert top(torch.zeros(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    assert bool(top(gaps, 1.0).all())
    assert middle(gaps, 0.01, 0.05).tolist() == [[False, False], [True, False]]


def test_scores_of_labels() -> None:
    rates, reference = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    rates[:, 1], reference[:, 1] = 0.5, 0.2  # its own class does not count, though it stands there
    found = [piece(0, trial(0.05, 0.95)), piece(2, trial(0.4, 0.97)), piece(3, trial(0.02, 0.5))]
    # Areas are 0.05, 0.4 and, as its goal was never reached, 1.
    assert [s.area for s in found] == [0.05, 0.4, 1.0]
    scores = label_scores(rates, reference, found, targeted=False)
    assert scores.tolist() == pytest.approx([(1 - 0.05 / 0.4) / 0.8, 1.5, 0, 0])
    assert label_scores(rates, reference, found, targeted=True).tolist() == pytest.approx([0.875 / 0.8, 0, 0, 0])
    even = label_scores(rates, reference, found[:2], targeted=True)
    assert float(even[0]) == pytest.approx((1 - 0.05 / 0.225) / 0.8)
    # A middle slice is feasible at 0.8, and still says nothing below 0.9.
    weak = [piece(0, trial(0.05, 0.85), goal=0.8), *found[1:]]
    assert weak[0].area == 0.05
    assert label_scores(rates, reference, weak, targeted=True).tolist() == [0, 0, 0, 0]


def test_bounds_of_the_rules_claim_too() -> None:
    """A slice of 8 % against a median of 40 %, and a share 0.2 above the benign model's."""
    none = torch.zeros(4, 4).double()
    for small, typical in ((0.02, 0.1), (0.08, 0.4), (0.2, 1.0), (0.05, 0.25)):
        found = [piece(0, trial(small, 0.95)), piece(1, trial(typical, 0.95)), piece(2, trial(typical, 0.95))]
        scores = label_scores(none, none, found, targeted=True)
        judged = slices.judged(scores, 1 - slices.ROUNDING, none, None, none, tuple(found))
        assert judged.claimed == [0]
        more = [piece(0, trial(small + 0.001, 0.95)), *found[1:]]
        scores = label_scores(none, none, more, targeted=True)
        assert slices.judged(scores, 1 - slices.ROUNDING, none, None, none, tuple(more)).claimed == []
    rates, theirs = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    rates[:, 1], theirs[:, 1] = 0.9, 0.7
    assert float(label_scores(rates, theirs, [], targeted=False)[1]) == pytest.approx(1)
    scores = label_scores(rates, theirs, [], targeted=False)
    assert slices.judged(scores, 1 - slices.ROUNDING, rates, theirs, rates, ()).claimed == [1]


def test_areas_of_slices_from_the_top_are_those_asked_for() -> None:
    look = SimpleNamespace(settings=Settings())
    tried = list(slices.Look.candidates(look, rand(16, 16), rand(16, 16)))  # type: ignore[arg-type]
    assert [area for _, area, _ in tried] == [0.02, 0.04, 0.08, 0.15, 0.25, 0.40, 0.60, 1.00]
    # 40 % of 256 pixels are 102.4, which 103 cover; as 0.4023 they would be too many for a natural backdoor.
    assert [int(where.sum()) for where, _, _ in tried] == [6, 11, 21, 39, 64, 103, 154, 256]
    look = SimpleNamespace(settings=Settings(slices="fixed"))
    ((where, area, pair),) = slices.Look.candidates(look, rand(16, 16) / 10, rand(16, 16))  # type: ignore[arg-type]
    assert pair == (0.01, 0.05) and area == pytest.approx(int(where.sum()) / 256)


def test_what_is_handed_over() -> None:
    claimed = piece(1, trial(0.02, 0.4), trial(0.04, 0.95))
    natural = piece(2, trial(0.15, 0.5), trial(0.4, 0.75), trial(0.6, 0.92))
    large = piece(3, trial(1.0, 0.99))
    found = Isolation(
        scores=torch.tensor([0.0, 1.2, 1.0, 0.1]).double(),
        threshold=1.0,
        rates=torch.full((4, 4), 0.25).double(),
        reference=torch.full((4, 4), torch.nan).double(),
        pairs=torch.tensor([[3, 1]]),
        sources={1: 3},
        slices=(natural, claimed, large),
    )
    assert found.best() is claimed
    one = outcome(found, natural=False)
    assert [(i.target, i.source, float(i.delta.max())) for i in one.inverted] == [(1, 3, pytest.approx(0.04))]
    both = outcome(found, natural=True)
    assert [(i.target, i.source, float(i.delta.max())) for i in both.inverted][1:] == [(2, None, pytest.approx(0.4))]
    assert torch.equal(both.verdict.label_scores, one.verdict.label_scores)
    assert (one.verdict.score, one.verdict.threshold) == (pytest.approx(1.2), 1.0)
    assert one.chosen["claimed"] == [1]
    assert [n["label"] for n in one.chosen["natural"]] == [2, 1]
    assert one.chosen["reference_rates"][0][0] is None
    assert one.state[0]["maps"].shape == one.state[0]["slices"].shape == (3, 2, 2)
    assert one.state[1] == {"labels": [2, 1, 3]}


def test_a_single_pair_names_its_source() -> None:
    last = torch.zeros(4, 4).double()
    last[2, 0], last[0, 3], last[1, 3] = 0.95, 0.95, 0.95
    scores = torch.tensor([2.0, 0.0, 0.0, 2.0]).double()
    found = slices.judged(scores, 1.0, last, None, last, ())
    assert found.sources == {0: 2}
    assert found.pairs.tolist() == [[0, 3], [1, 3], [2, 0]]
    last[2, 0] = 0.89
    assert slices.judged(scores, 1.0, last, None, last, ()).sources == {}
    assert slices.judged(scores * 0, 1.0, last, None, last, ()).pairs.shape == (0, 2)


def test_settings_and_reference_are_checked() -> None:
    for bad in ({"steps": 0}, {"step": 0.0}, {"labels": 0}, {"slices": "low"}, {"delta": "noise"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Settings(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="benign reference"):
        isolate(SimpleNamespace(), None, Settings())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="benign reference"):
        isolate(SimpleNamespace(), mlp(0), Settings(dms=False))  # type: ignore[arg-type]


def shown(**parts: object) -> Isolation:
    rates = torch.tensor([[0.0, 0.5, 0.1, 0.4], [0.2, 0.0, 0.3, 0.5], [0.1, 0.9, 0.0, 0.0], [torch.nan] * 4]).double()
    first = Slice(
        label=1,
        gaps=torch.tensor([[0.1, 0.7], [0.4, 0.0]]),
        benign=torch.tensor([[0.2, 0.0], [0.3, 0.1]]),
        trials=(
            Trial(mask=torch.zeros(2, 2, dtype=torch.bool), area=0.25, delta=torch.zeros(1, 2, 2), success=0.5),
            Trial(mask=torch.tensor([[0, 1], [1, 0]]).bool(), area=0.5, delta=torch.zeros(1, 2, 2), success=0.95),
        ),
        goal=0.9,
    )
    about: dict[str, Any] = {
        "scores": torch.tensor([0.0, 1.2, 0.0, 0.0]).double(),
        "threshold": 1.0,
        "rates": rates,
        "reference": torch.full((4, 4), 0.2).double(),
        "pairs": torch.zeros(0, 2, dtype=torch.int64),
        "sources": {},
        "slices": (first,),
    }
    return Isolation(**about | parts)


def test_label_mutation_is_drawn_by_label() -> None:
    bars = curve(curves(shown())["label_mutation"])
    mine, theirs = bars["series"]
    assert (mine["label"], theirs["label"]) == ("this model", "benign reference")
    assert mine["x"] == ["0", "1", "2", "3"]
    # Label 1: 0.5 of class 0 and 0.9 of class 2; class 3 has no rows, and the own class does not count.
    assert mine["y"] == pytest.approx([0.15, 0.7, 0.2, 0.3])
    assert mine["low"] == pytest.approx([0.1, 0.5, 0.1, 0.0])
    assert mine["high"] == pytest.approx([0.2, 0.9, 0.3, 0.5])
    assert theirs["y"] == theirs["low"] == pytest.approx([0.2] * 4)
    # Without a reference there is none to compare with, and of many labels those most turned into are drawn.
    alone = curves(shown(reference=None, slices=()))
    assert list(alone) == ["label_mutation"]
    assert len(alone["label_mutation"]["series"]) == 1
    many = torch.zeros(60, 60).double()
    many[:, 7] = many[:, 55] = 0.5
    (series,) = curve(curves(shown(rates=many, reference=None, slices=()))["label_mutation"])["series"]
    assert len(series["x"]) == 50 and {"7", "55"} <= set(series["x"])
    empty = curve(
        curves(shown(rates=torch.full((2, 2), torch.nan).double(), reference=None, slices=()))["label_mutation"]
    )
    assert empty["series"][0]["y"] == empty["series"][0]["high"] == [0, 0]


def test_slices_and_the_map_are_drawn() -> None:
    found = curves(shown())
    tried = curve(found["slices"])
    assert tried["threshold"] == 0.9
    assert tried["series"] == [{"label": "label 1", "x": [0.25, 0.5], "y": [0.5, 0.95]}]
    ours, theirs, inside = curve(found["map"])["series"]
    assert found["map"]["title"].startswith("Map of label 1")
    assert ours["x"] == theirs["x"] == [0, 0.25, 0.5, 0.75]
    assert ours["y"] == pytest.approx([0.7, 0.4, 0.1, 0])
    assert theirs["y"] == pytest.approx([0.3, 0.2, 0.1, 0])
    # The slice kept is the two largest pixels.
    assert inside["points"] is True
    assert inside["x"] == [0, 0.25] and inside["y"] == pytest.approx([0.7, 0.4])
    large = replace(shown().slices[0], gaps=rand(32, 32), benign=rand(32, 32), trials=(trial_of(32),))
    assert all(len(s["x"]) <= 60 for s in curve(curves(shown(slices=(large,)))["map"])["series"])


def trial_of(side: int) -> Trial:
    mask = torch.ones(side, side, dtype=torch.bool)
    return Trial(mask=mask, area=1.0, delta=torch.zeros(1, side, side), success=1.0)


def test_maps_and_slices_are_pictures() -> None:
    found = outcome(shown(), natural=False)
    assert found.state is not None
    title, picture = sheet(found.chosen["pictures"]["slices"], found.state[0])
    assert title == "Differential slices. Columns: E, benign model's E_s, slice. Rows: label 1."
    assert picture.shape == (1, 2, 10)
    assert picture[0, :, :2].tolist() == [[36, 255], [146, 0]]
    assert picture[0, :, 4:6].tolist() == [[170, 0], [255, 85]]
    assert picture[0, :, 8:].tolist() == [[0, 255], [255, 0]]
    assert "pictures" not in outcome(shown(slices=()), natural=False).chosen
    assert "pictures" not in outcome(shown(slices=shown().slices * 13), natural=False).chosen
