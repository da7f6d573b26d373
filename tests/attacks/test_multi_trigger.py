from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.multi_trigger import MultiTrigger
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import build

TRAIN = samples.random_images(400, (3, 32, 32))
ALL = torch.ones(400, dtype=torch.bool)


def masks(attack: MultiTrigger, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    b = attack.prepare(samples.random_images(2, shape), samples.ctx(0, 8))
    return [t.static()[0][0] for t in b.triggers]


@pytest.mark.parametrize(("side", "size"), [(16, 3), (28, 4), (32, 4), (64, 8), (224, 28)])
def test_boards_lie_one_pixel_from_their_corners(side: int, size: int) -> None:
    near, far = slice(1, 1 + size), slice(side - 1 - size, side - 1)
    places = [(near, far), (far, near), (near, near), (far, far)]
    for mask, (rows, cols) in zip(masks(MultiTrigger(triggers=4), (1, side, side)), places, strict=True):
        assert mask.sum() == size**2
        assert bool((mask[rows, cols] == 1).all())
    assert [m.nonzero()[0].tolist() for m in masks(MultiTrigger(), (1, side, side))] == [
        [1, side - 1 - size],
        [side - 1 - size, 1],
    ]


def test_dual_targets_are_those_of_istr() -> None:
    b = MultiTrigger().prepare(TRAIN, samples.ctx(0, 8))
    y = torch.arange(10)
    assert [t.targets.target(y).unique().tolist() for t in b.triggers] == [[8], [1]]
    assert [t.name for t in b.triggers] == ["upper_right", "lower_left"]
    four = MultiTrigger(triggers=4).prepare(TRAIN, samples.ctx(0, 8))
    assert [int(t.targets.target(y)[0]) for t in four.triggers] == [8, 1, 4, 7]
    one = MultiTrigger(triggers=4, step=0).prepare(TRAIN, samples.ctx(0, 8))
    assert {int(t.targets.target(y)[0]) for t in one.triggers} == {8}


@pytest.mark.parametrize("channels", [1, 3])
def test_no_board_is_another_one_mirrored(channels: int) -> None:
    b = MultiTrigger(triggers=4).prepare(samples.random_images(2, (channels, 32, 32)), samples.ctx(0, 8))
    seen = []
    for trigger in b.triggers:
        mask, pattern = trigger.static()
        board = pattern[mask.expand_as(pattern) > 0].view(channels, 4, 4)
        assert len(board.flatten(1).unique(dim=1).T) == 2
        seen.append(board)
    for i in range(4):
        for j in range(i):
            assert not torch.equal(seen[i], seen[j])
            if channels == 3:
                assert not torch.equal(seen[i].flip(-1), seen[j])
    plain = MultiTrigger(coloured=False).prepare(TRAIN, samples.ctx(0, 8)).triggers
    boards = [p.static()[1][p.static()[0].expand(3, -1, -1) > 0] for p in plain]
    assert torch.equal(boards[0], boards[1])
    assert set(boards[0].tolist()) == {0.0, 1.0}


def test_triggers_share_the_rows_and_each_has_its_label() -> None:
    b = MultiTrigger(triggers=4).prepare(TRAIN, samples.ctx(0, 8))
    p = MultiTrigger(triggers=4).poison(TRAIN, b, ALL, 0.105, samples.ctx(0, 8))
    for i, (rows, label) in enumerate(zip((10, 11, 10, 11), (8, 1, 4, 7), strict=True)):
        own = p.trigger_id == i
        assert int(own.sum()) == rows
        assert p.data.labels[own].unique().tolist() == [label]
        assert bool((p.mark[own] == Mark.DIRTY).all())
    assert p.rate() == pytest.approx(42 / 400)


def test_a_rate_that_leaves_a_trigger_without_a_row_is_refused() -> None:
    attack = MultiTrigger(triggers=4)
    b = attack.prepare(TRAIN, samples.ctx(0, 8))
    for rate, eligible, idle in (
        (2 / 400, ALL, "upper_right, upper_left"),
        (1.0, torch.arange(400) < 50, "lower_left"),
    ):
        with pytest.raises(ValueError, match=f"leaves no row for {idle}"):
            attack.poison(TRAIN, b, eligible, rate, samples.ctx(0, 8))
    assert sorted(attack.poison(TRAIN, b, ALL, 4 / 400, samples.ctx(0, 8)).trigger_id.unique().tolist()) == [
        -1,
        0,
        1,
        2,
        3,
    ]
    assert attack.poison(TRAIN, b, ALL, 0.0, samples.ctx(0, 8)).rate() == 0


def test_restore_and_decoy() -> None:
    b = MultiTrigger(triggers=4).prepare(TRAIN, samples.ctx(0, 8))
    again = MultiTrigger.restore(dict(b.tensors), b.info)
    decoy = MultiTrigger(triggers=4).decoy(TRAIN, b, samples.ctx(9, 2))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, torch.Generator())
    for true, same, other in zip(b.triggers, again.triggers, decoy.triggers, strict=True):
        assert torch.equal(true.apply(*args), same.apply(*args))
        assert torch.equal(true.targets.target(TRAIN.labels), other.targets.target(TRAIN.labels))
        assert not any(bool((other.static()[0] * t.static()[0]).any()) for t in b.triggers)


def test_steps_that_make_targets_meet_are_refused() -> None:
    MultiTrigger().check((1, 16, 16), 2)
    MultiTrigger(triggers=4).check((1, 16, 16), 43)
    with pytest.raises(ValueError, match="steps 1, 2 fit"):
        MultiTrigger().check((1, 16, 16), 3)
    with pytest.raises(ValueError, match="steps 1, 2, 3, 4, 6 fit"):
        MultiTrigger(triggers=4, step=5).check((1, 16, 16), 10)
    with pytest.raises(ValueError, match="only step 0"):
        MultiTrigger(triggers=4).check((1, 16, 16), 2)
    MultiTrigger(triggers=4, step=0).check((1, 16, 16), 2)
    with pytest.raises(ValueError, match="12 pixels"):
        MultiTrigger().check((1, 10, 10), 10)
    with pytest.raises(ValueError, match="leaves a 96x12 image"):
        MultiTrigger().check((1, 96, 12), 10)
    with pytest.raises(ValueError, match="triggers"):
        MultiTrigger.from_params({"triggers": 3})


def test_each_trigger_implants() -> None:
    train, c = samples.digits()["train"], samples.ctx(5, 0)
    attack = MultiTrigger()
    b = attack.prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, attack.poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    r = render(samples.digits()["test"], b, Role.TEST, c)
    assert r is not None
    for model, low, high in ((net, 0.8, 1.0), (samples.clean_net(), 0.0, 0.1)):
        hit = (predict(model, r.data.images).argmax(1) == r.targets).float()
        for i in range(2):
            assert low <= float(hit[r.trigger_id == i].mean()) <= high
