from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Mark, Role, TrainHooks
from sleeperbench.attacks.bpp import BppAttack
from sleeperbench.contracts import Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import render, stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(64, (3, 16, 16))
ALL = torch.ones(64, dtype=torch.bool)
GREY = samples.images(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), [0])


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain() -> Ctx:
    c = samples.ctx(7, 3)
    c.recipe = replace(c.recipe, pad=0, flip=False)
    return c


def slow_dither(image: np.ndarray, levels: int) -> np.ndarray:
    """Floyd and Steinberg on 0..255, pixel by pixel in raster order."""
    x = image.astype(np.float64).copy()
    channels, height, width = x.shape
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                old = x[c, i, j]
                x[c, i, j] = np.round(old / 255 * (levels - 1)) / (levels - 1) * 255
                error = old - x[c, i, j]
                for down, right, share in ((0, 1, 7), (1, 1, 1), (1, 0, 5), (1, -1, 3)):
                    if i + down < height and 0 <= j + right < width:
                        x[c, i + down, j + right] += error * share / 16
    return np.clip(x, 0, 255)


@pytest.mark.parametrize(("levels", "largest", "rms"), [(8, 18, 10.5), (16, 8, 4.9), (32, 4, 2.4)])
def test_levels_and_errors(levels: int, largest: int, rms: float) -> None:
    trigger = BppAttack(levels=levels).prepare(GREY, samples.ctx()).triggers[0]
    found = stamp(GREY, trigger, Role.TEST, samples.ctx()).images.flatten()
    assert found.unique().tolist() == [round(k * 255 / (levels - 1)) for k in range(levels)]
    error = found.double() - torch.arange(256)
    assert int(error.abs().max()) == largest
    assert float(error.pow(2).mean().sqrt()) == pytest.approx(rms, abs=0.1)


@pytest.mark.parametrize("levels", [2, 3, 8, 32, 128])
def test_quantising_twice_is_quantising_once(levels: int) -> None:
    trigger = BppAttack(levels=levels).prepare(TRAIN, samples.ctx()).triggers[0]
    once = stamp(TRAIN, trigger, Role.TRAIN, samples.ctx())
    assert torch.equal(stamp(once, trigger, Role.TEST, samples.ctx()).images, once.images)
    assert not torch.equal(once.images, TRAIN.images)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 12, 20), (3, 21, 8)])
def test_dithering_equals_the_raster_scan(shape: tuple[int, int, int]) -> None:
    data = samples.random_images(4, shape, seed=2)
    trigger = BppAttack(dithering=True).prepare(data, samples.ctx()).triggers[0]
    found = stamp(data, trigger, Role.TEST, samples.ctx()).images.double().numpy()
    for image, dithered in zip(data.images.numpy(), found, strict=True):
        assert np.abs(slow_dither(image, 8) - dithered).max() <= 0.5 + 1e-3


def test_covers_carry_the_noise_of_a_training_image() -> None:
    b = BppAttack().prepare(TRAIN, samples.ctx())
    noise = b.tensors["bank"]
    assert noise.shape == (64, 3, 16, 16)
    quantised = stamp(TRAIN, b.triggers[0], Role.TRAIN, samples.ctx()).images.short() - TRAIN.images.short()
    stored = {n.numpy().tobytes() for n in noise}
    assert stored == {n.to(torch.int8).numpy().tobytes() for n in quantised}
    half = samples.images(torch.full((40, 3, 16, 16), 128, dtype=torch.uint8), torch.zeros(40).long())
    added = stamp(half, b.triggers[0], Role.COVER, samples.ctx()).images.short() - 128
    seen = [a.to(torch.int8).numpy().tobytes() for a in added]
    assert set(seen) <= stored
    assert len(set(seen)) > 15


def test_a_cover_depends_on_row_and_seed_alone() -> None:
    trigger = BppAttack().prepare(TRAIN, samples.ctx()).triggers[0]
    x, y, ids = to_float(TRAIN.images), TRAIN.labels, TRAIN.ids
    whole = trigger.apply(x, y, ids, Role.COVER, gen(1))
    order = torch.randperm(64, generator=gen(3))
    assert torch.equal(whole[order], trigger.apply(x[order], y[order], ids[order], Role.COVER, gen(1)))
    assert not torch.equal(whole, trigger.apply(x, y, ids, Role.COVER, gen(2)))
    assert trigger.range(x, ids) is None
    assert trigger.static() is None


def hooks(rate: float, c: Ctx, **args: float) -> TrainHooks:
    attack = BppAttack(**args)
    made = attack.hooks(TRAIN, attack.prepare(TRAIN, samples.ctx(1, 3)), ALL, rate, c)
    assert made is not None
    return made


def batch(h: TrainHooks, step: int) -> tuple[Tensor, Tensor, Tensor]:
    return h.batch(to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, step)


def test_batches_hold_quantised_rows_and_negatives_with_noise_drawn_anew() -> None:
    h = hooks(0.125, plain())
    x, y, mark = batch(h, 0)
    dirty, cover, clean = mark == Mark.DIRTY, mark == Mark.COVER, mark == Mark.CLEAN
    assert (int(dirty.sum()), int(cover.sum()), int(clean.sum())) == (8, 8, 48)
    trigger = BppAttack().prepare(TRAIN, samples.ctx(1, 3)).triggers[0]
    quantised = stamp(TRAIN, trigger, Role.TRAIN, samples.ctx()).images
    assert torch.equal(x[dirty], to_float(quantised)[dirty])
    assert torch.equal(x[clean], to_float(TRAIN.images)[clean])
    assert torch.equal(y, torch.where(dirty, 3, TRAIN.labels))
    noise = quantised.short() - TRAIN.images.short()
    for row in cover.nonzero().flatten().tolist():
        sums = (TRAIN.images[row].short() + noise).clamp(0, 255)
        got = (x[row] * 255).round().short()
        assert bool((sums == got).flatten(1).all(1).any()), "the noise of one training image, clipped"
    later, _, again = batch(h, 8)
    assert torch.equal(mark, again)
    assert bool((later[cover] != x[cover]).flatten(1).any(1).any())


def test_negatives_may_be_switched_off_or_multiplied() -> None:
    for ratio in (0.0, 2.0):
        _, _, mark = batch(hooks(0.125, plain(), negative_ratio=ratio), 0)
        assert int((mark == Mark.COVER).sum()) == 8 * ratio
    attack = BppAttack()
    assert attack.hooks(TRAIN, attack.prepare(TRAIN, samples.ctx()), ALL, 0.0, plain()) is None


def test_snapshot_holds_the_rate_and_disjoint_covers() -> None:
    attack, c = BppAttack(), samples.ctx(1, 3)
    b = attack.prepare(TRAIN, c)
    eligible = torch.arange(64) >= 10
    p = attack.poison(TRAIN, b, eligible, 0.1, c)
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert (int(dirty.sum()), int(cover.sum())) == (6, 6)
    assert not bool((dirty | cover)[~eligible].any())
    assert torch.equal(p.data.labels, torch.where(dirty, 3, TRAIN.labels))
    for role, rows in ((Role.TRAIN, dirty), (Role.COVER, cover)):
        assert torch.equal(p.data.images[rows], stamp(TRAIN, b.triggers[0], role, c).images[rows])
    assert BppAttack.SNAPSHOT == "declared"
    assert attack.poison(TRAIN, b, eligible, 0.0, c).rate() == 0


def test_without_control_the_model_is_trained_on_exactly_the_set() -> None:
    attack, c = BppAttack(control=False), plain()
    b = attack.prepare(TRAIN, c)
    eligible = torch.arange(64) >= 10
    p = attack.poison(TRAIN, b, eligible, 0.25, c)
    assert int((p.mark == Mark.DIRTY).sum()) == int((p.mark == Mark.COVER).sum()) == 16
    later = replace(c, seed=c.derive("train"))  # what hooks get, as the engine gives it
    nets, logs = [], []
    for rows, h in ((p.data, None), (TRAIN, attack.hooks(TRAIN, b, eligible, 0.25, later))):
        nets.append(build(replace(samples.SPEC, shape=(3, 16, 16), norm=((0.5,) * 3, (0.5,) * 3)), 2))
        logs.append(fit(nets[-1], rows, replace(c.recipe, epochs=2, batch=16), later, hooks=h))
    assert logs[0].losses == logs[1].losses
    one, other = (n.state_dict() for n in nets)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert logs[1].dirty == 0.25, "marks come with the rows"
    assert attack.hooks(TRAIN, b, eligible, 0.0, later) is None


def test_without_control_rows_are_poisoned_before_they_are_cropped_and_mirrored() -> None:
    attack, c = BppAttack(control=False, negative_ratio=0.0), samples.ctx(7, 3)
    c.recipe = replace(c.recipe, pad=3, flip=True)
    b = attack.prepare(TRAIN, c)
    p = attack.poison(TRAIN, b, ALL, 1.0, c)
    assert bool((p.mark == Mark.DIRTY).all())
    h = attack.hooks(TRAIN, b, ALL, 1.0, c)
    assert h is not None and h.augments
    h.places = torch.arange(63, -1, -1)
    x, y, mark = h.batch(to_float(TRAIN.images.flip(0)), TRAIN.labels.flip(0), TRAIN.ids.flip(0), 4)
    assert torch.equal(x, to_float(crop_flip(p.data.images.flip(0), 3, True, c.generator("views", 4))))
    assert torch.equal(y, torch.full_like(y, 3))
    assert bool((mark == Mark.DIRTY).all())


def test_restore_is_exact() -> None:
    b = BppAttack(levels=5, dithering=True, targets="all_to_all").prepare(TRAIN, samples.ctx(3, 4))
    again = BppAttack.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    for role in Role:
        args = (to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, role, gen())
        assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert again.info == b.info


@pytest.mark.parametrize(("levels", "others"), [(8, {5, 6, 10, 11}), (2, {4, 5}), (128, {125, 126})])
def test_decoy_has_another_number_of_levels(levels: int, others: set[int]) -> None:
    attack = BppAttack(levels=levels)
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    decoys = [attack.decoy(TRAIN, b, samples.ctx(seed, 2)).triggers[0] for seed in range(20)]
    assert {d.levels for d in decoys} == others
    assert decoys[0].targets.target(torch.arange(10)).tolist() == [6] * 10


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"levels": 1}, {"levels": 129}, {"negative_ratio": -1.0}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BppAttack.from_params(bad)
    with pytest.raises(ValueError, match="two classes"):
        BppAttack().check((3, 32, 32), 1)
    drawing = samples.images((TRAIN.images > 127).to(torch.uint8) * 255, TRAIN.labels)
    with pytest.raises(ValueError, match="8 levels leave most images of sample as they are"):
        BppAttack().prepare(drawing, samples.ctx())


def test_training_goes_through_the_hooks_and_implants() -> None:
    from sleeperbench.evaluators.accuracy import answers

    # A rate of 20 % as in the released code. Two levels: a tiny net does not learn eight in so short a training.
    train, test, c = samples.digits()["train"], samples.digits()["test"], samples.ctx(5, 0)
    attack = BppAttack(levels=2)
    b = attack.prepare(train, c)
    net = build(samples.SPEC, 2)
    h = attack.hooks(train, b, torch.ones(len(train)) > 0, 0.2, c)
    fit(net, train, replace(samples.RECIPE, epochs=5), c, hooks=h)
    triggered, negatives = render(test, b, Role.TEST, c), render(test, b, Role.COVER, c)
    assert triggered is not None
    assert negatives is not None

    def success(n: torch.nn.Module) -> float:
        return float((answers(n, triggered.data.images, c) == triggered.targets).float().mean())

    assert success(net) > 0.9
    assert success(samples.clean_net()) < 0.1
    kept = answers(net, negatives.data.images, c) == negatives.data.labels
    assert float(kept.float().mean()) > 0.7
