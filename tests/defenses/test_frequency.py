from __future__ import annotations

import colorsys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from scipy.fft import dctn
from torch import nn

from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import frequency
from sleeperbench.defenses.frequency import Adadelta, Detector, Frequency, inside, with_copies
from sleeperbench.evaluators.detection import auroc
from sleeperbench.kit.pixels import to_float


def case(clean: Any) -> Any:
    return SimpleNamespace(clean=clean, recipe=samples.RECIPE, ctx=samples.ctx(4))


def test_features_are_the_orthonormal_cosine_transform() -> None:
    images = samples.random_images(3, (3, 16, 24)).images
    found = Detector((3, 16, 24)).transform(to_float(images))
    for i in range(3):
        for c in range(3):
            wanted = dctn(images[i, c].double().numpy(), norm="ortho")
            assert torch.allclose(found[i, c].double(), torch.from_numpy(wanted), atol=1e-2)
    assert float(found[0, 0, 0, 0]) == pytest.approx(float(images[0, 0].double().mean()) * (16 * 24) ** 0.5, rel=1e-4)


def test_the_detector_is_the_published_network() -> None:
    net = Detector((3, 32, 32))
    assert sum(p.numel() for p in net.parameters()) == 292_002  # the authors' count of trainable parameters
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.3, 0.4]
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    m = Frequency()
    assert (m.rounds, m.epochs, m.batch, m.lr, m.decay) == (5, 10, 64, 0.05, 1e-4)
    assert Frequency.ACCESS.model == "none" and Frequency.ACCESS.clean == 0.05


@pytest.mark.parametrize("size", [32, 16, 8])
def test_blocks_lie_near_corners(size: int) -> None:
    row, gen = torch.zeros(3, size, size), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        x = frequency.white_block(row, row[None], gen)
        places = x[0].nonzero()
        low, high = places.amin(0), places.amax(0)
        tall, wide = (high - low + 1).tolist()
        assert len(places) == tall * wide and torch.equal(x.unique(), torch.tensor([0.0, 1.0]))
        assert torch.equal(x[0], x[1])
        near = tuple(min(int(low[i]), size - 1 - int(high[i])) for i in range(2))
        assert near[0] == near[1] <= round(5 * size / 32)
        seen.add((tall, wide, near[0], bool(low[0] < size / 2), bool(low[1] < size / 2)))
    if size == 32:
        assert {s[0] for s in seen} == {s[1] for s in seen} == {2, 3, 4, 5, 6, 7}
        assert {s[2] for s in seen} == {0, 1, 2, 3, 4, 5}
    assert len({s[3:] for s in seen}) == 4
    noise = frequency.noise_block(row, row[None], gen)
    assert len(noise[noise > 0].unique()) >= 3


def test_a_shadow_halves_the_lightness() -> None:
    gen = torch.Generator().manual_seed(1)
    row = torch.rand(3, 16, 16, generator=gen)
    row[:, 12] = 1
    row[:, 13] = 0
    x, dark = frequency.shadow(row, row[None], gen), 0
    for i in range(16):
        for j in range(16):
            if torch.equal(x[:, i, j], row[:, i, j]):
                continue
            dark += 1
            assert i >= 8
            hue, light, saturation = colorsys.rgb_to_hls(*row[:, i, j].double().tolist())
            assert x[:, i, j].tolist() == pytest.approx(colorsys.hls_to_rgb(hue, light / 2, saturation), abs=1e-5)
    assert dark > 5
    grey = torch.rand(1, 16, 16, generator=gen)
    x = frequency.shadow(grey, grey[None], gen)
    assert bool(((x - grey / 2).abs().lt(1e-6) | (x == grey)).all())


def test_a_polygon_is_filled_by_the_even_odd_rule() -> None:
    down, right = torch.tensor([1.0, 1.0, 5.0, 5.0]), torch.tensor([2.0, 6.0, 6.0, 2.0])
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[1:5, 2:6] = True
    assert torch.equal(inside(down, right, 8, 8), wanted)
    # Two triangles that meet in the middle: left and right of it is outside.
    bow = inside(torch.tensor([0.0, 8.0, 8.0, 0.0]), torch.tensor([0.0, 8.0, 0.0, 8.0]), 8, 8)
    assert bool(bow[1, 4]) and bool(bow[6, 4]) and not bool(bow[4, 0]) and not bool(bow[4, 7])


def test_noise_and_blend() -> None:
    gen, row = torch.Generator().manual_seed(2), torch.full((1, 64, 64), 0.5)
    spreads = []
    for _ in range(40):
        change = 255 * (frequency.gaussian_noise(row, row[None], gen) - row)
        assert float(change.mean()) == pytest.approx(25, abs=0.6)
        spreads.append(float(change.var()))
    assert 9 < min(spreads) < 20 and 60 < max(spreads) < 77
    assert torch.allclose(frequency.blend(row, torch.full((5, 1, 64, 64), 0.2), gen), torch.full_like(row, 0.56))


def test_every_row_has_a_copy() -> None:
    clean = samples.random_images(40, (1, 16, 16))
    both = with_copies(clean, torch.Generator().manual_seed(0))
    assert torch.equal(both.images[:40], clean.images) and both.labels.tolist() == [0] * 40 + [1] * 40
    assert int((both.images[40:] != clean.images).flatten(1).any(1).sum()) >= 39
    assert not torch.equal(both.images, with_copies(clean, torch.Generator().manual_seed(1)).images)


def test_updates_are_those_of_adadelta_with_decayed_kernels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    own = [p.detach().double().clone() for p in net.parameters()]
    square, delta = [torch.zeros_like(p) for p in own], [torch.zeros_like(p) for p in own]
    hooks, idle = Adadelta(net, 0.05, 0.1), torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(3):
        w = [p.clone().requires_grad_() for p in own]
        z = nn.functional.conv2d(x.double(), w[0], w[1]).flatten(1) @ w[2].T + w[3]
        loss = nn.functional.cross_entropy(z, y) + 0.1 * w[0].square().sum()
        for i, g in enumerate(torch.autograd.grad(loss, w)):
            square[i] = 0.95 * square[i] + 0.05 * g**2
            change = ((delta[i] + 1e-7) / (square[i] + 1e-7)).sqrt() * g
            delta[i] = 0.95 * delta[i] + 0.05 * change**2
            own[i] = own[i] - 0.05 * change
        hooks.step(net, idle, x, y, torch.zeros(6))
    for p, wanted in zip(net.parameters(), own, strict=True):
        assert torch.allclose(p.double(), wanted, atol=1e-7)


def test_unseen_triggers_stand_out_and_runs_repeat() -> None:
    whole = samples.digits()
    clean = replace(whole["pool"], images=whole["pool"].images[:, :, ::2, ::2].contiguous())
    method = Frequency(rounds=3, epochs=4, lr=2.0)
    outcome = samples.judged(method, case(clean))
    x = to_float(whole["test"].images[:120, :, ::2, ::2])
    white = x.clone()
    white[:, :, 6:, 6:] = 1
    scores = [method.score(outcome.state, None, images) for images in (white, x)]
    assert auroc(*scores) > 0.8
    assert outcome.alarm == 0, "the larger of the two logits decides"
    alone = torch.cat([method.score(outcome.state, None, row[None]) for row in x[:3]])
    assert torch.allclose(alone, scores[1][:3], atol=1e-4)
    assert len(outcome.chosen["losses"]) == 3 and outcome.chosen["losses"][2] < outcome.chosen["losses"][0]
    short = Frequency(rounds=1, epochs=1)
    first, again = (short.prepare(case(clean.rows(torch.arange(30))))[0] for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_what_it_declines_and_refuses() -> None:
    clean = samples.random_images(4, (1, 7, 7))
    with pytest.raises(NotApplicable, match="images_too_small: 7"):
        Frequency().prepare(case(clean))
    with pytest.raises(NotApplicable, match="too_few_clean_rows"):
        Frequency().prepare(case(replace(clean.rows(torch.arange(0)))))
    with pytest.raises(ValueError, match="rounds"):
        Frequency(rounds=0)
