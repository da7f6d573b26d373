"""Debian's chromium, headless, on a site of made-up tables; every page that a test opens is watched to its end."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from visiting import ROWS_A_PAGE, Board, Open, Watch, run_folder

from sleeperbench.leaderboard import table
from sleeperbench.leaderboard.build import build


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    run = run_folder(tmp_path_factory.mktemp("runs") / "made-up")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "PER_PAGE", ROWS_A_PAGE)
        folder = build([run], tmp_path_factory.mktemp("site")).parent
    return Board(folder, pq.read_table(folder / "downloads" / "cells.parquet").to_pylist())


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("allowed: no chromium on this machine")
    with sync_playwright() as playwright:
        # Nothing is drawn on a screen, and all pages are of one site.
        browser = playwright.chromium.launch(executable_path=found, args=["--disable-gpu", "--process-per-site"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser, board: Board) -> Iterator[Open]:
    """Opens a page of the site in a fresh context; at the end of the test no page may have failed or asked for more."""
    watch = Watch(board.folder.as_uri())
    with contextlib.ExitStack() as stack:

        def visit(path: str, **options: Any) -> Page:
            context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
            stack.callback(context.close)
            context.set_default_timeout(5_000)
            page = context.new_page()
            watch.attach(page)
            page.goto(board.url(path))
            return page

        yield visit
    assert watch.wrong == []
