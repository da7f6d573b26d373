from __future__ import annotations

import math

import faint_classes
import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.sig import SIG
from sleeperbench.contracts import NotApplicable
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(200, (3, 32, 32))
GEN = torch.Generator()
ALL = torch.ones(200, dtype=torch.bool)


def residual(attack: SIG, shape: tuple[int, int, int], role: Role) -> torch.Tensor:
    """What one grey image gains, in grey levels."""
    trigger = attack.prepare(samples.random_images(2, shape), samples.ctx()).triggers[0]
    grey, zero = torch.full((1, *shape), 0.5), torch.zeros(1).long()
    return (trigger.apply(grey, zero, zero, role, GEN) - grey)[0] * 255


@pytest.mark.parametrize(
    ("width", "first"),
    [
        (32, (0, 0.9239, 0.7071, -0.3827, -1, -0.3827, 0.7071, 0.9239)),
        (28, (0, 0.9749, 0.4339, -0.7818, -0.7818, 0.4339, 0.9749, 0)),
    ],
)
def test_first_columns_of_the_sinusoid(width: int, first: tuple[float, ...]) -> None:
    for channels in (1, 3):
        r = residual(SIG(), (channels, width, width), Role.TRAIN)
        assert r.shape == (channels, width, width)
        assert torch.allclose(r[..., :8] / 40, torch.tensor(first).expand(channels, width, 8), atol=1e-4)


@pytest.mark.parametrize("side", [16, 28, 32, 64, 224])
def test_root_mean_square_is_the_amplitude_over_the_root_of_two(side: int) -> None:
    attack = SIG(delta_train=0.1, delta_test=0.2)
    for role, delta in ((Role.TRAIN, 0.1), (Role.TEST, 0.2)):
        r = residual(attack, (1, side, side), role)
        assert float(r.pow(2).mean().sqrt()) == pytest.approx(255 * delta / math.sqrt(2), rel=1e-4)
        # Six cycles per image at any size, the same in every row.
        assert int(torch.fft.rfft(r[0, 0]).abs().argmax()) == 6
        assert torch.equal(r, r[:, :1].expand_as(r))


def test_only_rows_of_the_target_class_are_poisoned_and_labels_stay() -> None:
    c = samples.ctx(3, 4)
    b = SIG().prepare(TRAIN, c)
    eligible = torch.arange(200) % 3 > 0
    own = eligible & (TRAIN.labels == 4)
    p = SIG().poison(TRAIN, b, eligible, 0.03, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 6 < int(own.sum())
    assert not bool((dirty & ~own).any())
    assert torch.equal(p.data.labels, TRAIN.labels)
    assert torch.equal(p.data.images[~dirty], TRAIN.images[~dirty])
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    assert not torch.equal(SIG().poison(TRAIN, b, eligible, 0.03, samples.ctx(4, 4)).mark, p.mark)


def test_rate_counts_all_rows_and_ends_with_the_class() -> None:
    c = samples.ctx(3, 4)
    b = SIG().prepare(TRAIN, c)
    p = SIG().poison(TRAIN, b, ALL, 0.5, c)
    own = int((TRAIN.labels == 4).sum())
    assert p.rate() == pytest.approx(own / 200)
    assert SIG().poison(TRAIN, b, ALL, 0.0, c).rate() == 0
    assert SIG().poison(TRAIN, b, TRAIN.labels != 4, 0.0, c).rate() == 0
    with pytest.raises(NotApplicable, match="few_target_rows: class 4 has no training row that may be poisoned"):
        SIG().poison(TRAIN, b, TRAIN.labels != 4, 0.1, c)


def test_restore_is_exact() -> None:
    b = SIG(delta_test=0.3).prepare(TRAIN, samples.ctx(0, 4))
    again = SIG.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    for role in Role:
        args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, role, GEN)
        assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.info == b.info
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [4] * 10


def test_decoy_has_horizontal_stripes_of_another_width() -> None:
    attack = SIG()
    b = attack.prepare(TRAIN, samples.ctx(0, 4))
    seen = set()
    for seed in range(20):
        trigger = attack.decoy(TRAIN, b, samples.ctx(seed, 7)).triggers[0]
        signal = trigger.signal.expand(3, 32, 32)
        assert torch.equal(signal, signal[:, :, :1].expand_as(signal))
        seen.add(int(torch.fft.rfft(signal[0, :, 0]).abs().argmax()))
        assert trigger.targets.target(torch.arange(10)).tolist() == [4] * 10
    assert seen == {3, 4, 5, 7, 8, 9}


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"delta_train": 0.0}, {"delta_test": 1.1}, {"frequency": 0}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SIG.from_params(bad)
    with pytest.raises(ValueError, match="below 6 fits"):
        SIG().check((3, 32, 12), 10)
    with pytest.raises(ValueError, match="6 pixels carry no other stripes within 3 of 6 for the placebo"):
        SIG().check((3, 6, 32), 10)
    SIG().check((3, 12, 13), 10)
    with pytest.raises(ValueError, match="two classes"):
        SIG().check((3, 32, 32), 1)


def test_it_implants_where_classes_are_fainter_than_the_stripes() -> None:
    asr, clean = faint_classes.success(SIG(), 0.06)
    assert asr > 0.9
    assert clean < 0.3
