from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.select import accepts, choose, drop_bound, folds, held_out, right


def answers(n: int, lost: int, gained: int, wrong: int = 0) -> tuple[Tensor, Tensor]:
    """Two models on n rows: the first loses `lost` and gains `gained`; both miss `wrong`."""
    before = torch.ones(n, dtype=torch.bool)
    before[: gained + wrong] = False
    after = before.clone()
    after[:gained] = True
    after[n - lost :] = False
    return before, after


def test_bound_in_closed_form() -> None:
    z = 1.2815515655446004
    assert drop_bound(*answers(400, 7, 3), 0.9) == pytest.approx((5 + z * math.sqrt(11 - 25 / 400)) / 400)
    assert drop_bound(*answers(400, 3, 3), 0.5) == pytest.approx(1 / 400)
    assert drop_bound(*answers(400, 7, 3, wrong=0), 0.9) == drop_bound(*answers(400, 7, 3, wrong=90), 0.9)


def test_more_losses_raise_it_and_more_rows_or_gains_lower_it() -> None:
    bounds = [drop_bound(*answers(500, lost, 4), 0.9) for lost in range(20)]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) == 20
    assert drop_bound(*answers(1000, 10, 0), 0.9) < drop_bound(*answers(500, 5, 0), 0.9)
    assert drop_bound(*answers(500, 5, 5), 0.9) < drop_bound(*answers(500, 5, 0), 0.9)
    assert drop_bound(*answers(500, 5, 5), 0.95) > drop_bound(*answers(500, 5, 5), 0.9)


def test_rows_needed_without_any_change() -> None:
    """As many as the exact binomial bound asks for: 0.98^n <= 0.1."""
    assert math.ceil(math.log(0.1) / math.log(0.98)) == 114
    assert not accepts(*answers(113, 0, 0))
    assert accepts(*answers(114, 0, 0))


@pytest.mark.parametrize("n", [150, 500, 2500])
@pytest.mark.parametrize("gained", [0.0, 0.01, 0.05])
def test_a_drop_of_two_points_passes_in_one_sample_of_ten_at_most(n: int, gained: float) -> None:
    """Simulated: 20,000 samples at the edge of what may pass; and a model without a drop passes mostly."""
    accepted = accepted_share(n, gained + 0.02, gained, 20000)
    assert 0.03 < accepted <= 0.10 + 4 * math.sqrt(0.1 * 0.9 / 20000)
    if n == 2500:
        assert accepted_share(n, gained, gained, 20000) > 0.95


def accepted_share(n: int, lost: float, gained: float, samples: int) -> float:
    """Share of trinomial samples that `accepts` takes, each distinct outcome asked once."""
    with torch.random.fork_rng():
        torch.manual_seed(n)
        b = torch.distributions.Binomial(n, torch.tensor(lost, dtype=torch.float64)).sample((samples,))
        c = torch.distributions.Binomial(n - b, torch.tensor(gained / (1 - lost), dtype=torch.float64)).sample()
    outcomes, counts = torch.stack([b, c], 1).long().unique(dim=0, return_counts=True)
    taken = torch.tensor([accepts(*answers(n, int(i), int(j))) for i, j in outcomes])
    return float(counts[taken].sum()) / samples


def test_refuses_answers_on_other_rows() -> None:
    with pytest.raises(ValueError, match="same rows"):
        drop_bound(torch.ones(4, dtype=torch.bool), torch.ones(5, dtype=torch.bool), 0.9)
    with pytest.raises(ValueError, match="same rows"):
        drop_bound(torch.ones(0, dtype=torch.bool), torch.ones(0, dtype=torch.bool), 0.9)


def test_chooses_the_most_aggressive_that_passes_and_asks_no_further() -> None:
    lost, asked = {0.9: 60, 0.7: 3, 0.5: 0}, []

    def after(t: float) -> Tensor:
        asked.append(t)
        return answers(500, lost[t], 0)[1]

    before = torch.ones(500, dtype=torch.bool)
    assert choose((0.9, 0.7, 0.5), after, before) == 0.7
    assert asked == [0.9, 0.7]
    assert choose((0.9,), after, before) is None
    assert choose((0.9, 0.7), after, before, drop=0.15) == 0.9
    assert choose((0.7, 0.5), after, before, level=0.999) == 0.5
    assert choose((0.7,), after, torch.zeros(500, dtype=torch.bool)) == 0.7  # gains are no drop


@pytest.mark.parametrize(("n", "k"), [(100, 5), (47, 5), (13, 2), (7, 5)])
def test_folds_are_a_stratified_partition(n: int, k: int) -> None:
    labels = (torch.arange(n) ** 2) % 3
    parts = folds(labels, k, seed=1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    assert len(parts) == k
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    for c in range(3):
        counts = [int((labels[p] == c).sum()) for p in parts]
        assert max(counts) - min(counts) <= 1


def test_folds_depend_on_the_seed_and_nothing_else() -> None:
    labels = torch.arange(60) % 3
    before = torch.get_rng_state()
    one, same, other = (folds(labels, 5, s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Constant(nn.Module):
    """Says one class, whatever it sees."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(x),), self.label), 3).float()


def rows(n: int) -> ImageSet:
    return ImageSet(
        images=torch.zeros(n, 1, 4, 4, dtype=torch.uint8), labels=torch.arange(n) % 3, ids=torch.arange(n),
        classes=("a", "b", "c"), name="none", split="train", digest="",
    )  # fmt: skip


def test_right() -> None:
    c = Ctx(seed=0, recipe=Recipe(), scratch=Path("unused"))
    assert torch.equal(right(Constant(1), rows(7), ctx=c), torch.arange(7) % 3 == 1)
    assert c.cost.forwards == 7


def test_held_out_rows_are_answered_by_models_that_have_not_seen_them() -> None:
    c, data, given = Ctx(seed=0, recipe=Recipe(), scratch=Path("unused")), rows(32), []

    class Remembers(nn.Module):
        """Right on exactly the rows it was made from: told by the pixel that holds the row's number."""

        def __init__(self, seen: ImageSet) -> None:
            super().__init__()
            self.seen = {int(i): int(y) for i, y in zip(seen.images[:, 0, 0, 0], seen.labels, strict=True)}

        def forward(self, x: Tensor) -> Tensor:
            number = x[:, 0, 0, 0].mul(255).round().long().tolist()
            said = [self.seen.get(i, (i + 1) % 3) for i in number]
            return nn.functional.one_hot(torch.tensor(said), 3).float()

    data.images[:, 0, 0, 0] = torch.arange(32, dtype=torch.uint8)

    def made(some: ImageSet) -> Iterator[tuple[str, nn.Module]]:
        given.append(set(some.ids.tolist()))
        yield "remembers", Remembers(some)
        yield "two", Constant(2)

    found = held_out(data, made, ctx=c)
    assert not found["remembers"].any()
    assert torch.equal(found["two"], data.labels == 2)
    assert len(given) == 5
    assert all(25 <= len(g) <= 26 for g in given)
    assert set.intersection(*given) == set()
    assert c.cost.forwards == 2 * 32


def test_a_model_stands_for_the_settings_behind_it_and_one_is_held_at_a_time() -> None:
    c, data, alive = Ctx(seed=0, recipe=Recipe(), scratch=Path("unused")), rows(30), []

    def made(some: ImageSet) -> Iterator[tuple[float, nn.Module | None]]:
        for setting, label in ((0.1, 0), (0.2, None), (0.3, 1), (0.4, None)):
            assert all(ref() is None for ref in alive), "the one before is gone"
            if label is None:
                yield setting, None
            else:
                net: nn.Module | None = Constant(label)
                alive.append(weakref.ref(net))
                pair = [(setting, net)]
                del net
                yield pair.pop()

    found = held_out(data, made, ctx=c, k=3)
    assert len(alive) == 6
    assert list(found) == [0.1, 0.2, 0.3, 0.4]
    assert torch.equal(found[0.1], data.labels == 0) and torch.equal(found[0.2], found[0.1])
    assert torch.equal(found[0.3], data.labels == 1) and torch.equal(found[0.4], found[0.3])
    assert c.cost.forwards == 2 * 30, "no model answers twice"
    with pytest.raises(ValueError, match="2 folds"):
        held_out(data, made, ctx=c, k=1)
