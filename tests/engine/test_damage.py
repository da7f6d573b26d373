"""Damage and full disks: every changed byte is found, only what it hit is computed again, a full store recovers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_leases import figures

from sleeperbench.engine import store as module
from sleeperbench.engine.store import Damaged, Store

FLIPS = 100


def flip(file: Path, rng: random.Random) -> bytes:
    """Change one random byte of a file; returns what it was."""
    data = file.read_bytes()
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    file.write_bytes(changed)
    return data


def files(store: Path) -> list[Path]:
    return sorted(p for p in store.glob("??/*/**/*") if p.is_file())


def find(store: Path, kind: str, name: str, attack: str) -> str:
    """Key of the one task of a kind and plugin on the model of an attack."""
    tasks = {f.parent.name: json.loads(f.read_bytes())["task"] for f in store.glob("*/*/manifest.json")}
    keys = [
        k
        for k, t in tasks.items()
        if (t["kind"], t["name"]) == (kind, name) and tasks[t["inputs"].get("attack", k)]["name"] == attack
    ]
    (key,) = keys
    return key


@pytest.fixture
def damaged(smoke: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the smoke run's folder and of its store."""
    shutil.copytree(smoke.out, tmp_path / "out")
    shutil.copytree(smoke.store, tmp_path / "store")
    return tmp_path / "out", tmp_path / "store"


def test_a_hundred_flips_are_found(damaged: tuple[Path, Path], cli: Any) -> None:
    """Each in turn by looking at the artifact and by reading it, and all of them by `store check`, ten at a time."""
    _, store = damaged
    rng, places = random.Random(1), files(store)
    for batch in range(FLIPS // 10):
        hit: dict[Path, bytes] = {}
        for _ in range(10):
            # As often the small files as the large ones: most bytes are weights.
            file = rng.choice([p for p in places if p not in hit])
            hit[file] = flip(file, rng)
            key = file.relative_to(store).parts[1]
            assert Store(store).check(key) != "", file
        keys = {f.relative_to(store).parts[1] for f in hit}
        answer = cli("store", "check", "--store", store, "--json")
        assert answer.code == 4
        assert json.loads(answer.out) == {"artifacts": 12, "damaged": sorted(keys)}
        for key in keys:
            reader = Store(store)
            saved = shutil.copytree(reader.path(key), store.parent / f"saved{batch}" / key)
            with pytest.raises(Damaged):
                reader.fetch(key)
            assert not reader.has(key)
            shutil.copytree(saved, reader.path(key))
        for file, data in hit.items():
            file.write_bytes(data)
    assert cli("store", "check", "--store", store).code == 0


def test_a_resumed_run_computes_what_was_damaged_and_needed(
    damaged: tuple[Path, Path], smoke: Any, sleeper: Any, tmp_path: Path
) -> None:
    """Without rows: evaluations are read, so their damage is found, and that of what they are computed from."""
    _, store = damaged
    rng = random.Random(2)
    ft = find(store, "defense", "ft", "badnets")
    (accuracy,) = [
        f.parent.name
        for f in store.glob("*/*/manifest.json")
        if (t := json.loads(f.read_bytes())["task"])["name"] == "accuracy" and t["inputs"]["defense"] == ft
    ]
    chain = [accuracy, ft, find(store, "attack", "badnets", "badnets")]
    for key in chain:
        flip(rng.choice([f for f in files(store) if f.parent.name == key]), rng)
    answer = sleeper(*smoke.args, "--out", tmp_path / "new", "--store", store, "--no-site")
    assert answer.code == 0, answer.err
    assert "computed 3 tasks" in answer.err
    assert figures(tmp_path / "new") == figures(smoke.out)
    assert all(Store(store).check(k) == "" for k in list(Store(store).keys()))


def test_with_rows_damage_is_mended_when_asked(damaged: tuple[Path, Path], smoke: Any, sleeper: Any, cli: Any) -> None:
    """Rows stand on their own; `--verify-store` looks at everything that the plan names, and mends it."""
    out, store = damaged
    rng = random.Random(3)
    hit = [find(store, "attack", "none", "none"), find(store, "evaluate", "stealth", "badnets")]
    for key in hit:
        flip(store / key[:2] / key / "manifest.json", rng)
    answer = sleeper(*smoke.args, "--out", out, "--store", store, "--no-site", "--verify-store")
    assert answer.code == 0, answer.err
    assert "computed 2 tasks" in answer.err
    assert figures(out) == figures(smoke.out)
    assert cli("store", "check", "--store", store).code == 0

    for key in hit:
        flip(store / key[:2] / key / "manifest.json", rng)
    answer = cli(*smoke.args, "--out", out, "--store", store, "--no-site")
    assert (answer.code, "computed 0 tasks" in answer.err) == (0, True), answer.err
    assert figures(out) == figures(smoke.out)


def test_what_was_verified_is_verified_again_only_when_asked(damaged: tuple[Path, Path]) -> None:
    _, store = damaged
    once, always = Store(store), Store(store, verify=True)
    key = next(iter(once.keys()))
    for s in (once, always):
        s.fetch(key)
    flip(next(f for f in files(store) if f.parent.name == key and f.name != "manifest.json"), random.Random(4))
    once.fetch(key)
    with pytest.raises(Damaged):
        always.fetch(key)
    with pytest.raises(Damaged):
        once.fetch(key)  # what another process took out is not there, verified or not


def test_a_good_artifact_that_came_meanwhile_is_not_taken_out(damaged: tuple[Path, Path]) -> None:
    """Another process found the same damage earlier and has computed it again since."""
    _, store = damaged
    key = next(iter(Store(store).keys()))
    Store(store).discard_damaged(key)
    assert Store(store).check(key) == ""


# ---- full and read-only ----------------------------------------------------------------------------------------------
WRITES = ("fsync", "rename", "replace", "open")


def commit(store: Store, key: str) -> None:
    with store.scratch() as folder:
        (folder / "a.bin").write_bytes(b"x" * 1000)
        store.commit(key, folder, task={}, env={}, result="r")


@pytest.mark.parametrize("call", WRITES)
def test_a_commit_that_fails_anywhere_leaves_a_whole_store(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nth call of each kind fails for want of space, for all n: the key is there whole, or not at all."""
    real: Callable[..., Any] = getattr(os, call)
    failed = 0
    for nth in range(100):
        calls = 0

        def full(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth + 1:  # noqa: B023 - used within this turn
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        root, key = tmp_path / f"{call}{nth}", "ab" * 32
        store = Store(root)
        monkeypatch.setattr(module.os, call, full)
        with contextlib.suppress(OSError):
            commit(store, key)
            failed -= 1
        failed += 1
        monkeypatch.setattr(module.os, call, real)
        again = Store(root)
        assert not again.has(key) or again.check(key) == ""
        assert list((root / "tmp").iterdir()) == []
        commit(again, key)
        assert Store(root).check(key) == ""
        if calls <= nth:
            break
    assert failed == nth >= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system, or mounts it again with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if os.path.ismount(disk) else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(disk)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode
        except OSError:
            done = 1
        if done:
            pytest.skip("allowed: a small file system cannot be mounted here")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_run_on_a_full_disk_goes_on_when_there_is_space(
    small_disk: Callable[[str], Path], smoke: Any, sleeper: Any, cli: Any, tmp_path: Path
) -> None:
    store = small_disk("size=600k") / "store"  # the first model fits, the second does not
    command = (*smoke.args, "--out", tmp_path / "out", "--store", store, "--no-site")
    answer = sleeper(*command)
    assert answer.code == 2, answer.err
    assert answer.err.splitlines()[-1].startswith(f"sleeperbench: cannot write the store {store}: No space left")
    before = set(Store(store).keys())
    assert before
    assert cli("store", "check", "--store", store).code == 0

    small_disk("size=50m")
    answer = sleeper(*command)
    assert answer.code == 0, answer.err
    assert f"computed {12 - len(before)} tasks" in answer.err
    assert figures(tmp_path / "out") == figures(smoke.out)

    small_disk("ro")
    for action in (("ls",), ("check",), ("export", tmp_path / "all.zip")):
        assert cli("store", *action, "--store", store).code == 0
    assert cli(*smoke.args, "--out", tmp_path / "other", "--store", store, "--no-site").code == 0, "nothing to write"
    answer = cli(*smoke.args, "--seeds", "1", "--out", tmp_path / "more", "--store", store, "--no-site")
    assert answer.code == 2
    assert f"cannot write the store {store}: Read-only file system" in answer.err


def test_what_is_damaged_again_and_again_fails_its_own_cells(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    """A disk that spoils the same artifact every time must not keep a run busy for ever."""
    from sleeperbench.engine.run import ATTEMPTS, Options, Run

    out = tmp_path / "out"
    (out / "rows").mkdir(parents=True)
    plan = make_plan()
    run = Run(
        plan=plan, registry=registry, options=Options(out=out, store=str(tmp_path / "store"), devices=["cpu"]), text=""
    )
    key = sorted(run.ledger.uses)[0]
    run.queue.want(key)
    for _ in range(ATTEMPTS - 1):
        run._gone(key)
        assert key not in run.failed
    run._gone(key)
    assert run.failed[key][0] == "failed"
    assert {r["status"] for r in run.ledger.rows[key]} == {"failed"}
    assert all("damaged" in r["reason"] for r in run.ledger.rows[key])
