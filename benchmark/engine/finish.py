"""After the tasks: tables, plugins.json, media, run.json, site, and the last lines that a user reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeperbench import PROTOCOL, __version__
from sleeperbench.engine import rows
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.store import Damaged, write_atomic
from sleeperbench.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sleeperbench.engine.run import Run
    from sleeperbench.engine.task import Task


def finish(run: Run, code: int) -> int:
    """Write everything that stands on rows; returns how many cells and zoos failed."""
    out = run.options.out
    table = rows.supersede([r for found in run.ledger.rows.values() for r in found], run.ledger.settled)
    try:
        _complete_rates(run, table)
        _flag_weak(run, table)
        counts, failures = _counts(run, table)
        write_atomic(out / "suite.toml", run.text.encode())
        rows.drop_superseded(out, table)
        rows.write_tables(out, table, run.plan.suite.gate["collapse_points"])
        write_atomic(out / "plugins.json", _json(_plugins(run)))
        Media(run).write()
        exit_code = code or (1 if failures else 0)
        write_atomic(out / "run.json", _json(_about(run, counts, exit_code)))
    except OSError as e:
        raise BadInput(f"cannot write the run folder {out}: {e.strerror}; free some space, then run this again") from e
    if not run.options.quiet:
        print(f"computed {run.computed} tasks", file=sys.stderr)
    for cell, reason in failures:
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    words = (("ok", "ok"), ("failed", "failed"), ("not_applicable", "not applicable"), ("not_run", "not run"))
    print(", ".join(f"{counts[k]} {w}" for k, w in words), file=sys.stderr)
    if run.options.site and table:
        from sleeperbench.leaderboard.build import build

        print(f"site: {build([out], out / 'site').absolute()}")
    return len(failures)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _complete_rates(run: Run, table: list[dict[str, Any]]) -> None:
    """Give rows without a figure the poison rate that the measured rows of the same attack carry."""
    rates = {r["attack_key"]: r["rate_actual"] for r in table if r["rate_actual"] is not None}
    changed = set()
    for r in table:
        if r["rate_actual"] is None and r["attack_key"] in rates:
            r["rate_actual"] = rates[r["attack_key"]]
            changed.add(r["task_key"])
    for key in sorted(changed):
        rows.save(run.options.out, key, [r for r in table if r["task_key"] == key])


def _flag_weak(run: Run, table: list[dict[str, Any]]) -> None:
    """Flag the rows of attacks that did not implant, also in their files, which are all that `merge` reads."""
    weak = set(run.gate.closed())
    groups = {c.name: c.attack_group for c in run.plan.cells}
    changed = set()
    for r in table:
        if r["cell"] in groups:
            flags = {f for f in r["flag"].split(";") if f} - {"weak"}
            flag = ";".join(sorted(flags | ({"weak"} if groups[r["cell"]] in weak else set())))
            if flag != r["flag"]:
                r["flag"] = flag
                changed.add(r["task_key"])
    for key in sorted(changed):
        rows.save(run.options.out, key, [r for r in table if r["task_key"] == key])


def _counts(run: Run, table: list[dict[str, Any]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    status: dict[str, tuple[str, str]] = {}
    planned = {c.name for c in run.plan.cells}
    for line in rows.cells_table([dict(r) for r in table if r["cell"] in planned]):
        status[line["cell"]] = (line["status"], line["reason"])
    counts = {"ok": 0, "failed": 0, "not_applicable": 0, "not_run": 0}
    failures = []
    for name in sorted(planned):
        s, reason = status.get(name, ("not_run", "stopped before it was its turn"))
        s = "failed" if s in ("timeout", "out_of_memory") else s
        counts[s] += 1
        if s == "failed":
            failures.append((name, reason))
    for zoo in run.plan.zoos:
        for r in table:
            if r["task_key"] == zoo.evaluation.key and r["status"] in ("failed", "timeout", "out_of_memory"):
                failures.append((zoo.line.name, r["reason"]))
                break
    return counts, failures


def _plugins(run: Run) -> list[dict[str, Any]]:
    """All that the site needs to know of every plugin in the run."""
    suite = run.plan.suite
    used = [("attack", v.id) for v in suite.attacks] + [("defense", v.id) for v in suite.defenses]
    used += [("evaluator", v.id) for v in suite.evaluators]
    used += [("evaluator", t.name) for t in run.plan.tasks.values() if t.kind == "evaluate"]
    used += [("dataset", d) for d in suite.datasets] + [("model", a) for a in suite.archs]
    return [describe(run.registry, kind, name) for kind, name in sorted(set(used))]


def describe(registry: Registry, kind: Any, name: str) -> dict[str, Any]:
    """A plugin as plugins.json and `list --json` show it."""
    wrapper, inner = (None, name) if name.startswith("timm:") else Registry.split_wrapper(name)
    plain = {"title": name, "paper": "", "bibtex": "", "access": "", "method_version": 0, "info": {}}
    if kind == "dataset" and all(p.id != name for p in registry.of("dataset")):  # one that the user added
        return {"kind": kind, "id": name, "dist": "", "dist_version": ""} | plain
    p = registry.get(kind, wrapper or inner)
    about: dict[str, Any] = {"kind": kind, "id": name, "dist": p.dist, "dist_version": p.dist_version}
    if not p.value:
        return about | plain
    b = p.blueprint
    info = dict(b.info)
    access = b.access.track() if kind == "defense" and b.access else ""
    return about | {
        "method_version": info.get("version", 0),
        "title": str(info.get("title", b.title)),
        "paper": str(info.get("paper", "")),
        "bibtex": str(info.get("bibtex", "")),
        "access": "none" if name == "none" else access,
        "doc": b.docstring,
        "info": info,
        "parameters": {
            k: {"annotation": q.annotation, "default": q.default, "doc": q.doc} for k, q in b.fields.items()
        },
        "metrics": [dict(zip(("name", "unit", "low", "high", "better", "doc"), m, strict=True)) for m in b.metrics],
    }


def _about(run: Run, counts: dict[str, int], code: int) -> dict[str, Any]:
    names = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow")
    suite = dataclasses.asdict(run.plan.suite)
    public = suite.pop("secret")
    from sleeperbench.engine.task import PUBLIC_SECRET

    suite["secret_sha256"] = hashlib.sha256(public.encode()).hexdigest()
    suite["secret_public"] = public == PUBLIC_SECRET
    return {
        "suite": suite,
        "protocol": PROTOCOL,
        "versions": {"sleeperbench": __version__, "python": platform.python_version()} | {n: version(n) for n in names},
        "host": {"cores": os.cpu_count(), "machine": platform.machine(), "devices": run.options.devices},
        "datasets": {
            n: {"digests": dict(d.digests), "canonical": d.canonical, "note": d.note, "rows": dict(d.rows)}
            for n, d in run.plan.datasets.items()
        },
        "counts": counts,
        "sandbox": run.options.sandbox,
        "shard": run.options.shard,
        "tasks": {"planned": len(run.plan.tasks), "computed": run.computed},
        "exit": code,
    }


class Media:
    """Pictures and curves of cells and zoos, copied from artifacts to RUN/media/<digest>/."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.shared: dict[str, list[str]] = {}
        for cell in run.plan.cells:
            if cell.is_control:
                keys = [e.key for e in cell.evaluations if e.key and e.needs.scope == "attack"]
                self.shared.setdefault(cell.attack_key, []).extend(keys)

    def write(self) -> None:
        """Write the folder of every cell and zoo whose artifacts changed."""
        for cell in self.run.plan.cells:
            own = [e.key for e in cell.evaluations if e.key]
            planned = {*own, *self.shared.get(cell.attack_key, ()), cell.attack_key}
            keys = sorted({k for k in (*own, *self.shared.get(cell.attack_key, ())) if self.run.has(k)})
            if cell.is_control and self.run.has(cell.attack_key):
                keys.append(cell.attack_key)
            if keys and not self._current(self._folder(cell.name), set(keys), planned):
                self._one(cell.name, {k: self.run.plan.tasks[k] for k in keys})
        zoos: dict[str, dict[str, Task]] = {}
        for zoo in self.run.plan.zoos:
            if (key := zoo.evaluation.key) and self.run.has(key):
                zoos.setdefault(zoo.line.name, {})[key] = zoo.shell
        for name, tasks in zoos.items():
            if not self._current(self._folder(name), set(tasks), set(tasks)):
                self._one(name, tasks)

    def _folder(self, name: str) -> Path:
        return self.run.options.out / "media" / hashlib.sha256(name.encode()).hexdigest()[:12]

    def _current(self, folder: Path, keys: set[str], planned: set[str]) -> bool:
        """Whether the folder shows all that the store has, and nothing of another plan.

        It may show more: an artifact that was removed from the store since is not needed again for its pictures.
        """
        try:
            return keys <= set(json.loads((folder / "index.json").read_bytes())["keys"]) <= planned
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _one(self, cell: str, tasks: Mapping[str, Task]) -> None:
        folder = self._folder(cell)
        index: dict[str, Any] = {"cell": cell, "keys": list(tasks), "pictures": [], "curves": []}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for key, task in tasks.items():
            try:
                source = self.run.store.fetch(key)
            except Damaged:
                continue  # set aside; it is computed again when a figure needs it
            if task.kind == "attack":
                if (source / "curves.json").exists():
                    index["curves"].append(_training(json.loads((source / "curves.json").read_bytes())))
                continue
            findings = json.loads((source / "findings.json").read_bytes())
            for name, file in findings["pictures"].items():
                target = f"{task.name}-{file}"
                shutil.copyfile(source / file, folder / target)
                index["pictures"].append({"file": target, "title": name, "caption": f"{name}, by {task.name}"})
            for name, curve in findings["curves"].items():
                index["curves"].append({"name": f"{task.name}-{name}", **curve})
        if index["pictures"] or index["curves"]:
            write_atomic(folder / "index.json", _json(index))
        else:
            folder.rmdir()


def _training(curve: dict[str, list[float]]) -> dict[str, Any]:
    series = [{"label": n, "x": curve["epoch"], "y": curve[n]} for n in ("c_acc", "asr") if n in curve]
    return {
        "name": "training",
        "title": "C-Acc and ASR over training",
        "x_label": "epoch",
        "y_label": "share of test images",
        "series": series,
    }
