"""The digest of a method's syntax tree: what changes when its code does, and not when its words do."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

from sleeperbench.engine.source import locate
from sleeperbench.errors import BrokenPlugin

_SAID = frozenset({"version", "control"})
"""Entries of INFO that say how figures are to be read, and move none."""


def fingerprint(text: str) -> str:
    """16 hex digits of a module's syntax tree without comments, layout, docstrings, and `_SAID` in INFO."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
        if isinstance(node, ast.Dict):
            named = {k.value for k in node.keys if isinstance(k, ast.Constant)}
            told = _SAID if "version" in named else set()  # else it is no INFO
            keep = [i for i, k in enumerate(node.keys) if not (isinstance(k, ast.Constant) and k.value in told)]
            node.keys, node.values = [node.keys[i] for i in keep], [node.values[i] for i in keep]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


@functools.cache
def of_plugin(value: str) -> str:
    """The digest of the module of an entry-point value, `module:Name`, read and not run; empty without a source."""
    try:
        spec = locate(value.partition(":")[0])
        return fingerprint(Path(spec.origin or "").read_text(encoding="utf-8"))
    except (BrokenPlugin, OSError, ValueError, SyntaxError):
        return ""
