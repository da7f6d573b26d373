"""Defenses that misbehave in every way cost their own cells, and the rows say what happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plugins
import pytest
import shorts
from warm import Nursery

from sleeperbench.engine.casefiles import JSON_BYTES, Unusable, check_answer, read_plain
from sleeperbench.engine.forkserver import LOG_BYTES
from sleeperbench.schema import VOLATILE

HEAD = """import os, signal, sys, threading, time
from dataclasses import dataclass, replace
import torch
from sleeperbench import Access, Defense, Outcome, Verdict, Wrap
from sleeperbench.kit import pack

def changed(case, **spec):
    model = pack(case.net)
    return Outcome(model=replace(model, spec=replace(model.spec, **spec)))

def with_state(case, change):
    model = pack(case.net)
    return Outcome(model=replace(model, state={k: change(v) for k, v in model.state.items()}))
"""

CLASS = '''
@dataclass(frozen=True, kw_only=True)
class {name}(Defense):
    """Misbehaves."""
    INFO = {{"title": "{name}", "version": 1, "api": 1, "kind": "repair", "paper": "", "micro": {{}}}}
    ACCESS = Access(clean=0)

    def run(self, case):
{body}
'''

CASES: dict[str, tuple[str, str, str]] = {
    # id: (what it does, status, how the reason begins)
    "raises": ("raise RuntimeError('on purpose')", "failed", "raised: RuntimeError: on purpose"),
    "nan": ("return with_state(case, lambda t: t * float('nan') if t.is_floating_point() else t)", "failed", "nan: "),
    "shape": ("return with_state(case, lambda t: t[:1] if t.ndim else t)", "failed", "wrong_shape: "),
    "classes": ("return changed(case, classes=7)", "failed", "wrong_shape: the repaired model is for 7 classes"),
    "arch": ("return changed(case, arch='nosuch')", "failed", "wrong_shape: "),
    "foreign": ("return changed(case, arch='timm:resnet18')", "failed", "wrong_shape: "),
    "wrap": ("return changed(case, wraps=(Wrap(kind='nosuch'),))", "failed", "wrong_shape: "),
    "nothing": ("return None", "failed", "raised: TypeError: run returned NoneType"),
    "verdict": ("return Outcome(verdict=Verdict(score=float('nan'), threshold=0.0))", "failed", "nan: "),
    "hangs": ("time.sleep(3600)", "timeout", "budget: no answer after"),
    "exits": ("sys.exit(0)", "failed", "raised: SystemExit"),
    "vanishes": ("os._exit(0)", "failed", "raised: the process ended with exit code 0"),
    "kills_itself": ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "raised: the process ended with signal 9"),
    "unspeakable": ("return Outcome(chosen={'a': object()})", "failed", "raised: TypeError"),
    "huge_json": ("return Outcome(chosen={'a': 'x' * (17 << 20)})", "failed", "budget: the answer's outcome.json"),
    "huge_file": (
        "open(case.ctx.scratch.parent / 'out' / 'x.bin', 'wb').truncate(2 << 30)",
        "failed",
        "budget: a file is larger",
    ),
    "huge_sum": (
        "[open(case.ctx.scratch.parent / 'out' / f'{i}.bin', 'wb').truncate(400 << 20) for i in range(6)]\n"
        "return Outcome()",
        "failed",
        "budget: the answer has",
    ),
    "link": (
        "(case.ctx.scratch.parent / 'out' / 'model.json').symlink_to('/etc/hostname')\nreturn Outcome()",
        "failed",
        "raised: the answer's model.json is not a plain file",
    ),
    "loud": ("for _ in range(100): print('x' * (1 << 20))\nprint('the last line')\nreturn Outcome()", "ok", ""),
    "forks": (
        "for fled in (0, 1):\n"
        "    if os.fork() == 0:\n"
        "        if fled: os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            sys.argv[0] = 'left'\n"
        "            while True: time.sleep(1)\n"
        "        os._exit(0)\n"
        "return Outcome()",
        "ok",
        "",
    ),
    "state": (
        "torch.set_default_dtype(torch.float64)\ntorch.manual_seed(1)\ntorch.set_num_threads(2)\n"
        "sys.modules['sleeperbench.engine.child'] = None\nreturn Outcome()",
        "ok",
        "",
    ),
    "litters": (
        "for name in ('HOME', 'TMPDIR'):\n"
        "    with open(os.path.join(os.environ[name], 'litter'), 'w') as f: f.write('x')\n"
        "(case.ctx.scratch / 'deep').mkdir()\nos.chmod(case.ctx.scratch / 'deep', 0)\nreturn Outcome()",
        "ok",
        "",
    ),
}


HUNGRY = "torch.ones(20 << 30, dtype=torch.uint8)"
"""Costs two new workers, so it is in the hoarder's run, whose processes find torch imported."""


def source(bodies: Mapping[str, str]) -> str:
    parts = [HEAD]
    for name, body in bodies.items():
        parts.append(CLASS.format(name=f"Bad{name.title()}", body="\n".join(f"        {x}" for x in body.split("\n"))))
    return "".join(parts)


@dataclass(frozen=True)
class Ran:
    table: pd.DataFrame
    alone: pd.DataFrame
    out: Path
    temporary: Path


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, sleeper: Callable, nursery: Nursery, clean_env: dict[str, str]
) -> Ran:
    """One run of a good defense beside all bad ones but the hungry one, and one of it alone, on stores of their own."""
    folder = tmp_path_factory.mktemp("hostile")
    ids = {n: f"hostile:Bad{n.title()}" for n in CASES}
    code = source({name: body for name, (body, _, _) in CASES.items()})
    dist = plugins.install(folder, "bad", "1.0", {"hostile.py": code}, {"sleeperbench.defenses": ids})
    args = ["run", "smoke", "--attack", "none", "--evaluator", "accuracy", "--defense", "ft", "--jobs", 1]
    args += ["--device", "cpu", "--no-site", "--timeout", 30]
    # Of two gigabytes the libraries of a prepared process leave one.
    for change in ("train.epochs=1", "defense.ft.steps=2", "budget.memory_gb=2"):
        args += ["--set", change]
    good = sleeper(*args, "--out", folder / "good", "--store", folder / "store1", path=(dist,))
    assert good.code == 0, good.err
    for name in CASES:
        args += ["--defense", f"bad/{name}"]
    (folder / "tmp").mkdir()
    args += ["--out", folder / "bad", "--store", folder / "store2"]
    own = filter(None, [str(dist), clean_env.get("PYTHONPATH")])
    env = clean_env | {"PYTHONPATH": os.pathsep.join(own), "TMPDIR": str(folder / "tmp")}
    with (folder / "errors").open("wb") as errors:
        bad = nursery.start([sys.executable, "-m", "sleeperbench", *map(str, args)], env, stderr=errors.fileno())
    try:
        # What a test below says is over, it could see while it ran.
        assert shorts.until(lambda: writing_into(folder) and working_in(folder)), "a worker and a child"
        assert bad.wait(300) == 1, (folder / "errors").read_text()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bad.pid, signal.SIGKILL)
        raise
    tables = [pd.read_parquet(folder / name / "measurements.parquet") for name in ("bad", "good")]
    return Ran(tables[0], tables[1], folder / "bad", folder / "tmp")


@pytest.mark.parametrize("name", CASES)
def test_the_row_says_what_happened(ran: Ran, name: str) -> None:
    _, status, reason = CASES[name]
    measured = ran.table[(ran.table.defense == f"bad/{name}") & (ran.table.metric == "c_acc")]
    assert len(measured)
    assert set(measured.status) == {status}, list(measured.reason)
    assert all(r.startswith(reason) for r in measured.reason), list(measured.reason)


def assert_the_others_are_untouched(table: pd.DataFrame, alone: pd.DataFrame) -> None:
    """The figures of what is not bad are those of a run without the bad."""
    keep = [c for c in table.columns if c not in VOLATILE]
    order = ["defense", "task_key", "metric", "qualifier"]
    beside = table[~table.defense.str.startswith("bad/")][keep].sort_values(order, ignore_index=True)
    # Whole numbers become floats beside rows that have none.
    pd.testing.assert_frame_equal(beside, alone[keep].sort_values(order, ignore_index=True), check_dtype=False)


def test_the_others_have_the_figures_of_a_run_without_the_bad(ran: Ran) -> None:
    assert_the_others_are_untouched(ran.table, ran.alone)


def test_what_is_printed_is_capped_and_its_end_kept(ran: Ran) -> None:
    sizes = {f.name: f.stat().st_size for f in (ran.out / "logs").iterdir()}
    assert LOG_BYTES <= max(sizes.values()) <= LOG_BYTES + 200
    text = (ran.out / "logs" / max(sizes, key=sizes.__getitem__)).read_text()
    assert "bytes left out" in text and text.endswith("the last line\n")


def test_no_process_and_no_folder_is_left(ran: Ran) -> None:
    # Workers and fork servers write to a file of the run; what a defense forks works in the folder of its case.
    assert shorts.until(lambda: not working_in(ran.out.parent) and not writing_into(ran.out.parent), seconds=20)
    assert list(ran.temporary.glob("sleeperbench-*")) == []


HOARDER = '''import torch
from dataclasses import dataclass
from sleeperbench import Evaluator, Findings, Measurement, Metric, Needs

HELD = []

@dataclass(frozen=True, kw_only=True)
class Hoarder(Evaluator):
    """Never gives back what it takes, as a heap in pieces does."""
    INFO = {"title": "Hoarder", "version": 1, "api": 1, "kind": "accuracy", "paper": "", "micro": {}}
    NEEDS = Needs()
    METRICS = (Metric(name="held", unit="", low=0.0, high=99.0, better="none", doc="Tensors held"),)

    def measure(self, case):
        HELD.append(torch.empty(1 << 30, dtype=torch.uint8))
        return Findings(rows=(Measurement(metric="held", value=float(len(HELD))),))
'''


def test_what_ran_out_of_memory_is_tried_again_in_a_new_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: Callable, ran: Ran
) -> None:
    points = {"sleeperbench.defenses": {"hungry": "hostile:BadHungry"}}
    bad = plugins.install(tmp_path, "bad", "1.0", {"hostile.py": source({"hungry": HUNGRY})}, points)
    ids = {"hoarder": "hoarder:Hoarder"}
    hoard = plugins.install(tmp_path, "hoard", "1.0", {"hoarder.py": HOARDER}, {"sleeperbench.evaluators": ids})
    args = ["run", "smoke", "--attack", "none", "--evaluator", "accuracy", "--evaluator", "hoard/hoarder"]
    args += ["--defense", "ft", "--defense", "bad/hungry", "--jobs", 1, "--device", "cpu", "--no-site"]
    args += ["--out", tmp_path / "run", "--store", tmp_path / "store"]
    for change in ("train.epochs=1", "defense.ft.steps=2", "budget.memory_gb=2"):
        args += ["--set", change]
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)  # the processes of this run work here, and no others
    answer = sleeper(*args, path=(bad, hoard), TMPDIR=str(tmp_path / "tmp"))
    assert answer.code == 1, answer.err
    lines = [json.loads(x) for x in (tmp_path / "run" / "tasks.jsonl").read_text().splitlines()]
    tries = [x["status"] for x in lines if x["plugin"] == "bad/hungry"]
    assert tries == ["out_of_memory"] * 2, "once, and once more alone"
    tries = [x["status"] for x in lines if x["plugin"] == "hoard/hoarder"]
    assert tries == ["ok", "out_of_memory", "ok"], "of two cells the second finds no room, and then a new process"
    table = pd.read_parquet(tmp_path / "run" / "measurements.parquet")
    failed = table[table.defense == "bad/hungry"]
    assert set(failed.metric) >= {"c_acc", "held"}
    assert set(failed.status) == {"out_of_memory"}
    assert all(r.startswith("out_of_memory: ") for r in failed.reason), list(failed.reason)
    held = table[(table.metric == "held") & (table.defense != "bad/hungry")]
    assert (list(held.status), list(held.value)) == (["ok"] * 2, [1.0] * 2)
    assert_the_others_are_untouched(table[table.metric != "held"], ran.alone)
    # Prepared processes that were not needed end with the one that prepared them, a moment later.
    assert shorts.until(lambda: working_in(tmp_path) == [], 20), working_in(tmp_path)
    assert list((tmp_path / "tmp").glob("sleeperbench-*")) == []


def working_in(folder: Path) -> list[int]:
    """Other processes whose working folder it is, or lies in it."""
    return others("cwd", lambda path: path.is_relative_to(folder))


def writing_into(folder: Path) -> list[int]:
    """Other processes whose standard error lies in it."""
    return others("fd/2", lambda path: path.is_relative_to(folder))


def others(link: str, wanted: Callable[[Path], bool]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and wanted(Path(os.readlink(entry / link))):
                found.append(int(entry.name))
    return sorted(set(found) - {os.getpid()})


def test_answers_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    assert read_plain(tmp_path / "missing") is None
    (tmp_path / "plain").write_bytes(b"12345")
    assert read_plain(tmp_path / "plain") == b"12345"
    with pytest.raises(Unusable, match="5 bytes, 4 are allowed"):
        read_plain(tmp_path / "plain", 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    for name in ("pipe", "link"):
        with pytest.raises(Unusable, match="not a plain file"):
            read_plain(tmp_path / name)
    answer = tmp_path / "out"
    (answer / "path0").mkdir(parents=True)
    (answer / "path0" / "a.bin").write_bytes(b"x" * 10)
    check_answer(answer, 10)
    with pytest.raises(Unusable, match="10 bytes, 9 are allowed"):
        check_answer(answer, 9)
    os.link(tmp_path / "plain", answer / "hard")
    with pytest.raises(Unusable, match="hard is not a plain file"):
        check_answer(answer, 100)
    (answer / "hard").unlink()
    with (answer / "big.json").open("wb") as f:
        f.truncate(JSON_BYTES + 1)
    with pytest.raises(Unusable, match=r"big\.json"):
        check_answer(answer, 1 << 40)


def test_unreadable_leftovers_are_removed_and_links_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o500)
    tree = tmp_path / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "deep" / "link").symlink_to(other)
    (tree / "deep" / "deeper").chmod(0)
    # Without the rights of root, to whom nothing is unreadable.
    code = (
        "import os, sys; from pathlib import Path\n"
        "from sleeperbench.engine import casefiles, sandbox; sandbox.drop_capabilities()\n"
        "os.chmod(sys.argv[1] + '/deep', 0); casefiles.remove(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, tree], check=True)
    assert not tree.exists()
    assert other.stat().st_mode & 0o777 == 0o500
