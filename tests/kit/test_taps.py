from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.models import ModelSpec, Wrap
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.taps import capture, features, taps


def net_of(arch: str, wraps: tuple[Wrap, ...] = (), size: int = 16) -> Classifier:
    norm = ((0.5,) * 3, (0.25,) * 3)
    spec = ModelSpec(arch=arch, classes=4, shape=(3, size, size), norm=norm, wraps=wraps)
    return build(spec, 0).eval()


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@pytest.mark.parametrize(
    ("arch", "stages", "convs", "norms", "head"),
    [
        ("small_cnn", 4, 3, 4, "body.head"),
        ("small_resnet", 4, 8, 12, "body.head"),
        ("preact_resnet18", 4, 16, 16, "body.head"),
        ("wrn28_2", 3, 24, 25, "body.head"),
        ("timm:resnet18", 4, 16, 20, "body.net.fc"),
        ("timm:resnet18d", 4, 16, 22, "body.net.fc"),
        ("timm:mobilenetv2_100", 5, 17, 52, "body.net.classifier"),
        ("timm:vit_tiny_patch16_224", 12, 0, 0, "body.net.head"),
    ],
)
def test_roles(arch: str, stages: int, convs: int, norms: int, head: str) -> None:
    net = net_of(arch)
    t = taps(net)
    assert (len(t.stages), len(t.spatial_convs), len(t.batch_norms), t.head) == (stages, convs, norms, head)
    for name in t.spatial_convs:
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert max(layer.kernel_size) > 1
        assert not {"shortcut", "downsample", "stem"} & set(name.split("."))
        assert layer.in_channels != 3
        assert name + ".weight" in net.state_dict()
    for name in t.stages:
        net.get_submodule(name)


def test_the_preact_layers_are_those_of_the_published_coefficient() -> None:
    net = net_of("preact_resnet18")
    widths = [net.get_submodule(n).out_channels for n in taps(net).spatial_convs]
    assert widths == [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4


def test_a_three_by_three_shortcut_is_no_spatial_conv_but_a_main_path_one_is() -> None:
    net = net_of("small_resnet")
    net.body.stage2.shortcut[0] = nn.Conv2d(16, 32, 3, 2, 1)
    assert len(taps(net).spatial_convs) == 8
    main = taps(net_of("timm:convnext_atto", size=32)).spatial_convs
    assert "body.net.stages.1.downsample.1" in main


def test_captures_equal_a_forward_pass_by_hand() -> None:
    net = net_of("small_resnet")
    body = net.body
    body.stem[1].running_mean.uniform_(-1, 1)
    x = torch.rand(3, 3, 16, 16)
    names = ["body.stem.0", "body.stem.1", "body.stage1", "body.stage1.bn1", "body.stage4", "penultimate", "body.head"]
    with torch.no_grad():
        got = capture(net, x, names)
        conv = body.stem[0]((x - 0.5) / 0.25)
        norm = body.stem[1](conv)
        stage1 = body.stage1(norm.relu())
        stage4 = body.stage4(body.stage3(body.stage2(stage1)))
        bn1 = body.stage1.bn1(body.stage1.conv1(norm.relu()))
    assert list(got) == names
    wanted = (conv, norm, stage1, bn1, stage4, stage4.mean((2, 3)), body.head(stage4.mean((2, 3))))
    for name, w in zip(names, wanted, strict=True):
        torch.testing.assert_close(got[name], w, rtol=0, atol=1e-6)
    # The layers before a ReLU in place have negative answers: they were copied before it ran.
    assert got["body.stem.1"].min() < 0
    assert got["body.stage1.bn1"].min() < 0


def test_captures_carry_gradients() -> None:
    net = net_of("small_cnn")
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    capture(net, x, ["body.stage2"])["body.stage2"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_no_hook_stays_even_after_an_error() -> None:
    net = net_of("small_cnn")
    x = torch.rand(2, 3, 16, 16)
    capture(net, x, ["body.stage1", "penultimate"])
    assert hooks(net) == 0
    with pytest.raises(RuntimeError):
        capture(net, torch.rand(2, 5, 16, 16), ["body.stage1", "penultimate"])
    assert hooks(net) == 0
    with pytest.raises(ValueError, match=r"no layer 'body.stage9'"):
        capture(net, x, ["body.stage1", "body.stage9"])
    assert hooks(net) == 0
    net.body.spare = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'body.spare' took no part"):
        capture(net, x, ["body.spare"])


@pytest.mark.parametrize(
    "arch", ["small_cnn", "preact_resnet18", "wrn28_2", "timm:resnet18", "timm:vit_tiny_patch16_224"]
)
def test_features_are_the_input_of_the_head(arch: str, tmp_path: Path) -> None:
    net = net_of(arch).train()
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    ctx = Ctx(seed=0, recipe=Recipe(), scratch=tmp_path)
    got = features(net, images, 3, ctx=ctx)
    assert net.training
    assert not got.requires_grad
    assert ctx.cost.forwards == 7
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(got, net.body.features((to_float(images) - 0.5) / 0.25), rtol=0, atol=1e-5)
        torch.testing.assert_close(net.get_submodule(taps(net).head)(got), net(to_float(images)), rtol=0, atol=1e-5)


def test_a_wrapped_model_has_the_same_names_and_the_changed_answers() -> None:
    plain = net_of("small_cnn")
    wraps = (
        Wrap(kind="gate", site="body.stage2.1"),
        Wrap(kind="insert", site="body.stage3", args={"layer": "conv1x1_bn"}),
        Wrap(kind="purify"),
    )
    wrapped = net_of("small_cnn", wraps)
    assert taps(wrapped) == taps(plain)
    wrapped.wraps[0].factor.fill_(0.5)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        a, b = (capture(n, x, ["body.stage2.1"])["body.stage2.1"] for n in (plain, wrapped))
    torch.testing.assert_close(b, 0.5 * a)


def test_a_net_without_a_linear_head_is_refused() -> None:
    net = net_of("small_cnn")
    net.body.head = nn.Identity()
    with pytest.raises(ValueError, match="`small_cnn` has no linear head but Identity"):
        taps(net)
