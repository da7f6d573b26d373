"""What a plugin declares, read from its source: neither the plugin nor any package above it is imported."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sleeperbench.contracts.access import Access, Needs
from sleeperbench.engine.fields import Parameter, fields_of
from sleeperbench.engine.literals import literal
from sleeperbench.engine.parameters import Misfit, checker, described
from sleeperbench.engine.source import Found, Source, linearise
from sleeperbench.errors import BadInput, BrokenPlugin, nearest

SNAPSHOTS = ("exact", "declared", "none")
DECLARED = ("INFO", "ACCESS", "NEEDS", "SNAPSHOT", "REQUIRES", "METRICS")


class MetricSpec(NamedTuple):
    """The fields of `Metric`, without torch."""

    name: str
    unit: str
    low: float
    high: float
    better: str
    doc: str


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A plugin as its source declares it.

    Args:
        value: Entry-point value, `package.module:Name`.
        path: Source file of the object.
        title: INFO's title; for data sets and models the `title` of the object or its docstring's first line.
        doc: First line of the docstring.
        docstring: The whole docstring, without indentation.
        base: `Attack`, `Defense` or `Evaluator`; empty for data sets and models.
        info: INFO.
        access: ACCESS; the contract's default where a defense declares none, None for other bases.
        needs: NEEDS: a mapping for attacks, `Needs` for evaluators, None for defenses.
        snapshot: SNAPSHOT.
        requires: REQUIRES.
        metrics: METRICS.
        fields: Parameters by name, in the order of the dataclass.
    """

    value: str
    path: str
    title: str
    doc: str
    docstring: str
    base: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    access: Access | None = None
    needs: Needs | Mapping[str, int] | None = None
    snapshot: str = "exact"
    requires: frozenset[str] = frozenset()
    metrics: tuple[MetricSpec, ...] = ()
    fields: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def wrapper(self) -> bool:
        """It works on another plugin's outcome and is named `<id>:<inner id>`."""
        return self.info.get("wrapper") is True

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters: those given, in the form their annotations want, and the defaults of the rest.

        Raises:
            BadInput: An unknown parameter, or a value of the wrong type.
        """
        module, _, cls = self.value.partition(":")
        name = f"{cls} ({module})"
        for key in params:
            if key not in self.fields:
                has = nearest(key, self.fields) if self.fields else "it has none"
                raise BadInput(f"{name} has no parameter `{key}`: {has}")
        full = {}
        for key, p in self.fields.items():
            given = params.get(key, p.default)
            try:
                full[key] = checker(p.annotation)(given)
            except Misfit:
                raise BadInput(
                    f"{name}: parameter `{key}` is {given!r} ({type(given).__name__}); "
                    f"wanted: {described(p.annotation)}"
                ) from None
        return full


def read(value: str, *, method: bool) -> Blueprint:
    """The blueprint of an entry-point value; for data sets and models (`method` False) only title and docstring.

    Raises:
        BrokenPlugin: The message says what could not be read and how to mend it.
    """
    match = re.fullmatch(r"\s*([\w.]+)\s*:\s*(\w+)\s*(\[.*\])?\s*", value)
    if not match:
        raise BrokenPlugin(f"entry point `{value}` must read `package.module:Name`")
    try:
        source = Source()
        found = source.find(match[1], match[2])
        return _read_method(source, found, value) if method else _read_object(found, value)
    except BrokenPlugin:
        raise
    except (RecursionError, MemoryError) as error:
        raise BrokenPlugin(f"{match[1]}: its source nests too deeply to be read") from error
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename else match[1]
        raise BrokenPlugin(f"{where}: {error.msg}: mend the syntax error") from error
    except Exception as error:  # a finder or loader of somebody else's may raise anything
        raise BrokenPlugin(f"{match[1]} cannot be read: {type(error).__name__}: {error}") from error


def _read_object(found: Found, value: str) -> Blueprint:
    docstring, title = "", ""
    if isinstance(found.node, ast.ClassDef | ast.FunctionDef):
        docstring = ast.get_docstring(found.node) or ""
    elif isinstance(found.node.value, ast.Call):
        named = {k.arg: k.value for k in found.node.value.keywords}
        text = named.get("title")
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            title = text.value
    doc = docstring.strip().partition("\n")[0]
    return Blueprint(value=value, path=found.path, title=title or doc, doc=doc or title, docstring=docstring)


def _read_method(source: Source, found: Found, value: str) -> Blueprint:
    if not isinstance(found.node, ast.ClassDef):
        raise BrokenPlugin(f"{value} is not a class: point the entry point at one")
    chain, base = linearise(source, found)
    declared: dict[str, Any] = {"INFO": {}, "SNAPSHOT": "exact", "REQUIRES": frozenset(), "METRICS": ()}
    own: dict[str, dict[str, Any]] = {
        "Attack": {"NEEDS": {}},
        "Defense": {"ACCESS": Access()},
        "Evaluator": {"NEEDS": Needs()},
    }
    declared |= own[base]
    for owner in reversed(chain):
        declared |= _declared(owner)
    forms: dict[str, tuple[type, str]] = {
        "INFO": (dict, "a dict"),
        "ACCESS": (Access, "Access(...)"),
        "NEEDS": (dict, "a dict") if base == "Attack" else (Needs, "Needs(...)"),
        "SNAPSHOT": (str, "a string"),
        "REQUIRES": (frozenset, "frozenset({...})"),
        "METRICS": (tuple, "a tuple of Metric(...)"),
    }
    for name, given in declared.items():
        form, words = forms[name]
        metrics = given if name == "METRICS" and isinstance(given, tuple) else ()
        if not isinstance(given, form) or not all(isinstance(m, MetricSpec) for m in metrics):
            raise BrokenPlugin(f"{found.path}: `{name}` must be {words}, not {given!r}")
    if declared["SNAPSHOT"] not in SNAPSHOTS:
        raise BrokenPlugin(f"{found.path}: `SNAPSHOT` is {declared['SNAPSHOT']!r}; it may be {', '.join(SNAPSHOTS)}")
    docstring = inspect.cleandoc(ast.get_docstring(found.node) or "")
    info = declared["INFO"]
    try:
        json.dumps(info, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BrokenPlugin(f"{found.path}: `INFO` must hold only what JSON can: {error}") from error
    return Blueprint(
        value=value,
        path=found.path,
        title=str(info.get("title", "")),
        doc=docstring.partition("\n")[0],
        docstring=docstring,
        base=base,
        info=info,
        access=declared.get("ACCESS"),
        needs=declared.get("NEEDS"),
        snapshot=declared["SNAPSHOT"],
        requires=declared["REQUIRES"],
        metrics=declared["METRICS"],
        fields=fields_of(chain),
    )


def _assignments(node: ast.ClassDef) -> dict[str, ast.expr]:
    pairs: dict[str, ast.expr] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        pairs |= {t.id: value for t in targets if isinstance(t, ast.Name)}
    return pairs


def _declared(owner: Found) -> dict[str, Any]:
    assert isinstance(owner.node, ast.ClassDef)
    calls = {"Access": _typed(Access), "Needs": _typed(Needs), "Metric": _metric}
    return {
        name: literal(node, owner, name, calls) for name, node in _assignments(owner.node).items() if name in DECLARED
    }


def _typed(cls: type[Access] | type[Needs]) -> Any:
    annotations = {f.name: str(f.type) for f in dataclasses.fields(cls)}

    def make(*args: Any, **given: Any) -> Access | Needs:
        if args:
            raise ValueError("takes keywords only")
        for key, value in given.items():
            if key not in annotations:
                raise ValueError(f"has no `{key}`: {nearest(key, annotations)}")
            try:
                given[key] = checker(annotations[key])(value)
            except Misfit:
                raise ValueError(f"`{key}` is {value!r}; wanted: {annotations[key]}") from None
        return cls(**given)

    return make


def _metric(*args: Any, **given: Any) -> MetricSpec:
    try:
        spec = MetricSpec(*args, **given)
    except TypeError:
        raise ValueError(f"needs {', '.join(MetricSpec._fields)}") from None
    if spec.better not in ("up", "down", "none"):
        raise ValueError(f"`better` is {spec.better!r}; wanted: up, down or none")
    return spec
