from __future__ import annotations

import copy
import math
from decimal import Decimal, localcontext
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import ModelSpec, Role
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.ibd_psc import IBDPSC
from sleeperbench.evaluators.detection import auroc
from sleeperbench.kit.classifier import Classifier, build, pack
from sleeperbench.kit.gates import channels
from sleeperbench.kit.pixels import to_float


def case(net: Classifier | None = None, clean: Any = None) -> Any:
    clean = samples.digits()["pool"] if clean is None else clean
    return SimpleNamespace(net=samples.badnets_net() if net is None else net, clean=clean, ctx=samples.ctx(9))


def residual() -> Classifier:
    """A net with shortcuts, whose twelve BatchNorm layers all have their own weights and statistics."""
    spec = ModelSpec(arch="small_resnet", classes=4, shape=(3, 8, 8), norm=((0.5,) * 3, (0.5,) * 3), args={"width": 2})
    net, gen = build(spec, 1), torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean):
                t.add_(torch.randn(len(t), generator=gen) / 5)
            m.running_var.mul_(0.1)
    return net


def amplify(net: Classifier, k: int, factor: float) -> Classifier:
    """A copy with weights and biases multiplied one layer at a time, from the last."""
    louder = copy.deepcopy(net).eval()
    layers = [m for m in louder.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in reversed(layers[max(0, len(layers) - k) :]):
        for t in (m.weight, m.bias):
            t.data = t.data * factor
    return louder


@torch.no_grad()
def slow(net: Classifier, x: Tensor, ks: list[int], factor: float) -> list[Decimal]:
    """PSC to 300 digits, one image and one model at a time."""
    found = []
    for row in x:
        label, total = int(copy.deepcopy(net).eval()(row[None]).argmax()), Decimal(0)
        for k in ks:
            shares = [Decimal(float(v)).exp() for v in amplify(net, k, factor)(row[None])[0]]
            total += shares[label] / sum(shares)
        found.append(total / len(ks))
    return found


def log_odds(net: Classifier, x: Tensor, ks: list[int], factor: float) -> list[float]:
    with localcontext(prec=300):
        return [float((p / (1 - p)).ln()) for p in slow(net, x, ks, factor)]


def planted() -> Classifier:
    """Logits of an evenly coloured image (r, g, 0) with k layers amplified by s: (s^k r, 0.5, s^k 400 g, 0).

    Every layer hands its first two channels on, and the last one's features are the image times s^k: class 0 grows, and
    class 1, which stands in the head's bias, does not. Green is class 2.
    """
    spec = ModelSpec(arch="small_cnn", classes=4, shape=(3, 8, 8), norm=((0.0,) * 3, (1.0,) * 3), args={"width": 2})
    net = build(spec, 0)
    body: Any = net.body
    with torch.no_grad():
        for stage in (body.stage1, body.stage2, body.stage3, body.stage4):
            stage[0].weight.zero_()
            stage[0].weight[0, 0, 1, 1] = stage[0].weight[1, 1, 1, 1] = 1
            stage[1].weight.fill_(math.sqrt(1 + stage[1].eps))
            stage[1].bias.zero_()
        body.head.weight.zero_()
        body.head.weight[0, 0], body.head.weight[2, 1] = 1, 400
        body.head.bias.copy_(torch.tensor([0.0, 0.5, 0.0, 0.0]))
    return net


def coloured(reds: list[float], greens: list[float]) -> Tensor:
    """Images (N, 3, 8, 8), each of one colour."""
    x = torch.tensor([reds, greens, [0.0] * len(reds)]).T
    return x[:, :, None, None].expand(-1, -1, 8, 8).contiguous()


REDS = [0.4] * 3 + [0.25] * 3 + [0.16] * 2 + [0.04] * 2
"""All of class 1 as they are; three are lost to class 0 from one layer on, three more from two, two more from three."""


def dull(reds: list[float]) -> Any:
    """Rows of class 1 in these colours."""
    pixels = (coloured(reds, [0.0] * len(reds)) * 255).round().to(torch.uint8)
    return samples.images(pixels, [1] * len(reds), 4)


def test_scores_are_log_odds_of_the_mean_probability_of_the_label_in_copies_with_larger_weights() -> None:
    net = residual()
    assert len(channels(net)) == 12
    before = pack(net).state
    x = to_float(samples.random_images(7, (3, 8, 8)).images)
    found = IBDPSC(factor=1.2).consistency(net, 3, x)
    assert found.tolist() == pytest.approx(log_odds(net, x, [3, 4, 5, 6, 7], 1.2), abs=1e-4)
    assert float(found.std()) > 0.5
    assert net.training and all(torch.equal(before[n], t) for n, t in pack(net).state.items())
    # Beyond the twelfth layer there are no more to amplify.
    found = IBDPSC(factor=1.2, models=4).consistency(net, 11, x)
    assert found.tolist() == pytest.approx(log_odds(net, x, [11, 12, 12, 12], 1.2), abs=1e-4)
    assert IBDPSC().amplified(11, 12) == {11: 1, 12: 4}


def test_inputs_that_are_all_sure_keep_their_order() -> None:
    greens = [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    x, net = coloured([0.1] * 6, greens), planted()
    found = IBDPSC().consistency(net, 1, x)
    assert found.dtype == torch.float64
    # Of the four models that differ, the least sure one decides, and it stands there once in five.
    wanted = [600 * g - math.log(2 + math.exp(0.5) + math.exp(0.15) - 1) + math.log(5) for g in greens]
    assert found.tolist() == pytest.approx(wanted, abs=2e-3)
    assert found.tolist() == pytest.approx(log_odds(net, x, [1, 2, 3, 4, 4], 1.5), abs=2e-3)
    assert bool((found.sigmoid().float() == 1).all()), "PSC itself is the same for all of them"
    # The same at the other end: what is lost for sure is not lost alike.
    lost = IBDPSC(factor=40.0).consistency(net, 2, coloured([0.1, 0.2, 0.3], [0.0] * 3))
    assert lost.tolist() == pytest.approx([0.5 - 1600 * r + math.log(1 / 5) for r in (0.1, 0.2, 0.3)], abs=2e-3)


def test_published_settings_on_a_net_that_loses_clean_rows_first() -> None:
    net = planted()
    outcome = IBDPSC().run(case(net, dull(REDS)))
    # Three rows of ten are lost with one layer, six with two: just the share that must be exceeded; eight with three.
    assert outcome.state is not None and outcome.state[1] == {"first": 3}
    assert (outcome.chosen["layers"], outcome.chosen["clean_error"]) == (4, 0.8)
    assert outcome.alarm is not None and outcome.alarm == pytest.approx(math.log(9))
    assert outcome.chosen["clean_flagged"] == 0
    x = coloured([0.25, 0.1, 0.1], [0.0, 0.0, 0.02])
    plain, faint, green = IBDPSC().score(outcome.state, net, x).tolist()
    psc = 0.0
    for k in (3, 4, 4, 4, 4):
        z = 1.5**k * 0.25
        psc += math.exp(0.5) / (math.exp(0.5) + math.exp(z) + 2) / 5
    assert plain == pytest.approx(math.log(psc / (1 - psc)), abs=1e-3)
    assert plain < faint < outcome.alarm < green


def test_it_declines_where_too_few_clean_rows_are_lost_whatever_is_amplified() -> None:
    c = case(planted(), dull([0.4] * 3 + [0.25] * 3 + [0.04] * 4))
    with pytest.raises(
        NotApplicable, match=r"^error_not_reached: at most 0\.600 .* 4 layers amplified, not above 0\.6$"
    ):
        IBDPSC().run(c)
    assert c.ctx.cost.forwards == 4 * 10
    assert IBDPSC(error=0.59).run(c).chosen["first"] == 2
    # What a small net trained on digits does with the published settings.
    with pytest.raises(NotApplicable, match="error_not_reached: at most 0"):
        IBDPSC().run(case())


def test_it_begins_where_clean_rows_are_first_lost() -> None:
    net, clean = samples.badnets_net(), samples.digits()["pool"]
    x, factor = to_float(clean.images), 3.0
    with torch.no_grad():
        errors = [float((amplify(net, k, factor)(x).argmax(1) != clean.labels).double().mean()) for k in range(1, 5)]
    assert errors[0] < errors[1] < errors[2]
    for error, first in ((0.0, 1), (errors[0], 2), (errors[1] - 1e-6, 2), (errors[1], 3)):
        outcome = IBDPSC(factor=factor, error=error).run(case())
        assert outcome.state == ({}, {"first": first})
        assert outcome.chosen["first"] == first and outcome.chosen["layers"] == 4
        assert outcome.chosen["clean_error"] == pytest.approx(errors[first - 1], abs=1e-4)


def test_scores_begin_there_and_each_row_is_its_own() -> None:
    net = samples.badnets_net()
    method, c = IBDPSC(factor=3.0, error=0.05), case()
    outcome = method.run(c)
    assert outcome.state is not None and outcome.state[1]["first"] == 2
    x = to_float(samples.digits()["test"].images[:12])
    found = method.score(outcome.state, net, x)
    assert found.tolist() == pytest.approx(log_odds(net, x, [2, 3, 4, 4, 4], 3.0), abs=1e-3)
    assert torch.allclose(method.score(outcome.state, net, x.flip(0)).flip(0), found, atol=1e-3)
    clean = method.score(outcome.state, net, to_float(c.clean.images))
    assert outcome.chosen["clean_psc"] == pytest.approx(float(clean.sigmoid().mean()), abs=1e-4)
    assert outcome.chosen["clean_flagged"] == pytest.approx(float((clean > math.log(9)).double().mean()), abs=1e-4)
    # Two searched, the net itself, and three different amplified ones.
    assert c.ctx.cost.forwards == 6 * 150
    assert dict(method.run(case()).chosen) == dict(outcome.chosen)


def test_triggered_inputs_stand_out_on_the_attacked_model_alone() -> None:
    some = torch.arange(0, 350, 2)
    clean = to_float(samples.digits()["test"].images[some])
    triggered = to_float(samples.badnets_rendered("test", Role.TEST).data.images[some])
    method, ranks = IBDPSC(factor=3.0, error=0.05), {}
    for name, net in (("attacked", samples.badnets_net()), ("clean", samples.clean_net())):
        state: Any = method.run(case(net)).state
        scores = [method.score(state, net, x) for x in (triggered, clean)]
        ranks[name] = auroc(*scores)
        ranks[f"{name}, PSC in float32"] = auroc(*(s.sigmoid().float() for s in scores))
    assert ranks["attacked"] > 0.9 > 0.6 > ranks["clean"]
    # PSC is 1 in float32 of many inputs of both sorts, which ties them.
    assert ranks["attacked, PSC in float32"] < 0.9


def test_what_it_declines_and_refuses() -> None:
    plain = ModelSpec(arch="mnist_cnn", classes=10, shape=(1, 16, 16), norm=((0.5,), (0.5,)))
    with pytest.raises(NotApplicable, match="needs_bn"):
        IBDPSC().run(case(build(plain, 0)))
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 0"):
        IBDPSC().run(case(clean=samples.digits()["pool"].rows(torch.arange(0))))
    m = IBDPSC()
    assert (m.factor, m.models, m.error, m.threshold) == (1.5, 5, 0.6, 0.9)
    assert IBDPSC.ACCESS.track() == "T1" and frozenset({"bn"}) == IBDPSC.REQUIRES
    for bad in ({"factor": 1.0}, {"models": 0}, {"error": 1.0}, {"threshold": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            IBDPSC(**bad)  # type: ignore[arg-type]
