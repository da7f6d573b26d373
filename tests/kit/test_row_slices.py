from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.kit import row_slices, slices
from sleeperbench.kit.row_slices import isolate_rows, row_thresholds, tops
from sleeperbench.kit.slices import Isolation, Settings

Pair = tuple[float, float]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int, classes: int = 4, size: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(2 * size * size, 16), nn.Tanh(), nn.Linear(16, classes))
    net[1].weight.data *= 3
    return net.double().eval().requires_grad_(False)


def quantile(values: list[float], q: float) -> float:
    ordered, at = sorted(values), q * (len(values) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def largest(values: list[float], share: float) -> set[int]:
    ordered = sorted(range(len(values)), key=lambda i: -values[i])
    return set(ordered[: math.ceil(share * len(values))])


def slow_pairs(gaps: Tensor, benign: Tensor) -> list[Pair]:
    """Equation 7 of one row, by sets of pixels."""
    width = gaps.shape[1]
    e, s = gaps.flatten().tolist(), benign.flatten().tolist()
    positive = [v for v in e if v > 0]
    if len(positive) < 12:
        return []

    def shape(part: set[int]) -> tuple[float, float, float]:
        points = [divmod(i, width) for i in part]
        a, b = (sum(p[k] for p in points) / len(points) for k in (0, 1))
        return a, b, sum(math.hypot(i - a, j - b) for i, j in points) / len(points)

    cuts = sorted({quantile(positive, 0.2 + k * 0.78 / 11) for k in range(12)})
    cost: dict[Pair, float] = {}
    for low, high in itertools.combinations(cuts, 2):
        upper = {i for i, v in enumerate(e) if v >= high}
        middle = {i for i, v in enumerate(e) if low < v < high}
        theirs = {i for i, v in enumerate(s) if v >= high}
        if len(theirs) < 4:
            theirs = largest(s, 0.05)
        if min(map(len, (upper, middle, theirs))) < 4:
            continue
        a, b, radius = shape(middle)
        cost[low, high] = 0.0
        for c, d, other in (shape(upper), shape(theirs)):
            far, wide = math.hypot(c - a, d - b), abs(other - radius)
            cost[low, high] += (far + wide) / (far * wide + 1e-6)
    return sorted(cost, key=lambda pair: cost[pair])


def test_thresholds_of_every_row_are_those_of_equation_7() -> None:
    gaps, benign = (rand(7, 9, 10, seed=seed).double().square() * 0.1 for seed in (3, 4))
    gaps[1], gaps[2, 1:], gaps[3] = 0, 0, (gaps[3] - 0.03).clamp_min(0)
    benign[4], benign[5] = benign[4] * 0.1, 0.05  # a benign slice of the largest 5 %, and one of nothing or all
    gaps[6] = (gaps[6] * 60).round() / 60  # quantiles that are equal
    found = row_thresholds(gaps, benign)
    assert found.shape == (7, 8, 2)
    for row, e, s in zip(found, gaps, benign, strict=True):
        wanted = slow_pairs(e, s)[:8]
        kept = row[~row.isnan().any(1)]
        assert len(kept) == len(wanted)
        assert torch.allclose(kept, torch.tensor(wanted).double().view(-1, 2), atol=1e-12)
    counts = (~found.isnan().any(2)).sum(1).tolist()
    assert counts == [8, 0, 0, 8, 8, 8, 8]
    assert len({tuple(row.flatten().tolist()) for row in found[[0, 3, 4, 5, 6]]}) == 5
    one_by_one = [row_thresholds(gaps[i : i + 1], benign[i : i + 1])[0] for i in range(7)]
    assert torch.equal(torch.stack(one_by_one).nan_to_num(-1), found.nan_to_num(-1))
    assert row_thresholds(torch.full((1, 9, 9), 0.3), torch.rand(1, 9, 9)).isnan().all()


def test_rows_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps, benign = (rand(5, 8, 8, seed=seed) for seed in (1, 2))
    whole = row_thresholds(gaps, benign)
    monkeypatch.setattr("sleeperbench.kit.row_slices._ELEMENTS", 2 * 66 * 64)
    assert torch.equal(row_thresholds(gaps, benign), whole)


def test_the_largest_pixels_of_every_row() -> None:
    gaps = rand(4, 5, 6)
    gaps[2] = 0.5
    for share in (0.02, 0.3, 1.0):
        for row, found in zip(gaps, tops(gaps, share), strict=True):
            chosen = set(found.flatten().nonzero().flatten().tolist())
            assert chosen == largest(row.flatten().tolist(), share)


class Asked(nn.Module):
    """A small net that computes in double precision, so that no order of adding decides a sign."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = mlp(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.double())


ROWS, FITTED = 60, 40


def case(net: nn.Module) -> Any:
    """Rows that the network is right on, but for every seventh."""
    pixels = (rand(ROWS, 2, 8, 8, seed=9) * 255).byte()
    labels = net(pixels.float() / 255).argmax(1)
    labels[::7] = (labels[::7] + 1) % 4
    data = samples.images(pixels, labels, classes=4)
    tune, val = data.rows(torch.arange(FITTED)), data.rows(torch.arange(FITTED, ROWS))
    return SimpleNamespace(net=net, spec=SimpleNamespace(classes=4), tune=tune, val=val, ctx=samples.ctx())


class Slow:
    """IsTr's slices, one image at a time."""

    def __init__(self, c: Any, reference: nn.Module, settings: Settings) -> None:
        self.net, self.reference, self.s = c.net, reference, settings
        self.x = torch.cat([c.tune.images, c.val.images]).float() / 255
        self.y = torch.cat([c.tune.labels, c.val.labels]).tolist()
        self.rows: dict[int, list[int]] = {n: [] for n in range(4)}
        self.moved: dict[int, Tensor] = {}
        self.mapped: dict[int, tuple[Tensor, Tensor]] = {}
        self.right = [i for i in range(ROWS) if self.label(self.x[i]) == self.y[i]]
        for i in self.right:
            self.moved[i] = self.steps(i)
            got = self.label(self.x[i] + self.moved[i])
            if got != self.y[i]:
                self.rows[got].append(i)

    def label(self, x: Tensor) -> int:
        return int(self.net(x[None]).argmax())

    def steps(self, i: int) -> Tensor:
        x, t = self.x[i], torch.zeros_like(self.x[i])
        for _ in range(self.s.steps):
            seen = (x + t)[None].requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(self.net(seen), torch.tensor([self.y[i]])), seen)
            t = (t + self.s.step * g[0].sign()).clamp(-x, 1 - x)
        return t

    def maps(self, i: int) -> tuple[Tensor, Tensor]:
        if i not in self.mapped:
            self.mapped[i] = self.windows(i)
        return self.mapped[i]

    def windows(self, i: int) -> tuple[Tensor, Tensor]:
        x, (gaps, benign, covered) = self.x[i], torch.zeros(3, 8, 8).double()
        other = x + self.moved[i] if self.s.delta == "steps" else 1 - x
        for a, b in itertools.product(range(7), range(7)):
            changed = x.clone()
            changed[:, a : a + 2, b : b + 2] = other[:, a : a + 2, b : b + 2]
            f, s = (
                float((n(x[None]).softmax(1) - n(changed[None]).softmax(1)).square().sum().sqrt())
                for n in (self.net, self.reference)
            )
            covered[a : a + 2, b : b + 2] += 1
            gaps[a : a + 2, b : b + 2] += max(0.0, f - s)
            benign[a : a + 2, b : b + 2] += s
        return gaps / covered, benign / covered

    def lands(self, i: int, inside: Tensor, label: int) -> bool:
        return self.label(self.x[i] + self.moved[i] * inside) == label

    def inside(self, i: int, label: int, share: float) -> tuple[Tensor, Pair | None]:
        """The row's slice; where it comes from eq. 7, the first of eight inside which T still works."""
        gaps, benign = self.maps(i)
        if self.s.slices == "topdown":
            chosen = largest(gaps.flatten().tolist(), share)
            return torch.tensor([k in chosen for k in range(64)]).view(8, 8), None
        pairs = [(0.01, 0.05)] if self.s.slices == "fixed" else slow_pairs(gaps, benign)[:8]
        for low, high in pairs:
            mask = (gaps > low) & (gaps < high)
            if self.s.slices == "fixed" or self.lands(i, mask, label):
                return mask, (low, high)
        return torch.zeros(8, 8, dtype=torch.bool), None

    def trial(self, label: int, share: float) -> dict[str, Any]:
        found = {i: self.inside(i, label, share) for i in self.rows[label]}
        still = [i for i in found if self.lands(i, found[i][0], label)]
        mine = [i for i in still if i < FITTED]
        delta, cover = torch.zeros(2, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
        for i in mine:
            delta += self.moved[i] * found[i][0] / len(mine)
            cover |= found[i][0]
        others = [i for i in range(FITTED, ROWS) if self.y[i] != label]
        hit = sum(self.label((self.x[i] + delta).clamp(0, 1)) == label for i in others)
        pairs = [found[i][1] for i in mine]
        return {"delta": delta, "mask": cover, "success": hit / len(others), "still": still, "pairs": pairs}

    def last(self, label: int, still: list[int]) -> list[float]:
        classes = [[i for i in self.right if self.y[i] == m] for m in range(4)]
        return [len(set(still) & set(rows)) / len(rows) for rows in classes]


@pytest.mark.parametrize("delta", ["invert", "steps"])
@pytest.mark.parametrize("kind", ["adaptive", "fixed", "topdown"])
def test_rows_are_sliced_as_one_by_one(kind: Any, delta: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_slices, "MUTATED", 5)
    seen: list[Tensor] = []
    judged = slices.judged

    def watched(*args: Any) -> Isolation:
        seen.append(args[4])
        return judged(*args)

    monkeypatch.setattr(row_slices, "judged", watched)
    settings = Settings(steps=6, step=0.06, slices=kind, delta=delta)
    net, reference = Asked(0), Asked(1)
    c = case(net)
    found, slow = isolate_rows(c, reference, settings), Slow(c, reference, settings)
    looked = [n for n in slow.rows if sum(i < FITTED for i in slow.rows[n]) >= 5]
    assert sorted(s.label for s in found.slices) == looked and len(looked) >= 2
    kept = 0
    for s in found.slices:
        wanted = [slow.trial(s.label, share) for share in (slices.AREAS if kind == "topdown" else (1.0,))]
        goal = 0.9 if kind == "topdown" else 0.8
        enough = next((k for k, w in enumerate(wanted) if w["success"] >= goal), len(wanted) - 1)
        assert len(s.trials) == enough + 1
        for trial, w in zip(s.trials, wanted, strict=False):
            assert trial.success == pytest.approx(w["success"])
            assert torch.equal(trial.mask, w["mask"])
            assert trial.area == pytest.approx(float(w["mask"].double().mean()))
            assert torch.allclose(trial.delta, w["delta"], atol=1e-5)
            pairs = [p for p in w["pairs"] if p]
            middles = [sorted(p[k] for p in pairs)[(len(pairs) - 1) // 2] for k in (0, 1)] if pairs else None
            assert (trial.thresholds is None) == (middles is None) == (kind == "topdown")
            assert middles is None or trial.thresholds == pytest.approx(middles, abs=1e-5)
        best = max(wanted[: enough + 1], key=lambda w: w["success"])
        assert seen[0][:, s.label].tolist() == pytest.approx(slow.last(s.label, best["still"]))
        kept += len(best["still"])
        gaps = [slow.maps(i)[0] for i in slow.rows[s.label] if i < FITTED]
        assert torch.allclose(s.gaps.double(), torch.stack(gaps).mean(0), atol=1e-5)
    assert 0 < kept < sum(len(slow.rows[n]) for n in looked) or kind == "topdown"
