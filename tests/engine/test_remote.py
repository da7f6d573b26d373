"""A store at a URL: cached on this machine, checked on arrival, first writer wins."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeperbench.engine.lease import Leases
from sleeperbench.engine.store import Damaged, Store
from sleeperbench.errors import BadInput

fsspec = pytest.importorskip("fsspec", reason="allowed: the extra `remote` is not installed")
KEY, OTHER = "ab" * 32, "cd" * 32
FILES = {"a.bin": b"\x00\x01\x02" * 50, "sub/b.json": b'{"x": 1}'}


def put(store: Store, key: str, result: str = "r", files: dict[str, bytes] | None = None) -> dict[str, Any]:
    with store.scratch() as folder:
        for name, data in (files or FILES).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return store.commit(key, folder, task={"kind": "attack"}, env={}, result=result)


@pytest.fixture(params=["memory", "file"])
def machine(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    """Opens the same store from a machine of this name, which has a cache folder of its own."""
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/far"

    def on(name: str) -> Store:
        monkeypatch.setenv("SLEEPERBENCH_CACHE", str(tmp_path / name))
        return Store(root)

    return on


def remote_file(store: Store, name: str) -> str:
    assert store.remote
    return f"{store.remote.root}/{KEY[:2]}/{KEY}/{name}"


def test_what_one_machine_commits_another_fetches(machine: Callable[[str], Store]) -> None:
    here, there = machine("here"), machine("there")
    assert not there.has(KEY)
    manifest = put(here, KEY)
    put(here, OTHER)
    assert there.has(KEY)
    assert there.manifest(KEY) == manifest
    assert list(there.keys()) == [KEY, OTHER]
    folder = there.fetch(KEY)
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES
    assert there.root in folder.parents
    assert here.root != there.root
    assert there.check(KEY) == ""


def test_the_first_writer_wins(machine: Callable[[str], Store]) -> None:
    here, there = machine("here"), machine("there")
    first = put(here, KEY, "first")
    assert put(there, KEY, "second", {"a.bin": b"other"}) == first
    assert there.check(KEY) == "", "nor are its files replaced"
    assert (there.fetch(KEY) / "manifest.json").read_bytes() == (here.fetch(KEY) / "manifest.json").read_bytes()


def test_without_a_manifest_there_is_no_artifact(machine: Callable[[str], Store]) -> None:
    here = machine("here")
    put(here, KEY)
    assert here.remote
    here.remote.fs.pipe_file(remote_file(here, "manifest.json"), b'{"key": "torn')
    there = machine("there")
    assert not there.has(KEY)
    assert there.check(KEY) != ""
    with pytest.raises(Damaged):
        there.manifest(KEY)
    put(there, KEY, "again")
    assert there.manifest(KEY)["result"] == "again"


def test_damage_at_the_url_is_found_and_taken_out(machine: Callable[[str], Store]) -> None:
    here, there = machine("here"), machine("there")
    put(here, KEY)
    assert here.remote
    here.remote.fs.pipe_file(remote_file(here, "a.bin"), b"\x01" + FILES["a.bin"][1:])
    assert "a.bin does not match" in there.check(KEY)
    with pytest.raises(Damaged, match=r"a\.bin"):
        there.fetch(KEY)
    assert not there.has(KEY)
    assert list(there.keys()) == []


def test_damage_in_the_cache_is_mended_from_the_url(machine: Callable[[str], Store]) -> None:
    here = machine("here")
    put(here, KEY)
    (here.path(KEY) / "a.bin").write_bytes(b"damaged")
    fresh = machine("here")
    assert (fresh.fetch(KEY) / "a.bin").read_bytes() == FILES["a.bin"]


def test_another_artifact_of_the_same_key_replaces_the_cached_one(machine: Callable[[str], Store]) -> None:
    here, there = machine("here"), machine("there")
    put(here, KEY, files={"a.bin": b"old"})
    there.discard(KEY)
    assert not here.has(KEY)
    put(there, KEY, files={"a.bin": b"new"})
    assert (machine("here").fetch(KEY) / "a.bin").read_bytes() == b"new"


def test_leases_hold_across_machines(machine: Callable[[str], Store]) -> None:
    here, there = machine("here"), machine("there")
    with Leases(here.leases).hold(KEY) as mine, Leases(there.leases).hold(KEY) as other:
        assert (mine, other) == (True, False)
        assert there.leases.lease_keys() == [KEY]
        assert 0 <= there.leases.lease_age(KEY) < 100
        there.leases.drop_lease(KEY, b"not this one")
        assert there.leases.lease_keys() == [KEY]
    with Leases(there.leases).hold(KEY) as again:
        assert again


def test_addresses_that_are_none(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEPERBENCH_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"cannot open the store nosuch://x"):
        Store("nosuch://x/y")
    with pytest.raises(BadInput, match="no store at"):
        Store(f"file://{tmp_path}/none", create=False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "VERSION").write_text("7")
    with pytest.raises(BadInput, match="not of version 1"):
        Store(f"file://{tmp_path}/old")
    answer = cli("run", "smoke", "--store", "memory://x", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "memory is seen by one process alone" in answer.err


def test_a_run_on_a_url(smoke: Any, sleeper: Any, cli: Any, tmp_path: Path) -> None:
    """Workers in processes of their own commit to it; a run elsewhere finds everything and computes nothing."""
    from test_leases import figures

    url = f"file://{tmp_path}/far"
    answer = sleeper(*smoke.args, "--out", tmp_path / "a", "--store", url, "--no-site")
    assert answer.code == 0, answer.err
    assert "computed 12 tasks" in answer.err
    assert figures(tmp_path / "a") == figures(smoke.out)
    answer = cli(*smoke.args, "--out", tmp_path / "b", "--store", url, "--no-site")
    assert answer.code == 0, answer.err
    assert "computed 0 tasks" in answer.err
    assert figures(tmp_path / "b") == figures(smoke.out)
    assert cli("store", "check", "--store", tmp_path / "far").code == 0, "its layout is that of a folder"
