"""`sleeperbench list`: what there is, without importing any of it."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterable
from importlib import resources
from typing import Any

import sleeperbench
from sleeperbench.engine.plugin import Plugin
from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BadInput, nearest

KINDS = {
    "attacks": "attack",
    "defenses": "defense",
    "evaluators": "evaluator",
    "datasets": "dataset",
    "models": "model",
    "suites": "suite",
}
COLUMNS = ("id", "title", "access", "version", "dist", "status")
TITLE_WIDTH = 50


def add_parser(subparsers: Any) -> None:
    """Add `list` to the command's parsers."""
    parser = subparsers.add_parser("list", help="plugins and suites: what there is, and what is broken")
    kinds = ", ".join(KINDS)
    parser.add_argument(
        "what", nargs="?", help=f"{kinds}, or the id of a method: its parameters and presets; default: all"
    )
    parser.add_argument("--json", action="store_true", help="one JSON array of rows")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the list; broken plugins are part of it, so they don't make it fail."""
    registry = Registry.discover()
    if args.what and args.what not in KINDS:
        return _methods(registry, args.what, as_json=args.json)
    wanted = {args.what: KINDS[args.what]} if args.what else KINDS
    rows = [_row(p) for p in registry.plugins if p.kind in wanted.values()]
    if "suites" in wanted:
        rows += _suites()
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for heading, kind in wanted.items():
        _print_table(heading, [r for r in rows if r["kind"] == kind])
    refused = [r for r in rows if r["status"] != "ok"]
    if refused:
        print("not usable:")
        for r in refused:
            print(_clean(f"  {r['kind']} {r['id']} ({_dist(r)}): {r['reason']}"))
    return 0


def _methods(registry: Registry, name: str, *, as_json: bool) -> int:
    """Print what the methods of this id declare; several kinds may have one."""
    found = [p for p in registry.plugins if p.id == name.rstrip(":")]
    if not found:
        known = [*KINDS, *sorted({p.id for p in registry.plugins})]
        raise BadInput(f"`list {name}` is neither a kind nor a method: {nearest(name, known)}")
    rows = []
    for plugin in found:
        seen = plugin.declared
        fields = seen.fields if seen else {}
        told = {k: {"default": f.default, "doc": f.doc, "type": f.annotation} for k, f in fields.items()}
        presets = seen.info.get("presets", {}) if seen else {}
        rows.append(_row(plugin) | {"parameters": told, "presets": presets})
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    for r in rows:
        head = [f"version {r['method_version']}" if r["method_version"] else "", str(r["access"] or ""), _dist(r)]
        print(_clean(f"{r['kind']} {r['id']}: {r['title']} ({', '.join(h for h in head if h)})"))
        if r["status"] != "ok":
            print(_clean(f"  not usable: {r['reason']}"))
        width = max((len(k) for k in r["parameters"]), default=0)
        for k, f in r["parameters"].items():
            print(_clean(f"  {k.ljust(width)}  {json.dumps(f['default'])}  {f['doc']}".rstrip()))
        for k, values in r["presets"].items():
            print(_clean(f"  preset {k}: " + ", ".join(f"{n} = {json.dumps(v)}" for n, v in values.items())))
    return 0


def _row(plugin: Plugin) -> dict[str, Any]:
    seen = plugin.declared
    info = seen.info if seen else {}
    return {
        "kind": plugin.kind,
        "id": plugin.id + ":" * plugin.wrapper,
        "dist": plugin.dist,
        "dist_version": plugin.dist_version,
        "method_version": info.get("version"),
        "api": info.get("api"),
        "status": plugin.status,
        "reason": plugin.reason,
        "title": seen.title if seen else "",
        "paper": info.get("paper", ""),
        "access": seen.access.track() if seen and seen.access else None,
        "wrapper": plugin.wrapper,
    }


def _suites() -> Iterable[dict[str, Any]]:
    files = (f for f in resources.files("sleeperbench.suites").iterdir() if f.name.endswith(".toml"))
    for file in sorted(files, key=lambda f: f.name):
        text, reason = file.read_text(encoding="utf-8"), ""
        try:
            suite = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            suite, reason = {}, f"{file.name}: {error}"
        comment = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
        yield {
            "kind": "suite",
            "id": file.name.removesuffix(".toml"),
            "dist": "sleeperbench",
            "dist_version": sleeperbench.__version__,
            "method_version": None,
            "api": None,
            "status": "broken" if reason else "ok",
            "reason": reason,
            "title": str(suite.get("title", comment)),
            "paper": "",
            "access": None,
            "wrapper": False,
        }


def _dist(row: dict[str, Any]) -> str:
    return f"{row['dist']} {row['dist_version']}"


def _print_table(heading: str, rows: list[dict[str, Any]]) -> None:
    print(f"{heading} ({len(rows)})")
    lines = [
        (
            _clean(r["id"]),
            _short(_clean(r["title"])),
            str(r["access"] or "-"),
            str(r["method_version"] or "-"),
            _clean(_dist(r)),
            str(r["status"]),
        )
        for r in rows
    ]
    table = [COLUMNS, *lines] if lines else []
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def _short(title: str) -> str:
    return title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 3] + "..."


def _clean(text: str) -> str:
    # Foreign text may hold line breaks, which break the table, or control characters, which steer the terminal.
    return "".join(c if c.isprintable() else " " for c in text)
