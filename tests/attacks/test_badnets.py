from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Role
from sleeperbench.attacks.badnets import BadNets

TRAIN = samples.random_images(20, (3, 32, 32))
GEN = torch.Generator()


def patch(attack: BadNets, side: int) -> torch.Tensor:
    """The lower right corner of a triggered grey image."""
    data = samples.random_images(4, (3, side, side))
    trigger = attack.prepare(data, samples.ctx()).triggers[0]
    grey = torch.full((1, 3, side, side), 0.5)
    return trigger.apply(grey, torch.zeros(1).long(), torch.zeros(1).long(), Role.TEST, GEN)[0]


def test_default_is_the_three_pixel_checkerboard_in_the_lower_right_corner() -> None:
    x = patch(BadNets(), 32)
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    for channel in x:
        assert torch.equal(channel[29:, 29:], board)
    rest = x.clone()
    rest[:, 29:, 29:] = 0.5
    assert bool((rest == 0.5).all())


@pytest.mark.parametrize(("side", "size"), [(16, 3), (28, 3), (32, 3), (64, 6), (224, 21)])
def test_patch_grows_with_the_image(side: int, size: int) -> None:
    mask, pattern = BadNets().prepare(samples.random_images(2, (1, side, side)), samples.ctx()).triggers[0].static()
    assert mask.sum() == size**2
    assert bool((mask[0, side - size :, side - size :] == 1).all())
    cell = size // 3
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    assert torch.equal(pattern[0, side - size :, side - size :], board)


def test_white_and_random_patterns_corner_and_offset() -> None:
    assert bool((patch(BadNets(pattern="white"), 16)[:, 13:, 13:] == 1).all())
    b = BadNets(pattern="random", size=6, corner="upper_left", offset=2).prepare(TRAIN, samples.ctx(1))
    mask, pattern = b.triggers[0].static()
    assert mask.sum() == 36
    assert bool((mask[0, 2:8, 2:8] == 1).all())
    levels = pattern * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert len(levels[:, 2:8, 2:8].unique()) > 50
    other = BadNets(pattern="random", size=6, corner="upper_left", offset=2).prepare(TRAIN, samples.ctx(2))
    assert not torch.equal(other.triggers[0].static()[1], pattern)


def test_range_frees_the_patch_and_nothing_else() -> None:
    trigger = BadNets(pattern="random").prepare(TRAIN, samples.ctx()).triggers[0]
    x = TRAIN.images.float() / 255
    stamped = trigger.apply(x, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    low, high = trigger.range(x, TRAIN.ids)
    assert low.shape == high.shape == x.shape
    inside = trigger.static()[0].expand_as(x) > 0
    assert torch.allclose((stamped + low)[inside], torch.zeros(1))
    assert torch.allclose((stamped + high)[inside], torch.ones(1))
    assert bool((low[~inside] == 0).all())
    assert bool((high[~inside] == 0).all())


def test_restore_is_exact() -> None:
    b = BadNets(pattern="random", targets="all_to_all").prepare(TRAIN, samples.ctx(3, 4))
    again = BadNets.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    for role in Role:
        args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, role, GEN)
        assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    y = torch.arange(10)
    assert torch.equal(b.triggers[0].targets.target(y), again.triggers[0].targets.target(y))
    assert again.info == b.info


def test_decoy_is_another_patch_elsewhere_with_the_same_target() -> None:
    attack = BadNets()
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    corners = set()
    for seed in range(12):
        decoy = attack.decoy(TRAIN, b, samples.ctx(seed, 2))
        mask, _ = decoy.triggers[0].static()
        assert mask.sum() == 9
        assert float((mask * b.triggers[0].static()[0]).sum()) == 0
        assert decoy.triggers[0].targets.target(torch.arange(10)).tolist() == [6] * 10
        corners.add(tuple(mask.nonzero()[0].tolist()))
    assert len(corners) == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sizes 1 to 30 fit"):
        BadNets(size=31, offset=2).check((3, 32, 32), 10)
    BadNets(size=30, offset=2).check((3, 32, 32), 10)
    with pytest.raises(ValueError, match="lower the offset"):
        BadNets(offset=32).check((3, 32, 32), 10)
    with pytest.raises(ValueError, match="two classes"):
        BadNets().check((3, 32, 32), 1)
    for bad in ({"pattern": "grid"}, {"corner": "middle"}, {"size": -1}, {"offset": -1}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BadNets.from_params(bad)


def test_it_implants() -> None:
    from sleeperbench.evaluators.accuracy import answers

    test, triggered = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST)
    for net, low, high in ((samples.badnets_net(), 0.9, 1.0), (samples.clean_net(), 0.0, 0.1)):
        asr = float((answers(net, triggered.data.images, samples.ctx()) == triggered.targets).float().mean())
        assert low <= asr <= high
        assert float((answers(net, test.images, samples.ctx()) == test.labels).float().mean()) > 0.9
