from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench.contracts import ModelSpec, NotApplicable
from sleeperbench.defenses.npd import NAMES, NPD, Polarise, never, only_layer, place, polarised, runner_up
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.taps import taps


def case(n: int = 150, trained: bool = False) -> Any:
    rows = samples.digits()["pool"].rows(torch.arange(n))
    return SimpleNamespace(
        net=samples.clean_net() if trained else build(samples.SPEC, 3).eval(),
        clean=rows,
        tune=rows.rows(torch.arange(n - 120)),
        val=rows.rows(torch.arange(n - 120, n)),
        ctx=samples.ctx(9),
    )


class Linear(nn.Module):
    """logits = A x on 12 pixels, with A given."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.a.T


def linear(seed: int = 0) -> Linear:
    return Linear(torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)))


def test_the_perturbation_has_its_closed_form() -> None:
    """One step: delta = -step sign(A^T (p - e_yhat)), shortened to eps; no pixel leaves [0, 1] here."""
    net = linear()
    x = 0.5 + 0.1 * torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    aim = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    slope = (net(x).softmax(1) - F.one_hot(aim, 3)) @ net.a
    for eps, length in ((10.0, 0.1 * math.sqrt(12)), (0.2, 0.2)):
        found = Polarise(NPD(inner_steps=1), eps).search(net, x, aim).flatten(1)
        wanted = -slope.sign() * length / math.sqrt(12)
        assert torch.allclose(found, wanted, atol=1e-6)
        assert torch.allclose(found.norm(dim=1), torch.full((8,), length), atol=1e-6)
        # It moves towards the aim: the aim's probability rises in every row.
        rise = net(x + found.view_as(x)).softmax(1) - net(x).softmax(1)
        assert bool((rise.gather(1, aim[:, None]) > 0).all())


def test_the_search_ends_once_enough_are_reached() -> None:
    net = Linear(20 * torch.eye(3, 12))
    x, aim = torch.full((10, 3, 2, 2), 0.5), torch.ones(10, dtype=torch.int64)
    x[:, 0, 0, 1] = 0.45
    one = Polarise(NPD(inner_steps=1), 3.0).search(net, x, aim)
    assert torch.equal(Polarise(NPD(inner_steps=2), 3.0).search(net, x, aim), one), "all reached after one step"
    x[:5, 0, 0, 1] = 0.1  # half of them are too far
    one, two = (Polarise(NPD(inner_steps=k), 3.0).search(net, x, aim) for k in (1, 2))
    assert not torch.equal(one, two)
    assert float((net(x + one).argmax(1) == aim).float().mean()) == 0.5


def test_the_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    net = linear(3)
    gen = torch.Generator().manual_seed(4)
    x, y = torch.rand(20, 3, 2, 2, generator=gen), torch.randint(3, (20,), generator=gen)
    noise = 0.8 * torch.rand(x.shape, generator=gen) - 0.4
    monkeypatch.setattr(Polarise, "search", lambda *args: noise)
    found = Polarise(NPD(weights=(0.3, 0.5, 0.7)), 3.0).loss(net, x, y, y)
    expected = 0.0
    with torch.no_grad():
        plain, attacked = net(x).double(), net((x + noise).clamp(0, 1)).double()
        for i in range(20):
            p, q, c = plain[i].softmax(0), attacked[i].softmax(0), int(plain[i].argmax())
            others = [k for k in range(3) if k != int(y[i])]
            aim, r = max(others, key=lambda k: float(p[k])), max(others, key=lambda k: float(q[k]))
            expected -= math.log(p[y[i]]) + 0.3 * math.log(q[c])
            expected -= 0.5 * math.log(1.0001 - q[r]) + 0.7 * math.log(1.0001 - q[aim])
    assert float(found.detach()) == pytest.approx(expected / 20, rel=1e-5)
    # Each term counts, with its sign.
    for weights in ((0.0, 0.5, 0.7), (0.3, 0.0, 0.7), (0.3, 0.5, 0.0)):
        less = Polarise(NPD(weights=weights), 3.0).loss(net, x, y, y)
        assert float(less.detach()) < float(found.detach()) - 1e-3
    assert runner_up(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).tolist() == [2]
    half = never(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    assert float(half) == pytest.approx(-math.log(0.5001), rel=1e-5)


@pytest.mark.parametrize(
    ("arch", "args", "site", "channels"),
    [
        ("small_cnn", {"width": 4}, "body.stage2", 8),
        ("preact_resnet18", {}, "body.stage4.1.relu1", 512),
        ("small_resnet", {}, None, None),
    ],
)
def test_the_layer_stands_in_front_of_the_last_convolution_but_one(
    arch: str, args: Any, site: Any, channels: Any
) -> None:
    spec = ModelSpec(arch=arch, classes=10, shape=(1, 16, 16), norm=((0.5,), (0.5,)), args=args)
    net, rows = build(spec, 0).eval(), samples.digits()["pool"]
    found = place(net, rows, samples.ctx())
    if site is not None:
        assert found == (site, channels)
    x = to_float(rows.images[:3])
    with_layer = load(polarised(net, *found))
    assert torch.allclose(with_layer(x), net(x), atol=1e-3), "the identity, but for BatchNorm's epsilon"
    # The last convolution but one sees what the layer lets pass, and nothing in front of it does.
    conv = taps(net).spatial_convs[-2]
    seen: list[Tensor] = []
    with_layer.get_submodule(conv).register_forward_pre_hook(lambda m, i: seen.append(i[0].clone()))
    with torch.no_grad():
        with_layer(x)
        with_layer.wraps[-1].get_submodule("layer.1").bias.add_(1.0)
        with_layer(x)
    assert torch.allclose(seen[1], seen[0] + 1, atol=1e-4)


def test_nothing_but_the_layer_moves() -> None:
    c = case()
    before, state = pack(c.net).state, torch.random.get_rng_state()
    model = NPD(warm_steps=3, steps=4, batch=50).run(c).model
    assert model.spec.wraps[-1].kind == "insert" and model.spec.wraps[-1].site == "body.stage2"
    assert all(torch.equal(model.state[k], v) for k, v in before.items())
    assert all(torch.equal(before[k], v) for k, v in pack(c.net).state.items())
    added = {k: v for k, v in model.state.items() if k not in before}
    eye = torch.eye(16).view(16, 16, 1, 1)
    assert not torch.equal(added["wraps.0.layer.0.weight"], eye)
    assert float((added["wraps.0.layer.0.weight"] - eye).abs().max()) < 0.3
    # Statistics come from the warm-up's batches alone.
    assert int(added["wraps.0.layer.1.num_batches_tracked"]) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 3 * 50 + 4 * 50 * 4 <= c.ctx.cost.forwards - 1 <= 3 * 50 + 4 * 50 * 5
    again = NPD(warm_steps=3, steps=4, batch=50).run(case()).model
    assert all(torch.equal(again.state[k], v) for k, v in model.state.items())


def test_it_learns_to_resist_and_keeps_the_accuracy() -> None:
    c, test = case(trained=True), samples.digits()["test"].rows(torch.arange(200))
    settings = NPD(warm_steps=30, steps=60, batch=50, eps=1.0)
    first = load(NPD(warm_steps=30, steps=1, batch=50, eps=1.0, lr=1e-9).run(c).model)
    net = load(settings.run(c).model)
    x, y = to_float(test.images), test.labels

    def attacked(f: Any) -> float:
        aim = runner_up(f(x), y)
        return float((f((x + Polarise(settings, 1.0).search(f, x, aim)).clamp(0, 1)).argmax(1) == aim).float().mean())

    assert attacked(net) < attacked(first) - 0.1
    assert float((net(x).argmax(1) == y).float().mean()) > 0.85


def test_settings_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(net: Any, data: Any, **args: Any) -> Any:
        seen.append({"data": data, "trained": [n for n, p in net.named_parameters() if p.requires_grad], **args})
        return pack(net)

    monkeypatch.setattr("sleeperbench.defenses.npd.tune", fake)
    c = case()
    NPD().run(c)
    warm, main = seen
    names = ["wraps.0.layer.0.weight", "wraps.0.layer.1.weight", "wraps.0.layer.1.bias"]
    for part in seen:
        assert part["trained"] == names and part["data"] is c.clean
        assert part["batch"] == 128 and not part["augment"] and "schedule" not in part
    assert (warm["lr"], warm["steps"], warm["momentum"]) == (1e-4, 100, 0.0)
    assert (main["lr"], main["steps"], main["weight_decay"]) == (0.01, 1000, 5e-4) and "momentum" not in main
    s = main["hooks"].settings
    assert main["hooks"].eps == 3.0 and (s.step, s.inner_steps, s.enough, s.weights) == (0.1, 2, 0.6, (0.4, 0.4, 0.4))
    assert warm["ctx"].seed != main["ctx"].seed


def test_the_honest_bound_is_the_largest_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def tuned(self: Any, case: Any, rows: Any, eps: float, site: str, channels: int) -> Any:
        net = only_layer(load(polarised(case.net, site, channels)))
        with torch.no_grad():
            net.body.head.weight.mul_(0.0 if eps > 2 else 1.0)
        return pack(net)

    monkeypatch.setattr(NPD, "tuned", tuned)
    outcome = NPD(eps=None).run(case(trained=True))
    assert outcome.chosen["eps"] == 2.0 and outcome.model is outcome.path["eps=2"]
    assert list(outcome.path) == list(NAMES)


def test_what_does_not_fit_is_declined() -> None:
    for bad in ({"eps": 0.0}, {"weights": (1.0,)}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NPD.from_params(bad)
    net = build(samples.SPEC, 0)
    net.body.stage2, net.body.stage3, net.body.stage4 = (nn.Identity() for _ in range(3))
    with pytest.raises(NotApplicable, match="needs_conv"):
        place(net, samples.digits()["pool"], samples.ctx())
