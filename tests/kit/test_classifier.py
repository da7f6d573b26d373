from __future__ import annotations

import copy
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from sleeperbench.contracts.models import Model, ModelSpec, Wrap
from sleeperbench.errors import BadInput, BrokenPlugin
from sleeperbench.kit import classifier
from sleeperbench.kit.classifier import Classifier, build, load, pack, read_model, save_model

NORM = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.5))


def spec(arch: str = "small_cnn", **kw: object) -> ModelSpec:
    return ModelSpec(**({"arch": arch, "classes": 4, "shape": (3, 16, 16), "norm": NORM} | kw))  # type: ignore[arg-type]


def stirred(s: ModelSpec) -> Classifier:
    """A network whose every tensor, BN statistics too, differs from a fresh one."""
    net = build(s, 3)
    gen = torch.Generator().manual_seed(1)
    for t in net.state_dict().values():
        if t.is_floating_point():
            t += 0.1 * torch.rand(t.shape, generator=gen)
        else:
            t += 5
    return net.eval()


def test_normalisation_is_the_first_layer_and_not_in_the_state() -> None:
    net = build(spec(), 0).eval()
    x = torch.rand(3, 3, 16, 16)
    channels = [(x[:, c] - NORM[0][c]) / NORM[1][c] for c in range(3)]
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.body(torch.stack(channels, 1)), rtol=0, atol=1e-6)
    assert not any("mean" in k and "running" not in k for k in net.state_dict())
    assert all(k.startswith("body.") for k in pack(net).state)


def test_weights_come_from_the_seed_and_the_global_generator_stays() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, other = build(spec(), 1), build(spec(), 1), build(spec(), 2)
    load(pack(a))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = build(spec(), 1)
    for x, y, z in zip(a.parameters(), b.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    assert not torch.equal(a.body.head.weight, other.body.head.weight)


@pytest.mark.parametrize("arch", ["small_cnn", "small_resnet", "preact_resnet18", "wrn28_2"])
def test_a_packed_model_gives_the_same_logits(arch: str, tmp_path: Path) -> None:
    net = stirred(spec(arch))
    x = torch.rand(4, 3, 16, 16)
    save_model(pack(net), tmp_path / "m")
    back = load(read_model(tmp_path / "m"))
    assert not back.training
    assert back.spec == net.spec
    with torch.no_grad():
        assert torch.equal(back(x), net(x))


def test_a_pack_is_a_copy_on_the_cpu_in_plain_layout() -> None:
    net = build(spec("small_resnet"), 0).to(memory_format=torch.channels_last)
    model = pack(net)
    kept = copy.deepcopy(dict(model.state))
    with torch.no_grad():
        for t in net.state_dict().values():
            t.zero_()
    for name, tensor in model.state.items():
        assert torch.equal(tensor, kept[name])
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    model = pack(stirred(spec(wraps=(Wrap(kind="noise", args={"sigma": 0.1}),))))
    save_model(model, tmp_path / "a")
    save_model(Model(spec=model.spec, state=dict(reversed(model.state.items()))), tmp_path / "b")
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "model.json").read_text())["arch"] == "small_cnn"


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    model = pack(build(spec(), 0))

    def changed(**kw: torch.Tensor | None) -> Model:
        state = {**model.state, **kw}
        return Model(spec=model.spec, state={k: v for k, v in state.items() if v is not None})

    for state, words in (
        ({"body.head.bias": None}, r"'body.head.bias' is missing"),
        ({"body.tail": torch.zeros(1)}, r"'body.tail' is unknown"),
        ({"body.head.bias": torch.zeros(5)}, r"'body.head.bias' is torch.float32 \(5,\), not torch.float32 \(4,\)"),
        ({"body.head.bias": torch.zeros(4, dtype=torch.float64)}, r"'body.head.bias' is torch.float64"),
    ):
        with pytest.raises(ValueError, match=words):
            load(changed(**state))  # type: ignore[arg-type]


def test_bad_specs_say_what_is_wrong() -> None:
    with pytest.raises(BadInput, match=r"no architecture `small_cn`: did you mean .*`small_cnn`"):
        build(spec("small_cn"), 0)
    with pytest.raises(BadInput, match=r"small_cnn` does not take the arguments.*depth"):
        build(spec(args={"depth": 3}), 0)
    with pytest.raises(ValueError, match="square"):
        build(spec(shape=(3, 16, 20)), 0)
    for norm in (((0.5,) * 2, (0.5,) * 2), ((0.5,) * 3, (0.5, 0.5, 0.0))):
        with pytest.raises(ValueError, match="norm must be 3 means"):
            build(spec(norm=norm), 0)


def test_architecture_arguments_are_part_of_the_spec() -> None:
    s = spec(args={"width": 8})
    net = build(s, 0)
    assert net.body.head.in_features == 32
    assert ModelSpec.from_json(json.loads(json.dumps(s.to_json()))) == s
    assert load(pack(net)).body.head.in_features == 32


def test_a_foreign_architecture_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint(name="ghost", value="no_such_module:Net", group="sleeperbench.models")
    monkeypatch.setattr(classifier, "architectures", lambda: {"ghost": broken})
    with pytest.raises(BrokenPlugin, match=r"`ghost` cannot be imported \(no_such_module:Net\)"):
        build(spec("ghost"), 0)


def test_a_deep_copy_stands_alone() -> None:
    s = spec(wraps=(Wrap(kind="gate", site="body.stage4.1"),))
    net = stirred(s)
    twin = copy.deepcopy(net)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(twin(x), before)
        twin.wraps[0].factor.zero_()
        assert not torch.equal(twin(x), before)
        assert torch.equal(net(x), before)


def test_the_body_is_reached_by_its_own_names() -> None:
    net = build(spec(), 0)
    for name, module in net.named_modules():
        assert net.get_submodule(name) is module
    assert isinstance(net.get_submodule("body.head"), nn.Linear)
