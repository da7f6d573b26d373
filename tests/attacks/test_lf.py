from __future__ import annotations

import faint_classes
import numpy as np
import pytest
import samples
import torch
from scipy.fft import dctn

from sleeperbench import Mark, Role
from sleeperbench.attacks.lf import LF
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(60, (3, 32, 32))
GEN = torch.Generator()


def signal(side: int = 32, channels: int = 3, amplitude: float = 0.2) -> np.ndarray:
    """What the trigger adds to a black image, in grey levels."""
    data = samples.random_images(2, (channels, side, side))
    trigger = LF(amplitude=amplitude).prepare(data, samples.ctx()).triggers[0]
    zero = torch.zeros(1).long()
    return trigger.apply(torch.zeros(1, channels, side, side), zero, zero, Role.TEST, GEN)[0].double().numpy() * 255


def test_at_32_pixels_it_is_the_fitted_bump() -> None:
    v = signal()
    for i, j in ((0, 0), (13, 14), (31, 0), (31, 31), (5, 20)):
        g = np.exp(-((i - 13.5) ** 2 + (j - 13.5) ** 2) / (2 * 11.5**2))
        exact = (max(0, 19.6 * g - 1.0), 0, max(0, 53.2 * g - 2.1))
        # The amplitude of 0.2 is 51 levels, the fit's peak 51.1.
        assert v[:, i, j] == pytest.approx(np.array(exact) * 51 / 51.1, abs=1e-4)
    # The published pattern is red 1..18, green 0, blue 4..51.
    assert np.round(v.max((1, 2))).tolist() == [19, 0, 51]
    assert np.round(v.min((1, 2))).tolist() == [1, 0, 3]


@pytest.mark.parametrize("side", [16, 28, 32, 64])
def test_energy_lies_in_the_lowest_frequencies_at_any_size(side: int) -> None:
    v = signal(side)
    energy = dctn(v, axes=(1, 2), norm="ortho") ** 2
    assert energy[:, 0, 0].sum() / energy.sum() == pytest.approx(0.84, abs=0.02)
    assert energy[:, :4, :4].sum() / energy.sum() > 0.993
    assert v.max() == pytest.approx(51, abs=0.5)


def test_grey_images_get_the_blue_bump() -> None:
    assert signal(28, 1)[0] == pytest.approx(signal(28)[2])


def test_amplitude_scales_it_and_bright_pixels_are_clipped() -> None:
    assert signal(amplitude=0.1) == pytest.approx(signal() / 2, abs=1e-4)
    trigger = LF().prepare(TRAIN, samples.ctx()).triggers[0]
    white = torch.ones(1, 3, 32, 32)
    assert torch.equal(trigger.apply(white, TRAIN.labels[:1], TRAIN.ids[:1], Role.TEST, GEN), white)


def test_poisoned_rows_get_the_bump_and_the_label() -> None:
    c = samples.ctx(3, 8)
    b = LF().prepare(TRAIN, c)
    p = LF().poison(TRAIN, b, torch.arange(60) > 9, 0.1, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 6
    assert not bool(dirty[:10].any())
    assert bool((p.data.labels[dirty] == 8).all())
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    everyone = torch.ones(60, dtype=torch.bool)
    without = LF(include_target=False).poison(TRAIN, b, everyone, 1.0, c)
    assert not bool((without.true_labels[without.mark == Mark.DIRTY] == 8).any())


def test_restore_is_exact() -> None:
    b = LF(targets="all_to_all", amplitude=0.15).prepare(TRAIN, samples.ctx(0, 4))
    again = LF.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert again.info == b.info


@pytest.mark.parametrize("channels", [1, 3])
def test_decoy_peaks_in_a_corner_with_other_colours(channels: int) -> None:
    data = samples.random_images(2, (channels, 32, 32))
    attack = LF()
    b = attack.prepare(data, samples.ctx(0, 6))
    true, places = b.triggers[0].signal, set()
    for seed in range(25):
        trigger = attack.decoy(data, b, samples.ctx(seed, 2)).triggers[0]
        i, j = divmod(int(trigger.signal.amax(0).argmax()), 32)
        places.add((i, j))
        if channels == 3:
            assert int(trigger.signal.amax((1, 2)).argmax()) != int(true.amax((1, 2)).argmax())
        assert trigger.targets.target(torch.arange(10)).tolist() == [6] * 10
    assert places == {(0, 0), (0, 31), (31, 0), (31, 31)}


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"amplitude": 0.0}, {"amplitude": 1.5}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LF.from_params(bad)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        LF().check((4, 32, 32), 10)
    with pytest.raises(ValueError, match="two classes"):
        LF().check((3, 32, 32), 1)


def test_it_implants() -> None:
    asr, clean = faint_classes.success(LF(), 0.1)
    assert asr > 0.9
    assert clean < 0.3
