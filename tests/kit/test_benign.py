from __future__ import annotations

from typing import Any

import pytest
import samples
import torch

from sleeperbench import Role
from sleeperbench.kit.benign import Effort, Generator, Inversion, Reversed, rounds, squash
from sleeperbench.kit.classifier import pack
from sleeperbench.kit.pixels import to_float

QUICK = Effort(pretrain=2, mask=2, generate=2, batch=32, width=4)


def inversion(net: Any = None, **effort: Any) -> Inversion:
    made = Effort(**{"pretrain": 2, "mask": 2, "generate": 2, "batch": 32, "width": 4} | effort)
    return Inversion(net or samples.badnets_net(), samples.digits()["pool"], samples.ctx(4), made)


def test_the_mask_lies_between_none_and_all() -> None:
    assert torch.allclose(squash(torch.tensor([0.0, 100.0, -100.0])), torch.tensor([0.5, 1.0, 0.0]), atol=1e-6)


def test_the_mask_keeps_what_labels_need_and_its_complement_loses_them() -> None:
    inv = inversion(mask=60)
    start, mask = inversion(mask=0).benign(), inv.benign()
    x, y = to_float(inv.images), inv.labels

    def loss(part: torch.Tensor) -> float:
        with inv._through(part), torch.no_grad():
            return float(torch.nn.functional.cross_entropy(inv.net(x), y))

    assert float(mask.min()) > 0 and float(mask.max()) < 1
    assert loss(mask) < loss(start) and loss(1 - mask) > loss(1 - start)


def test_features_are_those_of_the_last_stage_and_the_hook_goes() -> None:
    inv = inversion()
    x = to_float(inv.images[:3])
    features, logits = inv._features(x)
    body = inv.net.body
    expected = body.stage4(body.stage3(body.stage2(body.stage1((x - inv.net.mean) / inv.net.std))))
    assert torch.allclose(features, expected, atol=1e-6) and torch.equal(logits, inv.net(x))
    assert not inv.net.get_submodule(inv.site)._forward_hooks


def test_pictures_are_in_range_and_gradients_pass_the_cut() -> None:
    generator = Generator(1, 4)
    with torch.no_grad():
        generator.net.last.bias.fill_(9.0)
    x = torch.rand(2, 1, 16, 16)
    out = generator(x)
    assert float(out.detach().max()) == 1.0 and float(out.detach().min()) >= 0.0
    out.sum().backward()
    assert float(generator.net.last.bias.grad) == 2 * 256


def test_pre_training_brings_the_image_back() -> None:
    inv = inversion(pretrain=60)
    x = to_float(inv.images[:50])
    before = float(inv._apart(x, inv.generator(x)).detach())
    inv.pretrain()
    assert float(inv._apart(x, inv.generator.train()(x)).detach()) < 0.7 * before


def test_beyond_the_bound_the_generator_only_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound of 0 every update is one of the image's distance alone."""
    inv = inversion(generate=60, bound=0.0)
    x = to_float(inv.images[:50])
    before = float(inv._apart(x, inv.generator(x)).detach())
    inv.look(samples.badnets_net())
    assert float(inv._apart(x, inv.generator.train()(x)).detach()) < 0.7 * before


@pytest.mark.parametrize("bound", [0.0, 1e9])
def test_a_known_target_pulls_on_either_side_of_the_bound(bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inv = inversion(bound=bound)
    half = torch.full_like(inv._features(to_float(inv.images[:1]))[0], 0.5)
    monkeypatch.setattr(inv, "benign", lambda: half)
    inv.target = 3
    net, found = samples.badnets_net(), list[Any]()
    monkeypatch.setattr(inv, "_train", lambda opt, steps, name, loss: found.append(loss))
    inv.look(net)
    x, y = to_float(inv.images[:20]), inv.labels[:20]
    weights = list(inv.generator.train().parameters())
    got = torch.autograd.grad(found[0](x, y), weights)
    made = inv.generator(x)
    before, after = inv._features(x)[0].detach(), inv._features(made)[0]
    if bound == 0:
        rest = ((x - made) / net.std).square().mean()
    else:
        rest = 0.01 * (0.5 * (after - before)).square().mean() - (0.5 * (after - before)).square().mean()
    towards = -net(made).log_softmax(1)[:, 3].mean()
    wanted = torch.autograd.grad(rest + towards, weights)
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, rtol=1e-3, atol=1e-4 * float(w.abs().max()) + 1e-7)


def test_one_adam_moves_the_generator_from_look_to_look() -> None:
    """Pre-training has its own."""
    inv = inversion(generate=2)
    first = next(inv.generator.parameters())
    inv.pretrain()
    assert not inv._against.state
    for seen in (2, 4):
        inv.look(samples.badnets_net())
        assert int(inv._against.state[first]["step"]) == seen


def test_within_the_bound_the_other_features_move(monkeypatch: pytest.MonkeyPatch) -> None:
    inv = inversion(generate=60, bound=1e9)
    half = torch.full_like(inv._features(to_float(inv.images[:1]))[0], 0.5)
    monkeypatch.setattr(inv, "benign", lambda: half)
    x = to_float(inv.images[:50])

    def moved() -> float:
        with torch.no_grad():
            made = inv.generator.train()(x)
            return float((inv._features(made)[0] - inv._features(x)[0]).square().mean())

    before = moved()
    inv.look(samples.badnets_net())
    assert moved() > before


def test_the_target_is_the_commonest_answer_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    inv = inversion()
    trigger = samples.badnets()
    gen = samples.ctx(0).generator("x")

    class Stamps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.full((len(x),), 5)
            return trigger.triggers[0].apply(x, y, y, Role.TEST, gen)

    inv.generator = Stamps()
    target, share = inv._most_frequent()
    assert target == 0 and share > 0.9
    inv.target = 7
    monkeypatch.setattr(inv, "_train", lambda *a, **k: None)
    inv.look(samples.badnets_net())
    assert inv.target == 7


def test_no_classifier_changes_and_images_are_counted() -> None:
    net = samples.badnets_net()
    before = pack(net).state
    ctx = samples.ctx(4)
    inv = Inversion(net, samples.digits()["pool"], ctx, QUICK)
    inv.pretrain()
    inv.look(net)
    assert all(torch.equal(before[k], v) for k, v in pack(net).state.items())
    assert all(p.requires_grad for p in net.parameters())
    assert ctx.cost.forwards == 3 * 2 * 2 * 32 + 150 and ctx.cost.backwards == (2 + 4 + 2) * 32


def test_part_of_a_batch_is_replaced_and_marked() -> None:
    x, y = torch.rand(10, 1, 4, 4), torch.arange(10)
    hooks = Reversed(torch.nn.Hardtanh(0.5, 0.5 + 1e-9), 0.2)
    made, labels, mark = hooks.batch(x, y, y, 0)
    assert mark.tolist() == [1] * 3 + [0] * 7
    assert torch.allclose(made[:3], torch.full((3, 1, 4, 4), 0.5)) and torch.equal(made[3:], x[3:])
    assert torch.equal(labels, y)


def test_rounds_go_on_from_the_repaired_network_with_the_same_generator() -> None:
    seen: list[Any] = []

    def repair(net: Any, inv: Inversion, ctx: Any) -> Any:
        seen.append((pack(net).state["body.head.bias"].clone(), inv.generator, ctx.seed))
        with torch.no_grad():
            net.body.head.bias.add_(1)
        return pack(net)

    net = samples.badnets_net()
    start = net.body.head.bias.detach().clone()
    import copy

    list(rounds(copy.deepcopy(net), samples.digits()["pool"], samples.ctx(4), QUICK, 2, repair))
    assert torch.equal(seen[0][0], start) and torch.allclose(seen[1][0], start + 1)
    assert seen[0][1] is seen[1][1] and seen[0][2] != seen[1][2]
