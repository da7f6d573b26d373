from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import losing
import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses.anp import AdversarialNeuronPruning
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.gates import Gates, channels, pruned
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, right


def clean() -> ImageSet:
    """400 rows that no model of the samples was trained on."""
    pool, probe = samples.digits()["pool"], samples.digits()["probe"]
    parts = {k: torch.cat([getattr(pool, k), getattr(probe, k)]) for k in ("images", "labels", "ids")}
    return replace(pool, **parts)


def case(net: Any = None, rows: ImageSet | None = None) -> Any:
    return SimpleNamespace(
        net=samples.clean_net() if net is None else net, clean=clean() if rows is None else rows, ctx=samples.ctx(9)
    )


class Norm(nn.Module):
    """BatchNorm over the batch with mask and changes as parameters, written out."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn, n = bn, bn.num_features
        self.mask = nn.Parameter(torch.ones(n))
        self.delta, self.xi = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
        self.attacked = False

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        gamma, beta = self.mask, torch.ones_like(self.xi)
        if self.attacked:
            gamma, beta = gamma + self.delta, beta + self.xi
        gamma, beta = gamma * self.bn.weight.detach(), beta * self.bn.bias.detach()
        return (x - mean) / (var + self.bn.eps).sqrt() * gamma[:, None, None] + beta[:, None, None]


def slow_masks(method: AdversarialNeuronPruning, net: Classifier, data: ImageSet, ctx: Any) -> Tensor:
    """Two optimisers and layers of its own; only the order of the draws is the method's."""
    net = copy.deepcopy(net).requires_grad_(False)
    norms = []
    for name in channels(net):
        norms.append(Norm(net.get_submodule(name)))
        net.set_submodule(name, norms[-1])
    masks = torch.optim.SGD([n.mask for n in norms], lr=method.lr, momentum=0.9)
    changes = [*(n.delta for n in norms), *(n.xi for n in norms)]
    ascent = torch.optim.SGD(changes, lr=method.eps)
    gen = ctx.generator("masks")
    for _ in range(method.steps):
        rows = torch.randint(len(data), (method.batch,), generator=gen)
        x = to_float(crop_flip(data.images[rows], ctx.recipe.pad, ctx.recipe.flip, gen))
        y = data.labels[rows]
        start = torch.rand(2, sum(len(n.mask) for n in norms), generator=gen) * 2 * method.eps - method.eps
        with torch.no_grad():
            for p, value in zip(changes, start.flatten().split([len(p) for p in changes]), strict=True):
                p.copy_(value)
        for n in norms:
            n.attacked = True
        ascent.zero_grad()
        (-F.cross_entropy(net(x), y)).backward()
        for p in changes:
            p.grad.sign_()
        ascent.step()
        masks.zero_grad()
        ((1 - method.alpha) * F.cross_entropy(net(x), y)).backward()
        for n in norms:
            n.attacked = False
        (method.alpha * F.cross_entropy(net(x), y)).backward()
        masks.step()
        with torch.no_grad():
            for n in norms:
                n.mask.clamp_(0, 1)
    return torch.cat([n.mask.detach() for n in norms])


@pytest.mark.parametrize("settings", [{}, {"eps": 0.1, "alpha": 0.7, "lr": 0.5}])
def test_masks_equal_a_slow_loop(settings: dict[str, float]) -> None:
    method = AdversarialNeuronPruning(steps=4, batch=24, **settings)
    net, ctx = samples.badnets_net(), samples.ctx(9)
    found = method.masks(net, clean(), ctx)
    expected = slow_masks(method, net, clean(), ctx)
    assert float((1 - expected).max()) > 0.05
    assert torch.allclose(found, expected, atol=2e-4)


def test_the_adversary_steps_up_the_loss() -> None:
    net, rows, ctx = samples.badnets_net(), clean(), samples.ctx()
    gates = Gates(net, ctx)
    mask = torch.rand(gates.size, generator=ctx.generator("m")) * 0.5 + 0.5
    x, y = to_float(rows.images[:64]), rows.labels[:64]
    for eps in (0.001, 0.01):
        method = AdversarialNeuronPruning(eps=eps)
        start = (2 * torch.rand(2, gates.size, generator=ctx.generator("g")) - 1) * eps
        after = torch.stack(method.adversary(gates, mask, x, y, ctx.generator("g")))
        moved = after - start
        # Channels that no row reaches have no gradient and stay.
        assert torch.allclose(moved.abs()[moved != 0], torch.tensor(eps), rtol=1e-3)
        assert float((moved != 0).float().mean()) > 0.8
        assert float(after.abs().max()) <= 2 * eps * 1.001
        with torch.no_grad():
            low, high = (float(F.cross_entropy(gates(x, mask, *at), y)) for at in (start, after))
        assert high > low


def test_masks_stay_in_bounds_and_random_state_stays() -> None:
    state, seen = torch.get_rng_state(), []
    c = case()
    c.ctx.progress = lambda *args: seen.append(args)
    mask = AdversarialNeuronPruning(steps=60, batch=16, lr=20.0).masks(c.net, c.clean, c.ctx)
    assert (float(mask.min()), float(mask.max())) == (0.0, 1.0)
    assert not mask.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(50, 60, "masks"), (60, 60, "masks")]
    # Three passes forth and three back per step.
    assert c.ctx.cost.forwards == c.ctx.cost.backwards == 60 * 16 * 3
    with pytest.raises(FloatingPointError, match="lower lr"):
        AdversarialNeuronPruning(steps=1, batch=8, lr=float("nan")).masks(c.net, c.clean, c.ctx)


def fixed(monkeypatch: pytest.MonkeyPatch, mask: Tensor) -> list[ImageSet]:
    """`masks` answers `mask`; the rows that it was given."""
    seen: list[ImageSet] = []

    def masks(self: Any, net: Any, data: ImageSet, ctx: Any) -> Tensor:
        seen.append(data)
        return mask

    monkeypatch.setattr(AdversarialNeuronPruning, "masks", masks)
    return seen


def with_idle_channels() -> Classifier:
    """The clean net, of whose last 32 channels the head reads only the first 29."""
    net = copy.deepcopy(samples.clean_net())
    with torch.no_grad():
        net.body.head.weight[:, 29:] = 0
    return net


def test_selection_takes_the_most_that_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = with_idle_channels()
    mask = torch.ones(88)
    mask[-3], mask[-2], mask[-1] = 0.05, 0.32, 0.33  # idle
    mask[:8] = 0.6  # the whole first layer
    seen = fixed(monkeypatch, mask)
    c = case(net)
    before = pack(net).state
    outcome = AdversarialNeuronPruning().run(c)
    assert [len(rows) for rows in seen] == [320] * 5 + [400] and seen[-1] is c.clean
    # 0.35 and all above it, up to 0.55, remove the same.
    assert outcome.chosen["threshold"] == 0.55
    assert outcome.model is outcome.path["t=0.35"]
    told = {k: outcome.chosen[k] for k in ("pruned", "channels", "rows", "folds")}
    assert told == {"pruned": 3, "channels": 88, "rows": 400, "folds": 5}
    assert outcome.chosen["accuracy_after"] == outcome.chosen["accuracy_before"] > 0.9
    assert list(outcome.path) == ["t=0.05", "t=0.35", "t=0.60"]
    assert outcome.chosen["candidates"]["t=0.60"]["pruned"] == 11
    ruined = float(right(load(outcome.path["t=0.60"]), c.clean, ctx=c.ctx).double().mean())
    assert outcome.chosen["candidates"]["t=0.60"]["accuracy"] == ruined
    assert ruined < 0.5
    # Gammas of the removed channels are 0 in the original weights; all else is as it was.
    assert outcome.model is not None
    expected = dict(before)
    gamma = before["body.stage4.1.weight"].clone()
    gamma[29:] = 0
    expected["body.stage4.1.weight"] = gamma
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())
    assert float(before["body.stage4.1.bias"][29:].abs().sum()) > 0
    assert all(torch.equal(before[k], v) for k, v in pack(net).state.items())


def test_no_accepted_threshold_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = 0.3 + 0.7 * torch.rand(88, generator=torch.Generator().manual_seed(3))
    mask[-3:] = torch.tensor([0.08, 0.13, 0.22])  # idle channels fall first
    fixed(monkeypatch, mask)
    c = case(with_idle_channels())
    outcome = AdversarialNeuronPruning(folds=2).run(c)
    before = right(c.net, c.clean, ctx=c.ctx)
    ok = {n: accepts(before, right(load(m), c.clean, ctx=c.ctx)) for n, m in outcome.path.items()}
    best = max((n for n, good in ok.items() if good), default=None)
    assert best is not None and not all(ok.values())
    assert outcome.model is outcome.path[best]
    assert torch.equal(mask > outcome.chosen["threshold"], mask > float(best[2:]))


def test_a_ruinous_or_uncertain_pruning_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.ones(88)
    first[:8] = 0.0
    fixed(monkeypatch, first)
    ruined = AdversarialNeuronPruning(folds=2).run(case())
    assert ruined.model is None
    assert ruined.chosen["threshold"] is None and ruined.chosen["pruned"] == 0
    assert ruined.chosen["accuracy_after"] == ruined.chosen["accuracy_before"]
    assert ruined.chosen["unchanged"] == "no threshold was accepted"
    idle = torch.ones(88)
    idle[-1] = 0.1
    seen = fixed(monkeypatch, idle)
    outcome = AdversarialNeuronPruning().run(case(with_idle_channels(), clean().rows(torch.arange(113))))
    assert [len(rows) for rows in seen] == [113]
    assert outcome.model is None
    assert outcome.chosen["unchanged"] == "113 clean rows are too few"
    assert list(outcome.path) == ["t=0.10"]


def test_five_rows_of_500_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(88)
    mask[56 + losing.CHANNEL] = 0.05
    fixed(monkeypatch, mask)
    made = pruned(samples.clean_net(), mask > 0.05)
    losing.five_of_500_and_no_sixth(AdversarialNeuronPruning(), made, {"threshold": 0.0, "pruned": 0})


def test_masks_of_all_folds_are_paid_for() -> None:
    c = case()
    outcome = AdversarialNeuronPruning(steps=1, batch=8, folds=3, lr=5.0).run(c)
    assert c.ctx.cost.backwards == 4 * 1 * 8 * 3
    # Untouched once, and in each fold one model at least of the rows left out, nineteen at most.
    judged = c.ctx.cost.forwards - c.ctx.cost.backwards
    assert 2 * 400 <= judged <= 20 * 400
    assert outcome.chosen["folds"] == 3 and outcome.chosen["candidates"]


def test_a_given_threshold_learns_on_all_rows_and_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.linspace(0, 1, 88)
    seen = fixed(monkeypatch, mask)
    c = case()
    outcome = AdversarialNeuronPruning(threshold=0.2).run(c)
    assert seen[0] is c.clean
    assert outcome.chosen == {"threshold": 0.2, "pruned": 18, "channels": 88}
    assert not outcome.path
    expected = pack(pruned(c.net, mask > 0.2)).state
    assert outcome.model is not None
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())


def test_a_planted_channel_falls_first() -> None:
    # Channel 5 of the last layer is silent on clean rows (its answer stays below 0) but weighs so much for class 0
    # that a little more gamma or beta turns rows of all classes into it.
    net = copy.deepcopy(samples.clean_net())
    with torch.no_grad():
        net.body.stage4[1].weight[5], net.body.stage4[1].bias[5] = 1.0, -2.5
        net.body.head.weight[:, 5] = 0
        net.body.head.weight[0, 5] = 40.0
    c = case(net)
    assert float(right(net, samples.digits()["test"], ctx=c.ctx).float().mean()) > 0.85
    mask = AdversarialNeuronPruning(steps=25, batch=64).masks(net, c.clean, c.ctx)
    planted = 88 - 32 + 5
    assert int(mask.argmin()) == planted
    others = mask[torch.arange(88) != planted]
    assert float(mask[planted]) < 0.2 < float(others.min())


def test_three_channels_and_two_classes_on_a_residual_net() -> None:
    rows = samples.random_images(40, (3, 12, 12), classes=2)
    spec = replace(samples.SPEC, arch="small_resnet", classes=2, shape=(3, 12, 12), norm=((0.5,) * 3, (0.2,) * 3))
    net = build(replace(spec, args={"width": 4}), 3).eval()
    outcome = AdversarialNeuronPruning.from_params(AdversarialNeuronPruning.INFO["micro"]).run(case(net, rows))
    assert outcome.chosen["channels"] == sum(channels(net).values())
    assert outcome.chosen["unchanged"] == "40 clean rows are too few"


def test_published_settings_and_those_out_of_range() -> None:
    published = {"eps": 0.4, "alpha": 0.2, "lr": 0.2, "steps": 2000, "batch": 128}
    assert AdversarialNeuronPruning() == AdversarialNeuronPruning(threshold=None, folds=5, **published)  # type: ignore[arg-type]
    for bad in (
        {"threshold": 1.5},
        {"alpha": -0.1},
        {"eps": -1.0},
        {"steps": 0},
        {"batch": 1},
        {"folds": 1},
        {"colour": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdversarialNeuronPruning.from_params(bad)
