"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported by anything: many small tests are slower on two threads than on one.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


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
