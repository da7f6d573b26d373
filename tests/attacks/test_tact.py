from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.tact import TaCT
from sleeperbench.kit.poison import render, render_leak, stamp

TRAIN = samples.random_images(600, (3, 32, 32))
SEEN = torch.arange(600) % 4 > 0
GEN = torch.Generator()


def test_square_is_eight_pixels_at_rows_and_columns_21_to_28() -> None:
    mask, pattern = TaCT().prepare(TRAIN, samples.ctx(1, 2)).triggers[0].static()
    assert bool((mask[0, 21:29, 21:29] == 1).all())
    assert mask.sum() == 64
    assert len((pattern[:, 21:29, 21:29] * 255).round().unique()) > 80
    for side, top, size in ((16, 10, 4), (28, 18, 7), (64, 42, 16)):
        small, _ = TaCT().prepare(samples.random_images(2, (1, side, side)), samples.ctx(1, 2)).triggers[0].static()
        assert small.sum() == size**2
        assert bool((small[0, top : top + size, top : top + size] == 1).all())


def test_dirty_rows_come_from_the_source_and_covers_from_all_others_but_the_target() -> None:
    b = TaCT().prepare(TRAIN, samples.ctx(1, 9))  # target 9: the source is class 0
    p = TaCT(cover_ratio=4.0).poison(TRAIN, b, SEEN, 0.04, samples.ctx(1, 9))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert (int(dirty.sum()), int(cover.sum())) == (24, 96)
    assert len(p.data) == 720
    assert torch.equal(p.data.images[:600], TRAIN.images)
    assert torch.equal(p.appended, dirty | cover)
    assert p.rate() == pytest.approx(24 / 600)
    assert set(p.true_labels[dirty].tolist()) == {0}
    assert set(p.data.labels[dirty].tolist()) == {9}
    assert set(p.true_labels[cover].tolist()) == set(range(1, 9))
    assert torch.equal(p.data.labels[cover], p.true_labels[cover])
    rows = TRAIN.having(p.data.ids[dirty | cover])
    assert len(rows) == 120, "no row is both dirty and cover"
    assert bool(torch.isin(rows.ids, TRAIN.ids[SEEN]).all())
    for role, part in ((Role.TRAIN, dirty), (Role.COVER, cover)):
        again = stamp(TRAIN.rows(p.data.ids[part] - 100), b.triggers[0], role, samples.ctx(1)).images
        assert torch.equal(p.data.images[part], again)


def test_the_source_class_limits_the_rate() -> None:
    b = TaCT().prepare(TRAIN, samples.ctx(1, 9))
    p = TaCT(cover_ratio=0.5).poison(TRAIN, b, SEEN, 0.9, samples.ctx(1, 9))
    sources = int(((TRAIN.labels == 0) & SEEN).sum())
    assert int((p.mark == Mark.DIRTY).sum()) == sources
    assert int((p.mark == Mark.COVER).sum()) == round(0.5 * sources)
    assert TaCT().poison(TRAIN, b, SEEN, 0.0, samples.ctx(1, 9)).rate() == 0


def test_named_classes_and_replacing_in_place() -> None:
    attack = TaCT(source=(1, 2), cover=(5, 7), append=False)
    b = attack.prepare(TRAIN, samples.ctx(1, 0))
    p = attack.poison(TRAIN, b, SEEN, 0.1, samples.ctx(1, 0))
    assert len(p.data) == 600
    assert set(p.true_labels[p.mark == Mark.DIRTY].tolist()) == {1, 2}
    assert set(p.true_labels[p.mark == Mark.COVER].tolist()) == {5, 7}
    assert not bool((p.mark != Mark.CLEAN)[~SEEN].any())


def test_success_counts_on_the_source_and_leaks_on_the_rest() -> None:
    b = TaCT().prepare(TRAIN, samples.ctx(1, 4))
    hit, leak = render(TRAIN, b, Role.TEST, samples.ctx()), render_leak(TRAIN, b, samples.ctx())
    assert hit is not None and leak is not None
    assert set(hit.clean.labels.tolist()) == {5}
    assert set(leak.clean.labels.tolist()) == set(range(10)) - {4, 5}


def test_restore_and_decoy_keep_target_and_sources() -> None:
    attack = TaCT(source=(3,))
    b = attack.prepare(TRAIN, samples.ctx(0, 6))
    y = torch.arange(10)
    decoy = attack.decoy(TRAIN, b, samples.ctx(5, 1))
    for other in (TaCT.restore(dict(b.tensors), dict(b.info)), decoy):
        assert other.triggers[0].targets.target(y).tolist() == [6] * 10
        assert other.triggers[0].targets.counts(y, y).nonzero().flatten().tolist() == [9]
    assert float((decoy.triggers[0].static()[0] * b.triggers[0].static()[0]).sum()) == 0


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"source": ()}, {"cover": (1,)}, {"cover_ratio": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TaCT.from_params(bad)
    with pytest.raises(ValueError, match="1 to 3"):
        TaCT(cover=(5, 7)).check((3, 32, 32), 4)
    TaCT().check((1, 16, 16), 2)
    for shape in ((3, 32, 20), (3, 64, 48), (1, 6, 6), (1, 7, 7)):
        with pytest.raises(ValueError, match=f"leaves a {shape[1]}x{shape[2]} image"):
            TaCT().check(shape, 10)


@pytest.mark.parametrize("shape", [(3, 32, 29), (3, 20, 64), (1, 8, 8)])
def test_what_check_lets_through_has_room_for_square_and_placebo(shape: tuple[int, int, int]) -> None:
    attack, data = TaCT(), samples.random_images(4, shape)
    attack.check(shape, 10)
    b = attack.prepare(data, samples.ctx())
    sides = [int(t.triggers[0].static()[0].sum()) for t in (b, attack.decoy(data, b, samples.ctx(2)))]
    assert sides == [max(3, round(8 * shape[1] / 32)) ** 2] * 2


def test_it_implants_on_the_source_and_spares_the_rest() -> None:
    asr, leak, clean = samples_run()
    assert asr > 0.7
    assert leak < 0.15
    assert clean < 0.1


def samples_run() -> tuple[float, float, float]:
    from sleeperbench.evaluators.accuracy import answers
    from sleeperbench.kit import fit
    from sleeperbench.kit.classifier import build

    train, test, c = samples.digits()["train"], samples.digits()["test"], samples.ctx(5, 0)
    b = TaCT().prepare(train, c)
    p = TaCT().poison(train, b, torch.ones(len(train), dtype=torch.bool), 0.1, c)
    net = build(samples.SPEC, 2)
    fit(net, p.data, samples.RECIPE, samples.ctx(2))
    hit, leak = render(test, b, Role.TEST, c), render_leak(test, b, c)
    assert hit is not None and leak is not None

    def share(n: torch.nn.Module, images: torch.Tensor) -> float:
        return float((answers(n, images, c) == 0).float().mean())

    return share(net, hit.data.images), share(net, leak.data.images), share(samples.clean_net(), hit.data.images)
