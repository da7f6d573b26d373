"""Level `bwrap`: a defense reaches its own case and nothing else; without bubblewrap the run says what to install."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import plugins
import pytest
from safetensors.torch import load_file

from sleeperbench.cli import main
from sleeperbench.engine import sandbox

REACH = '''import ctypes, json, os, socket
from dataclasses import dataclass
from pathlib import Path
import torch
from sleeperbench import Access, Defense, Outcome

def attempt(what):
    try:
        return bool(what())
    except (OSError, KeyError):
        return False

def memory(pid):
    with open(f"/proc/{pid}/mem", "rb"):
        return True

@dataclass(frozen=True, kw_only=True)
class Reach(Defense):
    """Tries to get out."""
    INFO = {"title": "Reach", "version": 1, "api": 1, "kind": "repair", "paper": "", "micro": {}}
    ACCESS = Access(clean=0)
    port: int = 0
    parent: int = 0
    folder: str = ""

    def run(self, case):
        case.net
        folder = Path(self.folder)
        tries = {
            "parent_memory": lambda: memory(self.parent),
            "parent_files": lambda: os.listdir(f"/proc/{self.parent}/fd"),
            "network": lambda: socket.create_connection(("127.0.0.1", self.port), 2),
            "interfaces": lambda: len(socket.if_nameindex()) > 1,
            "home": lambda: os.listdir("/root") + os.listdir("/home"),
            "host_temporary": lambda: folder.exists(),
            "store": lambda: os.listdir(folder / "store"),
            "run": lambda: os.listdir(folder / "run"),
            "other_cells": lambda: [*Path("/tmp").glob("case-*"), *Path("/tmp").glob("sleeperbench-*")],
            "processes": lambda: len([p for p in os.listdir("/proc") if p.isdecimal()]) > 2,
            "write_system": lambda: Path("/usr/written").write_text("x"),
            "write_inputs": lambda: (Path.cwd().parent / "in" / "case.json").write_text("{}"),
            "passwords": lambda: os.listdir("/etc/ssl") + [Path("/etc/passwd").read_text()],
            "root": lambda: os.getuid() == 0,
            "more_namespaces": lambda: ctypes.CDLL(None).unshare(0x10000000) == 0,
            "environment": lambda: [k for k in os.environ if k.startswith("SLEEPERBENCH_") or k == "SECRET"],
        }
        got = {n: attempt(f) for n, f in tries.items()}
        own = {n: attempt(f) for n, f in {
            "scratch": lambda: (case.ctx.scratch / "x").write_text("x"),
            "temporary": lambda: Path("/tmp/x").write_text("x"),
            "inputs": lambda: (Path.cwd().parent / "in" / "case.json").read_text(),
        }.items()}
        return Outcome(chosen={"got": got, "own": own})
'''
PARTS = ("parent_memory", "parent_files", "network", "interfaces", "home", "host_temporary", "store", "run")
PARTS += ("other_cells", "processes", "write_system", "write_inputs", "passwords", "root", "more_namespaces")
PARTS += ("environment",)


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory, sleeper: Callable) -> dict[str, dict]:
    """Level -> what a defense got at, and what is its own; `c_acc` of a good one beside it."""
    if shutil.which("bwrap") is None:
        pytest.skip("allowed: bubblewrap is not installed")
    if sandbox.problem():
        pytest.skip(f"allowed: {sandbox.problem()}")
    folder = tmp_path_factory.mktemp("sandbox")
    dist = plugins.install(
        folder / "plugin", "reach", "1.0", {"reach.py": REACH}, {"sleeperbench.defenses": {"reach": "reach:Reach"}}
    )
    answers = {}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for level in sandbox.LEVELS:
            mine = folder / level
            sets = {"train.epochs": 1, "defense.ft.steps": 2}
            sets |= {
                "defense.reach/reach.port": listening.getsockname()[1],
                "defense.reach/reach.parent": os.getpid(),
                "defense.reach/reach.folder": f'"{mine}"',
            }
            args = ["run", "smoke", "--attack", "none", "--evaluator", "accuracy", "--defense", "ft"]
            args += ["--defense", "reach/reach", "--jobs", 1, "--device", "cpu", "--no-site", "--sandbox", level]
            for k, v in sets.items():
                args += ["--set", f"{k}={v}"]
            args += ["--out", mine / "run", "--store", mine / "store"]
            # Within bubblewrap the defense runs in an interpreter of its own, whatever started bubblewrap.
            answer = sleeper(*args, path=(dist,), SECRET="1")
            assert answer.code == 0, answer.err
            manifests = [json.loads(f.read_text()) | {"at": f.parent} for f in mine.rglob("manifest.json")]
            own = next(m for m in manifests if m["task"]["name"] == "reach/reach")
            answers[level] = json.loads((own["at"] / "outcome.json").read_text())["chosen"]
            tuned = next(m for m in manifests if m["task"]["name"] == "ft")
            answers[level]["model"] = load_file(tuned["at"] / "model.safetensors")
            answers[level]["rows"] = pd.read_parquet(mine / "run" / "measurements.parquet")
            answers[level]["about"] = json.loads((mine / "run" / "run.json").read_text())
    return answers


@pytest.mark.parametrize("part", PARTS)
def test_is_out_of_reach(reached: dict[str, dict], part: str) -> None:
    assert reached["bwrap"]["got"].keys() == set(PARTS)
    assert reached["bwrap"]["got"][part] is False


def test_the_tries_succeed_without_bubblewrap(reached: dict[str, dict]) -> None:
    """The same code gets at what level `process` does not guard, so the tries are not vain."""
    got = reached["process"]["got"]
    open_there = {"network", "host_temporary", "store", "run", "processes", "write_inputs"}
    assert {n for n in open_there if not got[n]} == set()
    assert not got["environment"]


def test_its_own_case_is_there(reached: dict[str, dict]) -> None:
    assert reached["bwrap"]["own"] == {"scratch": True, "temporary": True, "inputs": True}


def test_figures_do_not_depend_on_the_level(reached: dict[str, dict]) -> None:
    a, b = (reached[level]["model"] for level in sandbox.LEVELS)
    assert a.keys() == b.keys()
    assert all(bool((a[k] == b[k]).all()) for k in a)
    values = [r["rows"][r["rows"].defense.str.startswith("ft")].value.dropna().tolist() for r in reached.values()]
    assert values[0] == values[1]
    assert values[0]


def test_the_level_stands_in_run_json(reached: dict[str, dict]) -> None:
    assert {level: r["about"]["sandbox"] for level, r in reached.items()} == {n: n for n in sandbox.LEVELS}


def test_without_bubblewrap_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["run", "smoke", "--sandbox", "bwrap", "--out", str(tmp_path / "run")]) == 2
    assert "apt-get install bubblewrap" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_refused_namespaces_are_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake = tmp_path / "bin" / "bwrap"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    sandbox._bwrap.cache_clear()
    try:
        assert main(["run", "smoke", "--sandbox", "bwrap", "--out", str(tmp_path / "run")]) == 2
    finally:
        sandbox._bwrap.cache_clear()
    said = capsys.readouterr().err
    assert "No permissions to create new namespace" in said
    assert "--sandbox process" in said


def test_a_store_below_the_code_is_covered(tmp_path: Path) -> None:
    """A PYTHONPATH that holds the store too must not open it."""
    if shutil.which("bwrap") is None:
        pytest.skip("allowed: bubblewrap is not installed")
    if sandbox.problem():
        pytest.skip(f"allowed: {sandbox.problem()}")
    case, store = tmp_path / "case", tmp_path / "code" / "store"
    for folder in (case / "in", case / "scratch", store):
        folder.mkdir(parents=True)
    (store / "secret").write_text("x")
    (tmp_path / "code" / "plugin.py").write_text("")
    for hidden, seen in (([], ["secret"]), ([store], [])):
        full = sandbox.command(case, code=[tmp_path / "code"], hidden=hidden, cuda=False, share=1.0)
        shell = [*full[: full.index("--", 1)], "--", "/bin/ls", str(store)]
        said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split()
        assert said == seen
