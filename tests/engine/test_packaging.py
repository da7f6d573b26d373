"""The wheel: what is in it, that it works where nothing else of the checkout is, and that folders keep their names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmark", "attacks", "defenses", "evaluators", "leaderboard", "data")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {n.partition("/")[0] for n in names}
    (info,) = tops - {"sleeperbench"}
    assert info.endswith(".dist-info")
    assert "sleeperbench/py.typed" in names
    assert any(n.startswith(f"{info}/licenses/") and n.endswith("LICENSE") for n in names)
    assert not any(
        "test" in Path(n).name or n.endswith(".pyc") for n in names if not n.startswith("sleeperbench/testing")
    )
    wanted = {f"sleeperbench/suites/{p.name}" for p in (ROOT / "benchmark/suites").glob("*.toml")}
    for folder in FOLDERS:
        base = "sleeperbench" if folder == "benchmark" else f"sleeperbench/{folder}"
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        wanted |= {f"{base}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
    assert wanted - names == set()  # every module, template and static file
    assert names - wanted == {n for n in names if n.startswith(info)}


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel, and the dependencies through a path file."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    made = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--quiet", "--python", made, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    (packages,) = home.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def test_the_installed_wheel_works(python: Path, tmp_path: Path) -> None:
    def ask(*argv: str) -> str:
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ask(str(python), "-m", "sleeperbench", "--version").startswith("sleeperbench ")
    where = ask(str(python), "-c", "import sleeperbench; print(sleeperbench.__file__)")
    assert str(python.parents[1]) in where
    found = json.loads(ask(str(python.parent / "sleeperbench"), "list", "--json"))
    assert {("attack", "badnets"), ("defense", "ft"), ("suite", "quick")} <= {(r["kind"], r["id"]) for r in found}
    assert {r["status"] for r in found if r["kind"] == "suite"} == {"ok"}
    ask(
        str(python), "-c", "import importlib.resources as r; assert list(r.files('sleeperbench.leaderboard').iterdir())"
    )


def test_folders_refuse_their_bare_names() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    try:\n        importlib.import_module(name)\n"
    code += "    except ImportError as e:\n        print(name, 'sleeperbench' in str(e))\n"
    done = subprocess.run([sys.executable, "-c", code, *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} True" for name in FOLDERS]
