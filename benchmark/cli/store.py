"""`sleeperbench store`: what the cache of all steps holds, whether it is intact, and what may go."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeperbench.errors import BadInput, nearest

if TYPE_CHECKING:
    from sleeperbench.engine.store import Store

DAY = 86400.0


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "store",
        help="the cache of all steps: list, check, clean, export, import",
        description="Works on the store that `run` fills: a folder or an fsspec URL. Imports no torch.",
        epilog="Examples: `sleeperbench store check --store runs/store` · `sleeperbench store gc --keep runs/quick "
        "--yes` · `sleeperbench store export all.zip`",
    )
    actions = p.add_subparsers(dest="action", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store", metavar="DIR|URL", help="the store (default: $SLEEPERBENCH_STORE, else runs/store, as `run` has it)"
    )
    common.add_argument("--json", action="store_true", help="as JSON")
    actions.add_parser("ls", parents=[common], help="key, kind, name, size and age of every artifact")
    check = actions.add_parser("check", parents=[common], help="read every byte; exit code 4 when something is damaged")
    check.add_argument("--remove", action="store_true", help="take out what is damaged, so that it is computed again")
    gc = actions.add_parser("gc", parents=[common], help="remove left-overs of killed runs; with --keep also artifacts")
    gc.add_argument(
        "--keep", nargs="+", type=Path, metavar="RUN", help="remove the artifacts that these runs don't need"
    )
    gc.add_argument("--yes", action="store_true", help="do not ask")
    out = actions.add_parser("export", parents=[common], help="write artifacts to one file")
    out.add_argument("file", type=Path, metavar="FILE")
    out.add_argument("keys", nargs="*", metavar="KEY", help="beginnings of keys (default: all)")
    taken = actions.add_parser("import", parents=[common], help="take artifacts in from an exported file")
    taken.add_argument("file", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """List, check, clean, export or import."""
    from sleeperbench.engine.store import Store

    where = args.store or os.environ.get("SLEEPERBENCH_STORE") or "runs/store"
    actions = {"ls": _ls, "check": _check, "gc": _gc, "export": _export, "import": _import}
    return actions[args.action](Store(where, create=args.action == "import"), args)


def _say(args: argparse.Namespace, answer: Any, *lines: str) -> None:
    print(json.dumps(answer, indent=1) if args.json else "\n".join(lines))


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _ls(store: Store, args: argparse.Namespace) -> int:
    from sleeperbench.engine.manifest import parse_manifest

    rows: list[dict[str, Any]] = []
    for key in list(store.keys()):
        row: dict[str, Any] = {"key": key, "kind": "damaged", "name": "", "bytes": None, "seconds_old": None}
        try:
            data = store.remote.read(key) if store.remote else (store.path(key) / "manifest.json").read_bytes()
            m = parse_manifest(data or b"", key)
            row |= {"kind": m["task"]["kind"], "name": m["task"].get("name", "")}
            row["bytes"] = sum(f["size"] for f in m["files"].values()) + len(data or b"")
            row["seconds_old"] = round(time.time() - m["result"]["started"] - m["result"]["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damage is what `check` reports; here the artifact is only not described
        rows.append(row)
    lines = []
    for r in rows:
        size = "" if r["bytes"] is None else _size(r["bytes"])
        age = "" if r["seconds_old"] is None else f"{r['seconds_old'] / DAY:.1f} d"
        lines.append(f"{r['key'][:12]}  {r['kind']:<8}  {r['name']:<24}  {size:>8}  {age:>8}")
    total = sum(r["bytes"] or 0 for r in rows)
    _say(args, rows, *lines, f"{len(rows)} artifacts, {_size(total)}")
    return 0


def _check(store: Store, args: argparse.Namespace) -> int:
    damaged: dict[str, str] = {}
    artifacts = 0
    for key in list(store.keys()):
        artifacts += 1
        if problem := store.check(key):
            damaged[key] = problem
            if args.remove:
                store.discard_damaged(key)
    lines = [f"damaged: {key}: {problem}" for key, problem in damaged.items()]
    done = " and removed" if args.remove and damaged else ""
    answer = {"artifacts": artifacts, "damaged": list(damaged)}
    _say(args, answer, *lines, f"{artifacts} artifacts, {len(damaged)} damaged{done}")
    return 4 if damaged else 0


def _gc(store: Store, args: argparse.Namespace) -> int:
    from sleeperbench.engine.lease import clear, stale

    doomed: list[str] = []
    if args.keep:
        live = []
        for key in store.leases.lease_keys():
            seen = store.leases.read_lease(key)
            live += [seen] if seen is not None and not stale(store.leases, key, seen) else []
        if live:
            raise BadInput(f"{store.where}: a run is at work ({_owner(live[0])}); clean the store when it has ended")
        needed = _needed(store, args.keep)
        doomed = sorted(set(store.keys()) - needed)
        if doomed and not args.yes:
            _ask(f"remove {len(doomed)} artifacts that {len(args.keep)} runs don't need?")
    leases = clear(store.leases)
    tmp = [p for p in (store.root / "tmp").glob("*") if time.time() - _newest(p) > DAY]
    for path in tmp:
        shutil.rmtree(path, ignore_errors=True)
    for key in doomed:
        store.discard(key)
    answer = {"tmp": len(tmp), "leases": leases, "artifacts": len(doomed)}
    _say(args, answer, f"removed {len(tmp)} temporary folders, {leases} leases, {len(doomed)} artifacts")
    return 0


def _owner(data: bytes) -> str:
    try:
        owner = json.loads(data)
        return f"pid {owner['pid']} on {owner['host']}, {owner['run']}"
    except (ValueError, KeyError, TypeError):
        return "its lease cannot be read"


def _newest(path: Path) -> float:
    try:
        return max(p.stat().st_mtime for p in (path, *path.rglob("*")))
    except OSError:
        return time.time()


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise BadInput(f"{question} Give --yes to do it")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadInput("nothing was removed")


def _needed(store: Store, runs: Iterable[Path]) -> set[str]:
    """Keys that rows and media of some runs refer to, and all that those were computed from."""
    from sleeperbench.engine.manifest import parse_manifest

    todo: list[str] = []
    for run in runs:
        if not (run / "rows").is_dir():
            raise BadInput(f"{run} is no run folder (it has no rows); name folders that `run` wrote")
        try:
            for file in (run / "rows").glob("*.json"):
                for r in json.loads(file.read_bytes()):
                    todo += [r["task_key"], r["attack_key"], r["defense_key"]]
            for file in (run / "media").glob("*/index.json"):
                todo += json.loads(file.read_bytes())["keys"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{file} cannot be read ({e}); run the suite again before the store is cleaned") from e
    needed: set[str] = set()
    while todo:
        key = todo.pop()
        if not key or key in needed:
            continue
        needed.add(key)
        try:
            data = store.remote.read(key) if store.remote else (store.path(key) / "manifest.json").read_bytes()
            todo += parse_manifest(data or b"", key)["task"].get("inputs", {}).values()
        except (OSError, ValueError):
            continue  # not in the store, or damaged: nothing to keep for it
    return needed


def _export(store: Store, args: argparse.Namespace) -> int:
    from sleeperbench.engine.archive import export

    known = list(store.keys())
    for start in args.keys:
        if not any(key.startswith(start) for key in known):
            raise BadInput(f"no artifact of {store.where} begins with {start!r}: {nearest(start, known)}")
    keys = [key for key in known if not args.keys or key.startswith(tuple(args.keys))]
    size = export(store, keys, args.file)
    _say(args, {"artifacts": len(keys), "bytes": size}, f"{len(keys)} artifacts, {_size(size)}: {args.file.absolute()}")
    return 0


def _import(store: Store, args: argparse.Namespace) -> int:
    from sleeperbench.engine.archive import take_in

    new, known = take_in(store, args.file)
    _say(args, {"imported": new, "present": known}, f"{len(new)} artifacts imported, {len(known)} were there already")
    return 0
