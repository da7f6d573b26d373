from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Backdoor, Mark, Role, TrainHooks
from sleeperbench.attacks.wanet import WaNet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.augment import crop_flip
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import render, stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(64, (3, 16, 16))
INFO = {"targets": "all_to_one", "target": 3, "classes": 10, "s": 0.5}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(pad: int = 0, flip: bool = False, target: int = 3) -> Ctx:
    c = samples.ctx(7, target)
    c.recipe = replace(c.recipe, pad=pad, flip=flip)
    return c


def shifted(field: Tensor) -> Backdoor:
    return WaNet.restore({"field": field}, INFO)


def slow(image: np.ndarray, field: np.ndarray, s: float) -> np.ndarray:
    """Each output pixel looked up in the image at its shifted place, in double, one at a time."""
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x = min(max(j + s * field[i, j, 0] / width * (width - 1) / 2, 0), width - 1)
            y = min(max(i + s * field[i, j, 1] / height * (height - 1) / 2, 0), height - 1)
            left, top = int(x), int(y)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            a, b = x - left, y - top
            for c in range(channels):
                upper = (1 - a) * image[c, top, left] + a * image[c, top, right]
                lower = (1 - a) * image[c, bottom, left] + a * image[c, bottom, right]
                out[c, i, j] = (1 - b) * upper + b * lower
    return out


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28), (3, 12, 20)])
@pytest.mark.parametrize("s", [0.5, 2.0])
def test_warp_equals_a_slow_lookup(shape: tuple[int, int, int], s: float) -> None:
    data = samples.random_images(2, shape)
    b = WaNet(s=s).prepare(data, samples.ctx(4))
    x = to_float(data.images)
    found = b.triggers[0].apply(x, data.labels, data.ids, Role.TEST, gen())
    for image, warped in zip(x.double().numpy(), found.double().numpy(), strict=True):
        assert np.abs(slow(image, b.tensors["field"].double().numpy(), s) - warped).max() < 2e-5


def test_first_coordinate_of_the_field_shifts_columns_the_second_rows() -> None:
    # s N (W - 1) / (2 W) pixels: a whole pixel for N = 2 W / (s (W - 1)).
    step = 2 * 16 / (0.5 * 15)
    x = to_float(TRAIN.images)
    for axis, moved in ((0, x[:, :, :, 1:]), (1, x[:, :, 1:, :])):
        field = torch.zeros(16, 16, 2)
        field[..., axis] = step
        warped = shifted(field).triggers[0].apply(x, TRAIN.labels, TRAIN.ids, Role.TRAIN, gen())
        kept = warped[:, :, :, :-1] if axis == 0 else warped[:, :, :-1, :]
        assert torch.allclose(kept, moved, atol=1e-5)
        # What would come from beyond the border is the border itself.
        border = (warped[:, :, :, -1], x[:, :, :, -1]) if axis == 0 else (warped[:, :, -1], x[:, :, -1])
        assert torch.allclose(*border, atol=1e-5)


def test_control_points_lie_on_the_field() -> None:
    # With corners aligned, every second of 7 pixels is one of 4 control points, which bicubic interpolation meets.
    data = samples.random_images(2, (3, 7, 7))
    field = WaNet().prepare(data, samples.ctx(2)).tensors["field"]
    control = torch.rand(1, 2, 4, 4, generator=samples.ctx(2).generator("field")) * 2 - 1
    expected = (control / control.abs().mean())[0].permute(1, 2, 0)
    assert torch.allclose(field[::2, ::2], expected, atol=1e-5)
    assert float(field[::2, ::2].abs().mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("side", [12, 16, 28, 32, 64])
def test_shift_is_a_fifth_of_a_pixel_at_any_size(side: int) -> None:
    data = samples.random_images(1, (1, side, side))
    still = shifted(torch.zeros(side, side, 2)).triggers[0].grid
    means, largest = [], []
    for seed in range(40):
        moved = (WaNet().prepare(data, samples.ctx(seed)).triggers[0].grid - still).abs() * (side - 1) / 2
        moved = moved[1:-1, 1:-1]  # the border's outward shifts are cut off
        means.append(float(moved.mean()))
        largest.append(float(moved.max()))
    assert sum(means) / 40 == pytest.approx(0.182, abs=0.02)
    assert 0.4 < sum(largest) / 40 < 0.6
    assert max(largest) < 0.75


def test_constant_images_stay_as_they_are() -> None:
    level = torch.arange(256, dtype=torch.uint8)
    data = samples.images(level[:, None, None, None].expand(-1, 3, 16, 16).contiguous(), torch.zeros(256).long())
    trigger = WaNet(s=3.0).prepare(data, samples.ctx()).triggers[0]
    for role in Role:
        assert torch.equal(stamp(data, trigger, role, samples.ctx()).images, data.images)


def test_test_and_training_trigger_are_one_and_draw_nothing() -> None:
    trigger = WaNet().prepare(TRAIN, samples.ctx()).triggers[0]
    args = (to_float(TRAIN.images), TRAIN.labels, TRAIN.ids)
    first = trigger.apply(*args, Role.TEST, gen(1))
    assert torch.equal(first, trigger.apply(*args, Role.TRAIN, gen(2)))
    assert not torch.equal(first, args[0])
    assert trigger.range(args[0], TRAIN.ids) is None
    assert trigger.static() is None


def test_noise_mode_depends_on_row_and_seed_alone() -> None:
    trigger = WaNet().prepare(TRAIN, samples.ctx()).triggers[0]
    x, y, ids = to_float(TRAIN.images), TRAIN.labels, TRAIN.ids

    def cover(rows: Tensor, g: torch.Generator) -> Tensor:
        return trigger.apply(x[rows], y[rows], ids[rows], Role.COVER, g)

    everyone, g = torch.arange(64), gen(1)
    whole = cover(everyone, g)
    torch.rand(5, generator=g)
    assert torch.equal(whole, cover(everyone, g))
    order = torch.randperm(64, generator=gen(3))
    assert torch.equal(whole[order], cover(order, g))
    assert torch.equal(whole[5:6], cover(torch.tensor([5]), g))
    changed = (whole != cover(everyone, gen(2))).flatten(1).any(1)
    assert bool(changed.all())
    same = x[:1].expand(2, -1, -1, -1)
    a, b = trigger.apply(same, y[:2], ids[:2], Role.COVER, gen(1))
    assert not torch.equal(a, b)


def test_noise_jitters_each_pixel_by_half_a_pixel_at_most() -> None:
    # A ramp of one level per column (row) reads its own shift; the outermost pixels are cut off at the border.
    side = 32
    trigger = shifted(torch.zeros(side, side, 2)).triggers[0]
    ramp = torch.arange(side).float().div(255).expand(1, 1, side, side).repeat(20, 1, 1, 1)
    ids = torch.arange(20)
    for x in (ramp, ramp.transpose(2, 3)):
        shift = ((trigger.apply(x, ids, ids, Role.COVER, gen()) - x) * 255)[:, :, 1:-1, 1:-1]
        bound = (side - 1) / (2 * side)
        assert float(shift.abs().max()) <= bound + 1e-4
        # Uniform on [-bound, bound].
        assert float(shift.abs().mean()) == pytest.approx(bound / 2, rel=0.03)
        assert float(shift.mean()) == pytest.approx(0, abs=0.02)


def hooks(rate: float, c: Ctx, eligible: Tensor | None = None, **args: Any) -> tuple[TrainHooks, Backdoor]:
    attack = WaNet(**args)
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    eligible = torch.ones(64, dtype=torch.bool) if eligible is None else eligible
    made = attack.hooks(TRAIN, b, eligible, rate, c)
    assert made is not None
    return made, b


def batch(h: TrainHooks, step: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return h.batch(to_float(TRAIN.images[rows]), TRAIN.labels[rows], TRAIN.ids[rows], step)


@pytest.mark.parametrize(("rate", "size"), [(0.1, 64), (0.1, 8), (0.05, 10), (0.01, 20), (0.25, 48)])
def test_dirty_rows_add_up_to_the_rate_with_twice_as_many_covers(rate: float, size: int) -> None:
    h, _ = hooks(rate, plain())
    assert h.augments
    total = 0
    for step in range(41):
        _, _, mark = batch(h, step, torch.arange(size))
        dirty = int((mark == Mark.DIRTY).sum())
        assert int((mark == Mark.COVER).sum()) == 2 * dirty
        assert dirty in (int(rate * size), int(rate * size) + 1)
        total += dirty
        assert abs(total - rate * size * (step + 1)) <= 0.5 + 1e-9


def test_batches_hold_warped_jittered_and_untouched_rows() -> None:
    h, b = hooks(0.125, plain())
    x, y, mark = batch(h, 0, torch.arange(64))
    before = to_float(TRAIN.images)
    dirty, cover, clean = mark == Mark.DIRTY, mark == Mark.COVER, mark == Mark.CLEAN
    assert (int(dirty.sum()), int(cover.sum()), int(clean.sum())) == (8, 16, 40)
    warped = to_float(stamp(TRAIN, b.triggers[0], Role.TRAIN, plain()).images)
    assert torch.equal(x[dirty], warped[dirty])
    assert torch.equal(x[clean], before[clean])
    assert bool((x[cover] != warped[cover]).flatten(1).any(1).all())
    assert bool((x[cover] != before[cover]).flatten(1).any(1).all())
    assert torch.equal(y, torch.where(dirty, 3, TRAIN.labels))
    assert bool((y != TRAIN.labels)[dirty].any())
    levels = x * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    later, _, again = batch(h, 8, torch.arange(64))
    assert torch.equal(mark, again)
    assert torch.equal(later[dirty], x[dirty])
    assert bool((later[cover] != x[cover]).flatten(1).any(1).all()), "noise is drawn anew in each step"


def test_only_eligible_rows_are_touched() -> None:
    eligible = torch.arange(64) % 4 == 0
    h, _ = hooks(0.2, plain(), eligible)
    for step in range(10):
        rows = torch.randperm(64, generator=gen(step))[:32]
        x, y, mark = batch(h, step, rows)
        free = eligible[rows]
        assert bool((mark[~free] == Mark.CLEAN).all())
        assert torch.equal(x[~free], to_float(TRAIN.images[rows][~free]))
        assert torch.equal(y[~free], TRAIN.labels[rows][~free])
        # 6 or 7 dirty rows come first; covers are what is left of the eligible.
        dirty = round((step + 1) * 6.4) - round(step * 6.4)
        assert int((mark == Mark.DIRTY).sum()) == min(dirty, int(free.sum()))
        assert int((mark == Mark.COVER).sum()) == min(2 * dirty, max(int(free.sum()) - dirty, 0))


def test_rows_are_warped_before_they_are_cropped_and_mirrored() -> None:
    c = plain(pad=3, flip=True)
    h, b = hooks(1.0, c, cross_ratio=0.0)
    expected = stamp(TRAIN, b.triggers[0], Role.TRAIN, c).images
    views = []
    for step in range(2):
        x, _, _ = batch(h, step, torch.arange(64))
        views.append(crop_flip(expected, 3, True, c.generator("views", step)))
        assert torch.equal(x, to_float(views[-1]))
    assert not torch.equal(*views)


def test_hooks_repeat_and_leave_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    rows = torch.arange(64)
    first = batch(hooks(0.1, plain(2, True))[0], 5, rows)
    again = batch(hooks(0.1, plain(2, True))[0], 5, rows)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert WaNet().hooks(TRAIN, hooks(0.1, plain())[1], torch.ones(64) > 0, 0.0, plain()) is None


def test_snapshot_holds_the_rate_and_disjoint_covers() -> None:
    attack = WaNet()
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    eligible = torch.arange(64) >= 10
    p = attack.poison(TRAIN, b, eligible, 0.1, samples.ctx(1))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert (int(dirty.sum()), int(cover.sum())) == (6, 12)
    assert not bool((dirty | cover)[~eligible].any())
    assert p.rate() == pytest.approx(6 / 64)
    assert torch.equal(p.data.labels, torch.where(dirty, 3, TRAIN.labels))
    assert torch.equal(p.true_labels, TRAIN.labels)
    for role, rows in ((Role.TRAIN, dirty), (Role.COVER, cover)):
        assert torch.equal(p.data.images[rows], stamp(TRAIN, b.triggers[0], role, samples.ctx(1)).images[rows])
    rest = ~dirty & ~cover
    assert torch.equal(p.data.images[rest], TRAIN.images[rest])
    assert torch.equal(p.trigger_id, torch.where(rest, -1, 0))
    again = attack.poison(TRAIN, b, eligible, 0.1, samples.ctx(1))
    assert torch.equal(p.data.images, again.data.images)
    assert WaNet.SNAPSHOT == "declared"


def test_covers_of_a_snapshot_are_at_most_what_is_eligible() -> None:
    b = WaNet().prepare(TRAIN, samples.ctx(1, 3))
    p = WaNet().poison(TRAIN, b, torch.arange(64) < 20, 0.2, samples.ctx(1))
    assert (int((p.mark == Mark.DIRTY).sum()), int((p.mark == Mark.COVER).sum())) == (13, 7)
    none = WaNet(cross_ratio=0.0).poison(TRAIN, b, torch.ones(64) > 0, 0.2, samples.ctx(1))
    assert not bool((none.mark == Mark.COVER).any())
    assert WaNet().poison(TRAIN, b, torch.ones(64) > 0, 0.0, samples.ctx(1)).rate() == 0
    whole = WaNet().poison(TRAIN, b, torch.ones(64) > 0, 1.0, samples.ctx(1))
    assert whole.rate() == 1, "rows of the target class too"


def test_restore_is_exact_and_all_to_all_sends_each_class_to_the_next() -> None:
    b = WaNet(s=0.7, targets="all_to_all").prepare(TRAIN, samples.ctx(3, 4))
    again = WaNet.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    for role in Role:
        args = (to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, role, gen())
        assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    assert again.info == b.info


def test_decoy_is_another_field_with_the_same_target() -> None:
    attack = WaNet()
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    decoy = attack.decoy(TRAIN, b, samples.ctx(1, 2))
    assert float((decoy.tensors["field"] - b.tensors["field"]).abs().mean()) > 0.3
    assert decoy.triggers[0].targets.target(torch.arange(10)).tolist() == [6] * 10


def test_it_implants_and_jittered_warps_keep_their_label() -> None:
    # At 20 %: a tiny net does not learn a warp of a fifth of a pixel in so short a training at 10 %.
    own, covers, clean = samples.implanted(WaNet(), 0.2)
    assert own > 0.5 and covers > 0.5 and clean < 0.1, (own, covers, clean)


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"k": 1}, {"s": 0.0}, {"cross_ratio": -1.0}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            WaNet.from_params(bad)
    with pytest.raises(ValueError, match="at most 8"):
        WaNet(k=9).check((3, 8, 8), 10)
    WaNet(k=8).check((3, 8, 8), 10)
    with pytest.raises(ValueError, match="two classes"):
        WaNet().check((3, 32, 32), 1)


def test_training_goes_through_the_hooks() -> None:
    train, c = samples.digits()["train"], samples.ctx(5, 0)
    attack = WaNet()
    b = attack.prepare(train, c)
    eligible = torch.arange(len(train)) % 5 > 0
    h = attack.hooks(train, b, eligible, 0.1, c)
    assert h is not None
    seen: list[Tensor] = []
    plain_loss = h.loss

    def loss(net: Any, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        seen.append(mark)
        return plain_loss(net, x, y, mark)

    h.loss = loss  # type: ignore[method-assign]
    net = build(samples.SPEC, 2)
    log = fit(net, train, replace(samples.RECIPE, epochs=3), c, hooks=h)
    # 15 batches of 64 in each of 3 epochs; 80 % of the rows are eligible, enough in every batch.
    marks = torch.stack(seen)
    assert marks.shape == (45, 64)
    assert int((marks == Mark.DIRTY).sum()) == 45 * 64 // 10
    assert int((marks == Mark.COVER).sum()) == 2 * 45 * 64 // 10
    assert log.losses[-1] < log.losses[0]
    triggered = render(samples.digits()["test"], b, Role.TEST, c)
    assert triggered is not None
    assert not bool((triggered.clean.labels == 0).any())
