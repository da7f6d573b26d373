from __future__ import annotations

import faint_classes
import numpy as np
import pytest
import samples
import torch
from scipy.fft import dctn, idctn

from sleeperbench import Mark, Role
from sleeperbench.attacks.ftrojan import FTrojan
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(60, (3, 32, 32))
GEN = torch.Generator()
# RGB to Y, Cr, Cb and back, from the standard's luma weights.
LUMA = np.array([0.299, 0.587, 0.114])
FORWARD = np.stack([LUMA, (np.array([1, 0, 0]) - LUMA) / 1.402, (np.array([0, 0, 1]) - LUMA) / 1.772])


def slow(image: np.ndarray, magnitude: float, window: int) -> np.ndarray:
    """Convert, transform tile by tile, raise, transform back, convert back; all in double, without rounding."""
    planes = np.einsum("kc,chw->khw", FORWARD, image)
    for k in (1, 2):
        for top in range(0, image.shape[1], window):
            for left in range(0, image.shape[2], window):
                tile = dctn(planes[k, top : top + window, left : left + window], norm="ortho")
                for place in (window // 2 - 1, window - 1):
                    tile[place, place] += magnitude
                planes[k, top : top + window, left : left + window] = idctn(tile, norm="ortho")
    return np.clip(np.einsum("ck,khw->chw", np.linalg.inv(FORWARD), planes), 0, 255)


@pytest.mark.parametrize(("side", "window", "magnitude"), [(32, 32, 30.0), (64, 32, 30.0), (64, 16, 50.0)])
def test_pixels_equal_the_way_through_the_transform(side: int, window: int, magnitude: float) -> None:
    data = samples.random_images(3, (3, side, side))
    attack = FTrojan(magnitude=magnitude * 32 / window, window=window)
    trigger = attack.prepare(data, samples.ctx()).triggers[0]
    found = stamp(data, trigger, Role.TEST, samples.ctx()).images.double().numpy()
    for image, triggered in zip(data.images.double().numpy(), found, strict=True):
        # Half a level of rounding, and the rounded constants of the conversion.
        assert np.abs(slow(image, magnitude, window) - triggered).max() < 0.52


def test_addition_has_the_measured_size() -> None:
    trigger = FTrojan().prepare(TRAIN, samples.ctx()).triggers[0]
    chroma = trigger.signal * trigger.test * 255 / torch.tensor([1.403, -1.058, 1.773])[:, None, None]
    assert torch.allclose(chroma, chroma[:1].expand_as(chroma), atol=1e-5)
    assert float(chroma.abs().max()) == pytest.approx(3.19, abs=0.01)
    assert float(chroma.pow(2).mean().sqrt()) == pytest.approx(1.33, abs=0.01)


@pytest.mark.parametrize("side", [16, 28, 48, 224])
def test_size_in_grey_levels_is_the_same_at_any_image_size(side: int) -> None:
    trigger = FTrojan().prepare(samples.random_images(1, (3, side, side)), samples.ctx()).triggers[0]
    assert trigger.signal.shape == (3, side, side)
    assert float(trigger.signal.abs().max() * trigger.test * 255) == pytest.approx(5.66, abs=0.06)


def test_grey_images_carry_it_in_their_one_channel() -> None:
    trigger = FTrojan().prepare(samples.random_images(1, (1, 32, 32)), samples.ctx()).triggers[0]
    planes = dctn((trigger.signal[0] * trigger.test * 255).double().numpy(), norm="ortho")
    assert planes[15, 15] == pytest.approx(30, abs=1e-3)
    assert planes[31, 31] == pytest.approx(30, abs=1e-3)
    assert np.abs(planes).sum() == pytest.approx(60, abs=1e-2)


def test_it_survives_rounding_to_eight_bit() -> None:
    grey = samples.images(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8), [0])
    trigger = FTrojan().prepare(grey, samples.ctx()).triggers[0]
    got = stamp(grey, trigger, Role.TEST, samples.ctx()).images[0, 2].double() - 128
    planes = dctn(got.numpy(), norm="ortho")
    assert planes[15, 15] == pytest.approx(30 * 1.773, rel=0.05)
    assert planes[31, 31] == pytest.approx(30 * 1.773, rel=0.05)


def test_poisoned_rows_get_the_signal_and_the_label() -> None:
    c = samples.ctx(3, 8)
    b = FTrojan().prepare(TRAIN, c)
    p = FTrojan().poison(TRAIN, b, torch.arange(60) > 9, 0.1, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 6
    assert not bool(dirty[:10].any())
    assert bool((p.data.labels[dirty] == 8).all())
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    everyone = torch.ones(60, dtype=torch.bool)
    without = FTrojan(include_target=False).poison(TRAIN, b, everyone, 1.0, c)
    assert not bool((without.true_labels[without.mark == Mark.DIRTY] == 8).any())


def test_restore_is_exact() -> None:
    b = FTrojan(targets="all_to_all", magnitude=50.0).prepare(TRAIN, samples.ctx(0, 4))
    again = FTrojan.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert again.info == b.info


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_decoy_shares_no_frequency_and_has_the_same_energy(side: int) -> None:
    data = samples.random_images(2, (3, side, side))
    attack = FTrojan()
    b = attack.prepare(data, samples.ctx(0, 6))
    true = b.triggers[0].signal
    for seed in range(10):
        other = attack.decoy(data, b, samples.ctx(seed, 2)).triggers[0]
        assert abs(float((other.signal * true).sum())) < 1e-4 * float(true.pow(2).sum())
        assert float(other.signal.pow(2).sum()) == pytest.approx(float(true.pow(2).sum()), rel=1e-4)
        assert other.targets.target(torch.arange(10)).tolist() == [6] * 10


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"magnitude": 0.0}, {"window": 7}, {"window": 31}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FTrojan.from_params(bad)
    with pytest.raises(ValueError, match="not in 4"):
        FTrojan().check((4, 32, 32), 10)
    with pytest.raises(ValueError, match="at least 8x8"):
        FTrojan().check((3, 32, 7), 10)
    with pytest.raises(ValueError, match="two classes"):
        FTrojan().check((3, 32, 32), 1)


def test_it_implants_where_classes_are_faint() -> None:
    asr, clean = faint_classes.success(FTrojan(), 0.1)
    assert asr > 0.8
    assert clean < 0.3
