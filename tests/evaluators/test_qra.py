from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Findings, Measurement, Role
from sleeperbench.evaluators import qra as module
from sleeperbench.evaluators.accuracy import headline
from sleeperbench.evaluators.qra import Perturbation, QueryReactivation, mixed, objective, perturbation
from sleeperbench.evaluators.ra import RetuningAttack, measure_asr, retune
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.tune import tune


def found(**values: float | None) -> Findings:
    return Findings(rows=tuple(Measurement(metric=m, value=v) for m, v in values.items()))


def ra_findings(first: float | None, mean: float | None = 0.9, reason: str = "") -> Findings:
    head = Measurement(metric="p_asr_ra", value=mean, reason=reason)
    return Findings(rows=(head, Measurement(metric="p_asr_ra", value=first, qualifier="draw=0")))


def case(net: Any, woken: float = 0.9, k: float | None = 5, control: bool = True, **parts: Any) -> Any:
    clean = samples.clean_net()
    ra = ra_findings(woken) if k else ra_findings(None, None, "no_valid_budget")
    known = {
        "net": net,
        "probe": samples.digits()["probe"],
        "bd_probe": samples.badnets_rendered("probe", Role.TRAIN),
        "bd_test": samples.badnets_rendered("test", Role.TEST),
        "decoy_probe": None,
        "decoy_test": None,
        "defended_clean": clean,
        "evaluators": {"ra": ra, "ra_budget": found(ra_k=k)},
        "settings": {"ra": vars(RetuningAttack())},
        "controls": {"clean_model": found(p_asr_qra=0.07, c_asr_qra=0.03)} if control else {},
        "peers": (SimpleNamespace(name="exact_purification", net=clean), SimpleNamespace(name="ft", net=clean)),
        "ctx": samples.ctx(3),
    }
    return SimpleNamespace(**known | parts)


def test_the_perceptron_is_the_released_one_and_stays_in_its_ball() -> None:
    phi = Perturbation(3072, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), 16 / 255)
    assert sum(p.numel() for p in phi.parameters()) == 8_394_752
    x = torch.rand(4, 3, 32, 32)
    moved = phi(x).detach()
    assert float((moved - x).abs().max()) <= 16 / 255 + 1e-6 and float(moved.min()) >= 0 and float(moved.max()) <= 1
    assert not torch.equal(moved, x)


def test_it_sees_the_normalised_image() -> None:
    phi = Perturbation(4, torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25), 0.1)
    x = torch.rand(1, 1, 2, 2)
    expected = (x + 0.1 * phi.body(((x - 0.5) / 0.25).flatten(1)).view_as(x)).clamp(0, 1)
    assert torch.equal(phi(x), expected)


def test_the_objective_is_the_codes() -> None:
    target, teacher, surrogate = samples.badnets_net(), samples.clean_net(), samples.clean_net(2)
    phi = perturbation(target, 0.1, 0)
    data = samples.digits()["probe"].rows(torch.arange(6))
    x, y = to_float(data.images), data.labels
    p, q = teacher(x).double().softmax(1), target(phi(x)).double().softmax(1)
    ce = -surrogate(phi(x)).double().log_softmax(1)[torch.arange(6), y].mean()
    expected = 0.2 * (p * (p.log() - q.log())).sum(1).mean() + ce
    found = objective(phi, x, y, target, teacher, surrogate, 0.2, 1.0)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    alone = [float(objective(phi, x, y, target, teacher, surrogate, *w).detach()) for w in ((1.0, 0.0), (0.0, 1.0))]
    assert 0.2 * alone[0] + alone[1] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert alone[1] == pytest.approx(float(ce.detach()), rel=1e-4)


class Silent(torch.nn.Module):
    """Must not be asked."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this model has no part in the loss")


@pytest.mark.parametrize(
    ("settings", "used", "images"),
    [
        ({}, (0.2, 1.0), (3, 2)),
        ({"alpha_on": "ce"}, (1.0, 0.2), (3, 2)),
        ({"alpha_on": "ce", "alpha": 0.0}, (1.0, 0.0), (2, 1)),
        ({"alpha": 0.0}, (0.0, 1.0), (1, 1)),
    ],
)
def test_where_alpha_stands_and_its_switch(
    settings: Any, used: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = module.objective

    def spy(*args: Any) -> torch.Tensor:
        seen.append(args[-2:])
        return real(*args)

    monkeypatch.setattr(module, "objective", spy)
    net, other = build(samples.SPEC, 1).eval(), build(samples.SPEC, 2).eval()
    c = case(net)
    kl, ce = used
    teacher, surrogate = other if kl else Silent(), other if ce else Silent()
    QueryReactivation(steps=2, **settings).learn(c, c.net, c.bd_probe, teacher, surrogate)
    assert seen == [used] * 2
    assert (c.ctx.cost.forwards, c.ctx.cost.backwards) == (images[0] * 256, images[1] * 256)


def test_the_surrogate_is_the_one_asked_for() -> None:
    control, other = object(), object()
    c = case(None, clean_models=(control, other))
    assert QueryReactivation()._surrogate(c) is c.peers[0].net
    # Not the model that the control itself is: there it would be the one to be woken.
    assert QueryReactivation(surrogate="clean_model")._surrogate(c) is other
    for bad in ({"alpha_on": "both"}, {"surrogate": "none"}, {"alpha": -0.1}):
        with pytest.raises(ValueError, match=r"alpha|surrogate"):
            QueryReactivation(**bad)


def test_half_of_the_images_are_triggered_and_all_have_their_true_label() -> None:
    probe, bd = samples.digits()["probe"], samples.badnets_rendered("probe", Role.TRAIN)
    rows = mixed(probe, bd, samples.ctx(), each=40)
    assert len(rows) == 80
    true = dict(zip(probe.ids.tolist(), probe.labels.tolist(), strict=True))
    assert [true[i] for i in rows.ids.tolist()] == rows.labels.tolist()
    pictures = {int(i): x for i, x in zip(bd.data.ids, bd.data.images, strict=True)}
    assert all(torch.equal(pictures[int(i)], x) for i, x in zip(rows.ids[40:], rows.images[40:], strict=True))


def test_the_teacher_is_the_model_of_ra_s_first_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    net, bd = samples.badnets_net(), samples.badnets_rendered("probe", Role.TRAIN)
    for settings, k in (({}, 5), ({"k": 3, "lr": 0.02, "steps": 4}, 3)):
        ra = RetuningAttack(**settings)
        c = case(net, settings={"ra": vars(ra)})
        own = pack(QueryReactivation().teacher(c, net, bd)).state
        first = pack(retune(net, c.probe, bd, k, 0, c.ctx, lr=ra.lr, steps=ra.steps)).state
        assert all(torch.equal(own[n], t) for n, t in first.items())
    assert QueryReactivation.NEEDS.draws_of == "ra"


@pytest.mark.parametrize(
    ("parts", "net", "reason"),
    [
        ({}, 0.8 - 0.4, ""),
        ({"defended_clean": None}, None, "control_missing: clean_defended"),
        ({"controls": {"clean_model": found(c_asr_qra=0.1)}}, None, "control_missing: clean_model"),
        ({"controls": {"clean_model": found(p_asr_qra=0.9)}}, 0.0, ""),
        ({"decoy_probe": None}, 0.8 - 0.3, ""),
    ],
)
def test_what_controls_reach_is_taken_off(
    monkeypatch: pytest.MonkeyPatch, parts: Any, net: float | None, reason: str
) -> None:
    own, defended, decoy = object(), object(), SimpleNamespace(name="decoy")
    reached = {own: 0.8, defended: 0.3, "decoy": 0.4}

    def figures(self: Any, model: Any, phi: Any, bd: Any, ctx: Any, qualifier: str) -> list[Measurement]:
        value = reached["decoy" if bd is decoy else model]
        assert phi == (model, bd is decoy), "each model and trigger is woken for itself"
        return [Measurement(metric=m, value=value, qualifier=qualifier) for m in ("p_asr_qra", "c_asr_qra")]

    monkeypatch.setattr(QueryReactivation, "_woken", lambda self, case, model, probe: (model, probe is decoy))
    monkeypatch.setattr(QueryReactivation, "_figures", figures)
    monkeypatch.setattr(module, "thinned", lambda test: test)
    known = {"defended_clean": defended, "decoy_probe": decoy, "decoy_test": decoy}
    known |= {"controls": {"clean_model": found(p_asr_qra=0.1, c_asr_qra=0.1)}}
    rows = {(m.metric, m.qualifier): m for m in QueryReactivation().measure(case(own, **known | parts)).rows}
    assert rows["p_asr_qra_net", ""].reason == reason
    assert rows["p_asr_qra_net", ""].value == (None if net is None else pytest.approx(net))


def test_success_is_measured_on_rows_that_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueryReactivation, "learn", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(module, "retune", lambda *a, **k: None)
    net, bd = samples.badnets_net(), samples.badnets_rendered("test", Role.TEST)
    rows = QueryReactivation().measure(case(net)).rows
    (c_asr,) = [m for m in rows if m.metric == "c_asr_qra" and not m.qualifier]
    assert c_asr.total == len(bd) and c_asr.value is not None and c_asr.value < 0.1


def test_a_peer_gets_the_same_perturbation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueryReactivation, "learn", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(module, "retune", lambda *a, **k: None)
    rows = QueryReactivation(peers=("ft",)).measure(case(samples.badnets_net())).rows
    on = {m.qualifier: m.value for m in rows if m.metric == "p_asr_qra"}
    controls = {f"control={name}" for name in ("clean_model", "clean_defended", "placebo")}
    assert set(on) == {"", "on=ft"} | controls and on["on=ft"] < 0.2 < on[""]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"bd_test": None}, "no_trigger"),
        ({"k": None}, "no_valid_budget"),
        ({"woken": 0.2}, "ra_not_successful"),
    ],
)
def test_why_there_is_no_figure(parts: Any, reason: str) -> None:
    rows = QueryReactivation().measure(case(samples.badnets_net(), **parts)).rows
    assert [(m.metric, m.value, m.reason) for m in rows] == [(m.name, None, reason) for m in QueryReactivation.METRICS]


def test_the_clean_control_is_measured_though_nothing_woke_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueryReactivation, "learn", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(module, "retune", lambda *a, **k: None)
    assert (
        headline(QueryReactivation().measure(case(samples.clean_net(), woken=0.0, control=False)))["p_asr_qra"]
        is not None
    )


def purified_net() -> Any:
    """The attacked model after a few steps on triggered rows under their true labels: asleep, and not far."""
    pool, bad = samples.digits()["pool"], samples.badnets_rendered("pool", Role.TRAIN).data
    both = replace(
        pool,
        images=torch.cat([pool.images, bad.images]),
        labels=torch.cat([pool.labels, bad.labels]),
        ids=torch.cat([pool.ids, bad.ids + len(pool) * 100]),
    )
    return load(tune(samples.badnets_net(), both, ctx=samples.ctx(4), lr=0.01, steps=10))


@pytest.mark.parametrize(("alpha_on", "steps"), [("kl", 50), ("ce", 8)])
def test_a_trained_perturbation_wakes_a_purified_model_and_no_clean_one(alpha_on: Any, steps: int) -> None:
    """Nothing here stands in for anything: attack, purification, retuning and perturbation are trained.

    The code's form gives the teacher a fifth of the paper's weight and takes more steps.
    """
    purified, c = purified_net(), samples.ctx(3)
    before = copy.deepcopy(pack(purified).state)
    asleep = measure_asr(purified, samples.badnets_rendered("test", Role.TEST), c).value
    assert asleep is not None and asleep < 0.2
    # Larger and shorter than the published perturbation: the nets and images are small.
    qra = QueryReactivation(steps=steps, eps=0.2, alpha_on=alpha_on)
    surrogate = SimpleNamespace(name="exact_purification", net=samples.clean_net(2))
    parts: Any = {"k": 2, "peers": (surrogate,), "defended_clean": None}
    woken = headline(qra.measure(case(purified, **parts)))
    clean = headline(qra.measure(case(samples.clean_net(), woken=0.0, control=False, **parts)))
    assert woken["p_asr_qra"] > 0.7 and woken["c_asr_qra"] < 0.1, woken
    assert clean["p_asr_qra"] < 0.1 and clean["c_asr_qra"] < 0.1, clean
    assert all(torch.equal(before[n], t) for n, t in pack(purified).state.items())
    assert all(p.requires_grad for p in purified.parameters())


def test_settings_are_the_published_ones() -> None:
    q = QueryReactivation()
    # 50 epochs over 1,000 images in batches of 128 are 8 batches each.
    assert (q.eps, q.alpha, q.steps, q.lr, q.alpha_on) == (16 / 255, 0.2, 50 * 8, 0.1, "kl")
