"""From a suite to a graph of tasks, each shared by all cells that need it. Imports no plugin and no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sleeperbench import PROTOCOL
from sleeperbench.engine.graph import Cell, Dataset, Evaluation, Plan, Zoo
from sleeperbench.engine.known import Known, once
from sleeperbench.engine.registry import Kind, Registry
from sleeperbench.engine.suite import Suite, Variant
from sleeperbench.engine.task import Task, attack_seed, canonical, digest, target_class
from sleeperbench.errors import BadInput, nearest

__all__ = ["Cell", "Dataset", "Evaluation", "Plan", "Planner", "restrict"]

REFERENCE_REPLICAS = 100
"""Clean models that defenses get as references start here; replicas 0, 1, ... belong to the evaluators alone."""
ATTACK_REPLICAS = 200
"""Clean models that attacks get as surrogates start here."""
START_REPLICA = 300
"""The clean model that a suite with [train] inject = "finetune" tunes backdoors into."""


class Planner:
    """Builds a plan; one method per kind of task."""

    def __init__(self, suite: Suite, registry: Registry, datasets: dict[str, Dataset]) -> None:
        self.suite, self.registry, self.known = suite, registry, Known(registry)
        self.plan = Plan(suite=suite, datasets=datasets)
        self.memory: dict[Any, Any] = {}

    def add(self, task: Task, group: str = "") -> str:
        """Put a task into the graph; the same task twice is one task."""
        if self.plan.add(task):
            if group:
                self.plan.gates[task.key] = group
        elif self.plan.gates.get(task.key) != group:
            # Another attack needs it too, or none does: one closed gate must not take it from the others.
            self.plan.gates.pop(task.key, None)
        return task.key

    @once
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

    @once
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

    @once
    def recipe(self, ds: str) -> dict[str, Any]:
        """The training recipe, with the data set's augmentation unless the suite says otherwise."""
        d = self.plan.datasets[ds]
        return {"pad": d.pad, "flip": d.flip} | self.suite.recipe

    @once
    def numerics(self, precision: str = "fp32") -> dict[str, Any]:
        """Precision, threads and determinism of a task."""
        return {"precision": precision, "threads": self.suite.budget["threads"], "deterministic": True}

    @once
    def attack(self, ds: str, arch: str, v: Variant, rate: float, seed: int, replica: int = 0) -> str:
        """Task that trains an attacked model; attack `none` trains a clean one."""
        chain = self.registry.chain("attack", v.id)
        if len(chain) > 2:
            raise BadInput(f"attack `{v.id}`: one wrapper around one attack is possible; drop one")
        needs = [p.blueprint.needs for p in chain]
        surrogates = max(int(n.get("clean_models", 0)) if isinstance(n, Mapping) else 0 for n in needs)
        inputs = {f"clean{i}": self.clean(ds, arch, seed, ATTACK_REPLICAS + i) for i in range(surrogates)}
        further: dict[str, Any] = {"inner_version": int(chain[1].blueprint.info["version"])} if len(chain) > 1 else {}
        recipe = self.recipe(ds)
        if self.suite.injection and v.id != "none":
            inputs["start"] = self.clean(ds, arch, seed, START_REPLICA + replica)
            recipe = recipe | self.suite.injection
        if any(p.blueprint.info.get("covers") for p in chain):
            further["covers"] = True
        if self.known.snapshot(v.id) != "exact":
            further["snapshot"] = self.known.snapshot(v.id)
        if self.suite.append and v.id != "none":
            further["append"] = True
        secret, classes = self.suite.secret, self.plan.datasets[ds].classes
        return self.add(
            Task(
                kind="attack",
                name=v.id,
                version=self.known.version("attack", v.id),
                params={
                    "method": v.params,
                    "data": self.data(ds, seed),
                    "spec": self.arch(ds, arch),
                    "recipe": recipe,
                    "rate": rate,
                    "target": target_class(secret, v.id, seed, classes),
                    "replica": replica,
                    "curves": self.suite.curves and replica == 0,
                    **further,
                },
                seed=attack_seed(secret, v.id, seed),
                numerics=self.numerics(self.suite.recipe["precision"]),
                inputs=inputs,
                timeout=self.suite.budget["task_seconds"],
            )
        )

    @once
    def clean(self, ds: str, arch: str, seed: int, replica: int) -> str:
        """Task that trains an independent clean model: replica 0 is attack `none` itself."""
        return self.attack(ds, arch, self.default("attack", "none"), 0.0, seed, replica)

    @once
    def default(self, kind: Kind, plugin: str) -> Variant:
        """The suite's variant of a plugin that need not be in the matrix."""
        return self.suite.default(kind, plugin, self.registry)

    @once
    def defense(
        self,
        ds: str,
        arch: str,
        v: Variant,
        seed: int,
        attack: str,
        group: str,
        oracle: str | None = None,
        replica: int = 0,
    ) -> str:
        """Task that repairs or inspects the model of `attack`; an oracle is told the backdoor of `oracle`.

        Replica 1 is the same defense run again: nothing changes but its seed and, of a wrapper, the run that it wraps.
        """
        access = self.known.access(v.id)
        inputs = {"attack": attack}
        if access.oracle:
            inputs["oracle"] = oracle or attack
        first = 0 if access.oracle else REFERENCE_REPLICAS
        for i in range(access.references):
            inputs[f"reference{i}"] = self.clean(ds, arch, seed, first + i)
        if Registry.split_wrapper(v.id)[0]:
            inputs["inner"] = self.defense(ds, arch, self.known.inner(v), seed, attack, group, oracle, replica)
        task = Task(
            kind="defense",
            name=v.id,
            version=self.known.version("defense", v.id),
            params=self.defense_params(ds, arch, v, seed),
            seed=self.seed("defense", v.id, ds, seed),
            numerics=self.numerics(),
            inputs=inputs,
            role="view",
            timeout=self.suite.budget["task_seconds"],
        )
        if self.known.info("defense", Registry.split_wrapper(v.id)[0] or v.id).get("prepares"):
            prepared = self.add(task.preparation(), group)
            task = replace(task, inputs={**inputs, "prepared": prepared})
        if replica:
            task = replace(task, seed=self.seed("defense", v.id, ds, seed, replica))
        return self.add(task, group)

    @once
    def seed(self, kind: str, plugin: str, ds: str, seed: int, replica: int = 0) -> int:
        """Root of a defense's or an evaluator's randomness, apart from any attack's."""
        again = [replica] if replica else []
        return int(digest([kind, plugin, ds, seed, *again])[:15], 16)

    @once
    def defense_params(self, ds: str, arch: str, v: Variant, seed: int) -> dict[str, Any]:
        """What determines a defense's result beside its inputs: equal for all attacks."""
        return {
            "method": {k: value for k, value in v.params.items() if k != "inner" or ":" not in v.id},
            "access": asdict(self.known.access(v.id)),
            "data": self.data(ds, seed),
            "spec": self.arch(ds, arch),
            "recipe": self.recipe(ds),
        }

    @once
    def evaluate_params(self, ds: str, v: Variant, seed: int) -> dict[str, Any]:
        """What determines an evaluation beside its inputs."""
        needs = asdict(self.known.needs(v))
        del needs["draws_of"]  # the task's seed says it
        for late in ("again", "anew"):  # who doesn't ask for one keeps the key of the time before it could be asked for
            if not needs[late]:
                del needs[late]
        return {
            "method": v.params,
            "needs": needs,
            "data": self.data(ds, seed),
            "recipe": self.recipe(ds),
        }

    @once
    def evaluate(self, ds: str, arch: str, v: Variant, seed: int, at: _At) -> str:
        """Task that measures one evaluator on one cell, with everything it needs before it."""
        needs = self.known.needs(v)
        inputs = {"attack": at.attack, "defense": at.defense}
        for i in range(needs.clean_models):
            inputs[f"clean{i}"] = self.clean(ds, arch, seed, i)
        if needs.defended_clean:
            none = self.clean(ds, arch, seed, 0)
            inputs["defended_clean"] = self.defense(ds, arch, at.variant, seed, none, at.group, oracle=at.attack)
        if needs.again and at.group and at.variant.id != "none":
            inputs["again"] = self.defense(ds, arch, at.variant, seed, at.attack, at.group, replica=1)
        if needs.anew and self.known.unlearns(at.variant.id):
            # To the inverter the repaired model is a model like any other.
            inputs["anew"] = self.defense(ds, arch, self.known.inner(at.variant), seed, at.defense, at.group)
        further: dict[str, Any] = {"descends": self.known.descends(at.variant.id)} if needs.lineage else {}
        if needs.evaluators:
            further["settings"] = {other: self.default("evaluator", other).params for other in needs.evaluators}
        if needs.twin and at.group and at.variant.id == "none":
            inputs["twin"] = self.attack(ds, arch, at.attack_variant, at.rate, seed, replica=1)
        for control in needs.controls:
            if control != at.variant.id:
                inputs[f"control.{control}"] = self.evaluate(
                    ds, arch, v, seed, self.control(ds, arch, seed, at, control)
                )
        for other in needs.evaluators:
            inputs[f"evaluator.{other}"] = self.support(ds, arch, other, seed, at)
        if "scores" in needs.outcome and at.group and self.known.second_phase(at.variant.id, "scores"):
            inputs["answer"] = self.answer(ds, arch, seed, at)
        if "inverted" in needs.outcome and self.known.second_phase(at.variant.id, "stamps"):
            inputs["stamps"] = self.answer(ds, arch, seed, at, phase="stamp")
        if "inverted" in needs.outcome:
            inputs |= {r: k for r, k in self.parts(at.defense).items() if r == "wrapped"}
        if "cost" in needs.outcome:
            inputs |= self.parts(at.defense)
        for peer in (*needs.peers, *v.params.get("peers", ())):
            d = self.default("defense", peer)
            inputs[f"peer.{peer}"] = self.defense(ds, arch, d, seed, at.attack, at.group)
        # Without a trigger there is nothing to transfer, and surrogates cost a training each.
        for surrogate in (*needs.surrogates, *v.params.get("surrogates", ())) if at.group else ():
            inputs[f"surrogate.{surrogate}"] = self.surrogate(ds, surrogate, seed, at)
        # A calibration serves the defenses' cells alone, and trains: it waits for the gate as they do.
        own = not needs.calibration and (needs.scope == "attack" or at.variant.id == "none")
        return self.add(
            Task(
                kind="evaluate",
                name=v.id,
                version=self.known.version("evaluator", v.id),
                params=self.evaluate_params(ds, v, seed) | {"defended": at.variant.id != "none"} | further,
                seed=self.seed("evaluate", needs.draws_of or v.id, ds, seed),
                numerics=self.numerics(),
                inputs=inputs,
                timeout=self.suite.budget["task_seconds"],
            ),
            "" if own else at.group,
        )

    @once
    def parts(self, defense: str) -> dict[str, str]:
        """The tasks that a defense's task builds on: `prepare`, and of a wrapper `wrapped`, `wrapped_prepare`, ..."""
        found: dict[str, str] = {}
        prefix, depth = "", 1
        while inputs := self.plan.tasks[defense].inputs:
            if "prepared" in inputs:
                found[f"{prefix}prepare"] = inputs["prepared"]
            if "inner" not in inputs:
                break
            name = f"wrapped{depth if depth > 1 else ''}"
            found[name] = defense = inputs["inner"]
            prefix, depth = f"{name}_", depth + 1
        return found

    @once
    def surrogate(self, ds: str, name: str, seed: int, at: _At) -> str:
        """Task of a model of architecture `name` under the same attack; of DEFENSE@ARCHITECTURE, after that defense."""
        defense, _, arch = name.rpartition("@")
        attack = self.attack(ds, arch, at.attack_variant, at.rate, seed)
        if not defense:
            return attack
        if self.known.access(defense).train and self.known.snapshot(at.attack_variant.id) == "none":
            raise BadInput(
                f"surrogate `{name}`: attack `{at.attack_variant.id}` has no training set to give it; drop one of them"
            )
        return self.defense(ds, arch, self.default("defense", defense), seed, attack, at.group)

    @once
    def answer(self, ds: str, arch: str, seed: int, at: _At, phase: str = "score") -> str:
        """Task of a defense's second phase: scores for a mix that it has not seen, or images with what it recovered."""
        first = self.plan.tasks[at.defense]
        return self.add(
            Task(
                kind="answer",
                name=first.name,
                version=first.version,
                params=first.params | ({"phase": phase} if phase != "score" else {}),
                seed=first.seed,
                numerics=first.numerics,
                inputs={"attack": at.attack, "defense": at.defense, **first.inputs},
                role="view",
                timeout=first.timeout,
            ),
            at.group,
        )

    @once
    def support(self, ds: str, arch: str, evaluator: str, seed: int, at: _At) -> str:
        """Task of another evaluator that an evaluator reads; calibrated ones run on the suite's first seed."""
        v = self.default("evaluator", evaluator)
        needs = self.known.needs(v)
        if needs.calibration:
            seed = self.suite.calibration_seed
        if needs.scope == "attack":
            attack = self.attack(ds, arch, at.attack_variant, at.rate, seed)
            at = self.control(ds, arch, seed, replace(at, attack=attack), "none")
        return self.evaluate(ds, arch, v, seed, at)

    @once
    def control(self, ds: str, arch: str, seed: int, at: _At, control: str) -> _At:
        """The same attack's cell of a control defense."""
        v = self.default("defense", control)
        group = "" if control == "none" else at.group
        return replace(at, variant=v, defense=self.defense(ds, arch, v, seed, at.attack, group))

    def build(self) -> Plan:
        """All cells of the suite."""
        s = self.suite
        for ds in s.datasets:
            for arch in s.archs:
                for v in s.attacks:
                    for rate in (0.0,) if v.id == "none" else s.attack_rates.get(v.id, s.rates):
                        for seed in s.seeds:
                            self._attacked(ds, arch, v, rate, seed)
                self._zoos(ds, arch)
        return self.plan

    def _zoos(self, ds: str, arch: str) -> None:
        """Evaluators of scope `zoo`, over every cell of a defense on a data set and an architecture."""
        seed = self.suite.seeds[0]
        for e in self.suite.evaluators:
            needs = self.known.needs(e)
            if needs.scope != "zoo":
                continue
            by_defense: dict[str, list[Cell]] = {}
            for cell in self.plan.cells:
                if (cell.identity["dataset"], cell.identity["arch"]) == (ds, arch) and not cell.is_control:
                    by_defense.setdefault(cell.identity["defense"], []).append(cell)
            for label, cells in by_defense.items():
                name = f"{ds}/{arch}/zoo/{label}/s{seed}"
                blank = {"attack": "zoo", "attack_params": "{}", "rate": 0.0, "seed": seed, "cell": name}
                identity = cells[0].identity | blank
                shell = Task(
                    kind="evaluate",
                    name=e.id,
                    version=self.known.version("evaluator", e.id),
                    params=self.evaluate_params(ds, e, seed),
                    seed=self.seed("evaluate", e.id, ds, seed),
                    numerics=self.numerics(),
                    inputs={f"clean{i}": self.clean(ds, arch, seed, i) for i in range(needs.clean_models)},
                    timeout=self.suite.budget["task_seconds"],
                )
                line = Cell(
                    identity=identity,
                    attack_key="",
                    defense_key="",
                    attack_group="",
                    clean_cell="",
                    is_control=False,
                )
                evaluation = Evaluation(evaluator=e.id, needs=needs)
                members = [(c.defense_key, _told(c)) for c in cells if c.defense_key]
                self.plan.zoos.append(Zoo(line=line, evaluation=evaluation, members=members, shell=shell))

    @once
    def data_digest(self, ds: str) -> str:
        """What rows show of the data: a digest, with `!` when they differ from the release."""
        return digest(self.data(ds, 0) | {"cut": None})[:16] + ("" if self.plan.datasets[ds].canonical else "!")

    @once
    def shown(self, v: Variant) -> str:
        """Parameters as rows show them."""
        return canonical(v.params)

    def _attacked(self, ds: str, arch: str, v: Variant, rate: float, seed: int) -> None:
        s = self.suite
        head = f"{ds}/{arch}"
        group = "" if v.id == "none" else f"{head}/{v.label}@{rate:g}"
        attack = self.attack(ds, arch, v, rate, seed)
        defenses = list(s.defenses)
        if not any(d.id == "none" for d in defenses):
            defenses.insert(0, self.default("defense", "none"))
        for d in defenses:
            access = self.known.access(d.id)
            identity = {
                "suite": s.name,
                "protocol": str(PROTOCOL),
                "dataset": ds,
                "data_digest": self.data_digest(ds),
                "arch": arch,
                "attack": v.label,
                "attack_params": self.shown(v),
                "rate": rate,
                "rate_actual": None,
                "defense": d.label,
                "defense_params": self.shown(d),
                "clean_source": s.access["clean_source"],
                "access": self.known.track(d.id),
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
            if access.train and self.known.snapshot(v.id) == "none":
                cell.blocked = "not_applicable attack_controls_training"
            else:
                cell.defense_key = self.defense(ds, arch, d, seed, attack, own_group)
            at = _At(attack=attack, attack_variant=v, rate=rate, defense=cell.defense_key, variant=d, group=group)
            for e in s.evaluators:
                needs = self.known.needs(e)
                if needs.scope == "zoo" or (needs.scope == "attack" and d.id != "none"):
                    continue
                if needs.calibration and seed != s.calibration_seed:
                    continue
                evaluation = Evaluation(evaluator=e.id, needs=needs)
                cell.evaluations.append(evaluation)
                if needs.outcome == ("scores",) and not self.known.second_phase(d.id, "scores"):
                    evaluation.reason = "no_scores: the defense has no second phase"
                elif needs.outcome == ("scores",) and not group:
                    evaluation.reason = "no_trigger"
                elif self.known.info("evaluator", e.id)["kind"] == "reactivation" and self.known.keeps_model(d.id):
                    evaluation.reason = "model_unchanged: the defense repairs nothing"
                elif not cell.blocked:
                    evaluation.key = self.evaluate(ds, arch, e, seed, at)


def restrict(plan: Plan, glob: str) -> None:
    """Keep the cells whose name matches, and the tasks that they need.

    Raises:
        BadInput: no cell matches.
    """
    names = [c.name for c in plan.cells] + [z.line.name for z in plan.zoos]
    matching = {n for n in names if fnmatch.fnmatchcase(n, glob)}
    if not matching:
        raise BadInput(f"--only {glob} matches none of {len(names)} cells: {nearest(glob, names)}")
    # A gate is decided over all seeds, against clean models, so those undefended cells stay.
    groups = {c.attack_group for c in plan.cells if c.name in matching} - {""}
    needed_cells = matching | {c.clean_cell for c in plan.cells if c.name in matching or c.attack_group in groups}
    kept = [c for c in plan.cells if c.name in needed_cells or (c.is_control and c.attack_group in groups)]
    # A part of a zoo is another zoo, so one that is asked for keeps all its members.
    plan.keep(kept, [z for z in plan.zoos if z.line.name in matching])


def _told(cell: Cell) -> dict[str, Any]:
    """What an evaluator of scope `zoo` is told of a cell."""
    i = cell.identity
    return {"cell": i["cell"], "attack": i["attack"], "seed": i["seed"], "backdoored": bool(cell.attack_group)}


@dataclass(frozen=True, kw_only=True)
class _At:
    """Where an evaluation takes place: the attacked model and the defense's outcome."""

    attack: str
    attack_variant: Variant
    rate: float
    defense: str
    variant: Variant
    group: str
