"""Literals in source, and what counts as one."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from sleeperbench.engine.source import Found
from sleeperbench.errors import BrokenPlugin

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def literal(node: ast.expr, owner: Found, name: str, calls: Mapping[str, Callable[..., Any]]) -> Any:
    """The value of a literal; `8 / 255`, `math.inf` and calls of `calls` and `frozenset` with literals count as such.

    Raises:
        BrokenPlugin: It is not; the message names what must be written out.
    """

    def value(n: ast.expr) -> Any:
        match n:
            case ast.Constant():
                return n.value
            case ast.Tuple():
                return tuple(value(e) for e in n.elts)
            case ast.List():
                return [value(e) for e in n.elts]
            case ast.Set():
                return {value(e) for e in n.elts}
            case ast.Dict() if None not in n.keys:
                return {value(k): value(v) for k, v in zip(n.keys, n.values, strict=True) if k is not None}
            case ast.UnaryOp(op=ast.USub()):
                return -number(n.operand)
            case ast.BinOp() if type(n.op) in _ARITHMETIC:
                return _ARITHMETIC[type(n.op)](number(n.left), number(n.right))
            case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
                return float("inf")
            case ast.Call():
                return called(n)
        raise _computed(n, owner, name)

    def number(n: ast.expr) -> Any:
        result = value(n)
        if type(result) not in (int, float):
            raise _computed(n, owner, name)
        return result

    def called(n: ast.Call) -> Any:
        bound = ast.unparse(n.func)
        what = owner.module.imports.get(bound, bound).rpartition(".")[2]
        if what == "frozenset" and not n.keywords and len(n.args) <= 1:
            return frozenset(value(n.args[0]) if n.args else ())
        if what == "float" and len(n.args) == 1 and value(n.args[0]) in ("inf", "-inf"):
            return float(value(n.args[0]))
        if what not in calls or any(k.arg is None for k in n.keywords):
            raise _computed(n, owner, name)
        try:
            return calls[what](*map(value, n.args), **{str(k.arg): value(k.value) for k in n.keywords})
        except ValueError as error:
            raise BrokenPlugin(f"{owner.path}, line {n.lineno}: `{name}`: {what} {error}") from None

    try:
        return value(node)
    except (TypeError, ZeroDivisionError, OverflowError):
        raise _computed(node, owner, name) from None


def _computed(node: ast.expr, owner: Found, name: str) -> BrokenPlugin:
    """The error that says which name must be literal, and what in it is not."""
    text = ast.unparse(node)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return BrokenPlugin(
        f"{owner.path}, line {node.lineno}: `{name}` must be literal, because it is read without an import: "
        f"write out the value of `{shown}`"
    )
