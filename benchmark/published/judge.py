"""A paper's claims against a run: which hold, which do not, and which cannot be told. docs/papers.md has the rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sleeperbench.leaderboard.stats import mean_over_attacks
from sleeperbench.leaderboard.summary import PURIFIED, WOKEN
from sleeperbench.published.paper import TO, Choice, Claim, Comparison, Figure, Paper, Ref, Table
from sleeperbench.published.results import RATELESS, Results, Series, Unit

HOLDS, FAILS, NOT_RUN, OUTSIDE = "holds", "does not hold", "not run", "outside"
"""Verdicts. `outside` is a unit on which a claim's condition is not met: the claim does not speak of it."""
SAME = 1e-9
"""Figures nearer than this are equal: sums of other order differ in the last digits."""
FEWEST = 3
"""A rank correlation is over so many points at least: that of two is always 1 or -1."""
_CONTROLS = ("none", "clean_model")
_AWAKE = "none of its units was purified"
_POOL: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda v: math.fsum(v) / len(v),
    "min": min,
    "max": max,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One unit of a claim."""

    unit: str
    verdict: str
    reason: str = ""
    left: dict[str, Any] | None = None
    right: dict[str, Any] | None = None
    difference: dict[str, Any] | None = None
    published: dict[str, Any] | None = None
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The seeds under which a condition holds and does not; in words why not, or why it cannot be told."""

    holds: set[int]
    fails: set[int]
    said: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with its lines."""

    claim: Claim
    verdict: str
    lines: tuple[Line, ...]

    def count(self, verdict: str) -> int:
        """Lines of one verdict."""
        return sum(line.verdict == verdict for line in self.lines)


def judge(paper: Paper, results: Results, about: Mapping[str, Any]) -> list[Judged]:
    """Every claim of a paper.

    Args:
        paper: Its claims and tables.
        results: The figures of a run.
        about: The run's run.json.
    """
    return [_judged(claim, paper, results, about) for claim in paper.claims]


def figures(paper: Paper, results: Results, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every printed figure that stands for a unit of the run, with ours beside it.

    A table is held against each data set and architecture of its own setting; where the run has none such, the paper's
    first table stands in, and its differences say so.
    """
    found: list[dict[str, Any]] = []
    for dataset, arch in results.grounds():
        own = [t for t in paper.tables.values() if (t.setting["dataset"], t.setting["arch"]) == (dataset, arch)]
        for table in own or list(paper.tables.values())[:1]:
            for f in table.figures:
                found += _beside(f, table, dataset, arch, results, about)
    return found


def _beside(
    f: Figure, table: Table, dataset: str, arch: str, results: Results, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for rate in results.rates(dataset, arch) if f.attack and f.attack.id not in RATELESS else [0.0]:
        here = [u for u in results.units if (u.dataset, u.arch, u.rate) == (dataset, arch, rate)]
        attack = f.attack or Ref(id="none")
        for a in results.labels("attack", attack, here):
            for d in results.labels("defense", f.defense or Ref(id="none"), [u for u in here if u.attack == a]):
                unit = Unit(dataset, arch, a, rate, d)
                ours = results.series(unit, f.metric, f.qualifier)
                yield {
                    "unit": str(unit),
                    "metric": f"{f.metric}[{f.qualifier}]" if f.qualifier else f.metric,
                    "ours": summary(ours),
                    "published": f.value,
                    "table": table.id,
                    "unconfirmed": table.unconfirmed,
                    "differs": list(differences(table.setting, unit, results, about)),
                }


def _judged(claim: Claim, paper: Paper, results: Results, about: Mapping[str, Any]) -> Judged:
    left = claim.compared.left
    lines: list[Line] = []
    grounds = [
        (dataset, arch)
        for dataset, arch in results.grounds()
        if (not left.datasets or dataset in left.datasets) and (not left.archs or arch in left.archs)
    ]
    for dataset, arch in grounds:
        if claim.compared.beside is not None:
            lines += _correlated(claim, dataset, arch, paper, results, about)
        elif left.pool:
            rates = left.rates or tuple(results.rates(dataset, arch)) or (0.0,)
            for rate in rates:
                lines.append(_pooled(claim, dataset, arch, rate, paper, results, about))
        else:
            lines += _lines(claim, dataset, arch, paper, results, about)
    if not lines:
        there = ", ".join(f"{d} with {a}" for d, a in results.grounds()) or "no figures"
        metric = f"{left.metric}[{left.qualifier}]" if left.qualifier else left.metric
        reason = f"{metric}: not measured" if grounds else f"the run has {there}"
        lines.append(Line(unit="", verdict=NOT_RUN, reason=reason))
    if claim.printed is not None:
        lines = [replace(n, published={"table": "", "unconfirmed": "", "left": claim.printed}) for n in lines]
    return Judged(claim=claim, verdict=_together(lines, claim.share), lines=tuple(lines))


def _together(lines: Sequence[Line], share: float) -> str:
    """Holds on at least `share` of the units of which the claim speaks: true, false, or not to be told yet."""
    told = [line.verdict for line in lines if line.verdict != OUTSIDE]
    need = math.ceil(share * len(told) - SAME)
    if not told:
        return NOT_RUN
    if told.count(HOLDS) >= need:
        return HOLDS
    return FAILS if told.count(HOLDS) + told.count(NOT_RUN) < need else NOT_RUN


def _lines(
    claim: Claim, dataset: str, arch: str, paper: Paper, results: Results, about: Mapping[str, Any]
) -> Iterator[Line]:
    metric = claim.compared.left.metric or ""
    for unit, reason, to in _carried(claim.compared.left, dataset, arch, results):
        if isinstance(unit, str):
            yield Line(unit=unit, verdict=NOT_RUN, reason=reason)
            continue
        qualifier = f"on={to}" if to else claim.compared.left.qualifier or ""
        asked = [_condition(g, unit, results, metric, qualifier, to) for g in claim.given]
        ours = results.series(unit, metric, qualifier)
        kept = set.intersection(*(c.holds for c in asked)) if asked else None
        line = _compare(claim.compared, ours, unit, results, metric, qualifier, to, kept)
        if to:
            line = replace(line, unit=f"{unit} on {to}")
        if results.undefined(unit, metric, "" if to else qualifier):
            line = replace(line, verdict=OUTSIDE, reason=f"no figure by the protocol: {ours.reason}")
        elif kept is not None:
            line = _among(line, asked, kept, set(ours.values))
        yield _with_paper(line, claim, unit, paper, results, about)


def _pooled(
    claim: Claim, dataset: str, arch: str, rate: float, paper: Paper, results: Results, about: Mapping[str, Any]
) -> Line:
    left = claim.compared.left
    name = f"{dataset}/{arch}/{left.pool}@{rate:g}"
    mine = replace(left, rates=(rate,))
    # Both sides are means over the same units.
    every = _carried(mine, dataset, arch, results)
    undefined = {
        u
        for u, _, to in every
        if isinstance(u, Unit) and results.undefined(u, left.metric or "", "" if to else left.qualifier or "")
    }
    if every and all(u in undefined for u, _, _ in every):
        return Line(unit=name, verdict=OUTSIDE, reason="the protocol gives none of its units a figure")
    woken = (left.metric or "") in WOKEN
    ours = _pool(mine, dataset, arch, results, undefined, woken)
    if ours.reason == _AWAKE:
        return Line(unit=name, verdict=OUTSIDE, reason=_AWAKE)
    right: Series | None = None
    than = claim.compared.than
    if than is not None:
        # What `than` leaves open is the left side's own choice.
        filled = Choice(
            metric=than.metric or left.metric,
            qualifier=_qualifier(than, left.qualifier or ""),
            attacks=than.attacks or left.attacks,
            rates=than.rates or (rate,),
            defenses=than.defenses or left.defenses,
            pool=than.pool or left.pool,
        )
        right = _pool(filled, *_ground(than, dataset, arch), results, undefined, woken)
    line = _verdict(name, ours, claim.compared, right)
    unit = Unit(dataset, arch, "", rate, "")
    table = _table(claim, unit, paper)
    if table is None:
        return line
    return replace(
        line,
        published={"table": table.id, "unconfirmed": table.unconfirmed},
        differs=tuple(differences(table.setting, unit, results, about)),
    )


def _correlated(
    claim: Claim, dataset: str, arch: str, paper: Paper, results: Results, about: Mapping[str, Any]
) -> Iterator[Line]:
    """Per attack the correlation over defenses, or per defense that over attacks; seed by seed."""
    left, beside = claim.compared.left, claim.compared.beside
    assert beside is not None and left.attacks and left.defenses
    pairs = list(zip(left.defenses, beside.defenses or left.defenses, strict=True))
    groups = [[(a, *p) for p in pairs] for a in left.attacks]
    if claim.compared.over == "attack":
        groups = [[(a, *p) for a in left.attacks] for p in pairs]
    for rate in left.rates or tuple(results.rates(dataset, arch)) or (0.0,):
        for group in groups:
            points, printed = [], []
            absent: dict[str, str] = {}
            for attack, one, other in group:
                at = Choice(datasets=(dataset,), archs=(arch,), attacks=(attack,), rates=(rate,))
                x = replace(at, metric=left.metric, qualifier=left.qualifier, defenses=(one,))
                y = replace(at, metric=beside.metric or left.metric, qualifier=beside.qualifier, defenses=(other,))
                point = (_one(x, results), _one(y, results))
                points.append(point)
                called = str(one if claim.compared.over == "defense" else attack)
                for s in point:
                    if not s.values:
                        absent.setdefault(called, s.reason)
                printed.append([_quoted(claim, paper, dataset, arch, c) for c in (x, y)])
            attack, one, _ = group[0]
            name = f"{attack}@{rate:g}" if claim.compared.over == "defense" else f"@{rate:g}/{one}"
            name = f"{dataset}/{arch}/{name}: {left.metric} with {beside.metric or left.metric}"
            line = _verdict(name, _correlation(name, points, absent), claim.compared, None)
            if absent and line.verdict != NOT_RUN:
                line = replace(line, reason=f"without {', '.join(absent)}")
            quoted = [(x, y) for x, y in printed if x is not None and y is not None]
            unit = Unit(dataset, arch, "", rate, "")
            table = _table(claim, unit, paper)
            if table is not None:
                told = {"table": ", ".join(claim.tables), "unconfirmed": table.unconfirmed, "left": spearman(quoted)}
                differs = tuple(differences(table.setting, unit, results, about))
                line = replace(line, published=told, differs=differs)
            yield line


def _correlation(name: str, points: Sequence[tuple[Series, Series]], absent: Mapping[str, str]) -> Series:
    """Seed by seed, over the points that have both figures for it."""
    values, few = {}, True
    for seed in sorted({s for x, _ in points for s in x.values}):
        both = [(x.values[seed], y.values[seed]) for x, y in points if seed in x.values and seed in y.values]
        few = few and len(both) < FEWEST
        if (found := spearman(both)) is not None:
            values[seed] = found
    why = f"fewer than {FEWEST} points have both figures" if few else "one side has the same figure everywhere"
    lacking = [f"{point} ({reason})" for point, reason in absent.items()]
    return Series(what=name, values=values, reason="" if values else "; ".join([why, *lacking]))


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, equal figures sharing their mean rank; None for a constant or too few points."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    # Rounded, since figures that are equal but for their last digits share a rank.
    x, y = ([round(p[side], 9) for p in points] for side in (0, 1))
    if len(points) < FEWEST or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def _quoted(claim: Claim, paper: Paper, dataset: str, arch: str, choice: Choice) -> float | None:
    """The printed figure of a choice that means one cell, from the claim's tables of that data set and architecture."""
    assert choice.attacks and choice.defenses
    for table in (paper.tables[t] for t in claim.tables):
        if (table.setting["dataset"], table.setting["arch"]) == (dataset, arch):
            for f in table.figures:
                printed = (f.metric, f.qualifier, f.attack, f.defense)
                if printed == (choice.metric, choice.qualifier or "", choice.attacks[0], choice.defenses[0]):
                    return f.value
    return None


def _ground(choice: Choice, dataset: str, arch: str) -> tuple[str, str]:
    return (choice.datasets or (dataset,))[0], (choice.archs or (arch,))[0]


def _units(choice: Choice, dataset: str, arch: str, results: Results) -> list[tuple[Unit | str, str]]:
    """The units that a choice means, each with an empty reason; for what is named and absent, its name and why."""
    metric, qualifier = choice.metric or "", choice.qualifier or ""
    here = [u for u in results.units if (u.dataset, u.arch) == (dataset, arch)]
    open_rates = choice.rates is None
    found: list[tuple[Unit | str, str]] = []
    attacks = choice.attacks or tuple(Ref(id=a, label=a) for a in sorted({u.attack for u in here} - set(RATELESS)))
    for attack in attacks:
        rates: Sequence[float] = choice.rates or ()
        if attack.id in RATELESS:
            rates = (0.0,)
        elif open_rates:
            rates = results.rates(dataset, arch)
        if not rates:
            found.append((f"{dataset}/{arch}/{attack}", "no such cell in the run"))
        for rate in rates:
            there = [u for u in here if u.rate == rate]
            labels = results.labels("attack", attack, there)
            if not labels:
                found.append((f"{dataset}/{arch}/{attack}@{rate:g}", "no such cell in the run"))
            for a in labels:
                mine = [u for u in there if u.attack == a]
                if choice.defenses is None:
                    found += [
                        (u, "")
                        for u in sorted(mine)
                        if u.defense not in _CONTROLS and not results.not_applicable(u, metric, qualifier)
                    ]
                for defense in choice.defenses or ():
                    names = results.labels("defense", defense, mine)
                    found += [(Unit(dataset, arch, a, rate, d), "") for d in names]
                    if not names:
                        found.append((f"{dataset}/{arch}/{a}@{rate:g}/{defense}", "no such cell in the run"))
    return found


def _carried(choice: Choice, dataset: str, arch: str, results: Results) -> list[tuple[Unit | str, str, str]]:
    """The units of a choice, each with every defense that it is carried to but its own; one without `to` to none."""
    found: list[tuple[Unit | str, str, str]] = []
    for unit, reason in _units(choice, dataset, arch, results):
        own = unit.defense if isinstance(unit, Unit) else ""
        found += [(unit, reason, to) for to in choice.to or ("",) if not to or to != own]
    return found


def _qualifier(choice: Choice, inherited: str) -> str:
    """Another metric has no qualifier unless it names one."""
    if choice.qualifier is not None:
        return choice.qualifier
    return "" if choice.metric else inherited


def _own(choice: Choice, unit: Unit, metric: str, qualifier: str, to: str) -> Choice:
    """A choice with what it leaves open taken from a unit."""
    named = None if choice.defenses is None else tuple(Ref(id=to) if d.id == TO else d for d in choice.defenses)
    rates = choice.rates
    if rates is None and (choice.attacks is None or unit.attack not in RATELESS):
        rates = (unit.rate,)  # a unit without a rate, such as a clean model, leaves that of a named attack open
    return Choice(
        metric=choice.metric or metric,
        qualifier=_qualifier(choice, qualifier),
        datasets=choice.datasets or (unit.dataset,),
        archs=choice.archs or (unit.arch,),
        attacks=choice.attacks or (Ref(id=unit.attack, label=unit.attack),),
        rates=rates,
        defenses=named or (Ref(id=unit.defense, label=unit.defense),),
        pool=choice.pool,
    )


def _compare(
    compared: Comparison,
    ours: Series,
    unit: Unit,
    results: Results,
    metric: str,
    qualifier: str,
    to: str,
    kept: set[int] | None,
) -> Line:
    """A comparison on one unit, over the seeds that count (None: all); what `than` leaves open is the unit's own."""
    right = _other(compared, unit, results, metric, qualifier, to)
    if kept is not None:
        ours, right = _under(ours, kept), None if right is None else _under(right, kept)
    return _verdict(str(unit), ours, compared, right)


def _other(compared: Comparison, unit: Unit, results: Results, metric: str, qualifier: str, to: str) -> Series | None:
    """The other side of a comparison on one unit; None for a bound."""
    if compared.than is None:
        return None
    than = _own(compared.than, unit, metric, qualifier, to)
    return _pool(than, *_ground(than, "", ""), results) if than.pool else _one(than, results)


def _condition(given: Comparison, unit: Unit, results: Results, metric: str, qualifier: str, to: str) -> Condition:
    """A claim's condition, asked of every seed of one unit."""
    own = _own(given.left, unit, metric, qualifier, to)
    left = _one(own, results)
    right = _other(given, unit, results, own.metric or "", own.qualifier or "", to)
    gaps = _gaps(left, given, right)
    fails = {s for s, gap in gaps.items() if not _true(given.test, gap)}
    if not gaps:
        return Condition(holds=set(), fails=set(), said=_lacking(left, right))
    left, right = _under(left, fails), None if right is None else _under(right, fails)
    bound = given.value if right is None else summary(right)["mean"]
    said = f"{own.metric} {summary(left)['mean'] or 0:.4g}, not {given.test} {bound or 0:.4g}"
    return Condition(holds=set(gaps) - fails, fails=fails, said=said if fails else "")


def _among(line: Line, asked: Sequence[Condition], kept: set[int], seeds: set[int]) -> Line:
    """A line with what became of the seeds under which not all conditions hold (all but `kept`)."""
    failed = "; ".join(c.said for c in asked if c.fails)
    if not kept:
        fails, known = (set().union(*of) for of in ([c.fails for c in asked], [c.holds | c.fails for c in asked]))
        if fails and (seeds or known) <= fails:
            return replace(line, verdict=OUTSIDE, reason=f"condition not met: {failed}")
        unknown = "; ".join(c.said for c in asked if not c.holds and not c.fails)
        return replace(line, verdict=NOT_RUN, reason=f"condition unknown: {unknown or 'of no seed are all told'}")
    if not (out := sorted(seeds - kept)):
        return line
    without = f"without seed {', '.join(map(str, out))}" + (f": {failed}" if failed else "")
    return replace(line, reason="; ".join(filter(None, [line.reason, without])))


def _under(series: Series, seeds: Collection[int]) -> Series:
    """The same under these seeds alone."""
    values = {s: v for s, v in series.values.items() if s in seeds}
    return replace(series, values=values, reason=series.reason if values else series.reason or "not under these seeds")


def _one(choice: Choice, results: Results) -> Series:
    """The figures of a choice that means one unit."""
    dataset, arch = _ground(choice, "", "")
    units = _units(choice, dataset, arch, results)
    if len(units) != 1:
        names = ", ".join(str(u) for u, _ in units) or f"{dataset}/{arch}"
        return Series(what=names, values={}, reason="means several cells" if units else "no such cell in the run")
    unit, reason = units[0]
    if isinstance(unit, str):
        return Series(what=unit, values={}, reason=reason)
    return results.series(unit, choice.metric or "", choice.qualifier or "")


def _pool(
    choice: Choice,
    dataset: str,
    arch: str,
    results: Results,
    undefined: Collection[Unit] = frozenset(),
    woken: bool = False,
) -> Series:
    """Per seed the mean, least or largest figure over the units but `undefined`; a seed counts where all have it.

    Of figures that say how far a model woke, and of their other side (`woken`), a unit counts under the seeds under
    which it was purified; of what is carried to another model, under those under which both were.
    """
    every = _carried(choice, dataset, arch, results)
    units = [u for u in every if u[0] not in undefined]
    metric, plain = choice.metric or "", choice.qualifier or ""
    what = f"{choice.pool} of {choice.metric} over {len(units)} units"
    if len(units) < len(every):
        what += f", without {len(every) - len(units)} to which the protocol gives no figure"
    absent = dict.fromkeys(f"{u}: {reason}" for u, reason, _ in units if isinstance(u, str))
    if absent or not units:
        return Series(what=what, values={}, reason="; ".join(absent) or "no such cell in the run")
    parts: list[tuple[Series, Collection[int] | None]] = []
    for u, _, to in units:
        assert isinstance(u, Unit)
        part = results.series(u, metric, f"on={to}" if to else plain)
        counts: Collection[int] | None = None
        if woken or metric in WOKEN:
            asr = [results.series(v, "asr", "") for v in ((u, replace(u, defense=to)) if to else (u,))]
            if unknown := [f"{s.what}: {s.reason}" for s in asr if not s.values]:
                return Series(what=what, values={}, reason="; ".join(unknown))
            counts = set.intersection(*({s for s, v in a.values.items() if v <= PURIFIED} for a in asr))
        parts.append((part, counts))
    asleep = [(part, counts) for part, counts in parts if counts is None or counts]
    if len(asleep) < len(parts):
        what += f", {len(parts) - len(asleep)} of them never purified"
    empty = [f"{p.what}: {p.reason}" for p, _ in asleep if not p.values]
    if empty or not asleep:
        return Series(what=what, values={}, reason="; ".join(empty) or _AWAKE)
    values = {}
    for s in sorted({s for p, _ in asleep for s in p.values}):
        here = [p for p, counts in asleep if counts is None or s in counts]
        if here and all(s in p.values for p in here):
            values[s] = _POOL[choice.pool]([p.values[s] for p in here])
    return Series(what=what, values=values, reason="" if values else "the units share no seed")


def _verdict(unit: str, left: Series, compared: Comparison, right: Series | None) -> Line:
    """Means over the seeds that both sides have decide alone; the interval says how firmly."""
    shown_left = summary(left)
    shown_right = {"what": "bound", "mean": compared.value, "seeds": []} if right is None else summary(right)
    gaps = _gaps(left, compared, right)
    if not gaps:
        return Line(unit=unit, verdict=NOT_RUN, reason=_lacking(left, right), left=shown_left, right=shown_right)
    difference = _estimate(list(gaps.values()))
    true = _true(compared.test, difference["mean"])
    firm = None
    if difference["interval"] == "t":
        firm = difference["lower"] > SAME or difference["upper"] < -SAME
    return Line(
        unit=unit,
        verdict=HOLDS if true else FAILS,
        left=shown_left,
        right=shown_right | {"plus": compared.plus} if compared.plus else shown_right,
        difference=difference | {"firm": firm, "seeds": list(gaps)},
    )


def _gaps(left: Series, compared: Comparison, right: Series | None) -> dict[int, float]:
    """Left minus right, or minus the bound, under every seed that has both."""
    seeds = sorted(set(left.values) if right is None else set(left.values) & set(right.values))
    bound = compared.value or 0.0
    return {s: left.values[s] - (bound if right is None else right.values[s] + compared.plus) for s in seeds}


def _true(test: str, gap: float) -> bool:
    return {">": gap > SAME, ">=": gap >= -SAME, "<": gap < -SAME, "<=": gap <= SAME}[test]


def _lacking(left: Series, right: Series | None) -> str:
    """Why two sides cannot be held against each other."""
    said = [f"{s.what}: {s.reason}" for s in (left, right) if s is not None and not s.values]
    return "; ".join(said) or "the two sides share no seed"


def summary(series: Series) -> dict[str, Any]:
    """Mean over seeds with its interval, or the reason why there is none."""
    if not series.values:
        return {"what": series.what, "mean": None, "seeds": [], "reason": series.reason}
    return {"what": series.what, "seeds": sorted(series.values)} | _estimate(list(series.values.values()))


def _estimate(values: Sequence[float]) -> dict[str, Any]:
    found = mean_over_attacks({"": list(values)}, share=False)
    assert found is not None
    return {"mean": found.value, "lower": found.low, "upper": found.high, "interval": found.kind}


def _table(claim: Claim, unit: Unit, paper: Paper) -> Table | None:
    """The claim's table whose setting is nearest: by data set, then architecture, then rate; the first of equals."""

    def fit(table: Table) -> tuple[bool, bool, bool]:
        s = table.setting
        return s["dataset"] == unit.dataset, s["arch"] == unit.arch, _rate(s, unit.attack) in (None, unit.rate)

    return max((paper.tables[t] for t in claim.tables), key=fit, default=None)


def _rate(setting: Mapping[str, Any], attack: str) -> float | None:
    """The rate that a table is printed for; an attack may have one of its own."""
    rate: float | None = setting.get("rates", {}).get(attack.partition("~")[0], setting.get("rate"))
    return rate


def _with_paper(line: Line, claim: Claim, unit: Unit, paper: Paper, results: Results, about: Mapping[str, Any]) -> Line:
    """The printed figures of both sides, and how their setting differs from the run's."""
    table = _table(claim, unit, paper)
    if table is None:
        return line
    left, than = claim.compared.left, claim.compared.than
    published: dict[str, Any] = {"table": table.id, "unconfirmed": table.unconfirmed}
    own = (left.metric or "", left.qualifier or "")
    published["left"] = _printed(table, unit, own, results)
    if than is not None and not than.pool:
        attack, defense = (r[0] if r else None for r in (than.attacks, than.defenses))
        other = (than.metric or own[0], _qualifier(than, own[1]))
        published["right"] = _printed(table, unit, other, results, attack, defense)
    return replace(line, published=published, differs=tuple(differences(table.setting, unit, results, about)))


def _printed(
    table: Table,
    unit: Unit,
    measure: tuple[str, str],
    results: Results,
    attack: Ref | None = None,
    defense: Ref | None = None,
) -> float | None:
    """The table's figure of a metric and qualifier for a unit; `attack` and `defense` stand in for the unit's own."""

    def same(kind: str, printed: Ref | None, instead: Ref | None, label: str) -> bool:
        if instead is not None:
            return printed == instead
        return (printed or Ref(id="none")).fits(label, results.methods.get((kind, label), {}))

    for f in table.figures:
        if (
            (f.metric, f.qualifier) == measure
            and same("attack", f.attack, attack, unit.attack)
            and same("defense", f.defense, defense, unit.defense)
        ):
            return f.value
    return None


def differences(setting: Mapping[str, Any], unit: Unit, results: Results, about: Mapping[str, Any]) -> Iterator[str]:
    """What of a printed table's setting is otherwise in the run."""
    suite: Mapping[str, Any] = about.get("suite", {})
    recipe: Mapping[str, Any] = suite.get("recipe", {})
    access: Mapping[str, Any] = suite.get("access", {})
    rows = suite.get("dataset_rows", {}).get(unit.dataset, {}).get("train")
    if rows is None:
        rows = about.get("datasets", {}).get(unit.dataset, {}).get("rows", {}).get("train")
    ours = {"dataset": unit.dataset, "arch": unit.arch, "rows": rows}
    ours |= {"seeds": len(suite.get("seeds", ())), "clean": access.get("clean")}
    ours |= {"clean_source": access.get("clean_source")}
    for key, wanted in setting.items():
        if key == "rates":
            continue
        if key == "note":
            yield from wanted
        elif key in ("attack", "defense"):
            label = getattr(unit, key)
            params = results.methods.get((key, label), {})
            for name, printed in wanted.get(label.partition("~")[0], {}).items():
                if params.get(name) != printed:
                    yield f"{key} {label}: {name} {params.get(name)} instead of {printed}"
        elif key == "evaluator":
            have = {e["id"]: e["params"] for e in suite.get("evaluators", ())}
            for plugin, params in wanted.items():
                for name, printed in params.items() if plugin in have else ():
                    if have[plugin].get(name) != printed:
                        yield f"{plugin}: {name} {have[plugin].get(name)} instead of {printed}"
        elif key == "rate":
            if unit.attack not in RATELESS and unit.rate != (printed := _rate(setting, unit.attack)):
                yield f"rate {unit.rate} instead of {printed}"
        else:
            value = ours[key] if key in ours else recipe.get(key)
            if value != wanted:
                yield f"{key} {'of the data set' if value is None else value} instead of {wanted}"
