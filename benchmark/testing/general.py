"""Checks of every method: what it declares, that it repeats itself, and that it leaves the world as it was."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from sleeperbench import API_VERSION
from sleeperbench.contracts import NotApplicable
from sleeperbench.engine.blueprint import Blueprint, read
from sleeperbench.engine.plugin import Plugin
from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BadInput, BrokenPlugin
from sleeperbench.schema import JUDGES
from sleeperbench.testing.base import Failed, Skipped, check, hold
from sleeperbench.testing.differ import differ
from sleeperbench.testing.second import second
from sleeperbench.testing.sound import sound, trains
from sleeperbench.testing.stage import BASE, Variant
from sleeperbench.testing.subject import Subject

ALL = "attack defense evaluator"
SECONDS, SLACK = 1.0, 4.0
"""Processor seconds that a micro run aims at, and by what factor it may exceed them: a core with busy neighbours counts
more, and a few methods have no parameter that brings them so low (docs/check.md)."""


def _blueprint(s: Subject) -> Blueprint:
    try:
        return read(s.value, method=True)
    except BrokenPlugin as e:
        raise Failed(str(e)) from e


def _presets(b: Blueprint, effort: list[str]) -> None:
    """Each of INFO's presets lowers parameters that `effort` names, and nothing else."""
    presets = b.info.get("presets", {})
    hold(type(presets) is dict, f"INFO['presets'] is {presets!r}, not a dict")
    for name, preset in presets.items():
        where = f"INFO['presets'][{name!r}]"
        hold(type(preset) is dict and preset, f"{where} is {preset!r}, not a dict with at least one parameter")
        for key, value in preset.items():
            hold(key in b.fields, f"{where} names {key!r}, which is no parameter")
            hold(key in effort, f"{where} sets {key!r}, which INFO['effort'] does not name")
            fits = type(value) is int and 1 <= value <= b.fields[key].default
            hold(fits, f"{where} sets {key} to {value!r}: give a whole number from 1 to the default")
        lower = any(value < b.fields[key].default for key, value in preset.items())
        hold(lower, f"{where} lowers nothing")


@check(
    "metadata",
    ALL,
    what="INFO, ACCESS, NEEDS, METRICS and the parameters are literal; INFO is complete; each parameter is explained; "
    "presets lower nothing but `effort`; "
    "a defense that judges says whether it traverses classes and what it presumes.",
    remedy="Write what is named out as a literal in the class body (docs/plugins.md has the forms); a published method "
    "has `paper`, `bibtex` and an `Args:` line per parameter; one of kind detection, inversion or cleansing has "
    "`traverses` and `presumes`.",
)
def metadata(s: Subject) -> None:
    """Read the source as the planner does."""
    b = _blueprint(s)
    plugin = Plugin(s.kind, s.cls.__name__, "checked", "0", s.value, builtin=False)  # type: ignore[arg-type]
    try:
        Registry([plugin]).load(plugin.kind, plugin.id)
    except (BrokenPlugin, BadInput) as e:
        raise Failed(str(e)) from e
    forms = {"title": str, "paper": str, "bibtex": str, "kind": str, "version": int, "api": int, "micro": dict}
    for key, form in forms.items():
        hold(type(b.info.get(key)) is form, f"INFO[{key!r}] is {b.info.get(key)!r}, not {form.__name__}")
    hold(b.info["version"] >= 1, f"INFO['version'] is {b.info['version']}, not 1 or more")
    hold(b.info["api"] == API_VERSION, f"INFO['api'] is {b.info['api']}, this is {API_VERSION}")
    hold(b.doc, "the class has no docstring")
    hold(bool(b.info["bibtex"]) >= bool(b.info["paper"]), "INFO names a paper, but its bibtex is empty")
    hold(not b.info["paper"] or re.match(r"https?://", b.info["paper"]), f"paper {b.info['paper']!r} is no URL")
    effort = b.info.get("effort", [])
    hold(isinstance(effort, list), f"INFO['effort'] is {effort!r}, not a list")
    for name in effort:
        normal = b.fields[name].default if name in b.fields else None
        known = type(normal) is int or (isinstance(normal, tuple) and {int} == set(map(type, normal)))
        hold(known, f"INFO['effort'] names {name!r}, which is no whole-number parameter, nor a tuple of such")
    _presets(b, effort)
    control = b.info.get("control", False)
    hold(type(control) is bool, f"INFO['control'] is {control!r}: True where the method is there to be compared with")
    if s.kind == "defense" and b.info["kind"] in JUDGES:
        traverses, presumes = b.info.get("traverses"), b.info.get("presumes")
        words = "True where it looks at every class in turn as a possible target, else False"
        hold(type(traverses) is bool, f"INFO['traverses'] is {traverses!r}: {words}")
        words = "say what it takes for granted of the trigger"
        hold(isinstance(presumes, str) and presumes.strip(), f"INFO['presumes'] is {presumes!r}: {words}")
    if b.access is not None:
        hold(bool(b.info.get("wrapper")) == bool(b.access.inner), "INFO['wrapper'] and ACCESS.inner disagree")
    mute = [n for n, p in b.fields.items() if not p.doc]
    # Who documents one parameter, or publishes, documents all.
    if b.info["paper"] or len(mute) < len(b.fields):
        hold(not mute, f"the docstring has no `Args:` line for parameter `{next(iter(mute), '')}`")


@check(
    "parameters",
    ALL,
    what="Parameters are keyword-only and frozen, have JSON defaults, and survive a round trip through from_params.",
    remedy="Put `@dataclass(frozen=True, kw_only=True)` above the class, give every field a literal default, and "
    "refuse bad values in __post_init__ with ValueError.",
)
def parameters(s: Subject) -> None:
    """Make the method from JSON and compare."""
    cls: Any = s.cls
    hold("__dataclass_params__" in vars(cls), "the class is no dataclass of its own")
    hold(cls.__dataclass_params__.frozen, "the dataclass is not frozen: a run could change its own parameters")
    for f in dataclasses.fields(cls):
        hold(f.kw_only, f"parameter `{f.name}` is not keyword-only")
        has = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        hold(has, f"parameter `{f.name}` has no default")
    for given in ({}, s.params):
        try:
            method = cls.from_params(given)
            again = cls.from_params(json.loads(json.dumps(dataclasses.asdict(method), allow_nan=False)))
        except (TypeError, ValueError) as e:
            raise Failed(f"from_params({given}) and back through JSON raises {type(e).__name__}: {e}") from e
        unlike = differ(method, again, "the method")
        hold(not unlike and method == again, f"after a round trip through JSON {unlike or 'it is not equal'}")
    try:
        cls.from_params({"no such parameter": 1})
    except ValueError:
        return
    raise Failed("from_params takes a parameter that does not exist")


@check(
    "runs",
    ALL,
    what="The micro run on the base case (small CNN with BatchNorm, 3 channels, 10 classes) ends with an answer.",
    remedy="Run it in a debugger with INFO['micro'] on small images; raise NotApplicable only where the method cannot "
    "work, and give micro parameters that fit 120 clean rows.",
)
def runs(s: Subject) -> None:
    """The run that all other checks look at."""
    run = s.run()
    if run.greedy:
        raise Skipped("undeclared access: see `access`")
    hold(not run.error, f"it raises {run.error}")
    hold(not run.declined, f"it declines the base case: {run.declined}")


@check(
    "outputs",
    ALL,
    what="The answer has the right types and shapes, holds finite values, and fits the method's kind.",
    remedy="Return what the contract's docstring says (sleeperbench.contracts); the message names the part.",
)
def outputs(s: Subject) -> None:
    """Look at the answer of the base run."""
    s.answer()
    sound(s, BASE)


@check(
    "deterministic",
    ALL,
    what="Two runs under one seed give equal answers, bit for bit.",
    remedy="Draw from `ctx.generator(name)` and `ctx.derive(name)` alone, never from a global or unseeded generator, "
    "the clock, or the order of a set.",
)
def deterministic(s: Subject) -> None:
    """Run it again with other global seeds."""
    first = s.answer()
    again = s.run(turn=1)
    if again.answer is None:
        raise Failed(f"the first run answers, the second does not: {again.error or again.declined}")
    unlike = differ(first, again.answer)
    hold(not unlike, f"in two runs under one seed {unlike}")


@check(
    "inputs_untouched",
    ALL,
    what="Models (weights, buffers, modes, hooks), images, labels and whatever else was handed over stay as they were.",
    remedy="Work on `copy.deepcopy(net)` and on clones of tensors; kit functions (tune, refresh, predict) do so "
    "themselves.",
)
def inputs_untouched(s: Subject) -> None:
    """Compare everything that was opened with a fresh copy."""
    touched = s.run().touched
    hold(not touched, f"after the run {touched}")


@check(
    "process_untouched",
    ALL,
    what="Global generators, default dtype, grad mode, cudnn's flags, number of threads and working folder stay.",
    remedy="Use a generator of your own and context managers (torch.no_grad, torch.random.fork_rng) instead of "
    "setting what belongs to the whole process.",
)
def process_untouched(s: Subject) -> None:
    """Compare the process before and after."""
    s.answer()
    # The second run, for a library's first import may draw from a global generator, which is not the method's doing.
    changed = s.run(turn=1).moved
    hold(not changed, f"the run changes {', '.join(changed)}")


@check(
    "access",
    "defense evaluator",
    what="Only what ACCESS or NEEDS declares is opened; training set, references, oracle, inner "
    "and what was prepared are not idle.",
    remedy="Declare what you open; take out of ACCESS what you never open, since it puts the row into another track.",
)
def access(s: Subject) -> str | None:
    """See what was opened."""
    run = s.run()
    hold(not run.greedy, f"it opens what it may not: {run.greedy}")
    s.answer()
    # A control stands in its track by what it stands for, not by what it reads.
    if s.kind == "defense" and s.info.get("kind") != "control":
        declared = dataclasses.asdict(s.cls.ACCESS)  # type: ignore[attr-defined]
        through = {"train": {"train", "marks"}, "oracle": {"oracle", "marks"}, "inner": {"inner", "spent"}}
        parts = ("train", "references", "oracle", "inner")
        idle = [n for n in parts if declared[n] and not through.get(n, {n}) & set(run.opened)]
        hold(not idle, f"ACCESS declares {', '.join(idle)}, which the run never opens")
        lazy = s.info.get("prepares") and "prepared" not in run.opened
        hold(not lazy, "INFO['prepares'] is True, and the run never opens `prepared`")
    return "opens " + (", ".join(sorted(run.opened)) or "nothing")


def tried(s: Subject, variants: list[Variant]) -> str:
    """Run it on other micro cases, its second phase and an attack's hooks included; returns what it declined.

    Raises:
        Failed: it neither works there nor declines with a reason.
        Skipped: already the base case is not as it has to be.
    """
    s.answer()
    try:
        _whole(s, BASE)
    except (Failed, NotApplicable) as e:
        raise Skipped("already the base case is not as it has to be: see the other checks") from e
    remarks = []
    for variant in variants:
        run = s.run(variant)
        hold(not run.error and not run.greedy, f"on {variant}: it raises {run.error or run.greedy}")
        declined = run.declined
        if not declined:
            try:
                _whole(s, variant)
            except Failed as e:
                raise Failed(f"on {variant}: {e}") from e
            except NotApplicable as e:  # the second phase may decline as the first may
                declined = str(e) or "NotApplicable without a reason"
        if declined:
            proper = re.fullmatch(r"[a-z][a-z0-9_]*(: .+)?", declined)
            hold(proper, f"on {variant}: its reason {declined!r} is no snake_case word with an optional `: detail`")
            remarks.append(f"{variant}: declined, {declined}")
    return "; ".join(remarks)


def _whole(s: Subject, variant: Variant) -> None:
    sound(s, variant)
    trains(s, variant)
    second(s, variant)


@check(
    "architectures",
    ALL,
    what="It works, its second phase too, or declines with a reason, on nets with BatchNorm, pre-activation, without "
    "BatchNorm and on a ViT (without --full: without BatchNorm).",
    remedy="Find layers through `kit.taps` instead of by name; what cannot work goes into REQUIRES or raises "
    'NotApplicable("snake_word: detail").',
)
def architectures(s: Subject) -> str:
    """Try other nets."""
    names = ("micro_nobn", "micro_preact", "micro_vit") if s.full else ("micro_nobn",)
    return tried(s, [Variant(arch=n) for n in names])


@check(
    "shapes",
    ALL,
    what="It works, its second phase too, or declines with a reason, with 1 and 3 channels and with 2 and 43 classes "
    "(without --full: 1 with 2, and, but for evaluators, 3 with 43).",
    remedy="Take channels, size and classes from `case.spec` or the images; expect classes without a single clean row.",
)
def shapes(s: Subject) -> str:
    """Try other images."""
    pairs = [(1, 2), (3, 43), (1, 43), (3, 2)]
    # Evaluators retrain most and look at classes least.
    pairs = pairs if s.full else pairs[:1] if s.kind == "evaluator" else pairs[:2]
    return tried(s, [Variant(channels=c, classes=k) for c, k in pairs])


@check(
    "micro",
    ALL,
    what=f"INFO['micro'] makes a run of {SECONDS:g} processor second; {SLACK:g} are allowed for loaded machines.",
    remedy="Lower counts of steps, rounds, draws or candidates in INFO['micro'] until it fits; the algorithm stays.",
)
def micro(s: Subject) -> str:
    """The quicker of two runs."""
    s.answer()
    seconds = min(s.run().seconds, s.run(turn=1).seconds)
    hold(seconds <= SECONDS * SLACK, f"it takes {seconds:.1f} processor seconds")
    return f"{seconds:.2f} processor seconds"
