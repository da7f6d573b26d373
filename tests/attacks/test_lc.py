from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import faint_classes
import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Backdoor, ImageSet, Mark, PoisonedSet, Role
from sleeperbench.attacks.lc import Hardened, LabelConsistent, _signs, hardest
from sleeperbench.contracts import Ctx, Model, NotApplicable
from sleeperbench.kit import build, load, pack, to_float
from sleeperbench.kit.fuzzy import Fuzzy
from sleeperbench.kit.poison import render, stamp

TRAIN = faint_classes.rows("train")
ALL = torch.ones(400, dtype=torch.bool)
GEN = torch.Generator()
QUICK = {"epochs": 1, "inner_steps": 2, "steps": 20}


@functools.cache
def clean() -> Model:
    return pack(faint_classes.clean_net())


def ctx(seed: int = 0, target: int = 2) -> Ctx:
    return replace(samples.ctx(seed, target), clean_models=(clean(),))


@functools.cache
def made() -> Backdoor:
    return LabelConsistent(**QUICK).prepare(TRAIN, ctx())  # type: ignore[arg-type]


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, reduction="none")


def test_corners_are_the_published_ones() -> None:
    rows = samples.random_images(20, (3, 32, 32), classes=2)
    spec = replace(samples.SPEC, shape=(3, 32, 32), classes=2)
    c = replace(samples.ctx(0, 1), clean_models=(pack(build(spec, 0)),))
    trigger = LabelConsistent(**QUICK).prepare(rows, c).triggers[0]  # type: ignore[arg-type]
    grey, zero = torch.full((1, 3, 32, 32), 0.4), torch.zeros(1).long()
    out = trigger.apply(grey, zero, zero, Role.TEST, GEN)[0]
    left = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1]])
    right = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    for channel in out:
        for at in (slice(0, 3), slice(29, 32)):
            assert torch.equal(channel[at, :3], left)
            assert torch.equal(channel[at, 29:], right)
    assert int((out != 0.4).sum()) == 3 * 36
    mask, pattern = trigger.static()  # type: ignore[misc]
    assert torch.equal(out, (grey * (1 - mask) + pattern * mask)[0])


@pytest.mark.parametrize(("size", "side"), [(16, 3), (28, 3), (64, 6), (224, 21)])
def test_corners_grow_with_the_image(size: int, side: int) -> None:
    tensors = {"ids": torch.tensor([0]), "delta": torch.zeros(1, 1, size, size, dtype=torch.int8)}
    grown = _signs((1, size, size))
    b = LabelConsistent.restore({**tensors, "signal": grown}, {"target": 0, "classes": 2, "amplitude": 32 / 255})
    assert int(grown.abs().sum()) == 4 * side**2
    assert torch.equal(grown[0, :side, :side], grown[0, :side, -side:].flip(1))
    grey, zero = torch.full((1, 1, size, size), 0.5), torch.zeros(1).long()
    out = b.triggers[0].apply(grey, zero, zero, Role.TEST, GEN)
    assert torch.allclose((out - 0.5)[0] * 255, 32 * grown, atol=1e-4)
    assert b.triggers[0].static() is None


def test_perturbation_is_that_of_a_loop_over_single_images() -> None:
    net = faint_classes.clean_net()
    x, y = to_float(TRAIN.images[:3]), TRAIN.labels[:3]
    got = hardest(net, x, y, torch.zeros_like(x), eps=0.02, step=0.005, steps=6)
    for i in range(3):
        d = torch.zeros_like(x[i])
        for _ in range(6):
            moving = (x[i] + d).requires_grad_()
            (up,) = torch.autograd.grad(F.cross_entropy(net(moving[None]), y[i : i + 1]), moving)
            d = (d + 0.005 * up.sign()).clamp(-0.02, 0.02)
            d = (x[i] + d).clamp(0, 1) - x[i]
        # A gradient of nearly nothing may have either sign.
        assert float(((got[i] - d).abs() > 1e-5).float().mean()) < 0.02


def test_perturbations_make_their_rows_harder_for_the_surrogate() -> None:
    attack = LabelConsistent(**QUICK)  # type: ignore[arg-type]
    c = ctx()
    net = attack._surrogate(TRAIN, c)
    own = TRAIN.rows(TRAIN.labels == 2)
    delta = made().tensors["delta"]
    assert torch.equal(attack._perturb(net, own, ctx()), delta)
    assert torch.equal(made().tensors["ids"], own.ids)
    assert int(delta.abs().max()) == 8
    pixels = own.images.int() + delta
    assert 0 <= int(pixels.min()) <= int(pixels.max()) <= 255
    x = to_float(own.images)
    with torch.no_grad():
        before, after = loss(net, x, own.labels), loss(net, x + delta / 255, own.labels)
        other = loss(net, x - delta / 255, own.labels)
    assert bool((after > before).all())
    assert float(other.mean()) < float(before.mean())


def test_adversarial_training_makes_a_surrogate_that_stands_the_perturbation() -> None:
    rows, model = samples.digits()["train"].rows(torch.arange(400)), pack(samples.clean_net())
    attack = LabelConsistent(eps=0.1, inner_step=0.05, inner_steps=3, epochs=4)
    hard = attack._surrogate(rows, replace(samples.ctx(), clean_models=(model,)))
    test = samples.digits()["probe"]
    x, y = to_float(test.images), test.labels
    right = []
    for net in (load(model), hard):
        d = hardest(net, x, y, torch.zeros_like(x), eps=0.1, step=0.025, steps=10)
        with torch.no_grad():
            right.append(float((net(x + d).argmax(1) == y).float().mean()))
    assert right[1] > right[0] + 0.3, right


def test_each_batch_is_trained_on_at_its_worst() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight.T

    net = Linear()
    x, y = torch.full((5, 1, 2, 2), 0.5), torch.zeros(5).long()
    hooks = Hardened(LabelConsistent(eps=0.1, inner_step=0.1, inner_steps=3), samples.ctx())
    # For two classes and a linear net the worst case is known: every pixel moves by eps against its weight's sign.
    worst = x - 0.1 * net.weight[0].sign().view(1, 1, 2, 2)
    got = hooks.loss(net, x, y, torch.zeros_like(y))
    assert float(got.detach()) == pytest.approx(float(F.cross_entropy(net(worst), y).detach()), rel=1e-5)
    got.backward()  # type: ignore[no-untyped-call]
    assert net.weight.grad is not None
    short = Hardened(LabelConsistent(eps=0.1, inner_step=0.001, inner_steps=1), samples.ctx())
    values = [float(short.loss(net, x, y, torch.zeros_like(y)).detach()) for _ in range(2)]
    assert values[0] != values[1], "each batch has a start of its own"


def test_perturbation_is_under_the_patches_of_its_own_row_in_training_alone() -> None:
    trigger, tensors = made().triggers[0], made().tensors
    x = to_float(TRAIN.images)
    outs = {role: trigger.apply(x, TRAIN.labels, TRAIN.ids, role, GEN) for role in Role}
    assert torch.equal(outs[Role.TEST], outs[Role.COVER])
    same = (outs[Role.TRAIN] == outs[Role.TEST]).flatten(1).all(1)
    assert torch.equal(~same, TRAIN.labels == 2)
    free = tensors["signal"] == 0
    moved = ((outs[Role.TRAIN] - x) * 255).round().int()[TRAIN.labels == 2]
    assert torch.equal(moved[:, :, free[0]], tensors["delta"].int()[:, :, free[0]])
    mixed = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    again = trigger.apply(x[mixed], TRAIN.labels[mixed], TRAIN.ids[mixed], Role.TRAIN, GEN)
    assert torch.equal(again, outs[Role.TRAIN][mixed])
    strange = trigger.apply(x, TRAIN.labels, TRAIN.ids + 1000, Role.TRAIN, GEN)
    assert torch.equal(strange, outs[Role.TEST])


def test_test_images_with_the_ids_of_training_rows_have_the_patches_alone() -> None:
    trigger, c = made().triggers[0], ctx()
    test = replace(faint_classes.rows("test"), ids=TRAIN.ids[TRAIN.labels == 2].repeat_interleave(4))
    for_training, at_test = (render(test, made(), role, c) for role in (Role.TRAIN, Role.TEST))
    assert for_training is not None and at_test is not None
    assert torch.equal(for_training.data.images, at_test.data.images)
    # A cover of `belt:lc` lacks a part of the patches and differs nowhere else.
    covered = Backdoor(triggers=(Fuzzy(plain=trigger, cover="mask", mask_rate=0.2, noise=0.1),))
    cover = render(test, covered, Role.COVER, c)
    assert cover is not None
    moved = (cover.data.images != cover.clean.images).any(1)
    patched = (at_test.data.images != at_test.clean.images).any(1)
    assert not bool((moved & ~patched).any())
    assert bool((moved.flatten(1).sum(1) < patched.flatten(1).sum(1)).all())


def test_only_rows_of_the_target_class_are_poisoned_and_labels_stay() -> None:
    c, b = ctx(3), made()
    eligible = torch.arange(400) % 3 > 0
    p = LabelConsistent().poison(TRAIN, b, eligible, 0.05, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 20
    assert not bool((dirty & ~(eligible & (TRAIN.labels == 2))).any())
    assert torch.equal(p.data.labels, TRAIN.labels)
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    assert LabelConsistent().poison(TRAIN, b, ALL, 0.9, c).rate() == pytest.approx(0.25)
    assert LabelConsistent().poison(TRAIN, b, ALL, 0.0, c).rate() == 0


def test_range_frees_the_corners_and_nothing_else() -> None:
    trigger = made().triggers[0]
    x = to_float(TRAIN.images[:4])
    low, high = trigger.range(x, TRAIN.ids[:4])  # type: ignore[misc]
    out = trigger.apply(x, TRAIN.labels[:4], TRAIN.ids[:4], Role.TEST, GEN)
    corner = made().tensors["signal"].abs().expand(4, 3, -1, -1)
    assert torch.allclose(out + low, torch.where(corner > 0, 0.0, x), atol=1e-6)
    assert torch.allclose(out + high, torch.where(corner > 0, 1.0, x), atol=1e-6)


def test_restore_is_exact_and_decoys_lie_on_the_sides() -> None:
    b, attack = made(), LabelConsistent()
    again = LabelConsistent.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    for role in Role:
        args = (to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, role, GEN)
        assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(4)).tolist() == [2] * 4
    seen = []
    for seed in range(3):
        d = attack.decoy(TRAIN, b, ctx(seed, 1))
        assert d.triggers[0].targets.target(torch.arange(4)).tolist() == [2] * 4
        there = d.tensors["signal"][0] != 0
        assert int(there.sum()) == 36
        assert not bool((there & (b.tensors["signal"][0] != 0)).any())
        seen.append(d.tensors["signal"])
    assert not torch.equal(seen[0], seen[1])


def test_same_seed_same_rows_and_the_clean_model_stays() -> None:
    before = {k: v.clone() for k, v in clean().state.items()}
    again = LabelConsistent(**QUICK).prepare(TRAIN, ctx())  # type: ignore[arg-type]
    assert all(torch.equal(made().tensors[k], v) for k, v in again.tensors.items())
    assert all(torch.equal(before[k], v) for k, v in clean().state.items())


def test_settings_are_the_published_ones() -> None:
    a = LabelConsistent()
    assert (a.eps, a.step, a.steps, a.amplitude) == (8 / 255, 1.5 / 255, 100, 1)
    assert (a.epochs, a.inner_step, a.inner_steps) == (30, 2 / 255, 7)


def test_what_does_not_fit_is_refused() -> None:
    bad_ones: tuple[dict[str, Any], ...] = (
        {"eps": 0.0},
        {"eps": 0.5},
        {"step": 0.0},
        {"steps": 0},
        {"amplitude": 1.1},
        {"epochs": 0},
        {"inner_step": -1.0},
        {"inner_steps": 0},
        {"colour": "red"},
    )
    for bad in bad_ones:
        with pytest.raises(ValueError, match=next(iter(bad))):
            LabelConsistent.from_params(bad)
    with pytest.raises(ValueError, match="9 pixels or more"):
        LabelConsistent().check((3, 8, 8), 10)
    with pytest.raises(ValueError, match="two classes"):
        LabelConsistent().check((3, 32, 32), 1)
    LabelConsistent().check((1, 9, 9), 2)
    with pytest.raises(NotApplicable, match="few_target_rows: class 2"):
        LabelConsistent().prepare(TRAIN.rows(TRAIN.labels != 2), ctx())


class Given:
    """The attack with the clean model in its context."""

    def __init__(self, attack: LabelConsistent) -> None:
        self.attack = attack

    def prepare(self, train: ImageSet, c: Ctx) -> Backdoor:
        return self.attack.prepare(train, replace(c, clean_models=(clean(),)))

    def poison(self, *args: Any) -> PoisonedSet:
        return self.attack.poison(*args)


def test_it_implants_where_the_perturbation_hides_the_class() -> None:
    attack = LabelConsistent(epochs=2, inner_steps=2, steps=30)
    asr, clean_asr = faint_classes.success(Given(attack), 0.1)  # type: ignore[arg-type]
    assert asr > 0.9
    assert clean_asr < 0.5
