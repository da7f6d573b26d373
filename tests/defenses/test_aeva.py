from __future__ import annotations

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
from sleeperbench.defenses.aeva import AEVA, direction, global_peak, hop, peaks, search, step

SHAPE = (1, 5, 5)


class Counts:
    """A model of labels that says how many images it was asked, and never of what it was not told to expect."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.images = answer, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and float(x.min()) >= -1e-6 and float(x.max()) <= 1 + 1e-6
        self.images += len(x)
        return self.answer(x)


def half_space(seed: int = 0) -> tuple[Tensor, Any]:
    """A normal w and the question whether w . (x - 0.5) exceeds 0.1, for images (N, C, H, W) of any row."""
    w = torch.randn(25, generator=torch.Generator().manual_seed(seed))
    w /= w.norm()
    return w.view(SHAPE), lambda x, rows: (x.flatten(1) - 0.5) @ w > 0.1


def gens(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_search_stops_within_theta_of_the_boundary_on_its_far_side() -> None:
    w, holds = half_space()
    x = torch.full((3, *SHAPE), 0.5)
    far = x + torch.tensor([0.2, 0.3, 1.0]).view(3, 1, 1, 1) * w
    asked: list[list[int]] = []

    def counting(images: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return holds(images, rows)

    theta = 1 / (25 * 5)
    rows = torch.tensor([4, 0, 2])
    found = search(counting, x, far.clamp(0, 1), rows, theta)
    assert asked == [[4, 0, 2]] * 7  # 2^-7 is the first not above 1/125
    assert holds(found, rows).all()
    share = (found - x).flatten(1).norm(dim=1) / (far.clamp(0, 1) - x).flatten(1).norm(dim=1)
    nearer = x + (share - theta).view(-1, 1, 1, 1) * (far.clamp(0, 1) - x)
    assert not holds(nearer, rows).any()


def numpy_direction(adv: np.ndarray, u: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """The estimate of HopSkipJump as it is printed, one draw at a time; `u` as cut."""
    phi = [1.0 if h else -1.0 for h in holds]
    mean = sum(phi) / len(phi)
    total = np.zeros_like(adv)
    for p, draw in zip(phi, u, strict=True):
        total += draw if mean == 1 else -draw if mean == -1 else (p - mean) * draw
    return total / np.sqrt((total**2).sum())


def test_directions_are_the_printed_estimates_of_each_row() -> None:
    """Row 0 gets mixed answers, row 1 only yes, row 2 only no; each by its own draws, at its own radius."""
    # Near the bound 1, so that the draws are cut.
    adv = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.6
    radii = torch.tensor([0.3, 0.2, 0.4])
    asked: list[Tensor] = []

    def holds(images: Tensor, rows: Tensor) -> Tensor:
        assert rows.tolist() == [0] * 40 + [1] * 40 + [2] * 40
        asked.append(images)
        mixed = (images - adv[rows]).flatten(1).sum(1) > 0
        return (mixed & (rows == 0)) | (rows == 1)

    found = direction(holds, adv, torch.arange(3), radii, 40, gens(7, 8, 9))
    answers = holds(asked[0], torch.arange(120) // 40).split(40)
    for i, (near, told) in enumerate(zip(asked[0].split(40), answers, strict=True)):
        draws = torch.randn(40, *SHAPE, generator=gens(7 + i)[0]).double().numpy()
        draws /= np.sqrt((draws**2).sum((1, 2, 3), keepdims=True))
        around = np.clip(adv[i].numpy() + float(radii[i]) * draws, 0, 1)
        assert np.abs(near.numpy() - around).max() < 1e-6
        assert (around == 1).any()
        wanted = numpy_direction(adv[i].numpy(), (around - adv[i].numpy()) / float(radii[i]), told.numpy())
        assert np.abs(found[i].numpy() - wanted).max() < 1e-5


def test_direction_is_the_normal_of_a_boundary() -> None:
    w, holds = half_space(5)
    adv = (0.5 + 0.1 * w)[None]
    found = direction(holds, adv, torch.tensor([0]), torch.tensor([0.01]), 20_000, gens(0))
    assert float((found[0] * w).sum()) > 0.99


def test_a_step_is_halved_until_the_label_holds() -> None:
    w, holds = half_space()
    adv = torch.stack([0.5 + 0.15 * w] * 2)
    way = torch.stack([w, -w])  # the second way leaves the half space after 0.05
    asked: list[list[int]] = []

    def counting(images: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return holds(images, rows)

    moved = step(counting, adv, torch.tensor([5, 6]), way, torch.tensor([0.3, 0.3]))
    assert torch.allclose(moved[0], (adv[0] + 0.3 * w).clamp(0, 1))
    assert torch.allclose(moved[1], adv[1] - 0.3 / 8 * w)
    assert asked == [[5, 6], [6], [6], [6]]


def test_a_step_that_never_holds_is_no_step() -> None:
    adv = torch.full((1, *SHAPE), 0.5)
    never = lambda x, rows: torch.zeros(len(x), dtype=torch.bool)  # noqa: E731
    moved = step(never, adv, torch.zeros(1, dtype=torch.int64), torch.ones(1, *SHAPE), torch.ones(1))
    assert torch.equal(moved, adv)


def test_hop_finds_the_nearest_point_of_a_half_space() -> None:
    w, holds = half_space(2)
    x = torch.full((2, *SHAPE), 0.5)
    start = torch.stack([0.5 + 0.4 * w.sign(), 0.5 + 0.3 * w.sign()])
    found = hop(holds, x, start, torch.arange(2), iterations=12, queries=200, gens=gens(0, 1))
    assert holds(found, torch.arange(2)).all()
    assert (found - x).flatten(1).norm(dim=1).tolist() == pytest.approx([0.1, 0.1], rel=0.02)


def test_radii_and_counts_of_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []

    def spy(holds: Any, adv: Tensor, rows: Tensor, delta: Tensor, count: int, gens: Any) -> Tensor:
        seen.append((float(delta), count))
        return torch.full_like(adv, 0.2)

    monkeypatch.setattr("sleeperbench.defenses.aeva.direction", spy)
    before: list[float] = []

    def moved(holds: Any, adv: Tensor, rows: Tensor, way: Tensor, size: Tensor) -> Tensor:
        before.append(float(size))
        return torch.full_like(adv, 0.9)

    monkeypatch.setattr("sleeperbench.defenses.aeva.step", moved)
    x, far = torch.full((1, *SHAPE), 0.5), torch.full((1, *SHAPE), 1.0)
    everywhere = lambda images, rows: images.mean((1, 2, 3)) > 0.6  # noqa: E731
    hop(everywhere, x, far, torch.tensor([0]), iterations=3, queries=100, gens=gens(0))
    # sqrt(d) theta = 1 / d; the image before the search lies 0.4 in each of 25 pixels away.
    assert [count for _, count in seen] == [100, 141, 173]
    assert [delta for delta, _ in seen] == pytest.approx([0.1, 0.4 * 5 / 25, 0.4 * 5 / 25], rel=1e-5)
    # Steps shrink with sqrt(j) from the distance after the search, 0.1 in each pixel.
    assert before == pytest.approx([0.5, 0.5 / math.sqrt(2), 0.5 / math.sqrt(3)], rel=0.05)


def test_peaks_are_those_of_the_authors_sorting() -> None:
    shift = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for found, one in zip(peaks(shift), shift.numpy(), strict=True):
        pixels = np.sort(np.abs(one).sum(0).ravel())
        assert float(found) == pytest.approx(pixels[-2:].sum() / np.abs(one).sum(), rel=1e-5)


def test_the_global_peak_sums_the_largest_of_each_source() -> None:
    assert float(global_peak(torch.tensor([[0.1, 0.3], [0.5, 0.2], [0.05, 0.04]]))) == pytest.approx(0.85)


def prototypes(classes: int = 8) -> Tensor:
    # Smooth, so that no pixel of the clean classes stands out.
    gen = torch.Generator().manual_seed(2)
    coarse = torch.rand(classes, 1, 3, 3, generator=gen)
    smooth = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear") * 0.6 + 0.2
    smooth[:, 0, 7, 7] = 0.3
    return smooth


def model(backdoor: bool) -> Counts:
    """Nearest of eight pictures; with the backdoor, light in the last pixel speaks for class 3."""
    centres = prototypes()

    def answer(x: Tensor) -> Tensor:
        score = -(x[:, None] - centres).square().flatten(2).sum(2)
        score[:, 3] += 8 * (x[:, 0, 7, 7] - 0.3) * backdoor
        return score.argmax(1)

    return Counts(answer)


def clean_rows(n: int = 24) -> ImageSet:
    labels = torch.arange(n) % 8
    noise = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.1
    pixels = ((prototypes()[labels] + noise - 0.05) * 255).round().to(torch.uint8)
    return samples.images(pixels, labels, classes=8)


def case(net: Any, clean: ImageSet, classes: int = 8) -> Any:
    return SimpleNamespace(net=net, spec=SimpleNamespace(classes=classes), clean=clean, ctx=samples.ctx(4))


SMALL = AEVA(samples=1, sources=2, iterations=8, queries=60)
TINY = AEVA(samples=1, sources=2, iterations=2, queries=10)


def test_the_target_of_a_one_pixel_backdoor_is_flagged_and_a_clean_model_is_not() -> None:
    outcome = SMALL.run(case(model(True), clean_rows()))
    assert outcome.verdict is not None and outcome.verdict.label_scores is not None
    assert int(outcome.verdict.label_scores.argmax()) == 3
    assert outcome.verdict.score > 4
    assert outcome.chosen["claimed"] == [3]
    shown = np.array(outcome.chosen["peaks"])
    spread = 1.4826 * np.median(np.abs(shown - np.median(shown)))
    assert outcome.verdict.score == pytest.approx((shown[3] - np.median(shown)) / spread, rel=0.05)
    (claim,) = outcome.inverted
    assert claim.target == 3 and claim.delta is not None
    assert int(claim.delta.abs().argmax()) == 63
    clean = SMALL.run(case(model(False), clean_rows())).verdict
    assert clean is not None and clean.score < outcome.verdict.score / 2


def test_every_image_asked_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = step

    def spy(holds: Any, adv: Tensor, *rest: Any) -> Tensor:
        asked = []

        def counting(x: Tensor, rows: Tensor) -> Tensor:
            asked.append(len(x))
            return holds(x, rows)

        moved = real(counting, adv, *rest)
        steps.append(sum(asked))
        return moved

    monkeypatch.setattr("sleeperbench.defenses.aeva.step", spy)
    net = model(False)
    AEVA(samples=2, sources=3, iterations=4, queries=10).run(case(net, clean_rows()))
    attacks, halvings = 2 * 3 * 8, 9  # 2^-9 = theta = 64^-1.5
    estimates = 10 + 14 + 17 + 20
    assert net.images == 24 + attacks * (5 * halvings + estimates) + sum(steps)
    assert len(steps) == 4 and min(steps) >= attacks


@pytest.mark.parametrize("rows", [1, 2048])
def test_all_pairs_at_once_give_what_one_after_another_gives(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.defenses.aeva._ROWS", rows)  # 1: target after target
    nets = model(True), model(True)
    settings = {"samples": 2, "sources": 2, "iterations": 4, "queries": 20}
    many, one = (
        AEVA(batched=batched, **settings).run(case(net, clean_rows()))  # type: ignore[arg-type]
        for batched, net in zip((True, False), nets, strict=True)
    )
    assert nets[0].images == nets[1].images
    assert many.chosen["claimed"] == one.chosen["claimed"]
    assert many.chosen["peaks"] == pytest.approx(one.chosen["peaks"], abs=2e-4)
    assert torch.allclose(many.verdict.label_scores, one.verdict.label_scores, rtol=1e-2)


def test_equal_seeds_give_equal_answers_and_all_sources_are_used() -> None:
    runs = [TINY.run(case(model(True), clean_rows())) for _ in range(2)]
    assert runs[0].chosen == runs[1].chosen
    assert torch.equal(runs[0].verdict.label_scores, runs[1].verdict.label_scores)
    assert runs[0].chosen["pairs"] == 16
    assert AEVA(samples=1, iterations=1, queries=1).run(case(model(True), clean_rows())).chosen["pairs"] == 56


def test_a_class_without_rows_has_the_lowest_index_and_no_peak() -> None:
    data = clean_rows()
    outcome = TINY.run(case(model(True), data.rows(data.labels != 5)))
    assert outcome.chosen["peaks"][5] is None
    assert all(p is not None for t, p in enumerate(outcome.chosen["peaks"]) if t != 5)
    scores = outcome.verdict.label_scores
    assert float(scores[5]) == float(scores.min())
    with pytest.raises(NotApplicable, match="too_few_classes: 5 have"):
        SMALL.run(case(model(True), data.rows(data.labels < 5)))


def test_few_classes_are_declined() -> None:
    with pytest.raises(NotApplicable, match="too_few_classes: 5;"):
        SMALL.run(case(model(True), clean_rows(), classes=5))


def test_settings_are_the_published_ones() -> None:
    method = AEVA()
    assert (method.samples, method.iterations, method.queries, method.threshold) == (40, 50, 100, 4.0)
    assert AEVA.ACCESS.model == "labels" and AEVA.ACCESS.track() == "Q"
    with pytest.raises(ValueError, match="at least 1"):
        AEVA(samples=0)
