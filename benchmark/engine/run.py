"""One run: plan, do what is missing, decide gates, write rows, tables and site. Resuming is the default."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeperbench.engine import finish, preflight
from sleeperbench.engine.costs import Costs
from sleeperbench.engine.gate import GATED, Gate
from sleeperbench.engine.graph import Cell, Plan, Zoo
from sleeperbench.engine.lease import clear
from sleeperbench.engine.ledger import Ledger
from sleeperbench.engine.lock import locked
from sleeperbench.engine.pool import Pool
from sleeperbench.engine.progress import Progress, names
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.schedule import Queue
from sleeperbench.engine.store import Damaged, Store
from sleeperbench.engine.task import Task
from sleeperbench.errors import BadInput, nearest

ATTEMPTS = 3
"""Times a task is tried whose worker was lost."""
BAD = ("failed", "timeout", "out_of_memory")
_OWN = ("attack", "prepared", "defense", "inner", "oracle", "answer")
"""Inputs without which a task has nothing to work on, so that their reason is its own."""
_ORDER = {"attack": 0, "prepare": 1, "defense": 1, "answer": 2, "evaluate": 3}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a plan; nothing here changes a figure."""

    out: Path
    store: str
    devices: list[str]
    sandbox: str = "process"
    rerun: str = ""
    only_stage: str = ""
    shard: str = ""
    fail_fast: bool = False
    keep_unimplanted: bool = False
    quiet: bool = False
    site: bool = True
    verify_store: bool = False


@dataclass(kw_only=True)
class Run:
    """The state of a run in progress."""

    plan: Plan
    registry: Registry
    options: Options
    text: str
    running: set[str] = field(default_factory=set)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    damage: dict[str, int] = field(default_factory=dict)
    """Task -> times its artifact was found damaged."""
    crowded: set[str] = field(default_factory=set)
    """Tasks that ran out of memory once; they are tried once more, with nothing beside them."""
    elsewhere: set[str] = field(default_factory=set)
    """Tasks that another run on this store was seen computing."""
    computed: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.store = Store(self.options.store, verify=self.options.verify_store)
        self.gate = Gate(self.plan, self.registry)
        self.ledger = Ledger(self.plan, self.registry, self.store, self.options.out, self.gate.learn)
        self.costs = Costs(self.store.root)
        self.queue = Queue(self.plan, self.has, self._open, self.gate.deciders, self.costs)
        self.zoos = list(self.plan.zoos)
        self.names = names(self.plan)
        self._there: dict[str, bool] = {}

    def has(self, key: str) -> bool:
        """Whether an artifact is in the store, asked once; commits and damage are noted by this run."""
        if key not in self._there:
            self._there[key] = self.store.has(key)
        return self._there[key]

    def _open(self, group: str) -> bool:
        return self.options.keep_unimplanted or self.gate.open(group)

    # ---- what there is to do ---------------------------------------------------------------------------------------
    def resume(self) -> None:
        """Take over what earlier runs finished and find the tasks that are missing."""
        (self.options.out / "logs").mkdir(exist_ok=True)
        again = self._rerun()
        damaged = self._verify() if self.options.verify_store else set()
        todo = [k for k in self.ledger.uses if k in again | damaged or not self.ledger.take(k)]
        for cell in self.plan.cells:
            if cell.blocked:
                status, _, reason = cell.blocked.partition(" ")
                self.ledger.missing([(cell, e) for e in cell.evaluations], status, reason)
            for e in cell.evaluations:
                if e.reason:
                    self.ledger.missing([(cell, e)], "not_applicable", e.reason)
        for key in todo:
            self._take_or_want(key)
        for key in damaged:
            self.queue.want(key)
        self._resume_zoos()

    def _take_or_want(self, key: str) -> None:
        """Rows of an evaluation whose artifact is in the store already; else it is computed."""
        try:
            if self.has(key):
                self.ledger.settle(key)
            else:
                self.queue.want(key)
        except Damaged:
            self._gone(key)

    def _verify(self) -> set[str]:
        """Keys of the plan whose artifact is damaged, after taking those out, whether or not their rows exist."""
        found = {key for key in self.plan.tasks if self.has(key) and self.store.check(key)}
        for key in sorted(found):
            print(f"artifact {key[:12]} ({self.names[key]}) is damaged: computing it again", file=sys.stderr)
            self.store.discard_damaged(key)
            self._there[key] = False
        return found

    def _rerun(self) -> set[str]:
        """Evaluate keys whose rows --rerun throws away, after discarding what they stand on."""
        what = self.options.rerun
        if not what:
            return set()
        chosen = set()
        for key, uses in self.ledger.uses.items():
            bad = any(r["status"] in (*BAD, "not_run") for r in self.ledger.rows.get(key, ()))
            matches = what == "all" or any(fnmatch.fnmatchcase(c.name, what) for c, _ in uses)
            if (what == "failed" and bad) or (what != "failed" and matches):
                chosen.add(key)
        if not chosen and what not in ("all", "failed"):
            names = [c.name for c in self.plan.cells]
            raise BadInput(f"--rerun {what} matches no cell: {nearest(what, names)} (a pattern of cell names)")
        drop = set(self.plan.tasks) if what == "all" else set()
        if what not in ("all", "failed"):
            drop = chosen | {c.defense_key for k in chosen for c, _ in self.ledger.uses[k]}
        for key in drop:
            self.store.discard(key)
        return chosen

    # ---- zoos: which cells have an outcome is known when all else is done ------------------------------------------
    def _resume_zoos(self) -> None:
        """Settle zoos that an earlier run finished; have the members of the others computed."""
        given_up = {c.defense_key for c in self.plan.cells if self._given_up(c)}
        for zoo in list(self.zoos):
            task = zoo.task(without={k for k, _ in zoo.members if k in given_up and not self.has(k)})
            if task is not None:
                self.ledger.add(zoo, task.key)
                if not self._again(zoo) and self.ledger.take(task.key):
                    self.zoos.remove(zoo)
                    continue
            for key in (*(k for k, _ in zoo.members if k not in given_up), *zoo.shell.inputs.values()):
                if not self.has(key):
                    self.queue.want(key)

    def _again(self, zoo: Zoo) -> bool:
        """Whether --rerun asks for a zoo."""
        what, key = self.options.rerun, zoo.evaluation.key
        bad = any(r["status"] in (*BAD, "not_run") for r in self.ledger.rows.get(key, ()))
        matches = bool(what) and fnmatch.fnmatchcase(zoo.line.name, what)
        return bad if what == "failed" else what == "all" or matches

    def _given_up(self, cell: Cell) -> bool:
        """Whether an earlier run tried a cell's defense in vain: all its rows are there and none has a figure."""
        keys = [e.key for e in cell.evaluations if e.key]
        tried = bool(keys) and all(k in self.ledger.settled for k in keys)
        return tried and all(r["status"] != "ok" for k in keys for r in self.ledger.rows[k] if r["cell"] == cell.name)

    def _form_zoos(self) -> None:
        """Make the tasks of the zoos over the cells that have an outcome now."""
        for zoo in self.zoos:
            task = zoo.task(without={k for k, _ in zoo.members if not self.has(k)})
            missing = [k for k in zoo.shell.inputs.values() if not self.has(k)]
            if task is None or missing:
                self.ledger.add(zoo, "")
                what = f"{self.names[missing[0]]} has no result" if missing else "no cell of the zoo has an outcome"
                self.ledger.missing([(zoo.line, zoo.evaluation)], "not_run", f"input_failed: {what}")
                continue
            self.plan.add(task)
            self.names[task.key] = f"{task.name} {zoo.line.name}"
            self.ledger.add(zoo, task.key)
            if self._again(zoo):
                self.store.discard(task.key)
            if self._again(zoo) or not self.ledger.take(task.key):
                self._take_or_want(task.key)
        self.zoos = []

    # ---- doing it --------------------------------------------------------------------------------------------------
    def work(self) -> None:
        """Run everything that is pending."""
        clear(self.store.leases)
        stage = self.options.only_stage
        if stage:
            for k in [k for k in self.queue.pending if _ORDER[self.plan.tasks[k].kind] > _ORDER[stage]]:
                self.queue.drop(k)
            self.zoos = [] if stage != "evaluate" else self.zoos
        self._gates()
        if not self.queue.pending:
            self._form_zoos()
        if not self.queue.pending:
            return
        self.store.probe()
        pending = [self.plan.tasks[k] for k in self.queue.pending] + [z.shell for z in self.zoos]
        preflight.ask(self.plan, pending)
        self.queue.rank()
        progress = Progress(self.options.quiet)
        budget = self.plan.suite.budget
        pool = Pool(
            self.store.where,
            self.options.out,
            self.options.devices,
            budget["threads"],
            int(budget["memory_gb"] * 2**30),
            verify=self.options.verify_store,
            level=self.options.sandbox,
        )
        try:
            with (self.options.out / "tasks.jsonl").open("a") as journal:
                self._drain(pool, progress, journal)
                if not self.stopped:
                    self._form_zoos()
                    self._drain(pool, progress, journal)
        finally:
            progress.clear()
            pool.close()
            self.costs.save()

    def _drain(self, pool: Pool, progress: Progress, journal: Any) -> None:
        while (self.queue.pending or self.running) and not self.stopped:
            for key in self.queue.due():
                self._there.pop(key, None)
                if self.has(key):
                    self._found(key)
                    self._gates(progress)  # it may be what a gate waited for
            self._fill(pool)
            if not self.running and not self.queue.later:
                self._stuck()
                return
            for task, answer in pool.wait(0.2):
                self._answered(task, answer, progress)
                self._journal(journal, task, answer)
                self._gates(progress)
            ahead = self.queue.ahead + sum(self.queue.seconds.get(k, 0.0) for k in self.running)
            progress.show(pool.slots, self.names, len(self.queue.pending) + len(self.running), ahead)
            if self.options.fail_fast and any(status in BAD for status, _ in self.failed.values()):
                progress.say("stopped at the first failure, as --fail-fast asks")
                self.stopped = True

    def _fill(self, pool: Pool) -> None:
        while (slot := pool.free()) is not None and not self.running & self.crowded:
            job = self.queue.pop()
            alone = [k for k in job if k in self.crowded][:1]
            back = [k for k in job if k not in alone] if alone else []
            if alone and self.running:
                back, job = job, []
            for key in back:
                self.queue.want(key)
            job = [k for k in job if k not in back]
            if not job:
                return
            self.running.update(job)
            tasks = [self.plan.tasks[k] for k in job]
            logs = [self.options.out / "logs" / f"{k}.log" for k in job]
            pool.submit(slot, [(t, self.values(t), log) for t, log in zip(tasks, logs, strict=True)], bool(alone))

    def _stuck(self) -> None:
        """Nothing runs and nothing can: what is left waits for a gate that cannot be decided."""
        for key in sorted(self.queue.pending):
            self.fail(key, "not_run", "input_failed: what this task waits for did not finish")

    def _found(self, key: str) -> None:
        """An artifact is there: note it, make rows of it, let its users start."""
        self._there[key] = True
        self.queue.drop(key)
        try:
            if key in self.ledger.uses:
                self.ledger.settle(key)
            self.queue.done(key)
        except Damaged:
            self._gone(key)

    def _gone(self, key: str) -> None:
        """An artifact is damaged: have it computed again, but not for ever."""
        self._there[key] = False
        self.damage[key] = self.damage.get(key, 0) + 1
        if self.damage[key] < ATTEMPTS:
            self.queue.gone(key)
        else:
            self.fail(key, "failed", f"raised: its artifact was damaged {ATTEMPTS} times; check the store's disk")

    def _answered(self, task: Task, answer: dict[str, Any], progress: Progress) -> None:
        key, status = task.key, answer["status"]
        self.running.discard(key)
        if status == "leased":
            if key not in self.elsewhere:
                self.elsewhere.add(key)
                progress.say(f"{self.names[key]}: another run on this store computes it")
            self.queue.postpone(key)
        elif status == "returned":  # it waited in a worker that was lost over another task
            self.queue.want(key)
        elif status == "ok":
            if answer["computed"]:
                self.computed += 1
                self.costs.learn(self.plan, task, answer["result"])
            progress.finished(self.queue.seconds.get(key, 0.0))
            self._found(key)
        elif status == "damaged":
            progress.say(f"{answer['reason']}: computing it again")
            self._gone(answer["key"])
            if answer["key"] in self.failed:
                self.fail(key, *self.failed[answer["key"]])
            else:
                self.queue.want(key)
        elif status == "no_space":
            raise BadInput(
                f"cannot write the store {self.store.where}: {answer['reason']}; free space or give another --store"
            )
        elif status == "lost" and self.attempts.get(key, 0) + 1 < ATTEMPTS:
            self.attempts[key] = self.attempts.get(key, 0) + 1
            progress.say(f"{answer['reason']} during {self.names[key]}: trying it again")
            self.queue.want(key)
        elif status == "out_of_memory" and key not in self.crowded:
            self.crowded.add(key)
            progress.say(f"out of memory: {self.names[key]}: trying it again with nothing beside it")
            self.queue.want(key)
        else:
            status = "failed" if status == "lost" else status
            if status != "not_applicable":
                progress.say(f"{status}: {self.names[key]}: {answer['reason']}")
            self.fail(key, status, answer["reason"])
            progress.finished(self.queue.seconds.get(key, 0.0))

    def _journal(self, journal: Any, task: Task, answer: dict[str, Any]) -> None:
        line: dict[str, Any] = {"key": task.key, "kind": task.kind, "plugin": task.name, "name": self.names[task.key]}
        line |= {k: answer.get(k) for k in ("status", "reason", "result")} | {"time": time.time()}
        journal.write(json.dumps(line) + "\n")
        journal.flush()

    def fail(self, key: str, status: str, reason: str) -> None:
        """Record that a task has no artifact, and say so on every row that would have needed it."""
        self.failed[key] = (status, reason)
        self.queue.drop(key)
        if key in self.ledger.uses:
            self.ledger.missing(self.ledger.uses[key], status, reason)
        for user in self.plan.users.get(key, ()):
            if user not in self.queue.pending:
                continue
            own = [r for r, k in self.plan.tasks[user].inputs.items() if k == key]
            # What a closed gate stops is stopped by the gate, through however many controls.
            if reason.startswith(GATED) or any(r in _OWN for r in own):
                self.fail(user, status, reason)
            else:
                what = f"{self.plan.tasks[key].kind} {self.names[key]}: {reason}"
                self.fail(user, "not_run", f"input_failed: {what}")

    def _gates(self, progress: Progress | None = None) -> None:
        """Let go what waits behind gates that were decided since, or drop it."""
        for group in self.gate.decided():
            if self._open(group):
                self.queue.opened(group)
                continue
            waiting = self.queue.behind(group)
            for key in waiting:
                if key in self.queue.pending:
                    self.fail(key, "not_run", f"{GATED}: {self.gate.why(group)}")
            if progress and waiting:
                progress.say(f"{group} did not implant ({self.gate.why(group)}): its defenses are not run")

    def values(self, task: Task) -> dict[str, str]:
        """Entry-point values that the worker of a task needs: its plugin's, and that of a live attack."""
        chain = self.registry.chain(task.of, task.name)
        plugin = chain[0]
        values = {task.name: " ".join(p.value for p in chain) if task.kind == "attack" else plugin.value}
        if task.kind in ("prepare", "defense"):
            values["requires"] = " ".join(sorted(plugin.blueprint.requires))
        for role in ("attack", "oracle"):
            live = task.params.get("access", {}).get("oracle") or task.params.get("needs", {}).get("trigger") == "live"
            if role in task.inputs and live:
                name = self.plan.tasks[task.inputs[role]].name
                values[name] = " ".join(p.value for p in self.registry.chain("attack", name))
        return values


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Take SIGTERM like Ctrl-C, so that what is finished is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(plan: Plan, registry: Registry, options: Options, text: str) -> int:
    """Run a plan into `options.out`; returns the exit code.

    Raises:
        BadInput: the folder is locked or cannot be written, or parameters do not fit.
        BrokenPlugin: a plugin that the run needs cannot be imported.
    """
    with locked(options.out), terminable():
        code = 0
        try:
            (options.out / "rows").mkdir(exist_ok=True)
            run = Run(plan=plan, registry=registry, options=options, text=text)
            try:
                run.resume()
                run.work()
            except KeyboardInterrupt:
                code = 130
        except OSError as e:
            raise BadInput(
                f"cannot write the run folder {options.out}: {e.strerror}; mend that, then run this again"
            ) from e
        failures = finish.finish(run, code)
        if code == 130:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        return 1 if failures else 0
