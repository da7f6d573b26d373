"""In what order and in which pieces the test processes are handed the files."""

from __future__ import annotations

import re

LONGEST = [
    "contracts/test_registry_checks.py",
    "engine/test_hostile.py",
    "engine/test_kills.py",
    "browser/test_browser_pages.py",
    "engine/test_smoke_run.py",
    "engine/test_bad_input.py",
    "contracts/test_toys.py",
    "engine/test_leaks.py",
    "contracts/test_bad_plugins.py",
    "engine/test_sandbox.py",
    "contracts/test_add_a_defense.py",
    "engine/test_damage.py",
    "engine/test_leases.py",
    "engine/test_schedule.py",
    "engine/test_remote.py",
    "engine/test_sharing.py",
    "engine/test_questions.py",
    "browser/test_browser_table.py",
    "leaderboard/test_site_packed.py",
    "leaderboard/test_site_build.py",
]
"""Files that a process is given first, so that none is left alone with one of them at the end."""


def piece(nodeid: str) -> str:
    """Tests of one piece run in one process, in order. Defenses, more than half of all methods, make two pieces."""
    file, _, test = nodeid.partition("::")
    if not file.endswith(LONGEST[0]):
        return file
    found = re.search(r"\[(attack|defense|evaluator)/(\w+)", test)
    kind, name = found.groups() if found else ("attack", "")
    return f"{file}::{kind}{' m-z' if kind == 'defense' and name >= 'm' else ''}"
