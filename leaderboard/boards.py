"""Pages of boards: the overview, the tracks, the heat maps, and defenses held against each other."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sleeperbench.leaderboard import changes, charts, entries, judges, paging, ranking, stats, words
from sleeperbench.leaderboard.entries import Page
from sleeperbench.leaderboard.names import clean, digest12
from sleeperbench.leaderboard.paging import Section
from sleeperbench.leaderboard.ranking import Contest
from sleeperbench.leaderboard.summary import (
    NONE,
    Board,
    Cell,
    Mean,
    attacked,
    benign,
    by_state,
    failed,
    role,
    setting,
    tally,
    weak,
)
from sleeperbench.leaderboard.tracks import ANSWERS
from sleeperbench.leaderboard.views import Views, estimate_note, href, mean_shown, void_words
from sleeperbench.leaderboard.words import Shown

MAIN = ("c_acc", "o_asr", "p_asr", "p_asr_net", "p_der", "r_acc", "bec", "shift_target_net")
"""Columns of the table of means."""
STEALTH = ("psnr", "ssim", "linf", "silhouette")
"""How visible a trigger is, and how far apart it keeps triggered features."""
HEAT_LEVELS = 6
TOP = 5
"""Contestants of a track on the overview."""
FEW = 6
"""Contestants whose pairs all stand on the page of comparisons."""
CHANGES = 14_000
"""Bytes that the lines of what changed may take on the overview."""
CHOSEN = 5
"""Most defenses that a reader may choose."""


def pictures(views: Views, board: Board) -> list[dict[str, Any]]:
    """The headline pictures of a board: O-ASR against P-ASR, BEC and target shift; each names what it cannot draw.

    A defense has a mark of its whole models and one of those that it ruined, both as they were measured.
    """
    made = []
    for metric in ("p_asr", "bec", "shift_target_net"):
        points, left_out = [], []
        for d in board.repairs:
            cells = attacked(board.of_defense[d])
            if dead := sum(map(failed, cells)):
                of = f"{dead} of {len(cells)}" if dead < len(cells) else f"all {dead}"
                left_out.append((d, href("defenses", d), f"{of} cells failed"))
            for ruined, some in by_state(cells).items():
                x, y = views.drawn(some, "o_asr"), views.drawn(some, metric)
                name = f"{d}, collapsed" if ruined else d
                if x.estimate is None or y.estimate is None:
                    why = words.reason_word(x.reason if x.estimate is None else y.reason)
                    left_out.append((name, href("defenses", d), why))
                    continue
                a, b = mean_shown(x, True), mean_shown(y, views.share(metric))
                title = f"{name}: O-ASR {a.text} ({a.note}), {words.label(metric)} {b.text} ({b.note})"
                points.append(
                    charts.Point(
                        d,
                        href("defenses", d),
                        role(cells[0]),
                        x.estimate.value,
                        y.estimate.value,
                        (x.estimate.low, x.estimate.high),
                        (y.estimate.low, y.estimate.high),
                        f"{title}; {len(some)} of {len(cells)} cells, as measured" if ruined else title,
                        ruined,
                    )
                )
        chart = charts.scatter(points, "O-ASR", words.label(metric), y_share=views.share(metric))
        if chart or metric == "p_asr":
            made.append({"metric": metric, "chart": chart, "left_out": left_out, "open": metric == "p_asr"})
    return made


def _picture_section(views: Views, n: int, board: Board) -> Section:
    drawn = pictures(views, board)
    marks = sum(len(p["chart"].marks) if p["chart"] else 0 for p in drawn)
    left_out = sum(60 + len(link) + paging.size(name) for p in drawn for name, link, _ in p["left_out"])
    return Section(
        n, "pictures", f"board-{n}-pictures", {"board": board, "pictures": drawn}, fixed=6000 + 1100 * marks + left_out
    )


def _ranking_section(views: Views, n: int, c: Contest, top: int = 0) -> Section:
    made = ranking.ranking(views, c)
    lines = made.standings[:top] if top and not c.unranked else made.standings  # an order by name has no top
    weights = [
        560 + 2 * paging.size(s.name) + paging.figure(s.score) + sum(120 + len(b) for _, b in s.badges) for s in lines
    ]
    head = {"ranking": made, "of": len(made.standings), "details": ranking.details(c), "top": top}
    return Section(n, "ranking", f"board-{n}-rank-{c.id}", head, lines, weights, 2200)


def _cost(views: Views, board: Board, defense: str) -> Shown:
    """What a repair takes from the accuracy of models that never had a backdoor."""
    groups: dict[str, list[float]] = {}
    for c in board.of_defense[defense]:
        if benign(c) and None not in (c["c_acc"], c["c_acc_attacked"]):
            groups.setdefault(setting(c), []).append(c["c_acc_attacked"] - c["c_acc"])
    e = stats.mean_over_attacks(groups, share=False)
    if e is None:
        return words.missing("c_acc", "not_run: no cell of this defense on a clean model has a figure")
    note = words.span(e.low, e.high, True) if e.kind != "single" else "1 cell"
    title = f"C-Acc before minus after in percentage points, {e.cells} clean models"
    return Shown("cost", words.points(e.value), repr(e.value), title, f"{'range ' * (e.kind == 'range')}{note}")


def _means_section(views: Views, n: int, board: Board) -> Section:
    metrics = [m for m in MAIN if m in board.metrics]
    costs = any(benign(c) for c in board.cells)
    lines = [
        (title, line, _cost(views, board, line.name) if costs else None)
        for title, some in views.by_track(board, metrics, board.repairs)
        for line in some
    ]
    head = {"board": board, "metrics": metrics, "costs": costs, "not_implanted": sorted(board.not_implanted.items())}
    weights = [paging.mean_row(line) + (paging.figure(cost) if cost else 0) for _, line, cost in lines]
    return Section(n, "means", f"board-{n}", head, lines, weights, 3500)


def _stealth_section(views: Views, n: int, board: Board) -> Section | None:
    """How well attacks hide: visibility of the trigger, and what the attacked model shows. Nothing is ranked."""

    def figure(c: Cell, metric: str) -> float | None:
        return views.aside.get((c["cell"], metric), (None, ""))[0]

    metrics = [m for m in STEALTH if any(figure(c, m) is not None for c in board.cells)]
    lines = []
    for s in board.settings:
        cells = board.of_field.get((s, NONE), [])
        if not cells:
            continue
        shown = []
        for m in metrics:
            values = [v for c in cells if (v := figure(c, m)) is not None]
            e = stats.mean_over_attacks({s: values}, share=False)
            if e is None:
                shown.append(words.missing(m, "not_run: no evaluator of the suite measures it"))
            else:
                share = views.share(m)
                note = f"{len(values)} seeds" if e.kind != "single" else "1 seed"
                shown.append(Shown(m, words.number(e.value, share), repr(e.value), f"{words.label(m)}, {note}", note))
        own = [views.field(board, s, NONE, m) for m in ("o_asr", "c_acc")]
        plain = [
            words.missing(m, board.not_implanted.get(s, "not_run"))
            if f is None or f.estimate is None
            else mean_shown(f, True)
            for m, f in zip(("o_asr", "c_acc"), own, strict=True)
        ]
        kind = ranking.family(views, cells[0]["attack"])
        kind = "not declared" if kind.startswith(ranking.UNKNOWN) else kind.replace("_", " ")
        lines.append((s, href("attacks", cells[0]["attack"]), kind, any(map(weak, cells)), (*shown, *plain)))
    if not lines or not metrics:
        return None
    weights = [360 + sum(map(paging.figure, x[4])) for x in lines]
    head = {"metrics": metrics}
    return Section(n, "stealth", f"board-{n}-stealth", head, lines, weights, 1800)


def sections(views: Views) -> list[Section]:
    """All of every board: pictures, a ranking per track, means, tables of methods that judge, attacks' stealth."""
    made = []
    for n, b in enumerate(views.boards, 1):
        made.append(_picture_section(views, n, b))
        made += [_ranking_section(views, n, c) for c in views_contests(views, b)]
        made.append(_means_section(views, n, b))
        judged = judges.tables(views, b)
        aside = judges.aside(views, b, judged)
        lines = sum(paging.mean_row(x) for t in judged for _, some in t.groups for x in some)
        if judged or aside:
            head = {"judged": judged, "aside": aside, "prefix": f"board-{n}"}
            made.append(
                Section(
                    n, "judged", f"board-{n}-judged", head, fixed=1500 * (1 + len(judged)) + lines + 400 * len(aside)
                )
            )
        if (hidden := _stealth_section(views, n, b)) is not None:
            made.append(hidden)
    return made


def views_contests(views: Views, board: Board) -> list[Contest]:
    """The contests of a board, worked out once."""
    if board.key not in views.contests:
        views.contests[board.key] = ranking.contests(views, board)
    found: list[Contest] = views.contests[board.key]
    return found


def grouped(lines: Sequence[tuple[Any, ...]]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Lines by the title that they start with, in order."""
    return [(title, list(some)) for title, some in itertools.groupby(lines, key=lambda x: x[0])]


def _paged(name: str, template: str, made: Sequence[Section], **more: Any) -> Iterator[Page]:
    """Pages of sections; each page knows where every group and section begins."""
    parts = paging.cut(made)
    files = paging.files(name, len(parts))
    at: dict[str, str] = {}
    first: dict[int, str] = {}
    for file, part in zip(files, parts, strict=True):
        for s in part:
            at.setdefault(s.id, f"{file}#{s.id}")
            first.setdefault(s.group, file)
    for i, part in enumerate(parts):
        groups = [(n, list(some)) for n, some in itertools.groupby(part, key=lambda s: s.group)]
        context = {"groups": groups, "number": i + 1, "files": files, "at": at, "first": first, "grouped": grouped}
        yield files[i], template, context | more


def tracks(views: Views) -> Iterator[Page]:
    """Every board in full."""
    yield from _paged("tracks", "tracks.html.j2", sections(views), boards=views.boards)


def overview(views: Views, track_pages: Sequence[Page]) -> Page:
    """The question; per board its picture and the top of each track, as many boards as fit; what changed."""
    found: list[Section] = []
    for n, b in enumerate(views.boards, 1):
        found.append(_picture_section(views, n, b))
        found += [_ranking_section(views, n, c, TOP) for c in views_contests(views, b)]
    listed = entries.names(views)
    room = (
        paging.ROOM
        - CHANGES
        - 700 * len(views.boards)
        - sum(110 + 2 * paging.size(n) for some in listed.values() for n, _ in some)
    )
    fits: list[Section] = []
    for n, some in itertools.groupby(found, key=lambda s: s.group):
        board = list(some)
        room -= sum(s.fixed + sum(s.weights) for s in board)
        if n > 1 and room < 0:
            break
        fits += board
    first = track_pages[0][2]["first"] if track_pages else {}
    changed = changes.changes(views)
    context = {
        "groups": [(n, list(some)) for n, some in itertools.groupby(fits, key=lambda s: s.group)],
        "boards": views.boards,
        "shown": len({s.group for s in fits}),
        "first": first,
        "tally": tally(views.results.cells),
        "names": listed,
        "runs": [entries.run_line(views, c) for c in changed[:-4:-1]],
        "all_runs": len(views.results.runs),
        "grouped": grouped,
    }
    return "index.html", "index.html.j2", context


def _heat_field(views: Views, mean: Mean, cells: Sequence[Cell]) -> Shown:
    """A field of a heat map: its mean; in its title of how many seeds, and their interval; a note of what was lost."""
    e, share = mean.estimate, views.share(mean.metric)
    if e is None:
        return words.missing(mean.metric, mean.reason)
    if len(cells) == 1:
        own = views.headline(cells[0], mean.metric)
        title = f"1 seed; {own.title.partition('; ')[2]}" if own.note and not mean.as_none else "1 seed"
    else:
        note = estimate_note(e, share)
        title = f"{e.cells} of {len(cells)} seeds; {'95 % t interval over seeds ' * (e.kind == 't')}{note}"
    brief, full = void_words(mean)
    return Shown(mean.metric, words.number(e.value, share), repr(e.value), f"{title}; {full}" if full else title, brief)


def _scale(values: Sequence[float], share: bool) -> tuple[Callable[[float], int], list[tuple[int, str]]]:
    """(what shade a figure has, the legend as shade and range): equal parts of the range that a map's figures span."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high - low <= stats.SAME:
        return lambda _: 0, [(0, words.number(low, share))] if values else []
    step = (high - low) / HEAT_LEVELS
    ends = [low + i * step for i in range(HEAT_LEVELS)] + [high]
    legend = [(i, words.span(a, b, share) + " %" * share) for i, (a, b) in enumerate(itertools.pairwise(ends))]
    return lambda value: min(HEAT_LEVELS - 1, max(0, int((value - low) / step))), legend


def _heat_section(views: Views, n: int, board: Board, metric: str, anchors: Mapping[tuple[Any, ...], str]) -> Section:
    """One metric as attacks by defenses, means over seeds, shaded by where they lie among the map's figures.

    A field all of whose cells failed or collapsed, or of an attack that did not implant, has no shade and is no end of
    the range: it is grey.
    """
    defenses = board.having(metric)
    attacks = [*board.settings, *sorted({setting(c) for c in board.cells if benign(c)})]
    means = {(s, d): views.field(board, s, d, metric) for s in attacks for d in defenses}
    shade, legend = _scale(
        [m.estimate.value for m in means.values() if m and m.estimate and not m.lost and not m.weak],
        views.share(metric),
    )
    lines, weights = [], []
    for s in attacks:
        line: list[tuple[Shown, str, str]] = []
        for d in defenses:
            mean = means[s, d]
            if mean is None:
                line.append((words.missing(metric, "not_run: not in the suite"), "empty", ""))
                continue
            css = "empty"
            if mean.estimate:
                css = "lost" if mean.lost or mean.weak else f"h{shade(mean.estimate.value)}"
            cells = board.of_field[s, d]
            many = anchors.get(("defense", board.key, s, d), href("defenses", d))
            link = href("cells", cells[0]["cell"]) if len(cells) == 1 else many
            line.append((_heat_field(views, mean, cells), css, link))
        why = board.not_implanted.get(s, "")
        lines.append((s, why, line))
        weights.append(
            140
            + 2 * paging.size(s)
            + sum(
                130 + len(f.order) + len(f.metric) + sum(map(paging.size, (f.text, f.title, f.note))) + len(k)
                for f, _, k in line
            )
        )
    grey = any(css == "lost" for _, _, line in lines for _, css, _ in line)
    head = {"metric": metric, "defenses": defenses, "legend": legend, "grey": grey}
    named = sum(70 + 2 * paging.size(d) + len(href("defenses", d)) for d in defenses)
    return Section(n, "heat", f"heat-{n}-{metric}", head, lines, weights, 2200 + named)


def heatmap(views: Views, anchors: Mapping[tuple[Any, ...], str]) -> Iterator[Page]:
    """Attacks by defenses for every metric that cells have, each with the defenses that it says something of."""
    made = [_heat_section(views, n, b, m, anchors) for n, b in enumerate(views.boards, 1) for m in b.metrics]
    listed = {n: [(s.head["metric"], s.id) for s in some] for n, some in itertools.groupby(made, key=lambda s: s.group)}
    yield from _paged("heatmap", "heatmap.html.j2", made, boards=views.boards, listed=listed)


def _diagram(c: Contest) -> charts.Ranks | None:
    """The critical-difference diagram of those with a score on every attacked model."""
    if c.unranked or len(c.settings) < 2:
        return None
    ranks = stats.average_ranks({d: c.by_setting(d) for d in c.complete})
    cd = stats.critical_difference(len(ranks), len(c.settings))
    return charts.ranks([(d, href("defenses", d), r) for d, r in ranks.items()], cd)


def _compare_sections(views: Views, n: int, c: Contest) -> Iterator[Section]:
    names = list(c.scores)
    diagram = _diagram(c)
    p = (
        stats.friedman_p(stats.average_ranks({d: c.by_setting(d) for d in c.complete}).values(), len(c.settings))
        if diagram
        else 1.0
    )
    head: dict[str, Any] = {
        "contest": c,
        "diagram": diagram,
        "friedman": f"{p:.2g}" if p >= 1e-4 else "below 0.0001",
        "apart": p <= stats.LEVEL,
        "pairs": [],
    }
    fixed = 3500 + 420 * len(names) + sum(2 * paging.size(d) for d in names)
    if len(names) <= FEW:
        head["pairs"] = [_pair_shown(c.pair(a, b)) for a, b in itertools.combinations(names, 2)]
        fixed += sum(420 + paging.size(x["a"]) + paging.size(x["b"]) for x in head["pairs"])
    yield Section(n, "compare", f"compare-{n}-{c.rule.id}", head, fixed=fixed)
    order = names if len(names) <= 2 * FEW else []
    if order:
        lines = []
        for s in c.settings:
            found = [c.by_setting(d).get(s) for d in order]
            best = max((v for v in found if v is not None), default=None)
            lost = [sum(u[0] == s for u in c.lost[d]) for d in order]
            texts = [
                ("no score", False, 0) if v is None else (words.number(v, True), v == best and not f, f)
                for v, f in zip(found, lost, strict=True)
            ]
            lines.append((s, c.families[s].replace("_", " ") if c.rule.families else "", texts))
        weights = [120 + 2 * paging.size(s) + 90 * len(order) for s, _, _ in lines]
        yield Section(
            n,
            "scores",
            f"compare-{n}-{c.rule.id}-scores",
            {"contest": c, "order": order},
            lines,
            weights,
            900 + 60 * len(order),
        )


def _pair_shown(pair: dict[str, Any]) -> dict[str, Any]:
    e = pair["estimate"]
    if e is None:
        return pair | {"text": "no common model", "order": "", "note": ""}
    note = words.span(e.low, e.high, True) if e.kind != "single" else "1 model"
    return pair | {
        "text": words.points(e.value),
        "order": repr(e.value),
        "note": f"{'range ' * (e.kind == 'range')}{note}",
    }


def _packed(views: Views, groups: Sequence[tuple[int, Contest]]) -> bytes:
    """What the page's script compares from: scores of every defense, intervals of every pair, headline means."""
    made = []
    for _, c in groups:
        names = list(c.scores)
        metrics = [m for m in c.board.metrics if (m in ANSWERS) is (c.rule.id not in ("repair", "in_training"))]
        means = []
        for d in names:
            shown = [mean_shown(views.overall(c.board, d, m), views.share(m)) for m in metrics]
            means.append([[f.text, "" if f.empty else f.note] for f in shown])
        pages = []
        for d in names:
            cell = {(setting(x), x["seed"]): digest12(x["cell"]) for x in c.board.of_defense[d]}
            pages.append("".join(cell.get(u, "-" * 12) for u in c.units))
        pairs = []
        for a, b in itertools.combinations(names, 2):
            e = c.pair(a, b)["estimate"]
            pairs.append([] if e is None else [round(e.value, 6), round(e.low, 6), round(e.high, 6), e.kind])
        made.append(
            {
                "title": f"{c.board.title}: {_what(c)}",
                "score": c.rule.score,
                "metric": c.rule.metric,
                "names": [clean(d) for d in names],
                "hrefs": [href("defenses", d) for d in names],
                "settings": [clean(s) for s in c.settings],
                "units": [[c.settings.index(s), seed] for s, seed in c.units],
                "scores": [[round(c.scores[d][u], 6) if u in c.scores[d] else None for u in c.units] for d in names],
                "lost": [[u for u, unit in enumerate(c.units) if unit in c.lost[d]] for d in names],
                "means": means,
                "metrics": [[words.label(m), href("metrics", m)] for m in metrics],
                "overall": [None if (e := c.mean(d)) is None else round(e.value, 6) for d in names],
                "pages": pages,
                "pairs": pairs,
                "unranked": c.few_seeds,
            }
        )
    quantiles = {str(k): round(stats.range_quantile(k), 6) for k in range(2, CHOSEN + 1)}
    text = json.dumps({"groups": made, "q": quantiles, "most": CHOSEN}, separators=(",", ":"), allow_nan=False)
    text = text.replace("\\", "\\\\").replace("'", "\\u0027").replace("<", "\\u003c")
    return f"window.sleeperbenchCompare = JSON.parse('{text}');\n".encode("ascii")


def _what(c: Contest) -> str:
    return "repair and in-training" if c.rule.id == "repair" else c.rule.title.lower()


def _pairs_csv(groups: Sequence[tuple[int, Contest]]) -> bytes:
    """Every pair of every comparison as CSV."""
    lines = ["board,track,score,a,b,difference,low,high,interval,models,wins,losses,ties"]
    for _, c in groups:
        for a, b in itertools.combinations(c.scores, 2):
            pair = c.pair(a, b)
            e = pair["estimate"]
            ends = [""] * 4 if e is None else [repr(e.value), repr(e.low), repr(e.high), e.kind]
            named = [_quoted(x) for x in ("/".join(c.board.key), _what(c), c.rule.score, a, b)]
            lines.append(",".join([*named, *ends, *(str(pair[k]) for k in ("models", "wins", "losses", "ties"))]))
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _quoted(text: str) -> str:
    safe = f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
    return '"' + clean(safe).replace('"', '""') + '"'


def compare(views: Views, write: Callable[[str, bytes], None]) -> Iterator[Page]:
    """Defenses in pairs on the same attacked models."""
    groups = [(n, c) for n, b in enumerate(views.boards, 1) for c in ranking.comparisons(views, b) if len(c.scores) > 1]
    data = _packed(views, groups)
    source = f"data/compare.{hashlib.sha256(data).hexdigest()[:8]}.js"
    write(source, data)
    write("downloads/pairs.csv", _pairs_csv(groups))
    made = [s for n, c in groups for s in _compare_sections(views, n, c)]
    yield from _paged("compare", "compare.html.j2", made, boards=views.boards, source=source, most=CHOSEN, what=_what)
