from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.moth import MOTH, Hardening, Pairs, Triggers, invert
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.poison import render
from sleeperbench.kit.select import right
from sleeperbench.kit.train import fit
from sleeperbench.kit.tune import tune


def case(rows: Any = None) -> Any:
    data = samples.digits()["pool"] if rows is None else rows
    net = build(samples.SPEC, 3).eval()
    return SimpleNamespace(net=net, clean=data, spec=samples.SPEC, ctx=samples.ctx(9))


def filled(k: int, seed: int) -> Tensor:
    return torch.rand(k, k, generator=torch.Generator().manual_seed(seed)).fill_diagonal_(0)


@pytest.mark.parametrize("step", [0, 30, 300, 999, 1000, 5000])
def test_the_pair_is_the_fastest_or_a_random_one(step: int) -> None:
    """Against a double loop over all pairs, with the same draws."""
    known = [0, 2, 3, 5]
    pairs = Pairs(known, 6)
    pairs.speed, pairs.growth = filled(6, 1), 2 * filled(6, 2) - 1
    alpha = step / 1000 if step < 1000 else 1.0
    best, wanted = -float("inf"), (0, 0)
    for a in known:
        for b in known:
            if a != b:
                s = float(pairs.speed[a, b] + pairs.speed[b, a])
                d = float(pairs.growth[a, b] + pairs.growth[b, a])
                value = (1 - alpha) * s + alpha * d
                if value > best + 1e-9:
                    best, wanted = value, (a, b)
    gen, replay = (torch.Generator().manual_seed(7) for _ in range(2))
    drawn = set()
    for _ in range(60):
        found = pairs.pick(step, gen)
        if float(torch.rand(1, generator=replay)) < 0.3:
            a, b = torch.randperm(4, generator=replay)[:2].tolist()
            assert found == (known[a], known[b])
            drawn.add(found)
        else:
            assert found == wanted
    assert len(drawn) >= 6, "any pair may be drawn"


def test_distances_and_growth_by_hand() -> None:
    pairs = Pairs([0, 1, 2], 3)
    pairs.warmed(0, 10.0, torch.tensor([9.0, 0.2, 0.4]))
    pairs.warmed(1, 40.0, torch.tensor([0.6, 9.0, 0.1]))
    pairs.warmed(2, float("nan"), torch.tensor([0.0, 0.0, 9.0]))
    assert torch.allclose(pairs.speed, torch.tensor([[0, 0.6, 0], [0.2, 0, 0], [0.4, 0.1, 0]]))
    pairs.start()
    assert torch.allclose(pairs.growth, torch.tensor([[0, 1.0, 0], [0.25, 0, 0], [0.25, 1.0, 0]]))
    pairs.measured(0, 1, [60.0, 5.0])  # 40 -> 60 and 10 -> 5
    assert float(pairs.growth[0, 1]) == pytest.approx((1.0 + 0.5) / 2)
    assert float(pairs.growth[1, 0]) == pytest.approx((0.25 - 0.5) / 2)
    pairs.measured(0, 1, [30.0, float("nan")])  # 60 -> 30, the other was not found
    assert float(pairs.growth[0, 1]) == pytest.approx((0.75 - 0.5) / 2)
    assert float(pairs.growth[1, 0]) == pytest.approx(-0.125) and float(pairs.distance[1, 0]) == 5.0
    pairs.measured(2, 0, [10.0, 8.0])  # 0 -> 2 has its first distance
    assert float(pairs.growth[0, 2]) == 0 and float(pairs.distance[0, 2]) == 8.0
    assert pairs.mean() == pytest.approx((30 + 5 + 10 + 8 + 40) / 5)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(4 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.a.T


def squash(t: Tensor) -> Tensor:
    return (t.tanh() + 1) / 2


def raw(share: Tensor) -> Tensor:
    return torch.atanh((2 * share - 1).clamp(-1 + 1e-6, 1 - 1e-6))


@pytest.mark.parametrize("mean", [True, False])
def test_two_inversions_at_once_equal_two_slow_ones(mean: bool) -> None:
    net, gen = Linear(), torch.Generator().manual_seed(1)
    x, which = torch.rand(14, 3, 2, 2, generator=gen), torch.tensor([0] * 9 + [1] * 5)
    aim = torch.where(which == 0, 2, 1)
    mask, pattern = torch.rand(2, 1, 2, 2, generator=gen), torch.rand(2, 3, 2, 2, generator=gen)
    settings: dict[str, Any] = {"steps": 45, "weight": 0.3, "success": 0.9, "mean": mean}
    found = invert(net, x, aim, which, start=(mask, pattern), gen=torch.Generator().manual_seed(5), **settings)
    assert all(p.grad is None for p in net.parameters())
    changed = 0
    for j in range(2):
        noise = torch.Generator().manual_seed(5)
        u, v = raw(mask[j]).requires_grad_(), raw(pattern[j]).requires_grad_()
        adam = torch.optim.Adam([u, v], lr=0.1, betas=(0.5, 0.9))
        rows, goal = x[which == j], 2 if j == 0 else 1
        cost, best, up, down, kept, start, end = 0.3, float("inf"), 0, 0, None, None, None
        for _ in range(45):
            m, p = squash(u), squash(v)
            logits = net((1 - m) * rows + m * p)
            errors = F.cross_entropy(logits, torch.full((len(rows),), goal), reduction="none")
            adam.zero_grad()
            ((errors.mean() if mean else errors.sum()) + cost * m.sum()).backward()
            adam.step()
            start = errors.detach() if start is None else start
            share = float((logits.argmax(1) == goal).double().mean())
            jitter = [0.02 * torch.rand(2, n, 2, 2, generator=noise)[j] - 0.01 for n in (1, 3)]
            if share >= 0.9 and float(m.detach().sum()) < best:
                best, kept, end = float(m.detach().sum()), (m.detach(), p.detach()), errors.detach()
                with torch.no_grad():
                    u.copy_(raw((m + jitter[0]).clamp(0, 1)))
                    v.copy_(raw((p + jitter[1]).clamp(0, 1)))
            up, down = (up + 1, 0) if share >= 0.9 else (0, down + 1)
            if up == 10:
                cost, up, changed = cost * 1.5, 0, changed + 1
            elif down == 10:
                cost, down, changed = cost / 1.5**1.5, 0, changed + 1
        assert kept is not None and start is not None and end is not None
        assert float(found.size[j]) == pytest.approx(best, rel=1e-4)
        assert torch.allclose(found.mask[j], kept[0], atol=1e-4) and torch.allclose(
            found.pattern[j], kept[1], atol=1e-4
        )
        assert torch.allclose(found.fall[which == j], (start - end) / start, atol=1e-4)
    assert changed >= 2


def test_what_is_never_reached_has_no_size() -> None:
    x, zero = torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 5.0, 0.0]) + 0 * x.flatten(1)[:, :3]

    start = (torch.rand(1, 1, 2, 2), torch.rand(1, 3, 2, 2))
    gen = torch.Generator().manual_seed(0)
    found = invert(Fixed(), x, zero, zero, start=start, steps=3, weight=1e-3, success=0.9, mean=True, gen=gen)
    assert found.size.tolist() == [float("inf")] and float(found.mask.sum()) == 0
    assert found.fall.tolist() == [0, 0, 0, 0]


def planted(monkeypatch: pytest.MonkeyPatch, sizes: list[list[float]]) -> list[dict[str, Any]]:
    """`invert` answers masks of these sizes, and what it is asked is noted."""
    seen: list[dict[str, Any]] = []

    def fake(net: Any, x: Tensor, aim: Tensor, which: Tensor, **args: Any) -> Triggers:
        size = torch.tensor(sizes[len(seen)])
        seen.append({"x": x, "aim": aim, "which": which, **args})
        ok = size.isfinite()[:, None, None, None]
        mask = torch.where(ok, (size.nan_to_num(posinf=0) / 256)[:, None, None, None].expand(-1, 1, 16, 16), 0)
        return Triggers(mask=mask, pattern=torch.ones(len(size), 1, 16, 16), size=size, fall=torch.rand(len(x)))

    monkeypatch.setattr("sleeperbench.defenses.moth.invert", fake)
    return seen


def test_triggers_go_on_the_rows_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inf = float("inf")
    seen = planted(monkeypatch, [[32.0], [80.0], [32.0, inf], [16.0, 16.0], [64.0, 8.0]])
    data = samples.digits()["pool"]
    data = data.rows(data.labels < 2)
    hooks = Hardening(MOTH(share=0.5), data, 10, samples.ctx())
    x, y = data.images.float() / 255, data.labels
    n0, n1 = int((y == 0).sum()), int((y == 1).sum())
    net = nn.Identity()

    def moved(after: Tensor) -> list[int]:
        rows = (after - x).flatten(1).abs().sum(1) > 0
        return [int((rows & (y == k)).sum()) for k in (0, 1)]

    # Warm-up towards 0: half of the ones; towards 1: the mask is too large, a quarter of the image has 64 pixels.
    after = hooks.universal(net, x, y)
    assert moved(after) == [0, n1 // 2]
    changed = (after - x).flatten(1).abs().sum(1) > 0
    assert torch.allclose(after[changed], x[changed] + 32 / 256 * (1 - x[changed]), atol=1e-6)
    assert seen[0]["mean"] and seen[0]["success"] == 0.99 and seen[0]["steps"] == 500 and len(seen[0]["x"]) == 10
    assert seen[0]["aim"].unique().tolist() == [0]
    hooks.done = 1
    assert moved(hooks.universal(net, x, y)) == [0, 0]
    # Pairs: whichever way round, 200 steps, then 200 again after the failure, then 50.
    few = int(0.5 * min(n0, n1))
    after = hooks.between(net, x, y, 0)
    a, b = hooks.pair
    counts = [0, 0]
    counts[a] = few
    assert moved(after) == counts, "one direction failed"
    rows = seen[2]["which"] == 0
    assert seen[2]["aim"][rows].unique().tolist() == [b] and seen[2]["aim"][~rows].unique().tolist() == [a]
    assert int(rows.sum()) == [n0, n1][a] and not seen[2]["mean"] and seen[2]["success"] == 0.9
    assert torch.allclose(seen[2]["start"][0][0], torch.full((1, 16, 16), {(1, 0): 32.0, (0, 1): 80.0}[a, b] / 256))
    assert moved(hooks.between(net, x, y, 1)) == [few, few]
    assert moved(hooks.between(net, x, y, 2)) == [few if k == b else 0 for k in (0, 1)], "64 pixels are not small"
    assert [(s["steps"], s["weight"]) for s in seen[2:]] == [(200, 1e-3), (200, 1e-3), (50, 1e-2)]
    assert torch.allclose(seen[4]["start"][0], torch.full((2, 1, 16, 16), 16 / 256)), "goes on from the last"
    # Means over the three steps; a failed step repeats what stood.
    assert float(hooks.pairs.distance[a, b]) == pytest.approx((32 + 16 + 64) / 3)
    old = {(1, 0): 32.0, (0, 1): 80.0}[b, a]
    assert float(hooks.pairs.distance[b, a]) == pytest.approx((old + 16 + 8) / 3)
    assert hooks.failed == 1 and hooks.inversions == 2 + 6 and hooks.seen == {(0, 1)}
    # A batch without one of the classes is trained on as it is.
    zeros = y == 0
    assert torch.equal(hooks.between(net, x[zeros], y[zeros], 3), x[zeros])


def test_labels_statistics_and_costs() -> None:
    c = case()
    before, state = pack(c.net).state, torch.random.get_rng_state()
    method = MOTH(steps=14, batch=40, warm_inversion=2, first_inversion=2, next_inversion=1)
    outcome = method.run(c)
    weights = {n for n, _ in c.net.named_parameters()}
    for name, tensor in outcome.model.state.items():
        assert torch.equal(tensor, before[name]) == (name not in weights), name
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert outcome.chosen["inversions"] >= 10 and outcome.chosen["pairs"] <= 2
    # 10 classes, 2 steps on 90 rows each, and the updates, count whatever the pairs find.
    assert c.ctx.cost.forwards >= 14 * 40 + 10 * 2 * 90 and c.ctx.cost.backwards == c.ctx.cost.forwards
    again = method.run(case())
    assert again.chosen == outcome.chosen
    assert all(torch.equal(again.model.state[k], v) for k, v in outcome.model.state.items())


def test_settings_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sleeperbench.defenses.moth.tune", lambda net, data, **args: seen.update(args, data=data))
    c = case()
    MOTH().run(c)
    s = seen.pop("hooks").settings
    assert (s.warm_inversion, s.first_inversion, s.next_inversion) == (500, 200, 50)
    assert (s.per_class, s.warm_share, s.share) == (10, 0.5, 0.1)
    assert seen.pop("data") is c.clean and seen.pop("ctx") is c.ctx
    # Two epochs of 391 batches.
    assert seen == {"lr": 1e-4, "steps": 2 * 391, "batch": 128, "augment": False, "statistics": "running"}
    one = samples.digits()["pool"]
    with pytest.raises(NotApplicable, match="too_few_classes"):
        MOTH().run(case(one.rows(one.labels == 4)))


def test_triggered_images_come_nearer_to_their_class() -> None:
    """Zeros and ones with a patch towards 0."""

    def two(part: str) -> Any:
        data = samples.sized(samples.digits()[part], 8)
        return replace(data.rows(data.labels < 2), classes=("0", "1"))

    train, held, test = two("train"), two("probe"), two("test")
    attack = BadNets()
    backdoor = attack.prepare(train, samples.ctx(5))
    poisoned = attack.poison(train, backdoor, torch.ones(len(train), dtype=torch.bool), 0.1, samples.ctx(5))
    triggered = render(test, backdoor, Role.TEST, samples.ctx(5))
    assert triggered is not None
    net = build(replace(samples.wide(8, 8), classes=2), 2)
    fit(net, poisoned.data, samples.RECIPE, samples.ctx(2))

    def margin(net: nn.Module) -> float:
        with torch.no_grad():
            logits = net(to_float(triggered.data.images))
        return float((logits[:, 0] - logits[:, 1]).mean())

    ctx = samples.ctx(9)
    # The rate of the authors' Keras code: at 1e-4 so few updates change nothing.
    method = MOTH(lr=1e-3, steps=24, batch=64, warm_inversion=90, first_inversion=24, next_inversion=8)
    outcome = method.run(SimpleNamespace(net=net, clean=held, spec=net.spec, ctx=ctx))
    hardened = load(outcome.model)
    plain = load(tune(net, held, ctx=ctx, lr=1e-3, steps=24, batch=64, augment=False, statistics="running"))
    assert measure_asr(net, triggered, ctx).value > 0.9 and outcome.chosen["stamped"] > 24
    assert margin(hardened) < 0.75 * margin(net) and margin(hardened) < 0.85 * margin(plain)
    assert float(right(hardened, test, ctx=ctx).float().mean()) > 0.95
