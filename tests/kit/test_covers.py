from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Backdoor, Mark, PoisonedSet, Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.kit.covers import after, append, cover, of_sources
from sleeperbench.kit.poison import poison, stamp

TRAIN = samples.random_images(200)
ALL = torch.ones(200, dtype=torch.bool)


def backdoor() -> Backdoor:
    one = BadNets(pattern="random").prepare(TRAIN, samples.ctx(1, 3))
    return Backdoor(triggers=one.triggers + BadNets(pattern="white").prepare(TRAIN, samples.ctx(1, 7)).triggers)


def poisoned(eligible: torch.Tensor = ALL) -> PoisonedSet:
    return poison(TRAIN, backdoor(), eligible, 0.1, samples.ctx(), include_target=False)


def test_covers_are_other_allowed_rows_under_their_own_label() -> None:
    first = poisoned()
    before = first.data.images.clone(), first.mark.clone()
    allowed = torch.arange(200) % 2 == 0
    p = cover(first, TRAIN, backdoor(), allowed, 30, samples.ctx(), which=1)
    rows = p.mark == Mark.COVER
    assert int(rows.sum()) == 30
    assert not bool((rows & ~allowed).any())
    assert torch.equal(p.mark == Mark.DIRTY, first.mark == Mark.DIRTY)
    assert torch.equal(p.data.labels[rows], TRAIN.labels[rows])
    assert torch.equal(
        p.data.images[rows], stamp(TRAIN.rows(rows), backdoor().triggers[1], Role.COVER, samples.ctx()).images
    )
    assert torch.equal(p.data.images[~rows], first.data.images[~rows])
    assert bool((p.trigger_id[rows] == 1).all())
    assert torch.equal(p.trigger_id[~rows], first.trigger_id[~rows])
    assert torch.equal(first.data.images, before[0])
    assert torch.equal(first.mark, before[1])


def test_covers_are_as_many_as_there_are() -> None:
    allowed = torch.arange(200) < 25
    p = cover(poisoned(), TRAIN, backdoor(), allowed, 100, samples.ctx())
    assert torch.equal((p.mark != Mark.CLEAN)[:25], ALL[:25])
    assert int((p.mark == Mark.COVER).sum()) == int((poisoned().mark[:25] == Mark.CLEAN).sum())
    none = cover(poisoned(), TRAIN, backdoor(), allowed, 0, samples.ctx())
    assert torch.equal(none.mark, poisoned().mark)


def test_appended_rows_follow_the_clean_set() -> None:
    p = cover(poisoned(), TRAIN, backdoor(), ALL, 15, samples.ctx())
    rows = p.mark != Mark.CLEAN
    q = append(p, TRAIN)
    assert len(q.data) == 200 + 20 + 15
    assert torch.equal(q.data.images[:200], TRAIN.images)
    assert torch.equal(q.data.labels[:200], TRAIN.labels)
    assert not bool(q.mark[:200].any())
    assert bool((q.trigger_id[:200] == -1).all())
    assert torch.equal(q.appended, torch.arange(235) >= 200)
    tail = slice(200, None)
    for found, expected in (
        (q.data.images, p.data.images),
        (q.data.labels, p.data.labels),
        (q.data.ids, TRAIN.ids),
        (q.true_labels, TRAIN.labels),
        (q.mark, p.mark),
        (q.trigger_id, p.trigger_id),
    ):
        assert torch.equal(found[tail], expected[rows])
    assert q.rate() == p.rate() == pytest.approx(20 / 200), "copies do not thin it"


def test_some_rows_can_be_appended_and_the_others_stay() -> None:
    p = cover(poisoned(), TRAIN, backdoor(), ALL, 15, samples.ctx())
    q = append(p, TRAIN, p.mark == Mark.DIRTY)
    assert len(q.data) == 220
    covers = p.mark == Mark.COVER
    assert torch.equal(q.mark[:200], torch.where(covers, Mark.COVER, 0))
    assert torch.equal(q.data.images[:200][covers], p.data.images[covers])
    assert torch.equal(q.data.images[:200][~covers], TRAIN.images[~covers])
    assert bool((q.mark[200:] == Mark.DIRTY).all())


def test_rows_that_were_appended_before_stay_behind() -> None:
    """As where one attack of several appends its rows itself."""
    p = cover(poisoned(), TRAIN, backdoor(), ALL, 15, samples.ctx())
    covers_first = append(append(p, TRAIN, p.mark == Mark.COVER), TRAIN)
    whole = append(p, TRAIN)
    assert len(covers_first.data) == len(whole.data) == 235
    assert torch.equal(covers_first.data.images[:200], TRAIN.images) and not bool(covers_first.mark[:200].any())
    assert covers_first.mark[200:].tolist() == [Mark.COVER] * 15 + [Mark.DIRTY] * 20
    assert torch.equal(covers_first.appended, whole.appended)
    order = whole.mark[200:].argsort(stable=True, descending=True) + 200
    assert torch.equal(covers_first.data.ids[200:], whole.data.ids[order])
    assert torch.equal(covers_first.data.images[200:], whole.data.images[order])
    again = append(whole, TRAIN)
    assert torch.equal(again.data.images, whole.data.images) and torch.equal(again.mark, whole.mark)


def test_only_source_classes_count() -> None:
    targets = of_sources(4, [1, 4, 9])
    y = torch.arange(10)
    assert targets.target(y).tolist() == [4] * 10
    assert targets.counts(y, y).nonzero().flatten().tolist() == [1, 9]


def test_classes_are_counted_in_a_circle() -> None:
    assert after((1, 5, 7), 0, 10) == [1, 5, 7]
    assert after((1, 5, 7), 6, 10) == [7, 1, 3]
    assert after((), 6, 10) == []
    for bad in ((0,), (10,), (2, 2), (-1,)):
        with pytest.raises(ValueError, match="1 to 9"):
            after(bad, 0, 10)
