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

from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.fine_pruning import RATES, FinePruning, activity, gated, kept, last_site
from sleeperbench.defenses.ft import FineTuning
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, folds, right
from sleeperbench.kit.taps import taps

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SITES = [
    ("small_cnn", {}, "body.stage4"),
    ("small_resnet", {"width": 4}, "body.stage4"),
    ("wrn28_2", {}, "body.last"),
    ("timm:vit_tiny_patch16_224", VIT, "body.net.head_drop"),
    ("timm:mobilenetv2_035", {}, ""),
]


def case(net: Any = None) -> Any:
    net = samples.badnets_net() if net is None else net
    return SimpleNamespace(net=net, clean=samples.digits()["test"], ctx=samples.ctx(9))


def of(arch: str, args: dict[str, Any]) -> Classifier:
    spec = replace(samples.SPEC, arch=arch, args=args, shape=(3, 16, 16), norm=((0.5,) * 3, (0.2,) * 3))
    return build(spec, 3).eval()


@pytest.mark.parametrize(("arch", "args", "site"), SITES)
def test_a_gated_channel_is_one_that_the_head_does_not_read(arch: str, args: dict[str, Any], site: str) -> None:
    net, c = of(arch, args), samples.ctx()
    found = last_site(net, c)
    assert site in ("", found)
    assert c.cost.forwards == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    head: Any = net.get_submodule(taps(net).head)
    keep = torch.rand(head.in_features, generator=torch.Generator().manual_seed(2)) > 0.4
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    blind = copy.deepcopy(net)
    with torch.no_grad():
        blind.get_submodule(taps(net).head).weight[:, ~keep] = 0  # type: ignore[index]
        expected, plain = blind(x), net(x)
        assert torch.allclose(gated(net, found, keep)(x), expected, atol=1e-5)
        assert torch.allclose(gated(net, found, torch.ones_like(keep))(x), plain, atol=1e-6)
    assert float((expected - plain).abs().max()) > 1e-4


def test_activity_is_the_mean_size_of_what_a_channel_answers() -> None:
    net, images, c = samples.badnets_net(), samples.digits()["pool"].images[:30], samples.ctx()
    state = pack(net).state
    found = activity(net, "body.stage4", images, c)
    x = (to_float(images) - 0.5) / 0.5
    with torch.no_grad():
        for stage in (net.body.stage1, net.body.stage2, net.body.stage3, net.body.stage4):
            x = stage(x)
    expected = torch.stack([x[:, k].abs().sum() / (30 * x.shape[2] * x.shape[3]) for k in range(32)])
    assert torch.allclose(found, expected, atol=1e-5)
    assert c.cost.forwards == 30 and c.cost.backwards == 0
    assert all(torch.equal(state[k], v) for k, v in pack(net).state.items())
    signed = activity(net, "body.stage4.1", images, c)  # in front of the ReLU
    assert float(signed.min()) > 0, "what is far below 0 is not dormant"


def test_the_least_active_go_first() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    assert kept(order, 0.0).all()
    assert kept(order, 0.4).tolist() == [False, True, True, False, True]
    assert not kept(order, 1.0).any()


def dormant(net: Classifier, n: int) -> Classifier:
    """The net with `n` channels of the last map that answer almost nothing to clean images, and that nothing reads."""
    made = copy.deepcopy(net)
    with torch.no_grad():
        made.body.stage4[1].weight[:n] = 0
        made.body.stage4[1].bias[:n] = torch.arange(n) * 1e-6
        made.body.head.weight[:, :n] = 0
    return made


def test_every_rate_is_a_candidate_and_the_largest_accepted_is_pruned() -> None:
    c = case(dormant(samples.badnets_net(), 14))
    before = pack(c.net).state
    outcome = FinePruning(steps=0).run(c)
    # 32 channels: every rate removes at least one more.
    assert list(outcome.path) == [f"rate={r:.2f}" for r in RATES]
    # By hand: the order without a fold, and what the fold's rows get at the choice and one rate further.
    first, n, best = right(c.net, c.clean, ctx=samples.ctx()), len(c.clean), outcome.chosen["rate"]
    assert 0.4 <= best < 0.95
    after = {rate: torch.zeros(n, dtype=torch.bool) for rate in RATES if best <= rate < best + 0.06}
    for rows in folds(c.clean.labels, 5, c.ctx.derive("folds")):
        rest = torch.ones(n, dtype=torch.bool)
        rest[rows] = False
        order = activity(c.net, "body.stage4", c.clean.images[rest], samples.ctx()).argsort(stable=True)
        for rate, found in after.items():
            net = gated(c.net, "body.stage4", kept(order, rate))
            found[rows] = right(net, c.clean.rows(rows), ctx=samples.ctx())
    assert [accepts(first, a) for a in after.values()] == [True, False]
    assert outcome.chosen["accuracy_after"] == pytest.approx(float(after[best].double().mean()))
    assert (outcome.chosen["pruned"], outcome.chosen["channels"]) == (round(32 * best), 32)
    assert (outcome.chosen["rows"], outcome.chosen["folds"]) == (n, 5)
    order = activity(c.net, "body.stage4", c.clean.images, samples.ctx()).argsort(stable=True)
    assert set(order[:14].tolist()) == set(range(14))
    for name, model in outcome.path.items():
        rate = float(name.removeprefix("rate="))
        factor = model.state["wraps.0.factor"]
        assert sorted((factor == 0).nonzero()[:, 0].tolist()) == sorted(order[: round(32 * rate)].tolist())
        assert set(factor.tolist()) <= {0.0, 1.0}
        assert all(torch.equal(before[k], model.state[k]) for k in before), "all else stays"
    assert outcome.model is not None
    assert all(torch.equal(v, outcome.path[f"rate={best:.2f}"].state[k]) for k, v in outcome.model.state.items())
    # One blank image, four of five parts and all rows for activations, the untouched and 19 pruned models on all rows.
    assert (c.ctx.cost.forwards, c.ctx.cost.backwards) == (1 + 5 * n + 20 * n, 0)


def test_five_rows_of_500_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    size = torch.arange(32).float() + 1
    size[[losing.CHANNEL, 6]] = torch.tensor([0.0, 0.5])  # a twentieth of 32 channels are two
    monkeypatch.setattr("sleeperbench.defenses.fine_pruning.RATES", (0.05,))
    monkeypatch.setattr("sleeperbench.defenses.fine_pruning.activity", lambda net, site, images, ctx: size)
    made = gated(samples.clean_net(), "body.stage4", size >= 1)
    losing.five_of_500_and_no_sixth(FinePruning(steps=0), made, {"rate": None, "pruned": 0})


def test_pruned_channels_stay_out_while_the_rest_is_tuned() -> None:
    c = case(dormant(samples.badnets_net(), 14))
    outcome = FinePruning(steps=12, batch=64).run(c)
    assert outcome.model is not None
    pruned = outcome.path[f"rate={outcome.chosen['rate']:.2f}"]
    assert torch.equal(outcome.model.state["wraps.0.factor"], pruned.state["wraps.0.factor"])
    moved = [k for k, v in outcome.model.state.items() if not torch.equal(v, pruned.state[k])]
    assert {"body.stage1.0.weight", "body.stage1.1.running_mean", "body.head.weight"} <= set(moved)
    assert c.ctx.cost.backwards == 12 * 64
    # The head's columns of removed channels get no gradient; decay and momentum alone act on them.
    gone = (pruned.state["wraps.0.factor"] == 0).nonzero()[:, 0]
    column = outcome.model.state["body.head.weight"][:, gone]
    assert float((column.abs() - pruned.state["body.head.weight"][:, gone].abs()).max()) <= 0


def test_where_no_rate_is_accepted_fine_tuning_alone_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.defenses.fine_pruning.RATES", (0.95,))
    c = case()
    outcome = FinePruning(steps=5, batch=64).run(c)
    assert outcome.chosen["rate"] is None and outcome.chosen["pruned"] == 0
    assert outcome.chosen["unpruned"] == "no rate was accepted" and "unchanged" not in outcome.chosen
    plain = FineTuning(steps=5, batch=64).run(case()).model
    assert outcome.model is not None and plain is not None
    assert outcome.model.spec == plain.spec
    assert all(torch.equal(v, plain.state[k]) for k, v in outcome.model.state.items())
    left = FinePruning(steps=0).run(case())
    assert left.model is None
    assert left.chosen["unchanged"] == "no rate was accepted"
    assert list(left.path) == ["rate=0.95"]


def test_a_given_rate_uses_all_rows_and_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def tune(net: Any, data: Any, **args: Any) -> Any:
        seen.update(args, data=data, factor=net.wraps[0].factor)
        return pack(net)

    monkeypatch.setattr("sleeperbench.defenses.fine_pruning.tune", tune)
    c = case()
    outcome = FinePruning(rate=0.5).run(c)
    assert outcome.chosen == {"rate": 0.5, "pruned": 16, "channels": 32} and not outcome.path
    order = activity(c.net, "body.stage4", c.clean.images, samples.ctx()).argsort(stable=True)
    factor: Tensor = seen.pop("factor")
    assert torch.equal(factor == 0, ~kept(order, 0.5))
    assert seen.pop("data") is c.clean and seen.pop("ctx") is c.ctx
    assert seen == {"lr": 0.01, "steps": 1000, "batch": 256, "weight_decay": 5e-4, "schedule": "cosine"}


def test_what_cannot_be_gated_is_declined_and_settings_out_of_range_are_refused() -> None:
    net = build(samples.SPEC, 1)
    net.body.features, net.body.head = lambda x: x.flatten(1)[:, :7], nn.Linear(7, 10)
    with pytest.raises(NotApplicable, match="needs_channels"):
        last_site(net, samples.ctx())
    assert FinePruning.ACCESS.track() == "T1"
    for bad in ({"rate": 1.5}, {"steps": -1}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FinePruning.from_params(bad)
