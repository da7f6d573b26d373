from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache or data root."""
    monkeypatch.setenv("SLEEPERBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLEEPERBENCH_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("SLEEPERBENCH_PLUGINS", "none")
