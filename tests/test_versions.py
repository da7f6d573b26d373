"""A method whose code changed raised its version."""

from __future__ import annotations

import json
from pathlib import Path

import versions

import sleeperbench.attacks.badnets as badnets
from sleeperbench.engine.syntax import fingerprint, of_plugin

SOURCE = '''
"""A method."""
class Thing:
    """Does it."""
    INFO = {"title": "Thing", "version": 1}
    def run(self, x):
        """Run."""
        return x + 1  # why
'''


def test_every_method_stands_with_its_version_and_digest() -> None:
    assert versions.differences(json.loads(versions.LOCK.read_text()), versions.current()) == ([], [])


def test_words_and_version_do_not_change_the_digest_and_code_does() -> None:
    same = (
        SOURCE.replace("Does it.", "Does it well.")
        .replace("# why", "# because")
        .replace('"version": 1', '"version": 2, "control": True')
    )
    assert fingerprint(same) == fingerprint(SOURCE)
    assert fingerprint(SOURCE.replace("x + 1", "x - 1")) != fingerprint(SOURCE)
    assert fingerprint(SOURCE.replace('"title": "Thing"', '"title": "Other"')) != fingerprint(SOURCE)
    assert fingerprint('x = {"control": 1}') != fingerprint("x = {}"), "elsewhere than in INFO it is code"


def test_a_changed_method_must_raise_its_version() -> None:
    old = {"defense/a": {"version": 1, "digest": "x"}}
    assert versions.differences(old, {"defense/a": {"version": 1, "digest": "y"}})[0] == [
        "defense/a changed and is still version 1: raise `version` in its INFO"
    ]
    assert versions.differences(old, {"defense/a": {"version": 2, "digest": "y"}}) == (
        [],
        ["defense/a is now version 2"],
    )
    assert versions.differences(old, {"defense/a": {"version": 0, "digest": "y"}})[0]
    assert versions.differences(old, {}) == ([], ["defense/a is gone"])


def test_a_changed_module_of_the_kit_must_be_looked_at() -> None:
    old = {"kit/masks": {"digest": "x"}}
    assert versions.differences(old, {"kit/masks": {"digest": "x"}}) == ([], [])
    wrong, unwritten = versions.differences(old, {"kit/masks": {"digest": "y"}})
    assert not wrong
    assert unwritten == ["kit/masks changed: raise the version of every method whose figures move"]


def test_a_module_of_the_kit_knows_whom_it_reaches() -> None:
    reached = versions.shared()
    assert "defense/neural_cleanse" in reached["sleeperbench.kit.masks"]
    assert "defense/anp" in reached["sleeperbench.kit.select"], "through kit.candidates"
    assert "defense/ft" not in reached["sleeperbench.kit.masks"]


def test_the_digest_of_a_plugin_is_that_of_its_file() -> None:
    assert of_plugin("sleeperbench.attacks.badnets:BadNets") == fingerprint(Path(badnets.__file__).read_text())
    assert of_plugin("no.such.module:Thing") == ""
