"""The real sets as plain arrays under SLEEPERBENCH_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleeperbench.data.cache import prepare
from sleeperbench.data.cut import cut
from sleeperbench.data.find import find_source
from sleeperbench.data.load import load

ROOT = Path(os.environ.get("SLEEPERBENCH_DATA") or "/nonexistent")


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (ROOT / name / "train.npz").is_file(), reason=f"allowed: no {name} under SLEEPERBENCH_DATA"
    )


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "note"),
    [
        pytest.param("mnist", "", marks=real("mnist")),
        pytest.param("fashion_mnist", "", marks=real("fashion_mnist")),
        pytest.param("cifar10", "125 images lossy", marks=real("cifar10")),
        pytest.param("gtsrb", "could not be compared with the release", marks=real("gtsrb")),
    ],
)
def test_real_set(name: str, note: str) -> None:
    source = find_source(name)
    prepared = prepare(source, ROOT)
    assert prepared.note == note
    assert prepared.canonical == (note == "")
    assert prepared.counts == {"train": source.train, "test": source.test}
    train = load(source, "train", ROOT)
    c = cut(train.labels, seed=0, clean=0.05, classes=len(source.classes))
    assert len(set(train.labels[c.pool].tolist())) == len(source.classes)
    assert len(c.pool) + len(c.probe) + len(c.rest) == source.train


@pytest.mark.real
@pytest.mark.skipif(
    not (ROOT / "cifar10" / "train.npz").is_file(), reason="allowed: no cifar10 under SLEEPERBENCH_DATA"
)
def test_cifar10_has_its_published_mean() -> None:
    images = load("cifar10", "train", ROOT).images
    mean = [images[:, c].float().mean().item() / 255 for c in range(3)]
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
