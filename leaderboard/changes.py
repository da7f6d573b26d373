"""What each run brought: in order of time, what is new, which methods rose in version, which figures moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleeperbench import __version__
from sleeperbench.leaderboard import terms, words
from sleeperbench.leaderboard.names import plugin_id
from sleeperbench.leaderboard.stats import SAME
from sleeperbench.leaderboard.tables import Run, plain
from sleeperbench.leaderboard.views import Views, href

COMPARED = ("c_acc", "r_acc", "o_asr", "p_asr", "p_asr_net", "p_der", "bec", "reasr")
"""Columns of cells whose figures are compared between runs: shares, and BEC, which has their scale."""
LIKE = ("protocol", "data_digest", "attack_params", "defense_params", "clean_source")
"""Columns in which two cells of one name must agree for their figures to be compared."""
LISTED = 12
"""Moves, and methods of other versions, that a page lists of a run."""
NAMED = 3
"""Runs that the foot of a page names."""


@dataclass(frozen=True)
class Move:
    """A figure that two runs differ in."""

    cell: str
    href: str
    metric: str
    label: str
    before: str
    after: str
    change: str
    better: str


@dataclass(frozen=True)
class Change:
    """What a run changed about what the runs before it had measured.

    Args:
        run: The run.
        first: No run was before it.
        new: Cells that no earlier run has.
        again: Cells that an earlier run has with the same settings.
        unlike: Cells that an earlier run has under another protocol, data or parameters.
        methods: (kind, id, page) of attacks and defenses that no earlier run has.
        versions: (kind, id, version before, version now) of methods whose version differs.
        outcomes: (status before, status now, cells), the commonest first.
        moved: The largest moves.
        moves: How many figures moved in all.
    """

    run: Run
    first: bool
    new: int
    again: int
    unlike: int
    methods: tuple[tuple[str, str, str], ...]
    versions: tuple[tuple[str, str, str, str], ...]
    outcomes: tuple[tuple[str, str, int], ...]
    moved: tuple[Move, ...]
    moves: int


def in_time(runs: Sequence[Run]) -> list[Run]:
    """Runs by when their last task started; those without a date first, in the order given."""
    return sorted(runs, key=lambda r: r.ended)


def changes(views: Views) -> list[Change]:
    """What each run changed, in order of time."""
    known: dict[str, Mapping[str, Any]] = {}
    versions: dict[tuple[str, str], Any] = {}
    made: list[Change] = []
    for run in in_time(views.results.runs):
        rows = {
            r["cell"]: r for r in plain(run.cells.select(["cell", *LIKE, "status", "attack", "defense", *COMPARED]))
        }
        both = [c for c in rows if c in known]
        same = [c for c in both if all(rows[c][k] == known[c][k] for k in LIKE)]
        have, now = _methods(known.values()), _methods(rows.values())
        moves = _moves(views, known, rows, same)
        outcomes = Counter((known[c]["status"], rows[c]["status"]) for c in same)
        made.append(
            Change(
                run=run,
                first=not made,
                new=len(rows) - len(both),
                again=len(same),
                unlike=len(both) - len(same),
                methods=tuple((k, i, href(f"{k}s", i)) for k, i in sorted(now - have)) if made else (),
                versions=tuple(
                    (k, i, str(versions[k, i]), str(v))
                    for (k, i), v in sorted(run.versions.items())
                    if versions.get((k, i), v) != v
                ),
                outcomes=tuple(
                    (*(terms.STATUS_WORDS.get(s or "not_run", s) for s in pair), n)
                    for pair, n in sorted(outcomes.items(), key=lambda x: (-x[1], str(x[0])))
                    if pair[0] != pair[1]
                ),
                moved=tuple(moves[:LISTED]),
                moves=len(moves),
            )
        )
        known |= rows
        versions |= run.versions
    return made


def _methods(rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(kind, id) of the attacks and defenses of these cells."""
    return {(kind, plugin_id(r[kind] or "")) for r in rows for kind in ("attack", "defense")}


def _moves(
    views: Views, known: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]], same: Sequence[str]
) -> list[Move]:
    """The figures of these cells that differ, the largest difference first."""
    found = []
    for cell in same:
        for metric in COMPARED:
            old, new = known[cell][metric], rows[cell][metric]
            if old is None or new is None or not abs(new - old) > SAME or abs(new - old) == float("inf"):
                continue
            share = views.share(metric)
            up = (metric in terms.HIGHER) if new > old else (metric in terms.LOWER)
            change = words.points(new - old) if share else words.number(new - old, False)
            found.append(
                (
                    -abs(new - old),
                    cell,
                    metric,
                    Move(
                        cell,
                        href("cells", cell),
                        metric,
                        words.label(metric),
                        words.number(old, share),
                        words.number(new, share),
                        ("+" if new > old else "") + change,
                        "better" if up else "worse" if {metric} & (terms.HIGHER | terms.LOWER) else "",
                    ),
                )
            )
    return [m for *_, m in sorted(found, key=lambda x: x[:3])]


def when(run: Run) -> str:
    """From which day to which a run measured."""
    first, last = run.began[:10], run.ended[:10]
    return "no date recorded" if not last else first if first == last else f"{first} to {last}"


def measured_with(run: Run) -> str:
    """The version of the benchmark that a run was measured with."""
    found = run.info.get("versions")
    version = found.get("sleeperbench") if isinstance(found, dict) else None
    return f"sleeperbench {version}" if isinstance(version, str) else "version not recorded"


@dataclass(frozen=True)
class Foot:
    """What the foot of every page says of where its figures are from."""

    runs: tuple[tuple[str, str, str], ...]
    more: int
    version: str


def foot(runs: Sequence[Run]) -> Foot:
    """(name, days, version) of the runs that were measured last; how many more there are; who made the pages."""
    order = in_time(runs)[::-1]
    named = tuple((r.name, when(r), measured_with(r)) for r in order[:NAMED])
    return Foot(named, max(0, len(order) - NAMED), __version__)
