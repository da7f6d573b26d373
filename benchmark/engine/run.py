"""One run: plan, do what is missing, decide gates, write rows, tables and site. Resuming is the default."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeperbench.engine import finish, rows
from sleeperbench.engine.gate import Gate
from sleeperbench.engine.lock import locked
from sleeperbench.engine.plan import Cell, Evaluation, Plan
from sleeperbench.engine.pool import Pool
from sleeperbench.engine.progress import Progress
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.store import Damaged, Store
from sleeperbench.engine.task import Task
from sleeperbench.errors import BadInput, BrokenPlugin, SleeperBenchError

ATTEMPTS = 3
"""Times a task is tried whose worker was lost."""
BAD = ("failed", "timeout", "out_of_memory")
_ORDER = {"attack": 0, "defense": 1, "answer": 2, "evaluate": 3}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a plan; nothing here changes a figure."""

    out: Path
    store: Path
    devices: list[str]
    rerun: str = ""
    only_stage: str = ""
    fail_fast: bool = False
    keep_unimplanted: bool = False
    quiet: bool = False
    site: bool = True


@dataclass(kw_only=True)
class Run:
    """The state of a run in progress."""

    plan: Plan
    registry: Registry
    options: Options
    text: str
    pending: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    settled: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Evaluate key -> its rows."""
    computed: int = 0

    def __post_init__(self) -> None:
        self.store = Store(self.options.store)
        self.index = {key: i for i, key in enumerate(self.plan.tasks)}
        self.cells_of: dict[str, list[tuple[Cell, Evaluation]]] = {}
        for cell in self.plan.cells:
            for e in cell.evaluations:
                if e.key:
                    self.cells_of.setdefault(e.key, []).append((cell, e))
        self.gate = Gate(self.plan, self.registry)
        self.names = self._names()

    def _names(self) -> dict[str, str]:
        """Task key -> what the progress lines call it."""
        names = {}
        for k, t in self.plan.tasks.items():
            replica = t.params.get("replica", 0)
            names[k] = f"clean model {replica}" if t.name == "none" and replica else f"{t.name} (control)"
        for cell in self.plan.cells:
            short = cell.name
            names[cell.attack_key] = "/".join([*short.split("/")[:3], short.split("/")[-1]])
            if cell.defense_key:
                names[cell.defense_key] = short
            for e in cell.evaluations:
                if e.key:
                    names[e.key] = f"{e.evaluator} {short}"
        return names

    # ---- what there is to do ---------------------------------------------------------------------------------------
    def resume(self) -> None:
        """Take over what earlier runs finished and find the tasks that are missing."""
        (self.options.out / "rows").mkdir(exist_ok=True)
        (self.options.out / "logs").mkdir(exist_ok=True)
        again = self._rerun()
        for key, uses in self.cells_of.items():
            found = None if key in again else self._saved(key, {c.name for c, _ in uses})
            if found is not None:
                self.settled[key] = found
                self.gate.learn(found)
        for cell in self.plan.cells:
            if cell.blocked:
                status, _, reason = cell.blocked.partition(" ")
                for e in cell.evaluations:
                    self._settle_missing([(cell, e)], status, reason)
            for e in cell.evaluations:
                if e.reason:
                    self._settle_missing([(cell, e)], "not_applicable", e.reason)
        for key in self.cells_of:
            if key not in self.settled:
                self.require(key)

    def _rerun(self) -> set[str]:
        """Evaluate keys whose rows --rerun throws away, after discarding what they stand on."""
        what = self.options.rerun
        if not what:
            return set()
        chosen = set()
        for key, uses in self.cells_of.items():
            saved = self._saved(key, set()) or []
            bad = any(r["status"] in (*BAD, "not_run") for r in saved)
            matches = what == "all" or any(fnmatch.fnmatchcase(c.name, what) for c, _ in uses)
            if (what == "failed" and bad) or (what != "failed" and matches):
                chosen.add(key)
        if what != "failed":
            for key in chosen:
                for cell, _ in self.cells_of[key]:
                    if what == "all":
                        self.store.discard(cell.attack_key)
                    self.store.discard(cell.defense_key)
                self.store.discard(key)
            if what == "all":
                for key in self.plan.tasks:
                    self.store.discard(key)
        return chosen

    def _saved(self, key: str, cells: set[str]) -> list[dict[str, Any]] | None:
        try:
            found: list[dict[str, Any]] = json.loads((self.options.out / "rows" / f"{key}.json").read_bytes())
            have = {r["cell"] for r in found}
            gated = any(r["reason"].startswith("attack_did_not_implant") for r in found)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if cells <= have and not gated else None

    def require(self, key: str) -> None:
        """Put a task that is not in the store, and everything it needs, on the list."""
        todo = [key]
        while todo:
            k = todo.pop()
            if k in self.pending or k in self.running or k not in self.plan.tasks:
                continue
            if self.store.has(k):
                if k == key:
                    self.pending.add(k)
                continue
            self.pending.add(k)
            todo += self.plan.inputs(k)

    def ready(self) -> list[str]:
        """Pending tasks whose inputs are there and whose gate is open; trainings first."""
        keys = []
        for k in self.pending:
            group = self.plan.gates.get(k)
            if group and not (self.gate.open(group) or self.options.keep_unimplanted):
                continue
            if all(self.store.has(i) for i in self.plan.inputs(k)):
                keys.append(k)
        return sorted(keys, key=lambda k: (_ORDER[self.plan.tasks[k].kind], self.index[k]))

    # ---- doing it --------------------------------------------------------------------------------------------------
    def work(self) -> None:
        """Run everything that is pending."""
        self._settle_stored()
        stage = self.options.only_stage
        if stage:
            self.pending = {k for k in self.pending if _ORDER[self.plan.tasks[k].kind] <= _ORDER[stage]}
        self._close_gates()
        if not self.pending:
            return
        self._preflight()
        budget = self.plan.suite.budget
        progress = Progress(len(self.pending), self.options.quiet)
        pool = Pool(self.options.store, self.options.devices, budget["threads"], int(budget["memory_gb"] * 2**30))
        try:
            while self.pending or self.running:
                self._fill(pool)
                if not self.running:
                    self._stuck()
                    break
                for task, answer in pool.wait(0.2):
                    self._answered(task, answer, progress)
                progress.show(pool.slots, self.names)
                if self.options.fail_fast and self.failed:
                    progress.say("stopped at the first failure, as --fail-fast asks")
                    break
        finally:
            progress.clear()
            pool.close()

    def _fill(self, pool: Pool) -> None:
        for key in self.ready():
            slot = pool.free()
            if slot is None:
                return
            task = self.plan.tasks[key]
            self.pending.remove(key)
            self.running.add(key)
            pool.submit(slot, task, self.values(task), self.options.out / "logs" / f"{key}.log")

    def _stuck(self) -> None:
        """Nothing runs and nothing can: what is left waits for a gate that cannot be decided."""
        for key in sorted(self.pending, key=self.index.__getitem__):
            self.fail(key, "not_run", "input_failed: what this task waits for did not finish")
        self.pending.clear()

    def _settle_stored(self) -> None:
        """Rows of evaluations whose artifact is in the store already."""
        for key in [k for k in self.pending if self.plan.tasks[k].kind == "evaluate" and self.store.has(k)]:
            try:
                if key in self.cells_of:
                    self._settle(key)
                self.pending.discard(key)
            except Damaged:
                self.pending.discard(key)
                self.require(key)

    def _answered(self, task: Task, answer: dict[str, Any], progress: Progress) -> None:
        key, status = task.key, answer["status"]
        self.running.discard(key)
        if status == "ok":
            self.computed += 1
            progress.done += 1
            if task.kind == "evaluate" and key in self.cells_of:
                try:
                    self._settle(key)
                except Damaged:
                    self.require(key)
        elif status == "damaged":
            progress.say(f"{answer['reason']}: computing it again")
            self.require(answer["key"])
            self.pending.add(key)
            progress.total += 1
        elif status == "no_space":
            raise BadInput(
                f"cannot write the store {self.options.store}: {answer['reason']}; free space or give another --store"
            )
        elif status == "lost" and self.attempts.get(key, 0) + 1 < ATTEMPTS:
            self.attempts[key] = self.attempts.get(key, 0) + 1
            progress.say(f"{answer['reason']} during {self.names[key]}: trying it again")
            self.pending.add(key)
        else:
            status = "failed" if status == "lost" else status
            if status != "not_applicable":
                progress.say(f"{status}: {self.names[key]}: {answer['reason']}")
            dropped = self.fail(key, status, answer["reason"])
            progress.done += 1 + dropped
        self._journal(task, answer)
        self._close_gates(progress)

    def _journal(self, task: Task, answer: dict[str, Any]) -> None:
        line = {
            "key": task.key,
            "kind": task.kind,
            "plugin": task.name,
            "name": self.names[task.key],
            "status": answer["status"],
        }
        line |= {"reason": answer["reason"], "result": answer.get("result"), "time": time.time()}
        with (self.options.out / "tasks.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")

    def fail(self, key: str, status: str, reason: str) -> int:
        """Record that a task has no artifact, and say so on every row that would have needed it."""
        self.failed[key] = (status, reason)
        self.pending.discard(key)
        dropped = 0
        if key in self.cells_of:
            self._settle_missing(self.cells_of[key], status, reason)
        for user in self.plan.users.get(key, ()):
            if user in self.failed or user in self.settled:
                continue
            if user not in self.pending:
                continue
            own = [r for r, k in self.plan.tasks[user].inputs.items() if k == key]
            chain = any(r in ("attack", "defense", "inner", "oracle", "answer") for r in own)
            what = f"{self.plan.tasks[key].kind} {self.names[key]}: {reason}"
            dropped += 1 + (
                self.fail(user, status, reason) if chain else self.fail(user, "not_run", f"input_failed: {what}")
            )
        return dropped

    def _close_gates(self, progress: Progress | None = None) -> None:
        """Drop what waits for an attack that did not implant."""
        if self.options.keep_unimplanted:
            return
        for group in self.gate.closed():
            waiting = [k for k in self.pending if self.plan.gates.get(k) == group]
            for key in waiting:
                if key in self.pending:
                    self.fail(key, "not_run", f"attack_did_not_implant: {self.gate.why(group)}")
            if progress and waiting:
                progress.say(f"{group} did not implant ({self.gate.why(group)}): its defenses are not run")
                progress.done += len(waiting)

    def values(self, task: Task) -> dict[str, str]:
        """Entry-point values that the worker of a task needs: its plugin's, and that of a live attack."""
        kind = {"evaluate": "evaluator", "answer": "defense"}.get(task.kind, task.kind)
        wrapper, inner = Registry.split_wrapper(task.name)
        plugin = self.registry.get(kind, wrapper or inner)  # type: ignore[arg-type]
        values = {task.name: plugin.value}
        if task.kind == "defense":
            values["requires"] = " ".join(sorted(plugin.blueprint.requires))
        for role in ("attack", "oracle"):
            live = task.params.get("access", {}).get("oracle") or task.params.get("needs", {}).get("trigger") == "live"
            if role in task.inputs and live:
                name = self.plan.tasks[task.inputs[role]].name
                values[name] = self.registry.get("attack", name).value
        return values

    def _preflight(self) -> None:
        """Import every plugin of the run and try its parameters before anything is trained."""
        fits = [[list(d.shape), d.classes] for d in self.plan.datasets.values()]
        seen: dict[str, dict[str, Any]] = {}
        specs: dict[str, Any] = {}
        for key in self.pending:
            task = self.plan.tasks[key]
            kind = {"evaluate": "evaluator", "answer": "defense"}.get(task.kind, task.kind)
            entry = {
                "kind": kind,
                "id": task.name,
                "params": task.params["method"],
            }
            seen[json.dumps(entry, sort_keys=True)] = entry | {"fits": fits}
            if "spec" in task.params:
                specs[json.dumps(task.params["spec"], sort_keys=True)] = task.params["spec"]
        request = {"plugins": [seen[k] for k in sorted(seen)], "specs": [specs[k] for k in sorted(specs)]}
        answer = subprocess.run(
            [sys.executable, "-m", "sleeperbench.engine.preflight"],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        if answer.returncode:
            raise BrokenPlugin("a plugin ended the process that imported it; its output stands above")
        problems = json.loads(answer.stdout)
        if problems:
            error: type[SleeperBenchError] = BrokenPlugin if any(p["code"] == 3 for p in problems) else BadInput
            raise error("; ".join(p["message"] for p in problems))

    # ---- rows ------------------------------------------------------------------------------------------------------
    def facts(self, cell: Cell, evaluator: str) -> dict[str, Any]:
        """What every row of a cell carries beside its figure."""
        plugin = self.registry.get("evaluator", evaluator)
        flags = set()
        rate = None
        if self.store.has(cell.attack_key):
            rate = self.store.manifest(cell.attack_key)["result"]["rate_actual"]
        if not self.registry.get("attack", self.plan.tasks[cell.attack_key].name).blueprint.snapshot:
            flags.add("snapshot")
        if any(self._reduced(key) for key in (cell.attack_key, cell.defense_key) if key in self.plan.tasks):
            flags.add("reduced")
        facts = {"rate_actual": rate, "flag": ";".join(sorted(flags))}
        facts |= {"dist": plugin.dist, "dist_version": plugin.dist_version, "defense_version": None}
        if cell.defense_key in self.plan.tasks:
            facts["defense_version"] = self.plan.tasks[cell.defense_key].version
        return facts

    def _reduced(self, key: str) -> bool:
        """Whether a method runs on less than its published effort: below the default of what INFO calls `effort`."""
        task = self.plan.tasks[key]
        wrapper, inner = Registry.split_wrapper(task.name)
        b = self.registry.get("attack" if task.kind == "attack" else "defense", wrapper or inner).blueprint
        return any(task.params["method"][n] < b.fields[n].default for n in b.info.get("effort", ()))

    def _settle(self, key: str) -> None:
        folder = self.store.fetch(key)
        manifest = self.store.manifest(key)
        findings = json.loads((folder / "findings.json").read_bytes())
        found: list[dict[str, Any]] = []
        for cell, e in self.cells_of[key]:
            found += rows.measured(cell, e, findings, manifest, self.facts(cell, e.evaluator))
        self._keep(key, found)

    def _settle_missing(self, uses: Iterable[tuple[Cell, Evaluation]], status: str, reason: str) -> None:
        by_key: dict[str, list[dict[str, Any]]] = {}
        for cell, e in uses:
            metrics = [m.name for m in self.registry.get("evaluator", e.evaluator).blueprint.metrics]
            made = rows.missing(cell, e, metrics, status, reason, self.facts(cell, e.evaluator))
            by_key.setdefault(made[0]["task_key"], []).extend(made)
        for key, made in by_key.items():
            self._keep(key, made)

    def _keep(self, key: str, found: list[dict[str, Any]]) -> None:
        self.settled[key] = found
        rows.save(self.options.out, key, found)
        self.gate.learn(found)


def execute(plan: Plan, registry: Registry, options: Options, text: str) -> int:
    """Run a plan into `options.out`; returns the exit code.

    Raises:
        BadInput: the folder is locked or cannot be written, or parameters do not fit.
        BrokenPlugin: a plugin that the run needs cannot be imported.
    """
    with locked(options.out):
        code = 0
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
        counts = finish.finish(run, code)
        if code == 130:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        return 1 if counts["failed"] else 0
