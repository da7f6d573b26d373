"""The graph that a suite becomes: data sets, tasks, cells, and zoos over cells. Pure data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sleeperbench.contracts.access import Needs
from sleeperbench.engine.suite import Suite
from sleeperbench.engine.task import Task


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the planner knows of a data set after it has been prepared."""

    name: str
    shape: tuple[int, int, int]
    classes: int
    norm: tuple[tuple[float, ...], tuple[float, ...]]
    pad: int
    flip: bool
    rows: Mapping[str, int]
    digests: Mapping[str, str]
    canonical: bool
    note: str = ""


@dataclass(kw_only=True)
class Evaluation:
    """One evaluator on one cell: a task, or the reason why there is none."""

    evaluator: str
    needs: Needs
    key: str = ""
    reason: str = ""


@dataclass(kw_only=True)
class Cell:
    """One line of the board: data set x architecture x attack x defense x seed."""

    identity: dict[str, Any]
    attack_key: str
    defense_key: str
    attack_group: str
    clean_cell: str
    is_control: bool
    evaluations: list[Evaluation] = field(default_factory=list)
    blocked: str = ""

    @property
    def name(self) -> str:
        """The cell's name, `dataset/arch/attack@rate/defense/s<seed>`."""
        return str(self.identity["cell"])


@dataclass(kw_only=True)
class Zoo:
    """One evaluator of scope `zoo`: once per data set, architecture and defense, over the cells of all attacks.

    Which cells have an outcome is known only after the gates, so its task is made from those that do, by `task`.

    Args:
        line: Stands for the zoo where rows need a cell; its name is `dataset/arch/zoo/defense/s<first seed>`.
        evaluation: The evaluator; `key` is that of the task, once made.
        members: Per cell its defense's task, and what the evaluator is told of it.
        shell: The task without members.
    """

    line: Cell
    evaluation: Evaluation
    members: list[tuple[str, dict[str, Any]]]
    shell: Task

    def task(self, without: Collection[str] = ()) -> Task | None:
        """The task over the members whose defense is not in `without`; None when there is none."""
        left = [(key, about) for key, about in self.members if key not in without]
        if not left:
            return None
        return replace(
            self.shell,
            params=self.shell.params | {"cells": [about for _, about in left]},
            inputs={**self.shell.inputs, **{f"zoo.{i}": key for i, (key, _) in enumerate(left)}},
        )


@dataclass(kw_only=True)
class Plan:
    """The whole graph. `tasks` is in an order in which every input precedes its users."""

    suite: Suite
    datasets: dict[str, Dataset]
    tasks: dict[str, Task] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    users: dict[str, list[str]] = field(default_factory=dict)
    zoos: list[Zoo] = field(default_factory=list)
    gates: dict[str, str] = field(default_factory=dict)
    """Task key -> attack group whose gate must open before it may run."""

    def inputs(self, key: str) -> tuple[str, ...]:
        """Keys of the artifacts that a task reads."""
        return tuple(dict.fromkeys(self.tasks[key].inputs.values()))

    def add(self, task: Task) -> bool:
        """Put a task into the graph; False when it was there."""
        if task.key in self.tasks:
            return False
        self.tasks[task.key] = task
        for key in self.inputs(task.key):
            self.users.setdefault(key, []).append(task.key)
        return True

    def closure(self, keys: Iterable[str]) -> set[str]:
        """These tasks and all that they need."""
        needed: set[str] = set()
        todo = list(keys)
        while todo:
            key = todo.pop()
            if key not in needed:
                needed.add(key)
                todo += self.inputs(key)
        return needed

    def keep(self, cells: list[Cell], zoos: list[Zoo]) -> None:
        """Reduce the graph to these cells and zoos, and the tasks that they need."""
        keys = {k for c in cells for k in (c.attack_key, c.defense_key, *(e.key for e in c.evaluations))}
        needed = self.closure((keys | {k for z in zoos for k, _ in z.members}) - {""})
        self.cells, self.zoos = cells, zoos
        self.tasks = {k: t for k, t in self.tasks.items() if k in needed}
        self.users = {k: [u for u in us if u in needed] for k, us in self.users.items() if k in needed}
        self.gates = {k: g for k, g in self.gates.items() if k in needed}
