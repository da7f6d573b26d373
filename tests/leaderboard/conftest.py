from __future__ import annotations

from pathlib import Path

import pytest
import synthetic
from page_reader import Page, read

from sleeperbench.leaderboard.build import build


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.hostile_run(tmp_path_factory.mktemp("runs") / "hostile")


@pytest.fixture(scope="session")
def site(hostile_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([hostile_run], tmp_path_factory.mktemp("site") / "out").parent


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    return {p.relative_to(site).as_posix(): read(p) for p in sorted(site.rglob("*.html"))}
