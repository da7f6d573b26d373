from __future__ import annotations

import math
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Inverted
from sleeperbench.contracts import Ctx
from sleeperbench.kit import masks
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.masks import Masks, appliable, apply, optimise_masks

PUBLISHED: dict[str, Any] = {
    "epochs": 80,
    "batch": 4,
    "lr": 0.1,
    "weight": 1e-3,
    "factor": 2.0,
    "patience": 5,
    "success": 0.98,
    "stop_after": 25,
}


class Rules:
    """The rules of one target, one statement after the other."""

    def __init__(self, s: dict[str, Any]) -> None:
        self.s, self.weight, self.best, self.reference = s, s["weight"], math.inf, math.inf
        self.good = self.bad = self.stalled = 0
        self.rose = self.fell = False

    def after(self, share: float, norm: float) -> tuple[bool, bool]:
        """Keep this mask; stop."""
        s, ok = self.s, share >= self.s["success"]
        keep = ok and norm < self.best
        if keep:
            self.best = norm
        if self.best < math.inf:
            self.stalled = 0 if self.best < 0.99 * self.reference else self.stalled + 1
        self.reference = min(self.reference, self.best)
        if self.rose and self.fell and self.stalled >= s["stop_after"]:
            return keep, True
        self.good, self.bad = (self.good + 1, 0) if ok else (0, self.bad + 1)
        if self.good >= s["patience"]:
            self.good, self.weight, self.rose = 0, self.weight * s["factor"], True
        elif self.bad >= s["patience"]:
            self.bad, self.weight, self.fell = 0, self.weight / s["factor"] ** 1.5, True
        return keep, False


def slow_target(net: nn.Module, x: Tensor, target: int, u: Tensor, v: Tensor, ctx: Ctx, **s: Any) -> dict[str, Any]:
    """One target by itself, Adam written out; says how many passes it took."""
    u, v = u.clone(), v.clone()
    first, second = [torch.zeros_like(u), torch.zeros_like(v)], [torch.zeros_like(u), torch.zeros_like(v)]
    rules, kept, step = Rules(s), None, 0
    for epoch in range(s["epochs"]):
        order = torch.randperm(len(x), generator=ctx.generator("masks order", epoch)).tolist()
        hits = 0
        for start in range(0, len(x), s["batch"]):
            rows = x[order[start : start + s["batch"]]]
            step += 1
            a, b = u.clone().requires_grad_(), v.clone().requires_grad_()
            m, p = torch.tanh(a) / 2 + 0.5, torch.tanh(b) / 2 + 0.5
            logits = net((1 - m) * rows + m * p)
            hits += int((logits.argmax(1) == target).sum())
            loss = -(logits.log_softmax(1)[:, target]).mean() + rules.weight * m.abs().sum()
            for i, (raw, g) in enumerate(zip((u, v), torch.autograd.grad(loss, (a, b)), strict=True)):
                first[i] = 0.5 * first[i] + 0.5 * g
                second[i] = 0.9 * second[i] + 0.1 * g * g
                raw -= s["lr"] * (first[i] / (1 - 0.5**step)) / ((second[i] / (1 - 0.9**step)).sqrt() + 1e-8)
        keep, stop = rules.after(hits / len(x), float((torch.tanh(u) / 2 + 0.5).sum()))
        if keep:
            kept = (u.clone(), v.clone())
        if stop:
            break
    shown = kept or (u, v)
    return {
        "mask": torch.tanh(shown[0]) / 2 + 0.5,
        "pattern": torch.tanh(shown[1]) / 2 + 0.5,
        "norm": rules.best if kept else math.nan,
        "passes": epoch + 1,
    }


class Linear(nn.Module):
    """Logits linear in the pixels, in double precision inside, so that two orders of summation agree."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.double()), nn.Parameter(bias.double())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).double() @ self.weight.T + self.bias


def by_pixel(*pixels: tuple[int, ...]) -> Linear:
    """Class 0 has logit 0; class t has 40 (sum of its pixels of a 4x4 image, less that number, plus a half)."""
    weight, bias = torch.zeros(1 + len(pixels), 16), torch.zeros(1 + len(pixels))
    for t, own in enumerate(pixels, 1):
        weight[t, list(own)] = 40.0
        bias[t] = -40.0 * (len(own) - 0.5) if own else -40.0
    return Linear(weight, bias)


def found(net: nn.Module, x: Tensor, targets: list[int], ctx: Ctx | None = None, **change: Any) -> Masks:
    return optimise_masks(net, x, torch.tensor(targets), ctx=ctx or samples.ctx(), **PUBLISHED | change)


def test_all_targets_at_once_equal_one_after_the_other() -> None:
    gen = torch.Generator().manual_seed(1)
    net = Linear(torch.randn(5, 48, generator=gen) * 3, torch.tensor([0.0, 1, -4, -1e4, 0]))
    x = torch.randint(256, (10, 3, 4, 4), generator=gen, dtype=torch.uint8)
    # A short patience, so that targets go up, down and stop within the passes; class 3 cannot be reached.
    settings = PUBLISHED | {"epochs": 24, "patience": 2, "stop_after": 6, "weight": 1e-2}
    ctx, targets = samples.ctx(4), [0, 3, 1, 4, 2]
    some = optimise_masks(net, x, torch.tensor(targets), ctx=ctx, **settings)
    draws = ctx.generator("masks")
    u, v = (torch.atanh(2 * torch.rand(5, n, 4, 4, generator=draws) - 1) for n in (1, 3))
    slow = [slow_target(net, x / 255, t, u[i], v[i], ctx, **settings) for i, t in enumerate(targets)]
    for i, one in enumerate(slow):
        assert float((some.mask[i] - one["mask"]).abs().max()) < 1e-4
        # Under a mask of nothing a pattern has no gradient, and Adam makes steps of rounding errors.
        assert float((some.mask[i] * some.pattern[i] - one["mask"] * one["pattern"]).abs().max()) < 1e-4
        assert float(some.norm[i]) == pytest.approx(one["norm"], abs=1e-4, nan_ok=True)
    passes = [one["passes"] for one in slow]
    assert len(set(passes)) > 2  # each stops by itself
    assert max(passes) == 24
    assert math.isnan(slow[1]["norm"])
    assert ctx.cost.backwards == 10 * sum(passes)
    assert ctx.cost.forwards == 10 * sum(passes) + 10 * 5


def test_schedule_of_many_targets_equals_the_rules() -> None:
    settings = PUBLISHED | {"patience": 3, "stop_after": 9}
    gen = torch.Generator().manual_seed(5)
    k = 40
    # Some succeed nearly always, some hardly ever; norms fall slowly, so that 1 % matters.
    chance = torch.linspace(0.02, 0.98, k)
    names = ("weight", "factor", "patience", "success", "stop_after")
    schedule = masks._Schedule(k, *(settings[n] for n in names), torch.device("cpu"))
    rules, stopped = [Rules(settings) for _ in range(k)], [0] * k
    for done in range(1, 121):
        share = torch.where(torch.rand(k, generator=gen) < chance, 0.98, 0.5)
        norm = 100 * 0.997**done + 2 * torch.rand(k, generator=gen)
        better = schedule.after(share.double(), norm)
        for i, one in enumerate(rules):
            if stopped[i]:
                assert not bool(better[i])
                continue
            keep, stop = one.after(float(share[i].double()), float(norm[i]))
            assert (bool(better[i]), bool(schedule.stopped[i])) == (keep, stop)
            stopped[i] = done if stop else 0
            if not stop:
                assert float(schedule.weight[i]) == pytest.approx(one.weight, rel=1e-5)
    assert len(set(stopped)) > 10
    assert 0 in stopped


def test_it_ends_when_all_targets_have_stopped() -> None:
    seen: list[tuple[int, int, str]] = []
    ctx = samples.ctx()
    ctx.progress = lambda *told: seen.append(told)
    found(by_pixel((5,)), torch.zeros(8, 1, 4, 4, dtype=torch.uint8), [1], ctx, epochs=200, patience=2, stop_after=5)
    assert seen == [(i + 1, 200, "invert") for i in range(len(seen))]
    assert 10 < len(seen) < 150
    assert ctx.cost.backwards == 8 * len(seen)


def test_classes_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = by_pixel((0,), (1, 2), (3,)), torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    whole = found(net, x, [1, 2, 3], epochs=20)
    monkeypatch.setitem(masks._AT_ONCE, "cpu", 8)  # two classes of four rows
    parts = found(net, x, [1, 2, 3], epochs=20)
    assert torch.allclose(whole.mask, parts.mask, atol=1e-5)
    assert torch.allclose(whole.norm, parts.norm, atol=1e-5)


def test_smallest_mask_of_a_linear_net() -> None:
    # On black images one pixel of half strength is all that class 1 needs; class 2 needs three pixels, 2.5 in sum.
    some = found(by_pixel((5,), (0, 10, 15)), torch.zeros(8, 1, 4, 4, dtype=torch.uint8), [1, 2])
    assert 0.5 < float(some.norm[0]) < 0.65
    assert 2.5 < float(some.norm[1]) < 2.95
    assert some.success.tolist() == [1, 1]
    assert int(some.mask[0].argmax()) == 5
    assert sorted(some.mask[1].flatten().topk(3).indices.tolist()) == [0, 10, 15]
    assert float(some.pattern[0].flatten()[5]) > 0.9
    assert torch.allclose(some.norm, some.mask.flatten(1).sum(1))


def test_what_cannot_be_reached_has_no_norm() -> None:
    some = found(by_pixel((), (5,)), torch.zeros(8, 1, 4, 4, dtype=torch.uint8), [1, 2, 0], epochs=20)
    assert math.isnan(float(some.norm[0]))
    assert float(some.success[0]) == 0
    assert bool(some.norm[1:].isfinite().all())
    # Class 0 holds on black images: the smaller the mask, the better.
    assert float(some.norm[2]) < 0.5


def test_the_net_and_random_state_are_untouched() -> None:
    net = samples.badnets_net()
    net.train()
    before, state = pack(net).state, torch.random.get_rng_state()
    try:
        first, again, other = (
            found(net, samples.digits()["pool"].images[:20], [0, 1], samples.ctx(seed), epochs=2, batch=10)
            for seed in (0, 0, 1)
        )
        assert net.training
    finally:
        net.eval()
    assert all(torch.equal(before[n], t) for n, t in pack(net).state.items())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        found(by_pixel((0,)), torch.zeros(0, 1, 4, 4, dtype=torch.uint8), [0])


def test_apply_and_what_can_be_applied() -> None:
    x = torch.full((2, 3, 2, 2), 0.5)
    mask, pattern = torch.tensor([[[0.0, 1], [0.25, 0]]]), torch.ones(3, 2, 2)
    stamped = Inverted(target=0, mask=mask, pattern=pattern)
    added = Inverted(target=0, delta=torch.full((3, 2, 2), 0.8))
    assert torch.allclose(apply(stamped, x)[1, 2], torch.tensor([[0.5, 1], [0.625, 0.5]]))
    assert torch.equal(apply(added, x), torch.ones_like(x))
    half = Inverted(target=0, mask=mask)
    with pytest.raises(ValueError, match="neither"):
        apply(half, x)
    known = (stamped, added, half, Inverted(target=0, mask=mask, pattern=pattern, uses_apply=True))
    assert [appliable(i) for i in known] == [True, True, False, False]


def test_targets_one_after_another_give_the_same_masks() -> None:
    images = samples.digits()["pool"].images[:24]
    settings = PUBLISHED | {"epochs": 8, "batch": 6, "patience": 2, "success": 0.5}
    net, passes = samples.badnets_net(), []
    # The net is copied, hooks and all.
    handle = net.register_forward_hook(lambda m, args, out: passes.append(len(out)))
    try:
        whole = optimise_masks(net, images, torch.arange(5), ctx=samples.ctx(), **settings)
        together = passes.copy()
        passes.clear()
        apart = optimise_masks(net, images, torch.arange(5), ctx=samples.ctx(), at_once=1, **settings)
    finally:
        handle.remove()
    # The last passes are those over what was kept, a target at a time.
    assert (together[0], passes[0]) == (30, 6)
    assert set(passes) == {6}
    assert sum(together) == sum(passes)
    for name in ("mask", "pattern", "norm", "success"):
        assert torch.allclose(getattr(whole, name), getattr(apart, name), atol=1e-4, equal_nan=True)
    assert not bool(whole.norm.isnan().all())
