"""Which missing task is next: counts unmet inputs, knows the gates, puts the longest way to the end first."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping

from sleeperbench.engine.costs import Costs
from sleeperbench.engine.graph import Plan

JOB_SECONDS = 1.0
JOB_TASKS = 16
"""Short evaluators of one model go to a worker together: up to so many seconds, as learnt, and so many tasks."""
POSTPONED = 1.0
"""Seconds until a task that another run is computing is looked at again."""
RERANK = 10.0


class Queue:
    """The tasks that are missing.

    Args:
        plan: The graph.
        has: Whether a task's artifact is there.
        is_open: Whether a gate is open.
        deciders: Attack group -> the tasks that decide its gate; what waits behind the gate makes them urgent.
        costs: What tasks cost.
    """

    def __init__(
        self,
        plan: Plan,
        has: Callable[[str], bool],
        is_open: Callable[[str], bool],
        deciders: Mapping[str, Iterable[str]],
        costs: Costs,
    ) -> None:
        self.plan, self.has, self.is_open, self.deciders, self.costs = plan, has, is_open, deciders, costs
        self.pending: set[str] = set()
        self.later: dict[str, float] = {}
        """Pending task -> when to look at it again."""
        self.seconds: dict[str, float] = {}
        self.ahead = 0.0
        """Seconds that the pending tasks are expected to take."""
        self._unmet: dict[str, int] = {}
        self._rank: dict[str, float] = {}
        self._ready: list[tuple[float, int, str]] = []
        self._waiting: dict[str, list[str]] = {}
        self._mates: dict[tuple[str, str], set[str]] = {}
        self._index: dict[str, int] = {}
        self._ranked = 0.0

    def want(self, key: str) -> None:
        """Put a task, and everything it needs that is missing, on the list."""
        todo = [key]
        while todo:
            k = todo.pop()
            if k in self.pending or k not in self.plan.tasks:
                continue
            self.pending.add(k)
            missing = [i for i in self.plan.inputs(k) if not self.has(i)]
            self._unmet[k] = len(missing)
            if self._index:  # ranked already: a late one
                self.seconds.setdefault(k, self.costs.guess(self.plan, self.plan.tasks[k]))
                self.ahead += self.seconds[k]
                self._offer(k)
            todo += missing

    def rank(self) -> None:
        """Judge anew how urgent each task is: its seconds and those of the longest way behind it."""
        tasks = self.plan.tasks
        self._index = {k: i for i, k in enumerate(tasks)}
        self.seconds = {k: self.costs.guess(self.plan, tasks[k]) for k in self.pending}
        order = sorted(self.pending, key=self._index.__getitem__, reverse=True)
        floor: dict[str, float] = {}
        self._rank = {}
        for _ in range(2):  # the second time with what waits behind gates, which is no input
            for k in order:
                behind = max((self._rank.get(u, 0.0) for u in self.plan.users.get(k, ())), default=0.0)
                self._rank[k] = self.seconds[k] + max(behind, floor.get(k, 0.0))
            behind_gate: dict[str, float] = {}
            for k in order:
                if (group := self.plan.gates.get(k)) is not None:
                    behind_gate[group] = max(behind_gate.get(group, 0.0), self._rank[k])
            for group, urgent in behind_gate.items():
                for k in self.deciders.get(group, ()):
                    floor[k] = max(floor.get(k, 0.0), urgent)
        self.ahead = sum(self.seconds.values())
        self._ready, self._waiting, self._mates = [], {}, {}
        for k in order:
            self._offer(k)
        self._ranked = time.monotonic()
        self.costs.fresh = False

    def _offer(self, key: str) -> None:
        """Make a pending task startable if nothing holds it."""
        if self._unmet[key] or key in self.later:
            return
        group = self.plan.gates.get(key, "")
        if group and not self.is_open(group):
            self._waiting.setdefault(group, []).append(key)
            return
        heapq.heappush(self._ready, (-self._rank.get(key, self.seconds[key]), self._index.get(key, 0), key))
        if (model := self._model(key)) and self.seconds[key] <= JOB_SECONDS and self._cheap(key):
            self._mates.setdefault(model, set()).add(key)

    def _model(self, key: str) -> tuple[str, str] | None:
        inputs = self.plan.tasks[key].inputs
        return (inputs["attack"], inputs["defense"]) if "attack" in inputs and "defense" in inputs else None

    def _cheap(self, key: str) -> bool:
        task = self.plan.tasks[key]
        return task.kind == "evaluate" and self.costs.known(self.plan, task) is not None

    def pop(self) -> list[str]:
        """The next job: the most urgent startable task, and short evaluators of the same model; empty for none."""
        if self.costs.fresh and time.monotonic() - self._ranked > RERANK:
            self.rank()
        while self._ready:
            _, _, key = heapq.heappop(self._ready)
            if key not in self.pending or self._unmet[key] or key in self.later:
                continue
            job = [key]
            mates = self._mates.get(self._model(key) or ("", ""), set())
            if key in mates:
                room = JOB_SECONDS - self.seconds[key]
                for k in sorted(mates - {key}, key=self._index.__getitem__):
                    if len(job) < JOB_TASKS and self.seconds[k] <= room and k in self.pending and not self._unmet[k]:
                        job.append(k)
                        room -= self.seconds[k]
            for k in job:
                self.drop(k)
            return job
        return []

    def drop(self, key: str) -> None:
        """Take a task off the list, because it runs or never will."""
        if key in self.pending:
            self.pending.discard(key)
            self.later.pop(key, None)
            self.ahead -= self.seconds.get(key, 0.0)
            if (model := self._model(key)) in self._mates:
                self._mates[model].discard(key)  # type: ignore[index]

    def done(self, key: str) -> None:
        """An artifact is there now: what waits for it may start."""
        for user in self.plan.users.get(key, ()):
            if user in self.pending:
                self._unmet[user] -= 1
                self._offer(user)

    def gone(self, key: str) -> None:
        """An artifact is damaged: compute it again before what needs it."""
        for user in self.plan.users.get(key, ()):
            if user in self.pending:
                self._unmet[user] = sum(not self.has(i) for i in self.plan.inputs(user))
        self.want(key)

    def opened(self, group: str) -> None:
        """A gate is open: what waits behind it may start."""
        for key in self._waiting.pop(group, ()):
            if key in self.pending:
                self._offer(key)

    def behind(self, group: str) -> list[str]:
        """Pending tasks behind a gate."""
        return sorted(k for k in self.pending if self.plan.gates.get(k) == group)

    def postpone(self, key: str) -> None:
        """Look at a task again in a while, because another run is computing it."""
        self.later[key] = time.monotonic() + POSTPONED
        self.want(key)

    def due(self) -> list[str]:
        """Postponed tasks whose time has come; the caller looks whether they are there, else they are startable."""
        now = time.monotonic()
        keys = [k for k, when in self.later.items() if when <= now]
        for k in keys:
            del self.later[k]
            if not self.has(k):
                self._offer(k)
        return keys
