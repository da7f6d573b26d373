"""Pages of attacks and defenses: what each is, how it was set, what it costs, where it stands, and all its cells."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc

from sleeperbench.leaderboard import boards, judges, media, paging, ranking, stats, terms, words
from sleeperbench.leaderboard.entries import Page, names
from sleeperbench.leaderboard.names import digest12, plugin_id
from sleeperbench.leaderboard.paging import Section
from sleeperbench.leaderboard.summary import NONE, Board, Cell, benign, lost, setting, tally, weak
from sleeperbench.leaderboard.tracks import ANSWERS, judge
from sleeperbench.leaderboard.views import Row, Views, href
from sleeperbench.schema import implant_bar

SHEET = 12
"""Most settings on an attack's contact sheet."""
SHEET_ROOM = (330, 1200)
"""Width and height that a contact sheet is blown up to at most, by whole pixels: its columns' names need room."""
GALLERIES = {"gallery": "", "gallery_training": " · as poisoned in training"}
"""Pictures of a contact sheet, and what their titles add."""
TRAINED = "form=training"
"""Qualifier of what is visible of the second one."""
COLUMNS = ("clean", "poisoned")
"""Columns of a contact sheet, before the residual."""
VISIBLE = ("psnr", "ssim", "linf")
APART = {
    "asr_leak": "Leak",
    "cover_acc": "Accuracy on covers",
    "worst_trigger": "Worst trigger",
    "worst_class": "Worst class",
}
"""Columns of the table of bars that stand where an attack has such a figure."""
FULL = 250
ROWS_ROOM = 120_000
"""Rows and bytes up to which a page shows its cells in full; beyond, its means link to each."""
Anchors = dict[tuple[Any, ...], str]
"""(kind, board's key, attack setting, defense) -> where its line of means is."""


def _seeds(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    """(page, seed, css) of cells, by seed."""
    css = {True: "lost", False: ""}
    return [
        (
            href("cells", c["cell"]),
            str(c["seed"]),
            "weak" if weak(c) else css[lost(c)] if c["status"] == "ok" else "lost",
        )
        for c in sorted(cells, key=lambda c: (c["seed"], c["cell"]))
    ]


def _sections(views: Views, n: int, board: Board, kind: str, across: str, name: str) -> list[Section]:
    """Means per attack and defense: of the models that were handed out, then of the answers that were given."""
    mine = board.of_method.get((kind, name), {})
    made = []
    for answers in (False, True):
        metrics = [
            m
            for m in board.metrics
            if (m in ANSWERS) is answers and any(c[m] is not None for cells in mine.values() for c in cells)
        ]
        shown = {d for m in metrics for d in board.having(m)}
        groups = {key: cells for key, cells in mine.items() if key[1] in shown}
        several = len({k[kind == "defense"] for k in groups}) > 1
        lines, weights = [], []
        for (s, d), cells in sorted(groups.items()):
            other = d if kind == "attack" else s
            own = (s if kind == "attack" else d) if several else ""
            known = [m for x in metrics if (m := views.field(board, s, d, x)) is not None]
            line = views.mean_row(board, other, href(f"{across}s", cells[0][across]), cells, metrics, known)
            anchor = f"m{'a' if answers else ''}-{digest12(chr(0).join((*board.key, s, d)))}"
            lines.append((own, line, _seeds(cells), anchor, (s, d)))
            weights.append(paging.mean_row(line) + 2 * paging.size(own) + 70 * len(cells) + 60)
        if lines:
            head = {"board": board, "metrics": metrics, "several": several, "answers": answers, "key": board.key}
            made.append(
                Section(
                    n,
                    "method_means",
                    f"means-{n}{'-answers' * answers}",
                    head,
                    lines,
                    weights,
                    1500 + 260 * len(metrics),
                )
            )
    return made


Apart = Mapping[str, Mapping[str, float]]
"""Cell -> figure -> value, of undefended models."""


def _apart(views: Views) -> Apart:
    """How visible the triggers are and where else they work: what no column of the cells has."""
    rows = views.results.measurements.select(["cell", "defense", "metric", "qualifier", "value"])
    known = pc.is_in(rows["metric"], value_set=pa.array([*VISIBLE, "asr_leak", "cover_acc", "asr"]))
    rows = rows.filter(pc.and_(pc.and_(known, pc.equal(rows["defense"], NONE)), pc.is_finite(rows["value"])))
    found: dict[str, dict[str, float]] = {}
    for cell, metric, qualifier, value in zip(
        *(rows[c].to_pylist() for c in ("cell", "metric", "qualifier", "value")), strict=True
    ):
        mine, part = found.setdefault(cell, {}), qualifier or ""
        if metric == "asr":
            key = {"trigger": "worst_trigger", "class": "worst_class"}.get(part.partition("=")[0])
            if key and ";" not in part:
                mine[key] = min(value, mine.get(key, value))
        elif not part:
            mine[metric] = value
        elif part == TRAINED:
            mine[f"{metric};{part}"] = value
    return found


def _infos(views: Views, name: str) -> list[Mapping[str, Any]]:
    """What an attack declares, as far as it is known; of a wrapper its own first, then what the wrapped one does."""
    entries = (views.results.plugins.get(("attack", part), {}) for part in name.split(":"))
    return [info if isinstance(info := e.get("info"), dict) else {} for e in entries]


def _gate(views: Views, name: str, apart: Apart) -> list[dict[str, Any]]:
    """Per board and rate: the bars at which the attack counts as implanted, and what was measured without a defense."""
    infos = _infos(views, name)
    found = []
    for b in views.boards:
        for s in b.settings:
            cells = b.of_field.get((s, NONE), [])
            if not cells or plugin_id(cells[0]["attack"]) != name:
                continue
            run = views.results.owner[cells[0]["cell"]]
            suite = run.info.get("suite")
            clean = [c for key, some in b.of_field.items() if key[1] == NONE for c in some if benign(c)]
            reference = stats.mean_over_attacks({"": [c["c_acc"] for c in clean if c["c_acc"] is not None]}, share=True)
            measured = {m: _mean(s, [c[m] for c in cells if c[m] is not None]) for m in ("o_asr", "c_acc", "r_acc")}
            parts = {m: [v for c in cells if (v := apart.get(c["cell"], {}).get(m)) is not None] for m in APART}
            own = [v for i in infos if _share(v := i.get("implant_asr"))]
            found.append(
                {
                    "board": b.title,
                    "setting": s,
                    "declared": _bar(min(own) if own else None),
                    "gate": _bar(_suites_bar(infos, cells[0], suite, reference)),
                    "published": _published(infos[0].get("published_asr"), name.partition(":")[2]),
                    "measured": measured,
                    "apart": {m: _mean(s, values) if values else "" for m, values in parts.items()},
                    "clean": "not measured" if reference is None else words.number(reference.value, True),
                    "implanted": "no: " + words.reason_text(b.not_implanted[s]) if s in b.not_implanted else "yes",
                    "seeds": _seeds(cells),
                }
            )
    return found


def _mean(label: str, values: Sequence[float]) -> str:
    """A mean share over seeds, with its ends."""
    e = stats.mean_over_attacks({label: list(values)}, share=True)
    return "not measured" if e is None else words.number(e.value, True) + _ends(e)


def _suites_bar(
    infos: Sequence[Mapping[str, Any]], cell: Cell, suite: Any, clean: stats.Estimate | None
) -> float | None:
    """The suite's own bar for an attack: lower for clean labels and low rates; all to all clean C-Acc may set it."""
    gate = suite.get("gate") if isinstance(suite, dict) else None
    try:
        params = json.loads(cell["attack_params"] or "{}")
    except (ValueError, RecursionError):
        params = {}
    if not isinstance(gate, dict) or not all(_share(gate.get(k)) for k in ("implant_asr", "implant_asr_low")):
        return None
    labels = [{"clean_label": i.get("clean_label")} for i in infos]
    return implant_bar(labels, params, cell["rate"] or 0, gate, None if clean is None else clean.value)


def _ends(e: stats.Estimate) -> str:
    if e.kind == "single":
        return " (1 seed)"
    return f" ({'range ' * (e.kind == 'range')}{words.span(e.low, e.high, True)})"


def _share(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _bar(value: Any) -> str:
    return words.number(float(value), True) if _share(value) else "not recorded"


def _published(value: Any, inner: str = "") -> str:
    """The attack success that was published, with its setting and source; a wrapper's by what it wraps."""
    found = value if isinstance(value, dict) else {"value": value}
    if inner and isinstance(of := found.get(inner), dict):
        found = of
    if not _share(found.get("value")):
        return "not recorded"
    where = "; ".join(part for k in ("setting", "source") if isinstance(part := found.get(k), str) and part)
    return f"{100 * found['value']:.4g} %{f' ({where})' if where else ''}"


def _sheet(
    views: Views, rows: Sequence[Row], apart: Apart, write: Callable[[str, bytes], None]
) -> list[dict[str, Any]]:
    """The trigger per setting, from the undefended model's cell of the lowest seed that has a picture.

    Where an attack poisons with another form than it attacks with, a second picture shows that one.
    """
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in sorted(
        rows, key=lambda r: (r.cell["dataset"], r.cell["arch"], setting(r.cell), r.cell["seed"], r.cell["cell"])
    ):
        key = r.cell["dataset"], r.cell["arch"], setting(r.cell)
        drawn = views.results.drawn(r.cell["cell"])
        if r.cell["defense"] != NONE or key in found or len(found) == SHEET or drawn is None:
            continue
        of = media.load(drawn, write)
        by_title = {p.title: p for p in reversed(of.pictures)}
        for name in GALLERIES:
            named = by_title.get(terms.PICTURES[name][0])
            picture = named or (of.pictures[0] if name == "gallery" and of.pictures else None)
            if picture is None:
                continue
            times = max(1, min(SHEET_ROOM[0] // picture.width, SHEET_ROOM[1] // picture.height))
            form, measured = "" if name == "gallery" else f";{TRAINED}", apart.get(r.cell["cell"], {})
            figures = {m: measured[m + form] for m in VISIBLE if m + form in measured}
            made = {
                "picture": picture,
                "width": picture.width * times,
                "height": picture.height * times,
                "pixels": picture.enlarged or times > 1,
                "columns": (*COLUMNS, f"residual × {_factor(of.facts, name)}") if named else (),
                "figures": [
                    (
                        words.label(m),
                        f"{words.number(figures[m], False)}{' dB' * (m == 'psnr')}{_levels(m, figures[m])}",
                    )
                    for m in figures
                ],
                "href": r.href,
                "title": " · ".join((*key, f"seed {r.cell['seed']}")) + GALLERIES[name],
            }
            found.setdefault(key, []).append(made)
    return [x for several in found.values() for x in several]


def _factor(facts: Sequence[media.Facts], name: str) -> str:
    """What the residual of that gallery was multiplied by."""
    told = [v for f in facts if f.name.endswith(f"-{name}") for k, v, _ in f.pairs if k == "residual_factor"]
    return told[0] if told and re.fullmatch(r"[0-9]{1,3}", told[0]) else "k (not recorded)"


def _levels(metric: str, value: float) -> str:
    return f" ({255 * value:.0f} of 255)" if metric == "linf" else ""


def _standings(views: Views, name: str) -> list[dict[str, Any]]:
    """Where a defense stands in the rankings of each board."""
    found = []
    for n, b in enumerate(views.boards, 1):
        for c in boards.views_contests(views, b):
            for d in c.scores:
                if plugin_id(d) == name:
                    found.append(
                        {
                            "board": b.title,
                            "contest": c,
                            "n": n,
                            "line": ranking.standing(views, c, d),
                            "of": len(c.scores),
                        }
                    )
    return found


def _cost(rows: Sequence[Row]) -> str:
    """Wall time of all that was measured on a cell."""
    seconds = [r.cell["seconds"] for r in rows if r.cell["seconds"] is not None and r.cell["status"] == "ok"]
    if not seconds:
        return ""
    ends = (
        f", from {words.number(min(seconds), False)} to {words.number(max(seconds), False)} s"
        if len(seconds) > 1
        else ""
    )
    return f"median {words.number(statistics.median(seconds), False)} s{ends}, over {len(seconds)} measured cells"


def _took(views: Views, name: str) -> list[tuple[Any, ...]]:
    """What a defense took on a model: (board, label, cells, medians) per board and setting of its parameters."""
    found = []
    for b in views.boards:
        for d in b.defenses:
            if plugin_id(d) == name and (known := views.medians(b.of_defense[d]))[0]:
                n, half = known
                times = [words.number(half[k], False) for k in ("seconds", "cpu_seconds", "peak_mb")]
                counts = [f"{half[k]:,.0f}" for k in ("forwards", "backwards", "queries")]
                found.append((b.title, d, n, *times, *counts))
    return found


def _fields(views: Views, rows: Sequence[Row], kind: str, name: str, apart: Apart) -> dict[str, Any]:
    info = views.results.plugins.get((kind, name), {})
    declared = info.get("info")
    given = declared if isinstance(declared, dict) else {}
    seeds = sorted({r.cell["seed"] for r in rows})
    gate = _gate(views, name, apart) if kind == "attack" and name != NONE else []
    family = ranking.family(views, name) if kind == "attack" and name != NONE else ""
    return {
        "access": sorted({r.cell["access"] for r in rows}) if kind == "defense" else [],
        "family": "not declared" if family.startswith(ranking.UNKNOWN) else family.replace("_", " "),
        "labels": {"True": "clean", "False": "dirty"}.get(str(given.get("clean_label")), "")
        if kind == "attack"
        else "",
        "seeds": [str(s) for s in seeds[:30]] + ["and more"] * (len(seeds) > 30),
        "cost": _cost(rows),
        "took": _took(views, name) if kind == "defense" else [],
        "sources": sorted({r.cell["clean_source"] for r in rows} - {""}) if kind == "defense" else [],
        "gate": gate,
        "apart": [(m, title) for m, title in APART.items() if any(g["apart"][m] for g in gate)],
    }


def methods(views: Views, write: Callable[[str, bytes], None]) -> tuple[list[Page], Anchors]:
    """A page per attack and per defense, more where its means need them; and where each line of means is."""
    made: list[Page] = []
    anchors: Anchors = {}
    apart = _apart(views)
    of: dict[tuple[str, str], list[Row]] = {}
    for r in views.rows:
        for kind in ("attack", "defense"):
            of.setdefault((kind, plugin_id(r.cell[kind])), []).append(r)
    for kind, across in (("attack", "defense"), ("defense", "attack")):
        for name, page in names(views)[f"{kind}s"]:
            rows = of.get((kind, name), [])
            variants = {r.cell[kind]: r.cell[f"{kind}_params"] for r in rows}
            entry = views.plugin(kind, name)
            found = [s for n, b in enumerate(views.boards, 1) for s in _sections(views, n, b, kind, across, name)]
            sections = [replace(s, id=f"means-{i}") for i, s in enumerate(found, 1)]
            full = len(rows) <= FULL and sum(map(_row_weight, rows)) <= ROWS_ROOM
            context: dict[str, Any] = {
                "kind": kind,
                "across": across,
                "name": name,
                "plugin": entry,
                "variants": [(v, views.params_of(kind, name, p)) for v, p in sorted(variants.items())],
                "role": rows[0].role if rows and kind == "defense" else "",
                "rows": rows if full else [],
                "all_rows": len(rows),
                "tally": tally([r.cell for r in rows]),
                "judges": kind == "defense" and any(judge(r.cell) for r in rows),
                "used_by": sorted({u for b in views.boards for u in judges.used_by(b, name)})
                if kind == "defense"
                else [],
                "zoos": judges.zoos(views, name, write) if kind == "defense" else [],
                "standings": _standings(views, name) if kind == "defense" else [],
                "sheet": _sheet(views, rows, apart, write) if kind == "attack" else [],
                **_fields(views, rows, kind, name, apart),
            }
            first = paging.Section(0, "intro", "about", None, fixed=12_000 + _intro(context))
            parts = paging.cut([first, *sections])
            if full and rows:
                weight = 6000 + sum(map(_row_weight, rows))
                used = sum(s.fixed + sum(s.weights[: len(s.lines)]) for s in parts[-1])
                if weight + used > paging.ROOM:
                    parts.append([])
            stem = page.removesuffix(".html")
            files = [page if i == 0 else f"{stem}--p{i + 1}.html" for i in range(len(parts))]
            for i, part in enumerate(parts):
                shown = [s for s in part if s.kind != "intro"]
                for s in shown:
                    for _, _, _, anchor, (attack, defense) in s.lines:
                        anchors.setdefault((kind, s.head["key"], attack, defense), f"{files[i]}#{anchor}")
                more = {"sections": shown, "number": i + 1, "files": files, "last": i == len(parts) - 1}
                made.append((files[i], "method.html.j2", context | more))
    return made, anchors


def _row_weight(row: Row) -> int:
    """About how many bytes a row of the table of cells takes, on the safe side."""
    c = row.cell
    named = sum(2 * paging.size(c[k]) for k in ("cell", "attack", "defense", "dataset", "arch"))
    linked = len(row.href) + len(row.attack_href) + len(row.defense_href) + len(row.dataset_href)
    state = 2 * paging.size(row.short) + sum(60 + 2 * paging.size(b) for b, _ in row.badges)
    return (
        600
        + named
        + linked
        + state
        + sum(90 + len(f.metric) + len(f.order) + paging.size(f.text) + len(f.note) for f in row.figures)
    )


def _intro(context: Mapping[str, Any]) -> int:
    """About how many bytes stand before the means."""
    plugin = context["plugin"]
    settings = sum(
        150 + paging.size(k) + paging.size(v) + paging.size(d) for _, some in context["variants"] for k, v, d in some
    )
    text = paging.size(plugin["doc"]) + paging.size(plugin["more"]) + paging.size(plugin["bibtex"])
    text += paging.size(plugin["presumes"])
    zoo = sum(paging.figure(f) for z in context["zoos"] for *_, some in z.lines for f in some)
    zoo += sum(c.weight for z in context["zoos"] for c in z.curves)
    gates = sum(1200 + 60 * len(g["seeds"]) for g in context["gate"])
    sheets = sum(2400 + 3 * paging.size(x["title"]) for x in context["sheet"])
    lines = itertools.chain(context["standings"], context["took"])
    return settings + text + zoo + gates + sheets + sum(1100 for _ in lines)
