from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn

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
from sleeperbench.kit.classifier import Classifier, build, pack
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


def test_pruning_answers_the_most_that_is_accepted() -> None:
    c, size = case(), sum(channels(samples.clean_net()).values())
    none, all_gone = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    outcome = prune_most(c, c.val, {3.0: none, 0.5: all_gone}, what="u", form="u={:.1f}")
    assert list(outcome.path) == ["u=3.0", "u=0.5"]
    assert {k: outcome.chosen[k] for k in ("u", "pruned", "channels")} == {"u": 3.0, "pruned": 0, "channels": size}
    assert outcome.chosen["candidates"]["u=0.5"]["pruned"] == size
    assert outcome.model is outcome.path["u=3.0"]
    nothing = prune_most(c, c.val, {0.5: all_gone}, what="u", form="u={:.1f}")
    assert nothing.model is None
    assert (nothing.chosen["u"], nothing.chosen["pruned"]) == (None, 0)
    given = prune_at(c, all_gone, {"u": 0.5})
    assert given.chosen == {"u": 0.5, "pruned": size, "channels": size}
    assert given.model is not None and not given.path
    assert float(given.model.state["body.stage1.1.weight"].abs().sum()) == 0


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
