from __future__ import annotations

import argparse
import json
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from data_samples import toy_rows, toy_source, write_toy
from PIL import Image

from sleeperbench.cli import data as command
from sleeperbench.data import downloads, find
from sleeperbench.data.cache import prepare
from sleeperbench.data.errors import DataError
from sleeperbench.data.load import load

SHIPPED = {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "gtsrb", "tiny_imagenet"}


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    code = args.main(args)
    assert isinstance(code, int)
    return code


def write_pictures(folder: Path, *, grey: bool = False, size: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for k in range(3):
                pixels = rng.integers(0, 256, (size, size) if grey else (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return folder


def test_the_shipped_sets_are_found() -> None:
    assert set(find.names()) == SHIPPED
    assert set(find.sources()) == SHIPPED
    assert find.find_source("mnist").title == "MNIST"


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean `cifar10`"):
        find.find_source("cifar1O")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_sets.py").write_text(
        "from data_samples import toy_source\ngood = toy_source('good')\nnumber = 3\n"
    )
    (tmp_path / "foreign_exits.py").write_text("raise SystemExit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    dist = types.SimpleNamespace(name="Out_Sider")
    points = [
        EntryPoint(name, value, find.GROUP)._for(dist)  # type: ignore[attr-defined]
        for name, value in (("a", "foreign_sets:good"), ("b", "foreign_sets:number"), ("c", "foreign_exits:x"))
    ]
    real = find.entry_points
    monkeypatch.setattr(find, "entry_points", lambda group: [*points, *real(group=group)])


def test_a_broken_plugin_is_named_and_disables_nothing(plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEPERBENCH_PLUGINS", "all")
    assert set(find.names()) >= {"out-sider/a", "out-sider/b", "out-sider/c"}
    assert set(find.sources()) == {*SHIPPED, "out-sider/a"}
    assert find.find_source("out-sider/a").name == "out-sider/a"
    with pytest.raises(DataError, match=r"out-sider/b.*is a int, not a Source"):
        find.find_source("out-sider/b")
    with pytest.raises(DataError, match=r"out-sider/c.*SystemExit\(5\)"):
        find.find_source("out-sider/c")


def test_plugins_are_admitted_by_distribution(plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, foreign in (("none", 0), ("out-sider", 3), ("else", 0), ("else,out_sider", 3), ("all", 3)):
        monkeypatch.setenv("SLEEPERBENCH_PLUGINS", wanted)
        assert len(find.names()) == len(SHIPPED) + foreign, wanted


def test_a_foreign_set_is_decoded_under_its_own_name(
    plugins: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLEEPERBENCH_PLUGINS", "all")
    write_toy(tmp_path / "root", "good")
    assert prepare(find.find_source("out-sider/a")).folder.name.startswith("out-sider--a-")


def test_add_images_then_load_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "mine")
    assert run("add", "pets", "--images", str(tmp_path / "mine")) == 0
    assert "added pets: 3x6x6, 2 classes" in capsys.readouterr().out
    source = find.find_source("pets")
    assert (source.classes, source.norm) == (("cat", "dog"), ((0.0,) * 3, (1.0,) * 3))
    assert (source.pad, source.flip, source.shape) == (4, False, (3, 6, 6))
    data = load("pets", "train")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "mine" / "train" / "dog" / "1.png") as picture:
        assert (data.images[4].numpy() == np.asarray(picture).transpose(2, 0, 1)).all()
    assert prepare(source).note == "no release to compare with"
    assert not data.canonical


def test_grey_pictures_stay_grey_and_sizes_must_agree(tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey", grey=True)
    run("add", "grey", "--images", str(tmp_path / "grey"))
    assert find.find_source("grey").shape == (1, 6, 6)
    Image.new("L", (9, 9)).save(tmp_path / "grey" / "test" / "cat" / "0.png")
    with pytest.raises(DataError, match="2 different sizes"):
        run("add", "mixed", "--images", str(tmp_path / "grey"))
    run("add", "mixed", "--images", str(tmp_path / "grey"), "--size", "8")
    assert find.find_source("mixed").shape == (1, 8, 8)


def test_add_arrays_keeps_rows_and_further_keys(tmp_path: Path) -> None:
    write_toy(tmp_path, "given", track=np.arange(30), inexact=np.array([2]), classes=np.array(["p", "q", "r"]))
    run("add", "copied", "--arrays", str(tmp_path / "given"))
    assert (load("copied", "train").images.numpy() == toy_rows()["images"].transpose(0, 3, 1, 2)).all()
    with np.load(tmp_path / "root" / "copied" / "train.npz") as z:
        assert z["track"].tolist() == list(range(30))
    assert find.find_source("copied").classes == ("p", "q", "r")
    assert prepare(find.find_source("copied")).note == "1 images lossy"


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "", "a b", "mnist"])
def test_ids_that_cannot_be_added(tmp_path: Path, name: str) -> None:
    write_toy(tmp_path, "given")
    with pytest.raises(DataError, match=r"is no id|there is a data set"):
        run("add", name, "--arrays", str(tmp_path / "given"))
    assert not (tmp_path / "evil").exists()


def test_an_added_id_is_not_overwritten(tmp_path: Path) -> None:
    write_toy(tmp_path, "given")
    run("add", "one", "--arrays", str(tmp_path / "given"))
    with pytest.raises(DataError, match="there is a data set `one`"):
        run("add", "one", "--arrays", str(tmp_path / "given"))
    (tmp_path / "root" / "taken").mkdir()
    with pytest.raises(DataError, match="taken is there already"):
        run("add", "taken", "--arrays", str(tmp_path / "given"))


CARD = '{"classes": ["a"], "shape": [1, 4, 5], "norm": [[0], [%d]], "pad": 4, "flip": false}'


def test_a_norm_divides_by_no_zero(tmp_path: Path) -> None:
    write_toy(tmp_path / "root", "carded")
    card = tmp_path / "root" / "carded" / "source.json"
    card.write_text(CARD % 1)
    assert find.find_source("carded").norm == ((0.0,), (1.0,))
    card.write_text(CARD % 0)
    with pytest.raises(DataError, match="classes or norm"):
        find.find_source("carded")


@pytest.mark.parametrize("text", ["", "[]", '{"classes": []}', '{"classes": ["a"], "shape": [3, 4], "norm": [[], []]}'])
def test_a_damaged_card_is_named(tmp_path: Path, text: str) -> None:
    write_toy(tmp_path / "root", "broken")
    (tmp_path / "root" / "broken" / "source.json").write_text(text)
    with pytest.raises(DataError, match=r"source\.json is damaged"):
        find.find_source("broken")
    assert set(find.sources()) == SHIPPED


def test_list_says_where_or_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "root" / "cifar10")
    run("list", "--json")
    rows = {r["id"]: r for r in json.loads(capsys.readouterr().out)}
    assert set(rows) == SHIPPED
    assert rows["digits"]["found"] == "needs no file"
    assert rows["cifar10"]["found"].startswith("imagefolder:")
    assert rows["mnist"]["todo"] == "not here: sleeperbench data get mnist (11,594,722 bytes)"
    assert rows["mnist"]["found"] is None
    run("list")
    out = capsys.readouterr().out
    assert str(tmp_path / "root") in out
    assert all(name in out for name in SHIPPED)


def test_get_tells_the_bytes_before_it_downloads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def download(root: Path) -> None:
        told.append(capsys.readouterr().err)
        write_toy(root, "toy")

    source = toy_source(download=download, download_bytes=12_345)
    monkeypatch.setattr(find, "find_source", lambda *_: source)
    assert run("get", "toy") == 0
    assert "downloading 12,345 bytes" in told[0]
    out = capsys.readouterr().out
    assert "toy train: 30 rows, sha256 " + prepare(source).digests["train"] in out
    assert "not canonical: no release to compare with" in out
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["images", "ids"])
def test_get_again_mends_what_get_finds_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write_toy(tmp_path / "root")
    monkeypatch.setattr(find, "find_source", lambda *_: toy_source())
    run("get", "toy")
    (prepare(toy_source()).folder / f"test.{kind}.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"data get toy --again"):
        run("get", "toy")
    run("get", "toy", "--again")
    run("get", "toy")


def test_get_without_a_download_says_where_to_put_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_source", lambda *_: toy_source())
    with pytest.raises(DataError, match="put the files there"):
        run("get", "toy")


def test_a_failed_download_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    with pytest.raises(DataError, match=r"failed \(first second\): check the network"):
        downloads.torchvision_set(tmp_path / "new", "MNIST")
