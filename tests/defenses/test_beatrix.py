from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import beatrix
from sleeperbench.defenses.beatrix import Beatrix, deviations, discrepancy, grams, labelled, place
from sleeperbench.evaluators.detection import auroc
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import evaluating


def poisoned() -> Any:
    train = samples.digits()["train"]
    return BadNets().poison(train, samples.badnets(), torch.ones(len(train), dtype=torch.bool), 0.1, samples.ctx(5))


def case(**parts: Any) -> Any:
    known = {"net": samples.badnets_net(), "clean": samples.digits()["pool"], "spec": samples.SPEC}
    return SimpleNamespace(**known | {"ctx": samples.ctx(9)} | parts)


def slow_gram(a: Tensor, p: int) -> list[float]:
    """The upper triangle of one image's Gram matrix, one entry at a time."""
    rows = [[float(v) for v in channel.flatten()] for channel in a]
    found = []
    for i in range(len(rows)):
        for j in range(i, len(rows)):
            total = math.fsum(u**p * v**p for u, v in zip(rows[i], rows[j], strict=True))
            found.append(math.copysign(abs(total) ** (1 / p), total))
    return found


def slow_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def slow_range(columns: list[list[float]], width: float) -> list[tuple[float, float]]:
    found = []
    for values in columns:
        middle = slow_median(values)
        away = width * slow_median([abs(v - middle) for v in values])
        found.append((middle - away, middle + away))
    return found


def slow_deviation(values: list[float], ranges: list[tuple[float, float]]) -> float:
    total = 0.0
    for v, (low, high) in zip(values, ranges, strict=True):
        if v < low:
            total += (low - v) / (abs(low) + 1e-6)
        if v > high:
            total += (v - high) / (abs(high) + 1e-6)
    return total / len(values)


def test_gram_matrices_are_those_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(5, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    a[1] *= 1e-3
    a[2] *= 1e4  # its 16th power is beyond float32
    a[3, 1] = 0
    for entries in (2**23, 1):  # all rows at once, or one at a time
        monkeypatch.setattr(beatrix, "_ENTRIES", entries)
        parts = list(grams(a, 8))
        assert len(parts) == (1 if entries > 1 else 5)
        found = torch.cat(parts)
        assert found.shape == (5, 8, 6)
        for row, g in zip(a, found, strict=True):
            for p in range(1, 9):
                assert g[p - 1].tolist() == pytest.approx(slow_gram(row, p), rel=1e-9)
    assert bool((found < 0).any())


def test_ranges_deviations_and_threshold_are_those_of_a_slow_loop() -> None:
    gen, method = torch.Generator().manual_seed(1), Beatrix(width=1.5, quantile=0.6)
    g = torch.randn(13, 2, 3, generator=gen, dtype=torch.float64)
    g[:, 0, 1] = 0  # an entry that no row moves
    flat = [row.flatten().tolist() for row in g]
    ranges = slow_range([list(c) for c in zip(*flat, strict=True)], 1.5)
    low, high, threshold = method.calibrate(g)
    assert low.flatten().tolist() == pytest.approx([a for a, _ in ranges])
    assert high.flatten().tolist() == pytest.approx([b for _, b in ranges])
    wanted = [slow_deviation(v, ranges) for v in flat]
    assert deviations(g, low, high).tolist() == pytest.approx(wanted)
    assert min(wanted) == 0 < max(wanted)
    held = []
    for fold in range(5):
        rest = [v for i, v in enumerate(flat) if i % 5 != fold]
        ranges = slow_range([list(c) for c in zip(*rest, strict=True)], 1.5)
        held += [slow_deviation(v, ranges) for i, v in enumerate(flat) if i % 5 == fold]
    assert float(threshold) == pytest.approx(sorted(held)[7])  # floor(0.6 x 13)
    # Out of the range of an entry that never moves, a little is a lot.
    g[0, 0, 1] = 0.01
    assert float(deviations(g, low, high)[0]) > 1000


def test_the_discrepancy_is_that_of_a_slow_loop() -> None:
    gen = np.random.default_rng(0)
    x, z = gen.normal(0, 1, (7, 3)), gen.normal(1, 1, (4, 3))
    both = np.concatenate([x, z])
    squares = [[float(((u - v) ** 2).sum()) for v in both] for u in both]
    s = slow_median([v for row in squares for v in row])
    kernel = np.array([[math.exp(-2 * v / s) + math.exp(-v / s) for v in row] for row in squares])
    wanted = 28 / 11 * (kernel[:7, :7].mean() + kernel[7:, 7:].mean() - 2 * kernel[:7, 7:].mean())
    assert discrepancy(torch.from_numpy(x), torch.from_numpy(z)) == pytest.approx(wanted)
    near = discrepancy(torch.from_numpy(x), torch.from_numpy(x[:4]))
    assert 0 <= near < wanted
    assert discrepancy(torch.from_numpy(x), torch.from_numpy(z[:0])) == 0
    assert math.isnan(discrepancy(torch.from_numpy(x[:0]), torch.from_numpy(z)))
    assert math.isnan(discrepancy(torch.ones(3, 2).double(), torch.ones(2, 2).double()))


def test_the_attacked_class_and_triggered_inputs_stand_out() -> None:
    p, method = poisoned(), Beatrix(orders=3)
    some = torch.arange(0, 350, 2)
    clean = to_float(samples.digits()["test"].images[some])
    triggered = to_float(samples.badnets_rendered("test", Role.TEST).data.images[some])
    before = pack(samples.badnets_net()).state
    c = case(train=p.data)
    outcome: Any = method.run(c)
    assert outcome.verdict.score > outcome.verdict.threshold == pytest.approx(math.exp(2))
    assert int(outcome.verdict.label_scores.argmax()) == 0 and outcome.verdict.label_scores.shape == (10,)
    assert int((outcome.verdict.label_scores > outcome.verdict.threshold).sum()) == 1
    assert auroc(outcome.suspicion[p.mark == 1], outcome.suspicion[p.mark == 0]) > 0.8
    scores = [method.score(outcome.state, c.net, x) for x in (triggered, clean)]
    assert auroc(*scores) > 0.85
    # By construction about 5 % of clean inputs are above their class's threshold, with few rows more of them.
    assert outcome.alarm == 1 and float((scores[1] > 1).double().mean()) < 0.5
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    labels, _ = labelled(c.net, "body.stage3", to_float(c.clean.images))
    # To find the layer, the clean rows' classes, the ranges and the suspects.
    assert c.ctx.cost.forwards == 1 + 150 + int(labels.bincount().clamp(max=30).sum()) + len(p.data)
    again: Any = method.run(case(train=p.data))
    assert all(torch.equal(again.state[0][n], t) for n, t in outcome.state[0].items())
    assert torch.equal(again.suspicion, outcome.suspicion)

    other: Any = method.run(case(net=samples.clean_net(), train=samples.digits()["train"]))
    assert other.verdict.score < other.verdict.threshold
    scores = [method.score(other.state, samples.clean_net(), x) for x in (triggered, clean)]
    assert auroc(*scores) < 0.65


def test_a_run_is_made_of_these_parts() -> None:
    net, data = samples.badnets_net(), poisoned().data.rows(torch.arange(300))
    method = Beatrix(orders=2, per_class=9, group=20)
    c = case(train=data)
    outcome: Any = method.run(c)
    tensors, about = outcome.state
    assert about == {"site": "body.stage3"} and place(net, to_float(data.images[:1])) == "body.stage3"

    pool = to_float(c.clean.images)
    labels, a = labelled(net, "body.stage3", pool)
    with evaluating(net), torch.no_grad():
        assert torch.equal(a, net.body.stage3(net.body.stage2(net.body.stage1((pool - 0.5) / 0.5))))
        assert torch.equal(labels, net(pool).argmax(1))
    order = torch.randperm(150, generator=c.ctx.generator("rows"))
    for k in (0, 4):
        rows = [i for i in order.tolist() if int(labels[i]) == k][:9]
        assert len(rows) == 9
        low, high, threshold = method.calibrate(torch.cat(list(grams(a[rows], 2))))
        assert torch.allclose(tensors["low"][k], low.float(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(tensors["high"][k], high.float(), rtol=1e-5, atol=1e-6)
        assert float(tensors["threshold"][k]) == pytest.approx(float(threshold), rel=1e-3)

    labels, a = labelled(net, "body.stage3", to_float(data.images))
    g = torch.cat(list(grams(a, 2)))
    for i in (0, 7, 299):
        k = int(labels[i])
        value = float(deviations(g[i : i + 1], tensors["low"][k].double(), tensors["high"][k].double())[0])
        wanted = (value + 1e-6) / (float(tensors["threshold"][k]) + 1e-6)
        assert float(outcome.suspicion[i]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert torch.equal(outcome.keep, outcome.suspicion <= 1) and outcome.chosen["dropped"] == int((~outcome.keep).sum())
    scores = method.score(outcome.state, net, to_float(data.images))
    assert torch.allclose(scores.double(), outcome.suspicion, rtol=1e-3, atol=1e-6)
    x = a.mean((2, 3)).double()
    for k in (0, 2):
        mine, suspect = x[labels == k], ~outcome.keep[labels == k]
        wanted = discrepancy(mine[~suspect][:20], mine[suspect][:20])
        assert outcome.chosen["discrepancy"][str(k)] == pytest.approx(wanted)
    assert outcome.chosen["discrepancy"]["0"] > 1


def test_classes_without_clean_rows_borrow_a_range() -> None:
    pool, data = samples.digits()["pool"], samples.digits()["train"].rows(torch.arange(200))
    known = (pool.labels < 3) | (torch.arange(150) == int((pool.labels == 5).nonzero()[0, 0]))
    outcome: Any = Beatrix(orders=1).run(case(clean=pool.rows(known), train=data))
    tensors = outcome.state[0]
    assert tensors["own"].tolist() == [True] * 3 + [False] * 7
    assert outcome.chosen["classes_without_rows"] == [3, 4, 5, 6, 7, 8, 9]
    for name in ("low", "high", "threshold"):
        assert torch.equal(tensors[name][5], tensors[name][9]) and not torch.equal(tensors[name][0], tensors[name][9])
    assert set(outcome.chosen["discrepancy"]) <= {"0", "1", "2"}
    assert outcome.verdict is None  # among three classes none is an outlier
    assert bool(outcome.suspicion.isfinite().all())


def test_what_it_declines_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    few = samples.digits()["pool"].rows(torch.arange(4))
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 4"):
        Beatrix().run(case(clean=few, train=few))
    # A transformer's stages answer with tokens.
    monkeypatch.setattr(beatrix, "capture", lambda net, x, names: {names[0]: torch.zeros(1, 17, 12)})
    with pytest.raises(NotApplicable, match="no_spatial_stage"):
        Beatrix().run(case(train=few))
    m = Beatrix()
    assert (m.per_class, m.orders, m.width, m.quantile, m.group) == (30, 8, 10, 0.95, 500)
    assert m.threshold == pytest.approx(math.exp(2))
    assert Beatrix.ACCESS.track() == "T3"
    for bad in ({"per_class": 4}, {"orders": 0}, {"width": 0.0}, {"quantile": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Beatrix(**bad)  # type: ignore[arg-type]
