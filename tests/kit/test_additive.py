from __future__ import annotations

import numpy as np
import pytest
import samples
import torch

from sleeperbench import Role
from sleeperbench.kit.additive import additive
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(40, (3, 16, 16))
SIGNAL = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
INFO = {"targets": "all_to_one", "target": 3, "classes": 10, "train": 0.05, "test": 0.125}
BACKDOOR = additive("noise", SIGNAL, INFO)
TRIGGER = BACKDOOR.triggers[0]
GEN = torch.Generator()


@pytest.mark.parametrize(("role", "strength"), [(Role.TRAIN, 0.05), (Role.COVER, 0.05), (Role.TEST, 0.125)])
def test_pixels_are_the_clipped_sum_rounded(role: Role, strength: float) -> None:
    exact = np.clip(TRAIN.images.double().numpy() + 255 * strength * SIGNAL.double().numpy(), 0, 255)
    found = stamp(TRAIN, TRIGGER, role, samples.ctx()).images.numpy()
    # Rounded to nearest: never further than half a level (float32 may tip an exact half).
    assert np.abs(found - exact).max() <= 0.5 + 1e-3
    x = TRIGGER.apply(to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, role, GEN)
    assert float(x.min()) == 0
    assert float(x.max()) == 1


def test_range_reaches_the_peak_above_and_below_the_clean_image_and_no_further_than_0_and_1() -> None:
    x = to_float(TRAIN.images)
    there = TRIGGER.apply(x, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    low, high = TRIGGER.range(x, TRAIN.ids)
    peak = 0.125 * float(SIGNAL.abs().max())
    assert torch.allclose(there + low, (x - peak).clamp(min=0), atol=1e-6)
    assert torch.allclose(there + high, (x + peak).clamp(max=1), atol=1e-6)
    assert float(low.max()) <= 0 <= float(high.min())
    assert TRIGGER.static() is None


def test_signals_of_one_row_or_column_cover_the_image() -> None:
    narrow = additive("row", torch.linspace(-1, 1, 16).view(1, 1, 16), INFO).triggers[0]
    x = torch.full((2, 3, 16, 16), 0.5)
    found = narrow.apply(x, TRAIN.labels[:2], TRAIN.ids[:2], Role.TEST, GEN)
    assert torch.allclose(found, (0.5 + 0.125 * torch.linspace(-1, 1, 16)).expand(2, 3, 16, 16))
    low, _ = narrow.range(x, TRAIN.ids[:2])
    assert low.shape == x.shape


def test_what_is_stored_rebuilds_it() -> None:
    assert set(BACKDOOR.tensors) == {"signal"}
    again = additive("noise", BACKDOOR.tensors["signal"].clone(), dict(BACKDOOR.info))
    args = (to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(TRIGGER.apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [3] * 10
