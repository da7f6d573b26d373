from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.nad import NAD, NAMES, Distillation, attended, attention
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import right

STAGES = ("body.stage2", "body.stage3", "body.stage4")


def clean() -> ImageSet:
    """400 rows that no model of the samples was trained on."""
    pool, probe = samples.digits()["pool"], samples.digits()["probe"]
    parts = {k: torch.cat([getattr(pool, k), getattr(probe, k)]) for k in ("images", "labels", "ids")}
    return replace(pool, **parts)


def case(rows: ImageSet, val: int = 0, net: Any = None) -> Any:
    n = len(rows) - val
    return SimpleNamespace(
        net=samples.badnets_net() if net is None else net,
        clean=rows,
        tune=rows.rows(torch.arange(n)),
        val=rows.rows(torch.arange(n, len(rows))),
        ctx=samples.ctx(9),
    )


def slow_attention(maps: Tensor) -> Tensor:
    n, c, h, w = maps.shape
    out = torch.zeros(n, h, w)
    for i in range(n):
        for a in range(h):
            for b in range(w):
                out[i, a, b] = sum(float(maps[i, k, a, b]) ** 2 for k in range(c))
        out[i] /= sum(float(v) ** 2 for v in out[i].flatten()) ** 0.5 + 1e-6
    return out


def test_attention_equals_a_slow_loop() -> None:
    maps = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attention(maps), slow_attention(maps), atol=1e-6)
    assert torch.allclose(attention(-7.0 * maps), attention(maps), atol=1e-5), "scale and sign do not matter"
    assert torch.equal(attention(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 2, 2))
    assert torch.allclose(attention(maps[:, :, :1, :1]), torch.ones(3, 1, 1), atol=1e-3), "a single pixel says nothing"


def outputs(net: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and the last three stages of a small CNN, by hand."""
    h = net.body.stage1((x - net.mean) / net.std)
    maps = []
    for stage in (net.body.stage2, net.body.stage3, net.body.stage4):
        h = stage(h)
        maps.append(h)
    return net.body.head(h.mean((2, 3))), maps


def test_the_loss_equals_a_slow_reference() -> None:
    student, teacher = copy.deepcopy(samples.badnets_net()), samples.clean_net()
    rows, ctx = samples.digits()["pool"].rows(torch.arange(3)), samples.ctx()
    x, y = to_float(rows.images), rows.labels
    betas = dict(zip(STAGES, (3.0, 50.0, 700.0), strict=True))
    found = Distillation(teacher, betas, ctx).loss(student, x, y, y)
    logits, maps = outputs(student, x)
    with torch.no_grad():
        wanted = outputs(teacher, x)[1]
    expected = F.cross_entropy(logits, y)
    for beta, s, t in zip(betas.values(), maps, wanted, strict=True):
        difference = slow_attention(s.detach()) - slow_attention(t)
        term = beta * float((difference**2).sum()) / difference.numel()
        assert term > 0.01
        expected = expected + term
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    # The gradient is that of the whole sum: against a finite difference along itself.
    params, fixed = list(student.parameters()), list(teacher.parameters())
    assert all(g is None for g in torch.autograd.grad(found, fixed, retain_graph=True, allow_unused=True))
    up = torch.autograd.grad(found, params)
    length = torch.cat([g.flatten() for g in up]).norm()
    values = []
    for t in (1e-3, -1e-3):
        moved = copy.deepcopy(student)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), up, strict=True):
                p += t * g / length
        values.append(float(Distillation(teacher, betas, ctx).loss(moved, x, y, y)))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(length), rel=0.02)


def test_a_student_like_its_teacher_has_cross_entropy_alone() -> None:
    net, rows = samples.badnets_net(), samples.digits()["pool"]
    x, y = to_float(rows.images), rows.labels
    betas = dict.fromkeys(STAGES, 1e6)
    assert torch.allclose(
        Distillation(copy.deepcopy(net), betas, samples.ctx()).loss(net, x, y, y), F.cross_entropy(net(x), y)
    )


def test_teacher_is_fine_tuned_and_student_learns_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(clean())
    before = pack(c.net).state
    seen: list[Distillation] = []
    first = Distillation.__init__

    def spy(self: Distillation, *args: Any) -> None:
        first(self, *args)
        seen.append(self)

    monkeypatch.setattr(Distillation, "__init__", spy)
    model = NAD(teacher_steps=7, steps=5, batch=64).run(c).model
    (hooks,) = seen
    teacher = pack(hooks.teacher).state
    assert not any(m.training for m in hooks.teacher.modules())
    expected = NAD(batch=64).tuned(c.net, c.clean, replace(c.ctx, seed=c.ctx.derive("teacher")), 7, None).state
    assert all(torch.equal(expected[n], t) for n, t in teacher.items())
    assert hooks.betas == dict(zip(STAGES, (500.0, 1000.0, 1000.0), strict=True))
    changed = [n for n, _ in c.net.named_parameters() if not torch.equal(before[n], model.state[n])]
    assert len(changed) == len(list(c.net.parameters()))
    assert not torch.equal(before["body.stage1.1.running_mean"], model.state["body.stage1.1.running_mean"])
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())


def test_costs_are_one_pass_each_way_and_one_of_the_teacher() -> None:
    c = case(clean())
    NAD(teacher_steps=7, steps=5, batch=64).run(c)
    # The one image looked at first, the teacher's training, the student's, and the teacher's answers.
    assert c.ctx.cost.forwards == 1 + 7 * 64 + 2 * 5 * 64
    assert c.ctx.cost.backwards == 7 * 64 + 5 * 64


def test_attention_moves_towards_the_teacher_s() -> None:
    c, rows = case(clean()), samples.digits()["test"]
    method = NAD(lr=0.02, batch=64, steps=25)
    teacher = samples.clean_net()
    x = to_float(rows.images)

    def distance(scale: float) -> float:
        student = load(method.student(c, c.clean, STAGES, teacher, scale))
        assert float(right(student, rows, ctx=c.ctx).float().mean()) > 0.85
        with torch.no_grad():
            pairs = zip(outputs(student, x)[1], outputs(teacher, x)[1], strict=True)
            return sum(float(F.mse_loss(attention(s), attention(t))) for s, t in pairs)

    assert distance(0.1) < 0.5 * distance(0.0)


def test_settings_are_those_of_backdoorbench(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def tune(net: Any, data: Any, **args: Any) -> Any:
        seen.append({"data": data} | args)
        return pack(net)

    monkeypatch.setattr("sleeperbench.defenses.nad.tune", tune)
    c = case(clean())
    NAD().run(c)
    teacher, student = seen
    assert teacher.pop("hooks") is None and student.pop("hooks").teacher is not None
    assert teacher.pop("ctx").seed != student.pop("ctx").seed == c.ctx.seed
    for args in seen:
        assert args.pop("data") is c.clean
        assert args == {"lr": 0.01, "steps": 100, "batch": 256, "weight_decay": 5e-4}


def test_nets_without_maps_are_declined() -> None:
    rows = samples.random_images(4, (3, 16, 16))
    for arch in ("timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"):
        spec = replace(samples.SPEC, arch=arch, shape=(3, 16, 16), norm=((0.5,) * 3, (0.2,) * 3), args={})
        spec = replace(
            spec,
            args={"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
            if "swin" in arch
            else {"embed_dim": 12, "depth": 3, "num_heads": 1},
        )
        with pytest.raises(NotApplicable, match="needs_maps"):
            attended(build(spec, 0), rows.images[:1], samples.ctx())
    small = build(replace(samples.SPEC, shape=(1, 8, 8)), 0)
    with pytest.raises(NotApplicable, match=r"needs_maps: body\.stage4"):
        attended(small, samples.random_images(1, (1, 8, 8)).images, samples.ctx())
    assert attended(samples.clean_net(), clean().images[:1], samples.ctx()) == STAGES


def test_the_honest_scale_is_the_largest_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    ruined = copy.deepcopy(samples.badnets_net())
    with torch.no_grad():
        ruined.body.head.weight.zero_()
    seen: list[tuple[ImageSet, Any]] = []

    def student(self: Any, case: Any, rows: ImageSet, stages: Any, teacher: Any, scale: float) -> Any:
        seen.append((rows, teacher))
        return pack(case.net if scale <= 1 else ruined)

    monkeypatch.setattr(NAD, "student", student)
    c = case(clean(), val=120)
    outcome = NAD(scale=None, teacher_steps=1).run(c)
    assert outcome.chosen["scale"] == 1.0 and outcome.model is outcome.path["scale=1"]
    assert list(outcome.path) == list(NAMES) == ["scale=0.1", "scale=1", "scale=10"]
    assert all(rows is c.tune for rows, _ in seen) and len({id(t) for _, t in seen}) == 1


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"betas": [1.0, 2.0]}, {"betas": [1.0, 2.0, -1.0]}, {"scale": -1.0}, {"colour": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NAD.from_params(bad)
