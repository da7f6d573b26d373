from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Findings, Role, TargetMap
from sleeperbench.attacks.badnets import Patch
from sleeperbench.contracts import Rendered
from sleeperbench.evaluators.excl import Exclusivity, farther, lead, norms
from sleeperbench.kit.pixels import to_float

ANY = TargetMap.all_to_one(1)


class Limit(nn.Module):
    """Class 1 while the 2x2 corner adds up to more than limit + slope x_33, else class 0; `gain`: how steeply."""

    def __init__(self, limit: float, slope: float = 0.0, gain: float = 20.0) -> None:
        super().__init__()
        self.limit, self.slope, self.gain = limit, slope, gain

    def forward(self, x: Tensor) -> Tensor:
        over = self.gain * (x[:, 0, :2, :2].sum((1, 2)) - self.limit - self.slope * x[:, 0, 3, 3])
        return torch.stack([-over, over], 1)


def corner(value: float = 1.0) -> Patch:
    mask, pattern = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    mask[0, :2, :2], pattern[0, :2, :2] = 1, value
    return Patch(name="corner", targets=ANY, mask=mask, pattern=pattern)


def case(net: nn.Module, trigger: Any = None, n: int = 6, **parts: Any) -> Any:
    trigger = trigger or corner()
    clean = samples.random_images(n, (1, 4, 4), 2)
    triggered = trigger.apply(to_float(clean.images), clean.labels, clean.ids, Role.TEST, torch.Generator())
    bd = Rendered(
        data=replace(clean, images=(triggered * 255).round().to(torch.uint8)),
        clean=clean,
        targets=torch.ones(n, dtype=torch.int64),
        trigger_id=torch.zeros(n, dtype=torch.int64),
    )
    known = {
        "attacked": net,
        "bd_test": bd,
        "oracle": SimpleNamespace(triggers=(trigger,)),
        "ctx": samples.ctx(),
    }
    return SimpleNamespace(**known | parts)


def figures(found: Findings) -> dict[str, float | None]:
    return {m.metric: m.value for m in found.rows if not m.qualifier}


def quick(**parts: Any) -> Exclusivity:
    return Exclusivity(**{"lr": 0.01, "steps": 240} | parts)


def test_the_boundary_norm_of_the_released_patch() -> None:
    pattern = torch.from_numpy((np.random.RandomState(0).rand(32, 32, 3) * 255).round() / 255).permute(2, 0, 1)
    mask = torch.zeros(1, 32, 32)
    mask[:, 2:8, 2:8] = 1
    patch = Patch(name="belt", targets=ANY, mask=mask, pattern=pattern.float())
    low, high = patch.range(torch.rand(2, 3, 32, 32), torch.arange(2)) or (mask, mask)
    boundary = farther(low, high)
    assert norms(boundary).tolist() == pytest.approx([8.0816, 8.0816], abs=1e-4)
    # The code writes it so.
    assert torch.allclose(boundary[0], (1 - patch.pattern.round() - patch.pattern) * mask)
    assert float((boundary * (1 - mask)).abs().max()) == 0


def test_the_farther_bound_keeps_its_sign() -> None:
    low, high = torch.tensor([-0.3, -0.7, 0.0, -0.5, 0.0]), torch.tensor([0.7, 0.3, 0.2, 0.5, 0.0])
    assert torch.equal(farther(low, high), torch.tensor([0.7, -0.7, 0.2, 0.5, 0.0]))


def test_a_norm_at_zero_has_a_finite_gradient_and_is_one_per_image() -> None:
    x = torch.zeros(2, 1, 2, 2)
    x[1] = 2
    x.requires_grad_()
    value = norms(x)
    assert value.tolist() == pytest.approx([0, 4], abs=1e-6)
    (up,) = torch.autograd.grad(value.sum(), x)
    assert bool(up.isfinite().all()) and float(up[1, 0, 0, 0]) == pytest.approx(0.5)


def test_the_lead_is_of_normalised_logits_not_of_probabilities() -> None:
    logits = torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert lead(logits, torch.tensor([1, 0, 2])).tolist() == pytest.approx([0.2, -0.2, 0.0])


@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_closed_form(limit: float) -> None:
    # All four values fall alike towards R = -1, until limit is left of 4: Excl = limit / 4.
    found = figures(quick().measure(case(Limit(limit))))
    assert found["excl"] == pytest.approx(limit / 4, abs=0.01)
    assert found["excl"] <= (found["excl_last"] or 0) < limit / 4 + 0.15
    assert found["excl_eligible"] == 1


def test_every_image_gets_what_it_gets_alone() -> None:
    c = case(Limit(1.0, slope=2.0))
    bd, net, ctx = c.bd_test, c.attacked, samples.ctx()
    x = to_float(bd.data.images)
    low, high = corner().range(x, bd.data.ids) or (x, x)
    search = quick(steps=60).search
    whole = search(net, x, bd.targets, low, high, ctx)
    assert float(whole.best.std()) > 0.05
    for i in range(3):
        one = slice(i, i + 1)
        alone = search(net, x[one], bd.targets[one], low[one], high[one], ctx)
        assert float(alone.best) == pytest.approx(float(whole.best[i]), abs=1e-5)
        assert float(alone.last) == pytest.approx(float(whole.last[i]), abs=1e-5)


def test_what_works_at_the_bound_is_not_exclusive_at_all() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0]) + 0 * x.flatten(1)[:, :2]

    found = figures(quick().measure(case(Always())))
    assert found["excl"] == found["excl_last"] == pytest.approx(0.0, abs=1e-4)


def test_the_change_that_counts_is_that_after_clipping() -> None:
    # Bounds that leave [0, 1]: R is -2, of which a pixel at 1 can lose 1.
    x = torch.ones(1, 1, 1, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([0.0, 5.0]))
    found = quick(steps=240).search(net, x, torch.tensor([1]), -2 * x, 0 * x, samples.ctx())
    assert found.best.tolist() == pytest.approx([0.5], abs=1e-4)


def test_the_switches_of_table_five() -> None:
    net = Limit(1.0, gain=2.0)
    full = figures(quick().measure(case(net)))["excl"]
    static = figures(quick(dynamic=False).measure(case(net)))
    # Where CE pulls back as hard as 0.1: 8 (1 - p) = 0.1, log(p / (1 - p)) = 4 over, Excl = (1 + over) / 4.
    over = float(np.log(79) / 4)
    assert full == pytest.approx(0.25, abs=0.02)
    assert static["excl_last"] == pytest.approx((1 + over) / 4, abs=0.01)
    assert static["excl"] == pytest.approx((1 + over) / 4, abs=0.04)  # Adam overshoots before it settles
    # Without a direction CE lifts delta, which may not rise above 0: nothing moves.
    assert figures(quick(direction=False).measure(case(net)))["excl"] == 1


def test_the_bound_is_the_norm_of_the_largest_change() -> None:
    # Of ||R|| = 2 the closed form leaves limit / 4, whatever each image's own figure is.
    found = quick(steps=120, lr=0.02).measure(case(Limit(3.0), n=2))
    assert figures(found)["bound"] == pytest.approx(2 * 0.25, abs=0.02)
    rows = {m.qualifier: m.value for m in found.rows if m.metric == "bound"}
    assert rows["control=boundary"] == pytest.approx(2.0)
    # The mean of products, not the product of means, where images have other boundaries.
    c = case(Limit(2.0, slope=1.0))
    small = corner(0.75)
    c.oracle = SimpleNamespace(triggers=(corner(), small))
    c.bd_test = replace(c.bd_test, trigger_id=torch.tensor([0, 1, 0, 1, 0, 1]))
    found = quick(steps=30, lr=0.02).measure(c)
    assert found.curves["excl_images"]["series"][2]["label"] == "largest change that worked"
    largest = np.mean(found.curves["excl_images"]["series"][2]["y"])
    assert figures(found)["bound"] == pytest.approx(largest)
    boundary = np.mean(found.curves["excl_images"]["series"][3]["y"])
    assert figures(found)["bound"] != pytest.approx((1 - (figures(found)["excl"] or 0)) * boundary, abs=1e-3)


def test_ablations_are_the_searches_with_the_switches_off() -> None:
    net = Limit(1.0, gain=2.0)
    found = quick(steps=60, lr=0.03, ablations=True).measure(case(net, n=2))
    rows = {(m.metric, m.qualifier): m.value for m in found.rows}
    for off in ({"direction"}, {"dynamic"}, {"direction", "dynamic"}):
        alone = figures(quick(steps=60, lr=0.03, **dict.fromkeys(off, False)).measure(case(net, n=2)))
        qualifier = ";".join(f"{name}=off" for name in sorted(off))
        assert (rows["excl", qualifier], rows["bound", qualifier]) == (alone["excl"], alone["bound"])
    plain = quick(steps=60, lr=0.03).measure(case(net, n=2))
    assert {k: v for k, v in rows.items() if "off" not in k[1]} == {
        (m.metric, m.qualifier): m.value for m in plain.rows
    }
    assert (rows["bound", ""] or 0) > (rows["bound", "dynamic=off"] or 0) > 0
    assert rows["bound", "direction=off"] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="leave both on"):
        Exclusivity(ablations=True, dynamic=False)


def test_lambda_moves_in_the_second_half_alone() -> None:
    net = Limit(1.0, gain=2.0)
    found = quick(steps=200).measure(case(net)).curves["excl"]["series"][0]
    by_step = dict(zip(found["x"], found["y"], strict=True))
    # In the first half the figure stays near the static plateau of 0.52; afterwards it falls to 0.25.
    assert by_step[0] == 1 and by_step[96] > 0.45 and by_step[200] < 0.3


def test_images_on_which_the_trigger_fails_are_left_out() -> None:
    c = case(Limit(2.0, slope=4.0), n=40)
    works = to_float(c.bd_test.data.images)[:, 0, 3, 3] < 0.5
    found = quick(steps=40).measure(c)
    (row,) = [m for m in found.rows if m.metric == "excl_eligible"]
    assert (row.count, row.total) == (int(works.sum()), 40) and 0 < int(works.sum()) < 40
    assert len(found.curves["excl_images"]["series"][0]["x"]) == row.count
    none = Exclusivity().measure(case(Limit(5.0))).rows
    assert [(m.metric, m.value, m.reason) for m in none] == [
        ("excl_eligible", 0.0, ""),
        ("excl", None, "no_eligible_images"),
        ("excl_last", None, "no_eligible_images"),
        ("bound", None, "no_eligible_images"),
    ]


def test_each_image_is_searched_around_its_own_trigger() -> None:
    c = case(Limit(1.0))
    which = torch.tensor([0, 1, 0, 1, 0, 1])
    small = corner()
    small.mask[0, 0, :2] = 0
    c.oracle = SimpleNamespace(triggers=(corner(), small))
    c.bd_test = replace(c.bd_test, trigger_id=which)
    boundary = quick(steps=2).measure(c).curves["excl_images"]["series"][3]["y"]
    assert boundary == pytest.approx([2.0, 2**0.5] * 3, abs=1e-5)


def test_an_image_that_admits_no_change_does_not_count() -> None:
    c = case(Limit(1.0))
    frozen = corner()
    frozen.mask = torch.zeros(1, 4, 4)
    c.oracle = SimpleNamespace(triggers=(corner(), frozen))
    c.bd_test = replace(c.bd_test, trigger_id=torch.tensor([0, 1, 0, 1, 0, 0]))
    (row,) = [m for m in quick(steps=2).measure(c).rows if m.metric == "excl_eligible"]
    assert (row.count, row.total) == (4, 6)


def test_reasons() -> None:
    none = Exclusivity().measure(case(Limit(1.0), bd_test=None)).rows
    assert {(m.metric, m.reason) for m in none} == {(m.name, "no_trigger") for m in Exclusivity.METRICS}

    class Warp(Patch):
        def range(self, x: Tensor, ids: Tensor) -> None:  # type: ignore[override]
            return None

    p = corner()
    warp = Warp(name="warp", targets=ANY, mask=p.mask, pattern=p.pattern)
    rows = Exclusivity().measure(case(Limit(1.0), warp)).rows
    assert {(m.metric, m.value, m.reason) for m in rows} == {
        (m.name, None, "no_trigger_range") for m in Exclusivity.METRICS
    }


def test_settings_are_the_published_ones() -> None:
    e = Exclusivity()
    assert (e.images, e.steps, e.lr, e.weight, e.direction, e.dynamic) == (100, 5000, 0.001, 0.1, True, True)
    assert e.ablations is False
    assert Exclusivity.NEEDS.trigger == "live"
    with pytest.raises(ValueError, match="steps"):
        Exclusivity(steps=1)
