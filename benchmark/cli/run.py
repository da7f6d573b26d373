"""`sleeperbench run`: run a suite, write the tables, render the site."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeperbench.errors import BadInput

if TYPE_CHECKING:
    from sleeperbench.engine.plan import Plan
    from sleeperbench.engine.registry import Registry


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "run",
        help="run a suite, write the tables, render the site",
        description="Runs what is missing of a suite and writes RUN/measurements.parquet, RUN/cells.parquet and "
        "RUN/site/index.html. Everything finished is kept: the same command again computes nothing, after an "
        "interruption it goes on, and with more seeds or methods it computes only those.",
        epilog="Examples: `sleeperbench run quick --out runs/quick` · `sleeperbench run cpu --attack badnets "
        "--defense ft --seeds 0` · `sleeperbench run quick --set attack.badnets.size=4 --dry-run`",
    )
    p.add_argument("suite", metavar="SUITE|FILE.toml", help="a shipped suite (see `list suites`) or a file of yours")
    p.add_argument("--out", type=Path, help="run folder (default: runs/<suite>)")
    p.add_argument(
        "--store", metavar="DIR|URL", help="cache of all steps: a folder or fsspec URL (default: `store` beside --out)"
    )
    p.add_argument("--data-root", type=Path, help="where data sets lie (default: $SLEEPERBENCH_DATA)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:0,1 (default: auto)")
    p.add_argument("--jobs", type=int, help="tasks at a time (default: cores / threads, or one per GPU)")
    for name, what in (
        ("attack", "attacks; `none` always stays"),
        ("defense", "defenses; `none` always stays"),
        ("evaluator", "evaluators"),
        ("dataset", "data sets"),
        ("arch", "architectures"),
    ):
        p.add_argument(
            f"--{name}", action="append", default=[], metavar="ID", help=f"restrict the {what}; a new id is added"
        )
    p.add_argument("--rate", action="append", default=[], type=float, metavar="R", help="poison rate, repeatable")
    p.add_argument("--seeds", default="", metavar="0,1,2", help="seeds in place of the suite's")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KIND.ID.KEY=VALUE",
        help="change a parameter, as in defense.ft.lr=0.02; a wrapped plugin's by its name or by inner.KEY",
    )
    p.add_argument("--only", default="", metavar="GLOB", help="only cells whose name matches")
    p.add_argument("--shard", default="", metavar="i/n", help="part i of n; `merge` puts the runs together")
    p.add_argument("--only-stage", default="", choices=["attack", "defense", "evaluate"], help="stop after a stage")
    p.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    p.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    p.add_argument("--rerun", default="", metavar="failed|all|GLOB", help="compute these again")
    p.add_argument("--fail-fast", action="store_true", help="stop at the first failure")
    p.add_argument("--timeout", type=float, metavar="S", help="seconds per task in place of the suite's")
    p.add_argument(
        "--sandbox",
        default="process",
        choices=["process", "bwrap"],
        help="how defenses are kept apart: a process of their own, or bubblewrap for code that one does not trust",
    )
    p.add_argument("--keep-unimplanted", action="store_true", help="defend also attacks that did not implant")
    p.add_argument("--verify-store", action="store_true", help="check artifacts every time they are read")
    p.add_argument("--no-site", action="store_true", help="tables only")


def main(args: argparse.Namespace) -> int:
    """Plan and run."""
    from sleeperbench.engine import sandbox
    from sleeperbench.engine.registry import Registry
    from sleeperbench.engine.run import Options, execute

    if args.sandbox == "bwrap" and (problem := sandbox.problem()):
        raise BadInput(f"--sandbox bwrap: {problem}")
    registry = Registry.discover()
    plan, text = make_plan(args, registry)
    name = plan.suite.name
    out = args.out or Path("runs") / name
    store = args.store or os.environ.get("SLEEPERBENCH_STORE") or str(out.parent / "store")
    if store.startswith("memory:"):
        raise BadInput(f"--store {store}: memory is seen by one process alone, and a run has several; give a folder")
    if args.dry_run:
        return _dry_run(args, plan, store)
    options = Options(
        out=out,
        store=store,
        devices=devices(args.device, args.jobs, plan.suite.budget["threads"]),
        sandbox=args.sandbox,
        rerun=args.rerun,
        only_stage=args.only_stage,
        shard=args.shard,
        fail_fast=args.fail_fast,
        keep_unimplanted=args.keep_unimplanted,
        quiet=args.quiet,
        site=not args.no_site,
        verify_store=args.verify_store,
    )
    return execute(plan, registry, options, text)


def make_plan(args: argparse.Namespace, registry: Registry) -> tuple[Plan, str]:
    """The plan of a command line, and the suite's TOML."""
    from sleeperbench.engine import plan as planning
    from sleeperbench.engine import shard as sharding
    from sleeperbench.engine.suite import Changes, build

    try:
        seeds = [int(s) for s in args.seeds.split(",") if s]
    except ValueError as e:
        raise BadInput(f"--seeds {args.seeds}: give whole numbers, such as --seeds 0,1,2") from e
    if args.seeds and not seeds:
        raise BadInput(f"--seeds {args.seeds}: names no seed; give whole numbers, such as --seeds 0,1,2")
    changes = Changes(
        attacks=args.attack,
        defenses=args.defense,
        evaluators=args.evaluator,
        datasets=args.dataset,
        archs=args.arch,
        rates=args.rate,
        seeds=seeds,
        settings=args.set,
        timeout=args.timeout,
    )
    if args.data_root is not None:
        os.environ["SLEEPERBENCH_DATA"] = str(args.data_root)  # workers read it too
    suite, text = build(args.suite, registry, changes)
    datasets = {name: describe_dataset(name) for name in suite.datasets}
    plan = planning.Planner(suite, registry, datasets).build()
    if args.only:
        planning.restrict(plan, args.only)
    if args.shard:
        sharding.shard(plan, registry, *sharding.parse(args.shard))
    return plan, text


def describe_dataset(name: str) -> Any:
    """Prepare a data set and say what the planner must know of it."""
    from sleeperbench.data.cache import prepare
    from sleeperbench.data.find import find_source
    from sleeperbench.engine.plan import Dataset

    source = find_source(name)
    ready = prepare(source, None)
    for split in ready.counts:  # a damaged copy is the user's to mend, so it must not wait for a worker
        ready.arrays(split)
        ready.ids(split)
    return Dataset(
        name=name,
        shape=source.shape,
        classes=len(source.classes),
        norm=source.norm,
        pad=source.pad,
        flip=source.flip,
        rows=ready.counts,
        digests=ready.digests,
        canonical=ready.canonical,
        note=ready.note,
    )


def devices(device: str, jobs: int | None, threads: int) -> list[str]:
    """One device per slot; the sum of the slots' threads never exceeds the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is not None and jobs < 1:
        raise BadInput(f"--jobs {jobs}: give at least 1")
    if device == "auto":
        device = "cuda" if _gpus() else "cpu"
    if device == "cpu":
        if jobs and jobs * threads > cores:
            raise BadInput(f"--jobs {jobs} with {threads} threads each exceeds the {cores} cores; lower one of them")
        return ["cpu"] * (jobs or max(1, cores // threads))
    if device.partition(":")[0] != "cuda":
        raise BadInput(f"--device {device}: give auto, cpu, cuda, or cuda:0,1")
    here = _gpus()
    if not here:
        raise BadInput(f"--device {device}: no CUDA device here; use --device cpu")
    numbers = [n for n in device.partition(":")[2].split(",") if n] or [str(i) for i in range(here)]
    for n in numbers:
        if not n.isdecimal() or int(n) >= here:
            raise BadInput(f"--device {device}: no CUDA device {n}; there are 0 to {here - 1}")
    gpus = [f"cuda:{n}" for n in numbers]
    return [gpus[i % len(gpus)] for i in range(jobs or len(gpus))]


def _gpus() -> int:
    """Number of NVIDIA devices, without importing torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) if Path("/dev/nvidiactl").exists() else 0


def _dry_run(args: argparse.Namespace, plan: Plan, store: str) -> int:
    from sleeperbench.engine.estimate import estimate

    answer = estimate(plan, store)
    if args.json:
        print(json.dumps(answer, indent=1))
        return 0
    known = answer["core_seconds"] is not None and answer["to_run"]
    print(f"suite {plan.suite.name}: {answer['cells']} cells, {answer['tasks']} tasks, {answer['cached']} cached")
    cost = "about {core_seconds:.0f} core-seconds, at most {peak_mb:.0f} MB each".format(**answer) if known else ""
    print(f"to run: {answer['to_run']}" + (f", {cost}" if cost else ""))
    for place in answer["unknown"]:
        print(f"not counted, since it has not run on this store yet: {place}", file=sys.stderr)
    for b in answer["blocked"]:
        print(f"blocked: {b['cell']}: {b['status']}: {b['reason']}")
    for d in plan.datasets.values():
        if not d.canonical:
            print(f"note: {d.name} differs from its release: {d.note or 'unknown copy'}")
    return 0
