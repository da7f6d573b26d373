from __future__ import annotations

import numpy as np
import pytest
import samples
import torch
from torch import nn

from sleeperbench import Role, TargetMap
from sleeperbench.kit.drawn import Drawn, diversity, network, threshold
from sleeperbench.kit.generators import Hourglass, seeded, straight_through
from sleeperbench.kit.pixels import to_float

DATA = samples.random_images(20, (3, 16, 16))
X, Y, IDS = to_float(DATA.images), DATA.labels, DATA.ids


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trigger(negative: bool = False, shift: tuple[int, int] = (0, 0)) -> Drawn:
    nets = network(3, 3, 1), network(3, 1, 2)
    for net in nets:
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):  # fresh networks are nearly flat: louder ones show more
                m.weight.data *= 3
    return Drawn(
        name="drawn",
        targets=TargetMap.all_to_one(0),
        pattern=nets[0],
        mask=nets[1],
        bank=DATA.images[:8].flip(3),
        negative=negative,
        shift=shift,
    )


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (3, 16), (1, 28), (1, 16), (3, 30), (1, 19)])
def test_pictures_have_the_images_size_and_lie_in_0_to_1(channels: int, side: int) -> None:
    x = torch.rand(2, channels, side, side, generator=gen())
    for outputs in (channels, 1):
        net = network(channels, outputs, 0)
        wild = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        wild.weight.data.fill_(1e4)
        out = net(x).detach()
        assert out.shape == (2, outputs, side, side)
        assert (float(out.min()), float(out.max())) == (0, 1)


def test_layers_of_the_colour_network() -> None:
    convs = [m for m in network(3, 3, 0).modules() if isinstance(m, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels) for c in convs]
    down = [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    assert shapes == [*down, (128, 128), (128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3)]
    kinds = [type(m) for m in network(3, 3, 0).modules()]
    # Every convolution has batch norm, all but the last a ReLU.
    assert (kinds.count(nn.BatchNorm2d), kinds.count(nn.ReLU), kinds.count(nn.MaxPool2d)) == (13, 12, 3)
    narrow = [m for m in network(3, 3, 0, 4).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels * 8 for c in narrow[:-1]] == [c.out_channels for c in convs[:-1]]
    assert next(m for m in network(1, 1, 0, 4).modules() if isinstance(m, nn.Conv2d)).out_channels == 2
    grey = [m for m in network(1, 1, 0).modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in grey] == [
        *[(1, 16), (16, 16), (16, 32), (32, 32)],
        *[(32, 32), (32, 32), (32, 16), (16, 16), (16, 1)],
    ]


def test_weights_come_from_the_seed_and_no_global_generator_moves() -> None:
    state = torch.get_rng_state()
    a, b, c = (seeded(Hourglass, s, 1, 1, 4, 2).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["body.0.0.weight"], c["body.0.0.weight"])


def test_soft_step() -> None:
    o = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0])
    assert threshold(o).tolist() == pytest.approx([0, 0.0180, 0.5, 0.9820, 1], abs=1e-4)


def test_diversity_equals_a_slow_reference() -> None:
    x1, x2, o1, o2 = (torch.rand(5, c, 6, 6, generator=gen(i)) for i, c in enumerate((3, 3, 1, 1)))
    ratios = []
    for a, b, c, d in zip(*(t.double().numpy() for t in (x1, x2, o1, o2)), strict=True):
        ratios.append(np.sqrt(np.mean((a - b) ** 2)) / (np.sqrt(np.mean((c - d) ** 2)) + 1e-7))
    assert float(diversity(x1, x2, o1, o2)) == pytest.approx(float(np.mean(ratios)), rel=1e-5)
    # The same image for both: no ratio, and no gradient that is not a number.
    same = o1.clone().requires_grad_()
    diversity(x1, x1, same, o1).backward()
    assert same.grad is not None
    assert bool(same.grad.isfinite().all())
    assert float(diversity(x1, x2, o1, o1)) > 1e5


def test_rounding_gives_stored_levels_and_passes_gradients() -> None:
    x = torch.tensor([-0.1, 0.1, 0.5004, 1.2], requires_grad=True)
    out = straight_through(x)
    assert (out * 255).tolist() == pytest.approx([0, 26, 128, 255], abs=1e-4)
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3, 4]


def test_trigger_is_the_images_own_mask_over_its_own_pattern() -> None:
    t = trigger()
    out = t.apply(X, Y, IDS, Role.TEST, gen())
    with torch.no_grad():
        mask, pattern = threshold(t.mask.eval()(X)), t.pattern.eval()(X)
    assert torch.allclose(out, X * (1 - mask) + pattern * mask, atol=1e-4)
    assert torch.equal(out, t.apply(X, Y, IDS, Role.TRAIN, gen(3)))
    low, high = t.range(X, IDS)
    assert torch.allclose(out + low, X * (1 - mask), atol=1e-6)
    assert torch.allclose(out + high, X * (1 - mask) + mask, atol=1e-6)
    assert t.static() is None


def test_a_cover_wears_the_trigger_of_a_stored_image() -> None:
    t = trigger()
    out = t.apply(X, Y, IDS, Role.COVER, gen(2))
    z = to_float(t.bank)
    with torch.no_grad():
        masks, patterns = threshold(t.mask.eval()(z)), t.pattern.eval()(z)
    worn = []
    for x, shown in zip(X, out, strict=True):
        fits = [float((x + (p - x) * m - shown).abs().max()) < 1e-5 for m, p in zip(masks, patterns, strict=True)]
        assert sum(fits) == 1
        worn.append(fits.index(True))
    assert len(set(worn)) > 3
    order = torch.randperm(20, generator=gen())
    assert torch.allclose(t.apply(X[order], Y[order], IDS[order], Role.COVER, gen(2)), out[order], atol=1e-4)


def test_rows_stand_alone_and_modes_are_put_back() -> None:
    t = trigger()
    t.pattern.train()
    t.mask.eval()
    before = {k: v.clone() for k, v in t.pattern.state_dict().items()}
    whole = t.apply(X, Y, IDS, Role.TEST, gen())
    # The soft step multiplies float32's last digits by ten.
    assert torch.allclose(t.apply(X[4:5], Y[4:5], IDS[4:5], Role.TEST, gen()), whole[4:5], atol=1e-4)
    assert t.pattern.training
    assert not t.mask.training
    assert all(torch.equal(before[k], v) for k, v in t.pattern.state_dict().items())


def test_a_decoy_is_the_negative_moved_around() -> None:
    t, d = trigger(), trigger(negative=True, shift=(3, 5))
    with torch.no_grad():
        mask, pattern = threshold(t.mask.eval()(X)), t.pattern.eval()(X)
    mask, pattern = mask.roll((3, 5), (2, 3)), (1 - pattern).roll((3, 5), (2, 3))
    assert torch.allclose(d.apply(X, Y, IDS, Role.TEST, gen()), X + (pattern - X) * mask, atol=1e-4)
