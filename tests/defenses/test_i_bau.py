from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import ImageSet
from sleeperbench.defenses import i_bau
from sleeperbench.defenses.i_bau import IBAU, NAMES, hypergradient
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.pixels import to_float


def net_and_rows() -> tuple[Any, ImageSet]:
    """An untrained net, and 150 rows whose labels are its answers at noisy images: it is mostly right, not always."""
    net, pool = build(samples.SPEC, 3).eval(), samples.digits()["pool"]
    nn.init.normal_(net.body.head.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    noise = 0.3 * torch.randn(pool.images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = net(to_float(pool.images) + noise).argmax(1)
    return net, replace(pool, labels=labels)


def case(**parts: Any) -> Any:
    net, rows = net_and_rows()
    known = {"net": net, "clean": rows, "tune": rows.rows(torch.arange(36)), "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | {"val": rows.rows(torch.arange(36, 150))} | parts)


def flat(parts: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parts])


# ---- hypergradient ---------------------------------------------------------------------------------------------------
class Tiny(nn.Module):
    """Smooth and small: 2x3 pixels, 3 classes, 31 weights, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
        gen = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(1.5 * torch.randn(p.shape, generator=gen, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Problem:
    """Both losses as functions of flat delta and flat weights, through `functional_call`."""

    def __init__(self) -> None:
        gen = torch.Generator().manual_seed(1)
        self.net, self.method = Tiny(), IBAU()
        self.x, self.x0 = (torch.rand(5, 1, 2, 3, generator=gen, dtype=torch.float64) for _ in range(2))
        self.y, self.y0 = (torch.randint(3, (5,), generator=gen) for _ in range(2))
        self.where = torch.tensor([0.0, 1, 0, 1, 0], dtype=torch.float64).view(5, 1, 1, 1)
        self.delta = torch.randn(6, generator=gen, dtype=torch.float64)
        self.theta = flat(self.net.parameters())

    def logits(self, x: Tensor, theta: Tensor) -> Tensor:
        parts, at = {}, 0
        for name, p in self.net.named_parameters():
            parts[name] = theta[at : at + p.numel()].view(p.shape)
            at += p.numel()
        return torch.func.functional_call(self.net, parts, (x,))

    def outer(self, delta: Tensor, theta: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(self.x + self.where * delta.view(1, 1, 2, 3), theta), self.y)

    def inner(self, delta: Tensor, theta: Tensor) -> Tensor:
        out = self.logits(self.x0 + delta.view(1, 1, 2, 3), theta)
        return 0.001 * (delta * delta).sum() - F.cross_entropy(out, self.y0)

    def found(self, iterations: int, inner_step: float, growth: float = math.inf) -> tuple[Tensor, list[float]]:
        grads, norms = hypergradient(
            self.delta.view(1, 1, 2, 3),
            list(self.net.parameters()),
            lambda d: F.cross_entropy(self.net(self.x + self.where * d), self.y),
            lambda d: self.method.inner(self.net, d, self.x0, self.y0),
            iterations=iterations,
            inner_step=inner_step,
            growth=growth,
        )
        return flat(grads), norms


def central(f: Any, at: Tensor, h: float = 1e-5) -> Tensor:
    """Derivative of f (scalar or flat) at a flat point by central differences; the last axis is the point's."""
    steps = h * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(f(at + s) - f(at - s)).detach() / (2 * h) for s in steps], -1)


def slope(p: Problem, delta: Tensor, theta: Tensor) -> Tensor:
    """grad_delta h."""
    delta = delta.detach().requires_grad_()
    return torch.autograd.grad(p.inner(delta, theta.detach()), delta)[0]


def series(hessian: Tensor, pull: Tensor, iterations: int, step: float) -> list[Tensor]:
    """Partial sums of sum_k (I - step H)^k pull."""
    shrink = torch.eye(len(pull), dtype=pull.dtype) - step * hessian
    terms = [torch.linalg.matrix_power(shrink, k) @ pull for k in range(iterations)]
    return [torch.stack(terms[: k + 1]).sum(0) for k in range(iterations)]


@pytest.mark.parametrize(("iterations", "step"), [(1, 0.1), (5, 0.1), (5, 2.0)])
def test_the_hypergradient_is_the_explicit_series_with_a_dense_hessian(iterations: int, step: float) -> None:
    p = Problem()
    hessian = torch.autograd.functional.hessian(lambda d: p.inner(d, p.theta), p.delta)
    both = torch.autograd.functional.hessian(p.inner, (p.delta, p.theta))
    pull, direct = torch.autograd.functional.jacobian(p.outer, (p.delta, p.theta))
    sums = series(hessian, pull, iterations, step)
    expected = direct - step * both[0][1].T @ sums[-1]
    found, norms = p.found(iterations, step)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13)
    assert norms == pytest.approx([float(v.norm()) for v in sums], rel=1e-10)
    # The second term matters, and so does each iteration.
    assert float((found - direct).norm()) > 1e-3 * float(direct.norm())
    assert float((found - p.found(iterations + 1, step)[0]).norm()) > 1e-3 * float((found - direct).norm())


def test_the_hypergradient_by_finite_differences() -> None:
    p = Problem()
    hessian = central(lambda d: slope(p, d, p.theta), p.delta)
    mixed = central(lambda t: slope(p, p.delta, t), p.theta)
    pull, direct = central(lambda d: p.outer(d, p.theta), p.delta), central(lambda t: p.outer(p.delta, t), p.theta)
    expected = direct - 0.5 * mixed.T @ series(hessian, pull, 5, 0.5)[-1]
    assert torch.allclose(p.found(5, 0.5)[0], expected, atol=1e-8)


def test_without_an_iteration_it_is_the_plain_gradient() -> None:
    p = Problem()
    found, norms = p.found(0, 0.1)
    assert torch.allclose(found, torch.autograd.functional.jacobian(lambda t: p.outer(p.delta, t), p.theta))
    assert norms == []
    assert all(w.grad is None for w in p.net.parameters())


def test_many_iterations_on_a_convex_inner_problem_give_the_total_derivative() -> None:
    gen = torch.Generator().manual_seed(2)
    root, b, c = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((4, 4), (4, 3), (4,)))
    a = root @ root.T + torch.eye(4, dtype=torch.float64)  # h = d'A d / 2 - d'B theta has its minimum at A^-1 B theta
    theta = torch.randn(3, generator=gen, dtype=torch.float64).requires_grad_()

    def total(t: Tensor) -> Tensor:
        return torch.sin(torch.linalg.solve(a, b @ t) @ c) + (t**3).sum()

    best = torch.linalg.solve(a, b @ theta.detach())
    (found,), norms = hypergradient(
        best,
        [theta],
        lambda d: torch.sin(d @ c) + (theta**3).sum(),
        lambda d: d @ a @ d / 2 - d @ b @ theta,
        iterations=5000,
        inner_step=1 / float(torch.linalg.eigvalsh(a).max()),
    )
    assert torch.allclose(found, central(total, theta.detach()), atol=1e-8)
    assert len(norms) < 5000, "it ends when v stands still"


def test_the_series_ends_before_it_passes_its_bound() -> None:
    p = Problem()
    hessian = torch.autograd.functional.hessian(lambda d: p.inner(d, p.theta), p.delta)
    both = torch.autograd.functional.hessian(p.inner, (p.delta, p.theta))
    pull, direct = torch.autograd.functional.jacobian(p.outer, (p.delta, p.theta))
    lengths = [float(v.norm()) for v in series(hessian, pull, 6, 0.5)]
    # The bound lies between the third sum and the fourth.
    bound = (lengths[2] + lengths[3]) / 2 / lengths[0]
    assert lengths[2] < bound * lengths[0] < lengths[3] and max(lengths[:3]) == lengths[2]
    found, norms = p.found(6, 0.5, bound)
    assert torch.allclose(found, direct - 0.5 * both[0][1].T @ series(hessian, pull, 3, 0.5)[-1], rtol=1e-10)
    assert norms == pytest.approx(lengths[:4], rel=1e-10)


@pytest.mark.parametrize("rows", [20, 150])
def test_the_number_of_updates_does_not_depend_on_the_rows(rows: int) -> None:
    c = case(clean=net_and_rows()[1].rows(torch.arange(rows)))
    out = IBAU(rounds=2, steps=3, batch=20, iterations=1).run(c)
    assert out.chosen["updates"] == 6
    # Per step two passes forth of 20 rows on the way up, and two, the second of batch 0, on the way down.
    assert c.ctx.cost.forwards == 6 * 4 * 20


def test_attention_has_a_second_derivative() -> None:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 5, 4, generator=gen)
    w = torch.randn(4, 4, generator=gen).requires_grad_()

    def loss(d: Tensor) -> Tensor:
        x = (q + d) @ w
        return F.scaled_dot_product_attention(x, x, x).square().sum()

    (found,), _ = hypergradient(torch.zeros(1, 2, 5, 4), [w], loss, loss, iterations=3, inner_step=0.1)
    assert bool(found.isfinite().all())


# ---- steps -----------------------------------------------------------------------------------------------------------
def test_the_ascent_by_hand() -> None:
    net, rows = net_and_rows()
    x = to_float(rows.images)
    expected = torch.zeros(1, *x.shape[1:])
    with torch.no_grad():
        answers = net(x).argmax(1)
    for part in (slice(0, 60), slice(60, 120), slice(120, 150)):
        d = expected.clone().requires_grad_()
        log_p = net(x[part] + d).log_softmax(1)
        mean = -torch.stack([row[a] for row, a in zip(log_p, answers[part], strict=True)]).mean()
        (up,) = torch.autograd.grad(mean, d)
        expected = expected + 10 * (up - 0.001 * 2 * expected)
    ctx = samples.ctx()
    found = IBAU().ascend(net, x.split(60), ctx)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert float(found.abs().max()) > 0.1 and not found.requires_grad
    assert (ctx.cost.forwards, ctx.cost.backwards) == (300, 150)


@pytest.mark.parametrize(("rows", "perturbed"), [(256, 2), (100, 1), (30, 1)])
def test_delta_meets_one_percent_of_the_batch_and_batch_0_the_inner_map(
    rows: int, perturbed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    real = hypergradient

    def spy(delta: Tensor, weights: Any, outer: Any, inner: Any, **args: Any) -> Any:
        assert args == {"iterations": 5, "inner_step": 0.1, "growth": 10.0}
        net.inputs.clear()
        seen["outer"], seen["inner"] = outer(delta), inner(delta)
        seen["x"], seen["x0"] = net.inputs
        return real(delta, weights, outer, inner, **args)

    monkeypatch.setattr(i_bau, "hypergradient", spy)
    net = Recording()
    gen = torch.Generator().manual_seed(3)
    (x, x0), (y, y0) = (torch.rand(rows, 1, 2, 3, generator=gen) for _ in "ab"), (torch.arange(rows) % 3 for _ in "ab")
    delta, weights = torch.full((1, 1, 2, 3), 3.0), list(net.parameters())
    opt, ctx = torch.optim.Adam(weights, lr=1e-3), samples.ctx()
    growth = IBAU().update(net, weights, opt, delta, (x, y), (x0[:20], y0[:20]), gen, ctx)
    moved = (seen["x"] - x).flatten(1)
    assert int((moved != 0).any(1).sum()) == perturbed and float(moved.sum()) == pytest.approx(perturbed * 18, rel=1e-4)
    assert torch.equal(seen["x0"], x0[:20] + 3)
    assert (ctx.cost.forwards, ctx.cost.backwards) == (rows + 20, rows + 11 * 20)
    assert growth > 0


class Recording(nn.Module):
    """A linear net that remembers its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        return self.head(x.flatten(1))


def test_two_rounds_equal_a_slow_loop() -> None:
    _, rows = net_and_rows()
    c = case(clean=rows.rows(torch.arange(40)))
    method = IBAU(rounds=2, steps=4, batch=16)
    out = method.run(c)
    net = load(pack(c.net))
    weights, ctx = list(net.parameters()), samples.ctx(9)
    order = torch.randperm(40, generator=ctx.generator("order"))
    x, y = to_float(c.clean.images)[order], c.clean.labels[order]
    gen = ctx.generator("perturbed")
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    step = 0
    for _ in range(2):
        # Three batches: the fourth step of either kind is on the first one again.
        delta = method.ascend(net, [*x.split(16), x[:16]], ctx)
        for part in (slice(0, 16), slice(16, 32), slice(32, 40), slice(0, 16)):
            step += 1
            row = int(torch.randperm(len(x[part]), generator=gen)[0])
            d = delta.clone().requires_grad_()
            loss = F.cross_entropy(
                net(torch.stack([a + d[0] if i == row else a for i, a in enumerate(x[part])])), y[part]
            )
            pull, *total = torch.autograd.grad(loss, [d, *weights])
            h = 0.001 * (d * d).sum() - F.cross_entropy(net(x[:16] + d), y[:16])
            (down,) = torch.autograd.grad(h, d, create_graph=True)
            v = torch.zeros_like(pull)
            for _ in range(5):
                v = v - 0.1 * torch.autograd.grad((down * v).sum(), d, retain_graph=True)[0] + pull
            back = torch.autograd.grad((down * v).sum(), weights, allow_unused=True)
            total = [t if b is None else t - 0.1 * b for t, b in zip(total, back, strict=True)]
            with torch.no_grad():  # Adam, by its definition
                for w, t, m, s in zip(weights, total, first, second, strict=True):
                    m.mul_(0.9).add_(0.1 * t)
                    s.mul_(0.999).add_(0.001 * t * t)
                    w.sub_(1e-3 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8))
    gap = (flat(load(out.model).parameters()) - flat(weights)).abs()
    moved = (flat(c.net.parameters()) - flat(weights)).abs()
    # Adam turns rounding into whole steps where a gradient is nearly 0, so single weights may differ.
    assert float(gap.mean()) < 0.01 * float(moved.mean()) and float(moved.mean()) > 1e-3
    assert out.chosen["perturbation"] == pytest.approx(float(delta.norm()), rel=1e-2) and out.chosen["growth"] > 0


def test_running_statistics_the_given_net_and_repeats() -> None:
    _, rows = net_and_rows()
    c, method = case(clean=rows.rows(torch.arange(30))), IBAU(rounds=1, steps=2, batch=20)
    before = pack(c.net).state
    model = method.run(c).model
    weights = {n for n, _ in c.net.named_parameters()}
    assert len(weights) < len(before)
    for name, tensor in model.state.items():
        assert torch.equal(tensor, before[name]) == (name not in weights), name
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    assert all(p.grad is None for p in c.net.parameters())
    # 30 rows are batches of 20 and 10; the first is in every inner map.
    assert c.ctx.cost.forwards == 60 + 30 + 40 and c.ctx.cost.backwards == 30 + 30 + 2 * 11 * 20
    again = method.run(case(clean=c.clean)).model
    assert all(torch.equal(model.state[n], t) for n, t in again.state.items())


def test_weights_that_are_not_finite_are_an_error() -> None:
    broken, _ = net_and_rows()
    with torch.no_grad():
        broken.body.head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="round 1"):
        IBAU(rounds=1, steps=1).run(case(net=broken))


def test_rounds_before_one_that_diverges_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = IBAU.update, list[int]()

    def update(self: Any, net: Any, weights: Any, *args: Any) -> float:
        done.append(1)
        if len(done) == 3:
            with torch.no_grad():
                weights[0].fill_(torch.inf)
        return real(self, net, weights, *args)

    monkeypatch.setattr(IBAU, "update", update)
    out = IBAU(rounds=None, steps=1).run(case())
    assert list(out.path) == list(out.chosen["candidates"]) == ["round=1", "round=2"]
    assert all(bool(v.isfinite().all()) for m in out.path.values() for v in m.state.values())
    done.clear()
    with pytest.raises(FloatingPointError, match="round 3"):
        IBAU(rounds=4, steps=1).run(case())


# ---- settings --------------------------------------------------------------------------------------------------------
def test_published_settings() -> None:
    m = IBAU()
    # One pass per round over 5,000 rows in batches of 100.
    assert (m.rounds, m.steps, m.iterations, m.lr, m.batch, m.share) == (5, 5000 // 100, 5, 1e-3, 100, 0.01)
    assert (m.ascent, m.inner_step, m.penalty) == (10.0, 0.1, 0.001)
    for wrong in ({"rounds": 0}, {"steps": 0}, {"iterations": 0}, {"batch": 0}, {"share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            IBAU(**wrong)


def test_the_honest_rounds_are_the_most_that_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ImageSet] = []

    def unlearnt(self: Any, net: Any, data: ImageSet, ctx: Any, rounds: int) -> Any:
        seen.append(data)
        net = copy.deepcopy(net)
        for i in range(rounds):
            if i == 3:
                nn.init.zeros_(net.body.head.weight)
            yield net, {"growth": float(i)}

    monkeypatch.setattr(IBAU, "unlearnt", unlearnt)
    c = case()
    out = IBAU(rounds=None).run(c)
    assert list(out.path) == list(NAMES) == [f"round={i}" for i in range(1, 6)]
    assert out.chosen["rounds"] == 3 and out.model is out.path["round=3"]
    assert out.chosen["rows"] == 114 and out.chosen["candidates"]["round=3"]["growth"] == 2.0
    assert len(seen) == 1 and seen[0] is c.tune


def test_no_round_is_a_legal_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case()
    ruined = copy.deepcopy(c.net)
    nn.init.zeros_(ruined.body.head.weight)
    monkeypatch.setattr(IBAU, "unlearnt", lambda self, net, data, ctx, rounds: ((ruined, {}) for _ in range(rounds)))
    out = IBAU(rounds=None).run(c)
    assert out.model is None and out.chosen["rounds"] is None and len(out.path) == 5
    assert out.chosen["unchanged"] == "no round was accepted"
