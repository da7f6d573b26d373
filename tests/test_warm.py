"""Processes that find torch imported are otherwise as new interpreters are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import warm
from warm import Nursery

SHOW = """
import json, os, resource, sys, tempfile
print(json.dumps({
    "environ": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path, "name": __name__,
    "ours": sorted(m for m in sys.modules if m.partition(".")[0] == "sleeperbench"), "read": sys.stdin.read(),
    "data": resource.getrlimit(resource.RLIMIT_DATA), "leads": os.getsid(0) == os.getpid(),
    "temporary": tempfile.gettempdir(),
    "open": sorted(os.listdir("/proc/self/fd"))[:3],
}))
print("to standard error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def env(clean_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "odd.py").write_text("import os, sys\nsys.argv[1:] and os.kill(os.getpid(), 9)\nraise KeyError('x')\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    own = {"PYTHONPATH": str(tmp_path / "more"), "PYTHONHASHSEED": "0", "TMPDIR": str(tmp_path / "tmp")}
    return clean_env | own


def test_everything_that_a_process_is_given_is_there(nursery: Nursery, env: dict[str, str]) -> None:
    argv = [sys.executable, "-m", "show", "3", "a b"]
    cold = subprocess.run(
        argv, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, start_new_session=True
    )
    warm = nursery.run(argv, env)
    assert (warm.code, warm.err) == (cold.returncode, cold.stderr) == (3, "to standard error\n")
    assert json.loads(warm.out) == json.loads(cold.stdout)
    assert json.loads(warm.out)["ours"] == []
    assert json.loads(warm.out)["temporary"] == env["TMPDIR"]


def test_ends_are_told_apart(nursery: Nursery, env: dict[str, str]) -> None:
    raised = nursery.run([sys.executable, "-m", "odd"], env)
    assert raised.code == 1
    assert raised.err.splitlines()[0].startswith("Traceback") and raised.err.splitlines()[-1] == "KeyError: 'x'"
    assert nursery.run([sys.executable, "-m", "odd", "now"], env).code == -signal.SIGKILL


def test_another_process_may_ask_too(clean_env: dict[str, str]) -> None:
    """As pytest-xdist starts its processes: `python -u -c CODE`, which the opened nursery forks."""
    made, folder = Nursery(clean_env), tempfile.mkdtemp(dir="/tmp")  # a socket's path has 107 characters at most
    door = os.path.join(folder, "door")
    made.open(door)
    try:
        code = "import sys; there = 'torch' in sys.modules; print(there, __name__, sys.argv, input()); sys.exit(7)"
        argv = [sys.executable, warm.__file__, door, "-u", "-c", code]
        for said in ("one", "two"):
            done = subprocess.run(argv, input=said, env=clean_env, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (7, f"True __main__ ['-c'] {said}\n", "")
        other = Nursery({}, door)
        argv = [sys.executable, "-c", "print('here')"]
        assert [n.run(argv, clean_env).out for n in (made, other)] == ["here\n"] * 2
        other.close()
        assert made.run(argv, clean_env).code == 0, "it ends with the process that opened it alone"
        made.close()
        with pytest.raises(ConnectionRefusedError):
            Nursery({}, door).run(argv, clean_env)
    finally:
        made.close()
        shutil.rmtree(folder)
