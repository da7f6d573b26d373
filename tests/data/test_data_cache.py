from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_samples import toy_rows, toy_source, write_toy
from PIL import Image

from sleeperbench.data import cache, load
from sleeperbench.data.arrays import Arrays, digest_arrays, read_npz
from sleeperbench.data.errors import DataError
from sleeperbench.data.source import Source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "root")


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own."""
    monkeypatch.setattr(cache, "_checked", set())


def test_decoded_rows_are_the_source_rows(root: Path) -> None:
    p = cache.prepare(toy_source())
    for split in ("train", "test"):
        want = read_npz(root / "toy" / f"{split}.npz")
        images, labels = p.arrays(split)
        assert isinstance(images, np.memmap)
        assert (images == want.images).all()
        assert (labels == want.labels).all()
        assert p.ids(split).tolist() == list(range(len(labels)))
        assert p.digests[split] == digest_arrays(want.images, want.labels)
        assert p.counts[split] == len(labels)


def test_a_second_prepare_reads_no_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.prepare(toy_source())
    monkeypatch.setattr("sleeperbench.data.locate.read_npz", lambda p: pytest.fail(f"{p} was read again"))
    assert cache.prepare(toy_source()).folder == first.folder


def test_changed_sources_are_decoded_anew(root: Path) -> None:
    before = cache.prepare(toy_source())
    np.savez(root / "toy" / "test.npz", **toy_rows(12, 5))
    os.utime(root / "toy" / "test.npz", ns=(1, 1))
    after = cache.prepare(toy_source())
    assert after.folder != before.folder
    assert after.digests["test"] != before.digests["test"]
    assert after.digests["train"] == before.digests["train"]


@pytest.mark.parametrize("name", [f"{s}.{k}.npy" for s in ("train", "test") for k in ("images", "labels", "ids")])
@pytest.mark.parametrize("how", ["flip", "short", "gone"])
def test_a_damaged_cache_file_is_named_and_mended(root: Path, name: str, how: str) -> None:
    source = toy_source()
    path = cache.prepare(source).folder / name
    raw = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[:-1] + (bytes([raw[-1] ^ 1]) if how == "flip" else b""))
    with pytest.raises(DataError, match=r"sleeperbench data get toy --again") as e:
        load.load(source, name.split(".")[0])
    assert str(path) in str(e.value)
    cache.prepare(source, again=True)
    assert path.read_bytes() == raw
    load.load(source, name.split(".")[0])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"splits": {"train": {}, "test": {}}, "files": {}}'])
def test_a_damaged_meta_is_named(root: Path, text: str) -> None:
    folder = cache.prepare(toy_source()).folder
    (folder / "meta.json").write_text(text)
    with pytest.raises(DataError, match=r"meta\.json is damaged.*--again"):
        cache.prepare(toy_source())


def test_the_checksum_is_computed_once_per_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, hashed = cache.prepare(toy_source()), []
    real = cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: hashed.append(path.name) or real(path))
    for _ in range(3):
        p.arrays("train")
    assert sorted(hashed) == ["train.images.npy", "train.labels.npy"]


def test_the_size_is_compared_every_time(root: Path) -> None:
    p = cache.prepare(toy_source())
    p.arrays("train")
    path = p.folder / "train.images.npy"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="is damaged"):
        p.arrays("train")


def test_a_killed_build_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(cache.json, "dump", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.prepare(toy_source())
    assert list(cache.cache_folder().iterdir()) == []
    folder = cache.prepare(toy_source()).folder
    (folder / "meta.json").unlink()  # as a deletion that was killed leaves it
    (folder / "train.images.npy").write_bytes(b"")
    assert cache.prepare(toy_source()).arrays("train")[0].shape == (30, 3, 4, 5)


def test_the_first_of_two_builders_wins(root: Path) -> None:
    source = toy_source()
    p = cache.prepare(source)
    before = (p.folder / "meta.json").stat().st_ino
    found = cache.locate(source, root)
    assert found is not None
    cache._build(p.folder, source, found)
    assert (p.folder / "meta.json").stat().st_ino == before
    assert [f.name for f in p.folder.parent.iterdir()] == [p.folder.name]


def test_again_spares_sets_with_a_longer_name(root: Path) -> None:
    write_toy(root, "toy-b")
    other = cache.prepare(toy_source("toy-b")).folder
    cache.prepare(toy_source())
    cache.prepare(toy_source(), again=True)
    assert (other / "meta.json").is_file()


def test_missing_data_say_where_and_what_to_do(tmp_path: Path) -> None:
    for source, way in ((toy_source(), "put the files"), (toy_source(download=lambda r: None), "data get toy")):
        with pytest.raises(DataError, match=way) as e:
            cache.prepare(source)
        assert str(tmp_path / "root" / "toy") in str(e.value)
    with pytest.raises(DataError, match="elsewhere"):
        cache.prepare(toy_source(), tmp_path / "elsewhere")


def test_layouts_are_tried_in_order(root: Path) -> None:
    own = toy_source(files=lambda r: (r / "own",))
    without = toy_source(files=lambda r: ())

    def layout(source: Source) -> str | None:
        found = cache.locate(source, root)
        return found.layout if found else None

    assert (layout(own), layout(without)) == ("arrays", "arrays")
    for split in ("train", "test"):
        (root / "toy" / f"{split}.npz").unlink()
    assert (layout(own), layout(without)) == ("own", None)
    for split in ("train", "val"):
        for name in "abc":
            (root / "toy" / split / name).mkdir(parents=True)
            Image.new("RGB", (5, 4)).save(root / "toy" / split / name / "1.png")
    assert (layout(own), layout(without)) == ("own", "imagefolder")
    assert cache.prepare(without).counts == {"train": 3, "test": 3}


def test_half_a_set_is_refused(root: Path) -> None:
    (root / "toy" / "test.npz").unlink()
    with pytest.raises(DataError, match=r"test\.npz is missing"):
        cache.prepare(toy_source())


def test_rows_that_do_not_fit_are_not_cached(root: Path) -> None:
    with pytest.raises(DataError, match="toy/train: labels run from 0 to 2"):
        cache.prepare(toy_source(classes=("a", "b")))
    with pytest.raises(DataError, match=r"the data set's are \(1, 4, 5\)"):
        cache.prepare(toy_source(shape=(1, 4, 5)))
    assert list(cache.cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLEEPERBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="SLEEPERBENCH_CACHE"):
        cache.prepare(toy_source())


def test_what_a_result_must_say(root: Path, tmp_path: Path) -> None:
    plain = cache.prepare(toy_source())
    same = (plain.digests["train"], plain.digests["test"])

    def note(**changes: object) -> str:
        p = cache.prepare(toy_source(**changes))
        assert p.canonical == (p.note == "")
        return p.note

    assert note() == "no release to compare with"
    assert note(train=30, test=12) == "could not be compared with the release"
    assert note(train=30, test=12, digests=same) == ""
    assert note(train=30, test=12, digests=(same[1], same[0])) == "pixels or labels differ from the release"
    assert note(train=31, test=12, digests=same) == "train has 30 of 31 rows"
    write_toy(tmp_path / "lossy", inexact=np.array([1, 2, 5]))
    assert cache.prepare(toy_source(train=30, test=12), tmp_path / "lossy").note == "3 images lossy"

    def released(root: Path, split: str) -> Arrays:
        rows = read_npz(root / "toy" / f"{split}.npz")
        return Arrays(images=rows.images, labels=rows.labels, released=True)

    (root / "toy").rename(root / "kept")
    kept = toy_source(train=30, test=12, read=lambda r, s: released(root / "moved", s), files=None)
    (root / "moved").mkdir()
    (root / "kept").rename(root / "moved" / "toy")
    assert cache.prepare(kept).canonical


def test_one_changed_byte_changes_the_digest(root: Path) -> None:
    before = cache.prepare(toy_source()).digests["train"]
    rows = toy_rows()
    rows["images"][7, 1, 2, 0] ^= 1
    np.savez(root / "toy" / "train.npz", **rows)
    assert cache.prepare(toy_source()).digests["train"] != before


def test_catalog_and_cache_import_nothing_heavy() -> None:
    code = (
        "import sys, json, sleeperbench.data.catalog, sleeperbench.data.cache, sleeperbench.cli.data;"
        "print(json.dumps([m for m in ('torch', 'torchvision', 'sklearn', 'pandas') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
