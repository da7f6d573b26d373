"""Holds every built-in method's version against its code: `make versions`.

versions.json keeps, per method, the version and the digest of the syntax tree that it was last written for. A method
whose tree changed while its version did not fails: its figures may have moved, and the store would serve the old ones.
`make versions ARGS=--write` enters new methods and raised versions.

What methods share lies in sleeperbench.kit and in methods that others build on. Its modules have no versions, so their
digests stand beside: where one changed, every method that it reaches is named, and writing it down says that somebody
has looked which of their figures move, and raised those versions.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from sleeperbench.engine.registry import Registry
from sleeperbench.engine.source import locate
from sleeperbench.engine.syntax import fingerprint, of_plugin

LOCK = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parent.parent
METHODS = ("sleeperbench.attacks.", "sleeperbench.defenses.", "sleeperbench.evaluators.")
Entries = dict[str, dict[str, int | str]]


def methods() -> dict[str, Any]:
    """Name -> plugin, of every built-in method."""
    registry = Registry.discover("none")
    found = [p for kind in ("attack", "defense", "evaluator") for p in registry.of(kind)]  # type: ignore[arg-type]
    return {f"{p.kind}/{p.id}": p for p in found}


def imported(module: str) -> set[str]:
    """Modules that a module of the package imports, by `import` or `from ... import`, read and not run."""
    text = Path(locate(module).origin or "").read_text(encoding="utf-8")
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def shared() -> dict[str, list[str]]:
    """Module of the kit -> the methods that it reaches, directly or through other modules of the kit."""
    kit = {f"sleeperbench.kit.{f.stem}" for f in (ROOT / "benchmark" / "kit").glob("[a-z]*.py")}
    below = {m: imported(m) & kit for m in kit}
    reached: dict[str, list[str]] = {m: [] for m in sorted(kit)}
    for name, p in methods().items():
        module = p.value.partition(":")[0]
        todo, seen = [module], {module}
        while todo:
            m = todo.pop()
            own = below[m] if m in below else {i for i in imported(m) if i in kit or i.startswith(METHODS)}
            new = {i for i in own if i not in seen and (i in kit or i.count(".") == 2)}
            seen |= new
            todo += new
        for m in seen & kit:
            reached[m].append(name)
    return reached


def current() -> Entries:
    """Version and digest of every built-in method, and the digest of every module of the kit that one uses."""
    found: Entries = {
        name: {"version": int(p.blueprint.info["version"]), "digest": of_plugin(p.value)}
        for name, p in methods().items()
    }
    for module, users in shared().items():
        if users:
            text = Path(locate(module).origin or "").read_text(encoding="utf-8")
            found[f"kit/{module.rpartition('.')[2]}"] = {"digest": fingerprint(text)}
    return found


def differences(locked: Entries, now: Entries) -> tuple[list[str], list[str]]:
    """What must be mended in the code, and what only waits to be written down."""
    wrong, unwritten = [], []
    for name, entry in now.items():
        old = locked.get(name)
        if old is None:
            unwritten.append(f"{name} is new")
        elif "version" not in entry:
            if entry["digest"] != old["digest"]:
                unwritten.append(f"{name} changed: raise the version of every method whose figures move")
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
    users = shared() if any(line.startswith("kit/") for line in unwritten) else {}
    for line in unwritten:
        module, _, changed = line.removeprefix("kit/").partition(" ")
        if line.startswith("kit/") and changed.startswith("changed"):
            line += f" ({', '.join(users[f'sleeperbench.kit.{module}'])})"
        print(
            f"{line}{': written' if args.write else '; run `make versions ARGS=--write` and commit it'}",
            file=sys.stderr,
        )
    return 4 if unwritten and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
