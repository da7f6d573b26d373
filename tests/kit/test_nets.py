from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from sleeperbench.contracts.models import ModelSpec
from sleeperbench.errors import BadInput
from sleeperbench.kit.classifier import build, load, pack, traits

OWN = ("small_cnn", "small_resnet", "preact_resnet18", "wrn28_2")


def spec(arch: str, classes: int = 10, channels: int = 3, size: int = 32, **args: object) -> ModelSpec:
    norm = ((0.5,) * channels, (0.25,) * channels)
    return ModelSpec(arch=arch, classes=classes, shape=(channels, size, size), norm=norm, args=args)


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("small_cnn", 61_338),
        ("small_resnet", 308_826),
        ("preact_resnet18", 11_171_146),
        ("wrn28_2", 1_467_610),
    ],
)
def test_parameter_counts(arch: str, count: int) -> None:
    assert sum(p.numel() for p in build(spec(arch), 0).parameters()) == count


@pytest.mark.parametrize("arch", OWN)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 16, 2), (1, 28, 43), (3, 32, 43), (3, 64, 2)])
def test_shapes_and_head(arch: str, channels: int, size: int, classes: int) -> None:
    net = build(spec(arch, classes, channels, size), 0).eval()
    x = torch.rand(2, channels, size, size)
    with torch.no_grad():
        logits = net(x)
        z = (x - 0.5) / 0.25
        assert logits.shape == (2, classes)
        assert logits.isfinite().all()
        assert isinstance(net.body.head, nn.Linear)
        assert torch.equal(net.body.head(net.body.features(z)), logits)


@pytest.mark.parametrize("arch", OWN)
def test_stages_reduce_the_side_and_images_that_are_too_small_are_refused(arch: str) -> None:
    net = build(spec(arch), 0).eval()
    sides: list[int] = []
    for name, stage in net.body.named_children():
        if name.startswith("stage"):
            stage.register_forward_hook(lambda m, i, out: sides.append(out.shape[-1]))
    with torch.no_grad():
        net(torch.rand(1, 3, 32, 32))
    assert sides == [32, 16, 8, 4][: len(sides)]
    assert len(sides) == (3 if arch == "wrn28_2" else 4)
    with pytest.raises(ValueError, match="at least 8"):
        build(spec(arch, size=4), 0)


def test_small_resnet_costs_about_16_million_multiply_adds() -> None:
    net = build(spec("small_resnet"), 0).eval()
    macs = 0

    def count(module: nn.Conv2d, inputs: object, out: torch.Tensor) -> None:
        nonlocal macs
        macs += out.shape[2] * out.shape[3] * module.weight.numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.rand(1, 3, 32, 32))
    assert 15e6 < macs < 17e6


def test_residual_blocks_add_their_shortcut() -> None:
    # With the last layer of each residual branch at zero, a block without a projection is its shortcut alone.
    for arch, block_of in (
        ("small_resnet", lambda b: b.stage1),
        ("preact_resnet18", lambda b: b.stage1[1]),
        ("wrn28_2", lambda b: b.stage1[1]),
    ):
        block = block_of(build(spec(arch), 0).eval().body)
        nn.init.zeros_(block.conv2.weight)
        channels = block.conv2.out_channels
        x = torch.randn(2, channels, 8, 8)
        wanted = x.relu() if arch == "small_resnet" else x
        with torch.no_grad():
            assert torch.equal(block(x.clone()), wanted)


def test_preact_shortcut_branches_off_behind_bn_and_relu() -> None:
    for arch in ("preact_resnet18", "wrn28_2"):
        block = build(spec(arch), 0).eval().body.stage2[0]
        nn.init.zeros_(block.conv2.weight)
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        with torch.no_grad():
            wanted = block.shortcut(block.bn1(x).relu())
            assert torch.equal(block(x.clone()), wanted)


def test_wide_resnet_starts_with_he_fan_out() -> None:
    body = build(spec("wrn28_2"), 0).body
    w = body.stage3[0].conv1.weight.detach()
    assert float(w.std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not body.head.bias.any()


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [("resnet18", 32, 4), ("resnet18", 96, 3), ("mobilenetv3_small_050", 32, 4), ("convnext_atto", 32, 4)],
)
def test_timm_strides_on_small_images(name: str, size: int, side: int) -> None:
    net = build(spec(f"timm:{name}", 7, 3, size), 0)
    assert net.training
    net.eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert net.body.net.forward_features(x).shape[-2:] == (side, side)
        z = (x - 0.5) / 0.25
        torch.testing.assert_close(net.body.head(net.body.features(z)), net(x))
        assert torch.equal(load(pack(net))(x), net(x))


def test_timm_resnet_has_the_small_stem_only_on_small_images() -> None:
    small, large = (build(spec("timm:resnet18", size=s), 0).body.net for s in (32, 96))
    assert (small.conv1.kernel_size, small.conv1.stride, small.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)
    assert small.conv1.weight.std() > 0
    # The probe that finds the strides must not move running statistics.
    assert all(int(m.num_batches_tracked) == 0 for m in small.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(("size", "patch"), [(16, 2), (28, 4), (32, 4), (64, 8)])
def test_timm_vit_patches(size: int, patch: int) -> None:
    net = build(spec("timm:vit_tiny_patch16_224", 5, 1, size), 0).eval()
    assert net.body.net.patch_embed.patch_size == (patch, patch)
    assert net(torch.rand(2, 1, size, size)).shape == (2, 5)


def test_timm_errors_name_the_model_and_a_way_out() -> None:
    with pytest.raises(BadInput, match=r"no model `resnet19`.*resnet18"):
        build(spec("timm:resnet19"), 0)
    with pytest.raises(BadInput, match=r"inception_v3` does not work on 3 x 32 x 32"):
        build(spec("timm:inception_v3"), 0)
    with pytest.raises(BadInput, match="unexpected keyword"):
        build(spec("timm:resnet18", nonsense=1), 0)


def test_traits_come_from_the_modules() -> None:
    for arch in OWN:
        assert traits(spec(arch)) == {"bn", "conv", "linear_head"}
    assert traits(spec("timm:resnet18")) == {"bn", "conv", "linear_head"}
    assert traits(spec("timm:vit_tiny_patch16_224")) == {"conv", "linear_head"}


def test_pretrained_weights_are_asked_for_when_building_and_never_when_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    create = timm.create_model

    def record(name: str, *, pretrained: bool, **args: object) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **args)

    monkeypatch.setattr(timm, "create_model", record)
    model = pack(build(spec("timm:mobilenetv3_small_050", pretrained=True), 0))
    assert asked.count(True) == 1
    asked.clear()
    load(model)
    traits(model.spec)
    assert asked
    assert not any(asked)
