"""A method under test: what it declares, and its runs on micro cases, each made once and shared by all checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleeperbench.contracts.attack import Attack, Backdoor, PoisonedSet
from sleeperbench.contracts.context import Ctx
from sleeperbench.contracts.defense import Defense, Outcome
from sleeperbench.contracts.evaluator import Evaluator
from sleeperbench.engine import artifacts
from sleeperbench.engine.blueprint import SNAPSHOTS
from sleeperbench.engine.registry import Registry
from sleeperbench.errors import BadInput
from sleeperbench.kit.classifier import traits
from sleeperbench.kit.planted import Planted
from sleeperbench.testing.base import KINDS, Skipped
from sleeperbench.testing.differ import differ
from sleeperbench.testing.observe import Run, after, ask, observe
from sleeperbench.testing.situations import evaluation_task, invented
from sleeperbench.testing.stage import BASE, RATE, Stage, Variant, stage

SEED = 7


@dataclass(frozen=True)
class Made:
    """What an attack answered: `prepare`'s backdoor and `poison`'s set, with what they were given."""

    backdoor: Backdoor
    poisoned: PoisonedSet


class Subject:
    """A method to check.

    Args:
        cls: Its class.
        id: Shown in reports; default the class's name.
        inner: For a wrapper: what it wraps; the stage makes an answer of its own without it.
        others: Evaluators by id, for one that reads the findings of others; those of the registry need not be given.
        full: Also what takes longer.
    """

    def __init__(
        self,
        cls: type,
        *,
        id: str = "",
        inner: Subject | None = None,
        others: Mapping[str, type] | None = None,
        full: bool = False,
    ) -> None:
        bases = {"attack": Attack, "defense": Defense, "evaluator": Evaluator}
        kinds = [k for k in KINDS if isinstance(cls, type) and issubclass(cls, bases[k])]
        if not kinds:
            raise BadInput(f"{cls!r} is no class derived from Attack, Defense or Evaluator of sleeperbench")
        self.kind, self.cls, self.full = kinds[0], cls, full
        self.id = id or cls.__name__
        self.inner, self.others = inner, dict(others or {})
        self._runs: dict[Any, Run] = {}
        self._seen: dict[Any, tuple[Any, Exception | None]] = {}

    def __repr__(self) -> str:
        return f"{self.kind}/{self.id}"

    @property
    def value(self) -> str:
        """The entry-point value."""
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    @functools.cached_property
    def info(self) -> Mapping[str, Any]:
        """INFO, if it is a mapping."""
        info = getattr(self.cls, "INFO", {})
        return info if isinstance(info, Mapping) else {}

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """INFO's parameters for micro runs; the evaluator's that a suite names are the stage's."""
        micro = self.info.get("micro", {})
        params = dict(micro) if isinstance(micro, Mapping) else {}
        names = getattr(self.cls, "__dataclass_fields__", {})
        if self.kind == "evaluator":
            params |= {n: [f"staged_{n}"] for n in ("peers", "surrogates") if n in names}
        return params

    @property
    def situation(self) -> str:
        """The cell on which an evaluator is tried first."""
        if self.kind != "evaluator":
            return ""
        return {"attack": "undefended", "zoo": "zoo"}.get(self.cls.NEEDS.scope, "repaired")  # type: ignore[attr-defined]

    def method(self) -> Any:
        """An instance with the micro parameters."""
        return self.cls.from_params(self.params)  # type: ignore[attr-defined]

    def other(self, id: str) -> Subject:
        """Another evaluator whose findings this one reads."""
        cls = self.others.get(id) or Registry.discover().load("evaluator", id)
        return Subject(cls, id=id, others=self.others) if self.others else installed(cls, id, self.full)

    # ---- runs ------------------------------------------------------------------------------------------------------
    def run(self, variant: Variant = BASE, turn: int = 0, situation: str = "") -> Run:
        """The run on a micro case; runs that differ in `turn` alone shall give the same answer.

        A defense in situation `clean_model` is handed a clean model instead of the attacked one.
        """
        if self.kind == "attack":  # `prepare` and `poison` see no classifier; the hooks do: see hooked.py
            variant = replace(variant, arch=BASE.arch)
        key = variant, turn, situation or self.situation
        if key not in self._runs:
            perform: Callable[..., Run] = getattr(self, f"_{self.kind}")
            self._runs[key] = perform(stage(variant), turn, situation or self.situation)
        return self._runs[key]

    def answer(self, variant: Variant = BASE, situation: str = "") -> Any:
        """The answer of a run.

        Raises:
            Skipped: there is none, which check `runs` or `access` reports.
        """
        run = self.run(variant, 0, situation)
        if run.answer is None:
            raise Skipped(run.declined or "there is no answer: see `runs` and `access`")
        return run.answer

    def once(self, key: Any, look: Callable[[], Any]) -> Any:
        """What `look` gives, or raises, the first time that it is asked for under this key."""
        if key not in self._seen:
            try:
                self._seen[key] = look(), None
            except Exception as e:
                self._seen[key] = None, e
        value, error = self._seen[key]
        if error is not None:
            raise error.with_traceback(None)
        return value

    def _attack(self, at: Stage, turn: int, situation: str) -> Run:
        train, eligible = at.attackable
        ctx = self.ctx(at)
        given = replace(train, images=train.images.clone(), labels=train.labels.clone(), ids=train.ids.clone())
        free, models = eligible.clone(), ctx.clean_models

        def work() -> Made:
            method = self.method()
            for m in (method, ctx.inner) if ctx.inner else (method,):
                ask(m, at.variant)
            b = method.prepare(given, ctx)
            return Made(b, method.poison(given, b, free, RATE, ctx))

        run = observe(work, turn)
        fresh = self.ctx(at).clean_models
        touched = differ((given, free, models), (train, eligible, fresh), "train, eligible, ctx.clean_models")
        return replace(run, touched=touched)

    @property
    def wrapped(self) -> type | None:
        """For an attack that wraps another: the wrapped one's class, or the planted square's."""
        if self.kind != "attack" or not self.info.get("wrapper"):
            return None
        return self.inner.cls if self.inner else Planted

    @property
    def snapshot(self) -> str:
        """SNAPSHOT of an attack; of a wrapper and the wrapped one, that which says less."""
        classes = [c for c in (self.cls, self.wrapped) if c]
        return max((c.SNAPSHOT for c in classes), key=SNAPSHOTS.index)  # type: ignore[attr-defined]

    def ctx(self, at: Stage) -> Ctx:
        """A fresh context for an attack, with the clean models and the wrapped attack that it needs."""
        inner = (self.inner.method() if self.inner else Planted()) if self.wrapped else None
        classes = [c for c in (self.cls, self.wrapped) if c]
        surrogates = max(int(c.NEEDS.get("clean_models", 0)) for c in classes)  # type: ignore[attr-defined]
        return replace(at.ctx(SEED, surrogates), inner=inner)

    def _defense(self, at: Stage, turn: int, situation: str) -> Run:
        needs = self.cls.REQUIRES  # type: ignore[attr-defined]
        lacks = sorted(needs - traits(at.variant.spec)) if needs else []
        if lacks:
            return Run(declined=f"needs_{lacks[0]}")
        if situation == "clean_model":
            at = at.unattacked
        task = self.task(at)
        staged = at.staged(task, self.value)
        case = at.case(staged)
        if not self.info.get("prepares"):
            return after(observe(lambda: self._asked(at).run(case), turn), case, at.case(staged))
        early = at.staged(task.preparation(), self.value)
        first = at.case(early)

        def work() -> Any:
            method = self._asked(at)
            prepared = Outcome(state=method.prepare(first))
            (staged[0] / "in" / "prepared").mkdir()
            artifacts.write_outcome(staged[0] / "in" / "prepared", prepared)
            return method.run(case)

        whole = observe(work, turn)
        before, run = after(whole, first, at.case(early)), after(whole, case, at.case(staged))
        return replace(run, touched=before.touched or run.touched, opened=before.opened | run.opened)

    def _asked(self, at: Stage) -> Any:
        """An instance that did not refuse."""
        method = self.method()
        ask(method, at.variant)
        return method

    def task(self, at: Stage) -> Any:
        """A defense's task, with the outcome of what it wraps."""
        access = self.cls.ACCESS  # type: ignore[attr-defined]
        inner = None
        if access.inner:
            inner = self.inner.answer(at.variant) if self.inner else invented(at)
        return at.task(self.id, access, self.params, inner)

    def _evaluator(self, at: Stage, turn: int, situation: str) -> Run:
        task = evaluation_task(self, at, situation)
        case = at.evaluation(task)

        def work() -> Any:
            method = self.method()
            ask(method, at.variant)
            return method.measure(case)

        return after(observe(work, turn), case, at.evaluation(task))

    def findings(self, at: Stage, situation: str) -> str:
        """Key of an evaluator's findings on a staged cell, for those that read them."""

        def write(folder: Path) -> None:
            answer = self.run(at.variant, 0, situation).answer
            if answer is None:
                raise Skipped(f"{self} has no findings there, which its own checks report")
            artifacts.write_findings(folder, answer)

        return at.kept("findings", {"of": self.value, "in": situation}, write)


@functools.cache
def installed(cls: type, id: str, full: bool) -> Subject:
    """The one subject of an installed method in this process: those that read its findings share its runs."""
    return Subject(cls, id=id, full=full)
