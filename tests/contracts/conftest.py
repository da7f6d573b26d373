"""What the tests of contracts share."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, a method's checks stay in one process, since they share its runs."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec and item.path.name == "test_registry_checks.py":
            method = callspec.params.get("method", callspec.params.get("plugin"))
            item.add_marker(pytest.mark.xdist_group(str(method)))
