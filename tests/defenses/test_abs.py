from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Inverted, ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.abs import ABS, Candidate, penalty, reasr, select
from sleeperbench.evaluators.evidence import curve
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.taps import taps


def small(classes: int = 4) -> Classifier:
    spec = ModelSpec(arch="small_cnn", classes=classes, shape=(1, 8, 8), norm=((0.5,), (0.5,)), args={"width": 2})
    return build(spec, 0).eval().requires_grad_(False)


def case(net: Classifier, **parts: Any) -> Any:
    clean = samples.random_images(24, net.spec.shape, net.spec.classes)
    return SimpleNamespace(**{"net": net, "spec": net.spec, "clean": clean, "ctx": samples.ctx(3)} | parts)


def test_settings_are_published() -> None:
    m = ABS()
    assert (m.per_class, m.samples, m.reach, m.top, m.steps, m.lr) == (10, 5, 8.0, 10, 1000, 0.1)
    assert (m.area * 32 * 32, m.weight, m.threshold) == (64, 500, 0.88)
    assert ABS.ACCESS.track() == "T1"


def test_stimulation_is_that_of_a_slow_loop() -> None:
    net, x, ctx = small(), torch.rand(3, 1, 8, 8), samples.ctx()
    body: Any = net.body
    stages = [body.stage1, body.stage2, body.stage3, body.stage4]
    for depth in (1, 3):
        found = ABS(samples=3, reach=6.0).stimulate(net, x, f"body.stage{depth + 1}", ctx)
        a = (x - 0.5) / 0.5
        for stage in stages[: depth + 1]:
            a = stage(a)
        assert found.shape == (a.shape[1], 3, 4)
        for c in range(a.shape[1]):
            for b in range(3):
                levels = []
                for i in range(3):
                    v = a[b : b + 1].clone()
                    v[0, c] = i * 6.0 * a.max() / 3
                    for stage in stages[depth + 1 :]:
                        v = stage(v)
                    levels.append(body.head(v.mean((2, 3)))[0])
                for k in range(4):
                    rise = max(float(level[k]) for level in levels[1:]) - float(levels[0][k])
                    assert float(found[c, b, k]) == pytest.approx(rise, abs=1e-5)
    assert ctx.cost.forwards == (4 + 8) * 3 * 3


def rising(gaps: list[float], label: int, strays: int = 0, images: int = 6) -> torch.Tensor:
    """(len(gaps), images, 3): the label rises by 1 + gap, the others by 1; `strays` images prefer another label."""
    rise = torch.ones(len(gaps), images, 3)
    for c, gap in enumerate(gaps):
        rise[c, :, label] += gap
        rise[c, :strays, (label + 1) % 3] += 50
    return rise


def test_selection() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    (one,) = select({"a": rising([2.0], 1)}, labels, 10)
    assert one == Candidate(site="a", channel=0, label=1, gap=2.0)
    # Two images may prefer another label, three may not.
    assert select({"a": rising([2.0], 1, strays=2)}, labels, 10)[0].gap == 2.0
    assert select({"a": rising([2.0], 1, strays=3)}, labels, 10) == []
    # The smallest gap counts, but not that of the label's own images.
    rise = rising([3.0], 1)
    rise[0, 2, 1], rise[0, 5, 1] = 1.1, 1.7
    assert select({"a": rise}, labels, 10)[0].gap == pytest.approx(0.7)
    # At most three of a stage in the first half, then the ranking alone.
    rises = {"a": rising([9.0, 8, 7, 6, 5], 1), "b": rising([2.0, 1], 2)}
    order = [(c.site, c.gap) for c in select(rises, labels, 8)]
    assert order == [("a", 9), ("a", 8), ("a", 7), ("b", 2), ("a", 6), ("a", 5), ("b", 1)]
    assert [c.gap for c in select(rises, labels, 5)] == [9, 8, 7, 6, 5, 2]  # 2: the only label without one
    assert [(c.site, c.gap) for c in select(rises, labels, 8)[:4]] == order[:4]


def test_every_label_that_has_a_candidate_keeps_its_best_one() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    rises = {"a": rising([9.0, 8, 7, 6], 1), "b": rising([0.5, 2.0, 1.0], 2), "c": rising([0.3, 0.4], 0)}
    found = [(c.site, c.channel, c.label) for c in select(rises, labels, 2)]
    assert found == [("a", 0, 1), ("a", 1, 1), ("b", 1, 2), ("c", 1, 0)]
    assert [c.label for c in select(rises, labels, 8)] == [1, 1, 1, 2, 1, 2, 2, 0]


def test_penalty_has_two_steps() -> None:
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, 0, :2, :2] = 0.5  # 4 pixels
    mask[1, 0, :2, :4] = 0.5  # 8
    mask[2, 0, :5, :4] = 0.5  # 20 > (2 + 2)^2
    mask[0, 0, 7] = 0.009
    found = penalty(mask, 4, 10).tolist()
    assert found == pytest.approx([0, 10 * 4, 20 * 10])


@pytest.mark.parametrize("batched", [True, False])
def test_every_candidate_is_inverted_as_if_it_were_alone(batched: bool) -> None:
    net, x, ctx = small(), torch.rand(3, 1, 8, 8), samples.ctx(4)
    passes: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    body: Any = net.body
    found = [
        Candidate(site="body.stage1", channel=1, label=2, gap=1),
        Candidate(site="body.stage3", channel=5, label=0, gap=1),
        Candidate(site="body.stage3", channel=2, label=3, gap=1),
    ]
    m = ABS(steps=12, weight=3.0, batched=batched)
    triggers = m.invert(net, x, found, ctx)
    assert passes == ([9] * 12 if batched else [3] * 36)
    starts = torch.randn(3, 1, 8, 8, generator=ctx.generator("patterns")).clamp(0, 1)
    for i, c in enumerate(found):
        u = torch.full((8, 8), -2.0)
        u[:2, :2] = 2
        u, p = u.requires_grad_(), starts[i, 0].clone().requires_grad_()
        adam = torch.optim.Adam([u, p], lr=0.1)
        for _ in range(12):
            adam.zero_grad()
            mask = u.tanh() / 2 + 0.5
            stamped = (1 - mask) * x + mask * p
            maps = [(stamped - 0.5) / 0.5]
            for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
                maps.append(stage(maps[-1]))
            a, z = maps[int(c.site[-1])], body.head(maps[-1].mean((2, 3)))
            others = sum(a[:, j].sum() for j in range(a.shape[1]) if j != c.channel)
            loss = -a[:, c.channel].sum() + 1e-4 * others - z[:, c.label].sum()
            count = int((mask > 0.01).sum())
            loss = loss + 3.0 * mask.sum() * (2 if count > 16 else 1 if count > 4 else 0)
            loss.backward()
            adam.step()
            with torch.no_grad():
                p.clamp_(0, 1)
        assert triggers[i].target == c.label
        assert torch.allclose(triggers[i].mask[0], (u.detach().tanh() + 1) / 2, atol=1e-4)
        assert torch.allclose(triggers[i].pattern[0], p.detach(), atol=1e-4)
    assert ctx.cost.backwards == 12 * 9


def test_reasr_counts_images_of_other_classes() -> None:
    stamp = torch.zeros(1, 16, 16)
    stamp[0, 0, 0] = 1
    trigger = Inverted(target=3, mask=stamp, pattern=torch.full((1, 16, 16), 3 / 255))
    x = torch.zeros(5, 1, 16, 16)
    labels = torch.tensor([3, 3, 1, 2, 0])
    net: Any = samples.ReadsPixel()
    assert reasr(net, trigger, x, labels, samples.ctx()) == 1
    faint = Inverted(target=3, mask=stamp * 0.5, pattern=torch.full((1, 16, 16), 6 / 255))
    x[3, 0, 0, 0] = 200 / 255
    assert reasr(net, faint, x, labels, samples.ctx()) == pytest.approx(2 / 3)
    assert reasr(net, trigger, x[:2], labels[:2], samples.ctx()) == 0


def test_a_planted_neuron_is_found_with_its_trigger() -> None:
    """Channel 1 of the first stage sees bright pixels and alone drives class 2."""
    spec = ModelSpec(arch="small_cnn", classes=4, shape=(1, 8, 8), norm=((0.0,), (1.0,)), args={"width": 2})
    net = build(spec, 0).eval()
    body: Any = net.body
    with torch.no_grad():
        for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
            stage[0].weight.zero_()
        body.stage1[0].weight[1, 0, 1, 1] = 1
        body.stage1[1].bias.zero_()
        body.stage1[1].bias[1] = -0.6
        body.stage1[0].weight[0, 0, 1, 1] = 1  # passes every image on; nothing reads it
        for stage in (body.stage2, body.stage3, body.stage4):
            stage[0].weight[0, 0], stage[0].weight[1, 1] = 0.1, 1
        body.head.weight.zero_()
        body.head.bias.copy_(torch.tensor([0.2, 0.1, 0.0, 0.1]))
        body.head.weight[2, 1] = 5
    clean = samples.random_images(40, (1, 8, 8), 4)
    clean = samples.images(clean.images // 3, clean.labels, 4)  # dim: below what the channel sees
    found = ABS(steps=40, weight=1.0).run(case(net, clean=clean))
    v = found.verdict
    assert v is not None
    assert (v.score, v.threshold, int(v.label_scores.argmax())) == (1.0, 0.88, 2)
    assert v.label_scores.tolist() == [0, 0, 1, 0]
    assert found.chosen["claimed"] == [2]
    assert {(c[1], c[2]) for c in found.chosen["candidates"]} == {(1, 2)}
    (bars,) = curve(found.chosen["curves"]["reasr"])["series"]
    assert bars["x"] == [f"{site}:1 to 2" for site, *_ in found.chosen["candidates"]]
    assert bars["y"] == pytest.approx([share for *_, share in found.chosen["candidates"]], abs=1e-4)
    (claim,) = found.inverted
    assert int((claim.mask > 0.01).sum()) <= 16
    again = ABS(steps=40, weight=1.0).run(case(net, clean=clean))
    assert torch.equal(again.inverted[0].pattern, claim.pattern)


def test_without_a_candidate_nothing_is_claimed() -> None:
    net = small()
    with torch.no_grad():
        net.body.head.weight.zero_()  # no channel moves any label
    c = case(net)
    found = ABS(steps=2, per_class=4).run(c)
    assert found.chosen == {"claimed": [], "candidates": []}
    assert found.inverted == ()
    v = found.verdict
    assert v is not None and v.label_scores is not None
    assert (v.score, v.label_scores.tolist()) == (0, [0] * 4)
    assert c.ctx.cost.backwards == 0


def test_candidates_that_no_image_follows_are_not_claimed() -> None:
    net = small()
    with torch.no_grad():
        net.body.head.weight.zero_()
        net.body.head.weight[0, 0] = net.body.head.weight[1, 1] = 1e-3  # moves two labels, not the answer
        net.body.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    c = case(net)
    found = ABS(steps=2, per_class=4).run(c)
    assert {label for _, _, label, _ in found.chosen["candidates"]} == {0, 1}
    assert {share for *_, share in found.chosen["candidates"]} == {0}
    assert found.inverted == () and found.chosen["claimed"] == []
    v = found.verdict
    assert v is not None and v.label_scores is not None
    assert (v.score, v.label_scores.tolist()) == (0, [0] * 4)
    assert c.ctx.cost.backwards > 0


def test_it_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    no_maps = replace(taps(net), spatial_convs=())
    monkeypatch.setattr("sleeperbench.defenses.abs.taps", lambda net: no_maps)
    with pytest.raises(NotApplicable, match="needs_maps"):
        ABS().run(case(net))
    with pytest.raises(ValueError, match="area"):
        ABS(area=0)


def test_candidates_are_drawn_with_their_reasr() -> None:
    found = [Candidate(site="body.stage3", channel=c, label=t, gap=1) for c, t in ((5, 2), (0, 2), (5, 1))]
    drawn = curve(ABS(threshold=0.7).drawn(found, [0.25, 1.0, 0.5])["curves"]["reasr"])
    (bars,) = drawn["series"]
    assert drawn["threshold"] == 0.7
    assert bars["x"] == ["body.stage3:5 to 2", "body.stage3:0 to 2", "body.stage3:5 to 1"]
    assert bars["y"] == [0.25, 1.0, 0.5]
    assert ABS().drawn([], []) == {}
