from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import PoisonedSet, Role
from sleeperbench.attacks.none import NoAttack
from sleeperbench.kit.poison import render


def test_nothing_is_poisoned_and_nothing_rendered() -> None:
    train = samples.random_images(20)
    attack = NoAttack()
    b = attack.prepare(train, samples.ctx())
    p = attack.poison(train, b, torch.ones(20, dtype=torch.bool), 0.1, samples.ctx())
    assert torch.equal(p.data.images, train.images)
    assert torch.equal(p.data.labels, train.labels)
    assert p.rate() == 0
    assert attack.restore(b.tensors, b.info).triggers == ()
    assert attack.decoy(train, b, samples.ctx(1)).triggers == ()
    assert render(train, b, Role.TEST, samples.ctx()) is None


def test_hard_negatives_carry_a_square_or_a_label_that_means_nothing() -> None:
    train = samples.random_images(400)
    everything = torch.ones(400, dtype=torch.bool)

    def made(**args: float) -> PoisonedSet:
        attack, ctx = NoAttack(**args), samples.ctx()
        return attack.poison(train, attack.prepare(train, ctx), everything, 0.0, ctx)

    stamped = made(stamped=0.25)
    changed = (stamped.data.images != train.images).flatten(1).any(1)
    where = (stamped.data.images != train.images).any(1).any(0)
    _, height, width = train.shape
    assert where[-3:, -3:].all()
    assert int(where.sum()) == 9, f"pixels beyond the square of a {height}x{width} image"
    assert int(changed.sum()) == 100
    assert len(stamped.data.images[changed][..., -3:, -3:].unique(dim=0)) == 1, "one square for all"
    assert torch.equal(stamped.data.labels, train.labels)

    noisy = made(noisy=0.5)
    assert torch.equal(noisy.data.images, train.images)
    share = float((noisy.data.labels != train.labels).double().mean())
    assert 0.35 < share < 0.5, "half of the rows, of which one in so many classes keeps its label"
    for p in (stamped, noisy):
        assert p.rate() == 0
        assert torch.equal(p.true_labels, train.labels)
        assert bool((p.trigger_id == -1).all())
    with pytest.raises(ValueError, match=r"noisy is 1\.5"):
        NoAttack(noisy=1.5)
