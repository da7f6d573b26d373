from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn
from torch.nn import functional as F

from sleeperbench import ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.unicorn import Adams, Engine, Unicorn, class_means, side, squash, ssim, stamped, wear
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.generators import seeded
from sleeperbench.kit.unet import UNet

TINY = {"pretrain": 1, "epochs": 1, "batch": 6, "width": 2}


@pytest.fixture
def double() -> Iterator[None]:
    """Numbers of 64 bit, so that a gradient's sign is not one of rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(classes: int = 3) -> Classifier:
    spec = ModelSpec(arch="small_cnn", classes=classes, shape=(1, 8, 8), norm=((0.5,), (0.5,)), args={"width": 2})
    return build(spec, 0).eval().requires_grad_(False)


def case(net: Classifier, n: int = 12) -> Any:
    clean = samples.random_images(n, net.spec.shape, net.spec.classes)
    return SimpleNamespace(net=net, spec=net.spec, clean=clean, ctx=samples.ctx(3))


def engine(*targets: int, **settings: Any) -> Engine:
    c = case(small())
    x = c.clean.images / 255
    means = class_means(c.net, x, c.clean.labels, 3)
    return Engine(c.net, x, targets, means[list(targets)], Unicorn(**(TINY | settings)), c.ctx)


class Alone:
    """What an engine holds for one label, in modules and optimisers of torch's own."""

    def __init__(self, target: int) -> None:
        c = case(small())
        self.net: Any = c.net
        self.x, self.target = c.clean.images / 255, target
        self.mean = class_means(c.net, self.x, c.clean.labels, 3)[target]
        self.into, self.back = (seeded(UNet, c.ctx.derive(name, target), 1, 1, 2) for name in ("into", "back"))
        self.u, self.v = torch.ones(1, 8, 8).requires_grad_(), torch.zeros(1, 8, 8).requires_grad_()
        self.w = torch.ones_like(self.mean).requires_grad_()
        nets = [*self.into.parameters(), *self.back.parameters()]
        self.nets = torch.optim.Adam(nets, lr=1e-3, betas=(0.5, 0.9))
        self.trigger = torch.optim.Adam([self.u, self.v], lr=0.1, betas=(0.5, 0.9))
        self.part = torch.optim.Adam([self.w], lr=0.1, betas=(0.5, 0.9))
        self.gen = c.ctx.generator("batches", target)

    def train(self, on: bool) -> None:
        for net in (self.into, self.back):
            net.train(on)


def test_settings_are_published() -> None:
    m = Unicorn()
    assert (m.pretrain, m.epochs, m.rounds, m.batch, m.width, m.depth) == (500, 1000, 10, 64, 32, 4)
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
    fixed = 3 * low - 1, 3 * high - 1
    assert torch.allclose(back(stamped(into(x), m, p, *fixed)), wanted, atol=1e-5)
    # Fixed extremes make each image its own.
    assert torch.allclose(back(stamped(into(x[:1]), m, p, *fixed)), wanted[:1], atol=1e-5)


def test_a_batch_has_extremes_of_its_own_and_images_stay_in_range() -> None:
    e, x = engine(0, 2), torch.rand(2, 5, 1, 8, 8)
    e._train(False)
    worn = e.worn(x)
    assert torch.equal(worn, worn.clamp(0, 1))
    for i in range(2):
        own = {n: v for n, v in e.tensors(i).items() if n != "extremes"}
        form = seeded(UNet, 0, 1, 1, 2).eval()
        z = side(own, "into", form, x[i])
        own["extremes"] = torch.stack([z.min(), z.max()]).detach()
        assert torch.allclose(wear(own, form, x[i]), worn[i], atol=1e-5)
    assert not torch.allclose(worn[0], worn[1])


def parts(e: Alone, x: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """The terms of the loss, written out."""
    body: Any = e.net.body
    z = e.into(x)
    low, high = z.min(), z.max()
    m, p = torch.tanh(e.u) / 2 + 0.5, torch.tanh(e.v) / 2 + 0.5
    scale = (high - low).clamp(min=1e-12)  # tiny networks may answer all pixels alike
    worn = e.back(((1 - m) * (z - low) / scale + m * p) * scale + low).clamp(0, 1)
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
        "alike": (a @ b) / (a.norm().clamp(min=1e-8) * b.norm().clamp(min=1e-8)),
    }


def test_terms_count_only_while_their_bounds_are_broken() -> None:
    x, other = torch.rand(2, 6, 1, 8, 8), torch.rand(2, 6, 8, 1, 1)
    for success, distance, deviation, floor in (
        (1.1, 0, 0, -2),
        (0, 0, 9, 2),
        (1.1, 2, 9, -2),
        (0, 2, 0, 2),
        (0, 2, 9, 2),
    ):
        e = engine(1, 2, success=success, distance=distance, deviation=deviation)
        e._train(False)
        e.more = {n: torch.tensor([v, 0.0]) for n, v in (("hits", 0.5), ("distance", 0.25), ("deviation", 2.0))}
        losses, seen = e.loss(x, other, floor=floor)
        for i, factors in enumerate(((1.5, 1.25, 3.0), (1.0, 1.0, 1.0))):
            r = Alone(i + 1)
            r.train(False)
            want = parts(r, x[i], other[i])
            total = 0.0
            total += float(want["alike"].detach()) if floor == -2 else 0
            total += 10 * factors[2] * float(want["deviation"].detach()) if deviation == 0 else 0
            total += 10 * factors[1] * float(want["distance"].detach()) if distance == 0 else 0
            total += factors[0] * float(want["ce"].detach()) if success == 1.1 else 0
            assert float(losses[i].detach()) == pytest.approx(total, abs=1e-4)
            assert float(seen["hits"][i]) == pytest.approx(want["hits"])
            assert float(seen["distance"][i]) == pytest.approx(float(want["distance"].detach()), abs=1e-5)
            assert bool(seen["broken"][i]) == (total != 0)


def test_an_optimiser_moves_each_label_as_if_it_were_alone() -> None:
    start, gradients = torch.rand(3, 2, 2), torch.randn(5, 3, 2, 2)
    moving = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 0]]).bool()
    values = start.clone()
    adams = Adams([values], lr=0.1, betas=(0.5, 0.9))
    for g, yes in zip(gradients, moving, strict=True):
        adams.step([g], yes)
    for i in range(3):
        own = start[i].clone().requires_grad_()
        adam = torch.optim.Adam([own], lr=0.1, betas=(0.5, 0.9))
        for g, yes in zip(gradients[:, i], moving[:, i].tolist(), strict=True):
            if yes:
                own.grad = g.clone()
                adam.step()
        assert torch.allclose(values[i], own.detach(), atol=1e-6)


@pytest.mark.usefixtures("double")
def test_an_epoch_updates_each_part_of_each_label_with_its_own_loss() -> None:
    """One batch: networks once in train mode, then the trigger ten times, then the feature mask ten times."""
    targets = (1, 0, 2)
    e = engine(*targets, batch=12, success=0.95, distance=0.01, deviation=0.001)
    e.epoch()
    for i, target in enumerate(targets):
        r = Alone(target)
        body: Any = r.net.body
        x = r.x[torch.randperm(12, generator=r.gen)]
        shuffled = x[torch.randperm(12, generator=r.gen)]

        def features(v: torch.Tensor, body: Any = body) -> torch.Tensor:
            v = (v - 0.5) / 0.5
            for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
                v = stage(v)
            return v

        other = features(shuffled)
        hits: list[float] = []

        def loss(
            floor: float, r: Alone = r, x: Any = x, other: Any = other, hits: list[float] = hits
        ) -> tuple[Any, dict[str, Any]]:
            p = parts(r, x, other)
            hits.append(p["hits"])
            total = p["alike"] * (float(p["alike"].detach()) >= floor)
            total = total + 20 * p["deviation"] * (float(p["deviation"].detach()) > 0.001)
            total = total + 20 * p["distance"] * (float(p["distance"].detach()) > 0.01)
            return total + 2 * p["ce"] * (p["hits"] < 0.95), p

        r.train(True)
        total, _ = loss(0.0)
        (total + 200 * (r.back(r.into(x)) - x).square().mean()).backward()
        grads = {f"{n}.{k}": p.grad.clone() for n in ("into", "back") for k, p in getattr(r, n).named_parameters()}
        r.nets.step()
        r.train(False)
        for _ in range(10):
            r.trigger.zero_grad()
            total, seen = loss(0.5)
            size = (torch.tanh(r.u) / 2 + 0.5).sum()
            (total + 10 * size * (float(size.detach()) > 0.15 * 64)).backward()
            r.trigger.step()
        with torch.no_grad():
            z = r.into(x)
            m, p = torch.tanh(r.u) / 2 + 0.5, torch.tanh(r.v) / 2 + 0.5
            maps = features(r.back(stamped(z, m, p, z.min(), z.max())).clamp(0, 1))
        for _ in range(10):
            r.part.zero_grad()
            kept = torch.tanh(r.w) / 2 + 0.5
            logits = body.head((kept * maps + (1 - kept) * other).mean((2, 3)))
            large = float(kept.detach().sum()) > int(0.15 * kept.numel())
            (F.cross_entropy(logits, torch.full((12,), target)) + kept.sum() * large).backward()
            r.part.step()
        # Adam's first step shows the gradient's sign alone, which rounding decides where it is all but 0.
        for name in ("into", "back"):
            for k, wanted in getattr(r, name).named_parameters():
                clear = grads[f"{name}.{k}"].abs() > 1e-4
                assert torch.allclose(getattr(e, name).parameters[k][i][clear], wanted[clear], atol=1e-4)
            for k, wanted in getattr(r, name).named_buffers():
                assert torch.allclose(getattr(e, name).buffers[k][i], wanted, atol=1e-4)
        assert torch.allclose(e.w[i], r.w, atol=1e-3)
        assert torch.allclose(e.u[i], r.u, atol=1e-3)
        assert torch.allclose(e.v[i], r.v, atol=2e-2)
        assert float(e.more["hits"][i]) == pytest.approx(max(0.95 - sum(hits) / 11, 0) / 0.95, abs=0.02)
        distance = float(seen["distance"].detach())
        assert float(e.more["distance"][i]) == pytest.approx((distance - 0.01) / 0.01, rel=0.02)


def test_a_trigger_stays_where_no_bound_is_broken_any_more() -> None:
    """At first the distance breaks its bound; later nothing does, for a cosine with the opposite of features cannot."""
    e = engine(0, 1, success=-1.0, distance=1e-6, deviation=9.0, space=1.1, batch=12)
    e.epoch()
    before = e.u.detach().clone()
    assert not torch.equal(before, torch.ones(2, 1, 8, 8))
    e.m, e.means = replace(e.m, distance=2.0), -torch.ones_like(e.means)
    e.epoch()
    assert torch.equal(e.u.detach(), before)
    e.m = replace(e.m, distance=1e-6)
    e.epoch()
    assert not torch.equal(e.u.detach(), before)


def test_labels_side_by_side_are_those_one_after_another() -> None:
    sizes = []
    for together in (1, 2, 0):
        made: list[int] = []

        def epoch(self: Engine, made: list[int] = made) -> None:
            made.append(len(self.targets))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "epoch", epoch)
            patch.setattr(Engine, "pretrain", lambda self: None)
            patch.setattr(Engine, "success", lambda self, i, x: (0.0, 1.0))
            Unicorn(**TINY, together=together).run(case(small()))  # type: ignore[arg-type]
        sizes.append(made)
    assert sizes == [[1, 1, 1], [2, 1], [3]]
    alone, both = (Unicorn(**TINY | {"batch": 12}, rounds=1, together=n).run(case(small())) for n in (1, 3))  # type: ignore[arg-type]
    for one, many in zip(*(o.chosen["success_and_ssim"] for o in (alone, both)), strict=True):
        assert one == pytest.approx(many, abs=5e-3)


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
    monkeypatch.setattr(Engine, "success", lambda self, i, x: answers[self.targets[i]])
    monkeypatch.setattr(Engine, "epoch", lambda self: None)
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
    e = engine(0, 1)
    e.pretrain()
    share, near = e.success(1, e.x)
    tensors = e.tensors(1)
    state = ({f"1.{n}": v for n, v in tensors.items()}, {"width": 2, "depth": 4})
    worn = Unicorn().stamp(state, SimpleNamespace(target=1), e.x)
    assert share == pytest.approx(float((e.net(worn).argmax(1) == 1).float().mean()))
    assert near == pytest.approx(float(ssim(worn, e.x).mean()), abs=1e-5)
    assert e.success(1, e.x[:0]) == (0.0, 1.0)
    assert torch.equal(tensors["mask"], squash(torch.ones(1, 8, 8)))


def test_it_declines_a_single_row() -> None:
    with pytest.raises(NotApplicable, match="too_few_rows"):
        Unicorn(**TINY).run(case(small(), 1))
