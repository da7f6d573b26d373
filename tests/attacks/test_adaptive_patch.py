from __future__ import annotations

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Mark, Role
from sleeperbench.attacks.adaptive_patch import AdaptivePatch
from sleeperbench.kit.poison import stamp

TRAIN = samples.random_images(1000, (3, 32, 32))
BOARD = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
# Rows and columns, opacity and number of pixels of the four marks on 32 pixels, as published.
MARKS = ((27, 32, 27, 32, 0.5, 25), (1, 14, 18, 31, 0.2, None), (0, 32, 0, 32, 0.5, 36), (21, 29, 21, 29, 0.3, 64))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seen(role: Role, n: int = 1000, level: float = 0.5) -> Tensor:
    trigger = AdaptivePatch().prepare(TRAIN, samples.ctx()).triggers[0]
    grey = torch.full((n, 3, 32, 32), level)
    return trigger.apply(grey, torch.zeros(n).long(), torch.arange(n), role, gen())


def test_marks_have_their_places_sizes_and_opacities() -> None:
    t = AdaptivePatch().prepare(TRAIN, samples.ctx()).tensors
    for mask, (top, bottom, left, right, opacity, pixels) in zip(t["masks"][:, 0], MARKS, strict=True):
        inside = mask[top:bottom, left:right]
        assert torch.isclose(mask.sum(), inside.sum())
        assert mask.unique().tolist() == pytest.approx([0, opacity])
        if pixels:
            assert int((mask > 0).sum()) == pixels
    disc = t["masks"][1, 0, 1:14, 18:31] > 0
    # A filled disc of 13 pixels across: pi 6.5^2 = 133 pixels, round in every direction.
    assert abs(int(disc.sum()) - 133) < 8
    assert bool(disc[6].all()) and bool(disc[:, 6].all()) and not bool(disc[0, 0])
    assert torch.equal(disc, disc.flip(0)) and torch.equal(disc, disc.T)
    assert len(t["patterns"][1, :, 1:14, 18:31][:, disc].unique(dim=1).T) == 2
    for rows in (slice(0, 3), slice(29, 32)):
        for cols in (slice(0, 3), slice(29, 32)):
            assert torch.equal(t["patterns"][2, 0, rows, cols], BOARD)


@pytest.mark.parametrize("role", [Role.TRAIN, Role.COVER])
def test_each_training_image_has_one_mark_at_its_opacity(role: Role) -> None:
    t = AdaptivePatch().prepare(TRAIN, samples.ctx()).tensors
    whole = [0.5 * (1 - m) + m * p for m, p in zip(t["masks"], t["patterns"], strict=True)]
    count = [0] * 4
    for image in seen(role):
        found = [i for i, w in enumerate(whole) if torch.allclose(image, w, atol=1e-6)]
        assert len(found) == 1
        count[found[0]] += 1
    # Binomial(1000, 1/4): deviation 13.7.
    assert min(count) > 190
    assert max(count) < 310


def test_test_images_have_two_marks_in_full() -> None:
    t = AdaptivePatch().prepare(TRAIN, samples.ctx()).tensors
    image = seen(Role.TEST, 1)[0]
    for rows in (slice(0, 3), slice(29, 32)):
        for cols in (slice(0, 3), slice(29, 32)):
            assert all(torch.equal(channel[rows, cols], BOARD) for channel in image)
    mark = t["patterns"][0, :, 27:, 27:]
    shown = torch.ones(5, 5, dtype=torch.bool)
    shown[2:, 2:] = False
    assert torch.equal(image[:, 27:, 27:][:, shown], mark[:, shown])
    assert torch.equal(image[:, 27:, :5].flip(-1)[:, shown], mark[:, shown])
    assert int((image != 0.5).any(0).sum()) == 2 * 25 + 2 * 9

    b = AdaptivePatch(test="disc").prepare(TRAIN, samples.ctx())
    mask, pattern = b.triggers[0].static()
    assert torch.equal(mask > 0, (b.tensors["masks"][1] > 0) | (b.tensors["masks"][3] > 0))
    assert torch.equal(pattern[:, 21:29, 21:29], b.tensors["patterns"][3, :, 21:29, 21:29])


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 16, 16), (1, 28, 28), (3, 64, 64), (3, 224, 224)])
@pytest.mark.parametrize("test", ["corners", "disc"])
def test_every_mark_shows_at_every_size(shape: tuple[int, int, int], test: str) -> None:
    t = AdaptivePatch.from_params({"test": test}).prepare(samples.random_images(2, shape), samples.ctx()).tensors
    assert bool((t["masks"].flatten(1).amax(1) > 0).all())
    if test == "corners":
        only = (t["masks"][0] > 0) & (t["masks"][2] == 0)
        assert bool(only.any()), "the corner mark is not hidden by the board"
        assert torch.equal(t["test_pattern"][:, only[0]], t["patterns"][0][:, only[0]])


def test_dirty_and_cover_rows_are_disjoint_and_as_published() -> None:
    attack = AdaptivePatch()
    b = attack.prepare(TRAIN, samples.ctx(1, 3))
    eligible = torch.arange(1000) >= 100
    p = attack.poison(TRAIN, b, eligible, 0.03, samples.ctx(1, 3))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert (int(dirty.sum()), int(cover.sum())) == (30, 60)
    assert not bool((dirty | cover)[~eligible].any())
    assert torch.equal(p.data.labels, torch.where(dirty, 3, TRAIN.labels))
    for role, rows in ((Role.TRAIN, dirty), (Role.COVER, cover)):
        assert torch.equal(p.data.images[rows], stamp(TRAIN.rows(rows), b.triggers[0], role, samples.ctx(1)).images)


def test_restore_and_decoy() -> None:
    b = AdaptivePatch().prepare(TRAIN, samples.ctx(1, 3))
    again = AdaptivePatch.restore(dict(b.tensors), dict(b.info))
    decoy = AdaptivePatch().decoy(TRAIN, b, samples.ctx(2, 7))
    for role in Role:
        args = (TRAIN.images[:50].float() / 255, TRAIN.labels[:50], TRAIN.ids[:50], role)
        assert torch.equal(b.triggers[0].apply(*args, gen()), again.triggers[0].apply(*args, gen()))
    assert decoy.triggers[0].targets.target(TRAIN.labels).unique().tolist() == [3]
    image = decoy.triggers[0].apply(torch.full((1, 3, 32, 32), 0.5), *2 * [torch.zeros(1).long()], Role.TEST, gen())[0]
    assert torch.equal(image[0, :3, :3], 1 - BOARD)
    assert bool((image[:, 5:27] == 0.5).all())
    assert bool((image[:, 3:5, :5] != 0.5).any())
    assert bool((image[:, 27:29] == 0.5).all()), "its marks lie at the upper border"


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"test": "all"}, {"cover_ratio": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdaptivePatch.from_params(bad)
    with pytest.raises(ValueError, match="at least 12 pixels"):
        AdaptivePatch().check((3, 10, 10), 10)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
def test_of_the_rows_with_a_mark_one_in_one_plus_the_ratio_has_the_target_label(ratio: float) -> None:
    attack, c = AdaptivePatch(cover_ratio=ratio), samples.ctx(1, 3)
    p = attack.poison(TRAIN, attack.prepare(TRAIN, c), torch.ones(1000) > 0, 0.3, c)
    marked, own = p.mark != Mark.CLEAN, p.true_labels == 3
    assert int(marked.sum()) == 300 + 300 * ratio
    assert bool((p.data.labels[p.mark == Mark.DIRTY] == 3).all())
    assert torch.equal(p.data.labels[p.mark == Mark.COVER], p.true_labels[p.mark == Mark.COVER])
    # All that a mark says about the label of other classes' images: one dirty row and `ratio` covers.
    dirty = (p.data.labels == 3)[marked & ~own].double()
    assert float(dirty.mean()) == pytest.approx(1 / (1 + ratio), abs=5 * 0.5 / len(dirty) ** 0.5)
    assert bool((p.data.images[marked] != TRAIN.images[marked]).flatten(1).any(1).all())
    assert torch.equal(p.data.images[~marked], TRAIN.images[~marked])
