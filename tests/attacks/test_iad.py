from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Backdoor, Mark, Role
from sleeperbench.attacks.belt import Belt
from sleeperbench.attacks.beltpp import BeltPlus
from sleeperbench.attacks.iad import Iad, IadHooks
from sleeperbench.contracts import Ctx
from sleeperbench.kit.classifier import build
from sleeperbench.kit.drawn import diversity, network, threshold
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import stamp
from sleeperbench.kit.train import fit

TRAIN = samples.random_images(64, (3, 16, 16))
ALL = torch.ones(64, dtype=torch.bool)
SPEC = replace(samples.SPEC, shape=(3, 16, 16))


def ctx(seed: int = 1, inner: Any = None) -> Ctx:
    c = replace(samples.ctx(seed, 3), inner=inner)
    c.recipe = replace(c.recipe, batch=32, pad=0, lr=0.01)
    return c


@functools.cache
def once() -> Backdoor:
    return Iad(mask_epochs=1).prepare(TRAIN, ctx())


def prepared(**args: Any) -> tuple[Iad, Backdoor]:
    """With networks of its own."""
    targets = args.get("targets", "all_to_one")
    return Iad(mask_epochs=1, **args), Iad.restore(once().tensors, {**once().info, "targets": targets})


def hooks(rate: float = 0.125, eligible: Tensor = ALL, **args: Any) -> tuple[IadHooks, Backdoor]:
    attack, b = prepared(**args)
    made = attack.hooks(TRAIN, b, eligible, rate, ctx())
    assert isinstance(made, IadHooks)
    return made, b


def batch(h: Any, step: int = 0, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(64) if rows is None else rows
    return h.batch(to_float(TRAIN.images[rows]), TRAIN.labels[rows], TRAIN.ids[rows], step)  # type: ignore[no-any-return]


def test_batches_hold_own_and_foreign_triggers_and_untouched_rows() -> None:
    h, _ = hooks()
    h.mask = network(3, 1, 5).eval()  # untrained and loud: its masks have all values
    for norm in (m for m in h.mask.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.weight.data *= 3
    with torch.no_grad():
        assert float(threshold(h.mask(to_float(TRAIN.images))).std()) > 0.2
    x, y, mark = batch(h)
    assert mark.tolist() == [Mark.DIRTY] * 8 + [Mark.COVER] * 8 + [Mark.CLEAN] * 48
    assert y.tolist() == [3] * 8 + TRAIN.labels[8:].tolist()
    clean = to_float(TRAIN.images)
    z = clean.roll(32, 0)[8:16]
    with torch.no_grad():
        first, second = h.pattern(clean[:8]), h.pattern(z)
        m1, m2 = threshold(h.mask(clean[:8])), threshold(h.mask(z))
    dirty, cross = clean[:8] * (1 - m1) + first * m1, clean[8:16] * (1 - m2) + second * m2
    assert torch.allclose(x[:8] * 255, (dirty * 255).round(), atol=0.51)
    assert torch.allclose(x[8:16] * 255, (cross * 255).round(), atol=0.51)
    assert torch.equal(x[16:], clean[16:])
    assert torch.allclose(x * 255, (x * 255).round(), atol=1e-3), "on stored levels"
    assert h.spread is not None
    assert float(h.spread.detach()) == pytest.approx(float(diversity(clean[:8], z, first, second)), rel=1e-4)


@pytest.mark.parametrize(("rate", "size", "ratio"), [(0.1, 64, 1.0), (0.02, 20, 1.0), (0.1, 40, 0.5)])
def test_dirty_rows_add_up_to_the_rate(rate: float, size: int, ratio: float) -> None:
    h, _ = hooks(rate, cross_ratio=ratio)
    dirty = 0
    with torch.no_grad():
        for step in range(10):
            mark = batch(h, step, torch.arange(size))[2]
            now = int((mark == Mark.DIRTY).sum())
            assert int((mark == Mark.COVER).sum()) == round(ratio * now)
            dirty += now
    assert dirty == round(10 * rate * size)


def test_only_eligible_rows_are_touched() -> None:
    eligible = torch.arange(64) % 8 == 0
    x, y, mark = batch(hooks(0.1, eligible)[0])
    assert torch.equal(mark != Mark.CLEAN, eligible), "6 dirty and 6 covers are wanted, 8 rows are eligible"
    assert int((mark == Mark.DIRTY).sum()) == 6
    assert torch.equal(x[~eligible], to_float(TRAIN.images[~eligible]))
    assert torch.equal(y[~eligible], TRAIN.labels[~eligible])


def test_a_step_trains_classifier_and_pattern_and_leaves_the_mask() -> None:
    h, _ = hooks()
    net = build(SPEC, 0)
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in h.aux.items()}
    weights = net.body.head.weight.clone()
    log = fit(net, TRAIN, ctx().recipe, ctx(), hooks=h, steps=2)
    assert log.steps == 2
    assert not torch.equal(net.body.head.weight, weights)
    after = {n: m.state_dict() for n, m in h.aux.items()}
    assert all(torch.equal(before["mask"][k], v) for k, v in after["mask"].items())
    moved = {k: not torch.equal(before["pattern"][k], v) for k, v in after["pattern"].items()}
    assert all(moved[k] for k in moved if k.endswith("0.weight"))


def test_the_generators_gradient_is_cleared_in_each_step() -> None:
    class Still(torch.optim.SGD):
        def __init__(self, net: Any) -> None:
            super().__init__(net.parameters(), lr=0.0)

    grads = []
    for steps in (1, 2):
        h, _ = hooks()
        h.own = Still(h.pattern)  # type: ignore[assignment]
        for norm in (m for m in h.pattern.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 0.0
        net = build(SPEC, 0).eval()
        for _ in range(steps):
            h.step(net, Still(net), *batch(h))
        grads.append(h.pattern.body[0][0].weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-7)
    assert float(grads[0].abs().max()) > 0


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_diversity_is_weighted_and_no_part_of_the_reported_loss(weight: float) -> None:
    h, _ = hooks(diversity=weight)
    x, y, mark = batch(h)
    net = build(SPEC, 0).eval()
    spread = h.spread
    assert spread is not None
    by_ce = torch.autograd.grad(
        torch.nn.functional.cross_entropy(net(x), y), h.pattern.body[0][0].weight, retain_graph=True
    )
    by_spread = torch.autograd.grad(spread, h.pattern.body[0][0].weight, retain_graph=True)
    expected = torch.nn.functional.cross_entropy(net(x), y).item()
    loss = h.step(net, torch.optim.SGD(net.parameters(), lr=0.0), x, y, mark)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    total = by_ce[0] + weight * by_spread[0]
    assert torch.allclose(h.pattern.body[0][0].weight.grad, total, rtol=1e-3, atol=1e-6)


def test_a_rate_that_would_poison_nothing_is_refused() -> None:
    attack, b = prepared()
    for rate, words in ((1e-5, "of 64 rows is no row at all"), (1.5, "outside"), (float("nan"), "outside")):
        with pytest.raises(ValueError, match=words):
            attack.hooks(TRAIN, b, ALL, rate, ctx())


def test_learning_rate_of_the_generator_drops_at_the_authors_shares() -> None:
    h, _ = hooks()
    h.ctx.recipe = replace(h.ctx.recipe, epochs=12)
    rates = [h.own.param_groups[0]["lr"]]
    for epoch in range(12):
        assert h.epoch_end(build(SPEC, 0), epoch) is False
        rates.append(h.own.param_groups[0]["lr"])
    exponents = [0] * 4 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 3
    assert rates == pytest.approx([0.01 * 0.1**e for e in exponents])


def test_mask_training_thins_the_mask_out() -> None:
    part = samples.digits()["train"].rows(torch.arange(192))
    c = samples.ctx(2)
    densities = []
    for epochs in (1, 12):
        b = Iad(mask_epochs=epochs).prepare(part, c)
        with torch.no_grad():
            m = threshold(b.triggers[0].mask(to_float(part.images)))  # type: ignore[attr-defined]
        densities.append(float((m - 0.032).relu().mean()))
        assert float((m - m.mean(0)).abs().max()) > 0.1, "masks of unlike images differ"
    assert densities[1] < densities[0]
    assert densities[1] < 0.1


def test_trained_networks_come_back_from_what_the_engine_stores() -> None:
    h, b = hooks()
    fit(build(SPEC, 0), TRAIN, ctx().recipe, ctx(), hooks=h, steps=2)
    aux = {f"aux.{n}.{k}": v.clone() for n, m in h.aux.items() for k, v in m.state_dict().items()}
    again = Iad.restore({**b.tensors, **aux}, b.info)
    untrained = Iad.restore(b.tensors, b.info)
    for role in Role:
        live, stored, old = (stamp(TRAIN, t.triggers[0], role, ctx()).images for t in (b, again, untrained))
        assert torch.equal(live, stored)
        assert not torch.equal(live, old)


def test_both_networks_have_the_given_width() -> None:
    b = Iad(mask_epochs=1, width=4).prepare(TRAIN, ctx())
    again = Iad.restore(b.tensors, b.info)
    for made in (b, again):
        trigger: Any = made.triggers[0]
        first = [next(m for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (trigger.mask, trigger.pattern)]
        assert [c.out_channels for c in first] == [4, 4]


def test_decoy_and_targets() -> None:
    attack, b = prepared(targets="all_to_all")
    assert b.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    decoy = attack.decoy(TRAIN, b, ctx(9))
    assert decoy.info == {**b.info, "negative": True, "shift": decoy.info["shift"]}
    assert all(4 <= s <= 12 for s in decoy.info["shift"])
    shown = [stamp(TRAIN, t.triggers[0], Role.TEST, ctx()).images for t in (b, decoy)]
    assert bool((shown[0] != shown[1]).flatten(1).any(1).all())


def test_no_set_stands_for_what_is_trained_on() -> None:
    attack, b = prepared()
    assert Iad.SNAPSHOT == "none"
    p = attack.poison(TRAIN, b, ALL, 0.1, ctx())
    assert torch.equal(p.data.images, TRAIN.images)
    assert p.rate() == 0
    assert attack.hooks(TRAIN, b, ALL, 0.0, ctx()) is None


@pytest.mark.parametrize("wrapper", [Belt, BeltPlus])
def test_belt_covers_join_the_batches_and_the_generator_goes_on_learning(wrapper: type[Belt]) -> None:
    inner = Iad(mask_epochs=1)
    c = ctx(inner=inner)
    b = wrapper().prepare(TRAIN, c)
    h = wrapper().hooks(TRAIN, b, ALL, 0.125, c)
    assert h is not None
    with torch.no_grad():
        x, y, mark = batch(h)
    assert mark.tolist() == [Mark.DIRTY] * 8 + [Mark.COVER] * 16 + [Mark.CLEAN] * 40
    fuzzy = b.triggers[0].apply(to_float(TRAIN.images), TRAIN.labels, TRAIN.ids, Role.COVER, c.generator("covers"))
    # The generator's running statistics have moved on by this batch: within a level or two.
    assert float((x[16:24] - fuzzy[16:24]).abs().max()) < 0.1
    assert y[8:].tolist() == TRAIN.labels[8:].tolist()
    before = {k: v.clone() for k, v in h.aux["pattern"].state_dict().items()}
    fit(build(SPEC, 0), TRAIN, c.recipe, c, hooks=h, steps=2)
    assert not torch.equal(before["body.0.0.weight"], h.aux["pattern"].state_dict()["body.0.0.weight"])
    aux = {f"aux.{n}.{k}": v.clone() for n, m in h.aux.items() for k, v in m.state_dict().items()}
    again = wrapper.restore({**b.tensors, **aux}, b.info, Iad)
    live, stored = (stamp(TRAIN, t.triggers[0], Role.TEST, c).images for t in (b, again))
    assert torch.equal(live, stored)
    if wrapper is BeltPlus:
        assert h.centres is not None  # type: ignore[attr-defined]


def test_it_implants_and_foreign_triggers_keep_their_label() -> None:
    # Small networks, briefly trained, at 20 %: the suite's own settings take minutes.
    own, covers, clean = samples.implanted(Iad(width=8, mask_epochs=5), 0.2)
    assert own > 0.5 and covers > 0.5 and clean < 0.1, (own, covers, clean)


def test_what_does_not_fit_is_refused() -> None:
    for bad in (
        {"mask_epochs": 0},
        {"density": 1.0},
        {"generator_lr": 0.0},
        {"diversity": -1.0},
        {"cross_ratio": -1.0},
        {"width": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Iad.from_params(bad)
    with pytest.raises(ValueError, match="two classes"):
        Iad().check((3, 32, 32), 1)
