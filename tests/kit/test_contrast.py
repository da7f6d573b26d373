from __future__ import annotations

import colorsys
import math
from typing import Any

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench.kit import contrast as kit
from sleeperbench.kit.classifier import build
from sleeperbench.kit.contrast import Encoder, alone, contrastive, pretrain, view
from sleeperbench.kit.taps import features


def unit(n: int, seed: int) -> Tensor:
    z = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).double()
    return z / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_equals_a_double_loop(temperature: float) -> None:
    a, b, y = unit(7, 0), unit(7, 1), torch.tensor([0, 1, 0, 2, 1, 1, 3])
    z = [*a, *b]
    for positives in (torch.eye(7, dtype=torch.bool), y[:, None] == y, torch.tensor([True] * 3 + [False] * 4)[:, None]):
        wanted = (positives & (y[:, None] == y)) | torch.eye(7, dtype=torch.bool)
        total = 0.0
        for i in range(14):
            terms = []
            below = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(14) if k != i)
            for j in range(14):
                if j != i and bool(wanted[i % 7, j % 7]):
                    terms.append(-math.log(math.exp(float(z[i] @ z[j]) / temperature) / below))
            total += sum(terms) / len(terms)
        assert float(contrastive(a, b, wanted, temperature)) == pytest.approx(total / 14, rel=1e-5)


def test_the_loss_has_finite_gradients_and_pulls_views_together() -> None:
    a, b = unit(5, 0).requires_grad_(), unit(5, 1)
    loss = contrastive(a, b, alone(torch.zeros(5), torch.zeros(5)), 0.5)
    (up,) = torch.autograd.grad(loss, a)
    assert bool(up.isfinite().all()) and float(up.abs().sum()) > 0
    moved = torch.nn.functional.normalize((a - 0.1 * up).detach(), dim=1)
    assert float(contrastive(moved, b, torch.eye(5, dtype=torch.bool), 0.5)) < float(loss.detach())


def drawn(monkeypatch: pytest.MonkeyPatch, **numbers: float) -> None:
    """All draws of a view are these; the others leave the image as it is."""
    names = ["area", "ratio", "mirror", "x", "y", "jitter", "grey", "bright", "contrast", "saturation", "hue", "blur"]
    still = dict.fromkeys(names, 0.5) | {"area": 1.0, "mirror": 1.0, "jitter": 1.0, "grey": 1.0, "blur": 1.0}
    column = torch.tensor([*[*(still | numbers).values()][:12], numbers.get("sigma", 0.0)])
    rand = torch.rand
    monkeypatch.setattr(
        kit.torch, "rand", lambda *s, **k: column[:, None].expand(13, s[1]) if s[0] == 13 else rand(*s, **k)
    )


def colours(n: int = 3) -> Tensor:
    return 0.25 + 0.4 * torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_view_of_nothing_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gen = colours(), torch.Generator()
    drawn(monkeypatch)
    assert torch.allclose(view(x, gen, flip=True, blur=True), x, atol=1e-6)
    drawn(monkeypatch, jitter=0.0)
    assert torch.allclose(view(x, gen, flip=True, blur=True), x, atol=2e-3), "all factors are 1"


def test_crops_mirrors_and_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gen = colours(), torch.Generator()
    drawn(monkeypatch, mirror=0.0)
    assert torch.allclose(view(x, gen, flip=True, blur=False), x.flip(3), atol=1e-6)
    assert torch.allclose(view(x, gen, flip=False, blur=False), x, atol=1e-6)
    drawn(monkeypatch, grey=0.0)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert torch.allclose(view(x, gen, flip=False, blur=False), luma[:, None].expand(-1, 3, -1, -1), atol=1e-6)
    # A quarter of the area in the upper left corner: each of its pixels becomes two by two.
    drawn(monkeypatch, area=(0.25 - 0.2) / 0.8, x=0.0, y=0.0)
    found = view(x, gen, flip=False, blur=False)
    wanted = torch.nn.functional.interpolate(x[:, :, :5, :5], scale_factor=2, mode="bilinear")[:, :, :8, :8]
    assert torch.allclose(found[:, :, 1:7, 1:7], wanted[:, :, 1:7, 1:7], atol=1e-5)


def test_colours_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gen = colours(), torch.Generator()
    drawn(monkeypatch, jitter=0.0, bright=1.0)
    assert torch.allclose(view(x, gen, flip=False, blur=False), 1.4 * x, atol=2e-3)
    drawn(monkeypatch, jitter=0.0, contrast=0.0)
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    middle = luma.mean((2, 3), keepdim=True)
    assert torch.allclose(view(x, gen, flip=False, blur=False), middle + 0.6 * (x - middle), atol=2e-3)
    drawn(monkeypatch, jitter=0.0, saturation=0.0)
    assert torch.allclose(view(x, gen, flip=False, blur=False), luma + 0.6 * (x - luma), atol=2e-3)
    drawn(monkeypatch, jitter=0.0, hue=1.0)
    found = view(x, gen, flip=False, blur=False)
    new = 0.299 * found[:, :1] + 0.587 * found[:, 1:2] + 0.114 * found[:, 2:]
    assert torch.allclose(new, luma, atol=5e-3), "luma stays"
    a, b = (colorsys.rgb_to_hsv(*v[0, :, 0, 0].tolist())[0] for v in (x, found))
    assert 0.03 < min(abs(a - b), 1 - abs(a - b)) < 0.2, "about a tenth of the circle"
    drawn(monkeypatch, blur=0.0, sigma=0.5)
    found, s = view(x, gen, flip=False, blur=True), 0.1 + 1.9 * 0.5
    weights = [math.exp(-(d**2) / (2 * s * s)) for d in range(-3, 4)]
    total = sum(
        weights[i] * weights[j] * float(x[1, 2, min(7, max(0, 4 + i - 3)), min(7, max(0, 6 + j - 3))])
        for i in range(7)
        for j in range(7)
    )
    assert float(found[1, 2, 4, 6]) == pytest.approx(total / sum(weights) ** 2, abs=1e-5)


def test_views_differ_and_stay_images() -> None:
    x = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).expand(40, -1, -1, -1)
    found = view(x, torch.Generator().manual_seed(1), flip=True, blur=True)
    assert found.shape == x.shape and float(found.min()) >= 0 and float(found.max()) <= 1
    assert len({tuple(v.flatten()[:5].tolist()) for v in found}) == 40
    again = view(x, torch.Generator().manual_seed(1), flip=True, blur=True)
    assert torch.equal(found, again)
    assert view(x[:, :1], torch.Generator().manual_seed(1), flip=True, blur=True).shape == (40, 1, 12, 12)


def test_the_rate_rises_and_the_head_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = kit.TrainHooks.step

    def watched(self: Any, net: Any, opt: Any, *rest: Any) -> Any:
        rates.append(opt.param_groups[0]["lr"])
        return step(self, net, opt, *rest)

    monkeypatch.setattr(kit.TrainHooks, "step", watched)
    net, ctx = build(samples.SPEC, 0), samples.ctx()
    data = samples.digits()["train"].rows(torch.arange(96))
    recipe = kit.replace(samples.RECIPE, epochs=3, lr=0.1, batch=32, schedule="constant")
    head, first = net.body.head.weight.detach().clone(), features(net, data.images[:4])
    pretrain(net, data, recipe, ctx, temperature=0.5, positives=alone, blur=True, warm_epochs=2)
    wanted = [0.1 * (0.01 + 0.99 * i / 6) for i in range(6)] + [0.1] * 3
    assert rates == pytest.approx(wanted)
    assert torch.equal(net.body.head.weight, head) and net.body.head.weight.requires_grad
    assert not torch.allclose(features(net, data.images[:4]), first)
    assert ctx.cost.forwards == ctx.cost.backwards == 3 * 3 * 64


def test_learning_brings_views_together() -> None:
    net, ctx, data = build(samples.SPEC, 0), samples.ctx(), samples.digits()["train"].rows(torch.arange(128))
    x = data.images.float() / 255
    two = [view(x, torch.Generator().manual_seed(i), flip=False, blur=False) for i in (1, 2)]

    def loss(encoder: Encoder) -> float:
        with torch.no_grad():
            a, b = (encoder.train()(v) for v in two)  # by the statistics of these images
        return float(contrastive(a, b, torch.eye(128, dtype=torch.bool), 0.5))

    recipe = kit.replace(samples.RECIPE, epochs=6, lr=0.1, batch=64)
    trained = pretrain(net, data, recipe, ctx, temperature=0.5, positives=alone, blur=False)
    assert trained.net is net and not trained.training
    fresh = Encoder(build(samples.SPEC, 0), 128, ctx.derive("projection"))
    assert loss(trained) < loss(fresh) - 0.03
