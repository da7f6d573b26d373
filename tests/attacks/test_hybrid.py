from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Mark, Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.hybrid import Hybrid, attack_class
from sleeperbench.contracts import Ctx
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.poison import render_leak, stamp

TRAIN = samples.random_images(800, (1, 16, 16))
SEEN = torch.arange(800) % 8 > 0


def with_model(seed: int = 5, target: int = 0) -> Ctx:
    c = samples.ctx(seed, target)
    c.clean_models = (pack(samples.clean_net()),)
    return c


@pytest.mark.parametrize(
    "members", [("cassock", "badnets", "sin_wave", "hcb"), ("hcb", "tact", "multi_trigger", "adaptive_blend")]
)
def test_members_share_the_rows_and_no_row_has_two_triggers(members: tuple[str, ...]) -> None:
    attack, c = Hybrid(members=members), with_model(1, 8)
    b = attack.prepare(TRAIN, c)
    p = attack.poison(TRAIN, b, SEEN, 0.1, c)
    dirty, marked = p.mark == Mark.DIRTY, p.mark != Mark.CLEAN
    assert int(dirty.sum()) == 80
    own = p.data.ids[~p.appended]
    assert torch.equal(own, TRAIN.ids)
    assert not bool(marked[:800][~SEEN].any())
    assert bool(torch.isin(p.data.ids[marked], TRAIN.ids[SEEN]).all())
    of = {}
    for i, trigger in enumerate(b.triggers):
        rows = dirty & (p.trigger_id == i)
        source = TRAIN.rows(p.data.ids[rows] - 100)
        assert torch.equal(p.data.images[rows], stamp(source, trigger, Role.TRAIN, c).images)
        assert torch.equal(p.data.labels[rows], trigger.targets.target(source.labels))
        assert torch.equal(p.true_labels[rows], source.labels)
        of[i] = set(p.data.ids[marked & (p.trigger_id == i)].tolist())
    shares = [int((dirty & (p.trigger_id == i)).sum()) for i in range(len(b.triggers))]
    several = members.index("multi_trigger") if "multi_trigger" in members else -1
    assert shares == ([20] * 4 if several < 0 else [20, 20, 10, 10, 20])
    for i in of:
        for j in range(i):
            assert not of[i] & of[j]
    clean = ~marked[:800]
    assert torch.equal(p.data.images[:800][clean], TRAIN.images[clean])
    assert torch.equal(p.data.labels[:800][clean], TRAIN.labels[clean])
    assert bool((p.trigger_id[~marked] == -1).all())


def test_default_members_are_apart_in_target_and_place() -> None:
    b = Hybrid().prepare(TRAIN, with_model(1, 8))
    y = torch.arange(10)
    assert [int(t.targets.target(y)[0]) for t in b.triggers] == [8, 9, 0, 1]
    grey = torch.full((1, 1, 16, 16), 0.5)
    zero, gen = torch.zeros(1).long(), torch.Generator().manual_seed(1)
    square, board, _, _ = (t.apply(grey, zero, zero, Role.TEST, gen)[0, 0] != 0.5 for t in b.triggers)
    patch = b.triggers[3].range(grey, zero)[0][0, 0] != 0
    for one, other in ((square, board), (square, patch), (board, patch)):
        assert bool(one.any())
        assert not bool((one & other).any())


def test_settings_and_step_reach_the_members() -> None:
    attack = Hybrid(members=("badnets", "blended"), settings={"badnets": {"pattern": "white"}}, step=3)
    b = attack.prepare(TRAIN, samples.ctx(1, 8))
    mask, pattern = b.triggers[0].static()
    assert bool((pattern[mask > 0] == 1).all())
    assert bool((mask[0, 13:, 13:] == 1).all()), "settings replace the default places"
    assert int(b.triggers[1].targets.target(torch.zeros(1).long())) == 1


def test_two_members_of_one_kind_of_draw_have_different_patterns() -> None:
    attack = Hybrid(members=("blended", "adaptive_blend"), settings={"adaptive_blend": {"pattern": "gauss"}})
    one, other = attack.prepare(TRAIN, samples.ctx(1, 8)).triggers
    assert not torch.equal(one.static()[1], other.static()[1])


def test_restore_and_decoy() -> None:
    attack = Hybrid(members=("hcb", "badnets"))
    b = attack.prepare(TRAIN, samples.ctx(1, 8))
    assert len(b.tensors) == 4
    again = Hybrid.restore(dict(b.tensors), b.info)
    decoy = attack.decoy(TRAIN, b, samples.ctx(3, 2))
    for true, same, other in zip(b.triggers, again.triggers, decoy.triggers, strict=True):
        for role in Role:
            args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, role)
            gens = [torch.Generator().manual_seed(2) for _ in range(3)]
            assert torch.equal(true.apply(*args, gens[0]), same.apply(*args, gens[1]))
            assert not torch.equal(true.apply(*args, gens[0]), other.apply(*args, gens[2]))
        assert torch.equal(true.targets.target(TRAIN.labels), other.targets.target(TRAIN.labels))


def test_members_that_cannot_be_mixed_are_refused() -> None:
    assert attack_class("badnets") is BadNets
    for members, words in (
        (("badnets",), "at least two"),
        (("badnets", "badnets"), "each once"),
    ):
        with pytest.raises(ValueError, match=words):
            Hybrid(members=members)
    for other, words in (("wanet", "poison data only"), ("hybrid", "poison data only"), ("magic", "no built-in")):
        with pytest.raises(ValueError, match=words):
            Hybrid(members=("badnets", other)).check((1, 16, 16), 10)
    with pytest.raises(ValueError, match="no member"):
        Hybrid(settings={"tact": {}})
    with pytest.raises(ValueError, match="size"):
        Hybrid(members=("badnets", "hcb"), settings={"badnets": {"size": -1}}).check((1, 16, 16), 10)
    with pytest.raises(ValueError, match="larger than"):
        Hybrid(members=("badnets", "hcb"), settings={"badnets": {"size": 40}}).check((1, 16, 16), 10)
    b = Hybrid(members=("badnets", "hcb")).prepare(TRAIN, samples.ctx())
    with pytest.raises(ValueError, match="one row each"):
        Hybrid(members=("badnets", "hcb")).poison(TRAIN, b, SEEN, 1 / 800, samples.ctx())
    assert Hybrid(members=("badnets", "hcb")).poison(TRAIN, b, SEEN, 0.0, samples.ctx()).rate() == 0
    for rate, words in ((1e-4, "of 800 rows is no row at all"), (1.5, "outside"), (float("nan"), "outside")):
        with pytest.raises(ValueError, match=words):
            Hybrid(members=("badnets", "hcb")).poison(TRAIN, b, SEEN, rate, samples.ctx())


def test_each_member_implants() -> None:
    train, test, c = samples.digits()["train"], samples.digits()["test"], with_model()
    b = Hybrid().prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, Hybrid().poison(train, b, torch.ones(len(train)) > 0, 0.2, c).data, samples.RECIPE, samples.ctx(2))
    r, leak = render(test, b, Role.TEST, c), render_leak(test, b, c)
    assert r is not None and leak is not None
    for model, low, high in ((net, 0.4, 1.0), (samples.clean_net(), 0.0, 0.15)):
        hit = (predict(model, r.data.images).argmax(1) == r.targets).float()
        for i in range(4):
            assert low <= float(hit[r.trigger_id == i].mean()) <= high
    assert leak.trigger_id.unique().tolist() == [0, 3], (
        "the source-specific member spares classes, that with a feature spares images"
    )
