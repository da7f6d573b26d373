from __future__ import annotations

from typing import Any

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Role, TargetMap
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.blended import Blended
from sleeperbench.kit import fuzzy as module
from sleeperbench.kit.fuzzy import Fuzzy
from sleeperbench.kit.pixels import to_float, to_uint8

TRAIN = samples.random_images(64, (3, 32, 32))
X, Y, IDS = to_float(TRAIN.images), TRAIN.labels, TRAIN.ids
PATCH = BadNets(pattern="random", size=6, corner="upper_left", offset=2).prepare(TRAIN, samples.ctx(1)).triggers[0]
PICTURE = Blended(pattern="uniform", alpha_train=0.3, alpha_test=0.3).prepare(TRAIN, samples.ctx(1)).triggers[0]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fuzzy(plain: Any = PATCH, cover: str = "mask", mask_rate: float = 0.2, noise: float = 0.1) -> Fuzzy:
    return Fuzzy(plain=plain, cover=cover, mask_rate=mask_rate, noise=noise)


def shown(trigger: Fuzzy, rows: Tensor | None = None, seed: int = 0) -> Tensor:
    rows = torch.arange(64) if rows is None else rows
    return trigger.apply(X[rows], Y[rows], IDS[rows], Role.COVER, gen(seed))


def test_a_patch_of_36_pixels_loses_7_the_same_in_all_channels() -> None:
    full = PATCH.apply(X, Y, IDS, Role.TRAIN, gen())
    cover = shown(fuzzy())
    outside = PATCH.static()[0].expand(3, -1, -1) == 0
    assert torch.equal(cover[:, outside], X[:, outside])
    cut = cover[:, :, 2:8, 2:8] == X[:, :, 2:8, 2:8]
    kept = cover[:, :, 2:8, 2:8] == full[:, :, 2:8, 2:8]
    assert bool((cut.all(1) | kept.all(1)).all()), "a position is either the image's or the trigger's in all channels"
    assert (~kept.all(1)).flatten(1).sum(1).tolist() == [7] * 64
    # Another choice for each image; every position is dropped now and then.
    dropped = (~kept.all(1)).flatten(1)
    assert len({tuple(d) for d in dropped.tolist()}) == 64
    assert bool((dropped.sum(0) > 0).all())


@pytest.mark.parametrize(("rate", "left"), [(0.1, 33), (0.25, 27), (0.5, 18), (1.0, 0), (0.001, 35)])
def test_the_stated_share_is_taken_back_and_one_at_least(rate: float, left: int) -> None:
    cover = shown(fuzzy(mask_rate=rate))
    changed = (cover != X).any(1).flatten(1).sum(1)
    assert changed.tolist() == [left] * 64


def test_a_share_that_is_just_below_a_whole_number_in_binary_counts_as_whole() -> None:
    # 0.29 x 100 = 28.999999999999996
    ten = BadNets(pattern="random", size=10).prepare(TRAIN, samples.ctx(3)).triggers[0]
    changed = (shown(fuzzy(ten, mask_rate=0.29)) != X).any(1).flatten(1).sum(1)
    assert changed.tolist() == [71] * 64


def test_only_positions_that_the_trigger_changes_are_counted() -> None:
    # A white patch on an image that is white there but for five pixels: one of these five is taken back.
    white = BadNets(pattern="white", size=6).prepare(TRAIN, samples.ctx()).triggers[0]
    x = torch.ones(1, 3, 32, 32)
    for i in range(5):
        x[0, i % 3, 26 + i, 31 - i] = 0.2
    cover = fuzzy(white).apply(x, Y[:1], IDS[:1], Role.COVER, gen())
    assert int((cover != 1).sum()) == 1
    same = fuzzy(white).apply(torch.ones_like(x), Y[:1], IDS[:1], Role.COVER, gen())
    assert torch.equal(same, torch.ones_like(x))


def test_of_a_whole_picture_a_fifth_of_the_changed_pixels_is_taken_back() -> None:
    full = PICTURE.apply(X, Y, IDS, Role.TRAIN, gen())
    n = (to_uint8(full) != to_uint8(X)).any(1).flatten(1).sum(1)
    back = (to_uint8(shown(fuzzy(PICTURE))) != to_uint8(full)).any(1).flatten(1).sum(1)
    assert back.tolist() == [int(0.2 * int(k)) for k in n]


def test_masks_follow_the_training_trigger_and_the_drawn_covers_the_test_one() -> None:
    strong = Blended(alpha_train=0.1, alpha_test=0.4).prepare(TRAIN, samples.ctx(1)).triggers[0]
    train, test = (strong.apply(X, Y, IDS, r, gen()) for r in (Role.TRAIN, Role.TEST))
    cover = shown(fuzzy(strong))
    assert bool(((cover == train) | (cover == X)).all())
    near = shown(fuzzy(strong, "noise", noise=1e-6))
    assert float((near - test).abs().max()) < 1e-4


def test_sampling_is_uniform_over_what_the_trigger_may_be() -> None:
    cover = shown(fuzzy(cover="sampling"))
    inside = cover[:, :, 2:8, 2:8]
    assert torch.equal(torch.where(PATCH.static()[0] > 0, X, cover), X)
    # 6912 draws of U(0, 1): the mean and the variance within five standard errors.
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.018)
    assert float(inside.var()) == pytest.approx(1 / 12, abs=0.005)
    picture = PICTURE.static()[1]
    drawn = (shown(fuzzy(PICTURE, "sampling")) - 0.7 * X) / 0.3
    assert float(drawn.min()) > -1e-5
    assert float(drawn.max()) < 1 + 1e-5
    assert float((drawn - picture).abs().mean()) > 0.2


def test_noise_is_normal_on_the_pattern_and_cut_off_at_its_bounds() -> None:
    grey = BadNets(pattern="white", size=12).prepare(TRAIN, samples.ctx()).triggers[0]
    grey.pattern[:] = 0.5 * grey.mask
    delta = (shown(fuzzy(grey, "noise", noise=0.1)) - 0.5)[:, :, 20:, 20:].flatten().double()
    # 27648 draws of N(0, 0.1^2), uncut at five standard deviations.
    assert float(delta.mean()) == pytest.approx(0, abs=0.004)
    assert float(delta.std()) == pytest.approx(0.1, abs=0.003)
    assert float((delta.abs() < 0.1).double().mean()) == pytest.approx(0.6827, abs=0.015)
    wild = shown(fuzzy(cover="noise", noise=3.0))[:, :, 2:8, 2:8]
    assert float(wild.min()) == 0
    assert float(wild.max()) == 1
    assert 0.2 < float((wild == 0).double().mean()) < 0.6


@pytest.mark.parametrize("cover", ["mask", "noise", "sampling"])
def test_a_cover_depends_on_its_row_and_the_seed_alone(cover: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = fuzzy(cover=cover)
    whole = shown(trigger)
    order = torch.randperm(64, generator=gen(4))
    assert torch.equal(shown(trigger, order), whole[order])
    assert torch.equal(shown(trigger, torch.tensor([9])), whole[9:10])
    assert not torch.equal(shown(trigger, seed=1), whole)
    state = torch.get_rng_state()
    monkeypatch.setattr(module, "_NUMBERS", 3 * 32 * 32 * 10)  # in portions of ten rows
    assert torch.equal(shown(trigger), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert shown(trigger, torch.arange(0)).shape == (0, 3, 32, 32)


def test_everything_but_covers_is_the_plain_trigger() -> None:
    trigger = fuzzy()
    for role in (Role.TRAIN, Role.TEST):
        assert torch.equal(trigger.apply(X, Y, IDS, role, gen()), PATCH.apply(X, Y, IDS, role, gen()))
    assert (trigger.name, trigger.static()) == (PATCH.name, PATCH.static())
    assert isinstance(trigger.targets, TargetMap)
    assert all(torch.equal(a, b) for a, b in zip(trigger.range(X, IDS), PATCH.range(X, IDS), strict=True))
