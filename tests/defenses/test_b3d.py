from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import ImageSet
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.b3d import B3D, draw, estimate, squash, suspicion


def test_squash_is_a_half_at_zero_and_its_slope_the_score_of_a_bernoulli() -> None:
    z = torch.tensor([-1.3, 0.0, 0.8], dtype=torch.float64, requires_grad=True)
    g = squash(z)
    assert float(g.detach()[1]) == 0.5
    (slope,) = torch.autograd.grad(g.sum(), z, retain_graph=True)
    assert torch.allclose(slope, 2 * g * (1 - g))
    for m in (0.0, 1.0):  # d ln p(m) / dz = 2 (m - g)
        (score,) = torch.autograd.grad((m * g.log() + (1 - m) * (1 - g).log()).sum(), z, retain_graph=True)
        assert torch.allclose(score, 2 * (m - g))


def test_mask_estimate_has_the_gradient_of_the_expectation_exactly() -> None:
    """All pairs of draws of four pixels, weighted by their probability, against autograd through all masks."""
    a = torch.tensor([-0.4, 0.1, 0.9, -1.0], dtype=torch.float64, requires_grad=True)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    loss = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 3
    g = squash(a)
    chance = (masks * g + (1 - masks) * (1 - g)).prod(1)
    (exact,) = torch.autograd.grad((chance * loss).sum(), a)
    p, share = chance.detach(), g.detach().view(1, 2, 2)
    mean = torch.zeros(1, 2, 2, dtype=torch.float64)
    for i, j in itertools.product(range(16), repeat=2):
        m = masks[[i, j]].view(2, 1, 2, 2)
        mean += p[i] * p[j] * estimate(loss[[i, j]], m, share, torch.zeros_like(m), 0.1)[0]
    assert torch.allclose(mean.flatten(), exact, atol=1e-12)


def test_pattern_estimate_meets_the_gradient_of_a_linear_and_of_a_quadratic_loss() -> None:
    """E[v.(b + s e) + |b + s e|^2] has the gradient v + 2 b."""
    gen = torch.Generator().manual_seed(1)
    v, b, k, sigma = torch.randn(3, generator=gen), torch.randn(3, generator=gen), 200_000, 0.1
    e = torch.randn(k, 3, 1, 1, generator=gen)
    z = b + sigma * e.flatten(1)
    loss = z @ v + z.square().sum(1) + 7
    m = torch.zeros(k, 1, 1, 1)
    found = estimate(loss, m, torch.zeros(1, 1, 1), e, sigma)[1].flatten()
    # Variance of one term: |gradient|^2 and as much again of its own component.
    error = float((v + 2 * b).norm()) * math.sqrt(2 / k)
    assert float((found - v - 2 * b).abs().max()) < 5 * error
    assert error < 0.02


def test_masks_are_drawn_with_their_shares() -> None:
    share = torch.tensor([[[0.0, 0.2], [0.7, 1.0]]])
    m, e = draw(share, torch.zeros(3, 2, 2), 20_000, torch.Generator().manual_seed(0))
    assert set(m.unique().tolist()) == {0.0, 1.0}
    assert float((m.mean(0) - share).abs().max()) < 0.015
    assert e.shape == (20_000, 3, 2, 2)
    assert float(e.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((m * e[:, :1]).mean())) < 0.01


def test_either_rule_is_a_score_above_the_threshold() -> None:
    spread = torch.tensor([30.0, 60, 90, 100, 110, 140, 170, 20])  # an eighth of no index, but a fifth of the median
    everywhere = torch.ones(8, dtype=torch.bool)
    score = suspicion(spread, everywhere, 2.0)
    values = spread.numpy().astype(float)
    index = (np.median(values) - values) / (1.4826 * np.median(np.abs(values - np.median(values))))
    assert (index < 2).all()
    assert score.tolist() == pytest.approx(np.maximum(index, 2 * np.median(values) / 4 / values).tolist())
    assert (score > 2).tolist() == [False] * 7 + [True]
    assert score[7] == pytest.approx(2 * 95 / 80)
    tight = torch.tensor([100.0, 101, 102, 103, 104, 105, 106, 80])
    assert (suspicion(tight, everywhere, 2.0) > 2).tolist() == [False] * 7 + [True]


def test_only_a_class_that_was_reached_is_flagged_and_the_others_count() -> None:
    norms = torch.tensor([4.0, 390, 400, 410, 395, 405, 400, 3, 398, 402])
    alone = torch.arange(10) == 0
    score = suspicion(norms, alone, 2.0)
    values = norms.numpy().astype(float)
    index = (399 - values) / (1.4826 * np.median(np.abs(values - 399)))
    assert score.tolist() == pytest.approx([max(index[0], 2 * 399 / 16), *np.minimum(index[1:], 0)])
    assert (score > 2).tolist() == alone.tolist()
    assert float(suspicion(norms, ~alone, 2.0)[7]) > 2
    assert float(suspicion(norms, torch.zeros(10, dtype=torch.bool), 2.0).max()) == 0


def test_a_drop_is_asked_for_beside_the_index() -> None:
    everywhere = torch.ones(8, dtype=torch.bool)
    for small, flagged in ((80.0, False), (52.0, False), (51.0, True), (20.0, True)):  # the median is 102.5
        tight = torch.tensor([100.0, 101, 102, 103, 104, 105, 106, small])
        assert bool(suspicion(tight, everywhere, 2.0)[7] > 2)
        assert bool(suspicion(tight, everywhere, 2.0, 0.5)[7] > 2) is flagged
    wide = torch.tensor([10.0, 40, 70, 100, 130, 160, 190, 45])
    assert torch.equal(suspicion(wide, everywhere, 2.0, 0.5), suspicion(wide, everywhere, 2.0)), "the quarter suffices"


class Planted:
    """Scores of six classes from the brightness of rows of an image; light in the last pixel speaks for class 2."""

    def __init__(self, backdoor: bool) -> None:
        self.backdoor, self.images = backdoor, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) <= 1
        self.images += len(x)
        logits = 12 * x[:, 0].mean(2)
        logits[:, 2] += 24 * x[:, 0, 5, 5] * self.backdoor
        return logits.softmax(1)


def clean_rows(n: int = 12) -> ImageSet:
    """Class c has a bright row c; the last two pixels of the last row are dark."""
    pixels = torch.randint(60, (n, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(n) % 6
    pixels[torch.arange(n), 0, labels] += 150
    pixels[:, 0, 5, 4:] = 0
    return samples.images(pixels, labels, classes=6)


def case(net: Any, clean: ImageSet | None = None, classes: int = 6) -> Any:
    spec = SimpleNamespace(classes=classes, shape=(1, 6, 6))
    return SimpleNamespace(net=net, spec=spec, clean=clean_rows() if clean is None else clean, ctx=samples.ctx(4))


SMALL = B3D(steps=80, samples=32, batch=4, lr=0.3, weight=0.3, window=3, success=0.8)


def test_the_target_gets_the_smallest_mask_on_the_trigger() -> None:
    net = Planted(True)
    outcome = SMALL.run(case(net))
    norms = outcome.chosen["norms"]
    assert min(norms) == norms[2] and 2 not in outcome.chosen["not_inverted"]
    assert outcome.chosen["claimed"] == [2]
    assert outcome.verdict is not None and int(outcome.verdict.label_scores.argmax()) == 2  # type: ignore[union-attr]
    (claim,) = outcome.inverted
    assert claim.mask is not None and claim.pattern is not None
    assert claim.mask.shape == (1, 6, 6) and float(claim.mask.sum()) == pytest.approx(norms[2], abs=1e-3)
    assert int(claim.mask.argmax()) == 35
    assert net.images == 80 * 32 * 4 * 6
    clean = SMALL.run(case(Planted(False)))
    assert clean.chosen["claimed"] == []


def test_a_class_that_is_never_reached_counts_with_its_last_mask() -> None:
    """Whatever is drawn, the answer is class 2, and the weight alone moves the masks."""

    class Fixed:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.tensor([0.1, 0.1, 0.5, 0.1, 0.1, 0.1]).expand(len(x), 6)

    outcome = B3D(steps=5, samples=2, batch=2, window=2, weight=1e-3).run(case(Fixed()))
    assert outcome.chosen["not_inverted"] == [0, 1, 3, 4, 5]
    # Adam's steps are of about `lr`: five of them for the last mask, four for the one kept at the end of a window.
    last, kept = (36 * float(squash(torch.tensor(-0.5 - n * 0.05))) for n in (5, 4))
    norms = outcome.chosen["norms"]
    assert norms[0] == pytest.approx(last, rel=0.01) and norms[2] == pytest.approx(kept, rel=0.01)
    assert outcome.verdict is not None and outcome.verdict.label_scores is not None
    assert float(outcome.verdict.label_scores[[0, 1, 3, 4, 5]].max()) == 0


def test_few_classes_cost_as_many_and_may_start_where_something_is_known() -> None:
    net, c = Planted(True), case(None)
    masks, patterns, norms, shares = SMALL.invert(net, c.clean.images, torch.tensor([4, 2]), c.ctx)
    assert net.images == 80 * 32 * 4 * 2
    assert int(masks[1].argmax()) == 35 and float(norms[1]) == pytest.approx(float(masks[1].sum()), abs=1e-4)
    assert float(norms[1]) < 6 and float(shares[1]) >= SMALL.success
    still = B3D(steps=1, samples=2, batch=2, lr=1e-9)
    start = 0.1 + 0.8 * torch.rand(2, 1, 6, 6), 0.1 + 0.8 * torch.rand(2, 1, 6, 6)
    masks, patterns, norms, shares = still.invert(net, c.clean.images, torch.tensor([4, 2]), c.ctx, start=start)
    assert torch.allclose(masks, start[0], atol=1e-5) and torch.allclose(patterns, start[1], atol=1e-5)
    assert bool(norms.isnan().all())


def test_every_draw_is_asked_on_every_row_of_the_batch() -> None:
    net = Planted(True)
    B3D(steps=3, samples=5, batch=128).run(case(net))  # 12 rows are all there are
    assert net.images == 3 * 6 * 5 * 12


def test_losses_are_cross_entropies_of_stamped_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.defenses.b3d._AT_ONCE", 8)  # three rows: two draws at a time
    gen = torch.Generator().manual_seed(5)
    x = torch.rand(3, 1, 6, 6, generator=gen)
    m, p = (torch.rand(5, 1, 6, 6, generator=gen) < 0.5).float(), torch.rand(5, 1, 6, 6, generator=gen)
    loss, hit = B3D()._losses(Planted(True), x, m, p, 2)
    net, hits = Planted(True), 0
    for j in range(5):
        answers = [net(((1 - m[j]) * row + m[j] * p[j])[None])[0] for row in x]
        assert float(loss[j]) == pytest.approx(-sum(math.log(float(a[2])) for a in answers) / 3, rel=1e-4)
        hits += sum(int(a.argmax()) == 2 for a in answers)
    assert hit == pytest.approx(hits / 15)


def test_weight_follows_success_and_the_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any loss only w 2 g (1 - g) is left, which shrinks all masks alike; always successful."""

    class Sure:
        def __call__(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 6)

    seen: list[Tensor] = []
    real = torch.optim.Adam.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.param_groups[0]["params"][0].grad.clone())
        g = squash(self.param_groups[0]["params"][0])
        seen.append((2 * g * (1 - g)).clone())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    B3D(steps=6, samples=2, batch=2, window=2, weight=0.5, success=0.0).run(case(Sure()))
    weights = [float((grad / slope).mean()) for grad, slope in zip(seen[::2], seen[1::2], strict=True)]
    assert weights == pytest.approx([0.5, 0.5, 0.6, 0.6, 0.72, 0.72], rel=1e-4)
    seen.clear()
    B3D(steps=3, samples=2, batch=2, window=1, weight=0.5, success=1.1).run(case(Sure()))
    weights = [float((grad / slope).mean()) for grad, slope in zip(seen[::2], seen[1::2], strict=True)]
    assert weights == pytest.approx([0.5, 0.4, 0.32], rel=1e-4)


def test_equal_seeds_give_equal_answers_and_rows_stay() -> None:
    clean = clean_rows()
    before = clean.images.clone()
    tiny = B3D(steps=20, samples=4, batch=4, success=0.2)
    runs = [tiny.run(case(Planted(True), clean)) for _ in range(2)]
    assert runs[0].chosen == runs[1].chosen
    assert len(runs[0].chosen["not_inverted"]) < 6
    assert torch.equal(clean.images, before)


def test_settings_are_the_published_ones_and_senseless_ones_are_refused() -> None:
    m = B3D()
    assert (m.samples, m.sigma, m.lr, m.batch, m.weight, m.window) == (50, 0.1, 0.05, 128, 0.01, 10)
    assert (m.success, m.threshold) == (0.99, 2.0)
    assert B3D.ACCESS.model == "scores" and B3D.ACCESS.track() == "Q"
    with pytest.raises(ValueError, match="samples is 1"):
        B3D(samples=1)
    with pytest.raises(ValueError, match="above 0"):
        B3D(sigma=0.0)
    with pytest.raises(ValueError, match="drop must lie"):
        B3D(drop=1.0)
    with pytest.raises(NotApplicable, match="too_few_classes: 5"):
        m.run(case(Planted(True), classes=5))
