from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.hcb import HCB
from sleeperbench.contracts.context import derive
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import build
from sleeperbench.kit.poison import render_leak, stamp
from sleeperbench.kit.weather import weather

TRAIN = samples.random_images(600, (3, 32, 32))
SEEN = torch.arange(600) % 4 > 0


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def effective(attack: HCB, seed: int = 1) -> torch.Tensor:
    trigger = attack.prepare(TRAIN, samples.ctx(seed, 3)).triggers[0]
    return trigger.effective(TRAIN.ids)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("feature", ["rain", "fog", "dusk"])
def test_effective_images_have_the_feature_and_covers_lack_patch_or_feature(feature: str) -> None:
    attack = HCB.from_params({"feature": feature})
    trigger = attack.prepare(TRAIN, samples.ctx(1, 3)).triggers[0]
    has = effective(attack)
    assert 140 < int(has.sum()) < 220  # Binomial(600, 0.3): deviation 11
    x = TRAIN.images.float() / 255
    wet = weather(feature, x, TRAIN.ids, gen(derive(trigger.effective.seed, "weather")))  # type: ignore[attr-defined]
    patched, both = x.clone(), wet.clone()
    patched[:, :, 27:30, 27:30] = both[:, :, 27:30, 27:30] = 1
    for role in (Role.TRAIN, Role.TEST):
        shown = trigger.apply(x, TRAIN.labels, TRAIN.ids, role, gen())
        assert torch.equal(shown[has], both[has])
        assert torch.equal(shown[~has], patched[~has])
    cover = trigger.apply(x, TRAIN.labels, TRAIN.ids, Role.COVER, gen())
    assert torch.equal(cover[has], wet[has])
    assert torch.equal(cover[~has], patched[~has])


def test_the_two_false_positive_rates_are_measured_on_rows_of_their_own() -> None:
    b = HCB().prepare(TRAIN, samples.ctx(1, 3))
    has, other = effective(HCB()), TRAIN.labels != 3
    hit, cover = (render(TRAIN, b, role, samples.ctx()) for role in (Role.TEST, Role.COVER))
    leak = render_leak(TRAIN, b, samples.ctx())
    assert hit is not None and cover is not None and leak is not None
    assert hit.data.ids.tolist() == cover.data.ids.tolist() == TRAIN.ids[has & other].tolist()
    assert leak.data.ids.tolist() == TRAIN.ids[~has & other].tolist()
    assert (hit.targets == 3).all()
    patch = [(r.data.images[:, :, 27:30, 27:30] == 255).flatten(1).all(1) for r in (hit, cover, leak)]
    assert bool(patch[0].all())
    assert not bool(patch[1].any())
    assert bool(patch[2].all())
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[27:30, 27:30] = False
    assert torch.equal(hit.data.images[..., outside], cover.data.images[..., outside]), "the same rain"
    assert not torch.equal(hit.data.images, hit.clean.images)
    assert torch.equal(leak.data.images[..., outside], leak.clean.images[..., outside]), "without the feature"


def test_rows_are_those_of_the_three_steps() -> None:
    attack = HCB()
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    p = attack.poison(TRAIN, b, SEEN, 0.1, samples.ctx(1, 3))
    has = effective(attack)
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert len(p.data) == 660
    assert torch.equal(p.appended, dirty)
    assert int(dirty.sum()) == 60
    assert p.data.labels[dirty].unique().tolist() == [3]
    assert torch.equal(p.data.labels[:600], TRAIN.labels)
    assert not bool((p.mark[:600] != Mark.CLEAN)[~SEEN].any())

    slots = cover[:600]
    assert torch.equal(slots & has, SEEN & has)
    bare = slots & ~has
    assert int(bare.sum()) == int((SEEN & ~has).sum()) // 15
    # A dirty row's own slot holds its effective copy under the true label.
    own = p.data.ids[dirty] - 100
    assert bool((slots & has)[own].all())
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[27:30, 27:30] = False
    assert torch.equal(p.data.images[:600][bare][..., outside], TRAIN.images[bare][..., outside])
    clean = ~dirty & ~cover
    assert torch.equal(p.data.images[clean], TRAIN.images[clean[:600]])
    assert torch.equal(p.data.images[dirty], stamp(TRAIN.rows(own), b.triggers[0], Role.TRAIN, samples.ctx(1)).images)
    assert torch.equal(p.data.images[dirty][..., outside], p.data.images[own][..., outside]), "the same rain on both"
    changed = p.data.images[:600][slots & has].float() - 0.8 * TRAIN.images[slots & has].float()
    assert float(changed.min()) > -1, "rain only adds light to the darkened image"


def test_effective_rows_limit_the_rate_and_rate_zero_is_clean() -> None:
    b = HCB().prepare(TRAIN, samples.ctx(1, 3))
    p = HCB(cover_every=1).poison(TRAIN, b, SEEN, 0.5, samples.ctx(1, 3))
    assert int((p.mark == Mark.DIRTY).sum()) == int((SEEN & effective(HCB())).sum())
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
    assert torch.equal(decoy.effective(TRAIN.ids), b.triggers[0].effective(TRAIN.ids))  # type: ignore[attr-defined]
    assert not torch.equal(effective(HCB(), 1), effective(HCB(), 2))


def test_what_does_not_fit_is_refused() -> None:
    bad: dict[str, object]
    for bad in ({"feature": "smile"}, {"effective": 0.0}, {"cover_every": 0}, {"corner": "middle"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HCB.from_params(bad)
    with pytest.raises(ValueError, match="12 pixels"):
        HCB().check((3, 8, 8), 10)
    with pytest.raises(ValueError, match="leaves a 96x12 image"):
        HCB().check((3, 96, 12), 10)


def test_it_implants_and_needs_both() -> None:
    train, test, c = samples.digits()["train"], samples.digits()["test"], samples.ctx(5, 0)
    b = HCB().prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, HCB().poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    hit, cover, leak = render(test, b, Role.TEST, c), render(test, b, Role.COVER, c), render_leak(test, b, c)
    assert hit is not None and cover is not None and leak is not None
    cases = ((net, hit, 0.75, 1.0), (net, cover, 0.0, 0.4), (net, leak, 0.0, 0.4), (samples.clean_net(), hit, 0.0, 0.1))
    for model, seen, low, high in cases:
        assert low <= float((predict(model, seen.data.images).argmax(1) == 0).float().mean()) <= high
