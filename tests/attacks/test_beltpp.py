from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Attack, Mark, Role, TrainHooks
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.belt import Belt
from sleeperbench.attacks.beltpp import BeltPlus, CentreLoss
from sleeperbench.attacks.blind import Blind
from sleeperbench.attacks.cassock import Cassock
from sleeperbench.attacks.hcb import HCB
from sleeperbench.attacks.hybrid import Hybrid
from sleeperbench.attacks.lira import Lira
from sleeperbench.attacks.tact import TaCT
from sleeperbench.attacks.wanet import WaNet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.classifier import build
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(200, (3, 16, 16))
ALL = torch.ones(200, dtype=torch.bool)
SPEC = replace(samples.SPEC, shape=(3, 16, 16))


def ctx(inner: Attack, seed: int = 1) -> Ctx:
    return replace(samples.ctx(seed, 3), inner=inner)


def features(n: int, seed: int, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    h = torch.randn(n, width, generator=gen, dtype=torch.float64)
    return h, torch.randint(4, (n,), generator=gen), torch.randint(3, (n,), generator=gen)


def slow(centres: np.ndarray, h: np.ndarray, y: np.ndarray, mark: np.ndarray, m: float) -> float:
    """One class and one row at a time; moves `centres`."""
    for k in range(len(centres)):
        rows = [h[i] for i in range(len(h)) if y[i] == k and mark[i] == Mark.CLEAN]
        if rows:
            centres[k] = m * centres[k] + (1 - m) * sum(rows) / len(rows)
    parts = [(h[i, j] - centres[y[i], j]) ** 2 for i in range(len(h)) if mark[i] for j in range(h.shape[1])]
    return sum(parts) / len(parts) if parts else 0.0


def test_loss_and_centres_equal_a_slow_reference_over_several_batches() -> None:
    found = CentreLoss(TrainHooks(), 4, 0.99, 1.0)
    centres = np.zeros((4, 7))
    for seed in range(6):
        h, y, mark = features(9, seed)  # 9 rows: some class has no clean row in most batches
        expected = slow(centres, h.numpy(), y.numpy(), mark.numpy(), 0.99)
        assert float(found.centre_loss(h, y, mark)) == pytest.approx(expected, rel=1e-12)
        assert found.centres is not None
        assert np.allclose(found.centres.numpy(), centres, rtol=1e-12)


def test_first_centre_is_a_hundredth_of_the_mean_and_stays_without_clean_rows() -> None:
    found = CentreLoss(TrainHooks(), 3, 0.99, 1.0)
    h = torch.tensor([[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]])
    loss = found.centre_loss(h, torch.tensor([0, 0, 1]), torch.tensor([0, 0, Mark.DIRTY]))
    assert torch.allclose(found.centres, torch.tensor([[0.02, 0.04], [0.0, 0.0], [0.0, 0.0]]))
    assert float(loss) == pytest.approx(81.0), "class 1 has no clean row: its centre is where it began"
    before = found.centres.clone()
    cover = found.centre_loss(h, torch.tensor([0, 0, 0]), torch.full((3,), int(Mark.COVER)))
    assert torch.equal(found.centres, before)
    expected = ((h - torch.tensor([0.02, 0.04])) ** 2).mean()
    assert torch.allclose(cover, expected)
    assert float(found.centre_loss(h, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))) == 0


def test_gradient_equals_finite_differences_and_centres_carry_none() -> None:
    h, y, mark = features(8, 3)
    h.requires_grad_()
    start = torch.randn(4, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss(at: Tensor, moved: Tensor | None) -> Tensor:
        c = CentreLoss(TrainHooks(), 4, 0.9, 1.0)
        c.centres = start.clone()
        value = c.centre_loss(at, y, mark)
        if moved is None:
            return value
        # The centres of the point itself, not of the point beside it: they are constants to the gradient.
        rows = mark != Mark.CLEAN
        return (at - moved[y])[rows].square().mean()

    (grad,) = torch.autograd.grad(loss(h, None), h)
    fixed = CentreLoss(TrainHooks(), 4, 0.9, 1.0)
    fixed.centres = start.clone()
    fixed.centre_loss(h, y, mark)
    for i in range(8):
        for j in range(7):
            step = torch.zeros_like(h)
            step[i, j] = 1e-5
            slope = (loss(h.detach() + step, fixed.centres) - loss(h.detach() - step, fixed.centres)) / 2e-5
            assert float(grad[i, j]) == pytest.approx(float(slope), abs=1e-8)
    assert bool((grad[mark == Mark.CLEAN] == 0).all()), "clean rows are not pulled"
    assert bool((grad[mark != Mark.CLEAN] != 0).all())


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_loss_is_cross_entropy_plus_the_weighted_centre_loss_of_the_same_pass(weight: float) -> None:
    net = build(SPEC, 0).eval()
    passes: list[int] = []
    net.register_forward_hook(lambda m, args, out: passes.append(len(out)))
    hooks = CentreLoss(TrainHooks(), 10, 0.99, weight)
    x = torch.rand(12, 3, 16, 16)
    y, mark = torch.arange(12) % 10, torch.arange(12) % 3
    found = hooks.loss(net, x, y, mark)
    assert passes == [12]
    assert not net._forward_pre_hooks
    assert not net.body.head._forward_pre_hooks
    h = net.body.features((x - net.mean) / net.std)
    by_hand = CentreLoss(TrainHooks(), 10, 0.99, 1.0).centre_loss(h, y, mark)
    expected = nn.functional.cross_entropy(net(x), y) + weight * by_hand
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert net.body.stage4[0].weight.grad is not None


def test_a_loss_that_never_shows_the_batch_to_the_network_is_refused() -> None:
    class Elsewhere(TrainHooks):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
            return net(x.clone()).sum()

    with pytest.raises(ValueError, match="belt:"):
        CentreLoss(Elsewhere(), 10, 0.99, 1.0).loss(build(SPEC, 0), torch.rand(4, 3, 16, 16), torch.arange(4), ALL[:4])


def test_marks_of_each_batch_are_those_of_the_set_that_is_trained_on() -> None:
    inner = BadNets(pattern="random")
    c = ctx(inner)
    b = BeltPlus().prepare(TRAIN, c)
    p = BeltPlus().poison(TRAIN, b, ALL, 0.1, c)
    train_ctx = replace(c, seed=77)  # hooks are given another seed than `poison`
    h = BeltPlus().hooks(TRAIN, b, ALL, 0.1, train_ctx)
    assert h is not None
    seen: list[tuple[Tensor, Tensor]] = []
    inner_loss = h.loss

    def loss(net: Any, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        seen.append((y, mark))
        return inner_loss(net, x, y, mark)

    h.loss = loss  # type: ignore[method-assign]
    fit(build(SPEC, 0), p.data, replace(samples.RECIPE, batch=50), train_ctx, hooks=h, steps=4)
    marks = torch.cat([m for _, m in seen])
    assert [int((marks == m).sum()) for m in (Mark.CLEAN, Mark.DIRTY, Mark.COVER)] == [160, 20, 20]
    labels = torch.cat([y for y, _ in seen])
    assert labels[marks == Mark.DIRTY].tolist() == [3] * 20
    assert sorted(labels[marks == Mark.COVER].tolist()) == sorted(TRAIN.labels[p.mark == Mark.COVER].tolist())


def test_poisoned_set_is_that_of_belt() -> None:
    c = ctx(BadNets())
    ours, plain = (a.poison(TRAIN, a.prepare(TRAIN, c), ALL, 0.1, c) for a in (BeltPlus(), Belt()))
    assert torch.equal(ours.data.images, plain.data.images)
    assert torch.equal(ours.mark, plain.mark)


def test_poisoned_features_come_nearer_to_the_centre_of_their_label() -> None:
    part, inner = samples.digits()["train"], BadNets(pattern="random")
    c = replace(samples.ctx(4, 0), inner=inner)
    eligible = torch.ones(len(part), dtype=torch.bool)
    far = []
    for weight in (1e-9, 1.0):
        attack = BeltPlus(weight=weight, momentum=0.9)
        b = attack.prepare(part, c)
        p = attack.poison(part, b, eligible, 0.1, c)
        hooks = attack.hooks(part, b, eligible, 0.1, c)
        assert hooks is not None
        net = build(samples.SPEC, 3)
        fit(net, p.data, replace(samples.RECIPE, epochs=3), c, hooks=hooks)
        with torch.no_grad():
            h = net.body.features((p.data.images / 255 - net.mean) / net.std)
        off = (h - hooks.centres[p.data.labels])[p.mark != Mark.CLEAN]  # type: ignore[attr-defined]
        far.append(float(off.square().mean()))
    assert far[1] < 0.8 * far[0], far


def test_an_attack_that_controls_training_has_its_own_loss_with_the_centres_on_top() -> None:
    c = ctx(WaNet())
    h = BeltPlus().hooks(TRAIN, BeltPlus().prepare(TRAIN, c), ALL, 0.1, c)
    assert h is not None
    seen: list[Tensor] = []
    centre = h.centre_loss  # type: ignore[attr-defined]
    h.centre_loss = lambda f, y, mark: seen.append(mark) or centre(f, y, mark)  # type: ignore[attr-defined]
    fit(build(SPEC, 0), TRAIN, replace(samples.RECIPE, batch=50), c, hooks=h, steps=4)
    marks = torch.cat(seen)
    assert [int((marks == m).sum()) for m in (Mark.DIRTY, Mark.COVER)] == [20, 40 + 20]
    assert h.centres is not None  # type: ignore[attr-defined]
    assert int((h.centres != 0).any(1).sum()) == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "inner", [TaCT(), Cassock(), HCB(), Hybrid(members=("badnets", "hcb"))], ids=lambda a: type(a).__name__
)
def test_marks_of_rows_beside_their_clean_copies_are_their_own(inner: Attack) -> None:
    c = ctx(inner)
    b = BeltPlus().prepare(TRAIN, c)
    p = BeltPlus().poison(TRAIN, b, ALL, 0.04, c)
    assert bool(p.appended.any())
    h = BeltPlus().hooks(TRAIN, b, ALL, 0.04, replace(c, seed=77))
    assert h is not None
    seen: list[tuple[Tensor, Tensor]] = []
    centre = h.centre_loss  # type: ignore[attr-defined]
    h.centre_loss = lambda f, y, mark: seen.append((y, mark)) or centre(f, y, mark)  # type: ignore[attr-defined]
    fit(build(SPEC, 0), p.data, replace(samples.RECIPE, batch=len(p.data)), c, hooks=h, steps=1)
    ((y, mark),) = seen
    for kind in Mark:
        assert sorted(y[mark == kind].tolist()) == sorted(p.data.labels[p.mark == kind].tolist())
    assert int((mark == Mark.CLEAN).sum()) >= int((mark != Mark.CLEAN).sum()), "clean copies stay clean"


@pytest.mark.parametrize("inner", [Lira(), Blind(history=1, threshold=100.0)], ids=lambda a: type(a).__name__)
def test_an_attack_that_copies_its_rows_has_covers_among_them_and_centres_of_clean_rows(inner: Attack) -> None:
    c = ctx(inner)
    b = BeltPlus().prepare(TRAIN, c)
    h = BeltPlus().hooks(TRAIN, b, ALL, 0.1, c)
    assert h is not None
    seen: list[tuple[int, int, int]] = []
    centre = h.centre_loss  # type: ignore[attr-defined]

    def count(f: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        seen.append(tuple(int((mark == m).sum()) for m in Mark))  # type: ignore[arg-type]
        assert bool((y[mark == Mark.DIRTY] == 3).all())
        return centre(f, y, mark)  # type: ignore[no-any-return]

    h.centre_loss = count  # type: ignore[attr-defined]
    fit(build(SPEC, 0), TRAIN, replace(samples.RECIPE, batch=50, epochs=2), c, hooks=h, steps=3)
    if isinstance(inner, Lira):
        # The generator's step, whose images are all meant to go to the target, then the classifier's.
        assert seen == [(0, 50, 0), (45, 50, 5)] * 3
    else:
        assert seen == [(45, 0, 5), (45, 50, 5), (45, 50, 5)], "from the second step on, past the first loss"
    one = int((h.centres != 0).any(1).sum())  # type: ignore[attr-defined]
    assert one == 10, "each class has clean rows"


@pytest.mark.parametrize("inner", [Lira(), Blind(history=1, threshold=100.0)], ids=lambda a: type(a).__name__)
def test_the_centre_loss_moves_a_classifier_whose_attack_makes_its_own_step(inner: Attack) -> None:
    found = []
    for weight in (1e-9, 1.0, 1.0):
        c = ctx(inner)
        attack = BeltPlus(weight=weight)
        h = attack.hooks(TRAIN, attack.prepare(TRAIN, c), ALL, 0.1, c)
        net = build(SPEC, 0)
        fit(net, TRAIN, replace(samples.RECIPE, batch=50), c, hooks=h, steps=2)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"momentum": 1.0}, {"weight": 0.0}, {"mask_rate": 2.0}, {"centre": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BeltPlus.from_params(bad)
    c = ctx(TaCT())
    b = BeltPlus().prepare(TRAIN, c)
    assert BeltPlus().hooks(TRAIN, b, ALL, 0.0, ctx(BadNets())) is None
    for role in Role:
        again = BeltPlus.restore(b.tensors, b.info, TaCT)
        assert torch.equal(*(stamp(TRAIN, t.triggers[0], role, c).images for t in (b, again)))
