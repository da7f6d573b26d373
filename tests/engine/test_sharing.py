"""Work is shared: what is trained once serves every cell, on one machine and over shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import shorts
from warm import Nursery

from sleeperbench.engine.graph import Plan
from sleeperbench.engine.shard import parse, shard
from sleeperbench.errors import BadInput

ATTACKS = ["badnets", "blended"]


def trainings(plan: Plan) -> int:
    return sum(t.kind == "attack" for t in plan.tasks.values())


@pytest.mark.parametrize("attacks", [1, 2, 4, 8])
@pytest.mark.parametrize("defenses", [1, 2, 4, 8])
def test_trainings_and_tasks_in_closed_form(make_plan: Any, attacks: int, defenses: int) -> None:
    """As docs/engine-scheduling.md says: rates stand for attacks, step counts for defenses."""
    rates = [0.01 * (i + 1) for i in range(attacks)]
    tail = f"[defense.ft]\nsteps = {list(range(1, defenses + 1))}\n"
    plan = make_plan(rates=rates, defenses=["none", "ft"], tail=tail)
    models = attacks + 1  # and the clean one
    assert trainings(plan) == models
    assert len(plan.tasks) == models * (1 + 2 * (1 + defenses))
    assert len({c.attack_key for c in plan.cells}) == models
    assert len(plan.cells) == models * (1 + defenses)


def test_each_shard_trains_its_own(make_plan: Any, registry: Any) -> None:
    matrix: dict[str, Any] = {"attacks": ["none", *ATTACKS], "rates": [0.01, 0.05, 0.1], "seeds": [0, 1]}
    whole = make_plan(**matrix)
    counts: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    for i in (1, 2, 3):
        part = make_plan(**matrix)
        shard(part, registry, i, 3)
        counts.update(k for k, t in part.tasks.items() if t.kind == "attack" and t.name != "none")
        full = {c.name: len(c.evaluations) for c in whole.cells}
        cells.update(c.name for c in part.cells if len(c.evaluations) == full[c.name])
        for group in {c.attack_group for c in part.cells} - {""}:
            assert {c.identity["seed"] for c in part.cells if c.attack_group == group} == {0, 1}
            clean = {c.clean_cell for c in part.cells if c.attack_group == group}
            assert clean <= {c.name for c in part.cells}, "its gate could not be decided"
    assert set(counts) == {k for k, t in whole.tasks.items() if t.kind == "attack" and t.name != "none"}
    assert set(counts.values()) == {1}
    assert set(cells) == {c.name for c in whole.cells}
    assert all(n == 1 for name, n in cells.items() if "/none@0/" not in name)


def test_one_shard_is_the_whole(make_plan: Any, registry: Any) -> None:
    whole, part = make_plan(), make_plan()
    shard(part, registry, *parse("1/1"))
    assert list(part.tasks) == list(whole.tasks)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_shards_are_numbers(text: str) -> None:
    with pytest.raises(BadInput, match="--shard"):
        parse(text)


def test_merged_shards_are_the_whole_run(clean_env: Mapping[str, str], nursery: Nursery, tmp_path: Path) -> None:
    """The suite smoke, with a second attack, so that both shards have cells; each shard has a store of its own."""
    small = ["--attack", "badnets", "--attack", "blended", "--set", "train.epochs=2", "--set", "defense.ft.steps=2"]
    small += ["--set", "gate.implant_asr=0.0", "--set", "gate.clean_drop_points=100"]

    def run(name: str, *more: str) -> Path:
        out = tmp_path / name / "out"
        done = nursery.run(shorts.command(Path("smoke"), out, *small, *more), clean_env)
        assert done.code == 0, done.err
        return out

    whole = run("whole")
    shards = [run(f"shard{i}", "--shard", f"{i}/2") for i in (1, 2)]
    assert all(len(shorts.tables(s)[1]) < len(shorts.tables(whole)[1]) for s in shards)
    argv = [*shorts.command(Path("x"), tmp_path)[:3], "merge", *map(str, shards), "--out", str(tmp_path / "all")]
    assert nursery.run(argv, clean_env).code == 0
    assert shorts.tables(tmp_path / "all") == shorts.tables(whole)
