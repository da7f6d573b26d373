from __future__ import annotations

import numpy as np
import pytest
import samples
import torch

from sleeperbench import Role
from sleeperbench.attacks.blended import Blended
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(30, (3, 32, 32))
GEN = torch.Generator()
PATTERNS = ("gauss", "uniform", "shapes")


def picture(pattern: str, side: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    data = samples.random_images(2, (channels, side, side))
    return Blended(pattern=pattern).prepare(data, samples.ctx(seed)).triggers[0].static()[1]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("role", "alpha"), [(Role.TRAIN, 0.1), (Role.TEST, 0.2)])
def test_pixels_are_the_rounded_blend(pattern: str, role: Role, alpha: float) -> None:
    trigger = Blended(pattern=pattern).prepare(TRAIN, samples.ctx()).triggers[0]
    k = trigger.static()[1].double().numpy() * 255
    exact = (1 - alpha) * TRAIN.images.double().numpy() + alpha * k
    found = stamp(TRAIN, trigger, role, samples.ctx()).images.numpy()
    # Rounded to nearest: never further than half a level (float32 may tip an exact half).
    assert np.abs(found - exact).max() <= 0.5 + 1e-3


def test_noise_has_the_stated_moments() -> None:
    gauss, uniform = picture("gauss", 64), picture("uniform", 64)
    # Clipping at two deviations leaves a deviation of 0.2397: E[min(|z|, 2)^2] = 0.9205.
    assert float(gauss.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(gauss.std()) == pytest.approx(0.25 * 0.9205**0.5, abs=0.006)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.std()) == pytest.approx(1 / 12**0.5, abs=0.006)


@pytest.mark.parametrize(("side", "std"), [(32, (0.248, 0.291, 0.265)), (64, (0.312, 0.340, 0.321))])
def test_shapes_resemble_the_picture_they_stand_for(side: int, std: tuple[float, ...]) -> None:
    for seed in range(5):
        k = picture("shapes", side, seed=seed)
        assert k.mean((1, 2)).tolist() == pytest.approx((0.812, 0.747, 0.776), abs=0.03)
        assert k.std((1, 2)).tolist() == pytest.approx(std, abs=0.02)
        assert float((k.amin(0) > 0.95).float().mean()) > 0.4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pictures_are_eight_bit_and_depend_on_the_seed(pattern: str) -> None:
    for channels in (1, 3):
        k = picture(pattern, 28, channels)
        assert k.shape == (channels, 28, 28)
        assert torch.allclose(k * 255, (k * 255).round(), atol=1e-4)
        assert torch.equal(k, picture(pattern, 28, channels))
        assert not torch.equal(k, picture(pattern, 28, channels, seed=1))


def test_range_reaches_every_picture_at_the_test_alpha() -> None:
    trigger = Blended().prepare(TRAIN, samples.ctx()).triggers[0]
    x = TRAIN.images.float() / 255
    stamped = trigger.apply(x, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    low, high = trigger.range(x, TRAIN.ids)
    assert torch.allclose(stamped + low, 0.8 * x, atol=1e-6)
    assert torch.allclose(stamped + high, 0.8 * x + 0.2, atol=1e-6)


def test_restore_is_exact() -> None:
    b = Blended(pattern="uniform", alpha_train=0.3, alpha_test=0.15).prepare(TRAIN, samples.ctx(3, 4))
    again = Blended.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    for role in Role:
        args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, role, GEN)
        assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [4] * 10


def test_decoy_is_another_picture_with_the_same_target() -> None:
    attack = Blended()
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    decoy = attack.decoy(TRAIN, b, samples.ctx(1, 2))
    assert not torch.equal(decoy.triggers[0].static()[1], b.triggers[0].static()[1])
    assert decoy.triggers[0].targets.target(torch.arange(10)).tolist() == [6] * 10


def test_parameters_out_of_range_are_refused() -> None:
    for bad in ({"alpha_train": 0.0}, {"alpha_test": 1.2}, {"pattern": "cat"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Blended.from_params(bad)
    with pytest.raises(ValueError, match="two classes"):
        Blended().check((3, 32, 32), 1)
