"""Tables of the methods that judge: one per track with data, and each detector's figures over many models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sleeperbench.leaderboard import media, paging, stats, summary, words
from sleeperbench.leaderboard.media import Curve
from sleeperbench.leaderboard.names import plugin_id
from sleeperbench.leaderboard.summary import Board, Cell, attacked, benign, setting, weak
from sleeperbench.leaderboard.tracks import TRACKS, ZOO, Track, judge
from sleeperbench.leaderboard.views import MeanRow, Views, href
from sleeperbench.leaderboard.words import Shown

Models = Mapping[tuple[str, str], Mapping[str, Any]]
"""(metric, qualifier) -> a measurement over many models."""

WEAK = {
    "counted": "the run kept attacks that did not implant: figures over many models count these models as backdoored, "
    "and a detector that passes them over is not wrong",
    "left out": "the run kept attacks that did not implant: the figures are those without these models, worked out "
    "from the scores and verdicts of single cells; beneath them is what was measured with them",
}
"""What became of models of attacks that did not implant in figures over many models."""


@dataclass(frozen=True)
class Table:
    """One track on one board: columns with figures, and the lines of its defenses by access class.

    `drawn` says whether any of its figures over many models has a curve.
    """

    track: Track
    metrics: tuple[str, ...]
    groups: tuple[tuple[str, tuple[MeanRow, ...]], ...]
    drawn: bool


@dataclass(frozen=True)
class Zoo:
    """A detector over the models of one board: `lines` are (what is held against the clean models, badges, figures).

    `curves` are what its evaluators drew over these models, such as ROC curves.
    """

    title: str
    metrics: tuple[str, ...]
    lines: tuple[tuple[str, tuple[tuple[str, str], ...], tuple[Shown, ...]], ...]
    badges: tuple[tuple[str, str], ...]
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Roc:
    """A detector's ROC curves over the models of one board, with its AUROC over all of them, weak ones too."""

    defense: str
    href: str
    auroc: Shown
    badges: tuple[tuple[str, str], ...]
    curves: tuple[Curve, ...]


def shown(models: Models, metric: str, qualifier: str = "") -> Shown:
    """A figure over many models with its counts and interval, or why there is none."""
    row = models.get((metric, qualifier))
    if row is None:
        pooled = "pooled: every attack is held against the same clean models"
        return words.missing(metric, pooled if (metric, "") in models else "not_run: no evaluator measures it")
    if row["value"] is None:
        return words.missing(metric, row["reason"] or row["status"] or "")
    ends: tuple[Any, ...] = (row["lower"], row["upper"])
    if None in ends:
        beside = (f"{qualifier};stat={end}".lstrip(";") for end in ("lower", "upper"))
        ends = tuple((models.get((metric, name)) or {}).get("value") for name in beside)
    interval = None if None in ends else (ends[0], ends[1])
    counted = f"{row['count']} of {row['total']}" if row["count"] is not None and row["total"] else ""
    span = words.span(*interval, True) if interval else ""
    title = f"{words.label(metric)} {row['value']!r}" + (f"; {counted} models" if counted else "")
    title += f"; 95 % interval over models: {span} %" if span else ""
    note = "; ".join(part for part in (counted, span) if part)
    return Shown(metric, words.number(row["value"], True), repr(row["value"]), title, note)


def models(views: Views, board: Board, defense: str) -> Models:
    """What was measured over many models, of one defense on one board."""
    return {(m["metric"], m["qualifier"] or ""): m for m in views.zoo.get((*board.key, defense), ())}


def _rates(attacks: Sequence[Cell], clean: Sequence[Cell]) -> dict[str, float]:
    """Figures over these models, as evaluator `detection_zoo` makes them of scores and verdicts."""
    placed = stats.placements({("", i): c["det_score"] for i, c in enumerate(attacks)}, [c["det_score"] for c in clean])
    hit, alarm = ([bool(c["verdict"]) for c in some] for some in (attacks, clean))
    tpr, fpr = sum(hit) / len(hit), sum(alarm) / len(alarm)
    right = sum(hit) + len(alarm) - sum(alarm)
    return {
        "det_auroc": sum(placed.values()) / len(placed),
        "det_tpr": tpr,
        "det_fpr": fpr,
        "det_bacc": (1 + tpr - fpr) / 2,
        "det_acc": right / (len(hit) + len(alarm)),
    }


def _weak_models(board: Board, defense: str, qualifier: str = "") -> tuple[int, int]:
    """(weak models, all models) of attacks that a pooled figure, a mean over attacks or one of an attack is over."""
    label = qualifier.removeprefix("attack=") if qualifier.startswith("attack=") else ""
    cells = [] if qualifier.startswith("clean=") else attacked(board.of_defense[defense])
    scored = [weak(c) for c in cells if c["det_score"] is not None and label in ("", c["attack"])]
    return sum(scored), len(scored)


def implanted(over: Models, board: Board, defense: str) -> dict[str, float]:
    """Figures over the models whose backdoor implanted, where some did not and the single cells tell.

    They tell where the same sum over all models gives each pooled figure that was measured. The rate of false alarms
    is over clean models alone and stays as it is.
    """
    judged = [c for c in board.of_defense[defense] if None not in (c["det_score"], c["verdict"])]
    attacks, clean = attacked(judged), [c for c in judged if benign(c)]
    good = [c for c in attacks if not weak(c)]
    if not clean or not good or len(good) == len(attacks):
        return {}
    pooled = {m: v for m in ZOO if (v := (over.get((m, "")) or {}).get("value")) is not None}
    again = {m: v for m, v in _rates(attacks, clean).items() if m in pooled}
    if not again or any(abs(v - pooled[m]) > stats.SAME for m, v in again.items()):
        return {}
    return {m: v for m, v in _rates(good, clean).items() if m in again and m != "det_fpr"}


def _without(metric: str, value: float, models: int, measured: Shown) -> Shown:
    """A figure without the models of attacks that did not implant, above the one with them."""
    note = f"{models} models; {measured.text} with weak ones"
    title = f"{words.label(metric)} {value!r} over {models} models whose backdoor implanted; with weak ones: "
    return Shown(metric, words.number(value, True), repr(value), title + measured.title, note)


def _line(views: Views, board: Board, defense: str, track: Track, metrics: Sequence[str]) -> MeanRow:
    """A defense's line: figures over many models as they were measured, the others as means over attacks."""
    over, cells = models(views, board, defense), attacked(board.of_defense[defense])
    base = views.mean_row(board, defense, href("defenses", defense), cells, [m for m in metrics if m not in ZOO])
    means = {f.metric: f for f in base.figures}
    asked = [m for m in track.metrics if m not in ZOO] + ["det_score"] * (track.id == "model")
    covered = {setting(c) for c in cells if not weak(c) and any(board.counted(c, m)[0] is not None for m in asked)}
    figures = {m: shown(over, m) if m in ZOO else means[m] for m in metrics}
    badges = base.badges
    n, total = _weak_models(board, defense)
    if n and over and set(ZOO) & set(metrics):
        alone = implanted(over, board, defense)
        figures |= {m: _without(m, v, total - n, figures[m]) for m, v in alone.items() if m in figures}
        badges = (*badges, *_weak_badge(n, "left out" if alone else "counted"))
    return replace(base, covered=len(covered), figures=tuple(figures.values()), badges=badges)


def _weak_badge(n: int, what: str = "counted") -> tuple[tuple[str, str], ...]:
    """A badge that says what became of so many models of attacks that did not implant; none without any."""
    return ((f"{n} weak {what}", WEAK[what]),) if n else ()


def tables(views: Views, board: Board, only: str = "") -> list[Table]:
    """A table per track that has a figure on this board; with `only`, of that metric alone."""
    made = []
    for track in TRACKS:
        having: dict[str, set[str]] = {}
        for d in board.defenses:
            over = models(views, board, d)
            has = {m for m in track.metrics if any(c.get(m) is not None for c in attacked(board.of_defense[d]))}
            has |= {m for m in track.metrics if (over.get((m, "")) or {}).get("value") is not None}
            if has and (not only or only in has):
                having[d] = has
        metrics = tuple(m for m in track.metrics if any(m in has for has in having.values()) and only in ("", m))
        if not metrics:
            continue
        groups: dict[str, list[MeanRow]] = {}
        for d in having:
            access = summary.track(board.of_defense[d][0])
            title = summary.TRACKS.get(access, f"access {access or 'not recorded'}")
            groups.setdefault(title, []).append(_line(views, board, d, track, metrics))
        drawn = "det_auroc" in metrics and any(_drawn(views, board, d) for d in having)
        made.append(Table(track, metrics, tuple((t, tuple(lines)) for t, lines in groups.items()), drawn))
    return made


def used_by(board: Board, defense: str) -> list[tuple[str, str]]:
    """(label, page) of the wrappers that turn a defense's answers into repaired models."""
    inner = plugin_id(defense)
    wrappers = [d for d in board.defenses if plugin_id(d).partition(":")[2] == inner]
    return [(d, href("defenses", d)) for d in wrappers]


def aside(views: Views, board: Board, made: Sequence[Table]) -> list[dict[str, Any]]:
    """Judges without a line in any table: cleansers, which wrappers make use of, and those without a figure."""
    shown_in = {line.name for table in made for _, lines in table.groups for line in lines}
    found = []
    for d in board.defenses:
        cells = board.of_defense[d]
        if d in shown_in or not judge(cells[0]):
            continue
        states = Counter(words.status_short(c) for c in cells)
        why = min(states, key=lambda s: (-states[s], s))
        wrapper = "retrain" if cells[0]["kind"] == "cleansing" else ""
        found.append({"name": d, "href": href("defenses", d), "why": why, "wrapper": wrapper, "by": used_by(board, d)})
    return found


def _drawn(views: Views, board: Board, defense: str) -> bool:
    """Whether pictures or curves of a defense over many models were drawn."""
    return any(views.results.drawn(m["cell"]) for m in views.zoo.get((*board.key, defense), ()))


def curves(views: Views, board: Board, defense: str, write: Callable[[str, bytes], None]) -> tuple[Curve, ...]:
    """What was drawn over many models, of one defense on one board, by the run that its figures are from."""
    names = sorted({m["cell"] for m in views.zoo.get((*board.key, defense), ())})
    return tuple(c for name in names for c in media.load(views.results.drawn(name), write).curves)


def rocs(views: Views, board: Board, write: Callable[[str, bytes], None]) -> list[Roc]:
    """The ROC curves of every detector that judged the models of a board, without their lists of values."""
    made = []
    for d in board.defenses:
        drawn = [c for c in curves(views, board, d, write) if c.source.endswith("-roc")]
        if drawn:
            auroc = shown(models(views, board, d), "det_auroc")
            badges = _weak_badge(_weak_models(board, d)[0])
            made.append(Roc(d, href("defenses", d), auroc, badges, tuple(replace(c, measured=True) for c in drawn)))
    return made


def fitting(found: Sequence[Curve], room: int) -> tuple[Curve, ...]:
    """The curves that fit into `room` bytes; those whose values do not fit are drawn without them."""
    kept = []
    for c in found:
        shown = c if c.weight <= room else replace(c, measured=True)
        if shown.weight <= room:
            kept.append(shown)
            room -= shown.weight
    return tuple(kept)


def zoos(views: Views, plugin: str, write: Callable[[str, bytes], None]) -> list[Zoo]:
    """A defense's figures over many models: pooled, as a mean over attacks, and per attack, on each board."""
    made = []
    room = paging.ROOM // 3
    for b in views.boards:
        for d in b.defenses:
            over = models(views, b, d)
            if plugin_id(d) != plugin or not over:
                continue
            measured = {m for m, _ in over}
            metrics = tuple(m for m in (*ZOO, *sorted(measured - {*ZOO})) if m in measured)
            bounds = ("stat=lower", "stat=upper")
            names = {"": "all attacks, pooled", "stat=macro": "mean over attacks"}
            order = sorted({q for _, q in over if not q.endswith(bounds)}, key=lambda q: (q not in names, q))
            lines = []
            for q in order:
                badges = _weak_badge(_weak_models(b, d, q)[0])
                who = names.get(q) or q.removeprefix("attack=")
                lines.append((who, badges, tuple(shown(over, m, q) for m in metrics)))
            if alone := implanted(over, b, d):
                n, total = _weak_models(b, d)
                figures = tuple(
                    _without(m, alone[m], total - n, shown(over, m))
                    if m in alone
                    else shown(over, m)
                    if m == "det_fpr"
                    else words.missing(m, "pooled: single cells do not tell it without the weak attacks")
                    for m in metrics
                )
                lines.insert(1, ("attacks that implanted, pooled", (), figures))
            flags = sorted({f for m in over.values() for f in (m["flag"] or "").split(";") if f})
            title = b.title if d == plugin else f"{b.title} · {d}"
            drawn = fitting(curves(views, b, d, write), room)
            room -= sum(c.weight for c in drawn)
            made.append(Zoo(title, metrics, tuple(lines), views.flags(flags), drawn))
    return made
