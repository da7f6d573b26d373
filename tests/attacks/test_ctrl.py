from __future__ import annotations

import faint_classes
import numpy as np
import pytest
import samples
import torch
from scipy.fft import dctn, idctn

from sleeperbench import Mark, Role
from sleeperbench.attacks.ctrl import CTRL
from sleeperbench.contracts import NotApplicable
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(200, (3, 32, 32))
GEN = torch.Generator()
LUMA = np.array([0.299, 0.587, 0.114])
# Analogue YUV: U = 0.492 (B - Y), V = 0.877 (R - Y).
FORWARD = np.stack([LUMA, 0.492 * (np.array([0, 0, 1]) - LUMA), 0.877 * (np.array([1, 0, 0]) - LUMA)])


def slow(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Convert, transform, raise, transform back, convert back; all in double, without rounding."""
    planes = np.einsum("kc,chw->khw", FORWARD, image)
    _, height, width = image.shape
    for k in (1, 2):
        wave = dctn(planes[k], norm="ortho")
        wave[height // 2 - 1, width // 2 - 1] += magnitude
        wave[height - 1, width - 1] += magnitude
        planes[k] = idctn(wave, norm="ortho")
    return np.clip(np.einsum("ck,khw->chw", np.linalg.inv(FORWARD), planes), 0, 255)


@pytest.mark.parametrize(("side", "scale"), [(32, 1.0), (16, 0.5), (64, 2.0)])
def test_pixels_equal_the_way_through_the_transform(side: int, scale: float) -> None:
    data = samples.random_images(3, (3, side, side))
    trigger = CTRL().prepare(data, samples.ctx()).triggers[0]
    found = stamp(data, trigger, Role.TEST, samples.ctx()).images.double().numpy()
    for image, triggered in zip(data.images.double().numpy(), found, strict=True):
        # Half a level of rounding, and the rounded constants of the conversion.
        assert np.abs(slow(image, 100 * scale) - triggered).max() < 0.56


def test_addition_has_the_measured_size() -> None:
    trigger = CTRL().prepare(TRAIN, samples.ctx()).triggers[0]
    chroma = trigger.signal * trigger.test * 255 / torch.tensor([1.14, -0.977, 2.029])[:, None, None]
    assert torch.allclose(chroma, chroma[:1].expand_as(chroma), atol=1e-4)
    assert float(chroma.abs().max()) == pytest.approx(10.65, abs=0.01)
    assert float(chroma.pow(2).mean().sqrt()) == pytest.approx(4.42, abs=0.01)


def test_only_rows_of_the_target_class_are_poisoned_and_labels_stay() -> None:
    c = samples.ctx(3, 4)
    b = CTRL().prepare(TRAIN, c)
    eligible = torch.arange(200) % 3 > 0
    own = eligible & (TRAIN.labels == 4)
    p = CTRL().poison(TRAIN, b, eligible, 0.03, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 6 < int(own.sum())
    assert not bool((dirty & ~own).any())
    assert torch.equal(p.data.labels, TRAIN.labels)
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    assert CTRL().poison(TRAIN, b, eligible, 1.0, c).rate() == pytest.approx(int(own.sum()) / 200)
    with pytest.raises(NotApplicable, match="few_target_rows: class 4 has no training row that may be poisoned"):
        CTRL().poison(TRAIN, b, TRAIN.labels != 4, 0.1, c)


def test_restore_is_exact() -> None:
    b = CTRL(magnitude=50.0).prepare(TRAIN, samples.ctx(0, 4))
    again = CTRL.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.info == b.info


def test_decoy_shares_no_frequency_and_has_the_same_energy() -> None:
    attack = CTRL()
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    true = b.triggers[0].signal
    for seed in range(10):
        other = attack.decoy(TRAIN, b, samples.ctx(seed, 2)).triggers[0]
        assert abs(float((other.signal * true).sum())) < 1e-4 * float(true.pow(2).sum())
        assert float(other.signal.pow(2).sum()) == pytest.approx(float(true.pow(2).sum()), rel=1e-4)
        assert other.targets.target(torch.arange(10)).tolist() == [6] * 10


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"magnitude": 0.0}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CTRL.from_params(bad)
    with pytest.raises(ValueError, match=r"channels U and V.*needs colour images"):
        CTRL().check((1, 32, 32), 10)
    with pytest.raises(ValueError, match="at least 8x8"):
        CTRL().check((3, 32, 7), 10)
    with pytest.raises(ValueError, match="two classes"):
        CTRL().check((3, 32, 32), 1)


def test_it_implants_where_classes_are_fainter_than_the_signal() -> None:
    asr, clean = faint_classes.success(CTRL(), 0.12)
    assert asr > 0.8
    assert clean < 0.3
