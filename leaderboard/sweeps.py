"""Pictures over what a suite varies: a parameter of an attack or a defense, the poison rate, the architecture."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sleeperbench.leaderboard import charts, paging, words
from sleeperbench.leaderboard.entries import Page
from sleeperbench.leaderboard.names import plugin_id
from sleeperbench.leaderboard.paging import Section
from sleeperbench.leaderboard.summary import Board, Cell, Mean, attacked, measured, setting, weak
from sleeperbench.leaderboard.views import Views, href, mean_shown

SHOWN = ("c_acc", "o_asr", "p_asr", "excl", "cover_acc", "silhouette")
"""What is drawn, a picture each, of what has figures."""
ARCH = 1
"""Place of the architecture in a board's key."""
RATE = "poison rate"
DEEPEST = 8
"""Wrappers within wrappers whose parameters are looked at."""


@dataclass(frozen=True)
class Dot:
    """The cells of one line at one value (a number, or a word such as an architecture's name), one per seed."""

    line: str
    x: Any
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sweep:
    """One defense over one thing that varies; `share` says that the values are printed as per cent."""

    defense: str
    over: str
    share: bool
    fixed: str
    dots: tuple[Dot, ...]

    @property
    def named(self) -> bool:
        """Its values are words, which stand side by side as bars."""
        return any(isinstance(d.x, str) for d in self.dots)


def flat(text: str) -> dict[str, Any]:
    """Parameters by name, those of a wrapped plugin as `inner.NAME`; empty where the text is no JSON object."""
    try:
        raw = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    found: dict[str, Any] = {}
    before = ""
    for _ in range(DEEPEST):
        if not isinstance(raw, dict):
            break
        found |= {before + str(k): v for k, v in raw.items() if k != "inner"}
        raw, before = raw.get("inner"), before + "inner."
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _value(raw: Any) -> float | str | None:
    """A parameter as a place on an axis: a number, or a word; None of anything else."""
    if _number(raw):
        return float(raw)
    if isinstance(raw, bool):
        return "on" if raw else "off"
    return raw if isinstance(raw, str) and raw else None


def _told(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def varied(
    variants: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, dict[str, Any], dict[float | str, str]]]:
    """Of a plugin's variants (label -> parameters) those that differ in one number, or in one word.

    Yields:
        The parameter's name, the others in which variants of this plugin differ, and value -> label.
    """
    names = sorted({k for p in variants.values() for k in p})
    differing = [k for k in names if len({_told(p.get(k)) for p in variants.values()}) > 1]
    for key, form in itertools.product(differing, (float, str)):
        groups: dict[str, dict[float | str, str]] = {}
        fixed: dict[str, dict[str, Any]] = {}
        for label in sorted(variants):
            p = variants[label]
            x = _value(p.get(key))
            if x is not None and isinstance(x, form):
                rest = {k: p.get(k) for k in differing if k != key}
                fixed[_told(rest)] = rest
                groups.setdefault(_told(rest), {}).setdefault(x, label)
        for rest_text, by_value in sorted(groups.items()):
            if len(by_value) > 1:
                yield key, fixed[rest_text], dict(sorted(by_value.items()))


def _families(cells: Iterable[Cell], kind: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Plugin -> label -> parameters, of plugins with several labels."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for c in cells:
        labels = found.setdefault(plugin_id(c[kind]), {})
        if c[kind] not in labels:
            labels[c[kind]] = flat(c[f"{kind}_params"])
    return {p: labels for p, labels in found.items() if len(labels) > 1}


def _words(fixed: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v, default=str)}" for k, v in fixed.items())


def _lines(name: str, fixed: Mapping[str, Any]) -> str:
    """A line's name."""
    return f"{name} ({_words(fixed)})" if fixed else name


def spoken(cells: Iterable[Cell], kind: str) -> dict[str, tuple[str, str]]:
    """Labels of plugins that stand with several settings -> (the plugin, the values in which its labels differ).

    A label whose values another one has too, or none, is left out: its digest alone tells it apart.
    """
    found: dict[str, tuple[str, str]] = {}
    for plugin, variants in _families(cells, kind).items():
        names = sorted({k for p in variants.values() for k in p})
        differing = [k for k in names if len({_told(p.get(k)) for p in variants.values()}) > 1]
        values = {label: _words({k: p[k] for k in differing if k in p}) for label, p in variants.items()}
        count = Counter(values.values())
        found |= {label: (plugin, text) for label, text in values.items() if text and count[text] == 1}
    return found


def _spoken_settings(cells: Sequence[Cell]) -> dict[str, str]:
    """Attack setting -> its name, with values in place of a digest."""
    known = spoken(cells, "attack")
    found = {}
    for c in cells:
        plugin, text = known.get(c["attack"], (c["attack"], ""))
        found[setting(c)] = (f"{plugin} ({text})" if text else plugin) + setting(c).removeprefix(c["attack"])
    return found


def of_board(board: Board) -> Iterator[Sweep]:
    """The sweeps of a board: over parameters of defenses, over parameters of attacks, over the poison rate."""
    repairs = board.repairs
    cells = [c for d in repairs for c in attacked(board.of_defense[d])]
    at = {k: tuple(v) for k, v in board.of_field.items()}
    settings = sorted({setting(c) for c in cells})
    named, defenses, labels = _spoken_settings(cells), spoken(cells, "defense"), spoken(cells, "attack")
    for plugin, variants in sorted(_families(cells, "defense").items()):
        for key, fixed, by_value in varied(variants):
            dots = [Dot(named[s], x, at[s, d]) for s in settings for x, d in by_value.items() if (s, d) in at]
            if len({dot.x for dot in dots}) > 1:
                yield Sweep(plugin, key, False, _words(fixed), tuple(dots))
    attacks = list(_axes_of_attacks(cells, labels))
    for over, share, defense in dict.fromkeys((o, s, d) for o, s, d, _ in attacks):
        dots = [dot for o, _, d, some in attacks if (o, d) == (over, defense) for dot in some]
        name, values = defenses.get(defense, (defense, ""))
        yield Sweep(name, over, share, values, tuple(dots))


def _axes_of_attacks(
    cells: Sequence[Cell], labels: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, bool, str, list[Dot]]]:
    """(what varies, whether it is a share, defense, one line's dots) for attacks, defense after defense.

    Lines have the values of `labels` in place of a digest.
    """
    families = _families(cells, "attack")
    found: dict[tuple[str, str, float | None], list[Cell]] = {}
    for c in cells:
        found.setdefault((c["defense"], c["attack"], c["rate"]), []).append(c)
    rates = sorted({c["rate"] for c in cells if c["rate"] is not None})
    for defense in dict.fromkeys(c["defense"] for c in cells):
        for plugin, variants in sorted(families.items()):
            for key, fixed, by_value in varied(variants):
                for rate in [*rates, None]:
                    dots = [(x, found.get((defense, label, rate))) for x, label in by_value.items()]
                    if sum(some is not None for _, some in dots) > 1:
                        name = _lines(plugin, fixed)
                        name += f" at {100 * rate:g} %" if rate is not None and len(rates) > 1 else ""
                        yield key, False, defense, [Dot(name, x, tuple(some)) for x, some in dots if some]
        for attack in sorted({a for d, a, _ in found if d == defense}):
            own = [(r, found[defense, attack, r]) for r in rates if (defense, attack, r) in found]
            if len(own) > 1:
                plugin, values = labels.get(attack, (attack, ""))
                name = f"{plugin} ({values})" if values else plugin
                yield RATE, True, defense, [Dot(name, r, tuple(some)) for r, some in own]


def of_archs(boards: Sequence[Board]) -> Iterator[Sweep]:
    """Defenses that boards of several architectures have: these, side by side."""
    found: dict[str, list[Dot]] = {}
    cells = [c for board in boards for d in board.repairs for c in attacked(board.of_defense[d])]
    named, defenses = _spoken_settings(cells), spoken(cells, "defense")
    for board in boards:
        for d in board.repairs:
            for s in sorted({setting(c) for c in attacked(board.of_defense[d])}):
                found.setdefault(d, []).append(Dot(named[s], board.key[ARCH], tuple(board.of_field[s, d])))
    for d, dots in found.items():
        if len({dot.x for dot in dots}) > 1:
            name, values = defenses.get(d, (d, ""))
            yield Sweep(name, "architecture", False, values, tuple(sorted(dots, key=lambda dot: dot.line)))


def mean(dot: Dot, metric: str, views: Views) -> Mean:
    """The mean over seeds of what was measured, also of attacks that did not implant and of ruined models."""
    made = measured([views.with_aside(c, metric) for c in dot.cells], metric, views.units)
    return replace(made, weak=all(map(weak, dot.cells)))


def _target(dot: Dot) -> str:
    """The page behind a mark: its cell, or of several seeds the defense."""
    one = len(dot.cells) == 1
    return href("cells", dot.cells[0]["cell"]) if one else href("defenses", dot.cells[0]["defense"])


def _panel(views: Views, sweep: Sweep, metric: str) -> dict[str, Any] | None:
    """One picture, with the page behind each of its marks; None without a figure."""
    share = views.share(metric)
    times = 100.0 if share else 1.0
    series, links = [], []
    for name, some in itertools.groupby(sweep.dots, key=lambda d: d.line):
        known = [(d, e) for d in some if (e := mean(d, metric, views).estimate)]
        if known:
            xs = tuple(100 * d.x if sweep.share else d.x for d, _ in known)
            y, low, high = (tuple(times * getattr(e, p) for _, e in known) for p in ("value", "low", "high"))
            series.append(charts.Series(name, xs, y, low, high))
            links.append([_target(d) for d, _ in known])
    if not series:
        return None
    y_name = words.label(metric) + (", %" if share else "")
    x_name = sweep.over + (", %" if sweep.share else "")
    if sweep.named:
        bars = charts.bars(series, x_name, y_name)
        return {"metric": metric, "bars": list(zip(bars.bars, itertools.chain(*links), strict=True)), "chart": bars}
    drawn = charts.lines(series, x_name, y_name)
    marks = [list(zip(line.dots, found, strict=False)) for line, found in zip(drawn.lines, links, strict=True)]
    return {"metric": metric, "marks": marks, "chart": drawn}


def _line(views: Views, sweep: Sweep, dot: Dot, metrics: Sequence[str]) -> dict[str, Any]:
    """A line of the table of the same numbers."""
    x = dot.x if isinstance(dot.x, str) else words.number(dot.x, False)
    seeds = [(href("cells", c["cell"]), c["seed"], "") for c in dot.cells]
    return {
        "name": dot.line,
        "x": f"{100 * dot.x:g} %" if sweep.share else x,
        "order": dot.x,
        "seeds": seeds,
        "figures": [mean_shown(mean(dot, m, views), views.share(m)) for m in metrics],
    }


def _section(views: Views, group: int, n: int, sweep: Sweep) -> Section | None:
    panels = [p for m in SHOWN if (p := _panel(views, sweep, m))]
    if not panels:
        return None
    metrics = [p["metric"] for p in panels]
    lines = [_line(views, sweep, d, metrics) for d in sweep.dots]
    weights = [
        260 + 2 * paging.size(x["name"]) + 60 * len(x["seeds"]) + sum(map(paging.figure, x["figures"])) for x in lines
    ]
    names = sum(paging.size(d.line) for d in sweep.dots)
    fixed = 1500 + len(panels) * (3500 + 520 * len(sweep.dots) + names)
    return Section(group, "sweep", f"sweep-{group}-{n}", {"sweep": sweep, "panels": panels}, lines, weights, fixed)


def _groups(views: Views) -> Iterator[tuple[str, Callable[[], Iterator[Sweep]]]]:
    """Titles with their sweeps: every board, then boards that differ in the architecture alone."""
    for board in views.boards:
        yield board.title, lambda board=board: of_board(board)  # type: ignore[misc]
    alike: dict[tuple[str, ...], list[Board]] = {}
    for board in views.boards:
        alike.setdefault((*board.key[:ARCH], *board.key[ARCH + 1 :]), []).append(board)
    for some in alike.values():
        if len(some) > 1:
            first = some[0].title.split(" · ")
            title = " · ".join([first[0], f"{len(some)} architectures", *first[2:]])
            yield title, lambda some=some: of_archs(some)  # type: ignore[misc]


def sweeps(views: Views) -> Iterator[Page]:
    """All sweeps, board after board."""
    titles, made = [], []
    for group, (title, found) in enumerate(_groups(views)):
        titles.append(title)
        made += [s for n, sweep in enumerate(found(), 1) if (s := _section(views, group, n, sweep))]
    parts = paging.cut(made)
    files = paging.files("sweeps", len(parts))
    at = {s.id: f"{file}#{s.id}" for file, part in zip(files, parts, strict=True) for s in part if s.part == 1}
    listed = [(g, [(s.head["sweep"], s.id) for s in some]) for g, some in itertools.groupby(made, lambda s: s.group)]
    for i, part in enumerate(parts):
        groups = [(g, list(some)) for g, some in itertools.groupby(part, key=lambda s: s.group)]
        context = {"groups": groups, "titles": titles, "listed": listed if i == 0 else [], "at": at}
        yield files[i], "sweeps.html.j2", context | {"number": i + 1, "files": files}
