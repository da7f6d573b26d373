from __future__ import annotations

from dataclasses import replace

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Mark, Role, TrainHooks
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.kit.around import Around, CoveredBatches, MarkedBatches
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.classifier import build
from sleeperbench.kit.covers import append
from sleeperbench.kit.fuzzy import Fuzzy
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import poison, stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(64, (3, 16, 16))
ALL = torch.ones(64, dtype=torch.bool)
B = BadNets(pattern="random").prepare(TRAIN, samples.ctx(1, 3))
FUZZY = Fuzzy(plain=B.triggers[0], cover="mask", mask_rate=0.2, noise=0.1)


class Dirty(TrainHooks):
    """Marks the first `n` rows of a batch, and darkens them."""

    def __init__(self, n: int, augments: bool = False) -> None:
        super().__init__()
        self.n, self.augments = n, augments
        self.asked: list[str] = []

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        mark = torch.zeros_like(y)
        mark[: self.n] = Mark.DIRTY
        x = x.clone()
        x[: self.n] = 0
        return x, y, mark

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.asked.append("step")
        return super().step(net, opt, x, y, mark)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.asked.append("inner")
        return super().loss(net, x, y, mark)

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        return epoch == 1


class Adds(Around):
    def __init__(self, inner: TrainHooks, log: list[str], name: str) -> None:
        super().__init__(inner)
        self.log, self.name = log, name

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.log.append(self.name)
        return 2 * super().loss(net, x, y, mark)


def covered(inner: TrainHooks, rate: float, ratio: float = 1.0, eligible: Tensor = ALL, pad: int = 0) -> CoveredBatches:
    c = samples.ctx(7, 3)
    c.recipe = replace(c.recipe, pad=pad)
    return CoveredBatches(inner, (FUZZY,), TRAIN, eligible, rate, ratio, c)


def batch(h: TrainHooks, step: int = 0, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(64) if rows is None else rows
    h.places = rows
    return h.batch(to_float(TRAIN.images[rows]), TRAIN.labels[rows], TRAIN.ids[rows], step)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_inner_step_asks_for_the_outermost_loss_which_asks_back(precision: str) -> None:
    inner = Dirty(0)
    outer = Adds(Adds(inner, inner.asked, "middle"), inner.asked, "outer")
    net = build(replace(samples.SPEC, shape=(3, 16, 16)), 0)
    recipe = replace(samples.RECIPE, precision=precision, lr=1e-9)
    log = fit(net, TRAIN, recipe, samples.ctx(), hooks=outer, steps=1)
    assert inner.asked == ["step", "outer", "middle", "inner"]
    plain = fit(build(replace(samples.SPEC, shape=(3, 16, 16)), 0), TRAIN, recipe, samples.ctx(), steps=1)
    assert log.losses[0] == pytest.approx(4 * plain.losses[0], rel=1e-4)
    if precision == "bf16":
        exact = fit(build(net.spec, 0), TRAIN, replace(recipe, precision="fp32"), samples.ctx(), steps=1)
        assert plain.losses != exact.losses, "autocast has no effect here, so the comparison says nothing"


def test_networks_views_and_the_end_of_training_are_the_inner_ones() -> None:
    inner = Dirty(0, augments=True)
    outer = Around(Around(inner))
    inner.aux["late"] = nn.Linear(1, 1)
    assert outer.aux is inner.aux
    assert outer.augments
    log = fit(build(replace(samples.SPEC, shape=(3, 16, 16)), 0), TRAIN, samples.RECIPE, samples.ctx(), hooks=outer)
    assert len(log.losses) == 2


def test_marks_of_a_poisoned_set_reach_its_batches() -> None:
    p = poison(TRAIN, B, ALL, 0.25, samples.ctx(1), include_target=True)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:20]
    h = MarkedBatches(TrainHooks(), p, torch.device("cpu"))
    assert torch.equal(batch(h, rows=rows)[2], p.mark[rows])
    own = batch(MarkedBatches(Dirty(3), p, torch.device("cpu")), rows=rows)[2]
    assert own[:3].tolist() == [Mark.DIRTY] * 3
    assert torch.equal(own[3:], p.mark[rows][3:])


def test_marks_tell_copies_from_the_rows_they_stand_beside() -> None:
    p = append(poison(TRAIN, B, ALL, 0.25, samples.ctx(1), include_target=True), TRAIN)
    h = MarkedBatches(Around(TrainHooks()), p, torch.device("cpu"))
    seen: list[Tensor] = []

    class Sees(Around):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
            assert self.places is not None
            assert torch.equal(y, p.data.labels[self.places])
            assert torch.equal(mark, p.mark[self.places])
            seen.append(mark)
            return super().loss(net, x, y, mark)

    net = build(replace(samples.SPEC, shape=(3, 16, 16)), 0)
    fit(net, p.data, replace(samples.RECIPE, batch=20), samples.ctx(), hooks=Sees(h), steps=4)
    assert int((torch.cat(seen) == Mark.DIRTY).sum()) == 16
    assert len(p.data.ids.unique()) == 64 < len(p.data)


def test_covers_stand_before_the_copies_that_an_attack_adds() -> None:
    class Copies(TrainHooks):
        def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            mark = torch.cat([torch.zeros_like(y), torch.full_like(y, Mark.DIRTY)])
            return torch.cat([x, 1 - x]), torch.cat([y, y + 1]), mark

    h = covered(Copies(), 0.125)
    x, y, mark = batch(h)
    assert mark.tolist() == [Mark.COVER] * 8 + [Mark.CLEAN] * 56 + [Mark.DIRTY] * 64
    assert torch.equal(y, torch.cat([TRAIN.labels, TRAIN.labels + 1]))
    plain = to_float(TRAIN.images)
    assert torch.equal(x[8:], torch.cat([plain[8:], 1 - plain]))
    shown = FUZZY.apply(plain, TRAIN.labels, TRAIN.ids, Role.COVER, h.ctx.generator("covers"))
    assert torch.equal(x[:8], shown[:8])


def test_covers_take_the_place_of_clean_rows() -> None:
    h = covered(Dirty(8), 0.125)
    x, y, mark = batch(h)
    assert mark.tolist() == [Mark.DIRTY] * 8 + [Mark.COVER] * 8 + [Mark.CLEAN] * 48
    assert bool((x[:8] == 0).all())
    shown = FUZZY.apply(to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, Role.COVER, h.ctx.generator("covers"))
    assert torch.equal(x[8:16], shown[8:16])
    assert torch.equal(x[16:], to_float(TRAIN.images[16:]))
    assert torch.equal(y, TRAIN.labels)
    full = to_float(stamp(TRAIN, B.triggers[0], Role.TRAIN, h.ctx).images)
    assert bool((x[8:16] != full[8:16]).flatten(1).any(1).all())
    # Drawn once per image: a row has the same gap in every step.
    rows = torch.cat([torch.arange(20, 28), torch.arange(8, 16)])
    assert torch.equal(batch(h, 9, rows)[0][8:10], x[8:10])


@pytest.mark.parametrize(("rate", "size", "ratio"), [(0.1, 64, 1.0), (0.02, 20, 1.0), (0.05, 40, 2.0)])
def test_covers_add_up_to_the_rate(rate: float, size: int, ratio: float) -> None:
    h = covered(Dirty(0), rate, ratio)
    total = 0
    for step in range(50):
        total += int((batch(h, step, torch.arange(size))[2] == Mark.COVER).sum())
    assert total == round(50 * rate * size * ratio)


def test_covers_spare_ineligible_and_poisoned_rows() -> None:
    eligible = torch.arange(64) % 4 == 0
    x, _, mark = batch(covered(Dirty(30), 0.25, eligible=eligible))
    free = eligible & (torch.arange(64) >= 30)
    assert torch.equal(mark == Mark.COVER, free), "16 are wanted, 8 are free"
    assert torch.equal(x[30:][~free[30:]], to_float(TRAIN.images[30:][~free[30:]]))


def test_covers_are_cropped_where_the_hooks_crop() -> None:
    h = covered(Dirty(8, augments=True), 0.125, pad=3)
    found = batch(h, 2)[0][8:16]
    c = h.ctx
    gen = c.generator("covers")
    x, rows = to_float(TRAIN.images[8:16]), torch.arange(8, 16)
    shown = (FUZZY.apply(x, TRAIN.labels[rows], TRAIN.ids[rows], Role.COVER, gen) * 255).round().to(torch.uint8)
    assert torch.equal(found, to_float(crop_flip(shown, 3, False, c.generator("cover views", 2))))
    assert not torch.equal(found, to_float(shown))


def test_gradients_run_through_the_other_rows_and_not_through_covers() -> None:
    class Learns(Dirty):
        def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            x, y, mark = super().batch(x, y, ids, step)
            return x * weight, y, mark

    weight = torch.ones(64, 1, 1, 1, requires_grad=True)
    x, _, mark = batch(covered(Learns(8), 0.125))
    x.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.flatten() == 0, mark != Mark.CLEAN)


def test_hooks_that_drop_rows_are_refused() -> None:
    class Halves(TrainHooks):
        def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            return x[::2], y[::2], y[::2]

    with pytest.raises(ValueError, match="64 rows became 32"):
        batch(covered(Halves(), 0.1))
