"""Holds every built-in method's version against its code: `make versions`.

versions.json keeps, per method, the version and the digest of the syntax tree that it was last written for. A method
whose tree changed while its version did not fails: its figures may have moved, and the store would serve the old ones.
`make versions ARGS=--write` enters new methods and raised versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.syntax import of_plugin

LOCK = Path(__file__).with_suffix(".json")
Entries = dict[str, dict[str, int | str]]


def current() -> Entries:
    """Version and digest of every built-in method."""
    registry = Registry.discover("none")
    found = [p for kind in ("attack", "defense", "evaluator") for p in registry.of(kind)]  # type: ignore[arg-type]
    return {
        f"{p.kind}/{p.id}": {"version": int(p.blueprint.info["version"]), "digest": of_plugin(p.value)} for p in found
    }


def differences(locked: Entries, now: Entries) -> tuple[list[str], list[str]]:
    """What must be mended in the code, and what only waits to be written down."""
    wrong, unwritten = [], []
    for name, entry in now.items():
        old = locked.get(name)
        if old is None:
            unwritten.append(f"{name} is new")
        elif int(entry["version"]) < int(old["version"]):
            wrong.append(f"{name} went from version {old['version']} back to {entry['version']}: versions only rise")
        elif entry["version"] != old["version"]:
            unwritten.append(f"{name} is now version {entry['version']}")
        elif entry["digest"] != old["digest"]:
            wrong.append(f"{name} changed and is still version {entry['version']}: raise `version` in its INFO")
    unwritten += [f"{name} is gone" for name in locked if name not in now]
    return wrong, unwritten


def main() -> int:
    """Compare, or write; 4 when something must be done."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--write", action="store_true", help="write what is new or raised")
    args = p.parse_args()
    now = current()
    wrong, unwritten = differences(json.loads(LOCK.read_text()) if LOCK.exists() else {}, now)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        return 4
    if unwritten and args.write:
        LOCK.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    for line in unwritten:
        print(
            f"{line}{': written' if args.write else '; run `make versions ARGS=--write` and commit it'}",
            file=sys.stderr,
        )
    return 4 if unwritten and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
