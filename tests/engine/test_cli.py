"""The command line: what it imports, what it prints where, and its forms for machines."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeperbench.cli import COMMANDS
from sleeperbench.engine import rows
from sleeperbench.schema import CELLS, MEASUREMENTS

HEAVY = ("torch", "torchvision", "pandas", "pyarrow", "matplotlib", "numpy", "sklearn", "timm")

PROBE = """
import contextlib, io, json, sys
from sleeperbench.cli import main
answers = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(argv)
        except SystemExit as e:
            code = e.code
    answers.append([code, [m for m in json.loads(sys.argv[2]) if m in sys.modules]])
print(json.dumps(answers))
"""


def imports(env: dict[str, str], *commands: list[str], modules: tuple[str, ...] = HEAVY) -> list[Any]:
    """Exit code and heavy modules after each command, all in one process."""
    argv = [sys.executable, "-c", PROBE, json.dumps(commands), json.dumps(modules)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_help_and_list_import_nothing_heavy(clean_env: dict[str, str]) -> None:
    commands = [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)]
    answers = imports(clean_env, *commands, ["list"], ["list", "--json"], ["doctor"])
    assert [c for c, _ in answers[:-1]] == [0] * (len(answers) - 1)
    assert [m for _, m in answers] == [[]] * len(answers)


def test_commands_on_tables_import_no_torch(clean_env: dict[str, str], smoke: Any, tmp_path: Path) -> None:
    run = str(smoke.out)
    cell = "digits/small_cnn/badnets@0.1/none/s0"
    commands = [
        ["show", cell, "--results", run],
        ["merge", run, "--out", str(tmp_path / "all")],
        ["site", "--results", run, "--out", str(tmp_path / "site")],
        ["run", "smoke", "--dry-run", "--out", run, "--store", str(smoke.store)],
    ]
    assert imports(clean_env, *commands, modules=("torch",)) == [[0, []]] * len(commands)


def test_list_as_json(cli: Any) -> None:
    answer = cli("list", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    wanted = [
        "kind",
        "id",
        "dist",
        "dist_version",
        "method_version",
        "api",
        "status",
        "reason",
        "title",
        "paper",
        "access",
        "wrapper",
    ]
    assert all(set(wanted) <= set(r) for r in found)
    assert {(r["kind"], r["id"]) for r in found} >= {("attack", "badnets"), ("suite", "smoke"), ("dataset", "digits")}


def test_dry_run_as_json(cli: Any, smoke: Any, tmp_path: Path) -> None:
    answer = cli("run", "smoke", "--dry-run", "--json", "--out", tmp_path / "out")
    plan = json.loads(answer.out)
    assert set(plan) >= {"cells", "tasks", "cached", "to_run", "blocked", "core_seconds", "peak_mb"}
    assert (plan["cells"], plan["tasks"], plan["cached"], plan["to_run"]) == (4, 12, 0, 12)
    assert (plan["blocked"], plan["core_seconds"]) == ([], None)
    assert list(tmp_path.iterdir()) == []
    again = cli(*smoke.args, "--dry-run", "--json", "--out", smoke.out, "--store", smoke.store)
    assert (json.loads(again.out)["cached"], json.loads(again.out)["to_run"]) == (12, 0)
    more = json.loads(cli(*smoke.args, "--seeds", "0,1", "--dry-run", "--json", "--out", smoke.out).out)
    assert (more["cells"], more["tasks"], more["to_run"]) == (8, 24, 12)
    assert more["core_seconds"] > 0  # the journal of the run folder knows what such tasks cost
    assert more["peak_mb"] > 0


def test_dry_run_in_words(cli: Any, tmp_path: Path) -> None:
    answer = cli("run", "smoke", "--dry-run", "--out", tmp_path / "out")
    assert answer.out.splitlines()[:2] == ["suite smoke: 4 cells, 12 tasks, 0 cached", "to run: 12"]


def test_show(cli: Any, smoke: Any) -> None:
    cell = "digits/small_cnn/badnets@0.1/none/s0"
    answer = cli("show", cell, "--results", smoke.out, "--json")
    assert (answer.code, answer.err) == (0, "")
    about = json.loads(answer.out)
    assert {"cell", "identity", "measurements", "media", "command"} <= set(about)
    assert about["cell"] == about["identity"]["cell"] == cell
    assert {m["cell"] for m in about["measurements"]} == {cell}
    assert set(about["measurements"][0]) == {c.name for c in MEASUREMENTS}
    words = shlex.split(about["command"])
    assert words[:3] == ["sleeperbench", "run", "smoke"]
    again = cli(*words[1:], "--store", smoke.store, "--dry-run", "--json")
    assert json.loads(again.out)["to_run"] == 0, "the command asks for what the run has computed"
    said = cli("show", cell, "--results", smoke.out)
    assert said.out.splitlines()[0] == cell
    assert "c_acc" in said.out
    assert said.out.splitlines()[-1].startswith("reproduce: sleeperbench run smoke ")
    unknown = cli("show", cell.replace("badnets", "badnet"), "--results", smoke.out)
    assert unknown.code == 2
    assert f"did you mean `{cell}`" in unknown.err


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ft", ["lr=0.5"]),
        ("unlearn:neural_cleanse", ["steps=7", "epochs=3"]),  # of the wrapper, and of what it wraps
        ("unlearn:neural_cleanse", ["lr=0.5"]),  # both have one
        ("unlearn:neural_cleanse", ["inner.lr=0.5"]),
        ("unlearn:neural_cleanse", ["lr=0.25", "inner.lr=0.5", "inner.epochs=3"]),
    ],
)
def test_a_changed_cell_is_asked_for_with_its_settings(name: str, changed: list[str]) -> None:
    from sleeperbench.engine.registry import Registry
    from sleeperbench.engine.suite import Changes, build
    from sleeperbench.engine.task import canonical
    from sleeperbench.schema import reproduce

    registry = Registry.discover("none")
    settings = ["attack.badnets.pattern=white", *(f"defense.{name}.{s}" for s in changed)]
    suite, _ = build("smoke", registry, Changes(attacks=["badnets"], defenses=[name], settings=settings))
    attack, defense = suite.attacks[-1], suite.defenses[-1]
    line = {
        "dataset": "digits",
        "arch": "small_cnn",
        "rate": 0.1,
        "seed": 3,
        "attack": attack.label,
        "defense": defense.label,
    }
    argv = reproduce(
        line | {"attack_params": canonical(attack.params), "defense_params": canonical(defense.params)}, "smoke"
    )
    sets = [argv[i + 1] for i, word in enumerate(argv) if word == "--set"]
    assert 'attack.badnets.pattern="white"' in sets
    again, _ = build("smoke", registry, Changes(attacks=["badnets"], defenses=[name], settings=sets))
    assert [v.label for v in (again.attacks[-1], again.defenses[-1])] == [attack.label, defense.label]


def test_doctor(cli: Any) -> None:
    answer = cli("doctor", "--json")
    assert answer.code in (0, 3)  # 3 where a plugin of this machine is broken
    about = json.loads(answer.out)
    assert about["cores"] >= 1
    assert bool(about["broken plugins"]) is (answer.code == 3)
    assert about["SLEEPERBENCH_CACHE"] == os.environ["SLEEPERBENCH_CACHE"]
    assert cli("doctor").out.startswith("python")


def only(smoke: Any, cli: Any, tmp_path: Path, name: str, glob: str) -> Path:
    out = tmp_path / name
    answer = cli(*smoke.args, "--only", glob, "--out", out, "--store", smoke.store, "--no-site")
    assert answer.code == 0, answer.err
    assert answer.out == ""
    assert "computed 0 tasks" in answer.err
    return out


def test_two_slices_merge_to_the_whole(cli: Any, smoke: Any, tmp_path: Path) -> None:
    one = only(smoke, cli, tmp_path, "one", "*/badnets@0.1/*")
    two = only(smoke, cli, tmp_path, "two", "*/none@0/*")
    assert {r["cell"] for r in rows.read_table(one / "cells.parquet")} < {
        r["cell"] for r in rows.read_table(smoke.out / "cells.parquet")
    }
    answer = cli("merge", one, two, "--out", tmp_path / "all")
    assert (answer.code, answer.out) == (0, f"{tmp_path / 'all'}\n")
    assert "doubles left out" in answer.err
    for file in ("measurements.parquet", "cells.parquet"):
        assert (tmp_path / "all" / file).read_bytes() == (smoke.out / file).read_bytes()
    assert cli("merge", one, two, "--out", tmp_path / "all").code == 0  # again, into the same folder
    assert cli("site", "--results", tmp_path / "all", "--out", tmp_path / "site").out.startswith("site: ")
    refused = cli("merge", one, two, "--out", two)
    assert refused.code == 2
    assert "a run folder of its own" in refused.err


def test_where_two_runs_differ_the_first_counts(cli: Any, smoke: Any, tmp_path: Path) -> None:
    one = only(smoke, cli, tmp_path, "one", "*/none@0/none/*")
    two = tmp_path / "two"
    shutil.copytree(one, two)
    for file in (two / "rows").iterdir():  # the same cells and figures, of other tasks
        made = [r | {"task_key": "f" * 64, "value": r["value"] and 0.125} for r in json.loads(file.read_text())]
        file.unlink()
        (two / "rows" / f"{'f' * 64}-{made[0]['evaluator']}.json").write_text(json.dumps(made))
    for order, same in (((one, two), True), ((two, one), False)):
        out = tmp_path / f"all-{same}"
        assert cli("merge", *order, "--out", out).code == 0
        merged = rows.read_table(out / "measurements.parquet")
        assert len(merged) == len(rows.read_table(one / "measurements.parquet"))
        assert (merged == rows.read_table(one / "measurements.parquet")) is same


def test_errors_of_ours_have_a_traceback_only_when_asked(cli: Any) -> None:
    from sleeperbench.errors import BadInput

    assert "Traceback" not in cli("run", "nothing").err
    with pytest.raises(BadInput):
        cli("-v", "run", "nothing")


def test_the_cells_table_has_its_columns(smoke: Any) -> None:
    assert list(rows.read_table(smoke.out / "cells.parquet")[0]) == [c.name for c in CELLS]
