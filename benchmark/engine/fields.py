"""The fields of a method's dataclass, read from its source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleeperbench.engine.literals import literal
from sleeperbench.engine.parameters import SUPPORTED, Misfit, Unsupported, checker
from sleeperbench.engine.source import Found
from sleeperbench.errors import BrokenPlugin


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A field of a method: the text of its annotation, its default, and its line in the docstring's Args section."""

    name: str
    annotation: str
    default: Any
    doc: str = ""


def fields_of(chain: Sequence[Found]) -> dict[str, Parameter]:
    """The fields of a class, given it and its bases, nearest first.

    Raises:
        BrokenPlugin: A field has no literal default, an annotation that JSON values cannot be checked against, or a
            default that does not fit it; or the class is no frozen dataclass.
    """
    parameters: dict[str, Parameter] = {}
    docs: dict[str, str] = {}
    for owner in reversed(chain):
        node = owner.node
        assert isinstance(node, ast.ClassDef)
        docs |= _args(ast.get_docstring(node) or "")
        fields = [
            s
            for s in node.body
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and not _is_classvar(s.annotation)
        ]
        if not _is_frozen(node) and (fields or _is_dataclass(node)):
            raise BrokenPlugin(
                f"{owner.path}: `{node.name}` has fields: put `@dataclass(frozen=True, kw_only=True)` above it"
            )
        parameters |= {s.target.id: _parameter(s, owner) for s in fields if isinstance(s.target, ast.Name)}
    return {n: dataclasses.replace(p, doc=docs.get(n, "")) for n, p in parameters.items()}


def _parameter(statement: ast.AnnAssign, owner: Found) -> Parameter:
    assert isinstance(statement.target, ast.Name)
    name, default = statement.target.id, statement.value
    annotation = ast.unparse(statement.annotation)
    if isinstance(statement.annotation, ast.Constant):
        annotation = str(statement.annotation.value)
    if isinstance(default, ast.Call) and _called(default) == "field":
        default = {k.arg: k.value for k in default.keywords}.get("default")
    where = f"{owner.path}, line {statement.lineno}"
    if default is None:
        raise BrokenPlugin(f"{where}: give parameter `{name}` a literal default")
    value = literal(default, owner, name, {})
    try:
        fitted = checker(annotation)(value)
        if fitted is None and value is not None:  # a suite's word for None; the class itself would hold the string
            raise Misfit
    except Unsupported:
        raise BrokenPlugin(f"{where}: `{name}: {annotation}` cannot be checked; use {SUPPORTED}") from None
    except Misfit:
        raise BrokenPlugin(f"{where}: the default of `{name}` is {value!r}, which is no {annotation}") from None
    return Parameter(name=name, annotation=annotation, default=fitted)


def _args(docstring: str) -> dict[str, str]:
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", inspect.cleandoc(docstring), re.MULTILINE)
    docs: dict[str, str] = {}
    last = ""
    for line in section[1].splitlines() if section else ():
        start = re.match(r"(?: {4}|\t)(\w+)(?: \([^)]*\))?: *(.*)", line)
        if start:
            last = start[1]
            docs[last] = start[2]
        elif last and line.strip():
            docs[last] = f"{docs[last]} {line.strip()}".strip()
    return docs


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


def _is_classvar(annotation: ast.expr) -> bool:
    return re.match(r"['\"]?(\w+\.)*ClassVar\b", ast.unparse(annotation)) is not None


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(d).partition("(")[0].rpartition(".")[2] == "dataclass" for d in node.decorator_list)


def _is_frozen(node: ast.ClassDef) -> bool:
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and _called(d) == "dataclass"]
    return any(k.arg == "frozen" and getattr(k.value, "value", False) is True for d in calls for k in d.keywords)
