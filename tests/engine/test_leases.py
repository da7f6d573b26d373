"""Leases: one process at a time computes a task, the dead let go, and two runs share the work of one store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shorts
from warm import Nursery

from sleeperbench.engine import lease, rows
from sleeperbench.engine.lease import LeaseFolder, Leases, identity, stale
from sleeperbench.schema import VOLATILE

KEY = "ab" * 32


def figures(out: Path) -> list[list[dict[str, Any]]]:
    files = ("measurements.parquet", "cells.parquet")
    return [[{k: v for k, v in r.items() if k not in VOLATILE} for r in rows.read_table(out / f)] for f in files]


def unlike(first: Path, second: Path) -> list[dict[str, Any]]:
    """What differs between the tables of two runs, row by row."""
    found = []
    for ours, theirs in zip(figures(first), figures(second), strict=True):
        assert len(ours) == len(theirs)
        for r, s in zip(ours, theirs, strict=True):
            if odd := {k: (r[k], s[k]) for k in r if r[k] != s[k]}:
                found.append({"cell": r["cell"], "metric": r.get("metric")} | odd)
    return found


def content(**changes: Any) -> bytes:
    return json.dumps(identity() | {"run": "r", "token": "t"} | changes).encode()


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds; what is waited for takes far less."""
    tick = threading.Event()
    return any(condition() or tick.wait(0.01) for _ in range(1000))


@pytest.fixture
def place(tmp_path: Path) -> LeaseFolder:
    return LeaseFolder(tmp_path / "leases")


def test_one_holder_at_a_time(place: LeaseFolder) -> None:
    with Leases(place).hold(KEY) as mine:
        assert mine
        assert place.lease_keys() == [KEY]
        with Leases(place).hold(KEY) as other:
            assert not other
        assert place.lease_keys() == [KEY]
        with Leases(place).hold("cd" * 32) as elsewhere:
            assert elsewhere
    assert place.lease_keys() == []
    with Leases(place).hold(KEY) as again:
        assert again


def test_the_leases_of_the_dead_are_cleared_and_no_others(place: LeaseFolder) -> None:
    place.create_lease(KEY, content(pid=2**22 + 1))  # above the largest process number
    place.create_lease("cd" * 32, content())
    assert lease.clear(place) == 1
    assert place.lease_keys() == ["cd" * 32]


def test_a_lease_goes_when_its_task_raises(place: LeaseFolder) -> None:
    with pytest.raises(RuntimeError), Leases(place).hold(KEY):
        raise RuntimeError
    assert place.lease_keys() == []


def test_a_lease_says_whose_it_is(place: LeaseFolder) -> None:
    leases = Leases(place)
    leases.run = "runs/quick"
    with leases.hold(KEY):
        seen = json.loads(place.read_lease(KEY) or b"")
    assert (seen["pid"], seen["run"]) == (os.getpid(), "runs/quick")
    assert seen["host"]


def test_three_missed_beats_make_it_stale(place: LeaseFolder) -> None:
    place.create_lease(KEY, content(host="elsewhere"))
    assert not stale(place, KEY, content(host="elsewhere"))
    for age, old in ((lease.BEAT * lease.MISSED - 5, False), (lease.BEAT * lease.MISSED + 5, True)):
        now = (place.folder / KEY).stat().st_atime
        os.utime(place.folder / KEY, (now, now - age))
        assert stale(place, KEY, content(host="elsewhere")) is old
    with Leases(place).hold(KEY) as taken:
        assert taken


def test_a_holder_renews(place: LeaseFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    with Leases(place).hold(KEY):
        os.utime(place.folder / KEY, (0, 0))
        assert eventually(lambda: (place.folder / KEY).stat().st_mtime > 0)


def test_a_holder_whose_lease_was_taken_leaves_it_alone(place: LeaseFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    with Leases(place).hold(KEY):
        thread = next(t for t in threading.enumerate() if t.name == f"lease {KEY[:12]}")
        (place.folder / KEY).write_bytes(b"another's")
        os.utime(place.folder / KEY, (0, 0))
        assert eventually(lambda: not thread.is_alive())
        assert (place.folder / KEY).stat().st_mtime == 0
    assert place.read_lease(KEY) == b"another's"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the start time of a process")
def test_a_dead_owner_on_this_host_holds_nothing(place: LeaseFolder) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sleeperbench.engine.lease import LeaseFolder, Leases\n"
        "with Leases(LeaseFolder(Path(sys.argv[1]))).hold(sys.argv[2]) as held:\n"
        "    print(held, flush=True); sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(place.folder), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout and owner.stdin
    assert owner.stdout.readline() == b"True\n"
    with Leases(place).hold(KEY) as held:
        assert not held
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the table of processes
    with Leases(place).hold(KEY) as held:
        assert held
    owner.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the start time of a process")
def test_whose_death_can_be_judged(place: LeaseFolder) -> None:
    place.create_lease(KEY, b"")
    assert not stale(place, KEY, content())
    assert stale(place, KEY, content(start="1")), "a later process of the same number is not the owner"
    for name in ("host", "boot", "namespace"):
        assert not stale(place, KEY, content(start="1", **{name: "another"})), "no number of ours"
    assert not stale(place, KEY, b"half wri")


def test_a_stale_lease_is_taken_once(place: LeaseFolder) -> None:
    """Of two that saw the same stale lease, the slower one must not remove the lease of the faster."""
    place.create_lease(KEY, b"stale")
    place.drop_lease(KEY, b"stale")
    place.create_lease(KEY, b"of the faster")
    place.drop_lease(KEY, b"stale")
    assert place.read_lease(KEY) == b"of the faster"
    assert [p.name for p in place.folder.iterdir()] == [KEY]


def test_two_runs_on_one_store_share_the_work(
    smoke: Any, nursery: Nursery, clean_env: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sleeperbench", *smoke.args, "--no-site", "--store", str(tmp_path / "store")]
    runs = [nursery.start([*command, "--out", str(tmp_path / n)], clean_env) for n in ("a", "b")]
    said = [r.communicate(timeout=300)[1] for r in runs]
    assert [r.returncode for r in runs] == [0, 0], said
    computed = [int(re.findall(r"computed (\d+) tasks", s)[0]) for s in said]
    assert sum(computed) == 12, said
    assert unlike(tmp_path / "a", tmp_path / "b") == []
    assert unlike(tmp_path / "a", smoke.out) == []
    assert list((tmp_path / "store" / "leases").iterdir()) == list((tmp_path / "store" / "tmp").iterdir()) == []


def test_a_gate_opens_when_another_run_decides_it(
    smoke: Any, nursery: Nursery, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """The last figure that a gate needs is another run's, and nothing else is left to do meanwhile."""
    store, out, aside = shutil.copytree(smoke.store, tmp_path / "store"), tmp_path / "out", tmp_path / "aside"
    table = rows.read_table(smoke.out / "measurements.parquet")
    (last,) = {r["task_key"] for r in table if "/badnets@0.1/none/" in r["cell"] and r["metric"] == "asr"}
    behind = {k for r in table if "/badnets@0.1/ft" in r["cell"] for k in (r["task_key"], r["defense_key"])}
    assert len(behind) == 2
    for key in behind:
        shutil.rmtree(store / key[:2] / key)
    os.rename(store / last[:2] / last, aside)
    with Leases(LeaseFolder(store / "leases")).hold(last) as mine:
        assert mine
        command = [sys.executable, "-m", "sleeperbench", *smoke.args, "--no-site", "--store", str(store)]
        run = nursery.start([*command, "--out", str(out)], clean_env)
        journal = out / "tasks.jsonl"
        assert shorts.until(lambda: journal.exists() and '"leased"' in journal.read_text(), 60)
        os.rename(aside, store / last[:2] / last)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "computed 2 tasks" in said
    assert unlike(out, smoke.out) == []
