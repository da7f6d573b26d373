from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import ImageSet
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.debackdoor import (
    TEMPLATES,
    DeBackdoor,
    accepted,
    bounds,
    claim,
    patch_shape,
    propose,
    reach,
    smooth_rate,
)
from sleeperbench.kit.masks import apply

SHAPE = (3, 8, 8)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("slope", [1.0, 4.0])
def test_the_smooth_rate_is_the_mean_sigmoid_of_the_margin(slope: float) -> None:
    scores = (3 * rand(3, 5, 4)).softmax(2)
    aims = torch.tensor([2, 0, 3])
    for a, found in enumerate(smooth_rate(scores, aims, slope).tolist()):
        total = 0.0
        for row in scores[a].tolist():
            margin = row[int(aims[a])] - max(v for i, v in enumerate(row) if i != int(aims[a]))
            total += 1 / (1 + math.exp(-slope * margin))
        assert found == pytest.approx(total / 5, rel=1e-5)


def test_worse_proposals_are_taken_as_often_as_metropolis_says() -> None:
    n, t = 40_000, 0.02
    u = rand(n)
    for loss in (0.001, 0.01, 0.04):
        rate = float(accepted(torch.full((n,), 0.5 - loss), torch.full((n,), 0.5), t, u).double().mean())
        assert rate == pytest.approx(math.exp(-loss / t), abs=0.01)
    assert accepted(torch.tensor([0.5, 0.6]), torch.tensor([0.5, 0.5]), t, torch.tensor([0.999, 0.999])).all()
    assert accepted(torch.tensor([0.49, 0.5]), torch.tensor([0.5, 0.5]), 0.0, torch.zeros(2)).tolist() == [False, True]


def test_a_patch_is_where_and_what_its_parameters_say() -> None:
    p = torch.cat([torch.tensor([[0.0, 0.999], [0.5, 1.0]]), rand(2, 3 * 9)], 1)
    mask, pattern = patch_shape(p, SHAPE, 3)
    for a, (top, left) in enumerate(((0, 5), (3, 5))):
        cells = p[a, 2:].view(3, 3, 3)
        for r in range(8):
            for c in range(8):
                inside = top <= r < top + 3 and left <= c < left + 3
                assert float(mask[a, 0, r, c]) == inside
                wanted = cells[:, r - top, c - left] if inside else torch.zeros(3)
                assert torch.equal(pattern[a, :, r, c], wanted)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_templates_stay_in_range_go_row_by_row_and_agree_with_their_claims(name: str) -> None:
    low, _ = bounds(name, SHAPE, 3, 4)
    p, x = rand(*low.shape, seed=1), rand(4, 6, *SHAPE, seed=2)
    out = TEMPLATES[name](p, x, 3)
    assert out.shape == x.shape
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    assert float((out - x).abs().max()) > 0.02
    alone = TEMPLATES[name](p[2:3], x[2:3, 4:5], 3)
    assert torch.allclose(alone[0, 0], out[2, 4], atol=1e-6)
    inverted = claim(5, name, p[2], SHAPE, 3)
    if not inverted.uses_apply:
        assert torch.allclose(apply(inverted, x[2]), out[2], atol=1e-6)
    method = DeBackdoor(size=3)
    assert torch.equal(method.stamp(({"5": p[2]}, {"5": name}), inverted, x[2]), TEMPLATES[name](p[2:3], x[2:3], 3)[0])


def test_neutral_parameters_change_nothing() -> None:
    x = rand(1, 2, *SHAPE)
    assert torch.allclose(TEMPLATES["filter"](torch.full((1, 6), 0.5), x, 3), x, atol=1e-6)
    assert torch.allclose(TEMPLATES["warp"](torch.full((1, 32), 0.5), x, 3), x, atol=1e-5)
    assert torch.equal(TEMPLATES["wave"](torch.tensor([[0.0, 0.3, 0.3, 0.3]]), x, 3), x)


def test_proposals_change_a_shrinking_share_within_the_chain_s_cell() -> None:
    low, high = bounds("patch", SHAPE, 3, 4)
    move = reach("patch", SHAPE, 3)
    assert low[:, :2].tolist() == [[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5]]
    assert high[:, :2].tolist() == [[0.5, 0.5], [0.5, 1], [1, 0.5], [1, 1]]
    p = low + (high - low) * rand(*low.shape)
    gen = torch.Generator().manual_seed(0)
    for left, count in ((1.0, round(0.3 * 29)), (0.5, round(0.15 * 29)), (0.0, 1)):
        places = 0
        for _ in range(50):
            new = propose(p, low, high, left, move, gen)
            assert (new >= low).all() and (new <= high).all()
            changed = new != p
            places += int(changed[:, :2].sum())
            # A place that is pushed against its cell, or moved by nothing at the end, may stay.
            assert (changed[:, 2:].sum(1) <= count).all()
            assert (changed.sum(1) >= count - 2).all()
            assert float((new - p)[:, :2].abs().max()) <= left * 10 / 6
        assert (places > 0) == (left > 0)


class Planted:
    """Scores of four classes from the brightness of quarters; a dark square in a corner speaks for class 1."""

    def __init__(self, backdoor: bool) -> None:
        self.backdoor, self.images = backdoor, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) <= 1
        self.images += len(x)
        quarters = x.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten(1)
        logits = 20 * quarters
        logits[:, 1] += 80 * (0.4 - x[:, :, 6:, 6:].mean((1, 2, 3))).relu() * self.backdoor
        return logits.softmax(1)


def clean_rows(n: int, seed: int) -> ImageSet:
    """Class c has quarter c bright; all pixels are at least 100."""
    pixels = torch.randint(100, 130, (n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    labels = torch.arange(n) % 4
    for i, y in enumerate(labels.tolist()):
        pixels[i, :, 4 * (y // 2) :, :][:, :4, 4 * (y % 2) :][:, :, :4] += 100
    return samples.images(pixels, labels, classes=4)


def case(net: Any, tune: ImageSet | None = None) -> Any:
    spec = SimpleNamespace(classes=4, shape=SHAPE)
    tune = clean_rows(16, 0) if tune is None else tune
    return SimpleNamespace(net=net, spec=spec, tune=tune, val=clean_rows(8, 1), ctx=samples.ctx(4))


SMALL = DeBackdoor(templates=("patch", "blend"), size=2, images=4, iterations=100, chains=4)


def test_the_planted_patch_is_found_with_its_label_and_place_and_a_clean_model_has_none() -> None:
    net = Planted(True)
    outcome = SMALL.run(case(net))
    assert outcome.chosen["claimed"] == [1]
    assert outcome.verdict is not None and outcome.verdict.score > 0.9
    (found,) = outcome.inverted
    assert found.target == 1 and found.mask is not None
    assert found.mask[0, 6:, 6:].sum() >= 2
    # Per template: a start and 100 proposals of 4 chains for 4 labels on 4 images; then 6 held-out rows per label.
    assert net.images == 2 * (101 * 4 * 4 * 4 + 4 * 6)
    clean = SMALL.run(case(Planted(False)))
    assert clean.chosen["claimed"] == [] and clean.verdict is not None and clean.verdict.score < 0.5


def test_the_best_seen_is_kept_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(scores: Tensor, aims: Tensor, slope: float) -> Tensor:
        seen.append(smooth_rate(scores, aims, slope))
        return seen[-1]

    monkeypatch.setattr("sleeperbench.defenses.debackdoor.smooth_rate", spy)
    c, labels = case(Planted(True)), torch.arange(4)
    x = rand(4, 3, *SHAPE) * 0.5 + 0.4
    hot = DeBackdoor(templates=("patch",), size=2, images=3, iterations=30, chains=4, temperature=50.0)
    found = hot._anneal(c, "patch", x, labels, torch.Generator().manual_seed(1))
    best = torch.stack(seen).view(31, 4, 4).amax((0, 2))  # over proposals and chains
    own = smooth_rate(c.net(TEMPLATES["patch"](found, x, 2).flatten(0, 1)).unflatten(0, (4, 3)), labels, 1.0)
    assert torch.allclose(own, best, atol=1e-6)
    assert (seen[-1].view(4, 4).amax(1) < best - 1e-3).any()


def test_the_success_rate_is_that_of_held_out_rows_of_other_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the held-out rows by their first pixel, and says of them alone what is wanted."""

    class Knows(Planted):
        def __call__(self, x: Tensor) -> Tensor:
            scores = super().__call__(x)
            held = x[:, 0, 0, 0] * 255 < 50
            scores[held] = torch.eye(4)[2]
            return scores

    c = case(Knows(False))
    c.val.images[:, 0, 0, 0] = 20
    outcome = DeBackdoor(templates=("filter",), size=2, images=2, iterations=1, chains=1).run(c)
    assert outcome.chosen["rates"]["filter"] == [0.0, 0.0, 1.0, 0.0]
    assert outcome.inverted[0].uses_apply and outcome.state is not None
    assert outcome.state[1] == {"2": "filter"} and outcome.state[0]["2"].shape == (6,)


def test_equal_seeds_give_equal_answers_also_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = DeBackdoor(size=2, images=2, iterations=3, chains=1)
    runs = [tiny.run(case(Planted(True))) for _ in range(2)]
    assert runs[0].chosen == runs[1].chosen
    monkeypatch.setattr("sleeperbench.defenses.debackdoor._AT_ONCE", 4)  # two labels at a time
    assert [len(r) for r in tiny.run(case(Planted(True))).chosen["rates"].values()] == [4] * 5


def test_labels_one_at_a_time_give_the_same() -> None:
    found, passes = [], []
    for batched in (True, False):
        net, sizes = Planted(True), []

        def asked(x: Tensor, net: Planted = net, sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(x))
            return net(x)

        found.append(DeBackdoor(size=2, images=3, iterations=9, chains=4, batched=batched).run(case(asked)).chosen)
        passes.append(set(sizes))
    assert found[0] == found[1]
    assert passes == [{4 * 4 * 3, 6}, {4 * 3, 6}]  # the last are held-out rows


def test_settings_access_and_what_is_refused() -> None:
    m = DeBackdoor()
    assert (m.slope, m.temperature, m.threshold, m.chains) == (1.0, 0.02, 0.8, 9)
    assert DeBackdoor.ACCESS.model == "scores" and DeBackdoor.ACCESS.track() == "Q"
    bad: list[dict[str, Any]] = [{"templates": ("star",)}, {"templates": ()}, {"chains": 8}, {"chains": 0}]
    for settings in bad:
        with pytest.raises(ValueError, match=next(iter(settings))):
            DeBackdoor(**settings)
    with pytest.raises(ValueError, match="size 6 is larger"):
        m.check((3, 5, 9), 10)
    one = clean_rows(16, 0)
    with pytest.raises(NotApplicable, match="too_few_clean_rows"):
        SMALL.run(case(Planted(True), one.rows(one.labels == 1)))
