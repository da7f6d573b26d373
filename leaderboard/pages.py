"""Which pages there are; what stands on those that show everything. Words and tags are in the templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from sleeperbench.leaderboard import charts, entries, judges, words
from sleeperbench.leaderboard.about import known, params
from sleeperbench.leaderboard.entries import Page
from sleeperbench.leaderboard.summary import NONE, PURIFIED, Board, Cell, attacked, role, setting, tally
from sleeperbench.leaderboard.tracks import ANSWERS, TRACKS
from sleeperbench.leaderboard.views import Views, href, mean_shown
from sleeperbench.leaderboard.words import Shown

PER_PAGE = 250
OVERVIEW = ("c_acc", "o_asr", "p_asr", "p_asr_net", "p_der")
HEAT_LEVELS = 6


def _pictures(views: Views, board: Board) -> list[dict[str, Any]]:
    """The headline pictures of a board: O-ASR against P-ASR, then against BEC; each names what it cannot draw."""
    made = []
    for metric in ("p_asr", "bec"):
        points, left_out = [], []
        for d in board.repairs:
            cells = attacked(board.of_defense[d])
            x, y = board.mean(cells, "o_asr", views.units), board.mean(cells, metric, views.units)
            if x.estimate is None or y.estimate is None:
                left_out.append(
                    (d, href("defenses", d), words.reason_word(x.reason if x.estimate is None else y.reason))
                )
                continue
            a, b = mean_shown(x, True), mean_shown(y, views.share(metric))
            points.append(
                charts.Point(
                    d,
                    href("defenses", d),
                    role(cells[0]),
                    x.estimate.value,
                    y.estimate.value,
                    (x.estimate.low, x.estimate.high),
                    (y.estimate.low, y.estimate.high),
                    f"{d}: O-ASR {a.text} ({a.note}), {words.label(metric)} {b.text} ({b.note})",
                )
            )
        chart = charts.scatter(points, "O-ASR", words.label(metric), y_share=views.share(metric))
        if chart or metric == "p_asr":
            made.append({"metric": metric, "chart": chart, "left_out": left_out, "open": metric == "p_asr"})
    return made


def _judged(views: Views, board: Board) -> dict[str, Any]:
    """Tables of the tracks that judge, and what a reader must know of the judges without a line in them."""
    made = judges.tables(views, board)
    return {"judged": made, "aside": judges.aside(views, board, made)}


def overview(views: Views) -> Page:
    """The question, and per board its picture and means."""
    parts = []
    for b in views.boards:
        metrics = [m for m in OVERVIEW if m in b.metrics]
        parts.append(
            {
                "board": b,
                "metrics": metrics,
                "tracks": views.by_track(b, metrics, b.repairs),
                **_judged(views, b),
                "pictures": _pictures(views, b),
                "not_implanted": sorted(b.not_implanted.items()),
            }
        )
    context = {"parts": parts, "tally": tally(views.results.cells), "names": entries.names(views)}
    return "index.html", "index.html.j2", context


def tables(views: Views) -> Iterator[Page]:
    """All cells, at most PER_PAGE to a page."""
    rows = views.rows
    pages = [rows[i : i + PER_PAGE] for i in range(0, len(rows), PER_PAGE)] or [[]]
    files = ["table.html" if i == 0 else f"table-{i + 1}.html" for i in range(len(pages))]
    for i, part in enumerate(pages):
        yield files[i], "table.html.j2", {"rows": part, "number": i + 1, "files": files, "all_rows": len(rows)}


def _heat(views: Views, board: Board, metric: str) -> dict[str, Any]:
    """One metric as attacks by defenses, means over seeds, shaded by where they lie in the metric's range."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for c in board.cells:
        found.setdefault((setting(c), c["defense"]), []).append(c)
    means = {k: board.mean(cells, metric, views.units) for k, cells in found.items()}
    values = [m.estimate.value for m in means.values() if m.estimate]
    low, high = (0.0, 1.0) if views.share(metric) else (min(values, default=0.0), max(values, default=1.0))
    lines = []
    for s in [*board.settings, *sorted({setting(c) for c in board.cells if c["attack"] == NONE})]:
        line: list[tuple[Shown, int | None, str]] = []
        for d in board.having(metric):
            mean = means.get((s, d))
            if mean is None:
                line.append((words.missing(metric, "not_run: not in the suite"), None, ""))
                continue
            level = None
            if mean.estimate:
                where = (mean.estimate.value - low) / (high - low) if high > low else 0.0
                level = min(HEAT_LEVELS - 1, max(0, int(where * HEAT_LEVELS)))
            one = found[s, d]
            link = href("cells", one[0]["cell"]) if len(one) == 1 else href("defenses", d)
            line.append((mean_shown(mean, views.share(metric)), level, link))
        lines.append((s, board.not_implanted.get(s, ""), line))
    return {"metric": metric, "lines": lines, "defenses": board.having(metric)}


def heatmap(views: Views) -> Page:
    """Attacks by defenses for every metric that cells have, each with the defenses that it says something of."""
    parts = [{"board": b, "maps": [_heat(views, b, m) for m in b.metrics]} for b in views.boards]
    return "heatmap.html", "heatmap.html.j2", {"parts": parts, "opened": (*OVERVIEW, *(t.metrics[0] for t in TRACKS))}


def compare(views: Views) -> Page:
    """All defenses with all headline means side by side."""
    parts = []
    for b in views.boards:
        metrics = [m for m in b.metrics if m not in ANSWERS]
        tracks = views.by_track(b, metrics, b.repairs)
        parts.append({"board": b, "metrics": metrics, "tracks": tracks, **_judged(views, b)})
    return "compare.html", "compare.html.j2", {"parts": parts}


def _public(value: Any) -> Any:
    """A run's settings without the suite's secret: it may not be published yet."""
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items() if k != "secret"}
    return [_public(v) for v in value] if isinstance(value, list) else value


def changelog(views: Views) -> Page:
    """What was run, with which versions, and how it ended."""
    runs = []
    for run in views.results.runs:
        suite = run.info.get("suite", "")
        facts = [
            (k, params(json.dumps(run.info[k])))
            for k in ("versions", "counts", "host")
            if isinstance(run.info.get(k), dict)
        ]
        runs.append(
            {
                "name": run.name,
                "suite": str(suite.get("name", "")) if isinstance(suite, dict) else str(suite),
                "facts": facts,
                "exit": str(run.info.get("exit", "")),
                "settings": json.dumps(_public(suite), indent=2, sort_keys=True, ensure_ascii=False)
                if isinstance(suite, dict)
                else "",
                "cells": sum(o is run for o in views.results.owner.values()),
            }
        )
    return "changelog.html", "changelog.html.j2", {"runs": runs}


def protocol(views: Views) -> Page:
    """The rules, in words."""
    return "protocol.html", "protocol.html.j2", {"purified": words.number(PURIFIED, True)}


def every_page(views: Views, write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """All pages as (path, template, context); `write` takes the files that pages show."""
    yield overview(views)
    yield from tables(views)
    yield heatmap(views)
    yield compare(views)
    yield from entries.methods(views)
    yield from entries.cells(views, write)
    yield from entries.datasets(views)
    yield from entries.metrics(views)
    yield protocol(views)
    yield "submit.html", "submit.html.j2", {}
    yield changelog(views)


def bibliography(views: Views) -> str:
    """BibTeX of the benchmark and of every plugin that was used, each entry once."""
    own = "@misc{sleeperbench,\n  title = {SleeperBench: is the backdoor gone, or only asleep?},\n  year = {2025}\n}"
    entries = {str(known(e, "bibtex")).strip() for e in views.results.plugins.values()}
    return "\n\n".join([own, *sorted(e for e in entries if e)]) + "\n"


def downloads(views: Views) -> Iterator[tuple[str, pa.Table]]:
    """The merged tables by name."""
    yield "measurements", views.results.measurements
    yield "cells", views.results.cells_table
