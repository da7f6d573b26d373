"""Runs one task in a trusted worker: reads its inputs from the store, computes, commits the artifact."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sleeperbench.contracts.attack import Backdoor, PoisonedSet, Role
from sleeperbench.contracts.context import Cost, Ctx, Recipe, derive
from sleeperbench.contracts.defense import Outcome
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.contracts.models import Model, ModelSpec
from sleeperbench.data.images import ImageSet
from sleeperbench.engine import artifacts
from sleeperbench.engine.casefiles import Unusable, answer_bytes, check_answer, read_plain, remove
from sleeperbench.engine.evaluation import opened, together, used
from sleeperbench.engine.lease import Leases
from sleeperbench.engine.loading import load_attack, load_class, make_attack
from sleeperbench.engine.outcomes import Failed, checked
from sleeperbench.engine.questions import Desk, queried
from sleeperbench.engine.store import Store
from sleeperbench.engine.syntax import of_plugin
from sleeperbench.engine.task import Task
from sleeperbench.kit.classifier import Classifier, build, load, pack, read_model, save_model, traits

CHECK_ROWS = 1000
DECOY_ROWS = 2000
DECOY_TRIES = 5
DECOY_ASR = 0.10
STANDARD_CLEAN = 0.05
ASKED_ROWS = 1000
"""Clean and triggered test images each that an input detector is asked about."""
STATISTICS = 8
"""Most statistics that a detector may give beside a score."""
Fork = Callable[[Path, Path, float], dict[str, Any]]


class Leased(Exception):
    """Another living process computes this task."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A data set, subset and cut as a task's parameters say."""

    train: ImageSet
    eligible: torch.Tensor
    pool: ImageSet
    probe: ImageSet
    test: ImageSet
    source: ImageSet


@functools.lru_cache(maxsize=4)
def _rows(text: str) -> Rows:
    from sleeperbench.data.cut import cut
    from sleeperbench.data.load import load as load_data
    from sleeperbench.data.load import subset

    p = json.loads(text)
    splits = {}
    for split in ("train", "test"):
        data = load_data(p["name"], split)
        if data.digest != p["digests"][split]:
            raise Failed("failed", f"raised: data set {p['name']} changed since the run was planned")
        splits[split] = subset(data, p[split]) if p[split] else data
    source = splits["train"]
    c = cut(source.labels, seed=p["cut"]["seed"], clean=p["cut"]["clean"], classes=len(source.classes))
    held = p["clean_source"] == "heldout"
    # Source order: which rows are trained on is public, in which order they lie must not tell pool from rest.
    index = (c.rest if held else torch.cat([c.rest, c.pool])).sort().values
    eligible = torch.isin(index, c.rest)
    return Rows(
        train=source.rows(index),
        eligible=eligible,
        pool=source.rows(c.pool),
        probe=source.rows(c.probe),
        test=splits["test"],
        source=source,
    )


class Work:
    """What a worker keeps between tasks: store, device, opened data sets.

    Args:
        store: Where inputs come from and artifacts go.
        device: Device of trainings and evaluations.
        fork: Runs `child.main` on a folder in a forked process: (folder, log, seconds) -> its usage.
    """

    def __init__(self, store: Store, device: torch.device, fork: Fork) -> None:
        self.store, self.device, self.fork = store, device, fork
        self.leases = Leases(store.leases)
        self.progress: Callable[[int, int, str], None] = lambda done, total, what: None
        self.cases = Path(tempfile.gettempdir())
        self.memory = 0

    def run(self, task: Task, values: Mapping[str, str], log: Path) -> tuple[dict[str, Any], bool]:
        """Do the task unless its artifact is there; returns the manifest's `result` and whether it was computed now.

        Args:
            task: What to do.
            values: Plugin id -> entry-point value, for this task's plugin and the attack of its inputs.
            log: File that the forked child writes to.

        Raises:
            Failed: with status and reason for the rows.
            Damaged: an input is damaged and was set aside.
            Leased: another process computes it.
        """
        if self.store.has(task.key):
            return dict(self.store.manifest(task.key)["result"]), False
        with self.leases.hold(task.key) as held:
            if not held:
                raise Leased
            if self.store.has(task.key):  # committed between the look above and the lease
                return dict(self.store.manifest(task.key)["result"]), False
            return self._compute(task, values, log), True

    def _compute(self, task: Task, values: Mapping[str, str], log: Path) -> dict[str, Any]:
        start, cpu = time.time(), time.process_time()
        cost = Cost()
        with self.store.scratch() as out:
            extra = getattr(self, f"_{task.kind}")(task, values, out, cost, log)
            result = {
                "status": "ok",
                "cost": vars(cost),
                "seconds": time.time() - start,
                "cpu_seconds": time.process_time() - cpu + extra.pop("child_cpu", 0.0),
                "peak_mb": max(extra.pop("child_mb", 0.0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "started": start,
                "device": str(self.device),
                **extra,
            }
            return dict(
                self.store.commit(
                    task.key,
                    out,
                    task=task.to_json(),
                    env=environment() | {"source": of_plugin(values[task.name])},
                    result=result,
                )["result"]
            )

    def rows(self, data: Mapping[str, Any]) -> Rows:
        """The rows of a task."""
        return _rows(json.dumps(data, sort_keys=True))

    def model(self, key: str) -> Model:
        """The classifier of an attack artifact, or of a defense's; a defense that changed nothing has its attack's."""
        folder = self.store.fetch(key)
        if (folder / "model.json").exists():
            return read_model(folder)
        return self.model(self.store.manifest(key)["task"]["inputs"]["attack"])

    def net(self, key: str) -> Classifier:
        """The classifier of an artifact, in eval mode on the device."""
        return load(self.model(key), self.device)

    def backdoor(self, key: str, values: Mapping[str, str]) -> Backdoor:
        """The live backdoor of an attack artifact."""
        folder = self.store.fetch(key)
        if not (folder / "backdoor.json").exists():
            raise NotApplicable("no_trigger: an imported record has pictures only")
        return artifacts.read_backdoor(
            folder, load_attack(values[artifacts.read_json(folder / "backdoor.json")["attack"]])
        )

    # ---- attack ----------------------------------------------------------------------------------------------------
    def _attack(self, task: Task, values: Mapping[str, str], out: Path, cost: Cost, log: Path) -> dict[str, Any]:
        from sleeperbench.kit.covers import append
        from sleeperbench.kit.poison import render, rows_at
        from sleeperbench.kit.train import fit

        p = task.params
        rows = self.rows(p["data"])
        recipe = Recipe(**p["recipe"])
        with tempfile.TemporaryDirectory(prefix="attack-", dir=self.cases) as scratch:
            ctx = Ctx(
                seed=task.seed,
                target=p["target"],
                recipe=recipe,
                scratch=Path(scratch),
                device=self.device,
                cost=cost,
                progress=self.progress,
                clean_models=tuple(self.model(k) for r, k in sorted(task.inputs.items()) if r.startswith("clean")),
            )
            method, ctx.inner = make_attack(values[task.name], p["method"])
            try:
                rows_at(p["rate"], len(rows.train))
                for part in (method, *([ctx.inner] if ctx.inner is not None else [])):
                    part.check(rows.train.shape, len(rows.train.classes))
            except ValueError as e:
                raise Failed("not_applicable", f"does_not_fit: {e}") from e
            train_ctx = replace(ctx, seed=derive(task.seed, "train", p["replica"]))
            try:
                b = method.prepare(rows.train, ctx)
                poisoned = method.poison(rows.train, b, rows.eligible, p["rate"], ctx)
                hooks = method.hooks(rows.train, b, rows.eligible, p["rate"], train_ctx)
            except NotApplicable as e:
                raise Failed("not_applicable", str(e)) from e
            if p.get("append"):
                if hooks is not None or p.get("snapshot", "exact") != "exact":
                    raise Failed("not_applicable", "trained_by_hooks: they poison batches or know rows by place")
                poisoned = append(poisoned, rows.train)
            self._check_poisoned(poisoned, rows, attacks=bool(b.triggers))
            if "start" in task.inputs:
                net = self.net(task.inputs["start"])
            else:
                net = build(ModelSpec.from_json(p["spec"]), seed=train_ctx.derive("init")).to(self.device)
            seen = poisoned.data if p.get("snapshot", "exact") == "exact" else rows.train
            history = fit(net, seen, recipe, train_ctx, hooks=hooks, keep_epochs=p["curves"])
            aux = {
                f"aux.{n}.{k}": v for n, m in (hooks.aux if hooks else {}).items() for k, v in m.state_dict().items()
            }
            artifacts.write_backdoor(out, replace(b, tensors={**b.tensors, **aux}), task.name)
            # Re-read at once: what evaluators will restore is what is rendered here.
            b = artifacts.read_backdoor(out, load_attack(values[task.name]))
            save_model(pack(net), out)
            artifacts.write_set(out, poisoned)
            result: dict[str, Any] = {
                # Where training itself poisons, no row is marked beforehand.
                "rate_actual": poisoned.rate() or history.dirty,
                "loss": history.losses[-1] if history.losses else None,
            }
            if b.triggers:
                for name, data, role in (("bd_test", rows.test, Role.TEST), ("bd_probe", rows.probe, Role.TRAIN)):
                    r = render(data, b, role, ctx)
                    if r is None or not len(r):
                        raise Failed("failed", f"raised: no row of {name} counts for {task.name}'s trigger")
                    artifacts.write_rendered(out / f"{name}.safetensors", r)
                self._others(b, rows, p.get("covers", False), ctx, out)
                result |= self._decoy(method, b, net, rows, ctx, out)
            if p["curves"]:
                curve = self._curves(history.models, rows, out, cost)
                artifacts.write_json(out / "curves.json", curve)
        return result

    def _check_poisoned(self, p: PoisonedSet, rows: Rows, *, attacks: bool) -> None:
        """A poisoned row must have been eligible, and nothing else may differ from the source.

        Without a trigger there is no attack: clean models that are hard negatives are trained on rows made otherwise.
        """
        train, found = rows.train, p.data
        known = torch.isin(found.ids, train.ids[rows.eligible])
        if bool((~known & (p.mark != 0)).any()):
            raise Failed("failed", "raised: the attack poisoned rows that it may not touch")
        if not attacks:
            return
        clean, order = (p.mark == 0).nonzero().flatten(), train.ids.argsort()
        at = torch.searchsorted(train.ids[order], found.ids[clean]).clamp(max=len(train) - 1)
        # A part at a time: all rows together would double the memory of the set.
        for ours, theirs in zip(clean.split(CHECK_ROWS), order[at].split(CHECK_ROWS), strict=True):
            for name in ("ids", "labels", "images"):
                if not torch.equal(getattr(found, name)[ours], getattr(train, name)[theirs]):
                    raise Failed("failed", f"raised: the attack changed {name} of rows that it marks as clean")

    def _others(self, b: Backdoor, rows: Rows, covers: bool, ctx: Ctx, out: Path) -> None:
        """Triggered images that should keep their label: of classes that do not count, and covers."""
        from sleeperbench.data.load import subset
        from sleeperbench.kit.poison import render, render_leak

        test = subset(rows.test, min(DECOY_ROWS, len(rows.test)))
        leak = render_leak(test, b, ctx)
        if leak is not None:
            artifacts.write_rendered(out / "leak_test.safetensors", leak)
        cover = render(test, b, Role.COVER, ctx) if covers else None
        if cover is not None:
            artifacts.write_rendered(out / "cover_test.safetensors", cover)

    def _decoy(self, method: Any, b: Backdoor, net: Classifier, rows: Rows, ctx: Ctx, out: Path) -> dict[str, Any]:
        """A placebo trigger that the attacked model does not answer to, rendered like the true one."""
        from sleeperbench.data.load import subset
        from sleeperbench.kit.poison import render
        from sleeperbench.kit.predict import predict

        test = subset(rows.test, min(DECOY_ROWS, len(rows.test)))
        for i in range(DECOY_TRIES):
            other = replace(ctx, seed=ctx.derive("decoy", i))
            decoy = method.decoy(rows.train, b, other)
            r = render(test, decoy, Role.TEST, other)
            probe = render(rows.probe, decoy, Role.TRAIN, other)
            if r is None or probe is None:
                break
            hits = predict(net, r.data.images, ctx=ctx).argmax(1).cpu() == r.targets
            asr = float(hits.double().mean())
            if asr <= DECOY_ASR:
                artifacts.write_rendered(out / "decoy_test.safetensors", r)
                artifacts.write_rendered(out / "decoy_probe.safetensors", probe)
                return {"decoy_asr": asr}
        return {"decoy_asr": None}

    def _curves(self, epochs: Sequence[Model], rows: Rows, out: Path, cost: Cost) -> dict[str, list[float]]:
        """C-Acc and ASR of the model after each epoch, evaluated once training is over."""
        from sleeperbench.kit.predict import predict

        bd = artifacts.read_rendered(out / "bd_test.safetensors", rows.test)
        names = ("epoch", "c_acc", "asr") if bd else ("epoch", "c_acc")
        curve: dict[str, list[float]] = {n: [] for n in names}
        for i, model in enumerate(epochs):
            net = load(model, self.device)
            curve["epoch"].append(i + 1)
            right = predict(net, rows.test.images).argmax(1).cpu() == rows.test.labels
            curve["c_acc"].append(float(right.double().mean()))
            if bd:
                hit = predict(net, bd.data.images).argmax(1).cpu() == bd.targets
                curve["asr"].append(float(hit.double().mean()))
        return curve

    # ---- defense ---------------------------------------------------------------------------------------------------
    def _defense(self, task: Task, values: Mapping[str, str], out: Path, cost: Cost, log: Path) -> dict[str, Any]:
        spec, access = ModelSpec.from_json(task.params["spec"]), task.params["access"]
        with self._first(task, values, "run", cost, log) as (folder, usage):
            artifacts.write_outcome(out, checked(artifacts.read_outcome(folder / "out"), spec, access, folder))
            return usage

    def _prepare(self, task: Task, values: Mapping[str, str], out: Path, cost: Cost, log: Path) -> dict[str, Any]:
        """What a defense does before it sees a model; an outcome whose state is the answer."""
        with self._first(task, values, "prepare", cost, log) as (folder, usage):
            artifacts.write_outcome(out, Outcome(state=artifacts.read_outcome(folder / "out").state))
            return usage

    @contextlib.contextmanager
    def _first(
        self, task: Task, values: Mapping[str, str], what: str, cost: Cost, log: Path
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A fresh child of a defense that does `what`: its folder, while it is there, and what it used."""
        missing = sorted(set(values.get("requires", "").split()) - traits(ModelSpec.from_json(task.params["spec"])))
        if missing:
            raise Failed("not_applicable", f"needs_{missing[0]}")
        # Below the system's temporary folder, not the store's: the path of a case must lead nowhere.
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.cases))
        try:
            about = self._stage(task, values, folder)
            artifacts.write_json(folder / "in" / "case.json", about | {"what": what})
            desk = self.desk(folder, task.params["access"], task.inputs.get("attack", ""))
            answer, usage = self._child(folder, log, task.timeout, desk)
            yield folder, _spent(cost, answer, usage)
        finally:
            remove(folder)

    def desk(self, folder: Path, access: Mapping[str, Any], model: str) -> Desk | None:
        """Who answers a query-only defense's questions about the model of an artifact; None for other defenses."""
        if not queried(access):
            return None
        net = self.net(model)
        return Desk(folder / "in", net, net.spec, access["model"] == "labels")

    def _child(
        self, folder: Path, log: Path, seconds: float, desk: Desk | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fork for a staged folder; returns the child's answer and what it used. Queries are those the desk counted.

        Raises:
            Failed: it timed out, died, declined or raised.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the child's share is as large as this process's
        with desk or contextlib.nullcontext():
            usage = self.fork(folder, log, seconds)
        if usage["timeout"]:
            raise Failed("timeout", f"budget: no answer after {seconds:g} s")
        try:
            done = read_plain(folder / "done.json")
            if done is None:
                how = f"signal {usage['signal']}" if usage["signal"] else f"exit code {usage['code']}"
                raise Failed("failed", f"raised: the process ended with {how}; see its log")
            answer = json.loads(done)
            if answer["status"] != "ok":
                known = answer["status"] in ("not_applicable", "failed", "out_of_memory")
                raise Failed(answer["status"] if known else "failed", str(answer["reason"])[:400])
            check_answer(folder / "out", answer_bytes(self.memory))
            if desk is not None:
                answer["cost"]["queries"] = desk.queries
        except Unusable as e:
            raise Failed("failed", str(e)) from e
        except (ValueError, KeyError, TypeError) as e:
            raise Failed("failed", "raised: done.json is not what the process writes") from e
        return answer, usage

    def _stage(self, task: Task, values: Mapping[str, str], folder: Path) -> dict[str, Any]:
        """Lay out exactly what the defense declared, and nothing else; returns what becomes case.json."""
        from sleeperbench.data.cut import split_tune_val

        p, access = task.params, task.params["access"]
        for name in ("in", "out", "scratch"):
            (folder / name).mkdir()
        box = folder / "in"
        rows = self.rows(p["data"])
        about = {
            "plugin": task.name,
            "value": values[task.name],
            "method": p["method"],
            "access": access,
            "spec": self.model(task.inputs["attack"]).spec.to_json() if "attack" in task.inputs else p["spec"],
            "recipe": p["recipe"] | {"precision": task.numerics["precision"]},
            "seed": task.seed,
            "device": str(self.device),
        }
        if access["model"] == "weights":
            save_model(self.model(task.inputs["attack"]), box / "model")
        if access["clean"]:
            n = clean_rows(access["clean"], p["data"]["cut"]["clean"], len(rows.source))
            clean = rows.pool.rows(torch.arange(min(n, len(rows.pool))))
            clean = replace(clean, ids=torch.arange(len(clean)), digest="")
            artifacts.write_images(box / "clean.safetensors", clean)
            tune, val = split_tune_val(clean.labels, seed=p["data"]["cut"]["seed"])
            artifacts.write_tensors(box / "split.safetensors", {"tune": tune, "val": val})
        if access["train"]:
            poisoned = artifacts.read_set(self.store.fetch(task.inputs["attack"]), rows.train)
            # One order per attack, so that a wrapper's rows are those its inner defense marked.
            view = poisoned.view(derive(int(task.inputs["attack"][:15], 16), "view"))
            artifacts.write_images(box / "train.safetensors", replace(view, digest=""))
            if access["oracle"]:
                marked = replace(poisoned, data=replace(poisoned.data, labels=poisoned.mark))
                mark = marked.view(derive(int(task.inputs["attack"][:15], 16), "view")).labels
                artifacts.write_tensors(box / "marks.safetensors", {"mark": mark})
        for i in range(access["references"]):
            save_model(self.model(task.inputs[f"reference{i}"]), box / f"reference{i}")
        if access["oracle"]:
            source = self.store.fetch(task.inputs["oracle"])
            (box / "oracle").mkdir()
            for name in ("backdoor.safetensors", "backdoor.json"):
                shutil.copyfile(source / name, box / "oracle" / name)
            about["oracle"] = values[artifacts.read_json(source / "backdoor.json")["attack"]]
        if access["inner"]:
            artifacts.write_outcome(
                _made(box / "inner"), artifacts.read_outcome(self.store.fetch(task.inputs["inner"]))
            )
        if task.kind == "defense" and "prepared" in task.inputs:
            prepared = artifacts.read_outcome(self.store.fetch(task.inputs["prepared"]))
            artifacts.write_outcome(_made(box / "prepared"), prepared)
        if access["inner"] == "cost":
            about["spent"] = self.store.manifest(task.inputs["inner"])["result"]["cost"]
        return about

    # ---- answer ----------------------------------------------------------------------------------------------------
    def _answer(self, task: Task, values: Mapping[str, str], out: Path, cost: Cost, log: Path) -> dict[str, Any]:
        """A defense's second phase: scores for a shuffled, unlabelled mix of clean and triggered test images.

        Or, of an inverter whose triggers are code of its own, test and probe images with each of them.
        """
        rows = self.rows(task.params["data"])
        if task.params.get("phase") == "stamp":
            return self._stamps(task, values, out, cost, log, rows)
        bd = artifacts.read_rendered(self.store.fetch(task.inputs["attack"]) / "bd_test.safetensors", rows.test)
        if bd is None:
            raise Failed("not_applicable", "no_trigger")
        n = min(ASKED_ROWS, len(bd), len(rows.test))
        gen = torch.Generator().manual_seed(derive(task.seed, "asked"))
        clean = rows.test.images[torch.randperm(len(rows.test), generator=gen)[:n]]
        images = torch.cat([clean, bd.data.images[torch.randperm(len(bd), generator=gen)[:n]]])
        triggered = torch.arange(2 * n) >= n
        order = torch.randperm(2 * n, generator=gen)
        found, usage = self._second(task, values, images[order], {"what": "score"}, cost, log)
        scores = found["scores"]
        if scores.shape[:1] != (2 * n,) or scores[:1].numel() not in range(1, 2 + STATISTICS) or scores.dim() > 2:
            raise Failed("failed", f"wrong_shape: scores are {tuple(scores.shape)} for {2 * n} images")
        if not bool(scores.isfinite().all()):
            raise Failed("failed", "nan: a score is not finite")
        columns = scores.double().view(2 * n, -1)
        parts = {"scores": columns[:, 0], "triggered": triggered[order]}
        if columns.shape[1] > 1:
            parts["beside"] = columns[:, 1:]
        artifacts.write_tensors(out / "scores.safetensors", parts)
        return usage

    def _second(
        self,
        task: Task,
        values: Mapping[str, str],
        images: torch.Tensor,
        about: Mapping[str, Any],
        cost: Cost,
        log: Path,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A fresh child with the defense's own outcome and these images; its tensors, and what it used."""
        access, own = task.params["access"], task.inputs["defense"]
        folder = Path(tempfile.mkdtemp(prefix="case-", dir=self.cases))
        try:
            staged = self._stage(task, values, folder)
            artifacts.write_outcome(_made(folder / "in" / "own"), artifacts.read_outcome(self.store.fetch(own)))
            scoring = about["what"] == "score"
            if scoring and not queried(access):
                save_model(self.model(own), folder / "in" / "judged")
            artifacts.write_tensors(folder / "in" / "asked.safetensors", {"images": images})
            artifacts.write_json(folder / "in" / "case.json", staged | dict(about))
            desk = self.desk(folder, access, own) if scoring else None
            answer, usage = self._child(folder, log, task.timeout, desk)
            found = artifacts.read_tensors(folder / "out" / f"{about['what']}s.safetensors")
            return found, _spent(cost, answer, usage)
        finally:
            remove(folder)

    def _stamps(
        self, task: Task, values: Mapping[str, str], out: Path, cost: Cost, log: Path, rows: Rows
    ) -> dict[str, Any]:
        outcome = artifacts.read_outcome(self.store.fetch(task.inputs["defense"]))
        asked = [i for i, claim in enumerate(outcome.inverted) if claim.uses_apply]
        images = torch.cat([rows.test.images, rows.probe.images])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(derive(task.seed, "stamped")))
        found: dict[str, torch.Tensor] = {}
        usage: dict[str, Any] = {}
        if asked:
            about = {"what": "stamp", "claims": asked}
            found, usage = self._second(task, values, images[order], about, cost, log)
        if set(found) != {str(i) for i in asked}:
            raise Failed("failed", f"wrong_shape: images of claims {sorted(found)}, asked for {asked}")
        for name, stamped in found.items():
            if stamped.shape != images.shape or stamped.dtype != torch.uint8:
                raise Failed("failed", f"wrong_shape: claim {name}'s images are {tuple(stamped.shape)} {stamped.dtype}")
        n, back = len(rows.test), order.argsort()
        cuts = (("test", slice(n)), ("probe", slice(n, None)))
        parts = {f"{i}.{part}": stamped[back][at] for i, stamped in found.items() for part, at in cuts}
        artifacts.write_tensors(out / "stamps.safetensors", parts)
        return usage

    # ---- evaluate --------------------------------------------------------------------------------------------------
    def _evaluate(self, task: Task, values: Mapping[str, str], out: Path, cost: Cost, log: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="evaluate-", dir=self.cases) as scratch:
            case = opened(self, task, values, Path(scratch), cost)
            method = load_class(values[task.name]).from_params(task.params["method"])
            try:
                findings = method.measure(case)
            except NotApplicable as e:
                raise Failed("not_applicable", str(e)) from e
            known = {m.name for m in method.METRICS}
            for row in findings.rows:
                if row.metric not in known:
                    raise Failed(
                        "failed", f"raised: {task.name} wrote metric {row.metric!r}, which METRICS does not name"
                    )
            artifacts.write_findings(out, findings)
        # Beside the findings, so that rows need no other artifact, which may be gone by then.
        if "attack" not in task.inputs:  # a zoo has many
            return {"rate_actual": None}
        spent = {"spent": together(used(self.store, task))} if "cost" in task.params["needs"]["outcome"] else {}
        return {"rate_actual": self.store.manifest(task.inputs["attack"])["result"]["rate_actual"], **spent}


def clean_rows(asked: float | int, granted: float | int, total: int) -> int:
    """Clean rows that a defense gets: a declared 0.05 is all that the suite grants, other shares are in proportion.

    Args:
        asked: The defense's ACCESS: a share, or a count that no suite changes.
        granted: The suite's [access] clean: a share of all training rows, or a count.
        total: All training rows.
    """
    if not isinstance(asked, float):
        return asked
    pool = granted * total if isinstance(granted, float) else granted
    return round(pool * asked / STANDARD_CLEAN)


def _spent(cost: Cost, answer: Mapping[str, Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    """Take over what a child counted, which never is below 0; returns its processor seconds and memory."""
    for name in vars(cost):
        setattr(cost, name, max(0, int(answer["cost"].get(name, 0))))
    return {"child_cpu": usage["cpu_seconds"], "child_mb": usage["peak_mb"]}


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@functools.cache
def environment() -> dict[str, str]:
    """Versions that stand beside every artifact."""
    from importlib.metadata import version

    names = ("sleeperbench", "torch", "numpy", "timm", "safetensors")
    return {n: version(n) for n in names} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
    }
