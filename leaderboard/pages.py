"""Which pages there are; what stands on those that show everything. Words and tags are in the templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from sleeperbench.leaderboard import boards, changes, entries, figures, methods, sweeps, table, words
from sleeperbench.leaderboard.about import BIBTEX, known, params
from sleeperbench.leaderboard.entries import Page
from sleeperbench.leaderboard.ranking import RULES
from sleeperbench.leaderboard.stats import DRAWS
from sleeperbench.leaderboard.summary import PURIFIED
from sleeperbench.leaderboard.views import Views

LONGEST = 60_000
"""Characters of a suite's settings that the changelog shows."""


def _public(value: Any) -> Any:
    """A run's settings without the suite's secret: it may not be published yet."""
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items() if k != "secret"}
    return [_public(v) for v in value] if isinstance(value, list) else value


def changelog(views: Views) -> Page:
    """What was run, with which versions, and how it ended."""
    runs = []
    for change in reversed(changes.changes(views)):
        run = change.run
        suite = run.info.get("suite", "")
        facts = [
            (k, params(json.dumps(_public(run.info[k]))))
            for k in ("versions", "counts", "host", "datasets", "tasks")
            if isinstance(run.info.get(k), dict)
        ]
        settings = (
            json.dumps(_public(suite), indent=2, sort_keys=True, ensure_ascii=False) if isinstance(suite, dict) else ""
        )
        facts_of = {k: str(run.info.get(k, "")) for k in ("exit", "protocol", "sandbox", "shard")}
        runs.append(entries.run_line(views, change) | facts_of | {"facts": facts, "settings": settings[:LONGEST]})
    return "changelog.html", "changelog.html.j2", {"runs": runs, "order": [r.name for r in views.results.runs]}


HONEST = {"drop": 2, "level": 90, "val": 20, "held": 30, "rows": 114}
"""The rule of choice that the protocol tells of: points, per cent, per cent of the clean rows, and rows."""
BUDGET = {"ks": "1, 2, 5, 10, 25, 50", "limit": 10, "models": 3, "draws": 3}
"""The rule of RA's budget, likewise."""


def protocol(views: Views) -> Page:
    """The rules, in words, with the gates of the suites that were run."""
    gates = []
    for run in views.results.runs:
        suite = run.info.get("suite")
        if isinstance(suite, dict) and isinstance(suite.get("gate"), dict):
            gates.append((str(suite.get("name", run.name)), params(json.dumps(suite["gate"]))))
    rules = [r for r in RULES.values() if r.id != "in_training"]
    found = {"purified": words.number(PURIFIED, True), "gates": gates, "rules": rules, "draws": DRAWS}
    found |= {"honest": HONEST, "budget": BUDGET}
    return "protocol.html", "protocol.html.j2", found


def every_page(views: Views, write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """All pages but those of cells, as (path, template, context); `write` takes the files that pages show."""
    track_pages = list(boards.tracks(views))
    yield boards.overview(views, track_pages)
    yield from track_pages
    yield from table.tables(views, write)
    method_pages, anchors = methods.methods(views, write)
    heat_pages = list(boards.heatmap(views, anchors))
    yield from heat_pages
    yield from sweeps.sweeps(views)
    yield from boards.compare(views, write)
    yield from method_pages
    yield from entries.datasets(views)
    yield from entries.metrics(views, heat_pages[0][2]["at"], write)
    yield (
        "figures.html",
        "figures.html.j2",
        {"figures": figures.figures(views, write), "most": figures.MOST, "pdf": figures.PDF},
    )
    yield protocol(views)
    yield "submit.html", "submit.html.j2", {}
    yield changelog(views)


def bibliography(views: Views) -> str:
    """BibTeX of the benchmark and of every plugin that was used, each entry once."""
    entries = {str(known(e, "bibtex")).strip() for e in views.results.plugins.values()}
    return "\n\n".join([BIBTEX, *sorted(e for e in entries if e)]) + "\n"


def downloads(views: Views) -> Iterator[tuple[str, pa.Table]]:
    """The merged tables by name."""
    yield "measurements", views.results.measurements
    yield "cells", views.results.cells_table
