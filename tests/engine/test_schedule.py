"""Which task is next, what a dry run knows, what a run says, zoos, and that one run owns a folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import shorts
from warm import Nursery

from sleeperbench.cli import run as cli_run
from sleeperbench.engine.costs import Costs
from sleeperbench.engine.gate import Gate
from sleeperbench.engine.graph import Plan
from sleeperbench.engine.pool import Pool
from sleeperbench.engine.schedule import JOB_TASKS, Queue
from sleeperbench.engine.task import Task
from sleeperbench.errors import BadInput


def cost(costs: Costs, plan: Plan, seconds: Mapping[str, float]) -> None:
    for task in plan.tasks.values():
        s = seconds.get(task.name, seconds.get(task.kind, 1.0))
        costs.learn(plan, task, {"seconds": s, "cpu_seconds": s, "peak_mb": 10.0})


def make_queue(
    plan: Plan, registry: Any, costs: Costs, there: set[str] | None = None, open_gates: bool = True
) -> Queue:
    there = set() if there is None else there
    gate = Gate(plan, registry)
    q = Queue(plan, there.__contains__, lambda group: open_gates or gate.open(group), gate.deciders, costs)
    for key in plan.tasks:
        q.want(key)
    q.rank()
    return q


def drain(q: Queue, there: set[str]) -> list[str]:
    """Names of all tasks in the order in which one worker gets them."""
    order = []
    while job := q.pop():
        for key in job:
            order.append(key)
            there.add(key)
            q.done(key)
    return order


def test_every_task_once_and_inputs_first(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(attacks=["none", "badnets"], seeds=[0, 1], evaluators=["accuracy", "ra", "stealth"])
    there: set[str] = set()
    q = make_queue(plan, registry, Costs(tmp_path), there)
    order = drain(q, there)
    assert sorted(order) == sorted(plan.tasks)
    place = {k: i for i, k in enumerate(order)}
    assert all(place[i] < place[k] for k in order for i in plan.inputs(k))
    assert (q.pending, round(q.ahead, 6)) == (set(), 0)


def test_the_longest_way_first_as_learnt(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(attacks=["badnets", "blended"])
    for long, short in (("badnets", "blended"), ("blended", "badnets")):
        costs = Costs(tmp_path)
        cost(costs, plan, {long: 100.0, short: 10.0})
        there: set[str] = set()
        first = [plan.tasks[k].name for k in drain(make_queue(plan, registry, costs, there), there)]
        assert first.index(long) < first.index(short)


def test_what_stands_behind_a_task_makes_it_urgent(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    """A short evaluation that decides a gate goes before a long one that nothing waits for."""
    plan = make_plan(defenses=["none", "ft"], evaluators=["accuracy", "stealth"])
    costs = Costs(tmp_path)
    cost(costs, plan, {"accuracy": 0.1, "stealth": 5.0, "ft": 50.0})
    there: set[str] = set()
    q = make_queue(plan, registry, costs, there, open_gates=False)
    order = [plan.tasks[k].name for k in drain(q, there) if plan.tasks[k].kind == "evaluate"]
    assert order.index("stealth") > order.index("accuracy")
    assert q.pending, "the gate is shut"
    q.is_open = lambda group: True
    q.opened("digits/small_cnn/badnets@0.1")
    drain(q, there)
    assert q.pending == set()


def test_short_evaluators_of_a_model_share_a_job(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(attacks=["badnets"], defenses=["none"], evaluators=["accuracy", "stealth", "ra"])
    for seconds, together in ((0.01, True), (2.0, False)):
        costs = Costs(tmp_path)
        cost(costs, plan, {"evaluate": seconds, "attack": 9.0, "defense": 9.0})
        there: set[str] = set()
        q = make_queue(plan, registry, costs, there)
        sizes = []
        while job := q.pop():
            sizes.append(len(job))
            models = {(plan.tasks[k].inputs.get("attack"), plan.tasks[k].inputs.get("defense")) for k in job}
            assert len(models) == 1
            for key in job:
                there.add(key)
                q.done(key)
        assert (max(sizes) > 1) is together
        assert max(sizes) <= JOB_TASKS
        assert sum(sizes) == len(plan.tasks)


def test_a_damaged_input_is_computed_before_its_users(make_plan: Any, registry: Any, tmp_path: Path) -> None:
    plan = make_plan(attacks=["none"], defenses=["none"])
    there: set[str] = set()
    q = make_queue(plan, registry, Costs(tmp_path), there)
    (attack,) = q.pop()
    there.add(attack)
    q.done(attack)
    there.discard(attack)
    q.gone(attack)
    assert q.pop() == [attack]
    assert q.pop() == []


def test_postponed_tasks_come_back(make_plan: Any, registry: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan = make_plan(attacks=["none"], defenses=["none"])
    q = make_queue(plan, registry, Costs(tmp_path))
    (key,) = q.pop()
    q.postpone(key)
    assert (q.pop(), q.due(), key in q.pending) == ([], [], True)
    monkeypatch.setattr("time.monotonic", lambda: 1e12)
    assert q.due() == [key]
    assert q.pop() == [key]


def test_costs_are_learnt_and_kept(make_plan: Any, tmp_path: Path) -> None:
    plan = make_plan()
    task = next(t for t in plan.tasks.values() if t.name == "badnets")
    costs = Costs(tmp_path)
    assert costs.known(plan, task) is None
    unknown = costs.guess(plan, task)
    for s in (2.0, 4.0):
        costs.learn(plan, task, {"seconds": s, "cpu_seconds": 2 * s, "peak_mb": 100 * s})
    costs.save()
    again = Costs(tmp_path).known(plan, task)
    assert again == {"seconds": 3.0, "cpu_seconds": 6.0, "peak_mb": 400.0, "n": 2.0}
    assert Costs(tmp_path).guess(plan, task) == 3.0 != unknown
    (tmp_path / "costs.json").write_text('{"attack": 3}')
    assert Costs(tmp_path).known(plan, task) is None


@pytest.mark.parametrize(
    ("device", "jobs", "slots"),
    [
        ("cuda:0,1", 4, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1", "cuda:1"]),
        ("cuda", None, ["cuda:0", "cuda:1"]),
        ("auto", 1, ["cuda:0"]),
    ],
)
def test_gpus_are_shared_by_count(device: str, jobs: int | None, slots: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(cli_run, "_gpus", lambda: 2)
    assert cli_run.devices(device, jobs, 1) == slots


@pytest.mark.parametrize(("threads", "slots"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_threads_never_exceed_the_cores(threads: int, slots: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert cli_run.devices("cpu", None, threads) == ["cpu"] * slots
    with pytest.raises(BadInput, match="exceeds the 4 cores"):
        cli_run.devices("cpu", 4 // threads + 1, threads)


# ---- real runs -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def env(clean_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return clean_env | {"PYTHONPATH": str(shorts.install(tmp_path_factory.mktemp("short")))}


class Screen:
    """What a terminal shows: enough of one for the live lines."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[(\d*)([FJ])|([^\x1b\r\n]+)|(\r?\n)", text):
            count, code, plain, newline = part
            if code == "F":
                self.row -= int(count)
                assert self.row >= 0
            elif code == "J":
                del self.lines[self.row + 1 :]
                self.lines[self.row] = ""
            elif plain:
                assert len(plain) < 60, "it would wrap"
                self.lines[self.row] = plain
            elif newline:
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))


def test_live_lines_on_a_terminal(env: Mapping[str, str], nursery: Nursery, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    tail = f'[defense."short/idle"]\nwait = "{hold}"\n'
    file = shorts.suite(tmp_path / "short.toml", tail, attacks=["none"], evaluators=["short/n0"], seeds=[0])
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    argv = shorts.command(file, tmp_path / "out", "--store", tmp_path / "store")
    process = nursery.start(argv, {**env, "COLUMNS": "60"}, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        text += data
        if b"defense digits/small_cnn/none@0/short/idle" in text:
            hold.unlink(missing_ok=True)
    stdout = process.communicate()[0]
    assert process.returncode == 0, text.decode()
    assert stdout == ""
    screen = Screen()
    screen.feed(text.decode())
    assert [x for x in screen.lines if x] == ["computed 5 tasks", "2 ok, 0 failed, 0 not applicable, 0 not run"]
    shown = text.decode()
    assert re.search(r"\d/\d tasks, about \d+ s left", shown)
    assert "  defense digits/small_cnn/none@0/short/idle~" in shown or "  defense digits" in shown


def test_plain_lines_elsewhere_and_a_log_per_task(env: Mapping[str, str], nursery: Nursery, tmp_path: Path) -> None:
    file = shorts.suite(tmp_path / "short.toml", attacks=["none"], evaluators=["short/n0"], seeds=[0])
    argv = shorts.command(file, tmp_path / "out", "--store", tmp_path / "store")
    done = nursery.run(argv, env)
    assert (done.code, done.out) == (0, "")
    assert "\x1b" not in done.err
    assert done.err.splitlines()[-2:] == ["computed 5 tasks", "2 ok, 0 failed, 0 not applicable, 0 not run"]
    keys = {json.loads(x)["key"] for x in (tmp_path / "out" / "tasks.jsonl").read_text().splitlines()}
    assert {p.stem for p in (tmp_path / "out" / "logs").iterdir()} == keys

    dry = [*argv, "--dry-run", "--json", "--seeds", "0,1"]
    plan = json.loads(nursery.run(dry, env).out)
    assert (plan["tasks"], plan["cached"], plan["unknown"]) == (10, 5, [])
    assert plan["core_seconds"] > 0
    assert plan["peak_mb"] > 0
    dry = [*argv, "--dry-run", "--json", "--evaluator", "short/n1"]
    plan = json.loads(nursery.run(dry, env).out)
    assert plan["unknown"] == ["evaluate short/n1 digits small_cnn v1"]
    assert plan["core_seconds"] is None


def test_two_runs_on_one_folder(env: Mapping[str, str], nursery: Nursery, tmp_path: Path) -> None:
    hold, out = tmp_path / "hold", tmp_path / "out"
    hold.touch()
    tail = f'[defense."short/idle"]\nwait = "{hold}"\n'
    file = shorts.suite(tmp_path / "short.toml", tail, attacks=["none"], evaluators=["short/n0"], seeds=[0])
    argv = shorts.command(file, out, "--store", tmp_path / "store")
    first = nursery.start(argv, env)
    assert shorts.until(lambda: (out / "tasks.jsonl").exists())
    second = nursery.run(argv, env)
    assert second.code == 2
    assert re.search(rf"locked by pid {first.pid} on \S+ since ", second.err)
    hold.unlink()
    assert first.wait() == 0


def test_zoo(env: Mapping[str, str], nursery: Nursery, tmp_path: Path) -> None:
    """One figure per defense over all its cells; a defense that fails on some leaves the others."""
    note = tmp_path / "note"
    file = shorts.suite(
        tmp_path / "short.toml",
        f'[defense."short/fails"]\nnote = "{note}"\n',
        defenses=["none", "short/idle", "short/fails"],
        evaluators=["short/gate", "short/n0", "short/menagerie"],
    )
    argv = shorts.command(file, tmp_path / "out", "--store", tmp_path / "store")
    done = nursery.run(argv, env)
    assert done.code == 1, done.err
    measurements, cells = shorts.tables(tmp_path / "out")
    assert all("/zoo/" not in c["cell"] for c in cells)
    zoo = {(r["defense"], r["metric"]): r for r in measurements if r["scope"] == "zoo"}
    assert {r["cell"] for r in zoo.values()} == {
        "digits/small_cnn/zoo/short/idle/s0",
        "digits/small_cnn/zoo/short/fails/s0",
    }
    assert (zoo["short/idle", "zoo_bad"]["value"], zoo["short/idle", "zoo_clean"]["value"]) == (2.0, 2.0)
    assert zoo["short/idle", "zoo_score"]["status"] == "ok"
    assert zoo["short/fails", "zoo_bad"]["reason"] == "input_failed: no cell of the zoo has an outcome"
    shown = {}
    for file in (tmp_path / "out" / "media").glob("*/index.json"):
        index = json.loads(file.read_bytes())
        shown[index["cell"]] = [(c["name"], c["series"][0]["y"]) for c in index["curves"] if "menagerie" in c["name"]]
    assert {cell: curves for cell, curves in shown.items() if curves} == {
        "digits/small_cnn/zoo/short/idle/s0": [("short/menagerie-members", [2])]
    }, "the curves of a zoo stand beside its figures, and one without an outcome has none"
    tried = note.read_text()
    assert tried == "tried " * 4

    shutil.rmtree(tmp_path / "out" / "media")
    again = nursery.run(argv, env)
    assert again.code == 1
    assert "computed 0 tasks" in again.err
    assert note.read_text() == tried
    cells_shown = {json.loads(f.read_bytes())["cell"] for f in (tmp_path / "out" / "media").glob("*/index.json")}
    assert cells_shown == set(shown), "a lost folder of media is written again from the store"
    assert shorts.tables(tmp_path / "out") == [measurements, cells]


def test_a_zoo_names_its_members(make_plan: Any, registry: Any, tmp_path: Path, env: Mapping[str, str]) -> None:
    from sleeperbench.engine.plan import Planner, restrict
    from sleeperbench.engine.registry import Registry
    from sleeperbench.engine.suite import build

    folder = env["PYTHONPATH"]
    file = shorts.suite(tmp_path / "zoo.toml", evaluators=["short/n0", "short/menagerie"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        mine = Registry.discover("short")
        suite, _ = build(str(file), mine)

    def made() -> Plan:
        return Planner(suite, mine, make_plan().datasets | {}).build()

    big = {"rows": {"train": 1000, "test": 400}}
    assert all(d.rows == big["rows"] for d in made().datasets.values())
    plan = made()
    (zoo,) = plan.zoos
    whole = zoo.task()
    assert isinstance(whole, Task)
    assert [c["backdoored"] for c in whole.params["cells"]] == [False, False, True, True]
    assert {c["seed"] for c in whole.params["cells"]} == {0, 1}
    assert [whole.inputs[f"zoo.{i}"] for i in range(4)] == [k for k, _ in zoo.members]
    smaller = zoo.task(without={zoo.members[0][0]})
    assert smaller is not None
    assert smaller.key != whole.key
    assert zoo.task(without={k for k, _ in zoo.members}) is None
    restrict(plan, "*badnets*")
    assert plan.zoos == []
    plan = made()
    restrict(plan, "*/zoo/*")
    assert all(k in plan.tasks for k, _ in plan.zoos[0].members)


def test_a_lost_worker_returns_the_rest_of_its_job() -> None:
    class Slot:
        task, rest = "now", ["next", "last"]

    answers = list(Pool._lost(Slot(), {"status": "lost"}))  # type: ignore[arg-type]
    assert [(t, a["status"]) for t, a in answers] == [("now", "lost"), ("next", "returned"), ("last", "returned")]
