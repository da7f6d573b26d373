"""What an evaluator is handed: the parts of a cell or zoo that it declared, opened when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeperbench.contracts.context import Cost, Ctx, Recipe
from sleeperbench.contracts.defense import Outcome
from sleeperbench.contracts.evaluator import Findings, Peer
from sleeperbench.engine import artifacts
from sleeperbench.engine.cases import EVAL_PARTS, Declared
from sleeperbench.engine.outcomes import Failed
from sleeperbench.engine.store import Store
from sleeperbench.engine.task import Task

if TYPE_CHECKING:
    from sleeperbench.engine.work import Work


def opened(work: Work, task: Task, values: Mapping[str, str], scratch: Path, cost: Cost) -> Any:
    """What the evaluator declared, opened when asked for."""
    p, inputs, needs = task.params, task.inputs, task.params["needs"]
    rows = work.rows(p["data"])
    outcome = functools.cache(lambda: artifacts.read_outcome(work.store.fetch(inputs["defense"])))
    recipe = Recipe(**p["recipe"] | {"precision": task.numerics["precision"]})

    def part(prefix: str) -> dict[str, str]:
        return {r[len(prefix) :]: k for r, k in sorted(inputs.items()) if r.startswith(prefix)}

    def findings(prefix: str) -> dict[str, Findings]:
        return {n: artifacts.read_findings(work.store.fetch(k)) for n, k in part(prefix).items()}

    def peers(prefix: str) -> tuple[Peer, ...]:
        found = []
        for name, key in part(prefix).items():
            folder = work.store.fetch(key)
            # An attacked model, which surrogates may be, has no outcome.
            said = artifacts.read_outcome(folder) if (folder / "outcome.json").exists() else Outcome()
            found.append(Peer(name=name, net=work.net(key), outcome=said))
        return tuple(found)

    parts: dict[str, Callable[[], Any]] = {
        "spec": lambda: work.model(inputs["attack"]).spec,
        "test": lambda: rows.test,
        "probe": lambda: rows.probe,
        "recipe": lambda: recipe,
        "is_defended": lambda: p["defended"],
        "ctx": lambda: Ctx(
            seed=task.seed, recipe=recipe, scratch=scratch, device=work.device, cost=cost, progress=work.progress
        ),
        "controls": lambda: findings("control."),
        "evaluators": lambda: findings("evaluator."),
    }
    if needs["evaluators"]:
        parts["settings"] = lambda: p["settings"]
    if needs["scope"] == "zoo":
        clean = part("clean").values()
        keys = [inputs[f"zoo.{i}"] for i in range(len(p["cells"]))]
        own = ("test", "probe", "recipe", "ctx")
        parts = {name: parts[name] for name in own} | {"cells": lambda: Zoo(work.store, p["cells"], keys)}
        if clean:
            parts["clean_models"] = lambda: tuple(work.net(k) for k in clean)
        return Declared(f"NEEDS of {task.name}", parts, EVAL_PARTS)
    attack = work.store.fetch(inputs["attack"])
    if "model" in needs["outcome"]:
        if outcome().opaque:
            raise Failed("not_applicable", "opaque_model")
        parts["net"] = lambda: work.net(inputs["defense"])
    if needs["outcome"]:
        parts["outcome"] = outcome
    if needs["undefended"]:
        parts["attacked"] = lambda: work.net(inputs["attack"])
    if needs["twin"]:
        parts["twin"] = lambda: work.net(inputs["twin"]) if "twin" in inputs else None
    if needs.get("again"):
        parts["again"] = lambda: work.net(inputs["again"]) if "again" in inputs else None
    if needs.get("anew"):
        parts["anew"] = lambda: artifacts.read_outcome(work.store.fetch(inputs["anew"])) if "anew" in inputs else None
    if needs["lineage"]:
        parts["descends"] = lambda: p["descends"]
    if needs["clean_models"]:
        parts["clean_models"] = lambda: tuple(work.net(k) for k in part("clean").values())
    if needs["defended_clean"]:
        parts["defended_clean"] = lambda: work.net(inputs["defended_clean"])
    if "scores" in needs["outcome"]:
        answer = functools.cache(
            lambda: artifacts.read_tensors(work.store.fetch(inputs["answer"]) / "scores.safetensors")
        )
        parts["answers"] = lambda: answer()["scores"] if "answer" in inputs else None
        parts["beside"] = lambda: answer().get("beside") if "answer" in inputs else None
        parts["asked"] = lambda: answer()["triggered"] if "answer" in inputs else None
    if "cost" in needs["outcome"]:
        parts["spent"] = lambda: {p: Cost(**r["cost"]) for p, r in used(work.store, task).items()}
    if "inverted" in needs["outcome"]:
        parts["stamps"] = lambda: (
            artifacts.read_tensors(work.store.fetch(inputs["stamps"]) / "stamps.safetensors")
            if "stamps" in inputs
            else {}
        )
        parts["inner"] = lambda: (
            artifacts.read_outcome(work.store.fetch(inputs["wrapped"])) if "wrapped" in inputs else None
        )
    if part("peer."):
        parts["peers"] = lambda: peers("peer.")
    if needs["surrogates"] or p["method"].get("surrogates"):
        parts["surrogates"] = lambda: peers("surrogate.")
    if needs["trigger"] != "none":
        for name, data in (("bd_test", rows.test), ("bd_probe", rows.probe)):
            parts[name] = functools.partial(artifacts.read_rendered, attack / f"{name}.safetensors", data)
            decoy = name.replace("bd", "decoy")
            parts[decoy] = functools.partial(artifacts.read_rendered, attack / f"{decoy}.safetensors", data)
        parts["bd_train"] = lambda: artifacts.read_poisoned(attack, rows.train)
        for name in ("leak_test", "cover_test"):
            parts[name] = functools.partial(artifacts.read_rendered, attack / f"{name}.safetensors", rows.test)
    if needs["trigger"] == "live":
        parts["oracle"] = lambda: work.backdoor(inputs["attack"], values)
    return Declared(f"NEEDS of {task.name}", parts, EVAL_PARTS)


def used(store: Store, task: Task) -> dict[str, dict[str, Any]]:
    """What the tasks of the defense under `task` took, by phase."""
    inputs = task.inputs
    parts = {r: r for r in inputs if r.startswith(("prepare", "wrapped"))}
    roles = {"run": "defense"} | parts | {"score": "answer"}
    return {phase: store.manifest(inputs[r])["result"] for phase, r in roles.items() if r in inputs}


def together(used: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What several tasks took as if they were one: sums, and of memory the largest."""
    each = list(used.values())
    return {
        "cost": {name: sum(u["cost"][name] for u in each) for name in vars(Cost())},
        "seconds": sum(u["seconds"] for u in each),
        "cpu_seconds": sum(u["cpu_seconds"] for u in each),
        "peak_mb": max(u["peak_mb"] for u in each),
        "device": " ".join(sorted({u["device"] for u in each})),
    }


class Zoo(Sequence[dict[str, Any]]):
    """The cells of a zoo: what is told of each, and its outcome, which is read when asked for and not kept."""

    def __init__(self, store: Store, told: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
        self.store, self.told, self.keys = store, told, keys

    def __len__(self) -> int:
        return len(self.told)

    def __getitem__(self, i: Any) -> Any:
        return self.told[i] | {"outcome": artifacts.read_outcome(self.store.fetch(self.keys[i]))}
