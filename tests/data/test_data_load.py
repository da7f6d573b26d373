from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_samples import toy_source, write_toy

from sleeperbench.data import cache, load
from sleeperbench.data.catalog import digits
from sleeperbench.data.errors import DataError
from sleeperbench.data.images import digest_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "root")


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="allowed: needs /proc")
@pytest.mark.parametrize(("share", "stays"), [(0.25, False), (1e-12, True)])
def test_large_images_stay_mapped(root: Path, monkeypatch: pytest.MonkeyPatch, share: float, stays: bool) -> None:
    monkeypatch.setattr(load, "MEMORY_SHARE", share)
    path = cache.prepare(toy_source()).folder / "train.images.npy"
    raw = path.read_bytes()
    data = load.load(toy_source(), "train")
    assert mapped(path) is stays
    data.images[0] = 7  # private: neither the file nor another reader sees it
    assert path.read_bytes() == raw
    assert digest_of(load.load(toy_source(), "train").images, data.labels) == data.digest


def test_load_fills_every_field(root: Path) -> None:
    data = load.load(toy_source(), "train")
    assert data.images.dtype == torch.uint8
    assert data.shape == (3, 4, 5)
    assert (data.name, data.split, data.classes, data.canonical) == ("toy", "train", ("a", "b", "c"), False)
    assert digest_of(data.images, data.labels) == data.digest
    assert data.ids.tolist() == list(range(30))
    with pytest.raises(DataError, match="did you mean `train`"):
        load.load(toy_source(), "trian")


def test_digits_need_no_file_and_keep_their_ids() -> None:
    train, test = load.load("digits", "train"), load.load("digits", "test")
    assert train.canonical
    assert test.canonical
    assert not set(train.ids.tolist()) & set(test.ids.tolist())
    assert (len(train), len(test), train.shape) == (digits.train, digits.test, (1, 16, 16))
    assert test.ids[:5].tolist() == [8, 15, 17, 23, 27]


def test_subset_is_stratified_nested_and_in_source_order() -> None:
    train = load.load("digits", "train")
    small, large = load.subset(train, 100), load.subset(train, 300)
    assert set(small.ids.tolist()) < set(large.ids.tolist())
    assert small.ids.tolist() == sorted(small.ids.tolist())
    assert (torch.bincount(small.labels) - torch.bincount(train.labels) * 100 / len(train)).abs().max() <= 1.5
    assert small.digest == train.digest
    assert (train.having(small.ids).images == small.images).all()
    assert load.subset(train, 100, seed=1).ids.tolist() != small.ids.tolist()
    assert len(load.subset(train, len(train))) == len(train)
    for n in (0, len(train) + 1):
        with pytest.raises(DataError, match=f"a subset of {n} rows was asked of digits/train, which has 1437"):
            load.subset(train, n)
