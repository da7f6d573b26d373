from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from sleeperbench.data.cut import cut, split_tune_val
from sleeperbench.data.errors import DataError
from sleeperbench.data.order import random_keys, shuffled, stratified

UNEVEN = torch.from_numpy(np.repeat(np.arange(4), [100, 300, 37, 563]).astype(np.int64))
EVEN = torch.arange(2000) % 10


def splitmix(state: int) -> int:
    """Reference SplitMix64 step on Python integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_keys_are_splitmix64_of_the_row() -> None:
    start = int.from_bytes(hashlib.sha256(repr(("pool", 3)).encode()).digest()[:8], "little")
    expected = [splitmix(start + k * 0x9E3779B97F4A7C15) for k in range(1, 6)]
    assert random_keys(5, "pool", 3).tolist() == expected


def test_shuffled_is_a_permutation_that_depends_on_its_salt() -> None:
    one = shuffled(100, "a", 0)
    assert sorted(one.tolist()) == list(range(100))
    assert one.tolist() == shuffled(100, "a", 0).tolist()
    assert one.tolist() != shuffled(100, "a", 1).tolist()
    assert one.tolist() != shuffled(100, "b", 0).tolist()


def test_every_prefix_of_a_balanced_set_is_balanced() -> None:
    y = EVEN.numpy()
    order = stratified(y, "t", 0)
    assert sorted(order.tolist()) == list(range(2000))
    for k in range(1, 2000, 7):
        counts = np.bincount(y[order[:k]], minlength=10)
        assert counts.max() - counts.min() <= 1, k


def test_every_prefix_of_an_uneven_set_is_proportional() -> None:
    y = UNEVEN.numpy()
    share = np.bincount(y) / len(y)
    order = stratified(y, "t", 0)
    for k in range(1, 1000, 7):
        counts = np.bincount(y[order[:k]], minlength=4)
        assert (np.abs(counts - k * share) <= 0.5 + share * 4 / 2 + 1e-9).all(), k


def test_rows_within_a_class_are_drawn_at_random() -> None:
    first = [int(stratified(np.zeros(1000, dtype=np.int64), "t", s)[0]) for s in range(200)]
    assert len(set(first)) > 150
    assert 350 < np.mean(first) < 650


@pytest.mark.parametrize("labels", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("clean", [0.05, 0.2, 64])
def test_cut_is_disjoint_and_covers_everything(labels: torch.Tensor, clean: float | int) -> None:
    classes = int(labels.max()) + 1
    c = cut(labels, seed=1, clean=clean, classes=classes)
    assert torch.cat([c.pool, c.probe, c.rest]).sort().values.tolist() == list(range(len(labels)))
    assert all(p.dtype == torch.int64 for p in (c.pool, c.probe, c.rest))
    assert len(c.pool) == (clean if isinstance(clean, int) else round(clean * len(labels)))
    share = torch.bincount(labels) / len(labels)
    for part in (c.pool, c.probe, c.rest):
        counts = torch.bincount(labels[part], minlength=classes)
        assert (counts - share * len(part)).abs().max() <= 3


@pytest.mark.parametrize(("n", "probe"), [(50_000, 2000), (10_000, 400), (2000, 256), (1000, 200)])
def test_size_of_the_probe(n: int, probe: int) -> None:
    assert len(cut(torch.arange(n) % 10, seed=0, clean=0.05, classes=10).probe) == probe


def test_smaller_pools_are_prefixes_and_the_probe_stays() -> None:
    small, large = (cut(UNEVEN, seed=2, clean=clean, classes=4) for clean in (0.01, 0.1))
    assert small.pool.tolist() == large.pool[: len(small.pool)].tolist()
    assert small.probe.tolist() == large.probe.tolist()


def test_cut_is_fixed_by_its_seed() -> None:
    one, same, other = (cut(EVEN, seed=s, clean=0.05, classes=10) for s in (0, 0, 1))
    for part in ("pool", "probe", "rest"):
        assert getattr(one, part).tolist() == getattr(same, part).tolist()
        assert getattr(one, part).tolist() != getattr(other, part).tolist()


def test_published_rows_stay() -> None:
    c = cut(EVEN, seed=0, clean=0.05, classes=10)
    found = hashlib.sha256(torch.cat([c.pool, c.probe, c.rest]).numpy().astype("<i8").tobytes()).hexdigest()
    assert found[:16] == "824d7387e0b0d86d"


@pytest.mark.parametrize(
    ("n", "clean", "message"),
    [
        (4, 0.5, "too few"),
        (50, 0.001, "too few"),
        (50, 35, "too few"),
        (2000, 1.5, "between 0 and 1"),
        (2000, 0, "too few"),
    ],
)
def test_cut_refuses(n: int, clean: float | int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cut(torch.arange(n) % 10, seed=0, clean=clean, classes=10)


def test_cut_refuses_labels_out_of_range() -> None:
    with pytest.raises(DataError, match="labels run from 0 to 9"):
        cut(EVEN, seed=0, clean=0.05, classes=9)


def test_tune_and_val_are_four_to_one_and_stratified() -> None:
    tune, val = split_tune_val(UNEVEN, seed=0)
    assert sorted([*tune.tolist(), *val.tolist()]) == list(range(1000))
    assert len(val) == 200
    assert (torch.bincount(UNEVEN[val]) - torch.tensor([20.0, 60.0, 7.4, 112.6])).abs().max() <= 1
    assert split_tune_val(UNEVEN, seed=0)[1].tolist() == val.tolist()
    assert split_tune_val(UNEVEN, seed=1)[1].tolist() != val.tolist()


def test_two_rows_are_the_fewest_to_split() -> None:
    tune, val = split_tune_val(torch.tensor([0, 1]), seed=0)
    assert len(tune) == len(val) == 1
    with pytest.raises(DataError, match="1 clean rows"):
        split_tune_val(torch.tensor([0]), seed=0)
