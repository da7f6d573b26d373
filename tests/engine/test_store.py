"""The store: committed whole or not at all, never overwritten, damage found where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeperbench.engine.store import Damaged, Store, write_atomic
from sleeperbench.errors import BadInput

KEY, OTHER = "ab" * 32, "cd" * 32
FILES = {"a.bin": b"\x00\x01\x02" * 50, "sub/b.json": b'{"x": 1}'}


def put(store: Store, key: str, files: dict[str, bytes] | None = None, result: Any = "r") -> dict[str, Any]:
    with store.scratch() as folder:
        for name, data in (files or FILES).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return store.commit(key, folder, task={"kind": "attack"}, env={"torch": "1"}, result=result)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_committed_can_be_fetched(store: Store) -> None:
    assert not store.has(KEY)
    manifest = put(store, KEY)
    assert store.has(KEY)
    assert manifest["files"]["sub/b.json"]["size"] == 8
    assert manifest["result"] == "r"
    folder = Store(store.root).fetch(KEY)
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES
    assert folder == store.root / KEY[:2] / KEY
    assert list(store.keys()) == [KEY]
    assert list((store.root / "tmp").iterdir()) == []
    assert (store.root / "VERSION").read_text() == "1"


def test_the_manifest_is_written_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails before it, the key is not there; the folder appears with its manifest in one rename."""
    import sleeperbench.engine.store as module

    def full(path: Path, data: bytes) -> None:
        assert path.name == "manifest.json"
        assert {p.name for p in path.parent.rglob("*") if p.is_file()} == {"a.bin", "b.json"}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        put(store, KEY)
    assert not store.path(KEY).exists()
    assert list(store.keys()) == []


def test_the_first_writer_wins(store: Store) -> None:
    first = put(store, KEY, result="first")
    assert put(Store(store.root), KEY, {"a.bin": b"other"}, result="second") == first
    assert (store.fetch(KEY) / "a.bin").read_bytes() == FILES["a.bin"]
    assert list((store.root / "tmp").iterdir()) == []


def test_a_folder_without_manifest_makes_way(store: Store) -> None:
    store.path(KEY).mkdir(parents=True)
    (store.path(KEY) / "left").write_text("over")
    assert not store.has(KEY)
    put(store, KEY)
    assert Store(store.root).check(KEY) == ""
    assert not (store.path(KEY) / "left").exists()


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_flipped_byte_is_found_and_only_that_artifact_set_aside(store: Store, name: str) -> None:
    put(store, KEY)
    put(store, OTHER)
    for place in (0, -1, "middle"):
        fresh = Store(store.root)
        if not fresh.has(KEY):
            put(fresh, KEY)
        file = fresh.path(KEY) / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2 if place == "middle" else int(place)] ^= 1
        file.write_bytes(data)
        fresh = Store(store.root)
        assert fresh.check(KEY) != ""
        with pytest.raises(Damaged) as e:
            fresh.fetch(KEY)
        assert e.value.key == KEY
        assert not fresh.has(KEY)
        assert list(fresh.keys()) == [OTHER]
        assert fresh.check(OTHER) == ""
    assert list((store.root / "tmp").iterdir()) == []


def test_a_missing_or_shortened_file_is_found(store: Store) -> None:
    put(store, KEY)
    (store.path(KEY) / "a.bin").unlink()
    assert "a.bin is missing" in store.check(KEY)
    put(store, OTHER)
    (store.path(OTHER) / "a.bin").write_bytes(FILES["a.bin"][:-1])
    assert "a.bin does not match" in store.check(OTHER)


def test_a_manifest_of_another_key_is_refused(store: Store) -> None:
    put(store, KEY)
    store.path(OTHER).parent.mkdir()
    store.path(KEY).rename(store.path(OTHER))
    with pytest.raises(Damaged):
        store.manifest(OTHER)
    assert not store.has(OTHER)


def test_a_killed_writer_leaves_only_a_temporary_folder(store: Store) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sleeperbench.engine.store import Store\n"
        "with Store(Path(sys.argv[1])).scratch() as f:\n"
        "    (f / 'a.bin').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.root)], check=False)
    assert done.returncode == -9
    assert list(store.keys()) == []
    assert len(list((store.root / "tmp").iterdir())) == 1
    put(store, KEY)
    assert Store(store.root).check(KEY) == ""


def test_discard(store: Store) -> None:
    put(store, KEY)
    store.discard(KEY)
    assert not store.has(KEY)
    store.discard(KEY)  # nothing to take out is no error
    put(store, KEY, result="again")
    assert store.manifest(KEY)["result"] == "again"


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("7")
    with pytest.raises(BadInput, match=r"of version 7.*--store"):
        Store(tmp_path)


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write the store .*--store"):
        Store(tmp_path / "file" / "store")


def test_an_atomic_write_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sleeperbench.engine.store as module

    file = tmp_path / "x.json"
    write_atomic(file, json.dumps([1]).encode())

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, b"new")
    assert json.loads(file.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [file]
