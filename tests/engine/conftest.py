"""What the engine's tests share: small suites, plans without data, the command line, one finished smoke run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plugins
import pytest
from once import once
from warm import Answer

from sleeperbench.engine.plan import Dataset, Plan, Planner
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import Changes, Suite, build

MATRIX: dict[str, Any] = {
    "datasets": ["digits"],
    "archs": ["small_cnn"],
    "attacks": ["none", "badnets"],
    "rates": [0.1],
    "defenses": ["none", "ft"],
    "evaluators": ["accuracy"],
    "seeds": [0],
}

TROUBLE = '''import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from sleeperbench import Access, Defense, Outcome

@dataclass(frozen=True, kw_only=True)
class Trouble(Defense):
    """Does what a defense must not do, until a file says otherwise."""
    INFO = {"title": "Trouble", "version": 1, "api": 1, "kind": "repair", "paper": "", "micro": {}}
    ACCESS = Access(clean=0)
    mode: Literal["raise", "hang", "nan"] = "raise"
    path: str = ""
    nth: int = 0

    def run(self, case):
        if self.path and Path(self.path).is_file():
            return Outcome()
        if self.mode == "raise":
            raise RuntimeError("trouble on purpose")
        if self.path and Path(self.path).is_fifo():
            with open(self.path, "w") as f:
                f.write(str(os.getpid()))
        while True:
            pass
'''


def toml(*, tail: str = "", head: str = 'schema = 1\nname = "tiny"\n', **matrix: Any) -> str:
    """The text of a small suite; `tail` are further tables."""
    lines = [f"{k} = {v!r}" for k, v in (MATRIX | matrix).items() if v is not None]
    return head + "[matrix]\n" + "\n".join(lines) + "\n" + tail


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry.discover("none")


@pytest.fixture
def suite_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**parts: Any) -> Path:
        file = tmp_path / "tiny.toml"
        file.write_text(toml(**parts), encoding="utf-8")
        return file

    return write


@pytest.fixture
def make_suite(registry: Registry, suite_file: Callable[..., Path]) -> Callable[..., Suite]:
    def make(changes: Changes | None = None, **parts: Any) -> Suite:
        return build(str(suite_file(**parts)), registry, changes or Changes())[0]

    return make


@pytest.fixture
def make_plan(registry: Registry, make_suite: Callable[..., Suite]) -> Callable[..., Plan]:
    """A plan on made-up data sets; `digest` stands for their pixels."""

    def make(changes: Changes | None = None, digest: str = "d", **parts: Any) -> Plan:
        suite = make_suite(changes, **parts)
        datasets = {
            name: Dataset(
                name=name,
                shape=(1, 16, 16),
                classes=10,
                norm=((0.5,), (0.5,)),
                pad=1,
                flip=False,
                rows={"train": 1000, "test": 400},
                digests={"train": digest, "test": digest},
                canonical=True,
            )
            for name in suite.datasets
        }
        return Planner(suite, registry, datasets).build()

    return make


@pytest.fixture
def cli(
    clean_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """The command line, in this process; for what starts no worker or one that needs no foreign plugin."""
    for key in ("SLEEPERBENCH_STORE", "SLEEPERBENCH_PLUGINS"):
        monkeypatch.delenv(key, raising=False)
    for key in ("SLEEPERBENCH_CACHE", "SLEEPERBENCH_DATA"):
        monkeypatch.setenv(key, clean_env[key])

    def call(*argv: object) -> Answer:
        from sleeperbench.cli import main

        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = int(e.code or 0)
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


@dataclass(frozen=True)
class Smoke:
    out: Path
    store: Path
    answer: Answer
    args: tuple[str, ...]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, cold: Callable[..., Answer]) -> Smoke:
    """The suite `smoke`, run once by whichever test process comes first; tests copy what they change."""
    args = ("run", "smoke", "--set", "defense.ft.steps=20", "--jobs", "1", "--device", "cpu")

    def run(folder: Path) -> None:
        answer = cold(*args, "--out", folder / "out", "--store", folder / "store")
        (folder / "answer.json").write_text(json.dumps(asdict(answer)))

    folder = once(tmp_path_factory, "smoke-run", run)
    said = json.loads((folder / "answer.json").read_text())
    return Smoke(folder / "out", folder / "store", Answer(**said), args)


@pytest.fixture(scope="session")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foreign distribution whose defense raises, hangs or waits."""
    return plugins.install(
        tmp_path_factory.mktemp("trouble"),
        "trouble",
        "1.0",
        {"trouble.py": TROUBLE},
        {"sleeperbench.defenses": {"trouble": "trouble:Trouble"}},
    )
