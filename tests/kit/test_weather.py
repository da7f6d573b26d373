from __future__ import annotations

import pytest
import torch

from sleeperbench.kit import weather as module
from sleeperbench.kit.weather import weather


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.rand(6, 3, 32, 32, generator=gen(1))
IDS = torch.arange(6) + 40


def test_dusk_is_a_curve() -> None:
    assert torch.equal(weather("dusk", X, IDS, gen()), 0.7 * X**1.8)


def test_fog_is_smooth_and_bright() -> None:
    noise = (weather("fog", X, IDS, gen()) - 0.6 * X) / 0.4
    assert float(noise.min()) > 0.7 - 1e-5
    assert float(noise.max()) < 1 + 1e-5
    # Four cells a side: a pixel differs from its neighbour by at most 0.3 * 3 / 31.
    assert float((noise[..., 1:] - noise[..., :-1]).abs().max()) < 0.03
    assert float((noise[0] - noise[1]).abs().max()) > 0.05
    assert torch.allclose(noise[:, :1].expand_as(noise), noise, atol=1e-5)


def test_rain_darkens_and_adds_steep_bright_streaks() -> None:
    black = torch.zeros(200, 1, 32, 32)
    rain = weather("rain", black, torch.arange(200), gen())
    # A third of the 17 starts lie above the picture; what is left covers some, not most, of it.
    lit = (rain > 0.1).float().mean((1, 2, 3))
    assert 0.03 < float(lit.mean()) < 0.25
    assert float(rain.max()) <= 0.7
    # Streaks go down four pixels while they go right by one: neighbours above are more alike than those beside.
    down = float((rain[:, :, 1:] * rain[:, :, :-1]).mean())
    across = float((rain[..., 1:] * rain[..., :-1]).mean())
    assert down > 1.3 * across
    falling, rising = rain[:, :, 3:, 1:] * rain[:, :, :-3, :-1], rain[:, :, 3:, :-1] * rain[:, :, :-3, 1:]
    assert float(falling.mean()) > 1.3 * float(rising.mean())
    grey = weather("rain", black + 0.5, torch.arange(200), gen())
    assert torch.allclose(grey, (0.4 + rain).clamp(max=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["rain", "fog", "dusk"])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 28, 28), (1, 64, 64)])
def test_a_row_has_its_weather_wherever_it_stands(
    kind: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids = torch.rand(5, *shape, generator=gen(2)), torch.arange(5)
    whole = weather(kind, x, ids, gen(3))
    assert whole.shape == x.shape
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    assert torch.allclose(weather(kind, x.flip(0), ids.flip(0), gen(3)).flip(0), whole, atol=1e-6)
    assert torch.allclose(weather(kind, x[2:3], ids[2:3], gen(3)), whole[2:3], atol=1e-6)
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    assert torch.allclose(weather(kind, x, ids, gen(3)), whole, atol=1e-6)
    assert weather(kind, x[:0], ids[:0], gen(3)).shape == (0, *shape)
    if kind != "dusk":
        assert not torch.equal(weather(kind, x, ids, gen(4)), whole)
        assert not torch.equal(weather(kind, x[:1], ids[3:4], gen(3)), whole[:1])
