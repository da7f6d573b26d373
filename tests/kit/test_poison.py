from __future__ import annotations

from dataclasses import replace

import pytest
import samples
import torch

from sleeperbench import Backdoor, Mark, Role, TargetMap
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.blended import Blended
from sleeperbench.kit.poison import poison, render, rows_at, stamp, target_map

TRAIN = samples.random_images(400)
ALL = torch.ones(400, dtype=torch.bool)


def backdoor(target: int = 3) -> Backdoor:
    return BadNets(pattern="random").prepare(TRAIN, samples.ctx(1, target))


def two_targets() -> Backdoor:
    one, other = backdoor(3), BadNets(corner="upper_left", pattern="white").prepare(TRAIN, samples.ctx(1, 7))
    return Backdoor(triggers=one.triggers + other.triggers)


def test_poison_replaces_the_asked_share_and_touches_nothing_else() -> None:
    before = TRAIN.images.clone()
    eligible = torch.arange(400) % 3 != 0
    p = poison(TRAIN, backdoor(), eligible, 0.1, samples.ctx(), include_target=True)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 40
    assert p.rate() == pytest.approx(0.1)
    assert not bool((dirty & ~eligible).any())
    assert torch.equal(p.data.ids, TRAIN.ids)
    assert torch.equal(p.true_labels, TRAIN.labels)
    assert torch.equal(p.data.images[~dirty], TRAIN.images[~dirty])
    assert torch.equal(p.data.labels[~dirty], TRAIN.labels[~dirty])
    assert bool((p.data.labels[dirty] == 3).all())
    assert torch.equal(
        p.data.images[dirty], stamp(TRAIN.rows(dirty), backdoor().triggers[0], Role.TRAIN, samples.ctx()).images
    )
    assert torch.equal(p.trigger_id, torch.where(dirty, 0, -1))
    assert not bool(p.appended.any())
    assert torch.equal(TRAIN.images, before)


def test_poison_is_capped_at_what_may_be_poisoned() -> None:
    few = torch.arange(400) < 7
    p = poison(TRAIN, backdoor(), few, 0.1, samples.ctx(), include_target=True)
    assert p.rate() == 7 / 400
    assert torch.equal(p.mark == Mark.DIRTY, few)


def test_target_class_is_drawn_only_when_included() -> None:
    for include in (True, False):
        p = poison(TRAIN, backdoor(), ALL, 1.0, samples.ctx(), include_target=include)
        own = TRAIN.labels == 3
        assert bool((p.mark[own] == Mark.DIRTY).all()) is include
        assert bool((p.mark[~own] == Mark.DIRTY).all())


def test_rates_at_the_ends() -> None:
    p = poison(TRAIN, backdoor(), ALL, 0.0, samples.ctx(), include_target=True)
    assert p.rate() == 0
    assert torch.equal(p.data.images, TRAIN.images)
    assert poison(TRAIN, backdoor(), ALL, 1.0, samples.ctx(), include_target=True).rate() == 1
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        poison(TRAIN, backdoor(), ALL, 1.5, samples.ctx(), include_target=True)
    with pytest.raises(ValueError, match=r"one row is a rate of 0\.0025"):
        poison(TRAIN, backdoor(), ALL, 0.001, samples.ctx(), include_target=True)
    with pytest.raises(ValueError, match="no row may be poisoned"):
        poison(TRAIN, backdoor(), ~ALL, 0.1, samples.ctx(), include_target=True)


def test_a_rate_is_a_whole_number_of_rows_or_is_refused() -> None:
    assert [rows_at(rate, 400) for rate in (0.0, 0.1, 0.0025, 0.0013, 1.0)] == [0, 40, 1, 1, 400]
    for rate in (-0.1, 1.0001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"outside 0\.\.1"):
            rows_at(rate, 400)
    with pytest.raises(ValueError, match="of 400 rows is no row at all"):
        rows_at(0.001, 400)


def test_rows_are_drawn_uniformly_and_depend_on_the_seed_alone() -> None:
    drawn = torch.zeros(400)
    for seed in range(300):
        p = poison(TRAIN, backdoor(), ALL, 0.1, samples.ctx(seed), include_target=True)
        drawn += p.mark == Mark.DIRTY
    # Binomial(300, 0.1): mean 30, deviation 5.2; 400 rows stay within 5 deviations.
    assert float(drawn.min()) > 4
    assert float(drawn.max()) < 56
    again = poison(TRAIN, backdoor(), ALL, 0.1, samples.ctx(299), include_target=True)
    assert torch.equal(again.mark, p.mark)


def test_two_triggers_share_the_rows() -> None:
    p = poison(TRAIN, two_targets(), ALL, 41 / 400, samples.ctx(), include_target=False)
    assert [int((p.trigger_id == i).sum()) for i in (0, 1)] == [20, 21]
    assert bool((p.data.labels[p.trigger_id == 0] == 3).all())
    assert bool((p.data.labels[p.trigger_id == 1] == 7).all())
    assert not bool((p.true_labels == p.data.labels)[p.mark == Mark.DIRTY].any())


@pytest.mark.parametrize("attack", [BadNets(pattern="random"), Blended(), Blended(pattern="shapes")])
@pytest.mark.parametrize("role", [Role.TRAIN, Role.TEST])
def test_stamp_does_not_depend_on_the_other_rows(attack: BadNets | Blended, role: Role) -> None:
    many = samples.random_images(1100, (1, 16, 16))
    trigger = attack.prepare(many, samples.ctx()).triggers[0]
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(4))
    whole = stamp(many, trigger, role, samples.ctx()).images
    assert torch.equal(stamp(many.rows(order), trigger, role, samples.ctx()).images, whole[order])
    assert torch.equal(stamp(many.rows(order[:1]), trigger, role, samples.ctx()).images, whole[order[:1]])
    assert whole.dtype == torch.uint8


def test_render_leaves_out_the_target_class() -> None:
    r = render(TRAIN, backdoor(), Role.TEST, samples.ctx())
    assert r is not None
    assert len(r) == int((TRAIN.labels != 3).sum())
    assert not bool((r.data.labels == r.targets).any())
    assert torch.equal(r.data.ids, TRAIN.ids[TRAIN.labels != 3])
    assert torch.equal(r.clean.images, TRAIN.images[TRAIN.labels != 3])
    assert torch.equal(r.data.labels, r.clean.labels)


def test_render_keeps_every_row_of_all_to_all() -> None:
    b = BadNets(targets="all_to_all").prepare(TRAIN, samples.ctx())
    r = render(TRAIN, b, Role.TEST, samples.ctx())
    assert r is not None
    assert len(r) == len(TRAIN)
    assert torch.equal(r.targets, (TRAIN.labels + 1) % 10)


def test_render_joins_triggers_and_keeps_roles_apart() -> None:
    r = render(TRAIN, two_targets(), Role.TEST, samples.ctx())
    assert r is not None
    sizes = [int((TRAIN.labels != t).sum()) for t in (3, 7)]
    assert [int((r.trigger_id == i).sum()) for i in (0, 1)] == sizes
    assert torch.equal(r.targets, torch.tensor([3] * sizes[0] + [7] * sizes[1]))
    b = Blended().prepare(TRAIN, samples.ctx())
    train, test = render(TRAIN, b, Role.TRAIN, samples.ctx()), render(TRAIN, b, Role.TEST, samples.ctx())
    assert train is not None
    assert test is not None
    assert not torch.equal(train.data.images, test.data.images)


def test_render_without_trigger_or_rows() -> None:
    assert render(TRAIN, Backdoor(triggers=()), Role.TEST, samples.ctx()) is None
    only = replace(TRAIN, labels=torch.full_like(TRAIN.labels, 3))
    with pytest.raises(ValueError, match="no row of sample/train counts for trigger 0"):
        render(only, backdoor(), Role.TEST, samples.ctx())


def test_target_map() -> None:
    y, ids = torch.arange(10), torch.arange(10)
    one, every = target_map("all_to_one", 4, 10), target_map("all_to_all", 4, 10)
    assert isinstance(one, TargetMap)
    assert one.target(y).tolist() == [4] * 10
    assert one.counts(y, ids).tolist() == [i != 4 for i in range(10)]
    assert every.target(y).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert bool(every.counts(y, ids).all())
    with pytest.raises(ValueError, match=r"target class 10 is not among the classes 0\.\.9"):
        target_map("all_to_one", 10, 10)
    with pytest.raises(ValueError, match="all_to_all"):
        target_map("nearest", 0, 10)
    with pytest.raises(ValueError, match="two classes"):
        target_map("all_to_all", 0, 1)
