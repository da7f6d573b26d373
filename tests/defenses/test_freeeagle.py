from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch.nn import functional as F

from sleeperbench import ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import freeeagle as module
from sleeperbench.defenses.freeeagle import FreeEagle, metric, posteriors
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.taps import behind, capture, taps


def small(classes: int = 6, arch: str = "small_cnn") -> Classifier:
    args = {"width": 4} if arch == "small_cnn" else {}
    spec = ModelSpec(arch=arch, classes=classes, shape=(1, 8, 8), norm=((0.5,), (0.5,)), args=args)
    return build(spec, 0).eval().requires_grad_(False)


def case(net: Classifier) -> Any:
    return SimpleNamespace(net=net, spec=net.spec, ctx=samples.ctx(3))


def test_settings_are_published() -> None:
    m = FreeEagle()
    assert (m.steps, m.lr, m.weight_decay, m.later) == (1000, 0.01, 5e-3, 1)
    assert FreeEagle.ACCESS.track() == "T0"


def test_behind_the_cut_lies_the_rest_of_the_net() -> None:
    net, x = small(), torch.rand(3, 1, 8, 8)
    for site in taps(net).stages:
        answer = capture(net, x, [site])[site]
        assert torch.allclose(behind(net, site, answer), net(x), atol=1e-6)
    assert not net.get_submodule(site)._forward_hooks


@pytest.mark.parametrize("later", [0, 1])
def test_representations_are_those_of_a_loop_over_classes(later: int) -> None:
    net, ctx = small(), samples.ctx(3)
    m = FreeEagle(steps=12, lr=0.1, weight_decay=0.05, later=later)
    site = taps(net).stages[-1 - later]
    found = m.represent(net, site, ctx)
    start = torch.rand(*found.shape, generator=ctx.generator("representations"))
    for c in range(6):
        r = start[c : c + 1].clone().requires_grad_()
        adam = torch.optim.Adam([r], lr=0.1)
        for _ in range(12):
            adam.zero_grad()
            body: Any = net.body
            z = body.head((body.stage4(r) if later else r).mean((2, 3)))
            # L2 as a term of the loss: 0.05 / 2 |r|^2.
            (F.cross_entropy(z, torch.tensor([c])) + 0.025 * r.square().sum()).backward()
            adam.step()
            with torch.no_grad():
                r.clamp_(min=0)
        assert torch.allclose(found[c], r[0].detach(), atol=1e-5)
    assert float(found.min()) == 0
    assert ctx.cost.backwards == 72


def test_one_class_at_a_time_gives_the_same_in_as_many_passes_as_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def counted(net: Classifier, site: str, r: torch.Tensor) -> torch.Tensor:
        passes.append(len(r))
        return behind(net, site, r)

    monkeypatch.setattr(module, "behind", counted)
    contexts = [samples.ctx(3), samples.ctx(3)]
    found = []
    for batched, ctx in zip((True, False), contexts, strict=True):
        found.append(FreeEagle(steps=12, lr=0.1, batched=batched).represent(small(), "body.stage3", ctx))
    assert passes == [6] * 12 + [1] * 72
    assert torch.allclose(*found, atol=1e-5) and contexts[0].cost == contexts[1].cost


def test_only_rectified_answers_are_bounded() -> None:
    ctx = samples.ctx(3)
    net = small()
    net.body.stage3[2] = torch.nn.Identity()
    assert float(FreeEagle(steps=40, lr=0.1).represent(net, "body.stage3", ctx).min()) < 0


def test_posteriors_have_no_diagonal() -> None:
    net = small()
    site = taps(net).stages[-2]
    r = torch.rand(6, *capture(net, torch.rand(1, 1, 8, 8), [site])[site].shape[1:])
    q = posteriors(net, site, r)
    body: Any = net.body
    wanted = body.head(body.stage4(r).mean((2, 3))).double().softmax(1)
    for s in range(6):
        for t in range(6):
            assert float(q[s, t]) == (0 if s == t else pytest.approx(float(wanted[s, t]), abs=1e-7))


def test_metric_is_that_of_the_quartiles() -> None:
    v = torch.tensor([0.3, 0.1, 0.0, 0.2, 0.9, 0.15, 0.25, 0.05], dtype=torch.float64)
    flat = np.sort(v[v != 0].numpy())
    q1, q3 = flat[int(0.25 * len(flat))], flat[int(0.75 * len(flat))]
    found = metric(v)
    assert float(found.max()) == pytest.approx((flat.max() - q3) / (q3 - q1))
    assert int(found.argmax()) == 4
    assert metric(torch.zeros(8)).tolist() == [0] * 8
    assert metric(torch.tensor([1.0, 1, 1, 1, 1, 1, 2])).tolist() == [0, 0, 0, 0, 0, 0, 1e6]


def test_a_class_to_which_all_others_leak_is_the_target() -> None:
    net = small(10)
    body: Any = net.body
    with torch.no_grad():
        # Every class reads a feature of its own; class 7 reads a share of all of them.
        body.head.weight.zero_()
        body.head.bias.zero_()
        for c in range(10):
            body.head.weight[c, c] = 1 + 0.05 * c
        body.head.weight[7] = 0.7
    found = FreeEagle(steps=60, lr=0.1, later=0).run(case(net))
    assert found.verdict is not None
    assert found.chosen["target"] == int(found.verdict.label_scores.argmax()) == 7
    assert found.verdict.score > found.verdict.threshold == 2.0
    assert all(t == 7 for _, t, _ in found.chosen["pairs"])
    assert found.verdict.pairs is not None
    assert found.verdict.pairs.tolist() == [[s, 7] for s in range(10) if s != 7]
    again = FreeEagle(steps=60, lr=0.1, later=0).run(case(net))
    assert torch.equal(again.verdict.label_scores, found.verdict.label_scores)


def test_a_pair_is_named_where_one_class_alone_leaks() -> None:
    net = small(10)
    body: Any = net.body
    with torch.no_grad():
        # Every class reads a feature of its own and, of the next one, a little; class 7 also reads that of class 2.
        # Feature 7 speaks against class 2, lest what is made up for class 7 answer as class 2 too.
        body.head.weight.zero_()
        body.head.bias.zero_()
        for c in range(10):
            body.head.weight[c, c] = 1
            body.head.weight[c, (c + 1) % 10] = 0.01 * c
        body.head.weight[7, 2], body.head.weight[2, 7] = 0.7, -2
    found = FreeEagle(steps=60, lr=0.1, later=0).run(case(net))
    assert found.verdict is not None and found.verdict.pairs is not None
    assert found.verdict.pairs.dtype == torch.int64
    assert found.verdict.pairs.tolist() == [[2, 7]]
    assert FreeEagle(steps=60, lr=0.1, later=0, threshold=1e7).run(case(net)).verdict.pairs.shape == (0, 2)


def test_it_declines() -> None:
    with pytest.raises(NotApplicable, match="too_few_classes: 5"):
        FreeEagle().run(case(small(5)))
    with pytest.raises(NotApplicable, match="too_few_stages: 4"):
        FreeEagle(later=4).run(case(small()))
