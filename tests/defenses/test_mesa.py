from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import ModelSpec
from sleeperbench.defenses import mesa as module
from sleeperbench.defenses.mesa import MESA, Critics, Generators, bound, sites, staircase, stamp
from sleeperbench.kit.masks import apply

CPU = torch.device("cpu")


class Corner(nn.Module):
    """Class 1 where 2x2 pixels, `inset` from the lower right corner, are bright enough, else class 0; never class 2."""

    def __init__(self, inset: int = 0) -> None:
        super().__init__()
        self.at = slice(6 - inset, 8 - inset)

    def forward(self, x: Tensor) -> Tensor:
        light = x[:, 0, self.at, self.at].mean((1, 2))
        return torch.stack([torch.zeros_like(light), 20 * (light - 0.4), torch.full_like(light, -9)], 1)


def case(inset: int = 0) -> Any:
    spec = ModelSpec(arch="small_cnn", classes=3, shape=(1, 8, 8), norm=((0.5,), (0.5,)))
    data = samples.random_images(40, (1, 8, 8), 3)
    data = samples.images(data.images // 4, data.labels, 3)
    tune, val = data.rows(torch.arange(30)), data.rows(torch.arange(30, 40))
    return SimpleNamespace(net=Corner(inset), spec=spec, clean=data, tune=tune, val=val, ctx=samples.ctx(3))


def test_settings_are_published() -> None:
    m = MESA()
    assert (m.size, m.batch, m.lr, m.alpha, m.betas) == (3, 128, 2e-4, 0.1, (0.5, 0.8, 0.9))
    assert (m.noise, m.hidden, m.updates) == (64, 512, 10 * 8000 // 128)
    assert MESA.ACCESS.track() == "T1"


def test_staircase_is_flat_above_its_step() -> None:
    logits = torch.randn(2, 5, 3, requires_grad=True)
    with torch.no_grad():
        logits[0, 0, 2], logits[1, 1, 0] = 9.0, 9.0
    found = staircase(logits, torch.tensor([2, 0]), torch.tensor([0.8, 0.5]))
    for m, (t, b) in enumerate([(2, 0.8), (0, 0.5)]):
        wanted = [min(float(logits[m, i].detach().exp()[t] / logits[m, i].detach().exp().sum()), b) for i in range(5)]
        assert float(found[m].detach()) == pytest.approx(sum(wanted) / 5, abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0, 0].any() and not logits.grad[1, 1].any()
    assert logits.grad[0, 1:].abs().sum() > 0


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias[0])
    return layer


def test_members_are_the_published_networks() -> None:
    gen = torch.Generator().manual_seed(0)
    made, critics = Generators(3, 8, 5, 4, gen, CPU), Critics(3, 8, 5, 4, gen, CPU)
    with torch.no_grad():
        for p in (*made.scales, *made.shifts):
            p.add_(torch.randn(p.shape, generator=gen))
    z = torch.rand(3, 6, 8, generator=gen)
    patches, worth = made(z), critics(z, made(z))
    for m in range(3):
        h = z[m, :, :2]
        for i in range(3):
            norm = nn.BatchNorm1d(5)
            with torch.no_grad():
                norm.weight.copy_(made.scales[i][m, 0])
                norm.bias.copy_(made.shifts[i][m, 0])
            h = nn.functional.leaky_relu(norm(linear(*(p[m] for p in made.layers[i]))(h)), 0.2)
            h = torch.cat([h, z[m, :, 2 * i + 2 : 2 * i + 4]], 1)
        wanted = linear(*(p[m] for p in made.layers[3]))(h).sigmoid()
        assert torch.allclose(patches[m], wanted, atol=1e-5)
        a, b, c, d = (linear(*(p[m] for p in layer)) for layer in critics.layers)
        hidden = nn.functional.leaky_relu(a(z[m]) + b(wanted), 0.2)
        assert torch.allclose(worth[m], d(nn.functional.leaky_relu(c(hidden), 0.2))[:, 0], atol=1e-5)


def test_bound_is_that_of_mine() -> None:
    paired, apart = torch.randn(2, 7), torch.randn(2, 7)
    for m in range(2):
        wanted = float(paired[m].mean()) - math.log(sum(math.exp(v) for v in apart[m].tolist()) / 7)
        assert float(bound(paired, apart)[m]) == pytest.approx(wanted, abs=1e-5)


def test_one_update_is_that_of_the_losses_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    for name, cls in (("Generators", Generators), ("Critics", Critics)):

        def build(*args: Any, cls: Any = cls) -> Any:
            made.append((cls(*args), None))
            made[-1] = (made[-1][0], copy.deepcopy(made[-1][0]))
            return made[-1][0]

        monkeypatch.setattr(module, name, build)
    c, m = case(), MESA(size=2, updates=1, batch=6, lr=0.01, alpha=0.3, betas=(0.4, 0.9), noise=4, hidden=5)
    places = sites(8, 8, 2)
    m.train(c.net, c.tune, 1, 3, places, c.ctx)
    (trained, start), (critic, critic_start) = made
    draw = c.ctx.generator("draws")
    rows = torch.randperm(30, generator=draw)[:6]
    z, other = torch.rand(2, 6, 6, 4, generator=draw)
    place = places[int(torch.randint(13, (), generator=draw))]
    patch = start(z)
    noisy = (patch + 0.1 * torch.randn(patch.shape, generator=draw)).view(6, 6, 1, 2, 2)
    loss = torch.zeros(())
    for i in range(6):
        worn = stamp(c.tune.images[rows] / 255, noisy[i], place)
        posterior = c.net(worn).softmax(1)[:, i % 3]
        level = 0.4 if i < 3 else 0.9
        t, s = critic_start(z, patch)[i], critic_start(other, patch)[i]
        loss = loss - posterior.clamp(max=level).mean() - 0.3 * (t.mean() - s.exp().mean().log())
    adam = torch.optim.Adam(start.parameters, lr=0.01, betas=(0.5, 0.999))
    adam.zero_grad()
    loss.backward()
    # Adam's first step shows the gradient's sign alone; where it is 0, as behind a step, nothing is to be seen.
    grads = [p.grad.clone() for p in start.parameters]
    adam.step()
    for found, wanted, grad in zip(trained.parameters, start.parameters, grads, strict=True):
        seen = grad.abs() > 1e-6
        assert torch.allclose(found[seen], wanted[seen], atol=1e-4)
    up = torch.optim.Adam(critic_start.parameters, lr=0.01, betas=(0.5, 0.999))
    up.zero_grad()
    t, s = critic_start(z, patch.detach()), critic_start(other, patch.detach())
    mean = s.exp().mean(1)
    average = (1 - 1e-3) * 1 + 1e-3 * mean.detach()
    (mean / average - t.mean(1)).sum().backward()
    grads = [p.grad.clone() for p in critic_start.parameters]
    up.step()
    for found, wanted, grad in zip(critic.parameters, critic_start.parameters, grads, strict=True):
        seen = grad.abs() > 1e-6
        assert torch.allclose(found[seen], wanted[seen], atol=1e-4)
    assert (c.ctx.cost.forwards, c.ctx.cost.backwards) == (36, 36)


def test_generators_one_at_a_time_learn_the_same() -> None:
    found, passes = [], []
    for batched in (True, False):
        c, m = case(), MESA(size=2, updates=6, batch=6, noise=4, hidden=5, betas=(0.4, 0.9), batched=batched)
        sizes: list[int] = []
        c.net.register_forward_pre_hook(lambda module, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        found.append(m.train(c.net, c.tune, 1, 3, sites(8, 8, 2), c.ctx).parameters)
        passes.append(sizes)
    assert passes == [[36] * 6, [6] * 36]
    for many, one in zip(*found, strict=True):
        assert torch.allclose(many, one, atol=1e-5)


def test_success_is_counted_on_other_classes_at_every_place() -> None:
    c = case()
    m = MESA(size=2, betas=(0.5, 0.9))
    bank = torch.zeros(6, 4, 1, 2, 2)
    bank[1], bank[4, ::2] = 1.0, 1.0  # all patches of the first generator for class 1, half of the second's
    found = m.success(c.net, bank, c.val, 3, sites(8, 8, 2), c.ctx)
    n = int((c.val.labels != 1).sum())
    wanted = [0.0] * 13
    wanted[3] = (1 + math.ceil(n / 2) / n) / 2
    # One pixel further in a patch covers one of the four pixels: a quarter of their light is not enough.
    assert found[1].tolist() == pytest.approx(wanted)
    assert found[2].tolist() == [0] * 13


def test_places_are_corners_with_insets_and_the_centre() -> None:
    found = sites(28, 32, 3)
    assert len(found) == len(set(found)) == 13
    for n in (0, 1, 2):
        assert {(n, n), (n, 29 - n), (25 - n, n), (25 - n, 29 - n)} <= set(found)
    assert found[-1] == (12, 14)
    # A patch of 4 pixels on 8: two pixels in, all four corners meet in the centre. One as large as the image has one.
    assert len(sites(8, 8, 4)) == 9
    assert sites(4, 4, 4) == [(0, 0)]
    assert sites(4, 5, 4) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("inset", [0, 1, 2])
def test_a_patch_that_works_is_found_where_it_lies(inset: int) -> None:
    c = case(inset)
    m = MESA(size=2, updates=60, batch=16, lr=0.03, noise=8, hidden=8, betas=(0.5, 0.9), threshold=0.6)
    # Clean images are dark and get class 0 always.
    found = m.run(c)
    v = found.verdict
    assert v is not None
    assert v.label_scores.tolist()[2] == 0
    assert float(v.label_scores[1]) > 0.9
    assert found.chosen["places"][1] == [6 - inset, 6 - inset]
    claims = [i for i in found.inverted if i.target == 1]
    assert len(claims) == 12
    assert all(float(i.mask.sum()) == float(i.mask[0, c.net.at, c.net.at].sum()) == 4 for i in claims)
    worn = torch.cat([apply(i, c.val.images / 255) for i in claims])
    assert float((c.net(worn).argmax(1) == 1).float().mean()) > 0.9
    # Variety is what the entropy buys: no two patches are alike.
    assert len({tuple(i.pattern.flatten().tolist()) for i in claims}) == 12
    again = m.run(case(inset))
    assert torch.equal(again.inverted[-1].pattern, found.inverted[-1].pattern)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        MESA(noise=6)
    with pytest.raises(ValueError, match="betas"):
        MESA(betas=(0.5, 1.2))
    with pytest.raises(ValueError, match="does not fit"):
        MESA(size=9).check((3, 8, 8), 10)
