from __future__ import annotations

import samples
import torch

from sleeperbench import Role
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
