from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor

from sleeperbench.defenses.scale_up import ScaleUp, moments
from sleeperbench.kit.pixels import to_float

FACTORS = (3, 5, 7, 9, 11)


class Rows:
    """Class of the brightest of four rows, the first of equal ones; a dark last pixel of row 3 makes it 3 for good."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x: Tensor) -> Tensor:
        assert float(x.max()) <= 1
        self.images += len(x)
        return torch.where(x[:, 0, 3, 3] == 0, 3, x[:, 0].mean(2).argmax(1))


def images(n: int, seed: int = 0) -> Any:
    gen = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 120, (n, 1, 4, 4), generator=gen, dtype=torch.uint8)
    return samples.images(pixels, torch.arange(n) % 4, classes=4)


def case(net: Any, clean: Any) -> Any:
    return SimpleNamespace(net=net, clean=clean, spec=SimpleNamespace(classes=4), ctx=samples.ctx(1))


def slow_spc(x: Tensor, label: int) -> float:
    """One image and one factor at a time, one pixel at a time."""
    same = 0
    for n in FACTORS:
        scaled = torch.tensor([min(1.0, float(v) * n) for v in x.flatten()]).view(1, *x.shape)
        same += int(Rows()(scaled)[0]) == label
    return same / len(FACTORS)


def test_scores_are_spc_by_hand() -> None:
    x = to_float(images(40).images)
    method = ScaleUp(mode="data_free")
    outcome = method.run(case(Rows(), images(8)))
    answers = Rows()(x)
    found = method.score(outcome.state, Rows(), x)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([slow_spc(row, int(a)) for row, a in zip(x, answers, strict=True)])
    assert len(found.unique()) > 2
    assert outcome.alarm == 0.5


def test_scores_are_normalised_by_the_class_answered() -> None:
    clean, x = images(60, 3), to_float(images(20, 4).images)
    method = ScaleUp()
    outcome = method.run(case(Rows(), clean))
    spc = np.array([slow_spc(row, int(y)) for row, y in zip(to_float(clean.images), clean.labels, strict=True)])
    labels = clean.labels.numpy()
    wanted = []
    for row, answer in zip(x, Rows()(x).tolist(), strict=True):
        own = spc[labels == answer]
        wanted.append((slow_spc(row, answer) - own.mean()) / own.std())
    assert method.score(outcome.state, Rows(), x).tolist() == pytest.approx(wanted, abs=1e-4)  # type: ignore[arg-type]
    assert outcome.chosen["clean_spc"] == pytest.approx(spc.mean(), abs=1e-4)
    # Of the clean rows, too, what counts is the label they get, which is not the true one for most of them.
    answers = Rows()(to_float(clean.images))
    values = method.score(outcome.state, Rows(), to_float(clean.images))  # type: ignore[arg-type]
    by_label = np.array(
        [(v - spc[labels == y].mean()) / spc[labels == y].std() for v, y in zip(spc, labels, strict=True)]
    )
    assert bool((answers != clean.labels).any()) and float((values > 0.5).float().mean()) != (by_label > 0.5).mean()
    assert outcome.chosen["clean_flagged"] == pytest.approx(float((values > 0.5).float().mean()), abs=1e-4)


def test_classes_without_spread_take_that_of_all() -> None:
    mean, deviation = moments(torch.tensor([0.2, 0.4, 1, 1, 0.6]), torch.tensor([0, 0, 1, 1, 2]), 4)
    whole = np.std([0.2, 0.4, 1, 1, 0.6])
    assert mean.tolist() == pytest.approx([0.3, 1, 0.64, 0.64])
    assert deviation.tolist() == pytest.approx([0.1, whole, whole, whole])
    assert moments(torch.ones(3), torch.zeros(3).long(), 2)[1].tolist() == [1, 1]


def test_a_triggered_image_keeps_its_answer() -> None:
    x = to_float(images(80, 5).images)
    triggered = x.clone()
    triggered[:, 0, 3, 3] = 0
    method = ScaleUp()
    state = method.run(case(Rows(), images(60, 3))).state
    assert float(method.score(state, Rows(), triggered).mean()) > float(method.score(state, Rows(), x).mean())  # type: ignore[arg-type]
    free = ScaleUp(mode="data_free")
    state = free.run(case(Rows(), images(60, 3))).state
    assert free.score(state, Rows(), triggered).tolist() == [1.0] * 80  # type: ignore[arg-type]


def test_queries_are_one_per_factor_and_the_input_itself() -> None:
    net, method = Rows(), ScaleUp()
    state = method.run(case(net, images(30))).state
    assert net.images == 6 * 30
    method.score(state, net, to_float(images(7).images))  # type: ignore[arg-type]
    assert net.images == 6 * 30 + 6 * 7


def test_settings_are_the_published_ones_and_senseless_ones_are_refused() -> None:
    m = ScaleUp()
    assert (m.factors, m.threshold, m.mode) == ((3, 5, 7, 9, 11), 0.5, "data_limited")
    assert ScaleUp.ACCESS.model == "labels"
    for bad in ({"factors": ()}, {"factors": (1.0,)}, {"mode": "some"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ScaleUp(**bad)  # type: ignore[arg-type]
