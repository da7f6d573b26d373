"""A page of its own for every data set, attack, defense, metric and cell."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc

from sleeperbench.leaderboard import judges, media, words
from sleeperbench.leaderboard.about import params, plugin
from sleeperbench.leaderboard.names import plugin_id
from sleeperbench.leaderboard.summary import Board, Cell, setting, tally
from sleeperbench.leaderboard.tracks import ANSWERS, ZOO, judge
from sleeperbench.leaderboard.views import Views, href
from sleeperbench.schema import HEADLINE_METRICS, reproduce

Page = tuple[str, str, dict[str, Any]]
"""Path, template, and what the template shows."""


def names(views: Views) -> dict[str, list[tuple[str, str]]]:
    """(id, page) of everything that has a page: data sets, attacks, defenses, metrics."""
    cells, plugins = views.results.cells, views.results.plugins
    metrics = {*views.results.measurements["metric"].unique().to_pylist(), *HEADLINE_METRICS, *views.metrics}
    listed: dict[str, Iterable[str]] = {
        "datasets": {c["dataset"] for c in cells},
        "attacks": {plugin_id(c["attack"]) for c in cells} | {i for k, i in plugins if k == "attack"},
        "defenses": {plugin_id(c["defense"]) for c in cells} | {i for k, i in plugins if k == "defense"},
        "metrics": {m for m in metrics if m},
    }
    return {kind: [(n, href(kind, n)) for n in sorted(ids)] for kind, ids in listed.items()}


def _means(views: Views, board: Board, kind: str, across: str, mine: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Means per attack and defense: of the models that were handed out, then of the answers that were given."""
    for answers in (False, True):
        metrics = [m for m in board.metrics if (m in ANSWERS) is answers and any(c[m] is not None for c in mine)]
        shown = {d for m in metrics for d in board.having(m)}
        groups: dict[tuple[str, str], list[Cell]] = {}
        for c in mine:
            if c["defense"] in shown:
                groups.setdefault((setting(c), c["defense"]), []).append(c)
        several = len({k[kind == "defense"] for k in groups}) > 1
        lines = []
        for (s, d), cells in sorted(groups.items()):
            other = d if kind == "attack" else s
            own = (s if kind == "attack" else d) if several else ""
            link = href(f"{across}s", cells[0][across])
            lines.append((own, views.mean_row(board, other, link, cells, metrics)))
        if lines:
            yield {"board": board, "metrics": metrics, "lines": lines, "several": several, "answers": answers}


def methods(views: Views) -> Iterator[Page]:
    """A page per attack and per defense: what it is, how it was set, its means and its rows."""
    for kind, across in (("attack", "defense"), ("defense", "attack")):
        for name, page in names(views)[f"{kind}s"]:
            rows = views.rows_where(kind, name)
            variants = {r.cell[kind]: r.cell[f"{kind}_params"] for r in rows}
            parts: list[Any] = []
            for b in views.boards:
                parts += _means(views, b, kind, across, [c for c in b.cells if plugin_id(c[kind]) == name])
            entry = plugin(views.results.plugins, kind, name)
            context = {
                "kind": kind,
                "across": across,
                "name": name,
                "plugin": entry,
                "variants": [(v, params(p, entry["fields"])) for v, p in sorted(variants.items())],
                "access": sorted({r.cell["access"] for r in rows}) if kind == "defense" else [],
                "role": rows[0].role if rows and kind == "defense" else "",
                "not_implanted": sorted(
                    {
                        (s, r)
                        for b in views.boards
                        for s, r in b.not_implanted.items()
                        if kind == "attack" and s in {setting(x.cell) for x in rows}
                    }
                ),
                "parts": parts,
                "rows": rows,
                "tally": tally([r.cell for r in rows]),
                "judges": kind == "defense" and any(judge(r.cell) for r in rows),
                "used_by": sorted({u for b in views.boards for u in judges.used_by(b, name)})
                if kind == "defense"
                else [],
                "zoos": judges.zoos(views, name) if kind == "defense" else [],
            }
            yield page, "method.html.j2", context


def cells(views: Views, write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """A page per cell: pictures, curves, every measurement, settings, cost, provenance, and how to repeat it."""
    of_attack: dict[tuple[str, ...], list[Any]] = {}
    for r in views.rows:
        c = r.cell
        of_attack.setdefault((c["suite"], c["dataset"], c["arch"], setting(c), str(c["seed"])), []).append(r)
    for r in views.rows:
        c = r.cell
        measured = views.results.measured(c["cell"])
        run = views.results.owner[c["cell"]]
        tasks = {m["task_key"]: m for m in measured}
        siblings = of_attack[c["suite"], c["dataset"], c["arch"], setting(c), str(c["seed"])]
        attack = plugin(views.results.plugins, "attack", plugin_id(c["attack"]))
        defense = plugin(views.results.plugins, "defense", plugin_id(c["defense"]))
        context = {
            "row": r,
            "metrics": [*views.metrics, *(["verdict"] if views.verdicts else [])],
            "measured": measured,
            "tasks": sorted(tasks.values(), key=lambda m: (m["evaluator"] or "", m["task_key"] or "")),
            "media": media.load(run.path, c["cell"], write),
            "run": run.name,
            "attack_params": params(c["attack_params"], attack["fields"]),
            "defense_params": params(c["defense_params"], defense["fields"]),
            "attack": attack,
            "defense": defense,
            "command": shlex.join(["sleeperbench", *reproduce(c, c["suite"]), "--out", "DIR"]),
            "siblings": [s for s in siblings if s is not r],
        }
        yield r.href, "cell.html.j2", context


def datasets(views: Views) -> Iterator[Page]:
    """A page per data set."""
    for name, page in names(views)["datasets"]:
        rows = views.rows_where("dataset", name)
        context = {
            "name": name,
            "digests": sorted({r.cell["data_digest"] for r in rows}),
            "boards": [b for b in views.boards if b.key[0] == name],
            "attacks": sorted({(plugin_id(r.cell["attack"]), r.attack_href) for r in rows}),
            "defenses": sorted({(plugin_id(r.cell["defense"]), r.defense_href) for r in rows}),
            "plugin": plugin(views.results.plugins, "dataset", name),
            "tally": tally([r.cell for r in rows]),
        }
        yield page, "dataset.html.j2", context


def metrics(views: Views) -> Iterator[Page]:
    """A page per metric: what it means, its unit, who measures it, and each defense's mean."""
    table = views.results.measurements
    for name, page in names(views)["metrics"]:
        rows = table.filter(pc.equal(table["metric"], name))
        values = [v for v in rows["value"].to_pylist() if v is not None]
        parts = []
        for b in views.boards:
            if name in b.metrics:
                tracks: Any = views.by_track(b, [name], b.having(name))
                parts.append({"board": b, "metrics": [name], "tracks": tracks, "over": "attacks"})
            for t in judges.tables(views, b, name) if name in ZOO else []:
                parts.append({"board": b, "metrics": [name], "tracks": t.groups, "over": "models"})
        stages = ["attacked", "defended", "reactivated"]
        qualifiers = rows["qualifier"].unique().to_pylist()
        share = views.share(name)
        context = {
            "name": name,
            "doc": views.docs.get(name, ""),
            "unit": "share, printed as per cent" if share else views.units.get(name, "") or "no unit",
            "evaluators": sorted(v for v in rows["evaluator"].unique().to_pylist() if v),
            "stages": [s for s in stages if s in rows["stage"].unique().to_pylist()],
            "qualifiers": sorted(q for q in qualifiers if q)[:40],
            "counts": (len(rows), len(values)),
            "range": [
                (w, words.number(f(values), share))
                for w, f in (("smallest", min), ("median", statistics.median), ("largest", max))
            ]
            if values
            else [],
            "parts": parts,
        }
        yield page, "metric.html.j2", context
