from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import mntd
from sleeperbench.defenses.mntd import MNTD, Meta, Shadow, Trojan, auroc, jumbo, with_copies
from sleeperbench.kit.pixels import to_float


def case(tmp: Path, net: Any = None, clean: Any = None) -> Any:
    clean = samples.random_images(30, (1, 8, 8), 4) if clean is None else clean
    return SimpleNamespace(
        net=net,
        clean=clean,
        spec=SimpleNamespace(classes=4, shape=clean.shape),
        recipe=samples.RECIPE,
        ctx=replace(samples.ctx(2), scratch=tmp),
    )


def test_settings_are_the_published_ones() -> None:
    m = MNTD()
    assert (m.shadows, m.validation, m.steps, m.batch, m.lr) == (2048, 256, 1000, 100, 1e-3)
    assert (m.queries, m.hidden, m.epochs, m.repeats) == (10, 20, 10, 5)
    assert MNTD.ACCESS.track() == "Q" and MNTD.ACCESS.model == "scores"
    net = Shadow((3, 32, 32), 10)
    widths = [m.weight.shape[0] for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert widths == [32, 32, 64, 64, 256, 256, 10]
    with pytest.raises(ValueError, match="epochs"):
        MNTD(epochs=0)


def test_triggers_follow_the_jumbo_distribution() -> None:
    gen = torch.Generator().manual_seed(0)
    drawn = [jumbo((1, 32, 32), 10, gen) for _ in range(4000)]
    by_size: dict[int, list[Trojan]] = {}
    for t in drawn:
        assert t.pattern.shape[1] == t.pattern.shape[2]
        by_size.setdefault(t.pattern.shape[1], []).append(t)
    assert sorted(by_size) == [2, 3, 4, 5, 32]
    assert all(len(own) / 4000 == pytest.approx(0.2, abs=0.03) for own in by_size.values())
    full = by_size.pop(32)
    assert all(0.05 <= t.opacity <= 0.2 and (t.top, t.left) == (0, 0) for t in full)
    assert sum(t.opacity for t in full) / len(full) == pytest.approx(0.125, abs=0.006)
    patches = [t for own in by_size.values() for t in own]
    assert all(0.2 <= t.opacity <= 0.5 or t.opacity == 1 for t in patches)
    # A quarter of U(0.2, 0.6) lies above 0.5.
    assert sum(t.opacity == 1 for t in patches) / len(patches) == pytest.approx(0.25, abs=0.03)
    for size, own in by_size.items():
        for places in ([t.top for t in own], [t.left for t in own]):
            assert set(places) == set(range(32 - size + 1))
            assert sum(places) / len(places) == pytest.approx((32 - size) / 2, abs=1.5)
    assert sum(t.share for t in drawn) / 4000 == pytest.approx(0.275, abs=0.01)
    assert min(t.share for t in drawn) >= 0.05 and max(t.share for t in drawn) <= 0.5
    assert {t.target for t in drawn} == set(range(10))
    # Of U(-e, 1 + e) the share 2 e / (1 + 2 e) is cut off; over e in U(0, 1) that is 1 - ln 3 / 2.
    cut = torch.tensor([float(((t.pattern == 0) | (t.pattern == 1)).double().mean()) for t in drawn])
    assert float(cut.mean()) == pytest.approx(1 - math.log(3) / 2, abs=0.015)


def test_small_images_have_small_squares() -> None:
    gen = torch.Generator().manual_seed(1)
    assert {jumbo((3, 16, 16), 2, gen).pattern.shape[1] for _ in range(60)} == {1, 2, 16}


def test_copies_are_those_of_a_slow_loop() -> None:
    clean = samples.random_images(40, (3, 8, 8), 4)
    trojan = Trojan(pattern=torch.rand(3, 2, 3), top=5, left=1, opacity=0.3, target=2, share=0.26)
    found = with_copies(clean, trojan, torch.Generator().manual_seed(3))
    assert len(found) == 50 and torch.equal(found.images[:40], clean.images)
    assert torch.equal(found.labels, torch.cat([clean.labels, torch.full((10,), 2)]))
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:10]
    for copy, row in zip(found.images[40:], rows.tolist(), strict=True):
        for c in range(3):
            for i in range(8):
                for j in range(8):
                    wanted = float(clean.images[row, c, i, j])
                    if 5 <= i < 7 and 1 <= j < 4:
                        wanted = 0.7 * wanted + 0.3 * 255 * float(trojan.pattern[c, i - 5, j - 1])
                    assert float(copy[c, i, j]) == pytest.approx(wanted, abs=0.501)


def asking(net: nn.Module) -> Any:
    return lambda x: net(x).log_softmax(1)


def test_the_slope_reaches_the_queries() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    meta = Meta(torch.rand(2, 1, 4, 4), 4, 5).double()
    for poisoned in (0, 1):
        (slope,) = torch.autograd.grad(mntd.loss(meta, asking(net), poisoned), meta.queries)
        for place in ((0, 0, 1, 2), (1, 0, 3, 0), (1, 0, 2, 2)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = meta.queries.detach().clone()
                moved[place] += step
                with torch.no_grad():
                    # -ln sigma(z) for a poisoned model, -ln(1 - sigma(z)) for a benign one.
                    z = meta.outer((meta.inner(asking(net)(moved).flatten())).clamp(min=0))
                    ends.append(float(torch.log1p(torch.exp(-z if poisoned else z))))
            assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)
    assert float(slope.abs().max()) > 1e-4


def test_answers_are_cut_off() -> None:
    meta = Meta(torch.rand(1, 1, 4, 4), 2, 3)
    floor = math.log(1e-8)
    answers = [torch.tensor([[0.0, low]]) for low in (-torch.inf, floor, floor + 1)]
    logits = [float(meta(lambda x, a=a: a).detach()) for a in answers]  # type: ignore[misc]
    assert logits[0] == logits[1] != logits[2]


class Fixed(nn.Module):
    """A shadow that answers by the mean of the image's upper half, the more steeply the more it is poisoned."""

    def __init__(self, i: int) -> None:
        super().__init__()
        # Among 16 shadows benign and poisoned ones differ from their own kind too.
        self.steep = nn.Parameter(torch.tensor(float(i % 2) + 0.02 * i))

    def forward(self, x: Tensor) -> Tensor:
        top = x[:, :, :4].mean((1, 2, 3))
        return torch.stack([4 * self.steep * (top - 0.2), *([torch.zeros_like(top)] * 3)], 1)


def fleet(i: int) -> Any:
    return asking(Fixed(i).requires_grad_(False))


def test_queries_are_tuned_by_adam_within_the_images_range(tmp_path: Path) -> None:
    c, m = case(tmp_path), MNTD(epochs=1, queries=3, hidden=4, lr=0.05)
    found, best = m.meta(c.clean, 4, fleet, range(6), range(6, 10), 0, c.ctx)
    # The same by hand, up to Adam's steps of the queries.
    x = to_float(c.clean.images)
    start = float(x.mean()) + float(x.std()) * torch.randn(3, 1, 8, 8, generator=c.ctx.generator("queries", 0))
    with torch.random.fork_rng():
        torch.manual_seed(c.ctx.derive("meta", 0))
        own = Meta(start.clamp(0, 1), 4, 4)
    first, second = torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
    others = torch.optim.Adam([*own.inner.parameters(), *own.outer.parameters()], lr=0.05)
    for step, i in enumerate(torch.randperm(6, generator=c.ctx.generator("order", 0, 0)).tolist(), 1):
        others.zero_grad()
        own.queries.grad = None
        z = own(fleet(i))
        (nn.functional.softplus(-z) if i % 2 else nn.functional.softplus(z)).backward()
        g = own.queries.grad
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        change = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        others.step()
        own.queries.data = (own.queries.data - 0.05 * change).clamp(0, 1)
    assert torch.allclose(found.queries, own.queries, atol=1e-4)
    assert torch.allclose(found.inner.weight, own.inner.weight, atol=1e-4)
    assert float(found.queries.detach().min()) >= 0 and float(found.queries.detach().max()) <= 1
    assert not torch.equal(found.queries, start.clamp(0, 1))
    assert c.ctx.cost.forwards == 3 * 10 and c.ctx.cost.backwards == 3 * 6
    with torch.no_grad():
        z = [float(found(fleet(i))) for i in range(6, 10)]
    assert best == sum(z[a] > z[b] for a in (1, 3) for b in (0, 2)) / 4


def test_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c, rates = case(tmp_path), iter([0.5, 0.9, 0.7, 0.9])
    monkeypatch.setattr(mntd, "auroc", lambda a, b: next(rates))
    found, best = MNTD(epochs=4).meta(c.clean, 4, fleet, range(4), range(4, 6), 0, c.ctx)
    monkeypatch.setattr(mntd, "auroc", lambda a, b: 0.9)
    second = [MNTD(epochs=n).meta(c.clean, 4, fleet, range(4), range(4, 6), 0, case(tmp_path).ctx) for n in (1, 4)]
    assert best == 0.9 and torch.equal(second[0][0].queries, second[1][0].queries)  # of equals the first
    rates = iter([0.1, 0.9])
    monkeypatch.setattr(mntd, "auroc", lambda a, b: next(rates))
    two, _ = MNTD(epochs=2).meta(c.clean, 4, fleet, range(4), range(4, 6), 0, c.ctx)
    assert torch.equal(found.queries, two.queries) and not torch.equal(found.queries, second[0][0].queries)


def test_the_verdict_tells_poisoned_from_benign_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNTD, "shadow", lambda self, case, i, poisoned: Fixed(i))
    method = MNTD(shadows=6, validation=2, epochs=10, repeats=2, lr=0.05)
    scores, logits = [], []
    for steep in (0.2, 1.2):
        model, asked = Fixed(0), []
        model.steep.data.fill_(steep)

        def answer(x: Tensor, model: Fixed = model, asked: list[int] = asked) -> Tensor:
            assert float(x.min()) >= 0 and float(x.max()) <= 1
            asked.append(len(x))
            return model(x).softmax(1).detach()

        outcome = samples.judged(method, case(tmp_path, answer))
        assert asked == [10, 10] and outcome.chosen["validation_auroc"] == [1.0, 1.0]
        scores.append(outcome.verdict.score)
        logits.append(outcome.chosen["logit"])
        assert outcome.verdict.threshold == 0
    assert scores[0] < 0 < scores[1]

    # Of the four validation shadows the median, and the mean distance from it, are the scores' zero and unit.
    def asked_of(i: int) -> float:
        model = Fixed(i)
        return method.run(replace_net(c, lambda x: model(x).softmax(1).detach())).chosen["logit"]

    c = case(tmp_path)
    c.prepared = method.prepare(c)
    held = [asked_of(i) for i in range(12, 16)]
    centre = statistics.median(held)
    spread = sum(abs(v - centre) for v in held) / 4
    assert scores == pytest.approx([(v - centre) / spread for v in logits], rel=1e-2)


def replace_net(c: Any, net: Any) -> Any:
    return SimpleNamespace(**{**vars(c), "net": net})


def test_shadows_are_trained_on_the_rows_and_on_a_trigger_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, seen = case(tmp_path), []
    real = mntd.fit

    def fit(net: nn.Module, data: Any, recipe: Any, ctx: Any, **about: Any) -> Any:
        seen.append((data, recipe, ctx.seed, about))
        return real(net, data, recipe, ctx, **about)

    monkeypatch.setattr(mntd, "fit", fit)
    method = MNTD(steps=2, batch=10)
    nets = [method.shadow(c, i, poisoned=p) for i, p in ((7, True), (7, True), (7, False), (9, True))]
    for i, (data, recipe, seed, about) in zip((7, 7, 7, 9), seen, strict=True):
        ctx = replace(c.ctx, seed=c.ctx.derive("shadow", i))
        gen = ctx.generator("trojan")
        wanted = with_copies(c.clean, jumbo(c.clean.shape, 4, gen), gen)
        if data is seen[2][0]:
            wanted = c.clean
        assert torch.equal(data.images, wanted.images) and torch.equal(data.labels, wanted.labels)
        assert (recipe.lr, recipe.batch, recipe.weight_decay, recipe.schedule) == (1e-3, 10, 0, "constant")
        assert (recipe.pad, recipe.flip, seed, about) == (0, False, ctx.seed, {"steps": 2, "optimiser": "adam"})
    assert not nets[0].training and c.ctx.cost.backwards == 4 * 2 * 10
    states = [net.state_dict() for net in nets]
    same = [all(torch.equal(states[0][k], s[k]) for k in s) for s in states]
    assert same == [True, True, False, False]


def test_rank_and_refusal(tmp_path: Path) -> None:
    assert auroc(torch.tensor([1.0, 2, 2]), torch.tensor([2.0, 0])) == pytest.approx((1 + 1.5 + 1.5) / 6)
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 1"):
        MNTD().prepare(case(tmp_path, clean=samples.random_images(1)))
