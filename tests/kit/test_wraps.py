from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.models import ModelSpec, Wrap
from sleeperbench.kit.classifier import Classifier, build, load, pack, read_model, save_model
from sleeperbench.kit.wraps import KINDS

GATE = Wrap(kind="gate", site="body.stage2.1")
ORDER = [2, 0, 3, 1]
EVERY = {
    "gate": GATE,
    "insert": Wrap(kind="insert", site="body.stage3", args={"layer": "conv1x1_bn"}),
    "stamp": Wrap(kind="stamp"),
    "purify": Wrap(kind="purify", args={"width": 4, "bound": 0.1}),
    "permute_logits": Wrap(kind="permute_logits", args={"order": ORDER}),
    "noise": Wrap(kind="noise", args={"sigma": 0.1, "seed": 3}),
}
X = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net_of(*wraps: Wrap, arch: str = "small_cnn") -> Classifier:
    spec = ModelSpec(arch=arch, classes=4, shape=(3, 16, 16), norm=((0.5,) * 3, (0.25,) * 3), wraps=wraps)
    return build(spec, 0).eval()


def change(net: Classifier, i: int = 0) -> Any:
    return net.wraps[i]


def logits(net: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return net(x)


def test_the_list_of_kinds_is_the_contract() -> None:
    assert set(EVERY) == set(KINDS)
    assert all(f"`{kind}`" in (Wrap.__doc__ or "") for kind in KINDS)


@pytest.mark.parametrize("kind", EVERY)
def test_every_wrap_round_trips_with_its_state(kind: str, tmp_path: Path) -> None:
    net = net_of(GATE, EVERY[kind])
    gen = torch.Generator().manual_seed(2)
    for name, t in net.state_dict().items():
        if name.startswith("wraps.") and t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=gen))
    model = pack(net)
    assert all(k.startswith(("body.", "wraps.0.", "wraps.1.")) for k in model.state)
    assert any(k.startswith("wraps.1.") for k in model.state) == (kind not in ("permute_logits", "noise"))
    save_model(model, tmp_path)
    back = read_model(tmp_path)
    assert back.spec == model.spec
    assert torch.equal(logits(load(back)), logits(net))
    assert not torch.equal(logits(net), logits(net_of(GATE)))
    # The body keeps its keys: they are those of the plain model.
    assert {k for k in model.state if k.startswith("body.")} == set(pack(net_of()).state)


@pytest.mark.parametrize("kind", ["gate", "insert", "stamp", "purify"])
def test_a_new_wrap_changes_nothing(kind: str) -> None:
    # An inserted BN divides by sqrt(1 + 1e-5).
    torch.testing.assert_close(logits(net_of(EVERY[kind])), logits(net_of()), rtol=1e-4, atol=1e-5)


def test_a_closed_gate_equals_a_channel_whose_norm_is_zero() -> None:
    gated, pruned = net_of(GATE), net_of()
    nn.init.uniform_(pruned.body.stage2[1].bias)
    gated.body.load_state_dict(pruned.body.state_dict())
    change(gated).factor[3:9] = 0
    with torch.no_grad():
        pruned.body.stage2[1].weight[3:9] = 0
        pruned.body.stage2[1].bias[3:9] = 0
    assert torch.equal(logits(gated), logits(pruned))


def test_a_gate_scales_channels_of_maps_vectors_and_tokens() -> None:
    gate = change(net_of(Wrap(kind="gate", site="body.stage1.2", args={"channels": 3})))
    gate.factor.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert gate(torch.ones(2, 3, 4, 5))[1, :, 2, 3].tolist() == [1, 2, 3]
    assert gate(torch.ones(2, 3))[1].tolist() == [1, 2, 3]
    assert gate(torch.ones(2, 7, 3))[1, 5].tolist() == [1, 2, 3]


def test_a_gate_is_not_tuned_and_an_inserted_layer_is() -> None:
    net = net_of(GATE, EVERY["insert"])
    trained = {name for name, _ in net.named_parameters() if name.startswith("wraps.")}
    assert trained == {"wraps.1.layer.0.weight", "wraps.1.layer.1.weight", "wraps.1.layer.1.bias"}
    net.train()
    net(X).sum().backward()
    assert change(net, 1).layer[0].weight.grad.abs().sum() > 0


def test_an_inserted_linear_layer_maps_the_output_of_its_site() -> None:
    net = net_of(Wrap(kind="insert", site="body.head", args={"layer": "linear"}))
    plain = logits(net_of())
    with torch.no_grad():
        change(net).layer.weight.copy_(torch.eye(4)[ORDER])
        change(net).layer.bias.fill_(1)
    torch.testing.assert_close(logits(net), plain[:, ORDER] + 1)


def test_an_inserted_convolution_works_in_front_of_a_convolution_of_preact() -> None:
    site = "body.stage4.1.relu1"
    net = net_of(Wrap(kind="insert", site=site, args={"layer": "conv1x1_bn", "channels": 512}), arch="preact_resnet18")
    seen: list[Tensor] = []
    net.get_submodule("body.stage4.1.conv1").register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    change(net).layer[1].bias.data.fill_(7)
    logits(net)
    assert seen[0].min() >= 7


def test_a_stamp_replaces_the_masked_pixels() -> None:
    net = net_of(EVERY["stamp"])
    change(net).mask[:, :2, :3] = 1
    change(net).mask[:, 5, 5] = 0.25
    change(net).pattern.fill_(2.0)
    wanted = X.clone()
    wanted[:, :, :2, :3] = 2.0
    wanted[:, :, 5, 5] = 0.75 * X[:, :, 5, 5] + 0.5
    torch.testing.assert_close(change(net)(X), wanted)
    torch.testing.assert_close(logits(net), logits(net_of(), wanted))


def test_a_purifier_stays_in_its_bound_and_in_the_range() -> None:
    net = net_of(EVERY["purify"])
    nn.init.normal_(change(net).net[-1].weight, std=50)
    with torch.no_grad():
        out = change(net)(X)
        wanted = (X + 0.1 * torch.tanh(change(net).net(X))).clamp(0, 1)
    assert torch.equal(out, wanted)
    assert 0.09 < float((out - X).abs().max()) <= 0.1 + 1e-6
    assert torch.equal(logits(net), logits(net_of(), out))


def test_permuted_logits() -> None:
    assert torch.equal(logits(net_of(EVERY["permute_logits"])), logits(net_of())[:, ORDER])


def test_noise_is_gaussian_repeats_and_belongs_to_the_row() -> None:
    net = net_of(Wrap(kind="noise", args={"sigma": 0.05, "seed": 3}))
    grey = 0.5 + 0.01 * (torch.rand(64, 3, 16, 16) - 0.5)
    added = change(net)(grey) - grey
    assert float(added.std()) == pytest.approx(0.05, rel=0.02)
    assert float(added.mean()) == pytest.approx(0, abs=1e-3)
    assert len({tuple(a.flatten()[:4].mul(1e4).round().tolist()) for a in added}) > 40
    assert torch.equal(change(net)(grey) - grey, added)
    assert torch.equal(change(net)(grey[5:7]), change(net)(grey)[5:7])
    edge = change(net)(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16))
    assert edge.min() == 0
    assert edge.max() == 1
    other = net_of(Wrap(kind="noise", args={"sigma": 0.05, "seed": 4}))
    assert not torch.equal(change(other)(grey), change(net)(grey))


def test_a_later_wrap_acts_on_the_wrapped_network() -> None:
    net = net_of(
        EVERY["stamp"], EVERY["stamp"], Wrap(kind="permute_logits", args={"order": ORDER}), EVERY["permute_logits"]
    )
    change(net, 0).mask[:, :4] = 1
    change(net, 1).mask[:, 2:6] = 1
    change(net, 1).pattern.fill_(1)
    # The last stamp sees the image first, so the first one covers it where both have a mask.
    wanted = X.clone()
    wanted[:, :, 2:6] = 1
    wanted[:, :, :4] = 0
    twice = [ORDER[j] for j in ORDER]
    torch.testing.assert_close(logits(net), logits(net_of(), wanted)[:, twice])


def test_bad_wraps_say_what_is_wrong() -> None:
    for wrap, words in (
        (Wrap(kind="gates"), "no wrap of kind 'gates'; kinds: gate, insert, stamp, purify, permute_logits, noise"),
        (Wrap(kind="gate"), "`gate` needs a site"),
        (Wrap(kind="stamp", site="body.stage1"), "`stamp` takes no site"),
        (Wrap(kind="gate", site="body.stage9"), "`small_cnn` has no module 'body.stage9' in its body"),
        (Wrap(kind="gate", site="wraps"), "no module 'wraps' in its body"),
        (Wrap(kind="gate", site="body.stage1.2"), "give `channels`"),
        (Wrap(kind="insert", site="body.head", args={"layer": "lstm"}), "no layer 'lstm'; it has: conv1x1_bn, linear"),
        (Wrap(kind="permute_logits", args={"order": [0, 0, 1, 2]}), r"a permutation of 0\.\.3"),
        (Wrap(kind="permute_logits"), "cannot be built .*order"),
        (Wrap(kind="noise"), "`noise` cannot be built .*sigma"),
        (Wrap(kind="noise", args={"sigma": 0.1, "sed": 1}), "`noise` cannot be built .*sed"),
    ):
        with pytest.raises(ValueError, match=words):
            net_of(wrap)


def test_the_state_of_a_wrap_can_be_swapped_functionally() -> None:
    net, closed = net_of(GATE), net_of(GATE)
    change(closed).factor.zero_()
    with torch.no_grad():
        got = torch.func.functional_call(net, {"wraps.0.factor": torch.zeros(32)}, (X,))
    assert torch.equal(got, logits(closed))
    assert bool((change(net).factor == 1).all())
