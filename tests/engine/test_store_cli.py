"""`sleeperbench store`: ls, check, gc, export and import, and what an import refuses."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeperbench.engine import archive
from sleeperbench.engine.lease import identity
from sleeperbench.engine.manifest import digest_of_manifest, dump_manifest, parse_manifest, safe_name
from sleeperbench.engine.store import Store

KEY, OTHER = "ab" * 32, "cd" * 32
HEAD = f"{KEY[:2]}/{KEY}"


def put(store: Store, key: str, inputs: dict[str, str] | None = None) -> None:
    with store.scratch() as folder:
        (folder / "a.bin").write_bytes(b"\x00\x01" * 50)
        task = {"kind": "attack", "name": "toy", "inputs": inputs or {}}
        store.commit(key, folder, task=task, env={}, result={"started": 0.0, "seconds": 1.0})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    put(made, KEY)
    put(made, OTHER)
    return made


@pytest.fixture
def at(cli: Any, store: Store) -> Callable[..., Any]:
    """The command on that store; its JSON answer where there is one."""

    def call(*argv: object) -> Any:
        answer = cli("store", *argv, "--store", store.root)
        return answer.code, json.loads(answer.out) if "--json" in argv else answer.out, answer.err

    return call


def flip(file: Path, place: int = 5) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_ls(at: Any, smoke: Any, cli: Any, store: Store) -> None:
    answer = cli("store", "ls", "--store", smoke.store, "--json")
    rows = json.loads(answer.out)
    assert answer.code == 0
    assert len(rows) == 12
    assert sorted({(r["kind"], r["name"]) for r in rows}) == [
        ("attack", "badnets"),
        ("attack", "none"),
        ("defense", "ft"),
        ("defense", "none"),
        ("evaluate", "accuracy"),
        ("evaluate", "stealth"),
    ]
    for r in rows:
        folder = smoke.store / r["key"][:2] / r["key"]
        assert r["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert 0 <= r["seconds_old"] < 86400
    flip(store.path(KEY) / "manifest.json")
    code, rows, _ = at("ls", "--json")
    assert (code, [r["kind"] for r in rows]) == (0, ["damaged", "attack"])
    assert store.has(KEY), "a look takes nothing out"
    code, text, _ = at("ls")
    assert text.splitlines()[-1].startswith("2 artifacts, ")


def test_check(at: Any, store: Store) -> None:
    assert at("check", "--json")[:2] == (0, {"artifacts": 2, "damaged": []})
    flip(store.path(KEY) / "a.bin")
    for _ in range(2):
        assert at("check", "--json")[:2] == (4, {"artifacts": 2, "damaged": [KEY]})
    assert f"damaged: {KEY}: a.bin does not match its digest" in at("check")[1]
    assert at("check", "--remove", "--json")[:2] == (4, {"artifacts": 2, "damaged": [KEY]})
    assert at("check", "--json")[:2] == (0, {"artifacts": 1, "damaged": []})


def test_there_must_be_a_store(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for action in (("ls",), ("check",), ("gc",), ("export", "x.zip")):
        for where in ((), ("--store", tmp_path / "none")):
            answer = cli("store", *action, *where)
            assert answer.code == 2
            assert "there is no store at" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_the_command_imports_no_torch(store: Store, clean_env: dict[str, str]) -> None:
    code = (
        "import sys; from sleeperbench.cli import main\n"
        "assert main(['store', 'check', '--store', sys.argv[1]]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(store.root)], env=clean_env, check=True, stdout=subprocess.DEVNULL)


def test_gc_removes_what_killed_runs_left(at: Any, store: Store) -> None:
    old, new = store.root / "tmp" / "old", store.root / "tmp" / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"half")
    for path in (old / "half", old):
        os.utime(path, (0, 0))
    mine = json.dumps(identity() | {"run": "r", "token": "t"}).encode()
    store.leases.create_lease(KEY, mine)
    store.leases.create_lease(OTHER, mine)
    os.utime(store.root / "leases" / OTHER, (0, 0))
    assert at("gc", "--json")[:2] == (0, {"tmp": 1, "leases": 1, "artifacts": 0})
    assert [p.name for p in (store.root / "tmp").iterdir()] == ["new"]
    assert store.leases.lease_keys() == [KEY]
    assert sorted(store.keys()) == [KEY, OTHER]


def test_gc_keeps_what_a_run_needs(at: Any, store: Store, tmp_path: Path) -> None:
    input_, unneeded = "11" * 32, "22" * 32
    for key in (input_, unneeded):
        put(store, key)
    store.discard(KEY)
    put(store, KEY, {"attack": OTHER, "clean0": input_})
    run = tmp_path / "run"
    (run / "rows").mkdir(parents=True)
    row = {"task_key": KEY, "attack_key": OTHER, "defense_key": ""}
    (run / "rows" / "x.json").write_text(json.dumps([row]))

    code, _, err = at("gc", "--keep", run)
    assert code == 2
    assert "remove 1 artifacts" in err and "--yes" in err
    store.leases.create_lease(KEY, json.dumps(identity() | {"run": "r", "token": "t"}).encode())
    code, _, err = at("gc", "--keep", run, "--yes")
    assert code == 2
    assert f"a run is at work (pid {os.getpid()}" in err
    assert len(list(store.keys())) == 4
    (store.root / "leases" / KEY).unlink()
    assert at("gc", "--keep", run, "--yes", "--json")[:2] == (0, {"tmp": 0, "leases": 0, "artifacts": 1})
    assert sorted(store.keys()) == sorted([KEY, OTHER, input_])
    assert at("gc", "--keep", tmp_path / "no", "--yes")[0] == 2
    (run / "rows" / "y.json").write_text("[{")
    assert at("gc", "--keep", run, "--yes")[0] == 2, "what cannot be read may need anything"


def test_gc_keeps_all_of_a_real_run(smoke: Any, cli: Any, tmp_path: Path) -> None:
    shutil.copytree(smoke.store, tmp_path / "store")
    answer = cli("store", "gc", "--store", tmp_path / "store", "--keep", smoke.out, "--json")
    assert json.loads(answer.out)["artifacts"] == 0


def test_export_and_import(at: Any, cli: Any, store: Store, tmp_path: Path) -> None:
    assert at("export", tmp_path / "a.zip")[0] == 0
    shutil.copytree(store.root, tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*"):
        os.utime(file, (1e9, 1e9))
    assert cli("store", "export", tmp_path / "b.zip", "--store", tmp_path / "copy").code == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as zf:
        names = [i.filename for i in zf.infolist()]
        assert {i.date_time for i in zf.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {i.compress_type for i in zf.infolist()} == {zipfile.ZIP_STORED}
    assert names == sorted(names, key=lambda n: (n != "VERSION", n))

    there = tmp_path / "there"
    answer = cli("store", "import", tmp_path / "a.zip", "--store", there, "--json")
    assert json.loads(answer.out) == {"imported": [KEY, OTHER], "present": []}
    answer = cli("store", "import", tmp_path / "a.zip", "--store", there, "--json")
    assert json.loads(answer.out) == {"imported": [], "present": [KEY, OTHER]}
    for file in (p for p in store.root.rglob("*") if p.is_file()):
        assert (there / file.relative_to(store.root)).read_bytes() == file.read_bytes()

    assert at("export", tmp_path / "one.zip", OTHER[:6], "--json")[1]["artifacts"] == 1
    assert at("export", tmp_path / "none.zip", "ffff")[0] == 2
    flip(store.path(KEY) / "a.bin")
    code, _, err = at("export", tmp_path / "bad.zip")
    assert code == 4 and "a.bin does not match" in err
    assert not (tmp_path / "bad.zip").exists()
    assert at("export", tmp_path / "no" / "folder.zip", OTHER)[0] == 2
    assert not list(tmp_path.glob(".*"))


def manifest(**changes: Any) -> bytes:
    files = {"a.bin": {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
    m = {"key": KEY, "task": {}, "env": {}, "result": {}, "files": files} | changes
    return dump_manifest(m | {"digest": digest_of_manifest(m)})


Entries = list[tuple[str | zipfile.ZipInfo, bytes]]
GOOD: Entries = [("VERSION", b"1"), (f"{HEAD}/a.bin", b"abc"), (f"{HEAD}/manifest.json", manifest())]


def write(file: Path, entries: Entries) -> None:
    with zipfile.ZipFile(file, "w") as zf:
        for name, data in entries:
            zf.writestr(name, data)


def info(name: str, **fields: Any) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    for k, v in fields.items():
        setattr(made, k, v)
    return made


def swapped(**by: Entries) -> Entries:
    """GOOD with the entries of the file names given replaced."""
    made: Entries = []
    for name, data in GOOD:
        made += by.get(str(name).rpartition("/")[2].partition(".")[0], [(name, data)])
    return made


def test_the_sample_that_is_broken_below_is_good(at: Any, store: Store, tmp_path: Path) -> None:
    store.discard(KEY)
    write(tmp_path / "x.zip", GOOD)
    assert at("import", tmp_path / "x.zip", "--json")[:2] == (0, {"imported": [KEY], "present": []})
    assert (store.fetch(KEY) / "a.bin").read_bytes() == b"abc"


DEEP = b"[" * 100_000
LINK = info(f"{HEAD}/a.bin", create_system=3, external_attr=(stat.S_IFLNK | 0o777) << 16)
REFUSED: dict[str, tuple[int, Entries]] = {
    "parent": (2, [*GOOD, ("../evil", b"x")]),
    "parent below a key": (2, [*GOOD, (f"{HEAD}/../../../evil", b"x")]),
    "absolute": (2, [*GOOD, ("/evil", b"x")]),
    "absolute below a key": (2, [*GOOD, (f"{HEAD}//evil", b"x")]),
    "backslash": (2, [*GOOD, (info(f"{HEAD}/x"), b"x"), (f"{HEAD}/..\\evil", b"x")]),
    "drive": (2, [*GOOD, (f"{HEAD}/C:evil", b"x")]),
    "no key": (2, [*GOOD, ("tmp/x", b"x")]),
    "key in another folder": (2, [*GOOD, (f"cd/{KEY}/a.bin", b"x")]),
    "upper case": (2, [*GOOD, (f"{HEAD}/a.bin".upper(), b"x")]),
    "link": (2, swapped(a=[(LINK, b"/etc/passwd")])),
    "device": (2, swapped(a=[(info(f"{HEAD}/a.bin", create_system=3, external_attr=stat.S_IFCHR << 16), b"abc")])),
    "folder": (2, [*GOOD, (f"{HEAD}/sub/", b"")]),
    "compressed": (2, swapped(a=[(info(f"{HEAD}/a.bin", compress_type=zipfile.ZIP_DEFLATED), b"abc")])),
    "other version": (2, swapped(VERSION=[("VERSION", b"2")])),
    "no version": (2, swapped(VERSION=[])),
    "file too many": (4, [*GOOD, (f"{HEAD}/b.bin", b"x")]),
    "file too few": (4, swapped(a=[])),
    "no manifest": (4, swapped(manifest=[])),
    "changed byte": (4, swapped(a=[(f"{HEAD}/a.bin", b"abd")])),
    "other size": (4, swapped(a=[(f"{HEAD}/a.bin", b"abcd")])),
    "other key": (4, swapped(manifest=[(f"{HEAD}/manifest.json", manifest(key=OTHER))])),
    "changed manifest": (4, swapped(manifest=[(f"{HEAD}/manifest.json", manifest() + b"\n")])),
    "deep manifest": (4, swapped(manifest=[(f"{HEAD}/manifest.json", DEEP)])),
    "huge manifest": (4, swapped(manifest=[(f"{HEAD}/manifest.json", b" " * (archive.MANIFEST_BYTES + 1))])),
    "manifest of paths": (4, swapped(manifest=[(f"{HEAD}/manifest.json", manifest(files={"../a.bin": {}}))])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_import_refuses(case: str, at: Any, store: Store, tmp_path: Path) -> None:
    store.discard(KEY)
    before = sorted(tmp_path.rglob("*"))
    code, entries = REFUSED[case]
    write(tmp_path / "x.zip", entries)
    answer = at("import", tmp_path / "x.zip")
    assert answer[0] == code, answer
    assert len(answer[2].splitlines()) == 1
    assert case != "huge manifest" or "bytes" in answer[2]
    (tmp_path / "x.zip").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_one_bad_artifact_keeps_all_out(at: Any, store: Store, tmp_path: Path) -> None:
    store.discard(KEY)
    bad = f"ef/{'ef' * 32}"
    write(tmp_path / "x.zip", [*GOOD, (f"{bad}/manifest.json", manifest())])
    assert at("import", tmp_path / "x.zip")[0] == 4
    assert not store.has(KEY)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_import_refuses_doubles_and_bombs(at: Any, store: Store, tmp_path: Path) -> None:
    store.discard(KEY)
    write(tmp_path / "x.zip", [*GOOD, (f"{HEAD}/a.bin", b"abc")])
    assert "two entries are named" in at("import", tmp_path / "x.zip")[2]
    # Many names for the same bytes: the directory is rewritten so that all entries point at the first.
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as zf:
        zf.writestr("VERSION", b"1")
        zf.writestr(f"{HEAD}/a0", b"x" * 4000)
        one = zf.getinfo(f"{HEAD}/a0")
        for i in range(1, 50):
            zf.filelist.append(info(f"{HEAD}/a{i}", **{k: getattr(one, k) for k in ("CRC", "header_offset")}))
            zf.filelist[-1].file_size = zf.filelist[-1].compress_size = 4000
    assert "claim more bytes" in at("import", tmp_path / "bomb.zip")[2]
    assert not store.has(KEY)


@pytest.mark.parametrize("data", [b"", b"no zip", b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_zip(data: bytes, at: Any, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    code, _, err = at("import", tmp_path / "x.zip")
    assert code == 2
    assert "x.zip" in err
    assert at("import", tmp_path / "absent.zip")[0] == 2


def test_what_a_manifest_may_not_say() -> None:
    assert parse_manifest(manifest(), KEY)["task"] == {}
    outside = {"../a.bin": {"size": 3, "sha256": ""}}
    stale = dump_manifest(json.loads(manifest()) | {"result": {"asr": 1.0}})
    for data, why in ((manifest(files=outside), "names the file"), (stale, "own digest"), (manifest(key=OTHER), "key")):
        with pytest.raises(ValueError, match=why):
            parse_manifest(data, KEY)


def test_safe_names() -> None:
    assert all(safe_name(n) for n in ("a.bin", "sub/b.json", "path0/model.safetensors", "..a"))
    for name in ("", ".", "..", "/a", "a/../b", "a//b", "./a", "a/", "a\\b", "C:a", "a\0b", "a\nb", "manifest.json"):
        assert not safe_name(name), name
