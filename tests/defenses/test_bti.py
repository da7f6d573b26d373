from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn

from sleeperbench.defenses.bti import BTI
from sleeperbench.defenses.bti_sam import BTISAM, Sharpness
from sleeperbench.defenses.bti_u import BTIUnlearning, Unlearning
from sleeperbench.defenses.pam import PAM, RHOS, PathAware, path_shift
from sleeperbench.kit.classifier import load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.tune import tune

FEW = {"pretrain_steps": 2, "mask_steps": 2, "generator_steps": 2, "width": 4}


def case(**parts: Any) -> Any:
    net, pool = samples.badnets_net(), samples.digits()["pool"]
    known = {"net": net, "spec": net.spec, "clean": pool, "tune": pool.rows(torch.arange(36)), "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | {"val": pool.rows(torch.arange(36, 150))} | parts)


class Same(nn.Module):
    """A generator that changes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


INVERSION = SimpleNamespace(generator=Same(), site="body.stage4")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    pool = samples.digits()["pool"].rows(torch.arange(20))
    return to_float(pool.images), pool.labels


def flat(parts: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parts]).double()


# ---- PAM -------------------------------------------------------------------------------------------------------------
def test_the_shift_has_length_rho_and_points_back() -> None:
    gen = torch.Generator().manual_seed(0)
    start, now = ([torch.randn(s, generator=gen, dtype=torch.float64) for s in ((3, 4), (5,))] for _ in range(2))
    shift = path_shift(start, now, 0.7)
    assert float(flat(shift).norm()) == pytest.approx(0.7, rel=1e-9)
    back = flat(start) - flat(now)
    assert torch.allclose(flat(shift), 0.7 * back / back.norm())


def test_the_first_shift_is_zero() -> None:
    start = [torch.randn(3, 4), torch.randn(5)]
    assert all(torch.equal(s, torch.zeros_like(s)) for s in path_shift(start, start, 0.9))


def test_a_step_is_sgd_with_the_gradient_at_the_shifted_point() -> None:
    net, away = load(pack(samples.badnets_net())).train(), load(pack(samples.clean_net()))
    start = [p.detach().clone() for p in away.parameters()]
    x, y = batch()
    before = flat(net.parameters())
    there = load(pack(net)).train()
    with torch.no_grad():
        for p, s in zip(there.parameters(), path_shift(start, list(net.parameters()), 0.5), strict=True):
            p.add_(s)
    nn.functional.cross_entropy(there(x), y).backward()
    wanted = before - 0.1 * flat([p.grad for p in there.parameters()])
    hooks = PathAware(start, 0.5, INVERSION, 0.2)
    hooks.step(net, torch.optim.SGD(net.parameters(), lr=0.1), x, y, torch.zeros(20))
    assert torch.allclose(flat(net.parameters()), wanted, atol=1e-6)
    # Running statistics are those of the shifted weights, as released.
    for (n, b), (_, w) in zip(net.named_buffers(), there.named_buffers(), strict=True):
        assert torch.allclose(b.double(), w.double(), atol=1e-6), n


def test_pam_keeps_its_start_through_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Any] = []
    real = PathAware.__init__

    def spy(self: Any, start: Any, *args: Any) -> None:
        starts.append(start)
        real(self, start, *args)

    monkeypatch.setattr(PathAware, "__init__", spy)
    c = case()
    before = pack(c.net).state
    out = PAM(rho=0.5, rounds=2, steps=2, **FEW).run(c)
    assert len(starts) == 2 and starts[0] is starts[1]
    assert torch.equal(flat(starts[0]), flat(c.net.parameters()))
    assert all(torch.equal(before[k], v) for k, v in pack(c.net).state.items())
    moved = load(out.model)
    gap = (flat(moved.parameters()) - flat(c.net.parameters())).norm()
    assert out.chosen["distance"] == pytest.approx(float(gap), rel=1e-4) and out.chosen["rho"] == 0.5


def test_rho_is_chosen_on_rows_that_nothing_was_made_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def made(self: Any, c: Any, data: Any, rho: float) -> Any:
        rows.append(len(data))
        return c.net, {"rho": rho}

    monkeypatch.setattr(PAM, "repaired", made)
    monkeypatch.setattr("sleeperbench.kit.candidates.choose", lambda settings, after, before: settings[0])
    out = PAM(rho=None).run(case())
    assert rows == [36] * 5 and list(out.path) == [*(f"rho={r:g}" for r in RHOS), "released"]
    # All candidates have the untouched weights, and a rule that accepts anything takes the most aggressive.
    assert (out.chosen["rho"], out.chosen["rows"]) == (0.9, 114)
    assert all(torch.equal(v, out.model.state[k]) for k, v in out.path["rho=0.9"].state.items())
    released = out.path["released"].state
    assert all(torch.equal(v, released[k]) for k, v in pack(samples.badnets_net()).state.items())
    monkeypatch.setattr("sleeperbench.kit.candidates.choose", lambda *args: None)
    none = PAM(rho=None).run(case())
    assert none.model is None and none.chosen["rho"] is None


@pytest.mark.parametrize("method", [PAM, BTISAM])
def test_statistics_are_estimated_anew_at_the_last_weights(method: Any) -> None:
    c = case()
    out = method(rho=0.5, rounds=1, steps=3, **FEW).run(c)
    assert all(torch.equal(v, out.model.state[k]) for k, v in out.path["rho=0.5"].state.items())
    assert list(out.path) == ["rho=0.5", "released"]
    deployed, released = load(out.model), load(out.path["released"])
    assert torch.equal(flat(deployed.parameters()), flat(released.parameters()))
    first = next(m for m in deployed.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    handle = first.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        deployed.eval()(to_float(c.clean.images))
    handle.remove()
    assert torch.allclose(first.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    other = next(m for m in released.modules() if isinstance(m, nn.BatchNorm2d))
    assert not torch.allclose(first.running_mean, other.running_mean, atol=1e-4)


# ---- BTI with SAM ----------------------------------------------------------------------------------------------------
def test_sharpness_steps_by_the_gradient_at_the_sharpest_point() -> None:
    net = load(pack(samples.badnets_net())).train()
    x, y = batch()
    before = flat(net.parameters())
    first = load(pack(net)).train()
    g = torch.autograd.grad(nn.functional.cross_entropy(first(x), y), list(first.parameters()))
    with torch.no_grad():
        for p, d in zip(first.parameters(), g, strict=True):
            p.add_(0.3 * d / float(flat(g).norm()))
    nn.functional.cross_entropy(first(x), y).backward()
    wanted = before - 0.1 * flat([p.grad for p in first.parameters()])
    hooks = Sharpness(0.3, INVERSION, 0.2)
    hooks.step(net, torch.optim.SGD(net.parameters(), lr=0.1), x, y, torch.zeros(20))
    assert torch.allclose(flat(net.parameters()), wanted, atol=1e-5)
    counts = [b for n, b in net.named_buffers() if n.endswith("num_batches_tracked")]
    was = [b for n, b in samples.badnets_net().named_buffers() if n.endswith("num_batches_tracked")]
    # In both passes, as released.
    assert [int(a) - int(b) for a, b in zip(counts, was, strict=True)] == [2] * len(was)


def test_bti_sam_runs_all_rounds() -> None:
    c = case()
    out = BTISAM(rounds=1, steps=2, **FEW).run(c)
    assert not torch.equal(flat(load(out.model).parameters()), flat(c.net.parameters()))
    assert 0 <= out.chosen["target"] < 10


# ---- BTI (U) ---------------------------------------------------------------------------------------------------------
def test_unlearning_loss_is_cross_entropy_and_feature_distance() -> None:
    net = load(pack(samples.badnets_net())).eval()
    x, y = batch()
    known = SimpleNamespace(generator=nn.Hardtanh(0.5, 0.5 + 1e-9), site="body.stage4", ctx=samples.ctx())
    hooks = Unlearning(known, 0.1)
    made, labels, _ = hooks.batch(x, y, y, 0)
    assert int((made != x).flatten(1).any(1).sum()) == int(0.1 * 20) + 1
    features = {}
    for name, images in (("was", x), ("is", made)):
        z = (images - net.mean) / net.std
        features[name] = net.body.stage4(net.body.stage3(net.body.stage2(net.body.stage1(z))))
    expected = nn.functional.cross_entropy(net(made), labels) + (features["was"] - features["is"]).square().mean()
    assert float(hooks.loss(net, made, labels, y).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_both_passes_of_unlearning_are_counted_forth_and_back() -> None:
    """The gradient of the second one enters at the features, never at the logits."""
    ctx, rows = samples.ctx(), samples.digits()["pool"].rows(torch.arange(15))
    hooks = Unlearning(SimpleNamespace(generator=Same(), site="body.stage4", ctx=ctx), 0.2)
    tune(samples.badnets_net(), rows, ctx=ctx, lr=1e-4, steps=3, batch=5, optimiser="adam", hooks=hooks)
    assert (ctx.cost.forwards, ctx.cost.backwards) == (3 * 10, 3 * 10)


def test_rounds_are_candidates_when_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(target=3, share=0.5)
    monkeypatch.setattr(BTIUnlearning, "repaired", lambda self, c, rows, n: ((c.net, about) for _ in range(n)))
    out = BTIUnlearning(rounds=None).run(case())
    assert list(out.path) == [f"round={i}" for i in range(1, 6)] and out.chosen["round"] == "round=5"
    assert out.chosen["candidates"]["round=1"]["target"] == 3


def test_published_settings() -> None:
    # 2,500 rows in batches of 128 are 20 steps an epoch.
    u, pam, sam = BTIUnlearning(), PAM(), BTISAM()
    assert (u.pretrain_steps, u.mask_steps, u.generator_steps, u.steps) == (50 * 20, 20 * 20, 30 * 20, 30 * 20)
    assert (u.rounds, u.lr, u.share, u.bound) == (5, 1e-4, 0.1, 0.3)
    assert (pam.rho, pam.rounds, pam.steps, pam.lr, pam.share) == (0.5, 3, 600, 0.01, 0.2)
    assert (sam.rounds, sam.steps, sam.lr, sam.share) == (3, 600, 0.01, 0.2)


# ---- inversion -------------------------------------------------------------------------------------------------------
def test_the_stamp_is_the_generator_that_was_trained() -> None:
    c = case()
    out = BTI(**FEW).run(c)
    x = to_float(c.clean.images[:4])
    stamped = BTI().stamp(out.state, out.inverted[0], x)
    assert stamped.shape == x.shape and float(stamped.min()) >= 0 and float(stamped.max()) <= 1
    assert torch.equal(stamped, BTI().stamp(out.state, out.inverted[0], x))
    assert out.inverted[0].uses_apply and out.inverted[0].target == out.chosen["target"]
    assert out.verdict.score == out.chosen["share"] and out.verdict.threshold == 0.7
    assert float(out.verdict.label_scores.sum()) == pytest.approx(1)
