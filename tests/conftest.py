"""What all tests share."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported by anything: many small tests are slower on two threads than on one.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import warm
from once import common
from pieces import LONGEST, piece
from warm import Answer, Nursery

ADDRESS = pytest.StashKey[str]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile`, but the first file of LONGEST, which has all methods, is handed out in pieces."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Pieces(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return piece(nodeid)

    return Pieces(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Test processes find the libraries imported, and their tests' processes fork from the same one."""
    if sys.platform != "linux" or not all(spec.popen and not spec.python for spec in specs):
        return
    folder = tempfile.TemporaryDirectory(prefix="nursery-", dir="/tmp")  # a socket's path has 107 characters at most
    config.add_cleanup(folder.cleanup)
    made = Nursery(os.environ)
    config.add_cleanup(made.close)
    config.stash[ADDRESS] = str(Path(folder.name) / "door")
    made.open(config.stash[ADDRESS])
    for spec in specs:
        spec.python = shlex.join([sys.executable, warm.__file__, config.stash[ADDRESS]])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["nursery"] = node.config.stash.get(ADDRESS, "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _trained_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one process has trained, the others find."""
    folder = common(tmp_path_factory) / "trained"
    folder.mkdir(exist_ok=True)
    stage = sys.modules.get("sleeperbench.testing.stage")  # imported while tests were collected, if any uses it
    if stage is not None:
        vars(stage)["shared"] = folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skip that nobody foresaw fails the run: what cannot run on a machine says so with `allowed: <why>`."""
    odd = [r for r in terminalreporter.getreports("skipped") if not _allowed(r)]
    for report in odd:
        terminalreporter.write_line(f"unexpected skip: {report.nodeid}: {report.longrepr}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Make an unexpected skip an error of the whole run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter and any(not _allowed(r) for r in reporter.getreports("skipped")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _allowed(report: pytest.TestReport) -> bool:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    return reason.removeprefix("Skipped: ").startswith("allowed: ")


# ---- processes -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def clean_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment of the tests' own: decoded data in a temporary folder, no settings of the user."""
    mine = {
        "SLEEPERBENCH_CACHE": str(tmp_path_factory.mktemp("cache")),
        "SLEEPERBENCH_DATA": str(tmp_path_factory.mktemp("data")),
        "OMP_NUM_THREADS": "1",
    }
    return {k: v for k, v in os.environ.items() if not k.startswith("SLEEPERBENCH_")} | mine


def with_path(env: dict[str, str], path: tuple[Path, ...]) -> dict[str, str]:
    """An environment in which folders of foreign distributions are on the path."""
    own = [env["PYTHONPATH"]] if "PYTHONPATH" in env else []
    return env | {"PYTHONPATH": os.pathsep.join([*map(str, path), *own])}


@pytest.fixture(scope="session")
def cold(clean_env: dict[str, str]) -> Callable[..., Answer]:
    """The command line in a new interpreter, as a user starts it; `path` are folders of foreign distributions."""

    def call(*argv: object, path: tuple[Path, ...] = (), before: tuple[str, ...] = ()) -> Answer:
        command = [*before, sys.executable, "-m", "sleeperbench", *map(str, argv)]
        env = with_path(clean_env, path)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
        return Answer(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def nursery(request: pytest.FixtureRequest, clean_env: dict[str, str]) -> Iterator[Nursery]:
    """Starts processes that find torch imported."""
    made = Nursery(clean_env, getattr(request.config, "workerinput", {}).get("nursery", ""))
    yield made
    made.close()


@pytest.fixture(scope="session")
def sleeper(clean_env: dict[str, str], nursery: Nursery) -> Callable[..., Answer]:
    """The command line in a process that finds torch imported; `path` and `more` add to its environment."""

    def call(*argv: object, path: tuple[Path, ...] = (), **more: str) -> Answer:
        command = [sys.executable, "-m", "sleeperbench", *map(str, argv)]
        return nursery.run(command, with_path(clean_env, path) | more)

    return call
