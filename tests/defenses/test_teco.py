from __future__ import annotations

import colorsys
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from PIL import Image
from torch import Tensor

from sleeperbench.defenses.teco import CORRUPTIONS, TeCo, corrupt, defocus_blur, glass_blur, shot_noise, transition
from sleeperbench.kit.pixels import to_float, to_uint8


def smooth(n: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """Pictures with large and small detail, in [0, 1]."""
    gen = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 5, generator=gen)
    x = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return to_float(to_uint8(x * 0.8 + 0.1 * torch.rand(x.shape, generator=gen)))


class Brightness:
    """Ten labels of the mean of each image; counts what it is asked."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) <= 1
        assert torch.equal(to_float(to_uint8(x)), x)  # 8-bit levels
        self.images += len(x)
        return (40 * x.mean((1, 2, 3))).long()


def state(seed: int = 3) -> Any:
    outcome = TeCo().run(SimpleNamespace(ctx=samples.ctx(seed)))  # type: ignore[arg-type]
    assert outcome.state is not None
    return outcome.state


def test_scores_are_the_deviation_of_the_first_severities_that_change_the_label() -> None:
    x, now = smooth(3, size=16), state()
    net = Brightness()
    found = TeCo().score(now, net, x)  # type: ignore[arg-type]
    assert net.images == 3 * (1 + 15 * 5)
    for row, score in zip(x, found.tolist(), strict=True):
        own, first = int(Brightness()(row[None])), []
        for name in CORRUPTIONS:
            at = 6
            for severity in (5, 4, 3, 2, 1):
                if int(Brightness()(corrupt(row[None], name, severity, now[1]["seed"]))) != own:
                    at = severity
            first.append(at)
        assert score == pytest.approx(np.std(first), abs=1e-5)
    assert len(found.unique()) > 1


def test_the_first_change_counts_even_if_the_label_comes_back() -> None:
    held = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    assert transition(held).tolist() == [4, 2, 1, 3]


def test_a_label_that_withstands_some_corruptions_is_more_suspicious_than_one_that_falls_at_once() -> None:
    class Net(Brightness):
        """A red stripe on top decides; else every level of every pixel counts, and any corruption is a new label."""

        def __call__(self, x: Tensor) -> Tensor:
            super().__call__(x)
            hot = x[:, 0, :8].mean((1, 2)) - x[:, 2, :8].mean((1, 2)) > 0.3
            return torch.where(hot, -1, (x * 255).round().sum((1, 2, 3)).long() % 1000)

    x = smooth(4)
    triggered = x.clone()
    triggered[:, 0, :12], triggered[:, 2, :12] = 1.0, 0.0
    now = state()
    clean, suspicious = (TeCo().score(now, Net(), rows) for rows in (x, triggered))  # type: ignore[arg-type]
    assert float(clean.max()) < 0.5
    assert float(suspicious.min()) > 0.7


@pytest.mark.parametrize("name", list(CORRUPTIONS))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 20, 24)])
def test_every_corruption_is_8_bit_repeats_and_goes_row_by_row(name: str, shape: tuple[int, int, int]) -> None:
    x = smooth(4, shape[0], 32)[:, :, : shape[1], : shape[2]].contiguous()
    before = x.clone()
    far = []
    for severity in range(1, 6):
        out = corrupt(x, name, severity, 7)
        assert out.shape == x.shape and torch.equal(to_float(to_uint8(out)), out)
        assert torch.equal(corrupt(x, name, severity, 7), out)
        assert float((corrupt(x[2:3], name, severity, 7) - out[2:3]).abs().max()) <= 1 / 255 + 1e-6
        far.append(float((out - x).square().mean()))
    assert torch.equal(x, before)
    assert min(far) > 0
    assert far[4] > far[0]


def test_draws_depend_on_seed_and_severity() -> None:
    x = smooth(1)
    for name in ("gaussian_noise", "glass_blur", "snow", "fog", "frost", "elastic_transform"):
        assert not torch.equal(corrupt(x, name, 2, 1), corrupt(x, name, 2, 2))


def test_noises_have_their_size() -> None:
    grey = torch.full((1, 3, 64, 64), 0.5)
    noise = corrupt(grey, "gaussian_noise", 1, 0) - grey
    assert float(noise.std()) == pytest.approx(0.08, rel=0.03)
    counts = shot_noise(grey, 3, torch.Generator().manual_seed(0)) * 5  # Poisson of mean and variance 2.5
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    assert float(counts.mean()) == pytest.approx(2.5, rel=0.03)
    assert float(counts.var()) == pytest.approx(2.5, rel=0.06)
    salted = corrupt(grey, "impulse_noise", 5, 0)
    assert float((salted == 0).double().mean()) == pytest.approx(0.135, abs=0.01)
    assert float((salted == 1).double().mean()) == pytest.approx(0.135, abs=0.01)


def test_blurs_keep_an_even_picture_and_shuffles_its_pixels() -> None:
    even = torch.full((1, 3, 32, 32), 0.4)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"):
        assert float((corrupt(even, name, 3, 0) - even).abs().max()) <= 1 / 255 + 1e-6
    spot = torch.zeros(1, 1, 33, 33)
    spot[0, 0, 16, 16] = 1
    disc = defocus_blur(spot, 0, torch.Generator())[0, 0]
    wide = np.hypot(*np.mgrid[-16:17, -16:17]) <= 3
    assert np.abs(disc.numpy() - wide / wide.sum()).max() < 1e-6  # its alias blur of 0.1 pixels changes nothing
    swapped = glass_blur(smooth(1), 0, torch.Generator().manual_seed(0))
    assert float(swapped.mean()) == pytest.approx(float(smooth(1).mean()), abs=0.01)


def test_brightness_raises_the_value_of_hsv() -> None:
    x = smooth(1, size=4)
    out = corrupt(x, "brightness", 2, 0)
    for before, after in zip(x[0].flatten(1).T.tolist(), out[0].flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(1, v + 0.2)), abs=0.003)


@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (3, 15), (5, 7)])
def test_jpeg_is_close_to_a_real_encoder(severity: int, quality: int) -> None:
    def real(pixels: np.ndarray) -> np.ndarray:
        box = io.BytesIO()
        Image.fromarray(pixels).save(box, "JPEG", quality=quality)
        return np.array(Image.open(box)).astype(float)

    x = smooth(1, 1)
    grey = (corrupt(x, "jpeg_compression", severity, 0)[0, 0] * 255).numpy()
    assert np.abs(grey - real(to_uint8(x)[0, 0].numpy())).mean() < 0.5
    x = smooth(1)
    colour = (corrupt(x, "jpeg_compression", severity, 0)[0] * 255).permute(1, 2, 0).numpy()
    original = to_uint8(x)[0].permute(1, 2, 0).contiguous().numpy()
    theirs = real(original)
    assert np.abs(colour - theirs).mean() < 0.35 * np.abs(original - theirs).mean()


def test_settings_are_the_published_ones_and_senseless_ones_are_refused() -> None:
    m = TeCo()
    assert m.severities == 5 and m.corruptions == tuple(CORRUPTIONS) and len(m.corruptions) == 15
    assert TeCo.ACCESS.model == "labels" and not TeCo.ACCESS.clean and TeCo.ACCESS.track() == "Q"
    for bad in ({"severities": 6}, {"severities": 0}, {"corruptions": ("snow",)}, {"corruptions": ("snow", "rain")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TeCo(**bad)  # type: ignore[arg-type]
