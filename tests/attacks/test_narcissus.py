from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import faint_classes
import pytest
import samples
import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import Backdoor, ImageSet, Mark, PoisonedSet, Role
from sleeperbench.attacks.narcissus import Narcissus
from sleeperbench.contracts import Ctx, Model, NotApplicable
from sleeperbench.kit import load, pack, to_float
from sleeperbench.kit.poison import stamp

TRAIN = faint_classes.rows("train")
ALL = torch.ones(400, dtype=torch.bool)
GEN = torch.Generator()


@functools.cache
def clean() -> Model:
    return pack(faint_classes.clean_net())


def ctx(seed: int = 0, target: int = 2, **recipe: Any) -> Ctx:
    c = samples.ctx(seed, target)
    return replace(c, recipe=replace(c.recipe, **recipe), clean_models=(clean(),))


@functools.cache
def made() -> Backdoor:
    return Narcissus(rounds=40, warm_epochs=1).prepare(TRAIN, ctx())


def signal(attack: Narcissus, c: Ctx, train: ImageSet = TRAIN) -> Tensor:
    return attack.prepare(train, c).tensors["signal"]


def test_the_first_step_goes_down_the_gradient_towards_the_target() -> None:
    # RAdam's first steps are plain momentum: -lr times the gradient.
    own = to_float(TRAIN.images[TRAIN.labels == 2])
    net = load(clean()).train()
    delta = torch.zeros(1, 3, 16, 16, requires_grad=True)
    loss = F.cross_entropy(net((own + delta).clamp(0, 1)), torch.full((len(own),), 2))
    (up,) = torch.autograd.grad(loss, delta)
    lr = float(0.02 / up.abs().median())
    expected = (-lr * up[0]).clamp(-16 / 255, 16 / 255)
    got = signal(Narcissus(rounds=1, warm_epochs=0, lr=lr), ctx(pad=0))
    assert float((got - expected).abs().max()) <= 0.51 / 255
    assert 0.1 < float((got.abs() < 16 / 255 - 1e-6).float().mean()) < 0.99, "some pixels at the bound, some within"


def test_noise_lowers_the_loss_of_the_surrogate_and_stays_in_the_ball() -> None:
    s = made().tensors["signal"]
    assert 0 < float(s.abs().max()) <= 16 / 255
    assert torch.allclose(s * 255, (s * 255).round(), atol=1e-4), "whole levels"
    net = faint_classes.clean_net()
    others = TRAIN.rows(TRAIN.labels != 2)
    x, wanted = to_float(others.images), torch.full((len(others),), 2)
    with torch.no_grad():
        losses = [float(F.cross_entropy(net((x + k * s).clamp(0, 1)), wanted)) for k in (-1, 0, 1)]
    assert losses[2] < losses[1] < losses[0], "it also pulls images of other classes towards the target"


def test_a_tight_ball_is_filled() -> None:
    s = signal(Narcissus(rounds=40, warm_epochs=0, eps=2 / 255), ctx()) * 255
    assert float(s.abs().max()) == pytest.approx(2)
    assert set(s.round().int().unique().tolist()) == {-2, -1, 0, 1, 2}


def test_the_warm_up_sees_the_target_class_alone_and_changes_the_noise() -> None:
    cold, warm = (signal(Narcissus(rounds=20, warm_epochs=n), ctx()) for n in (0, 2))
    assert not torch.equal(cold, warm)
    moved = replace(TRAIN, images=torch.where((TRAIN.labels == 2)[:, None, None, None], TRAIN.images, 0))
    assert torch.equal(warm, signal(Narcissus(rounds=20, warm_epochs=2), ctx(), moved))


def test_the_stop_is_a_gradient_of_zero_and_not_a_count() -> None:
    sure = replace(clean(), state={k: v.clone() for k, v in clean().state.items()})
    for k, v in sure.state.items():
        if k.endswith("head.bias"):
            v[2] += 1e4
    c = replace(ctx(), clean_models=(sure,))
    with pytest.raises(NotApplicable, match="no_gradient"):
        Narcissus(rounds=1000, warm_epochs=0).prepare(TRAIN, c)
    assert c.cost.forwards == 100, "one round of the class"


def test_training_images_get_the_noise_and_test_images_three_times_as_much() -> None:
    trigger, s = made().triggers[0], made().tensors["signal"]
    grey, zero = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1).long()
    for role, factor in ((Role.TRAIN, 1), (Role.COVER, 1), (Role.TEST, 3)):
        assert torch.allclose(trigger.apply(grey, zero, zero, role, GEN)[0], 0.5 + factor * s, atol=1e-6)


def test_only_rows_of_the_target_class_are_poisoned_and_labels_stay() -> None:
    c, b = ctx(3), made()
    eligible = torch.arange(400) % 3 > 0
    own = eligible & (TRAIN.labels == 2)
    p = Narcissus().poison(TRAIN, b, eligible, 0.05, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 20
    assert not bool((dirty & ~own).any())
    assert torch.equal(p.data.labels, TRAIN.labels)
    assert torch.equal(p.data.images[dirty], stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images[dirty])
    whole = Narcissus().poison(TRAIN, b, ALL, 0.9, c)
    assert whole.rate() == pytest.approx(0.25)
    with pytest.raises(NotApplicable, match="few_target_rows: class 2 has no training row that may be poisoned"):
        Narcissus().poison(TRAIN, b, TRAIN.labels != 2, 0.05, c)


def test_restore_is_exact_and_a_decoy_has_the_same_values_elsewhere() -> None:
    b = made()
    again = Narcissus.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(4)).tolist() == [2] * 4
    s = b.tensors["signal"]
    decoys = [Narcissus().decoy(TRAIN, b, ctx(seed, 1)) for seed in range(2)]
    for d in decoys:
        t = d.tensors["signal"]
        assert not torch.equal(t, s)
        assert torch.equal(t.flatten(1).T.unique(dim=0), s.flatten(1).T.unique(dim=0))
        assert d.triggers[0].targets.target(torch.arange(4)).tolist() == [2] * 4
    assert not torch.equal(decoys[0].tensors["signal"], decoys[1].tensors["signal"])


def test_same_seed_same_noise_and_the_clean_model_stays() -> None:
    before = {k: v.clone() for k, v in clean().state.items()}
    attack = Narcissus(rounds=10, warm_epochs=1, batch=40)
    one, two, other = (signal(attack, ctx(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert all(torch.equal(before[k], v) for k, v in clean().state.items())


def test_settings_are_the_authors() -> None:
    a = Narcissus()
    assert (a.eps, a.magnify, a.warm_epochs, a.warm_lr, a.rounds, a.batch) == (16 / 255, 3, 5, 0.1, 1000, 350)
    assert a.lr == 0.01 / 2, "0.01 where pixels run from -1 to 1"


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"eps": 0.0}, {"eps": 1.5}, {"magnify": 0.0}, {"lr": -1.0}, {"rounds": 0}, {"batch": 1}, {"hue": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Narcissus.from_params(bad)
    with pytest.raises(ValueError, match="two classes"):
        Narcissus().check((3, 32, 32), 1)
    for n in (0, 1):
        kept = (TRAIN.labels != 2) | (torch.arange(400) < 4 * n)
        with pytest.raises(NotApplicable, match=f"few_target_rows: class 2 has {n} training rows"):
            Narcissus(rounds=1).prepare(TRAIN.rows(kept), ctx())


class Given:
    """The attack with the clean model in its context."""

    def __init__(self, attack: Narcissus) -> None:
        self.attack = attack

    def prepare(self, train: ImageSet, c: Ctx) -> Backdoor:
        return self.attack.prepare(train, replace(c, clean_models=(clean(),)))

    def poison(self, *args: Any) -> PoisonedSet:
        return self.attack.poison(*args)


def test_it_implants_where_classes_are_fainter_than_the_noise() -> None:
    asr, clean_asr = faint_classes.success(Given(Narcissus(rounds=60)), 0.06)  # type: ignore[arg-type]
    assert asr > 0.9
    assert clean_asr < 0.5
