from __future__ import annotations

from dataclasses import replace

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Mark, TargetMap
from sleeperbench.contracts import Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.mixed_batches import MixedBatches
from sleeperbench.kit.pixels import to_float

TRAIN = samples.random_images(64, (3, 16, 16))
ALL = torch.ones(64, dtype=torch.bool)


def plain(pad: int = 0, flip: bool = False) -> Ctx:
    c = samples.ctx(7, 3)
    c.recipe = replace(c.recipe, pad=pad, flip=flip)
    return c


def make(x: Tensor, dirty: int, step: int) -> Tensor:
    """Dirty rows white, covers black, each with its first pixel kept and a mark of the step."""
    out = torch.zeros_like(x)
    out[:dirty] = 1
    out[:, :, 0, 0] = x[:, :, 0, 0]
    out[:, :, 0, 1] = step / 255
    return out


def hooks(rate: float, ratio: float, eligible: Tensor = ALL, c: Ctx | None = None) -> MixedBatches:
    return MixedBatches(make, TargetMap.all_to_one(3), TRAIN, eligible, rate, ratio, c or plain())


def batch(h: MixedBatches, step: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return h.batch(to_float(TRAIN.images[rows]), TRAIN.labels[rows], TRAIN.ids[rows], step)


@pytest.mark.parametrize(("rate", "size", "ratio"), [(0.1, 64, 1.0), (0.1, 8, 2.0), (0.01, 20, 1.0), (0.25, 48, 0.5)])
def test_dirty_rows_add_up_to_the_rate_with_their_share_of_covers(rate: float, size: int, ratio: float) -> None:
    h, total = hooks(rate, ratio), 0
    for step in range(41):
        _, _, mark = batch(h, step, torch.arange(size))
        dirty = int((mark == Mark.DIRTY).sum())
        assert int((mark == Mark.COVER).sum()) == round(ratio * dirty)
        total += dirty
        assert abs(total - rate * size * (step + 1)) <= 0.5 + 1e-9


def test_batches_hold_dirty_cover_and_untouched_rows() -> None:
    h = hooks(0.125, 2.0)
    assert h.augments
    before = to_float(TRAIN.images)
    x, y, mark = batch(h, 5, torch.arange(64))
    dirty, cover, clean = mark == Mark.DIRTY, mark == Mark.COVER, mark == Mark.CLEAN
    assert (int(dirty.sum()), int(cover.sum()), int(clean.sum())) == (8, 16, 40)
    assert torch.equal(x[clean], before[clean])
    assert torch.equal(x[:, :, 0, 0], before[:, :, 0, 0]), "rows are in their own places"
    assert bool((x[dirty][:, :, 2:] == 1).all())
    assert bool((x[cover][:, :, 2:] == 0).all())
    assert torch.allclose(x[~clean][:, :, 0, 1], torch.tensor(5 / 255))
    assert torch.equal(y, torch.where(dirty, 3, TRAIN.labels))
    assert bool((y != TRAIN.labels)[dirty].any())


def test_only_eligible_rows_are_touched_and_dirty_ones_come_first() -> None:
    eligible = torch.arange(64) % 4 == 0
    h = hooks(0.2, 2.0, eligible)
    for step in range(10):
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:32]
        x, y, mark = batch(h, step, rows)
        free = eligible[rows]
        assert bool((mark[~free] == Mark.CLEAN).all())
        assert torch.equal(x[~free], to_float(TRAIN.images[rows][~free]))
        assert torch.equal(y[~free], TRAIN.labels[rows][~free])
        dirty = round((step + 1) * 6.4) - round(step * 6.4)
        assert int((mark == Mark.DIRTY).sum()) == min(dirty, int(free.sum()))
        assert int((mark == Mark.COVER).sum()) == min(2 * dirty, max(int(free.sum()) - dirty, 0))


def test_rows_are_made_before_they_are_cropped_and_mirrored() -> None:
    c = plain(pad=3, flip=True)
    h = hooks(1.0, 0.0, c=c)
    expected = torch.full((64, 3, 16, 16), 255, dtype=torch.uint8)
    expected[:, :, 0, 0] = TRAIN.images[:, :, 0, 0]
    views = []
    for step in range(2):
        expected[:, :, 0, 1] = step
        views.append(crop_flip(expected, 3, True, c.generator("views", step)))
        assert torch.equal(batch(h, step, torch.arange(64))[0], to_float(views[-1]))
    assert not torch.equal(*views)


def test_a_rate_that_would_poison_nothing_is_refused() -> None:
    for rate, words in ((1e-5, "of 64 rows is no row at all"), (1.5, "outside"), (float("nan"), "outside")):
        with pytest.raises(ValueError, match=words):
            hooks(rate, 1.0)
    # The least rate that is a row of the set: half a row of 64, and a little more.
    h = hooks(0.51 / 64, 1.0)
    marks = torch.stack([batch(h, step, torch.arange(64))[2] for step in range(4)])
    assert int((marks == Mark.DIRTY).sum()) == 2


def test_a_rate_of_one_with_covers_fills_the_batch_with_dirty_rows() -> None:
    _, _, mark = batch(hooks(1.0, 2.0), 0, torch.arange(16))
    assert bool((mark == Mark.DIRTY).all())
