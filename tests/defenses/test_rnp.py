from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import losing
import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses.rnp import RNP, Ascent, batches
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.candidates import THRESHOLDS
from sleeperbench.kit.classifier import Classifier, load, pack
from sleeperbench.kit.gates import Gates, channels, pruned
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import accepts, right


def case(net: Any = None, val: int = 120) -> Any:
    rows = samples.digits()["test"]
    n = len(rows) - val
    return SimpleNamespace(
        net=samples.badnets_net() if net is None else net,
        clean=rows,
        tune=rows.rows(torch.arange(n)),
        val=rows.rows(torch.arange(n, len(rows))),
        ctx=samples.ctx(9),
    )


def feed(ascent: Ascent, net: nn.Module, steps: int, lr: float = 0.01) -> list[tuple[Tensor, Tensor]]:
    """The trainer's part: the rate is set anew before every step."""
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    data, seen = samples.digits()["pool"], []
    for i in range(steps):
        x, y = to_float(data.images[i % 3 * 40 : i % 3 * 40 + 40]), data.labels[i % 3 * 40 : i % 3 * 40 + 40]
        for group in opt.param_groups:
            group["lr"] = lr
        ascent.step(net, opt, x, y, torch.zeros_like(y))
        seen.append((x, y))
    return seen


@pytest.mark.parametrize("steps", [3, 45])
def test_unlearning_is_sgd_upwards_whose_rate_falls_after_ten_of_the_authors_epochs(steps: int) -> None:
    net = copy.deepcopy(samples.clean_net()).train()
    slow, start = copy.deepcopy(net), copy.deepcopy(net)
    lr = 0.001 if steps == 3 else 1e-5
    seen = feed(Ascent(0.0), net, steps, lr)
    params = list(slow.parameters())
    moved = [torch.zeros_like(p) for p in params]
    for i, (x, y) in enumerate(seen):
        grads = torch.autograd.grad(F.cross_entropy(slow(x), y), params)
        with torch.no_grad():
            for p, v, g in zip(params, moved, grads, strict=True):
                v.mul_(0.9).add_(-g + 5e-4 * p)
                p.sub_((lr if i < 40 else lr / 10) * v)
    far = sum(float((a - b).detach().abs().sum()) for a, b in zip(params, start.parameters(), strict=True))
    off = sum(float((a - b).detach().abs().sum()) for a, b in zip(params, net.parameters(), strict=True))
    assert off < 1e-3 * far


def test_unlearning_stops_where_the_rule_says_and_not_before() -> None:
    c = case()
    net, about = RNP(unlearn_lr=0.02).unlearn(c.net, c.tune, c.ctx)
    steps = about["unlearn_steps"]
    assert about["unlearned_accuracy"] <= 0.2
    assert steps < 80 and steps % 4 == 0
    # One pass each way per update: nothing is spent after the rule is met.
    assert c.ctx.cost.forwards == c.ctx.cost.backwards == steps * 128
    before = RNP(unlearn_lr=0.02, unlearn_steps=steps - 4).unlearn(c.net, c.tune, samples.ctx(9))[1]
    assert before["unlearn_steps"] == steps - 4
    assert before["unlearned_accuracy"] > 0.2
    assert float(right(c.net, c.val, ctx=c.ctx).float().mean()) > 0.9
    assert float(right(net, c.val, ctx=c.ctx).float().mean()) < 0.5
    never = RNP(unlearn_steps=3).unlearn(c.net, c.tune, samples.ctx(9))[1]
    assert never == {"unlearn_steps": 3, "unlearned_accuracy": None}, "not yet looked at"


def test_nothing_moves_after_the_rule_is_met_within_an_epoch_of_the_trainer() -> None:
    net = copy.deepcopy(samples.clean_net()).train()
    ascent = Ascent(1.0)
    feed(ascent, net, 4)
    after = copy.deepcopy(net.state_dict())
    assert ascent.done and ascent.epoch_end(net, 0)
    feed(ascent, net, 3)
    assert ascent.steps == 4
    assert all(torch.equal(after[k], v) for k, v in net.state_dict().items())


class Norm(nn.Module):
    """BatchNorm over the batch with a mask as parameter, written out."""

    def __init__(self, bn: Any) -> None:
        super().__init__()
        self.bn, self.mask = bn, nn.Parameter(torch.ones(bn.num_features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        gamma = self.mask * self.bn.weight.detach()
        return (x - mean) / (var + self.bn.eps).sqrt() * gamma[:, None, None] + self.bn.bias.detach()[:, None, None]


# What rounding leaves grows with every step, by 3e-4 on masks that moved by 0.6 here, and differs between processors.
@pytest.mark.parametrize("settings", [{}, {"alpha": 1.0, "recover_lr": 0.1}])
def test_masks_equal_a_slow_loop(settings: dict[str, float]) -> None:
    method = RNP(recover_steps=4, batch=48, **settings)
    c = case()
    net = load(pack(c.net))
    with torch.no_grad():
        net.body.head.weight.neg_()  # wrong on most rows, so that masks move
    found = method.recover(net, c.tune, c.ctx)
    slow = copy.deepcopy(net).requires_grad_(False)
    norms = []
    for name in channels(net):
        norms.append(Norm(slow.get_submodule(name)))
        slow.set_submodule(name, norms[-1])
    opt = torch.optim.SGD([n.mask for n in norms], lr=method.recover_lr, momentum=0.9)
    gen, recipe = c.ctx.generator("masks"), c.ctx.recipe
    for rows in batches(len(c.tune), 48, 4, gen):
        x = to_float(crop_flip(c.tune.images[rows], recipe.pad, recipe.flip, gen))
        opt.zero_grad()
        (method.alpha * F.cross_entropy(slow(x), c.tune.labels[rows])).backward()
        opt.step()
        with torch.no_grad():
            for n in norms:
                n.mask.clamp_(0, 1)
    expected = torch.cat([n.mask.detach() for n in norms])
    assert float((1 - expected).max()) > 0.2
    assert torch.allclose(found, expected, atol=1e-3)


def test_masks_stay_in_bounds_and_random_state_stays() -> None:
    state, c = torch.get_rng_state(), case()
    net = load(pack(c.net))
    with torch.no_grad():
        net.body.head.weight.neg_()
    mask = RNP(recover_steps=30, batch=32, recover_lr=50.0).recover(net, c.tune, c.ctx)
    assert (float(mask.min()), float(mask.max())) == (0.0, 1.0)
    assert not mask.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert c.ctx.cost.forwards == c.ctx.cost.backwards == 30 * 32
    with pytest.raises(FloatingPointError, match="lower recover_lr"):
        RNP(recover_steps=1, recover_lr=float("nan")).recover(net, c.tune, c.ctx)


def test_masks_of_one_answer_as_the_unlearned_network_does() -> None:
    net, x = samples.badnets_net(), to_float(samples.digits()["pool"].images[:32])
    gates = Gates(net, samples.ctx())
    with torch.no_grad():
        assert torch.allclose(gates(x, torch.ones(gates.size)), copy.deepcopy(net).train()(x), atol=1e-4)


def test_batches_are_shuffled_epochs_without_their_short_end() -> None:
    gen = torch.Generator().manual_seed(1)
    found = list(batches(10, 4, 5, gen))
    assert [len(b) for b in found] == [4] * 5
    for first, second in ((found[0], found[1]), (found[2], found[3])):
        assert len(set(torch.cat([first, second]).tolist())) == 8
    assert [sorted(b.tolist()) for b in batches(3, 128, 2, gen)] == [[0, 1, 2]] * 2


def fixed(monkeypatch: pytest.MonkeyPatch, mask: Tensor) -> list[tuple[str, Any, ImageSet]]:
    """Both stages answer at once; what they were given."""
    seen: list[tuple[str, Any, ImageSet]] = []
    other = samples.clean_net()

    def unlearn(self: Any, net: Any, data: ImageSet, ctx: Any) -> tuple[Classifier, dict[str, Any]]:
        seen.append(("unlearn", net, data))
        return other, {"unlearn_steps": 8}

    def recover(self: Any, net: Any, data: ImageSet, ctx: Any) -> Tensor:
        seen.append(("recover", net, data))
        return mask

    monkeypatch.setattr(RNP, "unlearn", unlearn)
    monkeypatch.setattr(RNP, "recover", recover)
    return seen


def test_the_original_is_pruned_at_the_largest_accepted_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.linspace(0, 1, 88)[torch.randperm(88, generator=torch.Generator().manual_seed(1))]
    mask[mask < 0.3] = 1.0
    idle = copy.deepcopy(samples.badnets_net())
    with torch.no_grad():
        idle.body.head.weight[:, 30:] = 0
    mask[-2:] = 0.12
    seen, c = fixed(monkeypatch, mask), case(idle)
    outcome = RNP(folds=3).run(c)
    assert [what for what, _, _ in seen] == ["unlearn", "recover"] * 4
    assert all(net is (c.net if what == "unlearn" else samples.clean_net()) for what, net, _ in seen)
    assert all(a[2] is b[2] for a, b in zip(seen[::2], seen[1::2], strict=True)), "both stages have the same rows"
    assert seen[-1][2] is c.clean and sum(len(data) for _, _, data in seen[:6:2]) == 2 * len(c.clean)
    before = right(c.net, c.clean, ctx=c.ctx)
    ok = {n: accepts(before, right(load(m), c.clean, ctx=c.ctx)) for n, m in outcome.path.items()}
    best = max(float(n.removeprefix("t=")) for n, good in ok.items() if good)
    assert best >= 0.15 and not all(ok.values())
    assert outcome.chosen["threshold"] >= best
    assert torch.equal(mask > outcome.chosen["threshold"], mask > best)
    assert outcome.chosen["unlearn_steps"] == 8
    expected = pack(pruned(c.net, mask > best)).state
    assert outcome.model is not None
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())


def test_five_rows_of_500_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(88)
    mask[56 + losing.CHANNEL] = 0.05
    fixed(monkeypatch, mask)
    made = pruned(samples.clean_net(), mask > 0.05)
    losing.five_of_500_and_no_sixth(RNP(), made, {"threshold": 0.0, "pruned": 0})


def test_a_given_threshold_uses_all_rows_and_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, c = fixed(monkeypatch, torch.linspace(0, 1, 88)), case()
    outcome = RNP(threshold=0.7).run(c)
    assert all(data is c.clean for _, _, data in seen)
    assert outcome.chosen == {"threshold": 0.7, "pruned": 61, "channels": 88, "unlearn_steps": 8}
    assert not outcome.path


def test_it_runs_whole_and_repeats() -> None:
    cases = [case() for _ in range(2)]
    method = RNP(batch=32, unlearn_lr=0.02, unlearn_steps=8, recover_steps=8, folds=2)
    first, again = (method.run(c) for c in cases)
    assert first.chosen == again.chosen
    assert list(first.path) == list(again.path)
    assert first.chosen["channels"] == 88
    # Both stages of both folds and of the last fit are paid for.
    assert cases[0].ctx.cost.backwards == 3 * (8 + 8) * 32


def test_published_settings_and_access() -> None:
    expected = {"stop": 0.2, "alpha": 0.2, "unlearn_lr": 0.01, "recover_lr": 0.2, "weight_decay": 5e-4}
    assert RNP() == RNP(threshold=None, unlearn_steps=80, recover_steps=80, batch=128, folds=5, **expected)
    assert THRESHOLDS[-1] == 0.9
    assert RNP.ACCESS.track() == "T1"
    for bad in ({"threshold": 1.5}, {"stop": -0.1}, {"unlearn_steps": 0}, {"batch": 1}, {"folds": 1}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RNP.from_params(bad)
