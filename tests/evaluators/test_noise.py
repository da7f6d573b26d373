from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Findings, Role
from sleeperbench.contracts import Rendered
from sleeperbench.evaluators.bec import split
from sleeperbench.evaluators.noise import Kind, TriggerNoise, inside, noise
from sleeperbench.evaluators.wba import WhiteBoxActivation
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.similarity import activations, sites, strongest, tac


def few(part: str, role: Role, n: int) -> Rendered:
    bd, rows = samples.badnets_rendered(part, role), torch.arange(n)
    return Rendered(
        data=bd.data.rows(rows), clean=bd.clean.rows(rows), targets=bd.targets[rows], trigger_id=bd.trigger_id[rows]
    )


def case(net: Any, **parts: Any) -> Any:
    known = {
        "net": net,
        "attacked": build(samples.SPEC, 1).eval(),
        "bd_probe": few("probe", Role.TRAIN, 60),
        "bd_test": few("test", Role.TEST, 100),
        "ctx": samples.ctx(3),
    }
    return SimpleNamespace(**known | parts)


def values(found: Findings) -> dict[tuple[str, str], float | None]:
    return {(m.metric, m.qualifier): m.value for m in found.rows}


def test_laws_of_the_noise() -> None:
    gen = torch.Generator().manual_seed(0)
    u, g = (noise(law, (200, 1, 16, 16), gen) for law in ("uniform", "gaussian"))
    assert float(u.abs().max()) <= 1 and float(u.var()) == pytest.approx(1 / 3, rel=0.02)
    assert float(g.var()) == pytest.approx(1, rel=0.02) and abs(float(g.mean())) < 0.02 and float(g.max()) > 3


class Edge(nn.Module):
    """Class 1 where the first pixel is above 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        over = x[:, 0, 0, 0] - 0.5
        return torch.stack([-over, over], 1)


@pytest.mark.parametrize(
    ("law", "expected"),
    # The pixel is 0.52: P(0.52 + 0.08 U > 0.5) = (0.08 + 0.02) / 0.16; P(Z > -0.25) = Phi(0.25).
    [("uniform", 0.1 / 0.16), ("gaussian", 0.5 * (1 + math.erf(0.25 / math.sqrt(2))))],
)
def test_the_share_under_noise_is_that_of_the_law(law: Any, expected: float) -> None:
    n = 4000
    data = replace(samples.random_images(n, (1, 2, 2)), images=torch.zeros(n, 1, 2, 2, dtype=torch.uint8))
    ones = torch.ones(n, dtype=torch.int64)
    bd = Rendered(data=data, clean=data, targets=ones, trigger_id=ones * 0)
    kind = Kind(net=Edge(), d=torch.full((1, 1, 2, 2), 0.52), triggered=True)
    t = TriggerNoise()
    (row,) = t._success(kind, bd, law, 0.08, 0, samples.ctx())
    assert row.value == pytest.approx(expected, abs=0.03)
    (again,) = t._success(kind, bd, law, 0.08, 1, samples.ctx())
    assert again.value != row.value, "each draw is another"
    (still,) = t._success(kind, bd, law, 0.0, 0, samples.ctx())
    assert still.value == 1.0


def test_the_noisy_image_is_clipped() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :2]

    bd = few("test", Role.TEST, 5)
    kind = Kind(net=Watch(), d=torch.full((1, 1, 16, 16), 0.05), triggered=False)
    TriggerNoise()._success(kind, bd, "uniform", 0.3, 0, samples.ctx())
    (x,) = seen
    assert float(x.min()) == 0 and float(x.max()) == 1
    clean = (to_float(bd.clean.images) + 0.05).clamp(0, 1)
    assert 0.25 < float((x - clean).abs().max()) <= 0.3 + 1e-6


def test_rows_kinds_and_the_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = TriggerNoise._noise
    monkeypatch.setattr(
        TriggerNoise, "_noise", lambda self, kinds, *rest: seen.append(kinds) or real(self, kinds, *rest)
    )
    t = TriggerNoise(levels=(0.0, 0.2), draws=2, rows=40, pairs=40, steps=20)
    c = case(build(samples.SPEC, 2).eval())
    # Every third triggered image asks for another class than the attacked model answers.
    with torch.no_grad():
        label = c.attacked(to_float(c.bd_test.data.images)).argmax(1)
    c.bd_test = replace(c.bd_test, targets=(label + (torch.arange(100) % 3 == 0)) % 10)
    found = t.measure(c)
    v = values(found)
    wba = WhiteBoxActivation(steps=20)
    # Without noise: the trigger on the attacked model, and the two d of WBA and gUAA on this one.
    d = wba.learn(c.net, c.bd_probe.data, c.bd_probe.targets, samples.ctx(3))[-1]
    with torch.no_grad():
        own = c.net((to_float(c.bd_test.data.images) + d).clamp(0, 1)).argmax(1) == c.bd_test.targets
    assert v["asr_noise", "kind=original;law=uniform;level=0"] == pytest.approx(0.66)
    assert v["asr_noise", "kind=reactivated;law=uniform;level=0"] == pytest.approx(float(own.double().mean()))
    (kinds,) = seen
    other = wba.learn(c.net, c.bd_probe.clean, c.bd_probe.targets, samples.ctx(3))[-1]
    assert kinds["adversarial"].net is c.net and not kinds["adversarial"].triggered
    assert torch.equal(kinds["adversarial"].d, other) and torch.equal(kinds["reactivated"].d, d)
    assert kinds["original"].net is c.attacked and not kinds["original"].d.any()
    assert v["asr_noise", ""] == v["asr_noise", "kind=reactivated;law=uniform;level=0.2"]
    assert v["cka_triggers", ""] == v["cka_triggers", "channels=top;pair=original-reactivated"]
    assert len([q for m, q in v if m == "asr_noise"]) == 1 + 3 * 2 * 2
    assert len([q for m, q in v if m == "cka_triggers"]) == 1 + 3 * 2 * 2
    assert {s["label"] for s in found.curves["noise"]["series"]} >= {"original, uniform", "adversarial, gaussian"}


def test_similarity_is_the_mean_over_layers_of_cka_in_the_channels_of_bec() -> None:
    net, bd = build(samples.SPEC, 1).eval(), few("test", Role.TEST, 100)
    other = build(samples.SPEC, 2).eval()
    t, ctx = TriggerNoise(rows=40, pairs=40), samples.ctx(3)
    zero = torch.zeros(1, 1, 16, 16)
    kinds = {
        "original": Kind(net=net, d=zero, triggered=True),
        "reactivated": Kind(net=net, d=zero, triggered=True),
        "adversarial": Kind(net=other, d=zero + 0.03, triggered=False),
    }
    v = {m.qualifier: m.value for m in t._alike(kinds, bd, ctx)}
    assert v["channels=top;pair=original-reactivated"] == pytest.approx(1)  # the same model on the same images
    assert v[""] == v["channels=top;pair=original-reactivated"]
    seen, pairs = split(bd, 40, 40, samples.ctx(3))
    names = sites(net, bd.data.images[:1])["conv"]
    change = tac(net, bd.clean.images[pairs], bd.data.images[pairs], names)
    each = []
    for name in names:
        top = strongest(change[name], 0.1)
        x = activations(net, bd.data.images[seen], [name])[name][:, top].flatten(1).double()
        y = inside(kinds["adversarial"], bd.clean.images[seen], name, ctx)[:, top].flatten(1).double()
        x, y = x - x.mean(0), y - y.mean(0)
        each.append(float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())))
    assert v["channels=top;pair=original-adversarial"] == pytest.approx(sum(each) / len(each), abs=1e-4)
    assert v["channels=all;pair=original-adversarial"] != v["channels=top;pair=original-adversarial"]
    assert v["channels=all;estimator=debiased;pair=original-adversarial"] is not None


def test_reasons_and_refusals() -> None:
    for parts in ({"bd_test": None}, {"bd_probe": None}):
        rows = TriggerNoise().measure(case(build(samples.SPEC, 2).eval(), **parts)).rows
        assert [(m.metric, m.reason) for m in rows] == [("asr_noise", "no_trigger"), ("cka_triggers", "no_trigger")]
    net = build(samples.SPEC, 2).eval()
    kinds = {k: Kind(net=net, d=torch.zeros(1, 1, 16, 16), triggered=True) for k in ("original", "reactivated")}
    (row,) = TriggerNoise()._alike(kinds, few("test", Role.TEST, 6), samples.ctx())
    assert row.reason.startswith("too_few_rows")
    odd = SimpleNamespace(spec=replace(samples.SPEC, args={"width": 4}))
    kinds["reactivated"] = Kind(net=odd, d=torch.zeros(1), triggered=True)  # type: ignore[arg-type]
    (row,) = TriggerNoise()._alike(kinds, few("test", Role.TEST, 60), samples.ctx())
    assert row.reason == "other_architecture"
    for bad in ({"levels": ()}, {"levels": (0.1, 0.0)}, {"draws": 0}, {"rows": 3}, {"share": 0.0}, {"rho": 0.0}):
        with pytest.raises(ValueError, match=r"levels|draws|rho"):
            TriggerNoise(**bad)


def test_settings_are_the_published_ones() -> None:
    t = TriggerNoise()
    assert (t.levels, t.rho, t.steps, t.rows, t.share) == ((0.0, 0.03, 0.06, 0.09), 0.05, 1750, 500, 0.1)
