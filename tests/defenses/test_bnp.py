from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import losing
import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench.defenses.bnp import BNP, DEVIATIONS, divergence
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.gates import channels, pruned
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, folds, right


def case(net: Any = None) -> Any:
    net = samples.badnets_net() if net is None else net
    return SimpleNamespace(net=net, clean=samples.digits()["test"], ctx=samples.ctx(9))


def test_the_divergence_equals_an_integral() -> None:
    grid = np.linspace(-40, 40, 400001)

    def density(mean: float, var: float) -> Any:
        return np.exp(-((grid - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)

    values = [(0.3, 2.0, -1.0, 0.7), (0.0, 1.0, 0.0, 1.0), (2.0, 0.5, 2.5, 3.0)]
    for mean, var, mean_r, var_r in values:
        p, q = density(mean, var), density(mean_r, var_r)
        terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0.0)
        args = [torch.tensor(v, dtype=torch.float64) for v in (mean, var, mean_r, var_r)]
        assert float(divergence(*args)) == pytest.approx(float(np.sum(terms) * (grid[1] - grid[0])), abs=1e-6)


def slow(net: Any, images: Tensor) -> dict[str, Any]:
    """Stage by stage in numpy, from the convolutions' answers."""
    x, found = (to_float(images) - 0.5) / 0.5, {}
    for i in range(1, 5):
        conv, norm, relu = getattr(net.body, f"stage{i}")
        with torch.no_grad():
            a = conv(x).double().numpy()
            x = relu(norm(conv(x)))
        values = np.moveaxis(a, 1, 0).reshape(a.shape[1], -1)
        m, v = values.mean(1), values.var(1, ddof=1) + 1e-5
        mr, vr = norm.running_mean.double().numpy(), norm.running_var.double().numpy() + 1e-5
        found[f"body.stage{i}.1"] = np.log(np.sqrt(vr) / np.sqrt(v)) + (v + (m - mr) ** 2) / (2 * vr) - 0.5
    return found


def test_scores_equal_numpy() -> None:
    net, images, c = samples.badnets_net(), samples.digits()["pool"].images, samples.ctx()
    state = torch.get_rng_state()
    found = BNP().scores(net, images, c)
    expected = slow(net, images)
    assert list(found) == list(expected) == list(channels(net))
    for name, score in found.items():
        assert score.dtype == torch.float64
        assert np.allclose(score.numpy(), expected[name], rtol=1e-4, atol=1e-5)
        assert float(score.min()) >= 0
    assert c.cost.forwards == len(images) and c.cost.backwards == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics_that_are_the_running_ones_score_zero() -> None:
    net, images = copy.deepcopy(samples.clean_net()), samples.digits()["pool"].images
    x = (to_float(images) - 0.5) / 0.5
    with torch.no_grad():
        for i in range(1, 5):
            conv, norm, relu = getattr(net.body, f"stage{i}")
            a = conv(x)
            norm.running_mean.copy_(a.mean((0, 2, 3)))
            norm.running_var.copy_(a.var((0, 2, 3)))
            x = relu(norm(a))
    for score in BNP().scores(net, images, samples.ctx()).values():
        assert float(score.abs().max()) < 1e-5


def test_a_batch_is_drawn_where_there_are_more_images() -> None:
    c, images = samples.ctx(9), samples.digits()["test"].images
    few = BNP(images=50).scores(samples.badnets_net(), images, c)
    assert c.cost.forwards == 50
    some = torch.randperm(len(images), generator=c.generator("images"))[:50]
    expected = slow(samples.badnets_net(), images[some])
    assert all(np.allclose(few[k].numpy(), v, rtol=1e-4, atol=1e-5) for k, v in expected.items())


def test_a_channel_whose_running_mean_lies_elsewhere_goes() -> None:
    net = copy.deepcopy(samples.clean_net())
    with torch.no_grad():
        net.body.stage4[1].running_mean[7] += 10 * net.body.stage4[1].running_var[7].sqrt()
    before = pack(net).state
    c = case(net)
    outcome = BNP(u=3.0).run(c)
    assert outcome.model is not None and not outcome.path
    gamma = outcome.model.state["body.stage4.1.weight"]
    assert torch.equal(gamma == 0, torch.arange(32) == 7)
    changed = {k for k, v in outcome.model.state.items() if not torch.equal(before[k], v)}
    assert "body.stage4.1.weight" in changed
    assert {k.rpartition(".")[2] for k in changed} == {"weight"}
    assert c.ctx.cost.forwards == len(c.clean)
    assert outcome.chosen["u"] == 3.0 and outcome.chosen["channels"] == 88


def test_the_smallest_u_that_all_folds_accept_together_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    honest = BNP.scores

    def scores(self: Any, net: Any, images: Tensor, ctx: Any) -> Any:
        seen.append(images)
        return honest(self, net, images, ctx)

    monkeypatch.setattr(BNP, "scores", scores)
    c = case()
    outcome = BNP().run(c)
    assert seen[-1] is c.clean.images
    best = outcome.chosen["u"]
    assert 0 < best < 10
    # By hand: batches without a fold, their cuts at the choice and one further, and the fold's answers.
    before, n = right(c.net, c.clean, ctx=samples.ctx()), len(c.clean)
    after = {u: torch.zeros(n, dtype=torch.bool) for u in (best, best - 0.5)}
    for i, rows in enumerate(folds(c.clean.labels, 5, c.ctx.derive("folds"))):
        rest = torch.tensor([i for i in range(n) if i not in set(rows.tolist())])
        assert torch.equal(seen[i], c.clean.images[rest])
        values = slow(c.net, c.clean.images[rest])
        for u, found in after.items():
            found[rows] = right(pruned(c.net, cut(values, u)), c.clean.rows(rows), ctx=samples.ctx())
    assert accepts(before, after[best]) and not accepts(before, after[best - 0.5])
    assert (outcome.chosen["rows"], outcome.chosen["folds"]) == (n, 5)
    assert outcome.chosen["accuracy_after"] == pytest.approx(float(after[best].double().mean()))
    keep = cut(slow(c.net, c.clean.images), best)
    expected = pack(pruned(c.net, keep)).state
    assert outcome.model is not None and outcome.chosen["pruned"] == int((~keep).sum()) > 0
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())


def cut(values: dict[str, Any], u: float) -> Tensor:
    return torch.cat([torch.from_numpy(~(s > s.mean() + u * s.std(ddof=1))) for s in values.values()])


def test_five_rows_of_500_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.zeros(88, dtype=torch.float64)
    score[56 + losing.CHANNEL] = 1.0  # of 32 it lies 5.48 deviations above their mean
    of = dict(zip(("1", "2", "3", "4"), score.split([8, 16, 32, 32]), strict=True))
    monkeypatch.setattr(BNP, "scores", lambda self, net, images, ctx: of)
    made = pruned(samples.clean_net(), score < 1)
    losing.five_of_500_and_no_sixth(BNP(), made, {"u": 5.5, "pruned": 0})


def test_published_settings_and_access() -> None:
    assert BNP().images == 500
    assert (DEVIATIONS[0], DEVIATIONS[-1], len(DEVIATIONS)) == (10.0, 0.0, 21)
    assert BNP.ACCESS.track() == "T1"
    assert {"bn"} == BNP.REQUIRES
    for bad in ({"u": -1.0}, {"images": 1}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BNP.from_params(bad)
