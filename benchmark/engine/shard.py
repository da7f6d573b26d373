"""A part of a plan for one of several machines; `merge` puts the runs together."""

from __future__ import annotations

import re
from dataclasses import replace

from sleeperbench.engine.gate import deciding
from sleeperbench.engine.graph import Cell, Plan
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.task import digest
from sleeperbench.errors import BadInput


def parse(text: str) -> tuple[int, int]:
    """`2/5` as (2, 5).

    Raises:
        BadInput: it is not that, or the first number is not in 1 to the second.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = (int(g) for g in found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise BadInput(f"--shard {text}: write i/n with i from 1 to n, such as --shard 1/4")
    return i, n


def shard(plan: Plan, registry: Registry, i: int, n: int) -> None:
    """Keep the cells of one shard, and what their gates are decided by.

    Cells are dealt by a digest of their attack (data set, architecture, attack, rate), so that one shard has all seeds
    that its gate needs and no attacked model is trained twice. Of clean cells that belong to another shard only those
    evaluations stay that decide gates. A zoo needs all cells: it is left to a run without shards.
    """
    if n == 1:
        return
    own = {c.name for c in plan.cells if int(digest(["shard", _group(c)])[:15], 16) % n == i - 1}
    clean = {c.clean_cell for c in plan.cells if c.name in own and c.attack_group}
    kept = []
    for cell in plan.cells:
        if cell.name in own:
            kept.append(cell)
        elif cell.name in clean:
            kept.append(replace(cell, evaluations=[e for e in cell.evaluations if deciding(e.evaluator, registry)]))
    plan.keep(kept, [])


def _group(cell: Cell) -> str:
    return "/".join(cell.name.split("/")[:-2])
