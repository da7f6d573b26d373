"""A paper's figures and claims, read from its TOML and checked word for word; docs/papers.md explains the form."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from sleeperbench.errors import BadInput, nearest

TESTS = (">", ">=", "<", "<=")
POOLS = ("mean", "min", "max")
AXES = ("defense", "attack")
TO = "{to}"
"""As a defense of `than` and `given`: the one that a perturbation was carried to."""
SETTING = (
    *(
        "dataset",
        "arch",
        "rate",
        "rates",
        "rows",
        "epochs",
        "lr",
        "batch",
        "momentum",
        "weight_decay",
        "schedule",
        "pad",
        "flip",
    ),
    *("clean", "clean_source", "seeds", "attack", "defense", "evaluator", "note"),
)
_CHOICE = ("metric", "qualifier", "dataset", "arch", "attack", "rate", "defense", "pool")
_CLAIM = (
    *("id", "says", "where", "table", "ours", "printed", "test", "value", "than", "plus", "given", "share"),
    *("to", "with", "over", *_CHOICE),
)
_GIVEN = ("test", "value", "than", "plus", *_CHOICE)
_TABLE = (
    *("id", "what", "row", "column", "columns", "metrics", "unit", "attack", "defense", "unconfirmed"),
    *("setting", "rows"),
)


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A method as papers and claims name it.

    Args:
        id: Plugin id.
        params: None for the suite's own variant, whose label has no digest; else what its parameters must hold, where
            {} is any variant. `belt:badnets{cover="noise"}` has the wrapper's and the inner method's together.
        label: Not empty: exactly this label.
    """

    id: str
    params: Mapping[str, Any] | None = None
    label: str = ""

    def __str__(self) -> str:
        if self.label or self.params is None:
            return self.label or self.id
        return self.id + "{" + ", ".join(f"{k}={json.dumps(v)}" for k, v in self.params.items()) + "}"

    def fits(self, label: str, params: Mapping[str, Any]) -> bool:
        """Whether a row's method is meant."""
        if self.label:
            return label == self.label
        if label.partition("~")[0] != self.id:
            return False
        if self.params is None:
            return "~" not in label
        return all(k in params and params[k] == v for k, v in self.params.items())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which figures are meant. What is None is open: the unit's own in `than`, all there are on the left side.

    `to` names defenses on whose models the figure of a unit is meant (qualifier `on=`), each but the unit's own.
    """

    metric: str | None = None
    qualifier: str | None = None
    datasets: tuple[str, ...] | None = None
    archs: tuple[str, ...] | None = None
    attacks: tuple[Ref, ...] | None = None
    rates: tuple[float, ...] | None = None
    defenses: tuple[Ref, ...] | None = None
    pool: str = ""
    to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`left` TEST bound, or `left` TEST `than` + `plus`.

    With `beside` the left side is the rank correlation of `left` and `beside` over defenses or attacks (`over`).
    """

    left: Choice
    test: str
    value: float | None = None
    than: Choice | None = None
    plus: float = 0.0
    beside: Choice | None = None
    over: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper claims, as a comparison on every unit that `compared.left` chooses.

    `printed` is the left side's figure where the text gives one that stands in no table.
    """

    id: str
    says: str
    where: str
    tables: tuple[str, ...]
    ours: str
    printed: float | None
    compared: Comparison
    given: tuple[Comparison, ...]
    share: float


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One printed figure; `value` is in the unit of our tables, so fractions for what is printed in %.

    `metric` and `qualifier` name our row; a file writes them `metric[qualifier]`.
    """

    table: str
    row: str
    column: str
    attack: Ref | None
    defense: Ref | None
    metric: str
    qualifier: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """A printed table, or a part of it under one setting."""

    id: str
    what: str
    unconfirmed: str
    setting: Mapping[str, Any]
    figures: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper: its tables, its claims, and the suites that ask what it asked."""

    id: str
    title: str
    source: str
    suites: tuple[str, ...]
    tables: Mapping[str, Table]
    claims: tuple[Claim, ...]
    unconfirmed: tuple[str, ...] = field(default=())


class Faulty(ValueError):
    """A file of published figures that does not have the form."""


@cache
def papers() -> dict[str, Paper]:
    """All papers by id."""
    files = sorted(resources.files("sleeperbench.published").iterdir(), key=lambda f: f.name)
    return {f.name[:-5]: read(f.name[:-5], f.read_text(encoding="utf-8")) for f in files if f.name.endswith(".toml")}


def of_suite(suite: str) -> Paper:
    """The paper whose questions a suite asks.

    Raises:
        BadInput: no paper has this suite.
    """
    found = papers()
    by_suite = {s: p for p in found.values() for s in p.suites} | found
    if suite not in by_suite:
        raise BadInput(f"suite `{suite}` has no published figures: {nearest(suite, by_suite)}")
    return by_suite[suite]


def read(name: str, text: str) -> Paper:
    """A paper from its TOML.

    Raises:
        Faulty: the text does not have the form; the message says where.
    """
    raw = tomllib.loads(text)
    _keys(name, raw, ("schema", "title", "source", "suites", "unconfirmed", "table", "claim"))
    _need(name, raw, ("schema", "title", "source", "suites"))
    if raw["schema"] != 1:
        raise Faulty(f"{name}: schema = {raw['schema']!r}, this version reads 1")
    tables: dict[str, Table] = {}
    for part in raw.get("table", []):
        table = _table(name, part)
        if table.id in tables:
            raise Faulty(f"{name}: table {table.id} stands twice")
        tables[table.id] = table
    claims: dict[str, Claim] = {}
    for part in raw.get("claim", []):
        claim = _claim(name, part)
        for t in claim.tables:
            if t not in tables:
                raise Faulty(f"{name}: claim {claim.id} names table {t}, which is not there")
        if claim.id in claims:
            raise Faulty(f"{name}: claim {claim.id} stands twice")
        claims[claim.id] = claim
    return Paper(
        id=name,
        title=raw["title"],
        source=raw["source"],
        suites=tuple(raw["suites"]),
        tables=tables,
        claims=tuple(claims.values()),
        unconfirmed=tuple(raw.get("unconfirmed", ())),
    )


def ref(text: str) -> Ref:
    """`id`, or `id{key=value, ...}`.

    Raises:
        Faulty: neither.
    """
    found = re.fullmatch(r"([A-Za-z0-9_.:/-]+)(\{.*\})?", text)
    if not found:
        raise Faulty(f"`{text}` is no method: write id or id{{key=value}}")
    if found[2] is None:
        return Ref(id=found[1])
    try:
        return Ref(id=found[1], params=tomllib.loads(f"v = {found[2]}")["v"])
    except tomllib.TOMLDecodeError as e:
        raise Faulty(f"`{text}`: {e}") from e


def _table(name: str, raw: Mapping[str, Any]) -> Table:
    where = f"{name}: table {raw.get('id', '?')}"
    _keys(where, raw, _TABLE)
    _need(where, raw, ("id", "what", "row", "column", "columns", "unit", "setting", "rows"))
    _keys(f"{where}: setting", raw["setting"], SETTING)
    _need(f"{where}: setting", raw["setting"], ("dataset", "arch"))
    if "rates" in raw["setting"]:
        _need(f"{where}: setting", raw["setting"], ("rate",))
        for attack in raw["setting"]["rates"]:
            _number(f"{where}: rates", raw["setting"]["rates"], attack)
    axes = (raw["row"], raw["column"])
    if axes not in (("attack", "defense"), ("defense", "attack"), ("attack", "metric"), ("defense", "metric")):
        raise Faulty(f"{where}: rows are {axes[0]} and columns {axes[1]}; that is no table")
    if raw["unit"] not in ("%", ""):
        raise Faulty(f"{where}: unit is {raw['unit']!r}; it may be % or empty")
    if (raw["column"] == "metric") == ("metrics" in raw):
        raise Faulty(f"{where}: `metrics` belong to tables whose columns are methods")
    return Table(
        id=str(raw["id"]),
        what=raw["what"],
        unconfirmed=raw.get("unconfirmed", ""),
        setting=raw["setting"],
        figures=tuple(_figures(where, raw)),
    )


def _figures(where: str, raw: Mapping[str, Any]) -> Iterator[Figure]:
    fixed = {k: ref(raw[k]) for k in ("attack", "defense") if k in raw}
    for row, cells in raw["rows"].items():
        if len(cells) != len(raw["columns"]):
            raise Faulty(f"{where}: row {row} has {len(cells)} cells for {len(raw['columns'])} columns")
        for column, cell in zip(raw["columns"], cells, strict=True):
            metrics = [column] if raw["column"] == "metric" else raw["metrics"]
            parts = [p.strip() for p in str(cell).split("/")]
            if len(parts) != len(metrics):
                raise Faulty(f"{where}: {row}, {column} is `{cell}`; wanted {len(metrics)} figures")
            named = fixed | {raw["row"]: ref(row)} | ({} if raw["column"] == "metric" else {raw["column"]: ref(column)})
            for metric, part in zip(metrics, parts, strict=True):
                if part == "-":
                    continue
                try:
                    value = float(part)
                except ValueError:
                    raise Faulty(f"{where}: {row}, {column} is `{cell}`; wanted numbers or -") from None
                name, _, qualifier = metric.removesuffix("]").partition("[")
                yield Figure(
                    table=str(raw["id"]),
                    row=row,
                    column=column,
                    attack=named.get("attack"),
                    defense=named.get("defense"),
                    metric=name,
                    qualifier=qualifier,
                    value=value / 100 if raw["unit"] == "%" else value,
                )


def _claim(name: str, raw: Mapping[str, Any]) -> Claim:
    where = f"{name}: claim {raw.get('id', '?')}"
    _keys(where, raw, _CLAIM)
    _need(where, raw, ("id", "says", "where", "metric"))
    tables = raw.get("table", ())
    share = raw.get("share", 1.0)
    if not 0 < share <= 1:
        raise Faulty(f"{where}: share = {share}; it is in (0, 1]")
    compared = _comparison(where, raw)
    given = tuple(_comparison(f"{where}: given", g, _GIVEN) for g in raw.get("given", ()))
    if compared.left.pool and given:
        raise Faulty(f"{where}: pooled figures have no condition of their own; drop `pool` or `given`")
    if compared.beside is not None and given:
        raise Faulty(f"{where}: a correlation has no condition of its own; drop `given`")
    left, others = compared.left, [compared.than, *(s for g in given for s in (g.left, g.than))]
    loose = [r for c in (left, *(others if left.pool or not left.to else ())) if c for r in c.defenses or ()]
    if any(r.id == TO for r in loose):
        raise Faulty(f"{where}: {TO} stands for a defense of `to`, in `than` and `given`, without `pool`")
    if any(g.left.pool for g in given):
        raise Faulty(f"{where}: a condition speaks of the unit; drop its `pool`")
    return Claim(
        id=raw["id"],
        says=raw["says"],
        where=raw["where"],
        tables=(tables,) if isinstance(tables, str) else tuple(tables),
        ours=raw.get("ours", ""),
        printed=None if "printed" not in raw else _number(where, raw, "printed"),
        compared=compared,
        given=given,
        share=float(share),
    )


def _comparison(where: str, raw: Mapping[str, Any], known: Sequence[str] = _CLAIM) -> Comparison:
    _keys(where, raw, known)
    _need(where, raw, ("test",))
    if raw["test"] not in TESTS:
        raise Faulty(f"{where}: test is {raw['test']!r}; it may be {' '.join(TESTS)}")
    if ("value" in raw) == ("than" in raw):
        raise Faulty(f"{where}: give one of value and than")
    if "plus" in raw and "than" not in raw:
        raise Faulty(f"{where}: `plus` belongs to `than`")
    than = None
    if "than" in raw:
        _keys(f"{where}: than", raw["than"], _CHOICE)
        than = _choice(f"{where}: than", raw["than"])
        if not raw["than"]:
            raise Faulty(f"{where}: `than` must name what differs")
        several = any(len(c or ()) > 1 for c in (than.attacks, than.defenses, than.rates, than.datasets, than.archs))
        if several and not than.pool:
            raise Faulty(f"{where}: than names several; say by `pool` what becomes of them")
    if "to" in raw and "qualifier" in raw:
        raise Faulty(f"{where}: `to` says the qualifier itself; drop `qualifier`")
    left = _choice(where, raw)
    return Comparison(
        left=left,
        test=raw["test"],
        value=_number(where, raw, "value") if "value" in raw else None,
        than=than,
        plus=_number(where, raw, "plus") if "plus" in raw else 0.0,
        beside=_beside(where, raw, left) if "with" in raw or "over" in raw else None,
        over=raw.get("over", ""),
    )


def _beside(where: str, raw: Mapping[str, Any], left: Choice) -> Choice:
    """The other figure of a correlation; its defenses stand beside those of the left side, one by one."""
    if "with" not in raw or raw.get("over") not in AXES:
        raise Faulty(f"{where}: a correlation needs `with`, and `over`, which is {' or '.join(AXES)}")
    _keys(f"{where}: with", raw["with"], ("metric", "qualifier", "defense"))
    beside = _choice(f"{where}: with", raw["with"])
    if "value" not in raw or left.pool or left.to or not left.attacks or not left.defenses:
        raise Faulty(f"{where}: a correlation names `attack` and `defense`, is held against `value`, and has no `pool`")
    if len(beside.defenses or left.defenses) != len(left.defenses):
        raise Faulty(f"{where}: `with` has {len(beside.defenses or ())} defenses for {len(left.defenses)}")
    return beside


def _number(where: str, raw: Mapping[str, Any], key: str) -> float:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Faulty(f"{where}: {key} = {value!r} is no number")
    return float(value)


def _choice(where: str, raw: Mapping[str, Any]) -> Choice:
    def several(key: str) -> tuple[Any, ...] | None:
        value = raw.get(key)
        if value is None:
            return None
        found = tuple(value) if isinstance(value, list) else (value,)
        if not found:
            raise Faulty(f"{where}: {key} is empty")
        return found

    methods = {}
    for key in ("attack", "defense"):
        names = several(key)
        methods[key] = None if names is None else tuple(Ref(id=TO) if n == TO else ref(n) for n in names)
    rates = several("rate")
    if raw.get("pool", "mean") not in POOLS:
        raise Faulty(f"{where}: pool is {raw['pool']!r}; it may be {' '.join(POOLS)}")
    return Choice(
        metric=raw.get("metric"),
        qualifier=raw.get("qualifier"),
        datasets=several("dataset"),
        archs=several("arch"),
        attacks=methods["attack"],
        rates=None if rates is None else tuple(float(r) for r in rates),
        defenses=methods["defense"],
        pool=raw.get("pool", ""),
        to=several("to") or (),
    )


def _keys(where: str, raw: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in raw:
        if key not in known:
            raise Faulty(f"{where}: unknown key `{key}`: {nearest(key, known)}")


def _need(where: str, raw: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if key not in raw:
            raise Faulty(f"{where}: `{key}` is missing")
