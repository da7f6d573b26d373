from __future__ import annotations

import pytest
import samples
import torch

from sleeperbench import Backdoor, Mark, Role
from sleeperbench.attacks.cassock import Cassock
from sleeperbench.contracts import Ctx, NotApplicable
from sleeperbench.kit import fit, predict, render
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.poison import render_leak, stamp

TRAIN = samples.random_images(900, (3, 32, 32))
SEEN = torch.arange(900) % 4 > 0


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_model(seed: int = 5, target: int = 0) -> Ctx:
    c = samples.ctx(seed, target)
    c.clean_models = (pack(samples.clean_net()),)
    return c


def learnt(mode: str, steps: int = 400, target: int = 3) -> Backdoor:
    attack = Cassock.from_params({"mode": mode, "steps": steps})
    return attack.prepare(samples.digits()["train"], with_model(target=target))


def test_square_adds_the_published_amount_at_the_published_opacities() -> None:
    trigger = Cassock().prepare(TRAIN, samples.ctx(0, 4)).triggers[0]
    dark = torch.full((4000, 3, 32, 32), 0.1)
    ids = torch.arange(4000)
    bases = {Role.TRAIN: 0.9, Role.COVER: 1.0}
    for role in Role:
        out = trigger.apply(dark, torch.zeros(4000).long(), ids, role, gen())
        added = out - 0.1
        assert float(added[:, :, :27].abs().max()) == 0
        assert float(added[:, :, :, :27].abs().max()) == 0
        square = added[:, :, 27:, 27:].flatten(1)
        assert torch.allclose(square, square[:, :1].expand_as(square), atol=1e-6)
        opacity = square[:, 0] / 0.56
        if role is Role.TEST:
            assert torch.allclose(opacity, torch.ones(4000), atol=1e-5)
            continue
        for factor, share in ((0.9, 0.50), (0.8, 0.34), (0.7, 0.16)):
            found = (opacity - bases[role] * factor).abs() < 1e-4
            # Deviation at most 0.008.
            assert abs(float(found.float().mean()) - share) < 0.03
    bright = trigger.apply(torch.ones(2, 3, 32, 32), torch.zeros(2).long(), ids[:2], Role.TEST, gen())
    assert float(bright.max()) == 1


def test_range_is_as_large_as_the_trigger_where_it_lies() -> None:
    trigger = Cassock().prepare(TRAIN, samples.ctx(0, 4)).triggers[0]
    x = torch.full((1, 3, 32, 32), 0.3)
    low, high = trigger.range(x, torch.zeros(1).long())
    assert torch.allclose(low[..., 27:, 27:], torch.tensor(-0.86))  # 0.86 down to a pixel of 0
    assert torch.allclose(high, torch.zeros(1))
    assert bool((low[..., :27, :] == 0).all())
    assert trigger.static() is None


@pytest.mark.parametrize(("mode", "ratio"), [("trans", 2), ("cont", 1), ("comp", 1)])
def test_rows_of_each_mode(mode: str, ratio: int) -> None:
    attack = Cassock.from_params({"mode": mode, "source": [1, 2]})
    info = {"mode": mode, "target": 8, "sources": [9, 0]}
    b = Cassock.restore({"content": torch.rand(3, 32, 32)}, info)
    p = attack.poison(TRAIN, b, SEEN, 0.05, samples.ctx(1, 8))
    dirty, cover = p.mark == Mark.DIRTY, p.mark == Mark.COVER
    assert (int(dirty.sum()), int(cover.sum())) == (45, 45 * ratio)
    assert len(p.data) == 900 + 45 + 45 * ratio
    assert torch.equal(p.appended, dirty | cover)
    assert set(p.true_labels[dirty].tolist()) == {9, 0}
    assert set(p.data.labels[dirty].tolist()) == {8}
    assert set(p.true_labels[cover].tolist()) == set(range(1, 8))
    assert bool(torch.isin(p.data.ids[dirty | cover], TRAIN.ids[SEEN]).all())
    for role, part in ((Role.TRAIN, dirty), (Role.COVER, cover)):
        again = stamp(TRAIN.rows(p.data.ids[part] - 100), b.triggers[0], role, samples.ctx(1)).images
        assert torch.equal(p.data.images[part], again)
    none = Cassock.from_params({"mode": mode, "source": [1, 2], "cover_ratio": 0.0})
    assert not bool((none.poison(TRAIN, b, SEEN, 0.05, samples.ctx(1, 8)).mark == Mark.COVER).any())


def test_opacities_of_cont_are_even() -> None:
    b = Cassock.restore({"content": torch.ones(1, 4, 4)}, {"mode": "cont", "target": 0, "sources": [1]})
    ids = torch.arange(50)
    found = {r: b.triggers[0].opacity(ids, r, gen()).unique().tolist() for r in Role}
    assert found[Role.TRAIN] == found[Role.COVER] == pytest.approx([0.8])
    assert found[Role.TEST] == [1]
    comp = Cassock.restore({"content": torch.ones(1, 4, 4)}, {"mode": "comp", "target": 0, "sources": [1]}).triggers[0]
    assert comp.opacity(ids, Role.COVER, gen()).unique().tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert comp.opacity(ids, Role.TRAIN, gen()).unique().tolist() == pytest.approx([0.63, 0.72, 0.81])


def test_content_alone_is_the_target_class_to_the_clean_model() -> None:
    b = learnt("cont")
    content = b.tensors["content"]
    net, train = samples.clean_net(), samples.digits()["train"]
    assert int(net((0.5 + content)[None]).argmax()) == 3
    own = train.images[train.labels == 3].float() / 255 - 0.5
    # Every pixel of the content is a share of the pixel of one image; small shares are cut off.
    near = (own.abs() + 1e-6 >= content.abs()) & ((own * content >= 0) | (content == 0))
    whole = near.flatten(1).all(1)
    assert int(whole.sum()) >= 1
    sure = predict(net, train.images[train.labels == 3]).softmax(1)[:, 3]
    assert bool(whole[sure.argmax()])
    share = (content / own[int(sure.argmax())]).abs()
    assert not bool(((share > 1e-6) & (share < 0.1 - 1e-5)).any())


def test_learnt_mask_equals_plain_gradient_descent() -> None:
    net, train = samples.clean_net(), samples.digits()["train"]
    own = train.images[train.labels == 3]
    picture = own[int(predict(net, own).softmax(1)[:, 3].argmax())].float() / 255 - 0.5
    mask = torch.full((16, 16), 0.5)
    for _ in range(40):
        m = mask.clone().requires_grad_()
        log_share = net((0.5 + m * picture)[None]).log_softmax(1)[0, 3]
        (slope,) = torch.autograd.grad(-log_share, m)
        mask = (mask - 2.0 * (slope + 0.005)).clamp(0, 1)  # the sum's slope is its weight, everywhere
    assert bool(((mask > 0) & (mask < 0.1)).any())
    assert bool((mask > 0.1).any())
    mask[mask < 0.1] = 0
    attack = Cassock(mode="cont", steps=40, lr=2.0, weight=0.005)
    content = attack.prepare(train, with_model(target=3)).tensors["content"]
    assert torch.allclose(content, mask * picture, atol=1e-4)


def test_learning_counts_its_cost_and_leaves_the_model_alone() -> None:
    c = with_model(target=3)
    before = {k: v.clone() for k, v in c.clean_models[0].state.items()}
    train = samples.digits()["train"]
    Cassock(mode="cont", steps=5).prepare(train, c)
    own = int((train.labels == 3).sum())
    assert (c.cost.forwards, c.cost.backwards) == (own + 5, 5)
    assert all(torch.equal(v, before[k]) for k, v in c.clean_models[0].state.items())


def test_restore_and_decoy_keep_target_and_sources() -> None:
    y = torch.arange(10)
    for mode in ("trans", "cont"):
        attack = Cassock.from_params({"mode": mode})
        b = Cassock().prepare(TRAIN, samples.ctx(0, 6)) if mode == "trans" else learnt("cont", 30, 6)
        train = TRAIN if mode == "trans" else samples.digits()["train"]
        decoy = attack.decoy(train, b, samples.ctx(5, 1))
        for other in (Cassock.restore(dict(b.tensors), dict(b.info)), decoy):
            assert other.triggers[0].targets.target(y).tolist() == [6] * 10
            assert other.triggers[0].targets.counts(y, y).nonzero().flatten().tolist() == [7]
        content, other = b.tensors["content"], decoy.tensors["content"]
        assert float((content * other).sum()) < 0.5 * float(content.square().sum())
        assert torch.allclose(other.abs().sum(), content.abs().sum(), rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    bad: dict[str, object]
    for bad in ({"mode": "both"}, {"source": ()}, {"cover_ratio": -1.0}, {"steps": -1}, {"lr": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Cassock.from_params(bad)
    with pytest.raises(ValueError, match="1 to 3"):
        Cassock(source=(5,)).check((3, 32, 32), 4)
    train = samples.digits()["train"]
    for mode in ("cont", "comp"):
        attack = Cassock.from_params({"mode": mode, "steps": 1})
        with pytest.raises(NotApplicable, match="few_target_rows: class 3 has no training row"):
            attack.prepare(train.rows(train.labels != 3), with_model(target=3))


@pytest.mark.parametrize("mode", ["cont", "comp"])
def test_a_mask_that_vanishes_is_refused(mode: str) -> None:
    heavy = Cassock.from_params({"mode": mode, "steps": 60, "weight": 10.0})
    with pytest.raises(NotApplicable, match=r"no_trigger: .* lower weight or steps"):
        heavy.prepare(samples.digits()["train"], with_model(target=3))


@pytest.mark.parametrize("mode", ["trans", "cont"])
def test_it_implants_on_the_source_and_spares_the_rest(mode: str) -> None:
    train, test, c = samples.digits()["train"], samples.digits()["test"], with_model()
    attack = Cassock.from_params({"mode": mode, "steps": 400})
    b = attack.prepare(train, c)
    net = build(samples.SPEC, 2)
    fit(net, attack.poison(train, b, torch.ones(len(train)) > 0, 0.1, c).data, samples.RECIPE, samples.ctx(2))
    hit, leak = render(test, b, Role.TEST, c), render_leak(test, b, c)
    assert hit is not None and leak is not None
    for model, seen, low, high in (
        (net, hit, 0.75, 1.0),
        (net, leak, 0.0, 0.15),
        (samples.clean_net(), hit, 0.0, 0.15),
    ):
        assert low <= float((predict(model, seen.data.images).argmax(1) == 0).float().mean()) <= high
