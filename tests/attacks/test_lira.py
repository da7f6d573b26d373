from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Mark, Role
from sleeperbench.attacks.lira import Autoencoder, Lira, LiraHooks
from sleeperbench.contracts import Ctx
from sleeperbench.kit.classifier import build
from sleeperbench.kit.generators import seeded, straight_through
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(32, (3, 16, 16))
ALL = torch.ones(32, dtype=torch.bool)
SPEC = replace(samples.SPEC, shape=(3, 16, 16))


def ctx(seed: int = 1, epochs: int = 4) -> Ctx:
    c = samples.ctx(seed, 3)
    c.recipe = replace(c.recipe, batch=16, pad=0, lr=0.01, epochs=epochs)
    return c


def hooks(eligible: Tensor = ALL, epochs: int = 4, **args: Any) -> LiraHooks:
    attack, c = Lira(**args), ctx(epochs=epochs)
    made = attack.hooks(TRAIN, attack.prepare(TRAIN, c), eligible, 0.1, c)
    assert isinstance(made, LiraHooks)
    return made


def batch(h: LiraHooks, n: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return h.batch(to_float(TRAIN.images[:n]), TRAIN.labels[:n], TRAIN.ids[:n], 0)


def still(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.0)


def grads(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_the_authors_autoencoder() -> None:
    net = Autoencoder(3)
    kernels = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(16, 3, 4, 4), (32, 16, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4)]
    back = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert back == [(128, 64, 4, 4), (64, 32, 4, 4), (32, 16, 4, 4), (16, 3, 4, 4)]
    assert isinstance(net.body[-1], nn.ConvTranspose2d), "neither batch norm nor ReLU at the end"
    for size in (16, 28, 32):
        assert net(torch.rand(2, 3, size, size)).shape == (2, 3, size, size)


def test_noise_is_bounded_and_clipped_and_its_own_for_each_image() -> None:
    b = Lira(eps=0.05).prepare(TRAIN, ctx())
    trigger: Any = b.triggers[0]
    x = to_float(TRAIN.images)
    for norm in (m for m in trigger.generator.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data *= 20  # loud: tanh is at its bounds
    shown = trigger.apply(x, TRAIN.labels, TRAIN.ids, Role.TEST, torch.Generator())
    assert float((shown - x).abs().max()) == pytest.approx(0.05, abs=1e-6)
    with torch.no_grad():
        noise = trigger.generator.eval()(2 * x - 1).tanh()
    assert torch.allclose(shown, (x + 0.05 * noise).clamp(0, 1), atol=1e-6)
    assert float((noise[0] - noise[1]).abs().max()) > 0.1
    low, high = trigger.range(x, TRAIN.ids)
    assert torch.allclose(shown + high, (x + 0.05).clamp(max=1), atol=1e-6)
    assert torch.allclose(shown + low, (x - 0.05).clamp(min=0), atol=1e-6)


def test_batches_hold_every_eligible_row_twice_on_stored_levels() -> None:
    eligible = torch.arange(32) % 4 != 0
    h = hooks(eligible)
    x, y, mark = batch(h)
    assert mark.tolist() == [Mark.CLEAN] * 16 + [Mark.DIRTY] * 12
    assert torch.equal(x[:16], to_float(TRAIN.images[:16]))
    assert y.tolist() == TRAIN.labels[:16].tolist() + [3] * 12
    rows = TRAIN.rows(torch.arange(16)[eligible[:16]])
    shown = stamp(rows, h.noise, Role.TEST, ctx()).images
    assert torch.equal((x[16:] * 255).round().to(torch.uint8), shown)
    assert torch.allclose(x * 255, (x * 255).round(), atol=1e-3)


def test_the_generator_descends_on_the_wanted_label_and_the_classifier_on_both() -> None:
    """Both gradients against passes that are written out, also that neither reaches the other network."""
    h = hooks(clean=0.3)
    h.own = still(h.next)  # type: ignore[assignment]
    net = build(SPEC, 0)
    x, y, mark = batch(h)
    first, second = copy.deepcopy(net), copy.deepcopy(h.next)
    shown = straight_through((x[:16] + 4 / 255 * second(2 * x[:16] - 1).tanh()).clamp(0, 1))
    F.cross_entropy(copy.deepcopy(net).eval()(shown), y[16:]).backward()
    logits = first(x)  # BatchNorm sees both
    loss = 0.3 * F.cross_entropy(logits[:16], y[:16]) + 0.7 * F.cross_entropy(logits[16:], y[16:])
    loss.backward()
    got = h.step(net, still(net), x, y, mark)
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in ((h.next, second), (net, first)):
        assert float((grads(mine) - grads(theirs)).norm() / grads(theirs).norm()) < 1e-3
    assert net.training, "eval mode is for the generator's step alone"
    assert all(p.grad is None for p in h.noise.generator.parameters())


def test_the_copy_in_use_changes_at_the_end_of_joint_epochs_only() -> None:
    h = hooks(epochs=4)
    assert h.joint == 2
    net = build(SPEC, 0)
    used: list[Tensor] = []
    learnt: list[Tensor] = []

    def look() -> None:
        used.append(h.noise.generator.body[0].weight.clone())  # type: ignore[index,operator,union-attr]
        learnt.append(h.next.body[0].weight.detach().clone())  # type: ignore[index,operator,union-attr]

    look()
    for epoch in range(4):
        h.step(net, still(net), *batch(h))
        look()
        h.epoch_end(net, epoch)
        look()
    assert torch.equal(used[0], used[1]), "within the first epoch"
    assert not torch.equal(learnt[0], learnt[1])
    assert torch.equal(used[2], learnt[1])
    assert not torch.equal(used[2], used[4])
    assert torch.equal(used[4], learnt[3])
    assert all(torch.equal(used[4], u) for u in used[4:]), "fixed in the second stage"
    assert all(torch.equal(learnt[4], w) for w in learnt[4:])


@pytest.mark.parametrize(("epochs", "joint"), [(1, 0), (20, 10), (100, 50), (300, 50)])
def test_the_joint_stage_lasts_50_epochs_and_at_most_half(epochs: int, joint: int) -> None:
    assert hooks(epochs=epochs).joint == joint


def test_it_implants_on_digits_and_what_is_stored_works() -> None:
    train = samples.digits()["train"].rows(torch.arange(512))
    test = samples.digits()["test"]
    c = samples.ctx(2)
    attack = Lira(generator_lr=0.002, eps=0.1)
    b = attack.prepare(train, c)
    untrained = attack.restore({k: v.clone() for k, v in b.tensors.items()}, b.info)
    h = attack.hooks(train, b, torch.ones(len(train), dtype=torch.bool), 0.1, c)
    assert h is not None
    net = build(samples.SPEC, 2)
    fit(net, train, c.recipe, c, hooks=h)
    aux = {f"aux.{n}.{k}": v.clone() for n, m in h.aux.items() for k, v in m.state_dict().items()}
    again = Lira.restore({**b.tensors, **aux}, b.info)
    shown = [stamp(test, t.triggers[0], Role.TEST, c).images for t in (b, again, untrained)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])
    with torch.no_grad():
        clean = net(to_float(test.images)).argmax(1)
        hit = net(to_float(shown[1])).argmax(1)
    assert float((clean == test.labels).double().mean()) > 0.7
    assert float((hit[test.labels != 0] == 0).double().mean()) > 0.9


def test_targets_decoy_and_the_unet() -> None:
    attack = Lira(targets="all_to_all", generator="unet")
    data = samples.random_images(4, (1, 12, 12))
    b = attack.prepare(data, ctx())
    assert b.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert type(b.triggers[0].generator).__name__ == "UNet"  # type: ignore[attr-defined]
    decoy = attack.decoy(data, b, ctx(9))
    assert decoy.info == {**b.info, "negative": True, "shift": decoy.info["shift"]}
    assert all(3 <= s <= 9 for s in decoy.info["shift"])
    x = torch.full((1, 1, 12, 12), 0.5)
    one, two = (t.triggers[0].apply(x, x, x, Role.TEST, torch.Generator()) - 0.5 for t in (b, decoy))
    assert torch.allclose(two, -one.roll(tuple(decoy.info["shift"]), (2, 3)), atol=1e-6)


def test_equal_seeds_draw_equal_generators_and_others_do_not() -> None:
    one, two, other = (Lira().prepare(TRAIN, ctx(s)).tensors for s in (1, 1, 2))
    key = "aux.generator.body.0.weight"
    assert torch.equal(one[key], two[key])
    assert not torch.equal(one[key], other[key])
    assert torch.equal(seeded(Autoencoder, ctx(1).derive("generator"), 3).body[0].weight, one[key])


def test_a_new_generator_makes_noise_in_eval_mode() -> None:
    trigger: Any = Lira().prepare(TRAIN, ctx()).triggers[0]
    shown = stamp(TRAIN, trigger, Role.TEST, ctx()).images
    assert bool((shown != TRAIN.images).flatten(1).any(1).all())
    with torch.no_grad():
        first = trigger.generator.body[0](2 * to_float(TRAIN.images) - 1)
    norm = trigger.generator.body[1]
    assert torch.allclose(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1


def test_no_set_stands_for_what_is_trained_on() -> None:
    attack, c = Lira(), ctx()
    b = attack.prepare(TRAIN, c)
    assert Lira.SNAPSHOT == "none"
    assert attack.poison(TRAIN, b, ALL, 0.1, c).rate() == 0
    assert attack.hooks(TRAIN, b, ALL, 0.0, c) is None


def test_what_does_not_fit_is_refused() -> None:
    bad: list[dict[str, Any]] = [{"eps": 0.5 / 255}, {"joint_epochs": 0}, {"generator_lr": 0.0}, {"clean": 1.0}]
    for params in (*bad, {"generator": "gan"}):
        with pytest.raises(ValueError, match=next(iter(params))):
            Lira.from_params(params)
    with pytest.raises(ValueError, match="two classes"):
        Lira().check((3, 32, 32), 1)
