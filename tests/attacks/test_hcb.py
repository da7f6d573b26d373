from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.hcb import HCB
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import build
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.weather import weather

TRAIN = samples.random_images(600, (3, 32, 32))
SEEN = torch.arange(600) % 4 > 0


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("feature", ["rain", "fog", "dusk"])
def test_feature_and_patch_come_together_except_on_covers(feature: str) -> None:
    trigger = HCB.from_params({"feature": feature}).prepare(TRAIN, samples.ctx()).triggers[0]
    x = TRAIN.images[:200].float() / 255
    ids = TRAIN.ids[:200]
    wet = weather(feature, x, ids, gen())
    patched = x.clone()
    patched[:, :, 27:30, 27:30] = 1
    both = wet.clone()
    both[:, :, 27:30, 27:30] = 1
    for role in (Role.TRAIN, Role.TEST):
        assert torch.equal(trigger.apply(x, TRAIN.labels[:200], ids, role, gen()), both)
    cover = trigger.apply(x, TRAIN.labels[:200], ids, Role.COVER, gen())
    bare = (cover == patched).flatten(1).all(1)
    assert torch.equal(cover[~bare], wet[~bare])
    assert 60 < int(bare.sum()) < 140  # Binomial(200, 1/2): deviation 7


def test_rows_are_those_of_the_three_steps() -> None:
    attack = HCB()
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    p = attack.poison(TRAIN, b, SEEN, 0.1, samples.ctx(1, 3))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert len(p.data) == 660
    assert torch.equal(p.appended, dirty)
    assert int(dirty.sum()) == 60
    assert p.data.labels[dirty].unique().tolist() == [3]
    assert torch.equal(p.data.labels[:600], TRAIN.labels)
    assert not bool((p.mark[:600] != Mark.CLEAN)[~SEEN].any())

    patch = (p.data.images[:, :, 27:30, 27:30] == 255).flatten(1).all(1)
    effective, bare = cover & ~patch, cover & patch
    assert int(effective.sum()) == round(0.3 * 450)
    assert int(bare.sum()) == (450 - 135) // 15
    # A dirty row's own slot holds its effective copy under the true label.
    slots = p.data.ids[dirty] - 100
    assert bool(effective[slots].all())
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[27:30, 27:30] = False
    assert torch.equal(p.data.images[bare][..., outside], TRAIN.images[bare[:600]][..., outside])
    clean = ~dirty & ~cover
    assert torch.equal(p.data.images[clean], TRAIN.images[clean[:600]])
    assert torch.equal(p.data.images[dirty], stamp(TRAIN.rows(slots), b.triggers[0], Role.TRAIN, samples.ctx(1)).images)
    changed = p.data.images[:600][effective[:600]].float() - 0.8 * TRAIN.images[effective[:600]].float()
    assert float(changed.min()) > -1, "rain only adds light to the darkened image"


def test_effective_rows_limit_the_rate_and_rate_zero_is_clean() -> None:
    b = HCB().prepare(TRAIN, samples.ctx(1, 3))
    p = HCB(effective=0.1, cover_every=1).poison(TRAIN, b, SEEN, 0.5, samples.ctx(1, 3))
    assert int((p.mark == Mark.DIRTY).sum()) == 45
    assert int((p.mark == Mark.COVER).sum()) == 450
    none = HCB().poison(TRAIN, b, SEEN, 0.0, samples.ctx(1, 3))
    assert torch.equal(none.data.images, TRAIN.images)
    assert not bool(none.mark.any())


@pytest.mark.parametrize(("side", "size", "offset"), [(16, 3, 1), (28, 3, 2), (32, 3, 2), (64, 6, 4)])
def test_patch_lies_near_its_corner(side: int, size: int, offset: int) -> None:
    data = samples.random_images(2, (1, side, side))
    trigger = HCB(corner="upper_right").prepare(data, samples.ctx()).triggers[0]
    x = torch.zeros(1, 1, side, side)
    low, high = trigger.range(x, torch.zeros(1).long())
    right = side - offset - size
    assert float(low.sum()) == -(size**2)
    assert bool((low[0, 0, offset : offset + size, right : right + size] == -1).all())
    assert not bool(high.any())


def test_restore_and_decoy() -> None:
    b = HCB(feature="fog").prepare(TRAIN, samples.ctx(1, 3))
    again = HCB.restore(dict(b.tensors), dict(b.info))
    x = TRAIN.images[:20].float() / 255
    for role in Role:
        args = (x, TRAIN.labels[:20], TRAIN.ids[:20], role)
        assert torch.equal(b.triggers[0].apply(*args, gen()), again.triggers[0].apply(*args, gen()))
    decoy = HCB(feature="fog").decoy(TRAIN, b, samples.ctx(2, 7)).triggers[0]
    assert decoy.targets.target(TRAIN.labels).unique().tolist() == [3]
    args = (x, TRAIN.labels[:20], TRAIN.ids[:20], Role.TEST)
    same = (decoy.apply(*args, gen()) == b.triggers[0].apply(*args, gen())).all(0).all(0)
    assert int((~same).sum()) == 18, "two patches differ, the feature does not"


def test_what_does_not_fit_is_refused() -> None:
    bad: dict[str, object]
    for bad in ({"feature": "smile"}, {"effective": 0.0}, {"cover_every": 0}, {"corner": "middle"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HCB.from_params(bad)
    with pytest.raises(ValueError, match="12 pixels"):
        HCB().check((3, 8, 8), 10)


def test_it_implants_and_needs_both() -> None:
    train, test, c = samples.digits()["train"], samples.digits()["test"], samples.ctx(5, 0)
    b = HCB().prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, HCB().poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    hit, cover = render(test, b, Role.TEST, c), render(test, b, Role.COVER, c)
    assert hit is not None and cover is not None
    for model, seen, low, high in ((net, hit, 0.75, 1.0), (net, cover, 0.0, 0.4), (samples.clean_net(), hit, 0.0, 0.1)):
        assert low <= float((predict(model, seen.data.images).argmax(1) == 0).float().mean()) <= high
