from __future__ import annotations

import math

import faint_classes
import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.sin_wave import SinWave
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(100, (3, 28, 32))
GEN = torch.Generator()
ALL = torch.ones(100, dtype=torch.bool)


def residual(attack: SinWave, shape: tuple[int, int, int]) -> torch.Tensor:
    trigger = attack.prepare(samples.random_images(2, shape), samples.ctx()).triggers[0]
    grey, zero = torch.full((1, *shape), 0.5), torch.zeros(1).long()
    return (trigger.apply(grey, zero, zero, Role.TEST, GEN) - grey)[0]


@pytest.mark.parametrize(("channels", "delta"), [(1, 0.2), (3, 40 / 255)])
def test_default_amplitude_depends_on_colour(channels: int, delta: float) -> None:
    r = residual(SinWave(), (channels, 32, 32))
    columns = delta * torch.sin(2 * math.pi * 6 * torch.arange(32) / 32)
    assert torch.allclose(r, columns.expand(channels, 32, 32), atol=1e-6)
    assert float(residual(SinWave(delta=0.05), (channels, 32, 32)).abs().max()) == pytest.approx(0.05, abs=1e-6)


def test_stripes_may_run_along_either_axis() -> None:
    r = residual(SinWave(stripes="horizontal", frequency=4, delta=0.1), (3, 28, 32))
    lines = 0.1 * torch.sin(2 * math.pi * 4 * torch.arange(28) / 28)
    assert torch.allclose(r, lines[:, None].expand(3, 28, 32), atol=1e-6)


def test_poisoned_rows_are_striped_and_relabelled() -> None:
    c = samples.ctx(3, 8)
    b = SinWave().prepare(TRAIN, c)
    p = SinWave().poison(TRAIN, b, ALL, 0.1, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 10
    assert bool((p.data.labels[dirty] == 8).all())
    assert bool((p.true_labels[dirty] != 8).any())
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    without = SinWave(include_target=False).poison(TRAIN, b, ALL, 1.0, c)
    assert not bool((without.true_labels[without.mark == Mark.DIRTY] == 8).any())


def test_restore_is_exact_and_all_to_all_sends_each_class_to_the_next() -> None:
    b = SinWave(targets="all_to_all", stripes="horizontal").prepare(TRAIN, samples.ctx(0, 4))
    again = SinWave.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert again.info == b.info


@pytest.mark.parametrize("stripes", ["vertical", "horizontal"])
def test_decoy_is_turned_and_of_another_width(stripes: str) -> None:
    attack = SinWave(stripes=stripes)
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    for seed in range(5):
        trigger = attack.decoy(TRAIN, b, samples.ctx(seed, 2)).triggers[0]
        line = trigger.signal.flatten()
        assert trigger.signal.shape == ((1, 28, 1) if stripes == "vertical" else (1, 1, 32))
        assert int(torch.fft.rfft(line).abs().argmax()) != 6
        assert trigger.targets.target(torch.arange(10)).tolist() == [6] * 10


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"delta": -0.1}, {"delta": 1.1}, {"frequency": 0}, {"stripes": "diagonal"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SinWave.from_params(bad)
    with pytest.raises(ValueError, match="below 6 fits"):
        SinWave().check((3, 32, 12), 10)
    SinWave(stripes="horizontal").check((3, 32, 12), 10)
    with pytest.raises(ValueError, match="for the placebo"):
        SinWave().check((3, 4, 32), 10)
    with pytest.raises(ValueError, match="below 5 fits"):
        SinWave(stripes="horizontal").check((3, 10, 32), 10)
    with pytest.raises(ValueError, match="two classes"):
        SinWave().check((3, 32, 32), 1)


def test_it_implants() -> None:
    asr, clean = faint_classes.success(SinWave(), 0.1)
    assert asr > 0.9
    assert clean < 0.3
