"""Values checked against the text of an annotation, so that a method's parameters need no import of the method."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from functools import cache
from typing import Any

Check = Callable[[Any], Any]

NONE = "none"
"""How suites and `--set` write None, for which TOML has no word, where a parameter admits None and not this string."""

SUPPORTED = "int, float, bool, str, None, Any, Literal[...], tuple[...], list[...], dict[...] and unions of these"


class Misfit(ValueError):
    """A value does not fit its annotation."""


class Unsupported(ValueError):
    """An annotation that no JSON value can be checked against."""


@cache
def checker(annotation: str) -> Check:
    """A function that returns its argument in the form the annotation wants.

    An int passes as float and becomes one, and a list becomes a tuple where a tuple is wanted, so that equal settings
    give equal task keys. Floats must be finite, because keys are JSON. `NONE` passes as None, unless what admits None
    beside it (`str`, a Literal with this word, Any) takes the string as it is.

    Raises:
        Unsupported: The annotation is none of `SUPPORTED`.
    """
    try:
        return _build(ast.parse(annotation.strip(), mode="eval").body)
    except SyntaxError:
        raise Unsupported(annotation) from None


def described(annotation: str) -> str:
    """What an error asks for: the annotation and, where it admits None, how that is written."""
    try:
        writable = checker(annotation)(NONE) is None
    except Misfit:
        writable = False
    return f'{annotation} (None is written "{NONE}")' if writable else annotation


def _build(node: ast.expr) -> Check:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str)):
        return _none if node.value is None else checker(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_build(node.left), _build(node.right)])
    if isinstance(node, ast.Subscript):
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _generic(_name(node.value), inner)
    simple: dict[str, Check] = {
        "int": _is(int),
        "bool": _is(bool),
        "str": _is(str),
        "float": _float,
        "Any": lambda value: value,
        "tuple": lambda value: tuple(_listlike(value)),
        "list": lambda value: list(_listlike(value)),
        "dict": _mapping(lambda value: value),
        "Mapping": _mapping(lambda value: value),
    }
    name = _name(node)
    if name not in simple:
        raise Unsupported(ast.unparse(node))
    return simple[name]


def _generic(name: str, inner: list[ast.expr]) -> Check:
    if name == "Literal":
        choices = [ast.literal_eval(n) for n in inner]
        return lambda value: _chosen(value, choices)
    if name == "Optional":
        return _union([_none, _build(inner[0])])
    if name == "Union":
        return _union([_build(n) for n in inner])
    if name in ("dict", "Mapping") and len(inner) == 2:
        return _mapping(_build(inner[1]))
    if name == "list" and len(inner) == 1:
        each = _build(inner[0])
        return lambda value: [each(v) for v in _listlike(value)]
    if name == "tuple" and len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...:
        each = _build(inner[0])
        return lambda value: tuple(each(v) for v in _listlike(value))
    if name == "tuple":
        checks = [_build(n) for n in inner]
        return lambda value: _fixed(_listlike(value), checks)
    raise Unsupported(name)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    raise Unsupported(ast.unparse(node))


def _is(wanted: type) -> Check:
    def check(value: Any) -> Any:
        # Exact, because True is an int to isinstance.
        if type(value) is not wanted:
            raise Misfit
        return value

    return check


def _none(value: Any) -> None:
    if value not in (None, NONE):
        raise Misfit


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise Misfit
    try:
        number = float(value)
    except OverflowError:
        raise Misfit from None
    if not math.isfinite(number):
        raise Misfit
    return number


def _listlike(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Misfit
    return value


def _fixed(value: list[Any] | tuple[Any, ...], checks: list[Check]) -> tuple[Any, ...]:
    if len(value) != len(checks):
        raise Misfit
    return tuple(check(v) for check, v in zip(checks, value, strict=True))


def _mapping(each: Check) -> Check:
    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise Misfit
        return {k: each(v) for k, v in value.items()}

    return check


def _chosen(value: Any, choices: list[Any]) -> Any:
    if not any(type(value) is type(c) and value == c for c in choices):
        raise Misfit
    return value


def _union(options: list[Check]) -> Check:
    def check(value: Any) -> Any:
        fits = []
        for option in options:
            try:
                fits.append(option(value))
            except Misfit:
                continue
        if not fits:
            raise Misfit
        # `float | int` keeps an int an int: a share and a count mean different things. `str | None` keeps a string.
        return next((f for f in fits if type(f) is type(value)), fits[0])

    return check
