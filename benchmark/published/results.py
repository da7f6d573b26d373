"""What a run measured, by unit, metric, qualifier and seed, as claims ask for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sleeperbench.errors import BadInput
from sleeperbench.published.paper import Ref

RATELESS = ("none", "zoo")
"""Attacks without a poison rate."""
UNDEFINED = ("no_valid_budget", "ra_not_successful")
"""Reasons of rows that the protocol leaves without a figure, as the papers grey such cells."""
_COLUMNS = (
    *("dataset", "arch", "attack", "attack_params", "rate", "defense", "defense_params", "seed", "metric"),
    *("qualifier", "value", "status", "reason"),
)


@dataclass(frozen=True, order=True)
class Unit:
    """What is measured over seeds: one attack and one defense on one data set and architecture."""

    dataset: str
    arch: str
    attack: str
    rate: float
    defense: str

    def __str__(self) -> str:
        rate = "" if self.attack in RATELESS else f"@{self.rate:g}"
        return f"{self.dataset}/{self.arch}/{self.attack}{rate}/{self.defense}"


@dataclass(frozen=True, kw_only=True)
class Series:
    """Figures by seed, or why there are none."""

    what: str
    values: Mapping[int, float]
    reason: str = ""


class Results:
    """The figures of a run by unit, metric, qualifier and seed."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows: dict[tuple[Unit, str, str], dict[int, list[Mapping[str, Any]]]] = {}
        self.methods: dict[tuple[str, str], dict[str, Any]] = {}
        self.units: set[Unit] = set()
        for r in rows:
            missing = [c for c in _COLUMNS if c not in r]
            if missing:
                raise BadInput(f"the table of measurements has no column `{missing[0]}`; run the suite again")
            if not isinstance(r["seed"], int) or not isinstance(r["value"], (int, float, type(None))):
                raise BadInput(f"the table of measurements has seed {r['seed']!r} and value {r['value']!r} in one row")
            unit = Unit(r["dataset"], r["arch"], r["attack"], float(r["rate"] or 0.0), r["defense"])
            self.units.add(unit)
            self._rows.setdefault((unit, r["metric"], r["qualifier"] or ""), {}).setdefault(r["seed"], []).append(r)
            for kind in ("attack", "defense"):
                self.methods.setdefault((kind, r[kind]), _flat(r[f"{kind}_params"]))

    def grounds(self) -> list[tuple[str, str]]:
        """Every data set with every architecture that it was run on."""
        return sorted({(u.dataset, u.arch) for u in self.units})

    def rates(self, dataset: str, arch: str) -> list[float]:
        """The poison rates there."""
        here = (u for u in self.units if (u.dataset, u.arch) == (dataset, arch) and u.attack not in RATELESS)
        return sorted({u.rate for u in here})

    def labels(self, kind: str, wanted: Ref, units: Iterable[Unit]) -> list[str]:
        """Labels of the methods in `units` that a reference means."""
        there = {getattr(u, kind) for u in units}
        return sorted(label for label in there if wanted.fits(label, self.methods[kind, label]))

    def series(self, unit: Unit, metric: str, qualifier: str) -> Series:
        """What was measured on a unit, by seed; `{defense}` in a qualifier is the unit's own."""
        qualifier = qualifier.replace("{defense}", unit.defense.partition("~")[0])
        what = f"{unit}: {metric}" + (f"[{qualifier}]" if qualifier else "")
        by_seed = self._rows.get((unit, metric, qualifier))
        if by_seed is None:
            known = unit in self.units
            return Series(what=what, values={}, reason="not measured" if known else "no such cell in the run")
        values: dict[int, float] = {}
        reasons = []
        for seed, rows in sorted(by_seed.items()):
            found = {r["value"] for r in rows if r["status"] == "ok" and r["value"] is not None}
            if any(isinstance(v, float) and not math.isfinite(v) for v in found):
                reasons.append("the figure is not finite")
            elif len(found) > 1:
                reasons.append(f"seed {seed} has several figures")
            elif found:
                values[seed] = float(found.pop())
            else:
                reasons.append(f"{rows[0]['status']}: {rows[0]['reason']}".rstrip(": "))
        return Series(what=what, values=values, reason="" if values else "; ".join(dict.fromkeys(reasons)))

    def undefined(self, unit: Unit, metric: str, qualifier: str) -> bool:
        """It was run, and the protocol gives it no figure under any seed, as where RA woke nothing."""
        rows = [r for group in self._rows.get((unit, metric, qualifier), {}).values() for r in group]
        return bool(rows) and all(r["reason"] in UNDEFINED and r["status"] == "not_applicable" for r in rows)

    def not_applicable(self, unit: Unit, metric: str, qualifier: str) -> bool:
        """Nothing is measured there by its nature: no row, or only such rows."""
        rows = self._rows.get((unit, metric, qualifier), {}).values()
        return all(r["status"] == "not_applicable" for group in rows for r in group)


def _flat(text: str) -> dict[str, Any]:
    """Parameters of a method; a wrapped one's beside its wrapper's."""
    try:
        params = json.loads(text or "{}")
    except ValueError as e:
        raise BadInput(f"the table of measurements holds parameters that are no JSON: {text!r}") from e
    if not isinstance(params, dict):
        raise BadInput(f"the table of measurements holds parameters that are no object: {text!r}")
    inner = params.pop("inner", None)
    return ({**_flat(json.dumps(inner)), **params}) if isinstance(inner, dict) else params
