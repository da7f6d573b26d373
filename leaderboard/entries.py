"""A page of its own for every data set, attack, defense, metric and cell."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pyarrow.compute as pc

from sleeperbench.leaderboard import changes, judges, media, paging, words
from sleeperbench.leaderboard.about import params, plugin
from sleeperbench.leaderboard.markup import inside
from sleeperbench.leaderboard.names import plugin_id
from sleeperbench.leaderboard.summary import BOARD, Cell, setting, tally
from sleeperbench.leaderboard.tracks import ZOO
from sleeperbench.leaderboard.views import Head, Row, Views, href
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


def run_line(views: Views, change: changes.Change) -> dict[str, Any]:
    """A run in a few words: its suite, its dates, how many cells are from it, how they came out, what it changed."""
    run = change.run
    suite = run.info.get("suite", "")
    named = suite if isinstance(suite, dict) else {"name": suite}
    mine = [c for c in views.results.cells if views.results.owner[c["cell"]] is run]
    return {
        "name": run.name,
        "suite": str(named.get("name", "")),
        "title": str(named.get("title", "")),
        "cells": len(mine),
        "tally": tally(mine),
        "days": changes.when(run),
        "between": f"{run.began} to {run.ended}" if run.ended else "",
        "version": changes.measured_with(run),
        "change": change,
    }


def _measurement(views: Views, m: Mapping[str, Any]) -> tuple[Any, ...]:
    """A measurement as a table's line: css, page and name of its metric, words, order and figure, words."""
    metric, value, low, high = m["metric"] or "", m["value"], m["lower"], m["upper"]
    share, head = views.share(metric), views.head(metric)
    finite = value is not None and math.isfinite(value)
    span = "none"
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        span = words.span(low, high, share)
    return (
        "" if finite else "unmeasured",
        head.href,
        head.label,
        m["qualifier"] or "none",
        m["stage"] or "none",
        m["evaluator"] or "none",
        repr(value) if finite else "",
        words.reason_word(m["reason"] or m["status"] or "") if value is None else words.number(value, share),
        "not a count" if m["total"] is None else f"{m['count']} of {m['total']}",
        span,
        words.status_text(m) + (f"; {m['flag']}" if m["flag"] else ""),
    )


def _cost(task: Mapping[str, Any]) -> tuple[str, ...]:
    """What one task cost, as a table's line: evaluator, numbers, key."""
    measured = [task[k] for k in ("seconds", "cpu_seconds", "peak_mb")]
    counted = [task[k] for k in ("forwards", "backwards", "queries", "method_version")]
    numbers = ["unknown" if v is None else words.number(v, False) for v in measured]
    numbers += ["unknown" if v is None else str(v) for v in counted]
    return task["evaluator"] or "not recorded", *numbers, (task["task_key"] or "unknown")[:16]


@lru_cache(maxsize=1000)
def _libraries(env: str) -> str:
    """Names and versions of a task's `env`, without the digest of the evaluator's own source."""
    try:
        found = json.loads(env or "{}")
    except (ValueError, RecursionError):
        return env
    if not isinstance(found, dict):
        return env
    return ", ".join(f"{k} {v}" for k, v in sorted(found.items()) if k != "source")


def _took(views: Views, cell: Mapping[str, Any]) -> str:
    """What the cell's defense took, in words; empty where nobody measured it."""
    n, t = views.medians([cell])
    if not n:
        return ""
    time = f"{words.number(t['seconds'], False)} s ({words.number(t['cpu_seconds'], False)} s of processor time)"
    images = f"{t['forwards']:,.0f} images forward, {t['backwards']:,.0f} backward, {t['queries']:,.0f} asked about"
    return f"{time}, {words.number(t['peak_mb'], False)} MB at most, {images}"


def _machine(views: Views, tasks: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    """What the tasks ran on: each answer once, which is one answer in nearly all cells."""
    ran_on = {
        (t["device"], t["threads"], t["precision"], _libraries(t["env"]), t["dist"], t["dist_version"]) for t in tasks
    }
    answers = [sorted({str(a or "unknown") for a in column}) for column in zip(*ran_on, strict=True)]
    names = ("Device", "Threads", "Precision", "Libraries", "Distribution", "Version of the distribution")
    return views.same(tuple((name, "; ".join(found), "") for name, found in zip(names, answers, strict=bool(ran_on))))


def _cell(
    views: Views,
    row: Row,
    siblings: Sequence[Row],
    seeds: Sequence[Row],
    write: Callable[[str, bytes], None],
) -> Page:
    c = row.cell
    measured = views.results.measured(c["cell"])
    run = views.results.owner[c["cell"]]
    tasks = sorted(
        {m["task_key"]: m for m in measured}.values(), key=lambda m: (m["evaluator"] or "", m["task_key"] or "")
    )
    attack = views.plugin("attack", plugin_id(c["attack"]))
    defense = views.plugin("defense", plugin_id(c["defense"]))
    shown = media.load(views.results.drawn(c["cell"]), write)
    moved = c["rate"] is not None and c["rate_actual"] is not None and abs(c["rate_actual"] - c["rate"]) > 0.0005
    headline: list[tuple[Any, ...]] = []
    empty: dict[str, list[Head]] = {}
    for head, f in zip(views.heads, row.figures, strict=True):
        if f.empty:
            empty.setdefault(f.title.removeprefix("no figure: "), []).append(head)
        else:
            headline.append((head.href, head.label, f.metric, f.order, f.title, inside(f), head.doc))
    context = {
        "row": row,
        "poisoned": words.number(c["rate_actual"], True) if moved else "",
        "headline": headline,
        "empty": [(why, views.same(tuple(heads))) for why, heads in empty.items()],
        "measured": [_measurement(views, m) for m in measured],
        "tasks": [_cost(t) for t in tasks],
        "took": _took(views, c),
        "machine": _machine(views, tasks),
        "media": shown,
        "curves": [*shown.curves, *media.measured_curves(measured, shown.curves)],
        "run": run.name,
        "attack_params": views.params("attack", c),
        "defense_params": views.params("defense", c),
        "attack": attack,
        "defense": defense,
        "command": shlex.join(["sleeperbench", *reproduce(c, c["suite"]), "--out", "DIR"]),
        "siblings": siblings,
        "seeds": seeds,
    }
    return row.href, "cell.html.j2", context


def cells(views: Views, write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """A page per cell: pictures, curves, every measurement, settings, cost, provenance, and how to repeat it."""
    of_attack: dict[tuple[str, ...], list[Row]] = {}
    of_field: dict[tuple[str, ...], list[Row]] = {}
    for r in views.rows:
        of_attack.setdefault(_model(r.cell), []).append(r)
        of_field.setdefault(_field(r.cell), []).append(r)
    # In the order of the measurements, so that each is read once.
    for r in sorted(views.rows, key=lambda r: r.cell["cell"]):
        seeds = sorted(of_field[_field(r.cell)], key=lambda s: s.cell["seed"])
        yield _cell(views, r, of_attack[_model(r.cell)], seeds, write)


def _model(cell: Cell) -> tuple[str, ...]:
    """What cells of one attacked model agree in."""
    return (cell["suite"], cell["dataset"], cell["arch"], setting(cell), str(cell["seed"]))


def _field(cell: Cell) -> tuple[str, ...]:
    """What cells agree in that differ in their seed alone."""
    return (*(str(cell[n]) for n in BOARD), setting(cell), cell["defense"])


def datasets(views: Views) -> Iterator[Page]:
    """A page per data set."""
    for name, page in names(views)["datasets"]:
        rows = views.rows_where("dataset", name)
        given = [r.info.get("datasets") for r in views.results.runs]
        about = [d[name] for d in given if isinstance(d, dict) and isinstance(d.get(name), dict)]
        facts = list(dict.fromkeys(json.dumps(f, sort_keys=True) for f in about))
        context = {
            "name": name,
            "digests": sorted({r.cell["data_digest"] for r in rows}),
            "facts": [params(f) for f in facts],
            "boards": [b for b in views.boards if b.key[0] == name],
            "attacks": sorted({(plugin_id(r.cell["attack"]), r.attack_href) for r in rows}),
            "defenses": sorted({(plugin_id(r.cell["defense"]), r.defense_href) for r in rows}),
            "plugin": plugin(views.results.plugins, "dataset", name),
            "tally": tally([r.cell for r in rows]),
        }
        yield page, "dataset.html.j2", context


def metrics(views: Views, heat: Mapping[str, str], write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """A page per metric: what it means, its unit, who measures it, and each defense's mean.

    Args:
        views: What pages share.
        heat: Id of a heat map -> where it is.
        write: Takes the files that pages show.
    """
    table = views.results.measurements
    for name, page in names(views)["metrics"]:
        rows = table.filter(pc.equal(table["metric"], name))
        values = [v for v in rows["value"].to_pylist() if v is not None and math.isfinite(v)]
        parts: list[dict[str, Any]] = []
        rocs: list[tuple[str, judges.Roc]] = []
        room, left = paging.ROOM - 10_000, 0
        for b in views.boards:
            if room < 0:
                left += name in b.metrics
                continue
            if name in b.metrics:
                tracks: Any = views.by_track(b, [name], b.having(name))
                parts.append({"board": b, "metrics": [name], "tracks": tracks, "over": "attacks"})
            for t in judges.tables(views, b, name) if name in ZOO else []:
                parts.append({"board": b, "metrics": [name], "tracks": t.groups, "over": "models"})
            room -= sum(paging.mean_row(x) for p in parts if p["board"] is b for _, some in p["tracks"] for x in some)
            for r in judges.rocs(views, b, write) if name == "det_auroc" else []:
                room -= sum(c.weight + 400 for c in r.curves)
                if room >= 0:
                    rocs.append((b.title, r))
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
            "rocs": rocs,
            "left": left,
            "heat": next((heat[f"heat-{n}-{name}"] for n, b in enumerate(views.boards, 1) if name in b.metrics), ""),
        }
        yield page, "metric.html.j2", context
