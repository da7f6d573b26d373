from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.contracts import NotApplicable
from sleeperbench.kit.candidates import (
    THRESHOLDS,
    before_norms,
    certifies,
    growing,
    outlying,
    pick,
    prune_at,
    prune_most,
    split,
)
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.gates import channels, pruned
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import right


def case(val: int = 120) -> Any:
    rows = samples.digits()["test"]
    n = len(rows) - val
    return SimpleNamespace(
        net=samples.clean_net(),
        clean=rows,
        tune=rows.rows(torch.arange(n)),
        val=rows.rows(torch.arange(n, len(rows))),
        ctx=samples.ctx(9),
    )


def test_only_settings_that_remove_more_are_candidates() -> None:
    mask = torch.tensor([1.0, 0.2, 0.21, 0.0, 0.95, 0.62])
    found = growing((t, mask > t) for t in THRESHOLDS)
    assert list(found) == [0.0, 0.2, 0.25, 0.65]
    assert [int((~k).sum()) for k in found.values()] == [1, 2, 3, 4]
    assert torch.equal(found[0.25], torch.tensor([True, False, False, False, True, True]))
    assert growing((t, torch.tensor([0.91, 1.0]) > t) for t in THRESHOLDS) == {}
    assert list(growing((t, torch.tensor([0.9, 0.0]) > t) for t in THRESHOLDS)) == [0.0, 0.9]
    assert (THRESHOLDS[0], THRESHOLDS[-1], len(THRESHOLDS)) == (0.0, 0.9, 19)


def test_candidates_are_judged_on_rows_that_made_none_of_them() -> None:
    enough = case(val=114)
    assert split(enough) == (enough.tune, enough.val)
    short = case(val=113)
    rows, held = split(short)
    assert (len(rows), len(held)) == (277, 120)
    assert torch.equal(torch.cat([rows.ids, held.ids]).sort().values, short.clean.ids.sort().values)
    off = torch.bincount(held.labels, minlength=10) - 0.3 * torch.bincount(short.clean.labels, minlength=10)
    assert float(off.abs().max()) < 3, "three tenths, each to within a row of every class"
    assert torch.equal(held.ids, split(short)[1].ids)
    assert [certifies(n) for n in (0, 113, 114)] == [False, False, True]


def without_stage(net: Classifier, n: int) -> Classifier:
    """All channels of the first `n` layers gone."""
    sizes = list(channels(net).values())
    keep = torch.ones(sum(sizes), dtype=torch.bool)
    keep[: sum(sizes[:n])] = False
    return pruned(net, keep)


def test_the_last_accepted_candidate_is_picked_and_all_are_kept() -> None:
    c = case()
    same, ruined = copy.deepcopy(c.net), without_stage(c.net, 4)
    made = [("a", same, {"x": 1}), ("b", copy.deepcopy(c.net), {}), ("c", ruined, {})]
    picked = pick(c.net, iter(made), c.val, ctx=c.ctx, what="letter")
    assert picked.name == "b"
    assert list(picked.path) == ["a", "b", "c"]
    accuracy = float(right(c.net, c.val, ctx=samples.ctx()).double().mean())
    low = float(right(ruined, c.val, ctx=samples.ctx()).double().mean())
    assert low < accuracy - 0.3
    assert picked.about == {
        "rows": 120,
        "accuracy_before": accuracy,
        "accuracy_after": accuracy,
        "candidates": {"a": {"x": 1, "accuracy": accuracy}, "b": {"accuracy": accuracy}, "c": {"accuracy": low}},
    }
    assert all(torch.equal(pack(ruined).state[k], v) for k, v in picked.path["c"].state.items())
    assert c.ctx.cost.forwards == 4 * 120


def test_a_candidate_that_diverges_ends_the_list_and_not_the_choice() -> None:
    c = case()

    def made() -> Iterator[tuple[str, Classifier, dict[str, Any]]]:
        yield "a", copy.deepcopy(c.net), {}
        yield "b", copy.deepcopy(c.net), {}
        raise FloatingPointError("loss is nan after epoch 3")

    picked = pick(c.net, made(), c.val, ctx=c.ctx, what="letter")
    assert (picked.name, list(picked.path)) == ("b", ["a", "b"])
    assert picked.about["diverged"] == "loss is nan after epoch 3"
    assert list(picked.about["candidates"]) == ["a", "b"]
    with pytest.raises(ZeroDivisionError):
        pick(c.net, (("a", c.net, {"x": 1 / 0}) for _ in "a"), c.val, ctx=c.ctx, what="letter")


@pytest.mark.parametrize(("n", "why"), [(120, "no letter was accepted"), (100, "100 held-out rows are too few")])
def test_none_is_picked_where_none_is_accepted(n: int, why: str) -> None:
    c = case()
    held: ImageSet = c.val.rows(torch.arange(n))
    net = without_stage(c.net, 4) if n == 120 else copy.deepcopy(c.net)
    picked = pick(c.net, [("only", net, {})], held, ctx=c.ctx, what="letter")
    assert picked.name is None
    assert picked.about["unchanged"] == why
    assert picked.about["accuracy_after"] == picked.about["accuracy_before"]
    assert pick(c.net, [], held, ctx=c.ctx, what="letter").about["candidates"] == {}


class ById(nn.Module):
    """Right on all rows but those in `wrong`: a row's first two pixels hold its number, and its label is that modulo 3.

    Reads nothing but the number, so it stands for a network whose answers are known.
    """

    def __init__(self, wrong: Tensor) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        number = (x[:, 0, 0, :2] * 255).round().long() @ torch.tensor([256, 1])
        return F.one_hot((number + torch.isin(number, self.wrong).long()) % 3, 3).float()


NONE = torch.zeros(0, dtype=torch.long)


def numbered(n: int, wrong: Tensor = NONE) -> Any:
    """`n` rows that know their number; the untouched model misses `wrong`."""
    ids = torch.arange(n)
    pixels = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, 0] = torch.stack([ids // 256, ids % 256], 1).to(torch.uint8)
    rows = replace(samples.images(pixels, ids % 3, 3), ids=ids)
    return SimpleNamespace(net=ById(wrong), clean=rows, ctx=samples.ctx(9))


class Fits:
    """Fits whose masks and errors are known: the i-th has `masks[i]` and, with r channels gone, misses `lost(i, r)`."""

    def __init__(self, masks: Any, lost: Callable[[int, int], Tensor]) -> None:
        self.masks, self.lost = masks, lost
        self.given: list[ImageSet] = []
        self.before: Callable[[], Any] = lambda: None

    def __call__(self, rows: ImageSet) -> Callable[[float], Tensor]:
        self.given.append(rows)
        mask = self.masks[len(self.given) - 1]
        return lambda t: mask > t

    def made(self, keep: Tensor) -> Any:
        assert self.before() is None, "one candidate at a time"
        net = ById(self.lost(len(self.given) - 1, int((~keep).sum())))
        if len(self.given) < len(self.masks):  # the last fit's are all kept
            self.before = weakref.ref(net)
        return net


def run(case: Any, fits: Fits, monkeypatch: pytest.MonkeyPatch, k: int = 5) -> Any:
    monkeypatch.setattr("sleeperbench.kit.candidates.pack", lambda net: net)
    return prune_most(case, THRESHOLDS, fits, what="threshold", form="t={:.2f}", k=k, made=fits.made)


@pytest.mark.parametrize(("k", "seed"), [(2, 0), (3, 1), (5, 2), (5, 3), (5, 4), (5, 5)])
def test_the_threshold_is_that_of_a_slow_count_over_all_folds(
    monkeypatch: pytest.MonkeyPatch, k: int, seed: int
) -> None:
    """Every fold's fit removes other channels at a threshold and loses other rows: what counts is lost over all."""
    gen = torch.Generator().manual_seed(seed)
    n, base = 500, torch.randperm(500, generator=gen)[:20]
    masks = torch.rand(k + 1, 30, generator=gen)
    luck = torch.rand(k + 1, n, generator=gen)  # the row is lost where less of this than of channels is left

    def lost(i: int, gone: int) -> Tensor:
        away = luck[i] < 0.0008 * gone
        away[base] &= luck[i][base] < 0.3  # the untouched model misses these; a few are gained
        away[base] |= luck[i][base] > 0.1
        return away.nonzero()[:, 0]

    case, fits = numbered(n, base), Fits(masks, lost)
    outcome = run(case, fits, monkeypatch, k)
    right_before = {i: i not in set(base.tolist()) for i in range(n)}
    accepted, accuracy = [], {}
    for t in THRESHOLDS:
        b = c = 0
        for i in range(k):
            seen = set(fits.given[i].ids.tolist())
            wrong = set(lost(i, sum(m <= t for m in masks[i].tolist())).tolist())
            for row in range(n):
                if row not in seen:
                    b += right_before[row] and row in wrong
                    c += not right_before[row] and row not in wrong
        bound = (b + 1 - c + 1.2815515655446004 * math.sqrt(b + 1 + c - (b + 1 - c) ** 2 / n)) / n
        accuracy[t] = (n - len(base) - b + c) / n
        if bound <= 0.02:
            accepted.append(t)
    assert 0 < len(accepted) < len(THRESHOLDS)
    best = outcome.chosen["threshold"]
    assert best == max(accepted)
    assert outcome.chosen["accuracy_after"] == pytest.approx(accuracy[best])
    assert outcome.chosen["accuracy_before"] == (n - len(base)) / n
    assert (outcome.chosen["rows"], outcome.chosen["folds"]) == (n, k)
    told = {float(name[2:]): about["accuracy"] for name, about in outcome.chosen["candidates"].items()}
    assert told == pytest.approx({t: accuracy[t] for t in told}) and len(told) > 5
    # The last fit had all rows; what the threshold removes of it is the answer.
    assert fits.given[k] is case.clean and len(fits.given) == k + 1
    gone = int((masks[k] <= best).sum())
    assert outcome.chosen["pruned"] == gone
    assert torch.equal(outcome.model.wrong, lost(k, gone))
    assert {name: about["pruned"] for name, about in outcome.chosen["candidates"].items()} == {
        name: int((masks[k] <= float(name[2:])).sum()) for name in outcome.path
    }


def test_no_row_is_judged_by_a_fit_that_saw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remembers(Fits):
        def made(self, keep: Tensor) -> Any:  # right on just the rows that its fit was given
            return ById(torch.tensor(sorted(set(range(150)) - set(self.given[-1].ids.tolist()))))

    case, fits = numbered(150), Remembers([torch.zeros(4)] * 6, lambda i, r: NONE)
    outcome = run(case, fits, monkeypatch)
    assert outcome.chosen["accuracy_before"] == 1.0
    assert outcome.chosen["candidates"] == {"t=0.00": {"pruned": 4, "accuracy": 0.0}}
    assert outcome.model is None and outcome.chosen["unchanged"] == "no threshold was accepted"
    given = [set(g.ids.tolist()) for g in fits.given]
    assert [len(g) for g in given] == [120] * 5 + [150]
    assert set.union(*(given[5] - g for g in given[:5])) == given[5]
    # Untouched, and one distinct candidate per fold on the rows left out.
    assert case.ctx.cost.forwards == 150 + 150


def test_settings_are_judged_by_value_and_applied_to_the_last_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds remove one channel from 0.2 on and a second, which ruins, from 0.45 on: 0.40 is the choice."""
    folds = [torch.tensor([0.2, 0.45, 1.0])] * 5

    def lost(i: int, gone: int) -> Tensor:
        return torch.arange(200 if gone > 1 else 0)

    same = run(numbered(200), Fits([*folds, torch.tensor([0.1, 0.25, 0.7])], lost), monkeypatch)
    # Of the last fit 0.40 removes what 0.25 does, under whose name the candidate stands.
    assert list(same.path) == ["t=0.10", "t=0.25", "t=0.70"]
    assert (same.chosen["threshold"], same.chosen["pruned"]) == (0.4, 2)
    assert same.model is same.path["t=0.25"]
    assert same.chosen["accuracy_after"] == same.chosen["candidates"]["t=0.25"]["accuracy"] == 1.0
    assert same.chosen["candidates"]["t=0.70"]["accuracy"] == 0.0
    edge = run(numbered(200), Fits([*folds, torch.tensor([0.4, 0.41, 1.0])], lost), monkeypatch)
    assert list(edge.path) == ["t=0.40", "t=0.45"]
    assert edge.model is edge.path["t=0.40"] and edge.chosen["pruned"] == 1
    none = run(numbered(200), Fits([*folds, torch.tensor([0.5, 0.5, 1.0])], lost), monkeypatch)
    assert none.model is None and list(none.path) == ["t=0.50"]
    assert (none.chosen["threshold"], none.chosen["pruned"]) == (0.4, 0)
    assert none.chosen["unchanged"] == "t=0.40 removes no channel"
    # A row that folds lost is not lost by a model that stays.
    one = run(numbered(200), Fits([*folds, torch.ones(3)], lambda i, gone: torch.arange(gone)), monkeypatch)
    assert one.chosen["threshold"] == 0.4 and one.model is None and not one.path
    assert one.chosen["accuracy_after"] == one.chosen["accuracy_before"] == 1.0


def test_too_few_rows_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    case, fits = numbered(113), Fits([torch.tensor([0.2, 1.0])], lambda i, r: NONE)
    outcome = run(case, fits, monkeypatch)
    assert len(fits.given) == 1 and fits.given[0] is case.clean
    assert outcome.model is None and list(outcome.path) == ["t=0.20"]
    assert outcome.chosen == {
        "threshold": None,
        "pruned": 0,
        "channels": 2,
        "rows": 113,
        "folds": 0,
        "accuracy_before": 1.0,
        "accuracy_after": 1.0,
        "candidates": {"t=0.20": {"pruned": 1}},
        "unchanged": "113 clean rows are too few",
    }
    assert case.ctx.cost.forwards == 113
    enough = run(numbered(114), Fits([torch.tensor([0.2, 1.0])] * 6, lambda i, r: NONE), monkeypatch)
    assert enough.chosen["threshold"] == 0.9 and enough.model is enough.path["t=0.20"]


@pytest.mark.parametrize(("n", "most"), [(150, 0), (216, 1), (500, 5), (2500, 40)])
def test_as_many_rows_may_be_lost_as_the_bound_allows(monkeypatch: pytest.MonkeyPatch, n: int, most: int) -> None:
    """At 500 rows five, spread over the folds as they fall."""
    for lost, taken in ((most, True), (most + 1, False)):
        away = torch.arange(lost) * 7
        outcome = run(numbered(n), Fits([torch.zeros(1)] * 6, lambda i, r, away=away: away), monkeypatch)  # type: ignore[misc]
        assert (outcome.model is not None) is taken
        assert outcome.chosen["candidates"]["t=0.00"]["accuracy"] == pytest.approx(1 - lost / n)


def test_a_network_is_pruned_as_the_gates_prune_it() -> None:
    c, size = case(), sum(channels(samples.clean_net()).values())
    mask = torch.ones(size)
    mask[:8] = 0.5  # the whole first layer
    outcome = prune_most(c, (0.2, 0.5), lambda rows: lambda t: mask > t, what="u", form="u={:.1f}", k=2)
    assert outcome.chosen["u"] == 0.2 and outcome.chosen["unchanged"] == "u=0.2 removes no channel"
    expected = pack(pruned(c.net, mask > 0.5)).state
    assert all(torch.equal(v, outcome.path["u=0.5"].state[k]) for k, v in expected.items())
    ruined = float(right(load(outcome.path["u=0.5"]), c.clean, ctx=samples.ctx()).double().mean())
    assert outcome.chosen["candidates"]["u=0.5"] == {"pruned": 8, "accuracy": pytest.approx(ruined)}
    all_gone = torch.zeros(size, dtype=torch.bool)
    given = prune_at(c, all_gone, {"u": 0.5})
    assert given.chosen == {"u": 0.5, "pruned": size, "channels": size}
    assert given.model is not None and not given.path
    assert float(given.model.state["body.stage1.1.weight"].abs().sum()) == 0
    other = samples.badnets_net()
    own = prune_at(c, all_gone, {"u": 0.5}, lambda keep: other if torch.equal(keep, all_gone) else c.net)
    assert own.chosen == given.chosen and own.model is not None
    assert all(torch.equal(v, own.model.state[k]) for k, v in pack(other).state.items())


def test_outlying_scores_equal_numpy() -> None:
    score = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    score[[4, 9]] = torch.tensor([5.0, 3.2], dtype=torch.float64)
    for u in (0.0, 1.0, 2.0, 3.0):
        cut = np.mean(score.numpy()) + u * np.std(score.numpy(), ddof=1)
        assert outlying(score, u).tolist() == (score.numpy() > cut).tolist()
    with_gaps = torch.cat([score, torch.full((5,), torch.nan, dtype=torch.float64)])
    assert outlying(with_gaps, 2.0).tolist() == [*outlying(score, 2.0).tolist(), *[False] * 5]
    assert not outlying(torch.tensor([7.0]), 0.0).any(), "one channel stands out from nothing"
    for n, most in ((10, False), (11, True)):
        assert bool(outlying(torch.eye(n, dtype=torch.float64)[0], 3.0).any()) is most
    assert not outlying(torch.full((3,), torch.nan), 0.0).any()


def test_inputs_of_norms_are_those_of_a_pass_by_hand() -> None:
    net, images = samples.clean_net(), samples.digits()["pool"].images[:20]
    state, c = pack(net).state, samples.ctx()
    net.train()
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x.sum((2, 3))

    found = before_norms(net, images, look, ctx=c)
    assert net.training and not any(seen)
    net.eval()
    assert list(found) == list(channels(net))
    x = (to_float(images) - 0.5) / 0.5
    with torch.no_grad():
        for stage, name in zip((net.body.stage1, net.body.stage2, net.body.stage3), found, strict=False):
            assert torch.allclose(found[name], stage[0](x).sum((2, 3)), atol=1e-4)
            x = stage(x)
    assert c.cost.forwards == 20
    assert all(torch.equal(state[k], v) for k, v in pack(net).state.items())
    assert not any(m._forward_pre_hooks for m in net.modules())
    plain = build(samples.SPEC, 1)
    for i in range(1, 5):
        getattr(plain.body, f"stage{i}")[1] = nn.Identity()
    with pytest.raises(NotApplicable, match="needs_bn"):
        before_norms(plain, images, look, ctx=c)
