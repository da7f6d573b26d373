from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.kit.batchnorm import refresh
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float

SPEC = ModelSpec(arch="small_cnn", classes=3, shape=(1, 8, 8), norm=((0.4,), (0.3,)))


def ctx() -> Ctx:
    return Ctx(seed=0, recipe=Recipe(), scratch=Path("unused"))


def net() -> Any:
    """With statistics of other images."""
    made = build(SPEC, seed=1).train()
    with torch.no_grad():
        made(torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3)
    return made.eval()


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def inputs(given: Classifier, parts: list[Tensor]) -> dict[str, list[Tensor]]:
    """What each normalisation layer is fed per batch, (C, values) in double, when all normalise by their batch."""
    probe = copy.deepcopy(given).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, layer in probe.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            seen[name] = []
            layer.register_forward_pre_hook(
                lambda m, args, to=seen[name]: to.append(args[0].detach().double().transpose(0, 1).flatten(1))
            )
    with torch.no_grad():
        for part in parts:
            probe(to_float(part))
    return seen


@pytest.mark.parametrize(("n", "batch", "sizes"), [(40, 20, [20, 20]), (41, 20, [14, 14, 13]), (9, 50, [9])])
def test_equals_a_direct_computation(n: int, batch: int, sizes: list[int]) -> None:
    given, x = net(), images(n)
    model = refresh(given, x, batch=batch, ctx=ctx())
    layers = inputs(given, list(x.split(sizes)))
    assert len(layers) == 4
    for i, (name, parts) in enumerate(layers.items()):
        share = [k / n for k in sizes]
        mean = sum(s * p.mean(1) for s, p in zip(share, parts, strict=True))
        var = sum(s * p.var(1, unbiased=True) for s, p in zip(share, parts, strict=True))
        torch.testing.assert_close(model.state[f"{name}.running_mean"].double(), mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.state[f"{name}.running_var"].double(), var, rtol=1e-4, atol=1e-6)
        if i == 0:  # of the first layer, the mean over all images
            torch.testing.assert_close(mean, torch.cat(parts, 1).mean(1))


def test_equal_batches_are_torchs_cumulative_average() -> None:
    given, x = net(), images(60)
    model = refresh(given, x, batch=20, ctx=ctx())
    usual = copy.deepcopy(given).train()
    for m in usual.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    with torch.no_grad():
        for part in x.split(20):
            usual(to_float(part))
    for name, tensor in usual.state_dict().items():
        torch.testing.assert_close(model.state[name], tensor, rtol=1e-5, atol=1e-7)


def test_changes_statistics_alone_and_only_of_a_copy() -> None:
    given, c = net(), ctx()
    given.body.stage1.train()
    state, modes = copy.deepcopy(given.state_dict()), [m.training for m in given.modules()]
    momenta = [m.momentum for m in given.modules() if isinstance(m, nn.BatchNorm2d)]
    model = refresh(given, images(30), batch=16, ctx=c)
    assert all(torch.equal(v, state[k]) for k, v in given.state_dict().items())
    assert [m.training for m in given.modules()] == modes
    assert [m.momentum for m in given.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    changed = {k.rsplit(".", 1)[1] for k, v in model.state.items() if not torch.equal(v, state[k])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert (c.cost.forwards, c.cost.backwards) == (30, 0)


def test_the_old_statistics_leave_no_trace() -> None:
    one, other = net(), net()
    for m in other.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.fill_(9.0)
            m.running_var.fill_(50.0)
    models = [refresh(n, images(30), batch=16, ctx=ctx()) for n in (one, other)]
    assert all(torch.equal(v, models[1].state[k]) for k, v in models[0].state.items())


def test_all_other_layers_run_in_eval_mode() -> None:
    given = net()
    given.body.stage2[2] = nn.Dropout(0.5)
    given.train()
    before = torch.get_rng_state()
    models = [refresh(given, images(30), batch=16, ctx=ctx()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, models[1].state[k]) for k, v in models[0].state.items())


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no images"):
        refresh(net(), images(0), batch=8, ctx=ctx())
    plain = net()
    for stage in (plain.body.stage1, plain.body.stage2, plain.body.stage3, plain.body.stage4):
        stage[1] = nn.Identity()
    with pytest.raises(NotApplicable, match="needs_bn"):
        refresh(plain, images(8), batch=8, ctx=ctx())
