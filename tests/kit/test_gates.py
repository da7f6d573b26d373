from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.gates import Gates, channels, pruned

ARCHS = ("small_cnn", "small_resnet", "wrn28_2", "timm:mobilenetv2_035")


def net_of(arch: str = "small_cnn", size: int = 16) -> Classifier:
    """With gammas, betas and running statistics that are not those of a new network."""
    made = build(ModelSpec(arch=arch, classes=4, shape=(3, size, size), norm=((0.4,) * 3, (0.3,) * 3)), 1).eval()
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(torch.rand(m.weight.shape, generator=gen) + 0.5)
                m.bias.copy_(torch.rand(m.bias.shape, generator=gen) - 0.5)
                m.running_mean.copy_(torch.rand(m.bias.shape, generator=gen) - 0.5)
    return made


def draw(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def ctx() -> Ctx:
    return Ctx(seed=0, recipe=Recipe(), scratch=Path("unused"))


def norms(net: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    return [(name, m) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]


def edited(net: Classifier, gamma: Callable[[int, float], float], beta: Callable[[int, float], float]) -> Classifier:
    """A copy, each channel's gamma and beta rewritten one by one from its flat number."""
    made, k = copy.deepcopy(net).eval(), 0
    with torch.no_grad():
        for _, m in norms(made):
            m.train()
            for c in range(m.num_features):
                m.weight[c] = gamma(k, float(m.weight[c]))
                m.bias[c] = beta(k, float(m.bias[c]))
                k += 1
    return made


@pytest.mark.parametrize("arch", ARCHS)
def test_channels_are_those_of_all_batchnorm_layers_in_order(arch: str) -> None:
    net = net_of(arch)
    expected = [(name, m.num_features) for name, m in norms(net)]
    assert list(channels(net).items()) == expected
    assert Gates(net, ctx()).size == sum(n for _, n in expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_gates_equal_weights_edited_one_by_one(arch: str) -> None:
    net, x = net_of(arch).double(), draw(3, 6, 3, 16, 16).double()
    gates = Gates(net, ctx())
    mask, delta, xi = (draw(s, gates.size).double() - shift for s, shift in ((4, 0), (5, 0.5), (6, 0.5)))
    by_hand = edited(net, lambda k, g: g * float(mask[k] + delta[k]), lambda k, b: b * float(1 + xi[k]))
    with torch.no_grad():
        assert torch.allclose(gates(x, mask, delta, xi), by_hand(x), atol=1e-8)
        masked = edited(net, lambda k, g: g * float(mask[k]), lambda k, b: b)
        assert torch.allclose(gates(x, mask), masked(x), atol=1e-8)
        only_xi = edited(net, lambda k, g: g * float(mask[k]), lambda k, b: b * float(1 + xi[k]))
        assert torch.allclose(gates(x, mask, xi=xi), only_xi(x), atol=1e-8)


def test_gradients_equal_finite_differences() -> None:
    net = net_of().double()
    x, y = draw(3, 8, 3, 16, 16).double(), torch.arange(8) % 4
    gates = Gates(net, ctx())
    parts = [(draw(s, gates.size) - shift).double().requires_grad_() for s, shift in ((4, -0.5), (5, 0.5), (6, 0.5))]

    def loss(*given: Tensor) -> Tensor:
        return nn.functional.cross_entropy(gates(x, *given), y)

    found = torch.autograd.grad(loss(*parts), parts)
    step = 1e-6
    for which in range(3):
        for k in torch.linspace(0, gates.size - 1, 12).long().tolist():
            values = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in parts]
                moved[which][k] += sign * step
                values.append(float(loss(*moved)))
            assert float(found[which][k]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)
    assert all(float(g.abs().sum()) > 0 for g in found)


def test_the_network_stays_as_it_was_and_nothing_is_drawn() -> None:
    net = net_of()
    net.body.stage1.append(nn.Dropout(0.5))
    net.train()
    before, state = pack(net).state, torch.get_rng_state()
    gates = Gates(net, ctx())
    mask = torch.ones(gates.size, requires_grad=True)
    x = draw(3, 6, 3, 16, 16)
    first = gates(x, mask)
    first.sum().backward()
    assert torch.equal(first, gates(x, mask)), "dropout is off, and running statistics take no part"
    assert all(torch.equal(before[k], v) for k, v in pack(net).state.items())
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    pruned(net, torch.zeros(gates.size, dtype=torch.bool))
    assert all(torch.equal(before[k], v) for k, v in pack(net).state.items())


def test_costs_count_images_forth_and_back() -> None:
    c = ctx()
    gates = Gates(net_of(), c)
    mask = torch.ones(gates.size, requires_grad=True)
    with torch.no_grad():
        gates(draw(3, 5, 3, 16, 16), mask)
    assert (c.cost.forwards, c.cost.backwards) == (5, 0)
    gates(draw(3, 7, 3, 16, 16), mask).sum().backward()
    assert (c.cost.forwards, c.cost.backwards) == (12, 7)
    assert not gates(draw(3, 2, 3, 16, 16), mask.detach()).requires_grad, "no weight wants a gradient"


@pytest.mark.parametrize("arch", ARCHS)
def test_pruning_sets_gammas_to_zero_and_nothing_else(arch: str) -> None:
    net = net_of(arch)
    keep = draw(7, sum(channels(net).values())) > 0.3
    before, after = pack(net).state, pack(pruned(net, keep)).state
    start = 0
    for name, n in channels(net).items():
        kept = keep[start : start + n]
        gamma = before.pop(f"{name}.weight")
        assert torch.equal(after.pop(f"{name}.weight"), torch.where(kept, gamma, 0.0))
        start += n
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert before.keys() == after.keys()


def test_a_pruned_channel_answers_its_beta() -> None:
    net = net_of()
    keep = torch.ones(sum(channels(net).values()), dtype=torch.bool)
    keep[3] = False
    layer = pruned(net, keep).body.stage1[1]
    out = layer(draw(8, 2, 16, 5, 5)).detach()
    assert torch.equal(out[:, 3], torch.full((2, 5, 5), layer.bias[3].item()))
    assert float(out[:, 2].std()) > 0.1


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(NotApplicable, match=r"^needs_bn$"):
        channels(net_of("timm:vit_tiny_patch16_224", 32))
    net = net_of()
    for name, m in norms(net):
        stage = net.get_submodule(name.rpartition(".")[0])
        stage[1] = nn.BatchNorm2d(m.num_features, affine=False)
    with pytest.raises(NotApplicable, match=r"^needs_bn$"):
        Gates(net, ctx())
    for keep in (torch.ones(4) > 0, torch.ones(sum(channels(net_of()).values()))):
        with pytest.raises(ValueError, match="keep must be bool"):
            pruned(net_of(), keep)
