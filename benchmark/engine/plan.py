"""From a suite to a graph of tasks, each shared by all cells that need it. Imports no plugin and no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sleeperbench import PROTOCOL
from sleeperbench.contracts.access import Access, Needs
from sleeperbench.engine.registry import Kind, Registry
from sleeperbench.engine.suite import Suite, Variant
from sleeperbench.engine.task import Task, attack_seed, canonical, digest, target_class
from sleeperbench.errors import BadInput, nearest

REFERENCE_REPLICAS = 100
"""Clean models that defenses get as references start here; replicas 0, 1, ... belong to the evaluators alone."""
ATTACK_REPLICAS = 200
"""Clean models that attacks get as surrogates start here."""


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
class Plan:
    """The whole graph. `tasks` is in an order in which every input precedes its users."""

    suite: Suite
    datasets: dict[str, Dataset]
    tasks: dict[str, Task] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    users: dict[str, list[str]] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)
    """Task key -> attack group whose gate must open before it may run."""

    def inputs(self, key: str) -> tuple[str, ...]:
        """Keys of the artifacts that a task reads."""
        return tuple(dict.fromkeys(self.tasks[key].inputs.values()))


class Planner:
    """Builds a plan; one method per kind of task."""

    def __init__(self, suite: Suite, registry: Registry, datasets: dict[str, Dataset]) -> None:
        self.suite, self.registry = suite, registry
        self.plan = Plan(suite=suite, datasets=datasets)

    def add(self, task: Task, group: str = "") -> str:
        """Put a task into the graph; the same task twice is one task."""
        if task.key not in self.plan.tasks:
            self.plan.tasks[task.key] = task
            for key in self.plan.inputs(task.key):
                self.plan.users.setdefault(key, []).append(task.key)
            if group:
                self.plan.gates[task.key] = group
        elif self.plan.gates.get(task.key) != group:
            # Another attack needs it too, or none does: one closed gate must not take it from the others.
            self.plan.gates.pop(task.key, None)
        return task.key

    def info(self, kind: Kind, plugin: str) -> dict[str, Any]:
        """INFO of a plugin; of the wrapped one for `version`s of both, see `version`."""
        return dict(self.registry.get(kind, plugin).blueprint.info)

    def version(self, kind: Kind, plugin: str) -> int:
        """A wrapper's result depends on its own version; the wrapped plugin's is in its own task."""
        wrapper, inner = Registry.split_wrapper(plugin)
        return int(self.info(kind, wrapper or inner)["version"])

    def data(self, ds: str, seed: int) -> dict[str, Any]:
        """Everything that determines the rows of a task: source digests, subset, cut."""
        d = self.plan.datasets[ds]
        rows = self.suite.dataset_rows.get(ds, {})
        for split, n in rows.items():
            if n > d.rows[split]:
                raise BadInput(f"[dataset.{ds}] {split} = {n}, but there are {d.rows[split]} rows; ask for fewer")
        return {
            "name": ds,
            "digests": dict(d.digests),
            "train": rows.get("train", 0),
            "test": rows.get("test", 0),
            "cut": {"seed": int(digest(["cut", ds, seed])[:15], 16), "clean": self.suite.access["clean"]},
            "clean_source": self.suite.access["clean_source"],
        }

    def arch(self, ds: str, arch: str) -> dict[str, Any]:
        """The ModelSpec of an architecture on a data set, as JSON."""
        d = self.plan.datasets[ds]
        args = self.suite.arch_args.get(arch, {})
        return {
            "arch": arch,
            "args": args,
            "classes": d.classes,
            "shape": list(d.shape),
            "norm": [list(d.norm[0]), list(d.norm[1])],
            "wraps": [],
        }

    def recipe(self, ds: str) -> dict[str, Any]:
        """The training recipe, with the data set's augmentation unless the suite says otherwise."""
        d = self.plan.datasets[ds]
        return {"pad": d.pad, "flip": d.flip} | self.suite.recipe

    def numerics(self, precision: str = "fp32") -> dict[str, Any]:
        """Precision, threads and determinism of a task."""
        return {"precision": precision, "threads": self.suite.budget["threads"], "deterministic": True}

    def attack(self, ds: str, arch: str, v: Variant, rate: float, seed: int, replica: int = 0) -> str:
        """Task that trains an attacked model; attack `none` trains a clean one."""
        inputs = {}
        needs = self.registry.get("attack", v.id).blueprint.needs or {}
        for i in range(int(needs.get("clean_models", 0)) if isinstance(needs, Mapping) else 0):
            inputs[f"clean{i}"] = self.clean(ds, arch, seed, ATTACK_REPLICAS + i)
        secret, classes = self.suite.secret, self.plan.datasets[ds].classes
        return self.add(
            Task(
                kind="attack",
                name=v.id,
                version=self.version("attack", v.id),
                params={
                    "method": v.params,
                    "data": self.data(ds, seed),
                    "spec": self.arch(ds, arch),
                    "recipe": self.recipe(ds),
                    "rate": rate,
                    "target": target_class(secret, v.id, seed, classes),
                    "replica": replica,
                    "curves": self.suite.curves and replica == 0,
                },
                seed=attack_seed(secret, v.id, seed),
                numerics=self.numerics(self.suite.recipe["precision"]),
                inputs=inputs,
                timeout=self.suite.budget["task_seconds"],
            )
        )

    def clean(self, ds: str, arch: str, seed: int, replica: int) -> str:
        """Task that trains an independent clean model: replica 0 is attack `none` itself."""
        return self.attack(ds, arch, self.suite.default("attack", "none", self.registry), 0.0, seed, replica)

    def access(self, plugin: str) -> Access:
        """What a defense declares; a wrapper adds its own to the wrapped one's, which runs in a task of its own."""
        wrapper, inner = Registry.split_wrapper(plugin)
        access = self.registry.get("defense", wrapper or inner).blueprint.access
        assert isinstance(access, Access)
        return access

    def track(self, plugin: str) -> str:
        """Access class shown on the board: of a wrapper, the wider of its own and the wrapped one's."""
        wrapper, inner = Registry.split_wrapper(plugin)
        if plugin == "none":
            return "none"
        tracks = [self.access(plugin).track()] + ([self.track(inner)] if wrapper else [])
        if "T4" in tracks:
            return "T4"
        return "T3" if {"T1", "T2"} <= set(tracks) else max(tracks)

    def defense(
        self, ds: str, arch: str, v: Variant, seed: int, attack: str, group: str, oracle: str | None = None
    ) -> str:
        """Task that repairs or inspects the model of `attack`; an oracle is told the backdoor of `oracle`."""
        access = self.access(v.id)
        wrapper, inner = Registry.split_wrapper(v.id)
        inputs = {"attack": attack}
        if access.oracle:
            inputs["oracle"] = oracle or attack
        first = 0 if access.oracle else REFERENCE_REPLICAS
        for i in range(access.references):
            inputs[f"reference{i}"] = self.clean(ds, arch, seed, first + i)
        params = dict(v.params)
        if wrapper:
            part = Variant(id=inner, label=inner, params=params.pop("inner"))
            inputs["inner"] = self.defense(ds, arch, part, seed, attack, group, oracle)
        return self.add(
            Task(
                kind="defense",
                name=v.id,
                version=self.version("defense", v.id),
                params={
                    "method": params,
                    "access": asdict(access),
                    "data": self.data(ds, seed),
                    "spec": self.arch(ds, arch),
                    "recipe": self.recipe(ds),
                },
                seed=int(digest(["defense", v.id, ds, seed])[:15], 16),
                numerics=self.numerics(),
                inputs=inputs,
                role="view",
                timeout=self.suite.budget["task_seconds"],
            ),
            group,
        )

    def evaluate(self, ds: str, arch: str, v: Variant, seed: int, at: _At) -> str:
        """Task that measures one evaluator on one cell, with everything it needs before it."""
        needs = self.needs(v)
        inputs = {"attack": at.attack, "defense": at.defense}
        for i in range(needs.clean_models):
            inputs[f"clean{i}"] = self.clean(ds, arch, seed, i)
        if needs.defended_clean:
            none = self.clean(ds, arch, seed, 0)
            inputs["defended_clean"] = self.defense(ds, arch, at.variant, seed, none, at.group, oracle=at.attack)
        for control in needs.controls:
            if control != at.variant.id:
                inputs[f"control.{control}"] = self.evaluate(
                    ds, arch, v, seed, self.control(ds, arch, seed, at, control)
                )
        for other in needs.evaluators:
            inputs[f"evaluator.{other}"] = self.support(ds, arch, other, seed, at)
        if "scores" in needs.outcome:
            inputs["answer"] = self.answer(ds, arch, seed, at)
        for peer in (*needs.peers, *v.params.get("peers", ())):
            d = self.suite.default("defense", peer, self.registry)
            inputs[f"peer.{peer}"] = self.defense(ds, arch, d, seed, at.attack, at.group)
        for surrogate in (*needs.surrogates, *v.params.get("surrogates", ())):
            inputs[f"surrogate.{surrogate}"] = self.attack(ds, surrogate, at.attack_variant, at.rate, seed)
        own = needs.scope == "attack" or at.variant.id == "none"
        return self.add(
            Task(
                kind="evaluate",
                name=v.id,
                version=self.version("evaluator", v.id),
                params={
                    "method": v.params,
                    "needs": asdict(needs),
                    "data": self.data(ds, seed),
                    "recipe": self.recipe(ds),
                    "defended": at.variant.id != "none",
                },
                seed=int(digest(["evaluate", v.id, ds, seed])[:15], 16),
                numerics=self.numerics(),
                inputs=inputs,
                timeout=self.suite.budget["task_seconds"],
            ),
            "" if own else at.group,
        )

    def answers(self, plugin: str) -> bool:
        """Whether a defense has a second phase: its INFO says `"scores": True`."""
        return bool(self.info("defense", plugin).get("scores")) if ":" not in plugin else False

    def answer(self, ds: str, arch: str, seed: int, at: _At) -> str:
        """Task of a defense's second phase: scores for a mix that it has not seen."""
        first = self.plan.tasks[at.defense]
        return self.add(
            Task(
                kind="answer",
                name=first.name,
                version=first.version,
                params=first.params,
                seed=first.seed,
                numerics=first.numerics,
                inputs={"attack": at.attack, "defense": at.defense, **first.inputs},
                role="view",
                timeout=first.timeout,
            ),
            at.group,
        )

    def needs(self, v: Variant) -> Needs:
        """What an evaluator declares."""
        needs = self.registry.get("evaluator", v.id).blueprint.needs
        assert isinstance(needs, Needs)
        return needs

    def support(self, ds: str, arch: str, evaluator: str, seed: int, at: _At) -> str:
        """Task of another evaluator that an evaluator reads; calibrated ones run on the suite's first seed."""
        v = self.suite.default("evaluator", evaluator, self.registry)
        needs = self.needs(v)
        if needs.calibration:
            seed = self.suite.calibration_seed
        if needs.scope == "attack":
            attack = self.attack(ds, arch, at.attack_variant, at.rate, seed)
            at = self.control(ds, arch, seed, _At(**(vars(at) | {"attack": attack})), "none")
        return self.evaluate(ds, arch, v, seed, at)

    def control(self, ds: str, arch: str, seed: int, at: _At, control: str) -> _At:
        """The same attack's cell of a control defense."""
        v = self.suite.default("defense", control, self.registry)
        group = "" if control == "none" else at.group
        return _At(**(vars(at) | {"variant": v, "defense": self.defense(ds, arch, v, seed, at.attack, group)}))

    def build(self) -> Plan:
        """All cells of the suite."""
        s = self.suite
        for ds in s.datasets:
            for arch in s.archs:
                for v in s.attacks:
                    for rate in (0.0,) if v.id == "none" else s.rates:
                        for seed in s.seeds:
                            self._attacked(ds, arch, v, rate, seed)
        return self.plan

    def _attacked(self, ds: str, arch: str, v: Variant, rate: float, seed: int) -> None:
        s = self.suite
        head = f"{ds}/{arch}"
        group = "" if v.id == "none" else f"{head}/{v.label}@{rate:g}"
        attack = self.attack(ds, arch, v, rate, seed)
        data = self.plan.datasets[ds]
        snapshot = self.registry.get("attack", v.id).blueprint.snapshot
        defenses = list(s.defenses)
        if not any(d.id == "none" for d in defenses):
            defenses.insert(0, s.default("defense", "none", self.registry))
        for d in defenses:
            access = self.access(d.id)
            identity = {
                "suite": s.name,
                "protocol": str(PROTOCOL),
                "dataset": ds,
                "data_digest": digest(self.data(ds, 0) | {"cut": None})[:16] + ("" if data.canonical else "!"),
                "arch": arch,
                "attack": v.label,
                "attack_params": canonical(v.params),
                "rate": rate,
                "rate_actual": None,
                "defense": d.label,
                "defense_params": canonical(d.params),
                "clean_source": s.access["clean_source"],
                "access": self.track(d.id),
                "seed": seed,
                "cell": f"{head}/{v.label}@{rate:g}/{d.label}/s{seed}",
            }
            cell = Cell(
                identity=identity,
                attack_key=attack,
                defense_key="",
                attack_group=group,
                clean_cell=f"{head}/none@0/none/s{seed}",
                is_control=d.id == "none",
            )
            self.plan.cells.append(cell)
            own_group = "" if d.id == "none" else group
            if access.train and not snapshot:
                cell.blocked = "not_applicable attack_controls_training"
            else:
                cell.defense_key = self.defense(ds, arch, d, seed, attack, own_group)
            at = _At(attack=attack, attack_variant=v, rate=rate, defense=cell.defense_key, variant=d, group=group)
            for e in s.evaluators:
                needs = self.needs(e)
                if needs.scope == "attack" and d.id != "none":
                    continue
                if needs.calibration and seed != s.calibration_seed:
                    continue
                evaluation = Evaluation(evaluator=e.id, needs=needs)
                cell.evaluations.append(evaluation)
                if "scores" in needs.outcome and not self.answers(d.id):
                    evaluation.reason = "no_scores: the defense has no second phase"
                elif not cell.blocked:
                    evaluation.key = self.evaluate(ds, arch, e, seed, at)


def restrict(plan: Plan, glob: str) -> None:
    """Keep the cells whose name matches, and the tasks that they need.

    Raises:
        BadInput: no cell matches.
    """
    names = [c.name for c in plan.cells]
    matching = {n for n in names if fnmatch.fnmatchcase(n, glob)}
    if not matching:
        raise BadInput(f"--only {glob} matches none of {len(names)} cells: {nearest(glob, names)}")
    # A gate is decided over all seeds, against clean models, so those undefended cells stay.
    groups = {c.attack_group for c in plan.cells if c.name in matching} - {""}
    needed_cells = matching | {c.clean_cell for c in plan.cells if c.name in matching or c.attack_group in groups}
    kept = [c for c in plan.cells if c.name in needed_cells or (c.is_control and c.attack_group in groups)]
    todo = [k for c in kept for k in (c.attack_key, c.defense_key, *(e.key for e in c.evaluations)) if k]
    needed: set[str] = set()
    while todo:
        key = todo.pop()
        if key not in needed:
            needed.add(key)
            todo += plan.inputs(key)
    plan.cells = kept
    plan.tasks = {k: t for k, t in plan.tasks.items() if k in needed}
    plan.users = {k: [u for u in us if u in needed] for k, us in plan.users.items() if k in needed}
    plan.gates = {k: g for k, g in plan.gates.items() if k in needed}


@dataclass(frozen=True, kw_only=True)
class _At:
    """Where an evaluation takes place: the attacked model and the defense's outcome."""

    attack: str
    attack_variant: Variant
    rate: float
    defense: str
    variant: Variant
    group: str
