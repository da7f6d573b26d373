from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn
from torch.nn import functional as F

from sleeperbench import ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.unicorn import Engine, Unicorn, class_means, squash, ssim, wear
from sleeperbench.kit.classifier import Classifier, build

TINY = {"pretrain": 1, "epochs": 1, "batch": 6, "width": 2}


def small(classes: int = 3) -> Classifier:
    spec = ModelSpec(arch="small_cnn", classes=classes, shape=(1, 8, 8), norm=((0.5,), (0.5,)), args={"width": 2})
    return build(spec, 0).eval().requires_grad_(False)


def case(net: Classifier, n: int = 12) -> Any:
    clean = samples.random_images(n, net.spec.shape, net.spec.classes)
    return SimpleNamespace(net=net, spec=net.spec, clean=clean, ctx=samples.ctx(3))


def engine(target: int = 1, **settings: Any) -> Engine:
    c = case(small())
    x = c.clean.images / 255
    means = class_means(c.net, x, c.clean.labels, 3)
    return Engine(c.net, x, target, means[target], Unicorn(**(TINY | settings)), c.ctx)


def test_settings_are_published() -> None:
    m = Unicorn()
    assert (m.pretrain, m.epochs, m.rounds, m.batch, m.width) == (500, 1000, 10, 64, 32)
    assert (m.success, m.distance, m.deviation, m.space, m.features) == (0.9, 0.15, 1.0, 0.15, 0.15)
    assert (Unicorn.ACCESS.track(), Unicorn.ACCESS.clean, Unicorn.INFO["stamps"]) == ("T1", 0.01, True)


def test_ssim_is_that_of_every_window() -> None:
    a, b = torch.rand(2, 2, 13, 12, dtype=torch.float64)[:, None].unbind(0)
    at = [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    total = 0.0
    for c in range(2):
        for top in range(3):
            for left in range(2):
                w = torch.tensor([[at[i] * at[j] for j in range(11)] for i in range(11)], dtype=torch.float64)
                w = w / w.sum()
                p, q = (v[0, c, top : top + 11, left : left + 11] for v in (a, b))
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, vpq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                total += float((2 * mp * mq + 1e-4) * (2 * vpq + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(ssim(a, b)) == pytest.approx(total / 12, abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1.0])
    assert ssim(torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)).shape == (3,)


def test_trigger_lies_between_the_networks() -> None:
    class Affine(nn.Module):
        def __init__(self, factor: float, shift: float) -> None:
            super().__init__()
            self.factor, self.shift = factor, shift

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x + self.shift

    x, m, p = torch.rand(4, 1, 5, 5), torch.rand(1, 5, 5), torch.rand(1, 5, 5)
    into, back = Affine(3, -1), Affine(1 / 3, 1 / 3)
    low, high = x.min(), x.max()
    wanted = (1 - m) * x + m * (p * (high - low) + low)
    assert torch.allclose(wear(into, back, m, p, x, None), wanted, atol=1e-5)
    # Fixed extremes make each image its own.
    fixed = torch.stack([3 * low - 1, 3 * high - 1])
    assert torch.allclose(wear(into, back, m, p, x[:1], fixed), wanted[:1], atol=1e-5)
    assert wear(into, Affine(9, 0), m, p, x, None).max() == 1


def parts(e: Engine, x: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """The terms of the loss, written out."""
    body: Any = e.net.body
    z = e.into(x)
    low, high = z.min(), z.max()
    m, p = torch.tanh(e.u) / 2 + 0.5, torch.tanh(e.v) / 2 + 0.5
    worn = e.back(((1 - m) * (z - low) / (high - low) + m * p) * (high - low) + low).clamp(0, 1)
    maps = (worn - 0.5) / 0.5
    for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
        maps = stage(maps)
    kept = (torch.tanh(e.w) / 2 + 0.5).detach()
    logits = body.head((kept * maps + (1 - kept) * other).mean((2, 3)))
    t = torch.full((len(x),), e.target)
    a, b = e.mean.flatten(), maps.mean(0).flatten()
    return {
        "hits": float((logits.argmax(1) == t).float().mean()),
        "ce": F.cross_entropy(logits, t),
        "distance": 1 - ssim(worn, x).mean(),
        "deviation": (maps * kept).std(0).sum() / kept.sum(),
        "alike": (a @ b) / (a.norm() * b.norm()),
    }


def test_terms_count_only_while_their_bounds_are_broken() -> None:
    x, other = torch.rand(6, 1, 8, 8), torch.rand(6, 8, 1, 1)
    for success, distance, deviation, floor in (
        (1.1, 0, 0, -2),
        (0, 0, 9, 2),
        (1.1, 2, 9, -2),
        (0, 2, 0, 2),
        (0, 2, 9, 2),
    ):
        e = engine(success=success, distance=distance, deviation=deviation)
        e._train(False)
        e.more = {"hits": 0.5, "distance": 0.25, "deviation": 2.0}
        found, seen = e.loss(x, other, floor=floor)
        want = parts(e, x, other)
        total = 0.0
        total += float(want["alike"].detach()) if floor == -2 else 0
        total += 10 * 3.0 * float(want["deviation"].detach()) if deviation == 0 else 0
        total += 10 * 1.25 * float(want["distance"].detach()) if distance == 0 else 0
        total += 1.5 * float(want["ce"].detach()) if success == 1.1 else 0
        assert float(found.detach()) == pytest.approx(total, abs=1e-4)
        assert seen["hits"] == want["hits"]
        assert seen["distance"] == pytest.approx(float(want["distance"].detach()), abs=1e-5)
        assert found.requires_grad == (total != 0)


def test_an_epoch_updates_each_part_with_its_own_loss() -> None:
    """One batch: networks once in train mode, then the trigger ten times, then the feature mask ten times."""
    settings = {"batch": 12, "success": 0.95, "distance": 0.01, "deviation": 0.001}
    e, r = engine(**settings), engine(**settings)
    e.epoch(0)
    body: Any = r.net.body
    order = torch.randperm(12, generator=r.gen)
    x = r.x[order]
    shuffled = x[torch.randperm(12, generator=r.gen)]

    def features(v: torch.Tensor) -> torch.Tensor:
        v = (v - 0.5) / 0.5
        for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
            v = stage(v)
        return v

    other = features(shuffled)

    def loss(floor: float) -> Any:
        p = parts(r, x, other)
        hits.append(p["hits"])
        total = p["alike"] * (float(p["alike"].detach()) >= floor)
        total = total + 20 * p["deviation"] * (float(p["deviation"].detach()) > 0.001)
        total = total + 20 * p["distance"] * (float(p["distance"].detach()) > 0.01)
        return total + 2 * p["ce"] * (p["hits"] < 0.95), p

    hits: list[float] = []
    r.into.train()
    r.back.train()
    total, _ = loss(0.0)
    (total + 200 * (r.back(r.into(x)) - x).square().mean()).backward()
    grads = [p.grad.clone() for side in (r.into, r.back) for p in side.parameters()]
    r.nets.step()
    r.into.eval()
    r.back.eval()
    for _ in range(10):
        r.trigger.zero_grad()
        total, seen = loss(0.5)
        size = (torch.tanh(r.u) / 2 + 0.5).sum()
        (total + 10 * size * (float(size.detach()) > 0.15 * 64)).backward()
        r.trigger.step()
    with torch.no_grad():
        maps = features(r.worn(x))
    for _ in range(10):
        r.part.zero_grad()
        kept = torch.tanh(r.w) / 2 + 0.5
        logits = body.head((kept * maps + (1 - kept) * other).mean((2, 3)))
        bound = int(0.15 * kept.numel())
        (F.cross_entropy(logits, torch.full((12,), 1)) + kept.sum() * (float(kept.detach().sum()) > bound)).backward()
        r.part.step()
    # Adam's first step shows the gradient's sign alone, which rounding decides where it is all but 0.
    both = zip((e.into, e.back), (r.into, r.back), strict=True)
    pairs = [pair for one, two in both for pair in zip(one.parameters(), two.parameters(), strict=True)]
    for (found, wanted), grad in zip(pairs, grads, strict=True):
        clear = grad.abs() > 1e-4
        assert torch.allclose(found[clear], wanted[clear], atol=1e-4)
    assert torch.allclose(e.w, r.w, atol=1e-3)
    assert torch.allclose(e.u, r.u, atol=1e-3)
    assert torch.allclose(e.v, r.v, atol=2e-2)
    assert e.more["hits"] == pytest.approx(max(0.95 - sum(hits) / 11, 0) / 0.95, abs=0.02)
    distance = float(seen["distance"].detach())
    assert e.more["distance"] == pytest.approx((distance - 0.01) / 0.01, rel=0.02)


def test_means_are_of_each_label() -> None:
    net = small()
    x, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 0, 2, 2, 2])
    body: Any = net.body
    maps = (x - 0.5) / 0.5
    for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
        maps = stage(maps)
    wanted = [maps[:2].mean(0), maps.mean(0), maps[2:].mean(0)]
    for found, mean in zip(class_means(net, x, labels, 3), wanted, strict=True):
        assert torch.allclose(found, mean, atol=1e-6)


def test_claims_are_the_best_that_are_near_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {0: (0.95, 0.9), 1: (1.0, 0.84), 2: (0.99, 0.86), 3: (0.3, 1.0), 4: (0.97, 0.99)}
    monkeypatch.setattr(Engine, "success", lambda self, x: answers[self.target])
    monkeypatch.setattr(Engine, "epoch", lambda self, number: None)
    c = case(small(5))
    m = Unicorn(**TINY)
    found = m.run(c)
    v = found.verdict
    assert v is not None
    assert v.label_scores.tolist() == pytest.approx([0.95, 0, 0.99, 0.3, 0.97])
    assert (v.score, v.threshold) == (pytest.approx(0.99), 0.9)
    assert found.chosen["flagged"] == [0, 2, 4]
    assert [i.target for i in found.inverted] == found.chosen["claimed"] == [2, 4]
    x = c.clean.images / 255
    first, second = (m.stamp(found.state, inv, x) for inv in found.inverted)
    assert first.shape == x.shape
    assert torch.equal(first, first.clamp(0, 1))
    assert not torch.allclose(first, second)
    assert torch.allclose(m.stamp(found.state, found.inverted[0], x[3:5]), first[3:5], atol=1e-5)
    again = m.run(case(small(5)))
    assert torch.equal(m.stamp(again.state, again.inverted[0], x), first)


def test_success_is_that_of_the_stamp() -> None:
    e = engine()
    e.pretrain()
    share, near = e.success(e.x)
    tensors = e.tensors()
    state = ({f"1.{n}": v for n, v in tensors.items()}, {"channels": 1, "width": 2})
    worn = Unicorn().stamp(state, SimpleNamespace(target=1), e.x)
    assert share == pytest.approx(float((e.net(worn).argmax(1) == 1).float().mean()))
    assert near == pytest.approx(float(ssim(worn, e.x).mean()), abs=1e-5)
    assert e.success(e.x[:0]) == (0.0, 1.0)
    assert torch.equal(tensors["mask"], squash(torch.ones(1, 8, 8)))


def test_it_declines_a_single_row() -> None:
    with pytest.raises(NotApplicable, match="too_few_rows"):
        Unicorn(**TINY).run(case(small(), 1))
