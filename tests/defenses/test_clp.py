from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import nn

from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.clp import CLP, bounds, pairs
from sleeperbench.kit.classifier import Classifier, build, load, pack


def case(net: Any) -> Any:
    return SimpleNamespace(net=net, ctx=samples.ctx(9))


def of(arch: str, **args: Any) -> Classifier:
    spec = replace(samples.SPEC, arch=arch, args=args, shape=(3, 16, 16), norm=((0.5,) * 3, (0.2,) * 3))
    return build(spec, 3).eval()


def drawn(conv: nn.Conv2d) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(conv.out_channels)
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=gen))
        assert norm.running_var is not None
        norm.running_var.copy_(torch.rand(norm.weight.shape, generator=gen) + 0.1)
    return norm


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_bounds_equal_an_svd_per_channel(groups: int, kernel: int) -> None:
    torch.manual_seed(groups + kernel)
    conv = nn.Conv2d(8, 16, kernel, groups=groups)
    norm = drawn(conv)
    found = bounds(conv, norm)
    assert norm.running_var is not None
    for k, w in enumerate(conv.weight.detach().double().numpy()):
        top = np.linalg.svd(w.reshape(8 // groups, kernel * kernel), compute_uv=False)[0]
        scale = abs(float(norm.weight[k].detach())) / np.sqrt(float(norm.running_var[k]) + 1e-5)
        assert float(found[k]) == pytest.approx(top * scale, rel=1e-9)
    if groups == 8:  # one input channel: the only singular value is the Frobenius norm
        flat = conv.weight.detach().double().flatten(1).norm(dim=1)
        ratio = found / flat
        assert torch.allclose(ratio, norm.weight.detach().double().abs() / (norm.running_var.double() + 1e-5).sqrt())


def test_a_scale_that_batchnorm_takes_back_changes_no_bound() -> None:
    conv = nn.Conv2d(4, 6, 3)
    norm = drawn(conv)
    norm.eps = 0.0
    before = bounds(conv, norm)
    with torch.no_grad():
        conv.weight[2] *= 7.0
        assert norm.running_var is not None
        norm.running_var[2] *= 49.0
    assert torch.allclose(bounds(conv, norm), before, rtol=1e-5)
    with torch.no_grad():
        norm.running_var[2] /= 49.0
    assert float(bounds(conv, norm)[2] / before[2]) == pytest.approx(7.0, rel=1e-5)


def test_pairs_are_what_the_architectures_say() -> None:
    plain = {f"body.stage{i}.1": f"body.stage{i}.0" for i in range(1, 5)}
    assert pairs(of("small_cnn"), samples.ctx()) == plain
    resnet = of("small_resnet", width=4)
    found = pairs(resnet, samples.ctx())
    assert len(found) == sum(isinstance(m, nn.BatchNorm2d) for m in resnet.modules())
    assert found["body.stage2.bn2"] == "body.stage2.conv2"
    assert found["body.stage2.shortcut.1"] == "body.stage2.shortcut.0"
    wide = pairs(of("wrn28_2"), samples.ctx())
    assert wide["body.stage1.0.bn1"] == "body.stem"
    assert {n.rpartition(".")[2] for n in wide if n != "body.stage1.0.bn1"} == {"bn2"}, "others follow an addition"
    assert all(conv == norm.replace("bn2", "conv1") for norm, conv in wide.items() if norm.endswith("bn2"))


def test_a_relu_in_between_that_works_in_place_is_seen() -> None:
    net = of("small_cnn")
    net.body.stage2.insert(1, nn.ReLU(inplace=True))
    assert "body.stage2.2" not in pairs(net, samples.ctx())
    c = samples.ctx()
    assert len(pairs(net, c)) == 3
    assert c.cost.forwards == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_channel_that_stands_out_loses_gamma_and_beta() -> None:
    net = copy.deepcopy(samples.clean_net())
    with torch.no_grad():
        net.body.stage3[0].weight[11] *= 40
    before = pack(net).state
    outcome = CLP().run(case(net))
    assert outcome.model is not None
    expected = dict(before)
    for stage in range(1, 5):
        key = f"body.stage{stage}.1"
        w = before[f"body.stage{stage}.0.weight"].double().numpy()
        top = [np.linalg.svd(k.reshape(k.shape[0], -1), compute_uv=False)[0] for k in w]
        gamma, var = before[f"{key}.weight"].double().numpy(), before[f"{key}.running_var"].double().numpy()
        b = np.array(top) * np.abs(gamma) / np.sqrt(var + 1e-5)
        out = torch.from_numpy(b > b.mean() + 3 * b.std(ddof=1))
        assert stage != 3 or bool(out[11])
        for part in ("weight", "bias"):
            expected[f"{key}.{part}"] = torch.where(out, 0.0, before[f"{key}.{part}"])
    assert all(torch.equal(expected[k], v) for k, v in outcome.model.state.items())
    gone = int((load(outcome.model).body.stage3[1].weight == 0).sum())
    assert gone >= 1
    assert outcome.chosen["channels"] == 88 and outcome.chosen["layers"] == 4 and outcome.chosen["layers_skipped"] == 0
    assert outcome.chosen["pruned"] >= gone
    assert not outcome.path
    assert all(torch.equal(before[k], v) for k, v in pack(net).state.items())


def test_a_smaller_u_removes_more() -> None:
    net, counts = samples.badnets_net(), []
    for u in (4.0, 2.0, 1.0, 0.0):
        counts.append(CLP(u=u).run(case(net)).chosen["pruned"])
    assert counts == sorted(counts)
    assert counts[-1] > 20
    assert CLP.from_params(CLP.INFO["micro"]).run(case(net)).chosen["pruned"] > 0


def test_published_settings_and_access() -> None:
    assert CLP() == CLP(u=3.0)
    assert CLP.ACCESS.track() == "T0"
    assert {"bn", "conv"} == CLP.REQUIRES
    net = of("small_cnn")
    for i in range(1, 5):
        getattr(net.body, f"stage{i}").insert(1, nn.ReLU())
    with pytest.raises(NotApplicable, match="needs_conv_bn"):
        CLP().run(case(net))
