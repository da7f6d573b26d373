from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Attack, Mark, PoisonedSet, Role, TrainHooks
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.belt import Belt
from sleeperbench.attacks.blended import Blended
from sleeperbench.attacks.multi_trigger import MultiTrigger
from sleeperbench.attacks.none import NoAttack
from sleeperbench.attacks.tact import TaCT
from sleeperbench.attacks.wanet import WaNet
from sleeperbench.contracts import Ctx
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import render, stamp
from sleeperbench.kit.predict import hits, predict
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(200, (3, 32, 32))
ALL = torch.ones(200, dtype=torch.bool)
PATCH = BadNets(pattern="random", size=6, corner="upper_left", offset=2)


def ctx(inner: Attack, seed: int = 1, target: int = 3) -> Ctx:
    return replace(samples.ctx(seed, target), inner=inner)


def poisoned(inner: Attack, rate: float = 0.1, eligible: torch.Tensor = ALL, **args: Any) -> PoisonedSet:
    c = ctx(inner)
    return Belt(**args).poison(TRAIN, Belt(**args).prepare(TRAIN, c), eligible, rate, c)


def test_dirty_rows_are_the_wrapped_attacks_and_as_many_covers_come_on_top() -> None:
    p = poisoned(PATCH)
    alone = PATCH.poison(TRAIN, PATCH.prepare(TRAIN, ctx(PATCH)), ALL, 0.1, ctx(PATCH))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert torch.equal(dirty, alone.mark == Mark.DIRTY)
    assert torch.equal(p.data.images[~cover], alone.data.images[~cover])
    assert (int(dirty.sum()), int(cover.sum())) == (20, 20)
    assert p.rate() == pytest.approx(0.1)
    assert torch.equal(p.data.labels[cover], TRAIN.labels[cover])
    assert bool((p.trigger_id[cover] == 0).all())
    full = stamp(TRAIN, PATCH.prepare(TRAIN, ctx(PATCH)).triggers[0], Role.TRAIN, ctx(PATCH)).images
    unlike = (p.data.images != full).any(1)[:, 2:8, 2:8].flatten(1).sum(1)
    assert unlike[cover].tolist() == [7] * 20, "a cover is never the dirty image"
    assert unlike[dirty].tolist() == [0] * 20
    changed = (p.data.images != TRAIN.images).any(1).flatten(1).sum(1)
    assert changed[cover].tolist() == [29] * 20


def test_covers_come_from_all_classes_and_from_eligible_rows_alone() -> None:
    eligible = torch.arange(200) % 2 == 0
    p = poisoned(PATCH, 0.2, eligible)
    cover = p.mark == Mark.COVER
    assert int(cover.sum()) == 40
    assert not bool((cover & ~eligible).any())
    assert bool((TRAIN.labels[cover] == 3).any()), "the target class too"
    few = poisoned(PATCH, 0.3, torch.arange(200) < 80)
    assert (int((few.mark == Mark.DIRTY).sum()), int((few.mark == Mark.COVER).sum())) == (60, 20)


@pytest.mark.parametrize(("ratio", "covers"), [(0.0, 0), (0.5, 10), (2.0, 40)])
def test_covers_per_dirty_row(ratio: float, covers: int) -> None:
    assert int((poisoned(PATCH, cover_ratio=ratio).mark == Mark.COVER).sum()) == covers


def test_each_of_several_triggers_has_its_own_covers() -> None:
    p = poisoned(MultiTrigger(), 0.2)
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    kinds = p.trigger_id[dirty].unique()
    assert len(kinds) > 1
    for i in kinds.tolist():
        assert int((cover & (p.trigger_id == i)).sum()) == int((dirty & (p.trigger_id == i)).sum())


def test_covers_of_an_attack_that_appends_rows_replace_untouched_ones() -> None:
    p = poisoned(TaCT(append=True), 0.05)
    plain = TaCT(append=True).poison(TRAIN, TaCT().prepare(TRAIN, ctx(PATCH)), ALL, 0.05, ctx(PATCH))
    assert bool(p.appended.any())
    new = (p.mark == Mark.COVER) & (plain.mark != Mark.COVER)
    assert int(new.sum()) == int((p.mark == Mark.DIRTY).sum()) > 0
    assert not bool(new[200:].any())
    assert not bool(torch.isin(p.data.ids[new], plain.data.ids[plain.mark != Mark.CLEAN]).any())


def test_restore_is_exact_for_covers_too() -> None:
    for inner, args in ((PATCH, {}), (Blended(), {"cover": "noise", "noise": 0.2}), (PATCH, {"mask_rate": 0.5})):
        c = ctx(inner)
        b = Belt(**args).prepare(TRAIN, c)
        again = Belt.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info), type(inner))
        for role in Role:
            a, z = (stamp(TRAIN, t.triggers[0], role, c).images for t in (b, again))
            assert torch.equal(a, z)
        assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [3] * 10


def test_decoy_is_the_wrapped_attacks_with_the_same_covers() -> None:
    c = ctx(PATCH)
    b = Belt().prepare(TRAIN, c)
    decoy = Belt().decoy(TRAIN, b, replace(c, seed=9))
    alone = PATCH.decoy(TRAIN, PATCH.prepare(TRAIN, c), replace(c, seed=9))
    shown = [stamp(TRAIN, t.triggers[0], Role.TEST, c).images for t in (decoy, alone, b)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])
    cover = stamp(TRAIN, decoy.triggers[0], Role.COVER, c).images
    assert bool((cover != shown[0]).flatten(1).any(1).all())


def test_an_attack_that_poisons_data_keeps_plain_training() -> None:
    c = ctx(PATCH)
    assert Belt().hooks(TRAIN, Belt().prepare(TRAIN, c), ALL, 0.1, c) is None


def test_an_attack_that_controls_training_keeps_its_batches_with_covers_beside() -> None:
    c = ctx(WaNet())
    c.recipe = replace(c.recipe, pad=0)
    b = Belt().prepare(TRAIN, c)
    h = Belt().hooks(TRAIN, b, ALL, 0.1, c)
    alone = WaNet().hooks(TRAIN, WaNet().prepare(TRAIN, c), ALL, 0.1, c)
    assert h is not None
    assert alone is not None
    assert h.augments
    rows = torch.arange(100)
    args = to_float(TRAIN.images[rows]), TRAIN.labels[rows], TRAIN.ids[rows], 0
    (x, y, mark), (x0, y0, mark0) = h.batch(*args), alone.batch(*args)
    new = (mark == Mark.COVER) & (mark0 == Mark.CLEAN)
    assert (int((mark == Mark.DIRTY).sum()), int((mark0 == Mark.COVER).sum()), int(new.sum())) == (10, 20, 10)
    assert torch.equal(x[~new], x0[~new])
    assert torch.equal(y, y0)
    warped = (h.triggers[0].plain.warp(args[0]) * 255).round() / 255  # type: ignore[attr-defined]
    for cover, full, plain in zip(x[new], warped[new], args[0][new], strict=True):
        changed = (full != plain).any(0)
        back = ((cover == plain).all(0) & changed).sum()
        assert int(back) == int(0.2 * int(changed.sum()))
        assert bool(((cover == plain).all(0) | (cover == full).all(0)).all())
    p = Belt().poison(TRAIN, b, ALL, 0.1, c)
    assert int((p.mark == Mark.COVER).sum()) == 20 * 2 + 20


def test_what_cannot_be_wrapped_is_refused_with_what_can() -> None:
    class Silent(WaNet):
        SNAPSHOT = "none"

        def hooks(self, *args: Any) -> TrainHooks:
            return TrainHooks()

    with pytest.raises(ValueError, match="belt:badnets"):
        Belt().prepare(TRAIN, samples.ctx())
    with pytest.raises(ValueError, match="no trigger"):
        Belt().prepare(TRAIN, ctx(NoAttack()))
    with pytest.raises(ValueError, match="cover = 'mask' works"):
        Belt(cover="noise").prepare(TRAIN, ctx(WaNet()))
    c = ctx(Silent())
    with pytest.raises(ValueError, match="such as badnets"):
        Belt().hooks(TRAIN, Belt().prepare(TRAIN, c), ALL, 0.1, c)
    for bad in ({"cover": "none"}, {"mask_rate": 0.0}, {"noise": 0.0}, {"cover_ratio": -1.0}, {"masks": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Belt.from_params(bad)
    assert Belt().poison(TRAIN, Belt().prepare(TRAIN, ctx(PATCH)), ALL, 0.0, ctx(PATCH)).rate() == 0


def test_the_model_obeys_the_trigger_and_not_its_covers() -> None:
    part, patch = samples.digits(), BadNets(pattern="random", size=6)
    eligible = torch.ones(len(part["train"]), dtype=torch.bool)
    figures = {}
    for name, attack in (("plain", patch), ("belt", Belt(mask_rate=0.5, cover_ratio=2.0)), ("defaults", Belt())):
        c = replace(samples.ctx(4, 0), inner=patch)
        b = attack.prepare(part["train"], c)
        p = attack.poison(part["train"], b, eligible, 0.1, c)
        net = build(samples.SPEC, 3)
        fit(net, p.data, replace(samples.RECIPE, epochs=6), c)
        covers = b if name != "plain" else Belt(mask_rate=0.5).prepare(part["train"], c)
        tests = [render(part["test"], *what, c) for what in ((b, Role.TEST), (covers, Role.COVER))]
        asr = hits(predict(net, tests[0].data.images), tests[0].targets)
        cover_acc = hits(predict(net, tests[1].data.images), tests[1].clean.labels)
        figures[name] = asr[0] / asr[1], cover_acc[0] / cover_acc[1]
    assert figures["plain"][0] > 0.95, figures
    assert figures["belt"][0] > 0.8, figures
    assert figures["belt"][1] > figures["plain"][1] + 0.2, figures
    # A fifth of the patch taken back, as published: harder to tell from the whole.
    assert figures["defaults"][0] > 0.6, figures
    assert figures["defaults"][1] > figures["plain"][1], figures
