from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ModelSpec, Role
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import sentinet
from sleeperbench.defenses.sentinet import SentiNet, deepest, distances, fit_curve, grad_cam, largest, plane
from sleeperbench.evaluators.detection import auroc
from sleeperbench.evaluators.evidence import curve
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float


def case(net: Classifier | None = None, clean: Any = None) -> Any:
    clean = samples.digits()["pool"] if clean is None else clean
    return SimpleNamespace(net=samples.badnets_net() if net is None else net, clean=clean, ctx=samples.ctx(9))


def small() -> Classifier:
    spec = ModelSpec(arch="small_cnn", classes=4, shape=(1, 16, 16), norm=((0.5,), (0.5,)), args={"width": 2})
    net = build(spec, 3).eval()
    net.body.head.weight.data *= 100
    return net


def slow_cam(net: Classifier, x: Tensor) -> tuple[int, Tensor]:
    """Grad-CAM of one image at stage 2, its slopes by finite differences of the layers above."""
    body: Any = net.body
    with torch.no_grad():
        a = body.stage2(body.stage1((x[None] - 0.5) / 0.5)).double()
        above = nn.Sequential(body.stage3, body.stage4, nn.AdaptiveAvgPool2d(1), nn.Flatten(), body.head).double()
        label = int(above(a).argmax())
        cam = torch.zeros(8, 8, dtype=torch.float64)
        for k in range(a.shape[1]):
            # The mean of slopes over all places is that along a shift of all places, divided by their number.
            up, down = a.clone(), a.clone()
            up[0, k] += 1e-6
            down[0, k] -= 1e-6
            slope = float(above(up)[0, label] - above(down)[0, label]) / 2e-6 / 64
            cam += slope * a[0, k]
        net.float()
    return label, cam.clamp(min=0)


def test_the_map_is_grad_cam() -> None:
    net, x = small(), to_float(samples.random_images(6, (1, 16, 16)).images)
    assert deepest(net, x[:1]) == "body.stage2"
    labels, maps = grad_cam(net, "body.stage2", x)
    assert maps.shape == (6, 1, 16, 16)
    for i in range(6):
        label, cam = slow_cam(net, x[i])
        assert label == int(labels[i])
        wanted = F.interpolate(cam[None, None], size=(16, 16), mode="bilinear", align_corners=False)[0]
        assert torch.allclose(maps[i].double(), wanted, atol=1e-5)
    assert float(maps.max()) > 0.01
    assert all(p.grad is None for p in net.parameters()) and not net.body.stage2._forward_hooks


def test_the_region_is_the_largest_share() -> None:
    cam = torch.arange(16.0).view(1, 1, 4, 4)
    assert largest(cam, 0.15).flatten().nonzero().flatten().tolist() == [14, 15]  # 2.4 pixels
    assert largest(cam, 0.01).sum() == 1
    assert largest(torch.ones(1, 1, 4, 4), 0.2).flatten().nonzero().flatten().tolist() == [0, 1, 2]
    assert not largest(torch.zeros(2, 1, 4, 4), 0.5).any()
    assert largest(torch.tensor([0.0, 3, 0, 1]).view(1, 1, 2, 2), 0.9).flatten().tolist() == [False, True, False, True]


def slow(net: Classifier, x: Tensor, carriers: Tensor, inert: Tensor, share: float) -> tuple[float, float]:
    """Fooled and confidence of one image, one carrier and one pixel at a time."""
    label, cam = grad_cam(net, "body.stage2", x[None])
    values = cam.flatten().tolist()
    ranked = sorted(range(256), key=lambda i: (-values[i], i))[: int(share * 256)]
    places = [divmod(i, 16) for i in ranked if values[i] > 0]
    fooled, confidence = 0, 0.0
    for c, noise in zip(to_float(carriers), to_float(inert), strict=True):
        pasted, blank = c.clone(), c.clone()
        for row, col in places:
            pasted[0, row, col] = x[0, row, col]
            blank[0, row, col] = noise[0, row, col]
        with torch.no_grad():
            fooled += int(net(pasted[None]).argmax()) == int(label)
            z = [float(v) for v in net(blank[None])[0]]
        confidence += math.exp(max(z)) / sum(math.exp(v) for v in z)
    return fooled / len(carriers), confidence / len(carriers)


def test_both_statistics_are_those_of_a_slow_loop() -> None:
    net, digits = samples.badnets_net(), samples.digits()
    x = to_float(torch.cat([digits["test"].images[:8], samples.badnets_rendered("test", Role.TEST).data.images[:8]]))
    carriers = digits["probe"].images[:12]
    inert = samples.random_images(12, (1, 16, 16), seed=4).images
    fooled, confidence = SentiNet(region=0.2).statistics(net, "body.stage2", x, carriers, inert)
    wanted = [slow(net, row, carriers, inert, 0.2) for row in x]
    assert fooled.tolist() == pytest.approx([w[0] for w in wanted])
    assert confidence.tolist() == pytest.approx([w[1] for w in wanted], abs=1e-5)
    assert len(fooled.unique()) > 3


def test_the_curve_goes_through_the_most_fooled_of_each_interval() -> None:
    gen = np.random.default_rng(0)
    x, y = gen.uniform(0.4, 0.8, 60), gen.uniform(0, 1, 60)
    taken: dict[int, list[tuple[float, float]]] = {}
    for a, b in sorted(zip(x, y, strict=True), key=lambda p: -p[1]):
        own = taken.setdefault(math.floor((a - x.min()) / 0.05), [])
        if len(own) < 2:
            own.append((a, b))
    points = np.array([p for own in taken.values() for p in own])
    wanted = np.polyfit(points[:, 0], points[:, 1], 2)[::-1]
    found = fit_curve(torch.from_numpy(x), torch.from_numpy(y), 0.05, 2)
    assert found.tolist() == pytest.approx(list(wanted), abs=1e-8)
    # One confidence alone: the curve still goes through the mean of its two highest rows.
    a, b, c = fit_curve(torch.full((4,), 0.5).double(), torch.tensor([0.1, 0.4, 0.2, 0.0]).double(), 0.02, 2).tolist()
    assert a + b * 0.5 + c * 0.25 == pytest.approx(0.3)


@pytest.mark.parametrize("curve", [(0.1, -0.4, 1.5), (-3.0, 9.0, -6.0), (0.2, 0.5, 0.0), (0.3, 0.0, 0.0), (0, 0, 80.0)])
def test_distances_are_those_of_the_roots_of_their_slope(curve: tuple[float, float, float]) -> None:
    gen = np.random.default_rng(1)
    x, y = gen.uniform(0, 1, 12), gen.uniform(0, 1, 12)
    found = distances(torch.from_numpy(x), torch.from_numpy(y), torch.tensor(curve))
    for p, q, d in zip(x, y, found.tolist(), strict=True):
        height = np.polynomial.Polynomial(curve)
        # Where the distance is smallest its slope, a cubic, is 0.
        slope = np.polynomial.Polynomial([-p, 1]) + (height - q) * height.deriv()
        real = [r.real for r in slope.roots() if abs(r.imag) < 1e-5]
        best = min(math.hypot(r - p, height(r) - q) for r in real)
        assert abs(d) == pytest.approx(best, abs=1e-6)
        assert (d > 0) == (q > height(p))


def test_run_fits_other_rows_than_the_carriers_and_the_threshold_is_the_mean_below() -> None:
    c, method = case(), SentiNet(carriers=10, rows=40)
    outcome = method.run(c)
    tensors, about = outcome.state
    order = torch.randperm(150, generator=c.ctx.generator("carriers"))
    assert torch.equal(tensors["carriers"], c.clean.images[order[:10]])
    rows = to_float(c.clean.images[order[10:50]])
    fooled, confidence = method.statistics(c.net, about["site"], rows, tensors["carriers"], tensors["inert"])
    assert torch.allclose(tensors["points"], torch.stack([confidence, fooled], 1).double())
    assert torch.equal(tensors["curve"], fit_curve(*tensors["points"].T, 0.02, 2))
    assert outcome.chosen["curves"]["plane"] == plane(*tensors["points"].T, tensors["curve"], outcome.alarm)
    scored = method.score(outcome.state, c.net, rows)
    assert torch.allclose(scored[:, 1:], tensors["points"].float(), atol=1e-6)
    scores = scored[:, 0]
    assert outcome.alarm == outcome.chosen["threshold"] == pytest.approx(-float(scores[scores < 0].mean()), abs=1e-5)
    assert outcome.chosen["clean_flagged"] == pytest.approx(float((scores > outcome.alarm).float().mean()))
    assert c.ctx.cost.forwards == 40 * 21 + 1 and c.ctx.cost.backwards == 40
    again = method.run(case())
    assert all(torch.equal(again.state[0][k], v) for k, v in tensors.items())
    assert len(SentiNet().run(case(clean=c.clean.rows(torch.arange(9)))).state[0]["carriers"]) == 4


def test_triggered_inputs_stand_out_on_the_attacked_model_alone() -> None:
    some = torch.arange(0, 350, 4)
    clean = to_float(samples.digits()["test"].images[some])
    triggered = to_float(samples.badnets_rendered("test", Role.TEST).data.images[some])
    method, ranks = SentiNet(carriers=20, rows=60), {}
    for name, net in (("attacked", samples.badnets_net()), ("clean", samples.clean_net())):
        state = method.run(case(net)).state
        ranks[name] = auroc(*(method.score(state, net, x)[:, 0].contiguous() for x in (triggered, clean)))
    assert ranks["attacked"] > 0.9
    assert ranks["clean"] < 0.75


def test_what_it_declines_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 1"):
        SentiNet().run(case(clean=samples.digits()["pool"].rows(torch.arange(1))))
    # A transformer's stages answer with tokens.
    monkeypatch.setattr(sentinet, "capture", lambda net, x, names: {names[0]: torch.zeros(1, 17, 12)})
    with pytest.raises(NotApplicable, match="no_spatial_stage"):
        SentiNet().run(case())
    m = SentiNet()
    assert (m.carriers, m.region, m.bin, m.highest, m.rows) == (100, 0.15, 0.02, 2, 400)
    assert SentiNet.ACCESS.track() == "T1"
    for bad in ({"carriers": 0}, {"bin": 0.0}, {"region": 1.0}, {"highest": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SentiNet(**bad)  # type: ignore[arg-type]


def test_the_plane_holds_the_rows_the_curve_and_where_the_alarm_begins() -> None:
    confidence, fooled, coefficients = torch.tensor(
        [[0.2, 0.5, 0.9], [0.1, 0.4, 0.3], [0.1, 0.2, 0.5]], dtype=torch.float64
    )
    drawn = curve(plane(confidence, fooled, coefficients, 0.05))
    rows, fitted, alarm = drawn["series"]
    assert rows == {"label": "clean rows", "x": [0.2, 0.5, 0.9], "y": [0.1, 0.4, 0.3], "points": True}
    assert (fitted["label"], alarm["label"]) == ("curve", "alarm")
    assert (fitted["x"][0], fitted["x"][-1]) == pytest.approx((0.2, 0.9))
    assert fitted["y"] == pytest.approx([0.1 + 0.2 * x + 0.5 * x * x for x in fitted["x"]])
    # A score on the second line is the threshold.
    at = [torch.tensor(alarm[k]).double() for k in "xy"]
    assert distances(at[0], at[1], coefficients).tolist() == pytest.approx([0.05] * len(at[0]), abs=1e-5)
    # Lines that leave the plane are cut, or left out.
    steep = curve(plane(confidence, fooled, torch.tensor([-2.0, 5.0, 0.0]).double(), 0.0))["series"]
    assert all(0 <= y <= 1 for s in steep for y in s["y"])
    assert len(curve(plane(confidence, fooled, torch.tensor([5.0, 0, 0]).double(), 0.1))["series"]) == 1
    assert (
        len(curve(plane(torch.rand(400).double(), torch.rand(400).double(), coefficients, 0.0))["series"][0]["x"])
        == 100
    )
