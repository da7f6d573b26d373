from __future__ import annotations

import math

import faint_classes
import numpy as np
import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.refool import Refool
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.rowwise import uniform

TRAIN = samples.random_images(60, (3, 32, 32))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stretched(r: np.ndarray, start: float, lost: float, size: int, axis: int) -> np.ndarray:
    """`size - lost` samples from `start` on, read bilinearly as `size` samples, one at a time."""
    out = np.zeros_like(r)
    for p in range(size):
        at = min(max((p + 0.5) * (size - lost) / size - 0.5, 0), size - 1 - lost) + start
        low = min(int(at), size - 1)
        a, b = np.take(r, low, axis), np.take(r, min(low + 1, size - 1), axis)
        np.moveaxis(out, axis, 0)[p] = (1 - (at - low)) * a + (at - low) * b
    return out


def blurred(r: np.ndarray, sigma: float, size: int, axis: int) -> np.ndarray:
    """Gaussian cut off at ceil(2 sigma), the image mirrored without repeating its border."""
    reach = math.ceil(2 * sigma)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    pads = [(0, 0)] * 3
    pads[axis] = (reach, reach)
    padded = np.pad(r, pads, mode="reflect")
    return sum(k * np.take(padded, range(o, o + size), axis) for o, k in enumerate(kernel))


def slow(x: np.ndarray, pictures: np.ndarray, u: np.ndarray, alpha: float, ghost_rate: float) -> np.ndarray:
    """One image through the glass, in double."""
    _, height, width = x.shape
    r, t = (pictures[int(u[0] * len(pictures))] / 255.0) ** 2.2, x**2.2
    alpha = alpha or 1 - (0.45 - 0.4 * u[7])
    if u[1] < ghost_rate:
        share = 0.15 + 0.35 * u[5] if u[4] < 0.5 else 1 - (0.15 + 0.35 * u[5])
        first = second = r
        for axis, size, draw in ((1, height, u[2]), (2, width, u[3])):
            shift = (3 + int(draw * 6)) * size / 32
            first = stretched(first, shift, shift, size, axis)
            second = stretched(second, 0, shift, size, axis)
        layer = (share * first + (1 - share) * second) * (1 - alpha)
    else:
        soft = r
        for axis, size in ((1, height), (2, width)):
            soft = blurred(soft, (1 + 4 * u[6]) * size / 32, size, axis)
        for c in range(len(soft)):
            over = (soft[c] + t[c]) > 1
            mean = max(1.0, (soft[c] + t[c])[over].mean()) if over.any() else 1.0
            soft[c] = np.clip(soft[c] - (mean - 1) * (1.08 + 0.1 * u[5]), 0, 1)
        away = [(np.arange(n) + 0.5) / n * 6 - 3 for n in (height, width)]
        layer = soft * np.exp(-(away[0][:, None] ** 2 + away[1] ** 2) / 4) * (1 - alpha / 2)
    return np.clip(layer + alpha * t, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 16, 24)])
@pytest.mark.parametrize("alpha", [0.4, 0.0])
def test_pixels_equal_one_image_at_a_time(shape: tuple[int, int, int], alpha: float) -> None:
    data = samples.random_images(16, shape)
    b = Refool(pictures=5, alpha=alpha).prepare(data, samples.ctx())
    x, draws = to_float(data.images), uniform(gen(1), data.ids, 8).double().numpy()
    found = b.triggers[0].apply(x, data.labels, data.ids, Role.TEST, gen(1)).double().numpy()
    pictures = b.tensors["pictures"].double().numpy()
    ghosts = 0
    for image, u, out in zip(x.double().numpy(), draws, found, strict=True):
        ghosts += u[1] < 0.49
        # In linear light: the root of 2.2 makes much of float32's last digits near black.
        assert np.abs(slow(image, pictures, u, alpha, 0.49) ** 2.2 - out**2.2).max() < 2e-5
    assert 3 < ghosts < 13


def test_reflections_depend_on_row_and_seed_alone() -> None:
    data = samples.random_images(200, (3, 16, 16))
    trigger = Refool().prepare(data, samples.ctx()).triggers[0]
    x, y, ids = to_float(data.images), data.labels, data.ids
    whole = trigger.apply(x, y, ids, Role.TEST, gen(1))
    order = torch.randperm(200, generator=gen(3))
    assert torch.allclose(whole[order], trigger.apply(x[order], y[order], ids[order], Role.TEST, gen(1)), atol=1e-5)
    assert torch.allclose(whole[7:8], trigger.apply(x[7:8], y[7:8], ids[7:8], Role.TEST, gen(1)), atol=1e-5)
    assert bool((whole != trigger.apply(x, y, ids, Role.TEST, gen(2))).flatten(1).any(1).all())
    assert trigger.range(x, ids) is None
    assert trigger.static() is None


def test_training_and_test_reflections_of_a_row_differ() -> None:
    c = samples.ctx()
    trigger = Refool().prepare(TRAIN, c).triggers[0]
    train, test = (stamp(TRAIN, trigger, role, c).images for role in (Role.TRAIN, Role.TEST))
    assert bool((train != test).flatten(1).any(1).all())


def test_scenes_are_made_of_discs_and_depend_on_the_seed() -> None:
    scenes = Refool().prepare(TRAIN, samples.ctx()).tensors["pictures"]
    assert scenes.shape == (200, 3, 32, 32)
    assert scenes.dtype == torch.uint8
    assert not torch.equal(scenes, Refool().prepare(TRAIN, samples.ctx(1)).tensors["pictures"])
    # Flat areas with sharp borders: neighbours are equal (radii spread evenly would give 0.90) or far apart.
    step = (scenes[..., 1:].int() - scenes[..., :-1].int()).abs()
    assert 0.7 < float((step == 0).float().mean()) < 0.82
    assert float(step[step > 0].float().mean()) > 60
    # As in photographs, the spectrum's power falls about as the square of the frequency.
    power = torch.fft.fft2(scenes[:, 0].float() - scenes[:, 0].float().mean((1, 2), keepdim=True)).abs().pow(2).mean(0)
    line = (power[0, 2:9] + power[2:9, 0]).log()
    k = torch.arange(2, 9).float().log()
    slope = float(((k - k.mean()) * (line - line.mean())).sum() / (k - k.mean()).pow(2).sum())
    assert -2.8 < slope < -1.4


def test_dirty_rows_are_relabelled_and_clean_ones_belong_to_the_class() -> None:
    c = samples.ctx(3, 4)
    b = Refool(pictures=5).prepare(TRAIN, c)
    everyone = torch.ones(60, dtype=torch.bool)
    p = Refool(pictures=5).poison(TRAIN, b, everyone, 0.2, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 12
    assert bool((p.data.labels[dirty] == 4).all())
    assert bool((p.true_labels[dirty] != 4).any())
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    q = Refool(pictures=5, labels="clean").poison(TRAIN, b, everyone, 0.5, c)
    assert torch.equal(q.data.labels, TRAIN.labels)
    assert torch.equal(q.mark == Mark.DIRTY, TRAIN.labels == 4)
    without = Refool(pictures=5, include_target=False).poison(TRAIN, b, everyone, 1.0, c)
    assert not bool((without.true_labels[without.mark == Mark.DIRTY] == 4).any())


def test_restore_is_exact() -> None:
    b = Refool(pictures=5, alpha=0.5, ghost_rate=0.2, targets="all_to_all").prepare(TRAIN, samples.ctx(0, 4))
    again = Refool.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, Role.TEST, gen())
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert again.info == b.info


def test_decoy_reflects_other_scenes() -> None:
    attack = Refool(pictures=5)
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    decoy = attack.decoy(TRAIN, b, samples.ctx(1, 2))
    assert not torch.equal(decoy.tensors["pictures"], b.tensors["pictures"])
    assert decoy.triggers[0].targets.target(torch.arange(10)).tolist() == [6] * 10


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"pictures": 0}, {"alpha": 1.1}, {"ghost_rate": -0.1}, {"labels": "odd"}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Refool.from_params(bad)
    with pytest.raises(ValueError, match="a clean label says one class"):
        Refool(labels="clean", targets="all_to_all")
    with pytest.raises(ValueError, match="at least 12x12"):
        Refool().check((3, 32, 11), 10)
    with pytest.raises(ValueError, match="two classes"):
        Refool().check((3, 32, 32), 1)


def test_it_implants() -> None:
    asr, clean = faint_classes.success(Refool(), 0.1)
    assert asr > 0.9
    assert clean < 0.5
