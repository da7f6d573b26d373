from __future__ import annotations

from pathlib import Path

import pytest
import synthetic
from once import once
from page_reader import Page, read

from sleeperbench.leaderboard.build import build


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "hostile-run", lambda folder: synthetic.hostile_run(folder / "hostile")) / "hostile"


@pytest.fixture(scope="session")
def site(hostile_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "hostile-site", lambda folder: build([hostile_run], folder / "out")) / "out"


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    return {p.relative_to(site).as_posix(): read(p) for p in sorted(site.rglob("*.html"))}
