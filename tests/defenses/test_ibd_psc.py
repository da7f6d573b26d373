from __future__ import annotations

import copy
import math
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
def slow(net: Classifier, x: Tensor, ks: list[int], factor: float) -> list[float]:
    """PSC, one image and one model at a time."""
    found = []
    for row in x:
        label, total = int(copy.deepcopy(net).eval()(row[None]).argmax()), 0.0
        for k in ks:
            z = [float(v) for v in amplify(net, k, factor)(row[None])[0]]
            total += math.exp(z[label] - max(z)) / sum(math.exp(v - max(z)) for v in z)
        found.append(total / len(ks))
    return found


def test_psc_is_the_mean_probability_of_the_label_in_copies_with_larger_weights() -> None:
    net = residual()
    assert len(channels(net)) == 12
    before = pack(net).state
    x = to_float(samples.random_images(7, (3, 8, 8)).images)
    found = IBDPSC(factor=1.2).consistency(net, 3, x)
    assert found.tolist() == pytest.approx(slow(net, x, [3, 4, 5, 6, 7], 1.2), abs=1e-5)
    assert float(found.std()) > 0.05
    assert net.training and all(torch.equal(before[n], t) for n, t in pack(net).state.items())
    # Beyond the twelfth layer there are no more to amplify.
    found = IBDPSC(factor=1.2, models=4).consistency(net, 11, x)
    assert found.tolist() == pytest.approx(slow(net, x, [11, 12, 12, 12], 1.2), abs=1e-5)
    assert IBDPSC().amplified(11, 12) == {11: 1, 12: 4}


def test_it_begins_where_clean_rows_are_first_lost() -> None:
    net, clean = samples.badnets_net(), samples.digits()["pool"]
    x, factor = to_float(clean.images), 3.0
    with torch.no_grad():
        errors = [float((amplify(net, k, factor)(x).argmax(1) != clean.labels).double().mean()) for k in range(1, 5)]
    assert errors[0] < errors[1] < errors[2]
    for error, first in ((0.0, 1), (errors[0], 2), (errors[1] - 1e-6, 2), (errors[1], 3), (max(errors), 4)):
        outcome = IBDPSC(factor=factor, error=error).run(case())
        assert outcome.state == ({}, {"first": first}) and outcome.alarm == 0.9
        assert outcome.chosen["first"] == first and outcome.chosen["layers"] == 4
        assert outcome.chosen["clean_error"] == pytest.approx(errors[first - 1], abs=1e-4)


def test_scores_are_psc_from_there_on_and_each_row_is_its_own() -> None:
    net = samples.badnets_net()
    method, c = IBDPSC(factor=3.0, error=0.05), case()
    outcome = method.run(c)
    assert outcome.state is not None and outcome.state[1]["first"] == 2
    x = to_float(samples.digits()["test"].images[:12])
    found = method.score(outcome.state, net, x)
    assert found.tolist() == pytest.approx(slow(net, x, [2, 3, 4, 4, 4], 3.0), abs=1e-5)
    assert torch.allclose(method.score(outcome.state, net, x.flip(0)).flip(0), found, atol=1e-6)
    clean = method.score(outcome.state, net, to_float(c.clean.images))
    assert outcome.chosen["clean_psc"] == pytest.approx(float(clean.mean()), abs=1e-4)
    assert outcome.chosen["clean_flagged"] == pytest.approx(float((clean > 0.9).double().mean()), abs=1e-4)
    # Two searched, the net itself, and three different amplified ones.
    assert c.ctx.cost.forwards == 6 * 150
    assert dict(method.run(case()).chosen) == dict(outcome.chosen)


def test_triggered_inputs_stand_out_on_the_attacked_model_alone() -> None:
    some = torch.arange(0, 350, 2)
    clean = to_float(samples.digits()["test"].images[some])
    triggered = to_float(samples.badnets_rendered("test", Role.TEST).data.images[some])
    method, ranks = IBDPSC(), {}
    for name, net in (("attacked", samples.badnets_net()), ("clean", samples.clean_net())):
        state: Any = method.run(case(net)).state
        ranks[name] = auroc(method.score(state, net, triggered), method.score(state, net, clean))
    assert ranks["attacked"] > 0.7 > 0.6 > ranks["clean"]


def test_what_it_declines_and_refuses() -> None:
    plain = ModelSpec(arch="mnist_cnn", classes=10, shape=(1, 16, 16), norm=((0.5,), (0.5,)))
    with pytest.raises(NotApplicable, match="needs_bn"):
        IBDPSC().run(case(build(plain, 0)))
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 0"):
        IBDPSC().run(case(clean=samples.digits()["pool"].rows(torch.arange(0))))
    m = IBDPSC()
    assert (m.factor, m.models, m.error, m.threshold) == (1.5, 5, 0.6, 0.9)
    assert IBDPSC.ACCESS.track() == "T1" and frozenset({"bn"}) == IBDPSC.REQUIRES
    for bad in ({"factor": 1.0}, {"models": 0}, {"error": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            IBDPSC(**bad)  # type: ignore[arg-type]
