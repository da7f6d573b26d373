"""Kills at random moments: what was finished stays, the rest is computed, the tables are those of a quiet run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import shorts
from warm import Nursery

KILLS = int(os.environ.get("KILLS", "8"))


@pytest.fixture(scope="module")
def env(clean_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return clean_env | {"PYTHONPATH": str(shorts.install(tmp_path_factory.mktemp("short")))}


@pytest.fixture(scope="module")
def quiet(
    env: Mapping[str, str], nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, float]:
    """The suite, a run folder that nothing disturbed, and how long it took in seconds.

    Defenses wait while there is a file `hold` beside the suite.
    """
    folder = tmp_path_factory.mktemp("quiet")
    file = shorts.suite(folder / "short.toml", f'[defense."short/idle"]\nwait = "{folder / "hold"}"\n')
    assert nursery.run(["python", "-m", "sleeperbench", "--version"], env).code == 0  # the libraries are imported
    begin = time.monotonic()
    done = nursery.run(shorts.command(file, folder / "out", "--store", folder / "store"), env)
    assert done.code == 0, done.err
    return file, folder / "out", time.monotonic() - begin


def computed(store: Path) -> int:
    return len(list(store.glob("[0-9a-f][0-9a-f]/*/manifest.json")))


def test_kills_of_the_whole_group(
    env: Mapping[str, str], nursery: Nursery, quiet: tuple[Path, Path, float], tmp_path: Path
) -> None:
    file, undisturbed, seconds = quiet
    rng = random.Random(1)
    whole = computed(undisturbed.parent / "store")
    out, store = tmp_path / "out", tmp_path / "store"
    killed = partial = 0
    while killed < KILLS:
        process = nursery.start(shorts.command(file, out, "--store", store), env)
        deadline = time.monotonic() + rng.uniform(0.05, 0.9) * seconds
        seen: dict[int, str] = {}
        while process.poll() is None and time.monotonic() < deadline:
            seen |= shorts.family(process.pid)
            shorts.select_pause()
        if process.poll() is None:
            seen |= shorts.family(process.pid)
            shorts.kill_group(process)
            killed += 1
        del seen[process.pid]
        assert shorts.until(lambda processes=seen: not shorts.alive(processes), 20), shorts.alive(seen)
        partial += 0 < computed(store) < whole
        if process.returncode == 0:  # it came to its end before its time: begin anew
            assert shorts.tables(out) == shorts.tables(undisturbed)
            out, store = tmp_path / f"out{seconds}", tmp_path / f"store{seconds}"
            seconds *= 0.7  # the machine got faster since the undisturbed run
        else:
            assert process.returncode == -signal.SIGKILL
    done = nursery.run(shorts.command(file, out, "--store", store), env)
    assert done.code == 0, done.err
    assert shorts.tables(out) == shorts.tables(undisturbed)
    assert partial, "no kill fell between the first and the last task"
    assert list((store / "leases").glob("[0-9a-f]*")) == []
    assert computed(store) == whole


def serving(pid: int) -> tuple[int, int] | None:
    """Worker and fork server of a run: the grandparent and the parent of the defense at work."""
    found = shorts.family(pid)
    for p in found:
        try:
            at_work = "/case-" in os.readlink(f"/proc/{p}/cwd")
        except OSError:
            continue
        server = int(shorts.stat(p)[1]) if at_work and shorts.stat(p) else 0
        worker = int(shorts.stat(server)[1]) if server in found and shorts.stat(server) else 0
        if worker in found and pid not in (server, worker):
            return worker, server
    return None


def test_kills_of_workers_and_fork_servers(
    env: Mapping[str, str], nursery: Nursery, quiet: tuple[Path, Path, float], tmp_path: Path
) -> None:
    file, undisturbed, _ = quiet
    hold, out = file.with_name("hold"), tmp_path / "out"
    hold.touch()  # so that the run cannot end before the kills
    process = nursery.start(shorts.command(file, out, "--store", tmp_path / "store"), env)
    try:
        first = shorts.until(lambda: serving(process.pid))
        assert first
        os.kill(first[0], signal.SIGKILL)
        second = shorts.until(lambda: (s := serving(process.pid)) and s[0] != first[0] and s)
        assert second
        os.kill(second[1], signal.SIGKILL)
        third = shorts.until(lambda: (s := serving(process.pid)) and s[1] != second[1] and s)
        assert third and third[1] != first[1]
    finally:
        hold.unlink()
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert shorts.tables(out) == shorts.tables(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(number: signal.Signals, env: Mapping[str, str], nursery: Nursery, tmp_path: Path) -> None:
    hold, out, store = tmp_path / "hold", tmp_path / "out", tmp_path / "store"
    hold.touch()
    file = shorts.suite(tmp_path / "short.toml", f'[defense."short/idle"]\nwait = "{hold}"\n', seeds=[0])
    process = nursery.start(shorts.command(file, out, "--store", store), env)
    assert shorts.until(lambda: _journal(out).count('"short/gate"') == 2)  # the next task is held
    seen = shorts.family(process.pid)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in err
    assert shorts.until(lambda: not shorts.alive({k: v for k, v in seen.items() if k != process.pid}), 20)
    cells = {c["cell"]: c["status"] for c in shorts.tables(out)[1]}
    assert cells["digits/small_cnn/badnets@0.1/none/s0"] == "ok"
    assert json.loads((out / "run.json").read_bytes())["exit"] == 130
    hold.unlink()
    before = computed(store)
    again = nursery.run(shorts.command(file, out, "--store", store), env)
    assert again.code == 0, again.err
    assert f"computed {computed(store) - before} tasks" in again.err
    assert computed(store) > before


def _journal(out: Path) -> str:
    try:
        return (out / "tasks.jsonl").read_text()
    except OSError:
        return ""


def test_lost_workers_are_tried_three_times_and_raising_ones_once(
    env: Mapping[str, str], nursery: Nursery, tmp_path: Path
) -> None:
    notes = {n: tmp_path / n for n in ("twice", "thrice", "raised")}
    for name, times in (("twice", 2), ("thrice", 3)):
        tail = f'[evaluator."short/dies"]\nnote = "{notes[name]}"\ntimes = {times}\n'
        tail += f'[defense."short/fails"]\nnote = "{notes["raised"]}"\n'
        file = shorts.suite(
            tmp_path / f"{name}.toml",
            tail,
            attacks=["none"],
            defenses=["none", "short/fails"] if name == "twice" else ["none"],
            evaluators=["short/dies", "short/n0"],
            seeds=[0],
        )
        out = tmp_path / f"out-{name}"
        done = nursery.run(shorts.command(file, out, "--store", tmp_path / "store"), env)
        assert done.code == 1, done.err
        rows: Any = {(r["defense"], r["metric"]): r for r in shorts.tables(out)[0]}
        row = rows["none", "lives"]
        assert notes[name].read_text() == "xxx"
        assert rows["none", "number"]["status"] == "ok"  # it shared the job, or not: it is not lost with the other
        if name == "twice":
            assert (row["status"], row["value"]) == ("ok", 3.0)
            assert rows["short/fails", "number"]["status"] == "failed"
            assert notes["raised"].read_text() == "tried "
        else:
            assert row["status"] == "failed"
            assert row["reason"] == "raised: the worker process ended (signal 9)"
