"""IsTr's two networks: their size, their shapes, and that they can be packed and tapped like the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sleeperbench.contracts.models import ModelSpec
from sleeperbench.kit.classifier import Classifier, build, load, pack, traits
from sleeperbench.kit.nets.gtsrb_cnn import GtsrbCNN
from sleeperbench.kit.nets.mnist_cnn import MnistCNN
from sleeperbench.kit.taps import taps

NETS = {"mnist_cnn": (MnistCNN, 1, 28, 10), "gtsrb_cnn": (GtsrbCNN, 3, 32, 43)}


def spec(arch: str, classes: int, channels: int, size: int) -> ModelSpec:
    norm = ((0.5,) * channels, (0.25,) * channels)
    return ModelSpec(arch=arch, classes=classes, shape=(channels, size, size), norm=norm, args={})


def made(arch: str) -> Classifier:
    _, channels, size, classes = NETS[arch]
    return build(spec(arch, classes, channels, size), 0).eval()


@pytest.mark.parametrize(("arch", "count", "convs"), [("mnist_cnn", 390_410, 3), ("gtsrb_cnn", 571_723, 6)])
def test_layers_and_parameters(arch: str, count: int, convs: int) -> None:
    net = made(arch)
    assert sum(p.numel() for p in net.parameters()) == count
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == convs
    assert sum(isinstance(m, nn.Linear) for m in net.modules()) == 2
    assert traits(net.spec) == {"conv", "linear_head"}


@pytest.mark.parametrize("arch", NETS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 45), (1, 22)])
def test_shapes_head_and_packing(arch: str, channels: int, size: int) -> None:
    net = build(spec(arch, 5, channels, size), 0).eval()
    x = torch.rand(2, channels, size, size)
    with torch.no_grad():
        logits = net(x)
        assert logits.shape == (2, 5)
        assert torch.equal(net.body.head(net.body.features((x - 0.5) / 0.25)), logits)
        assert torch.equal(load(pack(net))(x), logits)


@pytest.mark.parametrize(("arch", "least"), [("mnist_cnn", 8), ("gtsrb_cnn", 22)])
def test_the_smallest_image(arch: str, least: int) -> None:
    cls, channels, _, classes = NETS[arch]
    assert cls(classes, channels, least)(torch.rand(1, channels, least, least)).shape == (1, classes)
    with pytest.raises(ValueError, match=f"at least {least} pixels, not {least - 1}"):
        cls(classes, channels, least - 1)


def test_gtsrb_cnn_step_by_step() -> None:
    net = made("gtsrb_cnn").body
    x = torch.randn(2, 3, 32, 32)
    sides = []
    with torch.no_grad():
        out = x
        for stage in (net.stage1, net.stage2, net.stage3):
            out = F.relu(F.conv2d(out, stage[0].weight, stage[0].bias, padding=1))
            out = F.max_pool2d(F.relu(F.conv2d(out, stage[2].weight, stage[2].bias)), 2)
            sides.append(out.shape[-1])
        out = F.relu(F.linear(out.flatten(1), net.dense[1].weight, net.dense[1].bias))
        torch.testing.assert_close(F.linear(out, net.head.weight, net.head.bias), net(x))
    assert sides == [15, 6, 2]


def test_mnist_cnn_step_by_step() -> None:
    net = made("mnist_cnn").body
    x = torch.randn(2, 1, 28, 28)
    sides = []
    with torch.no_grad():
        out = x
        for stage in (net.stage1, net.stage2, net.stage3):
            out = F.max_pool2d(F.relu(F.conv2d(out, stage[0].weight, stage[0].bias, padding=1)), 2)
            sides.append(out.shape[-1])
        out = F.relu(F.linear(out.flatten(1), net.dense[1].weight, net.dense[1].bias))
        torch.testing.assert_close(F.linear(out, net.head.weight, net.head.bias), net(x))
    assert sides == [14, 7, 3]


@pytest.mark.parametrize(("arch", "convs"), [("mnist_cnn", 2), ("gtsrb_cnn", 5)])
def test_taps(arch: str, convs: int) -> None:
    found = taps(made(arch))
    assert found.stages == ("body.stage1", "body.stage2", "body.stage3")
    assert found.head == "body.head"
    assert found.batch_norms == ()
    assert len(found.spatial_convs) == convs
