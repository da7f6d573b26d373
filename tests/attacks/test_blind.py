from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Mark, Role
from sleeperbench.attacks.belt import Belt
from sleeperbench.attacks.blind import Blind, BlindHooks, nearest
from sleeperbench.contracts import Ctx
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(64, (3, 16, 16))
ALL = torch.ones(64, dtype=torch.bool)
SPEC = replace(samples.SPEC, shape=(3, 16, 16))


def ctx(seed: int = 1, epochs: int = 1) -> Ctx:
    c = samples.ctx(seed, 3)
    c.recipe = replace(c.recipe, batch=32, pad=0, lr=0.05, epochs=epochs)
    return c


def hooks(eligible: Tensor = ALL, epochs: int = 1, **args: Any) -> BlindHooks:
    attack = Blind(**{"history": 1, "threshold": 100.0, **args})
    c = ctx(epochs=epochs)
    made = attack.hooks(TRAIN, attack.prepare(TRAIN, c), eligible, 0.1, c)
    assert isinstance(made, BlindHooks)
    return made


def batch(h: BlindHooks, rows: slice = slice(0, 32)) -> tuple[Tensor, Tensor, Tensor]:
    return h.batch(to_float(TRAIN.images[rows]), TRAIN.labels[rows], TRAIN.ids[rows], 0)


def test_the_published_pattern_lies_at_rows_3_to_7_and_columns_23_to_25() -> None:
    b = Blind().prepare(samples.random_images(8, (3, 32, 32)), ctx())
    mask, pattern = b.tensors["mask"], b.tensors["pattern"]
    rows, columns = mask[0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 7, 23, 25)
    drawn = torch.where(mask[0] > 0, pattern[0], -1)[3:8, 23:26].int().tolist()
    assert drawn == [[1, 0, 1], [-1, 1, -1], [-1, -1, 0], [-1, 1, -1], [1, 0, 1]]
    assert torch.equal(pattern[0], pattern[2])
    grey = torch.full((1, 3, 32, 32), 0.5)
    shown = b.triggers[0].apply(grey, torch.zeros(1), torch.zeros(1), Role.TEST, torch.Generator())
    assert int((shown != 0.5).sum()) == 3 * 9


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 28, 28), (3, 64, 64), (3, 224, 224)])
def test_it_fits_on_every_size(shape: tuple[int, int, int]) -> None:
    data = samples.random_images(4, shape)
    b = Blind().prepare(data, ctx())
    grown = max(1, round(shape[1] / 32))
    assert int(b.tensors["mask"].sum()) == 9 * grown**2
    assert bool((stamp(data, b.triggers[0], Role.TEST, ctx()).images != data.images).flatten(1).any(1).all())


def test_every_eligible_row_comes_once_more_with_the_trigger() -> None:
    eligible = torch.arange(64) % 2 == 0
    h = hooks(eligible)
    x, y, mark = batch(h)
    assert torch.equal(mark, torch.zeros(32).long()), "no backdoor task before the first loss is known"
    h.past.append(1.0)
    x, y, mark = batch(h)
    assert mark.tolist() == [Mark.CLEAN] * 32 + [Mark.DIRTY] * 16
    assert torch.equal(x[:32], to_float(TRAIN.images[:32]))
    assert torch.equal(y[:32], TRAIN.labels[:32])
    assert y[32:].tolist() == [3] * 16
    shown = stamp(TRAIN.rows(torch.arange(0, 32, 2)), h.trigger, Role.TEST, ctx()).images
    assert torch.equal((x[32:] * 255).round().to(torch.uint8), shown)


def test_the_backdoor_task_waits_for_a_low_mean_loss() -> None:
    h = hooks(history=3, threshold=1.0, epochs=100)
    assert h.past.maxlen == 3
    opened = []
    for loss in (0.1, 0.1, 0.1, 2.0, 2.0, 0.1, 0.1):
        h.past.append(loss)
        opened.append(h.open())
    assert opened == [False, False, True, True, False, False, True]


@pytest.mark.parametrize(("epochs", "waits"), [(5, 1), (200, 40), (10_000, 1000)])
def test_a_short_training_waits_a_tenth_of_itself(epochs: int, waits: int) -> None:
    assert hooks(history=1000, epochs=epochs).past.maxlen == waits


def test_nearest_point_of_two_gradients() -> None:
    gen = torch.Generator().manual_seed(0)
    s = torch.linspace(0.001, 0.999, 999)[:, None]
    for scale in (0.1, 1.0, 10.0):
        for _ in range(5):
            a, b = torch.randn(2, 4, generator=gen)
            b = b * scale
            best = s[(s * a + (1 - s) * b).square().sum(1).argmin()]
            assert float(nearest(a, b)) == pytest.approx(float(best), abs=1e-3)
    assert float(nearest(a, a)) == 0.5


def test_mgda_follows_the_two_gradients_of_an_independent_computation() -> None:
    h = hooks()
    h.past.append(1.0)
    x, y, mark = batch(h)
    net = build(SPEC, 0)
    twin = copy.deepcopy(net)
    grads, losses = [], []
    for part in (slice(0, 32), slice(32, None)):
        twin.zero_grad()
        loss = nn.functional.cross_entropy(twin(x)[part], y[part])  # BatchNorm sees both
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in twin.parameters()]).double())
    unit = [g / min(v * float(g.norm()), 10) for g, v in zip(grads, losses, strict=True)]
    steps = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    lengths = [float((s * unit[0] + (1 - s) * unit[1]).norm()) for s in steps]
    s = float(steps[lengths.index(min(lengths))])
    before = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    loss = h.step(net, torch.optim.SGD(net.parameters(), lr=0.1), x, y, mark)
    assert loss.item() == pytest.approx(losses[0], rel=1e-5), "the victim sees the loss of the main task"
    moved = before - torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    wanted = 0.1 * (s * grads[0] + (1 - s) * grads[1])
    assert 0.01 < s < 0.99
    assert float((moved - wanted).norm() / wanted.norm()) < 2e-3
    assert list(h.past) == [pytest.approx(losses[0], rel=1e-5)]


def test_the_normaliser_of_a_gradient_stops_at_10() -> None:
    h = hooks()
    g1, g2 = (torch.tensor([4.0, 0.0]),), (torch.tensor([0.0, 3.0]),)
    plain = h.scales([torch.tensor(1.0), torch.tensor(2.0)], [g1, g2])
    # u1 = 4 / 4 and u2 = 3 / 6 are at a right angle: s = |u2|^2 / (|u1|^2 + |u2|^2).
    assert float(plain[0]) == pytest.approx(0.25 / 1.25)
    capped = h.scales([torch.tensor(1.0), torch.tensor(100.0)], [g1, g2])
    assert float(capped[0]) == pytest.approx(0.09 / 1.09)
    assert float(capped[0] + capped[1]) == pytest.approx(1.0)
    nothing = h.scales([torch.tensor(1.0), torch.tensor(0.0)], [g1, (torch.zeros(2),)])
    assert [float(s) for s in nothing] == pytest.approx([0.001, 0.999]), "without a gradient nothing is not a number"


def test_fixed_weights_are_one_and_that_of_the_backdoor() -> None:
    h = hooks(balance="fixed", weight=0.7)
    assert h.scales([torch.tensor(1.0)] * 2, [(torch.ones(1),)] * 2) == [1.0, 0.7]


def test_a_batch_without_the_backdoor_task_is_an_ordinary_step() -> None:
    h = hooks()
    x, y, mark = batch(h)
    nets = [build(SPEC, 0) for _ in range(2)]
    opts = [torch.optim.SGD(n.parameters(), lr=0.1) for n in nets]
    h.step(nets[0], opts[0], x, y, mark)
    nn.functional.cross_entropy(nets[1](x), y).backward()
    opts[1].step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_it_implants_on_digits_and_spares_clean_images() -> None:
    train, test = (samples.digits()[k] for k in ("train", "test"))
    c = samples.ctx(2)
    attack = Blind()
    b = attack.prepare(train, c)
    h = attack.hooks(train, b, torch.ones(len(train), dtype=torch.bool), 0.1, c)
    net = build(samples.SPEC, 2)
    fit(net, train, c.recipe, c, hooks=h)
    with torch.no_grad():
        clean = net(to_float(test.images)).argmax(1)
        hit = net(to_float(stamp(test, b.triggers[0], Role.TEST, c).images)).argmax(1)
    assert float((clean == test.labels).double().mean()) > 0.9
    assert float((hit[test.labels != 0] == 0).double().mean()) > 0.9


def test_decoy_restore_and_all_to_all() -> None:
    attack = Blind(targets="all_to_all")
    b = attack.prepare(TRAIN, ctx())
    assert b.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    again = Blind.restore(b.tensors, b.info)
    decoys = [attack.decoy(TRAIN, b, ctx(seed)) for seed in (3, 4)]
    shown = [stamp(TRAIN, t.triggers[0], Role.TEST, ctx()).images for t in (b, again, *decoys)]
    assert torch.equal(shown[0], shown[1])
    for i, decoy in enumerate(decoys):
        assert not torch.equal(shown[0], shown[2 + i])
        assert decoy.info == b.info
        assert int(decoy.tensors["mask"].sum()) == 9
        assert not bool((decoy.tensors["mask"] * b.tensors["mask"]).any())
    assert not torch.equal(shown[2], shown[3])


def test_the_data_stay_clean_and_rate_0_trains_plainly() -> None:
    attack, c = Blind(), ctx()
    b = attack.prepare(TRAIN, c)
    assert Blind.SNAPSHOT == "none"
    assert attack.poison(TRAIN, b, ALL, 0.1, c).rate() == 0
    assert attack.hooks(TRAIN, b, ALL, 0.0, c) is None


def test_covers_of_belt_stand_before_the_copies_and_belong_to_the_main_task() -> None:
    c = replace(ctx(), inner=Blind(history=1, threshold=100.0))
    b = Belt().prepare(TRAIN, c)
    h = Belt().hooks(TRAIN, b, ALL, 0.125, c)
    assert h is not None
    alone = batch(hooks())
    inner = h.inner  # type: ignore[attr-defined]
    inner.past.append(0.0)
    x, y, mark = batch(h)  # type: ignore[arg-type]
    assert mark.tolist() == [Mark.COVER] * 4 + [Mark.CLEAN] * 28 + [Mark.DIRTY] * 32
    assert len(alone[0]) == 32, "before the backdoor task is open"
    assert torch.equal(x[4:32], alone[0][4:])
    assert y[:32].tolist() == TRAIN.labels[:32].tolist()
    net = build(SPEC, 0).eval()
    inner.loss(net, x, y, mark)
    parts = [torch.nn.functional.cross_entropy(net(x[s]), y[s]) for s in (slice(0, 32), slice(32, None))]
    assert [p.item() for p in inner.parts] == pytest.approx([p.item() for p in parts], rel=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"balance": "sum"}, {"weight": 0.0}, {"history": 0}, {"threshold": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Blind.from_params(bad)
    with pytest.raises(ValueError, match="12x12"):
        Blind().check((3, 8, 8), 10)
    with pytest.raises(ValueError, match="leaves a 64x16 image"):
        Blind().check((3, 64, 16), 10)  # two pixels a cell: six of them from column 12
    with pytest.raises(ValueError, match="two classes"):
        Blind().check((3, 32, 32), 1)
