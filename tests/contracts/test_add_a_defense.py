"""docs/add-a-defense.md is true: its two files are installed as a foreign distribution and its commands are run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import plugins
import pytest
from warm import Answer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-defense.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_the_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: Callable[..., Answer]) -> None:
    (toml,), (code,) = blocks("toml"), blocks("python")
    project = tomllib.loads(toml)
    (module,) = project["tool"]["setuptools"]["py-modules"]
    about = project["project"]
    folder = plugins.install(tmp_path, about["name"], about["version"], {f"{module}.py": code}, about["entry-points"])
    monkeypatch.chdir(tmp_path)

    ran = 0
    for block in blocks("console"):
        for command in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, *expected = command.splitlines()
            program, *argv = line.split()
            if program == "pip":
                continue
            assert program == "sleeperbench"
            answer = sleeper(*argv, path=(folder,))
            assert answer.code == 0, (line, answer.err)
            printed = answer.out
            for wanted in expected:
                assert re.search(r"\s+".join(map(re.escape, wanted.split())), squeezed(printed)), (
                    line,
                    wanted,
                    printed,
                )
            ran += 1
    assert ran == 4


def squeezed(printed: str) -> str:
    """What was printed, without the times that `check` shows."""
    return re.sub(r"\d+\.\d\d s\b", " ", printed)
