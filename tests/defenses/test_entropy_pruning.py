from __future__ import annotations

import copy
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import ImageSet
from sleeperbench.defenses.entropy_pruning import EntropyPruning, entropies, peaks
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.pixels import to_float


def case(net: Any = None, train: ImageSet | None = None) -> Any:
    return SimpleNamespace(
        net=samples.badnets_net() if net is None else net,
        train=samples.digits()["train"] if train is None else train,
        ctx=samples.ctx(9),
    )


def slow(values: Tensor, width: float) -> list[float]:
    """Value by value: bins counted in a dict."""
    v = values.double().numpy()
    z = (v - v.mean(1, keepdims=True)) / v.std(1, ddof=1, keepdims=True)
    low, found = z.min(), []
    for row in z:
        counts = Counter(math.floor((value - low) / width) for value in row)
        shares = [n / len(row) for n in counts.values()]
        found.append(-sum(p * math.log(p) for p in shares))
    return found


@pytest.mark.parametrize("width", [0.01, 0.1, 1.0])
def test_entropies_equal_a_slow_count(width: float) -> None:
    values = torch.randn(6, 200, generator=torch.Generator().manual_seed(2)) ** 3
    assert np.allclose(entropies(values, width).numpy(), slow(values, width), atol=1e-12)


def test_two_lumps_have_the_entropy_of_a_coin_and_a_flat_channel_has_none() -> None:
    values = torch.stack([torch.arange(100) % 2 * 3.0, torch.linspace(0, 1, 100), torch.full((100,), 0.1)])
    found = entropies(values, 0.01)
    assert float(found[0]) == pytest.approx(math.log(2))
    assert float(found[1]) == pytest.approx(math.log(100)), "each in a bin of its own"
    assert bool(found[2].isnan())
    quarter = torch.where(torch.arange(100) < 25, 1.0, 0.0)[None]
    assert float(entropies(quarter, 0.1)) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert bool(entropies(torch.ones(2, 5), 0.1).isnan().all())


def test_peaks_are_the_largest_values_over_positions() -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    found = peaks(x)
    assert found.shape == (4, 3)
    assert all(float(found[c, n]) == max(x[n, c].flatten().tolist()) for c in range(4) for n in range(3))


def expected_gammas(net: Any, images: Tensor, u: float) -> dict[str, Tensor]:
    """Stage by stage in numpy, from the convolutions' answers."""
    x, found = (to_float(images) - 0.5) / 0.5, {}
    for i in range(1, 5):
        conv, norm, relu = getattr(net.body, f"stage{i}")
        with torch.no_grad():
            a = conv(x)
            x = relu(norm(a))
        h = np.array(slow(torch.from_numpy(a.numpy().max((2, 3)).T), 0.01))
        out = torch.from_numpy(h < h.mean() - u * h.std(ddof=1))
        found[f"body.stage{i}.1.weight"] = torch.where(out, 0.0, norm.weight.detach())
    return found


@pytest.mark.parametrize("u", [0.5, 3.0])
def test_channels_of_low_entropy_lose_gamma_alone(u: float) -> None:
    c = case()
    before, state = pack(c.net).state, torch.get_rng_state()
    outcome = EntropyPruning(u=u, images=300).run(c)
    assert torch.equal(torch.get_rng_state(), state)
    some = torch.randperm(len(c.train), generator=c.ctx.generator("images"))[:300]
    expected = before | expected_gammas(c.net, c.train.images[some], u)
    assert outcome.model is not None
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())
    pruned = sum(int((outcome.model.state[k] == 0).sum()) for k in before if k.endswith(".1.weight"))
    assert outcome.chosen == {"u": u, "rows": 300, "pruned": pruned, "channels": 88}
    assert (pruned > 0) or u == 3.0
    assert not outcome.path
    assert (c.ctx.cost.forwards, c.ctx.cost.backwards) == (300, 0)
    assert all(torch.equal(before[k], v) for k, v in pack(c.net).state.items())


def test_a_channel_that_says_one_of_two_things_goes() -> None:
    # Channel 5 of the first layer sees the first pixel alone, which is black or, in a tenth of the rows, white.
    net, train = copy.deepcopy(samples.clean_net()), samples.digits()["train"]
    images = train.images.clone()
    images[:, :, :3, :3] = 0
    images[::10, :, 0, 0] = 255
    net.body.stage1[0] = FirstPixel(net.body.stage1[0], 5)
    rows = samples.images(images, train.labels)
    # Of eight channels none lies 3 deviations below their mean: (C - 1) / sqrt(C) = 2.47 is the most.
    outcome = EntropyPruning(u=2.0).run(case(net, rows))
    assert outcome.model is not None
    assert torch.equal(outcome.model.state["body.stage1.1.weight"] == 0, torch.arange(8) == 5)


class FirstPixel(nn.Module):
    """A convolution one of whose channels answers with the first pixel everywhere."""

    def __init__(self, conv: nn.Module, channel: int) -> None:
        super().__init__()
        self.conv, self.channel = conv, channel

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x).clone()
        out[:, self.channel] = x[:, 0, :1, :1]
        return out


def test_published_settings_and_access() -> None:
    assert EntropyPruning() == EntropyPruning(u=3.0, images=500, width=0.01)
    assert EntropyPruning.ACCESS.track() == "T2"
    assert not EntropyPruning.ACCESS.control
    assert {"bn"} == EntropyPruning.REQUIRES
    assert EntropyPruning.from_params(EntropyPruning.INFO["micro"]).run(case()).chosen["pruned"] > 0
    for bad in ({"images": 1}, {"width": 0.0}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EntropyPruning.from_params(bad)
