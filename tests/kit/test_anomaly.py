from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sleeperbench.kit.anomaly import anomaly_index, bounded, smallness


def test_example_of_ten_sizes() -> None:
    sizes = torch.tensor([10.0, 52, 50, 49, 55, 51, 48, 53, 54, 47])
    index = anomaly_index(sizes)
    # Median 50.5 and deviation 2.5: torch's own median would say 50 and 2.
    assert float(index[0]) == pytest.approx((10 - 50.5) / (1.4826 * 2.5))
    assert float(index[0]) == pytest.approx(-10.93, abs=0.005)
    assert float(index[4]) == pytest.approx(4.5 / 3.7065)


@pytest.mark.parametrize("n", [6, 7, 43])
def test_medians_are_numpys(n: int) -> None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    v = values.numpy()
    med = np.median(v)
    assert np.allclose(anomaly_index(values).numpy(), (v - med) / (1.4826 * np.median(np.abs(v - med))))


def test_what_is_not_known_counts_nowhere() -> None:
    sizes = torch.tensor([10.0, 52, 50, 49, 55, 51, 48, 53, 54, 47])
    mixed = torch.cat([torch.tensor([math.nan]), sizes, torch.tensor([math.nan])])
    index = anomaly_index(mixed)
    assert torch.equal(index[1:-1], anomaly_index(sizes))
    assert bool(index[[0, -1]].isnan().all())


def test_no_deviation() -> None:
    index = anomaly_index(torch.tensor([7.0, 7, 7, 7, 7, 1, 9]))
    assert index.tolist() == [0, 0, 0, 0, 0, -math.inf, math.inf]


def test_too_few_values_have_no_outlier() -> None:
    index = anomaly_index(torch.tensor([1.0, 50, 51, 52, 53, math.nan]))
    assert index[:5].tolist() == [0] * 5
    assert math.isnan(float(index[5]))
    assert float(anomaly_index(torch.tensor([1.0, 50, 51, 52, 53, 54]))[0]) < -2


def test_a_trigger_that_does_not_work_counts_in_the_median_and_is_never_suspicious() -> None:
    sizes = torch.tensor([4.0, 41, 44, 52, 43, 56, 42, 3, 57, 49])
    alone = torch.arange(10) == 0
    found = smallness(sizes, alone)
    v = sizes.numpy().astype(float)
    index = (np.median(v) - v) / (1.4826 * np.median(np.abs(v - np.median(v))))
    assert found[0] == pytest.approx(index[0]) and index[0] > 2
    assert found[1:].tolist() == pytest.approx(np.minimum(index[1:], 0).tolist())
    assert index[7] > index[0] > 0 == found[7], "smaller still, but it does not work"
    assert smallness(sizes, torch.ones(10, dtype=torch.bool)).tolist() == pytest.approx(index.tolist())
    assert float(smallness(sizes, torch.zeros(10, dtype=torch.bool)).max()) == 0
    assert smallness(torch.tensor([1.0, 7, 7, 7, 7, 7]), alone[:6]).tolist() == [1e6, 0, 0, 0, 0, 0]


def test_bounded_scores_can_be_ranked() -> None:
    index = torch.tensor([math.nan, 2.0, -1.0, math.inf, -math.inf], dtype=torch.float64)
    assert bounded(index).tolist() == [-1e6, 2.0, -1.0, 1e6, -1e6]
    assert bounded(torch.tensor([math.nan, 2.0, -1.0])).tolist() == [-1.0, 2.0, -1.0]
    assert bounded(torch.full((3,), math.nan)).tolist() == [0.0, 0.0, 0.0]
