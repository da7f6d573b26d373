"""The suite `smoke` from end to end: what is computed, what is kept, and what a user reads."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from warm import Nursery

from sleeperbench.engine import rows
from sleeperbench.schema import VOLATILE

FT = "digits/small_cnn/badnets@0.1/ft"


def journal(out: Path) -> list[dict[str, Any]]:
    file = out / "tasks.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steady(out: Path) -> list[list[dict[str, Any]]]:
    """Both tables without the columns that may differ."""
    files = ("measurements.parquet", "cells.parquet")
    return [[{k: v for k, v in r.items() if k not in VOLATILE} for r in rows.read_table(out / f)] for f in files]


def attack_of(store: Path, name: str, seed: int | None = None) -> Path:
    found = []
    for file in store.glob("*/*/manifest.json"):
        task = json.loads(file.read_text())["task"]
        if (task["kind"], task["name"]) == ("attack", name) and seed in (None, task["params"]["target"]):
            found.append(file.parent)
    (folder,) = found
    return folder


@pytest.fixture
def again(smoke: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run folder and of the store."""
    shutil.copytree(smoke.out, tmp_path / "out")
    shutil.copytree(smoke.store, tmp_path / "store")
    return tmp_path / "out", tmp_path / "store"


def test_the_first_run(smoke: Any) -> None:
    assert smoke.answer.code == 0, smoke.answer.err
    assert smoke.answer.out == f"site: {smoke.out}/site/index.html\n"
    assert smoke.answer.err.splitlines()[-1] == "4 ok, 0 failed, 0 not applicable, 0 not run"
    assert Path(smoke.answer.out[6:].strip()).is_file()
    for name in ("run.json", "suite.toml", "plugins.json", "tasks.jsonl", "measurements.parquet", "cells.parquet"):
        assert (smoke.out / name).stat().st_size > 0
    assert len(journal(smoke.out)) == 12
    about = json.loads((smoke.out / "run.json").read_text())
    assert (about["exit"], about["counts"]["ok"], about["tasks"]) == (0, 4, {"planned": 12, "computed": 12})
    assert "secret" not in about["suite"]
    cells = {r["cell"]: r for r in rows.read_table(smoke.out / "cells.parquet")}
    attacked = cells["digits/small_cnn/badnets@0.1/none/s0"]
    assert attacked["asr"] > 0.9
    assert attacked["c_acc"] > 0.8
    assert attacked["rate_actual"] == pytest.approx(0.1, abs=0.01)
    assert attacked["der"] == 0.5


def test_nothing_is_unpickled(smoke: Any) -> None:
    endings = {p.suffix for p in smoke.store.rglob("*") if p.is_file()}
    assert endings <= {".json", ".safetensors", ".png", ""}


def test_the_second_run_computes_nothing(smoke: Any, cli: Any, again: tuple[Path, Path]) -> None:
    out, store = again
    answer = cli(*smoke.args, "--out", out, "--store", store)
    assert answer.code == 0, answer.err
    assert "computed 0 tasks" in answer.err
    assert answer.out == f"site: {out}/site/index.html\n"
    assert steady(out) == steady(smoke.out)
    assert len(journal(out)) == 12
    assert not any((store / "tmp").iterdir())


def test_rows_are_rebuilt_from_the_store(smoke: Any, cli: Any, again: tuple[Path, Path]) -> None:
    out, store = again
    shutil.rmtree(out / "rows")
    shutil.rmtree(out / "media")
    answer = cli(*smoke.args, "--out", out, "--store", store, "--no-site")
    assert "computed 0 tasks" in answer.err
    for file in ("measurements.parquet", "cells.parquet"):
        assert (out / file).read_bytes() == (smoke.out / file).read_bytes()
    assert {p.name for p in (out / "media").glob("*/*")} == {p.name for p in (smoke.out / "media").glob("*/*")}


def test_a_second_seed_computes_only_itself(smoke: Any, sleeper: Any, again: tuple[Path, Path]) -> None:
    out, store = again
    answer = sleeper(*smoke.args, "--seeds", "0,1", "--out", out, "--store", store)
    assert answer.code == 0, answer.err
    assert "computed 12 tasks" in answer.err
    assert [r for r in steady(out)[0] if r["seed"] == 0] == steady(smoke.out)[0]
    old, new = (attack_of(store, "badnets", target) / "model.safetensors" for target in (0, 1))
    assert old.read_bytes() != new.read_bytes()


def test_the_same_seed_elsewhere_is_the_same_to_the_byte(smoke: Any, sleeper: Any, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    answer = sleeper(*smoke.args, "--only-stage", "attack", "--out", out, "--store", store, "--no-site")
    assert answer.code == 0, answer.err
    assert {j["kind"] for j in journal(out)} == {"attack"}
    assert answer.err.splitlines()[-1] == "0 ok, 0 failed, 0 not applicable, 4 not run"
    for name in ("none", "badnets"):
        here, there = attack_of(store, name), attack_of(smoke.store, name)
        assert here.name == there.name
        assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


def test_only_what_is_damaged_is_computed_again(smoke: Any, sleeper: Any, again: tuple[Path, Path]) -> None:
    """A byte of a model, while a figure that needs it is missing too: both come back, and nothing else."""
    out, store = again
    model = attack_of(store, "badnets") / "model.safetensors"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    cell = f"{FT}~{_hash(out)}/s0"
    (lost,) = {r["task_key"] for r in rows.load_all(out) if (r["cell"], r["evaluator"]) == (cell, "accuracy")}
    shutil.rmtree(store / lost[:2] / lost)
    (out / "rows" / f"{lost}.json").unlink()
    before = len(journal(out))
    answer = sleeper(*smoke.args, "--out", out, "--store", store, "--no-site")
    assert answer.code == 0, answer.err
    done = [j["key"] for j in journal(out)[before:] if j["status"] == "ok"]
    assert sorted(done) == sorted([model.parent.name, lost])
    assert model.read_bytes() == good
    assert steady(out) == steady(smoke.out)


def _hash(out: Path) -> str:
    (name,) = {r["defense"] for r in rows.load_all(out) if r["defense"].startswith("ft~")}
    return str(name).partition("~")[2]


def test_a_damaged_finding_is_measured_again(smoke: Any, sleeper: Any, again: tuple[Path, Path]) -> None:
    out, store = again
    key = next(r["task_key"] for r in rows.load_all(out) if r["evaluator"] == "stealth" and r["value"] is not None)
    file = store / key[:2] / key / "findings.json"
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
    shutil.rmtree(out / "rows")
    answer = sleeper(*smoke.args, "--out", out, "--store", store, "--no-site")
    assert "computed 1 tasks" in answer.err
    assert steady(out) == steady(smoke.out)


def test_a_failing_defense(smoke: Any, sleeper: Any, again: tuple[Path, Path], trouble: Path, tmp_path: Path) -> None:
    """Its cells say why, the others are untouched, it is not tried again until asked, and then it is."""
    out, store = again
    mend = tmp_path / "mend"
    args = (*smoke.args, "--defense", "trouble/trouble", "--defense", "ft", "--out", out, "--store", store, "--no-site")
    args = (*args, "--set", f'defense.trouble/trouble.path="{mend}"')
    answer = sleeper(*args, path=(trouble,))
    assert answer.code == 1, answer.err
    lines = answer.err.splitlines()
    assert lines[-1] == "4 ok, 2 failed, 0 not applicable, 0 not run"
    for line, attack in zip(lines[-3:-1], ("badnets@0.1", "none@0"), strict=True):
        head = rf"failed: digits/small_cnn/{attack}/trouble/trouble~[0-9a-f]{{6}}/s0: "
        assert re.fullmatch(head + "raised: RuntimeError: trouble on purpose", line)
    bad = [r for r in rows.read_table(out / "measurements.parquet") if r["defense"].startswith("trouble/")]
    assert {(r["status"], r["reason"], r["value"]) for r in bad} == {
        ("failed", "raised: RuntimeError: trouble on purpose", None)
    }
    others = [r for r in steady(out)[0] if not r["defense"].startswith("trouble/")]
    assert others == steady(smoke.out)[0]
    assert json.loads((out / "run.json").read_text())["exit"] == 1

    answer = sleeper(*args, path=(trouble,))
    assert answer.code == 1
    assert "computed 0 tasks" in answer.err

    mend.write_text("")
    answer = sleeper(*args, "--rerun", "failed", path=(trouble,))
    assert answer.code == 0, answer.err
    assert answer.err.splitlines()[-1] == "6 ok, 0 failed, 0 not applicable, 0 not run"
    assert "computed 4 tasks" in answer.err


def test_fail_fast_stops_at_the_first(smoke: Any, sleeper: Any, again: tuple[Path, Path], trouble: Path) -> None:
    out, store = again
    before = len(journal(out))
    sweep = ("--set", "defense.trouble/trouble.nth=[0, 1]", "--defense", "trouble/trouble")
    answer = sleeper(*smoke.args, *sweep, "--fail-fast", "--out", out, "--store", store, "--no-site", path=(trouble,))
    assert answer.code == 1, answer.err
    assert [j["status"] for j in journal(out)[before:]] == ["failed"]
    assert re.fullmatch(r"\d ok, 1 failed, 0 not applicable, 3 not run", answer.err.splitlines()[-1])


def test_a_defense_that_hangs_times_out(smoke: Any, sleeper: Any, again: tuple[Path, Path], trouble: Path) -> None:
    out, store = again
    args = ("--defense", "trouble/trouble", "--set", 'defense.trouble/trouble.mode="hang"', "--timeout", "2")
    answer = sleeper(
        *smoke.args, *args, "--only", "*badnets*trouble*", "--out", out, "--store", store, "--no-site", path=(trouble,)
    )
    assert answer.code == 1, answer.err
    assert re.search(r"^failed: \S+/trouble/trouble~\w+/s0: budget: ", answer.err, re.MULTILINE)
    bad = [r for r in rows.read_table(out / "cells.parquet") if r["defense"].startswith("trouble/")]
    assert [r["status"] for r in bad] == ["timeout"]


def test_an_interrupted_run_goes_on(
    smoke: Any, sleeper: Any, nursery: Nursery, again: tuple[Path, Path], trouble: Path, clean_env: dict[str, str]
) -> None:
    """Interrupted while a defense works: code 130, everything done is kept, the same command finishes the rest."""
    out, store = again
    fifo = out.parent / "fifo"
    os.mkfifo(fifo)
    args = [
        *smoke.args,
        "--defense",
        "trouble/trouble",
        "--only",
        "*badnets*trouble*",
        "--out",
        out,
        "--store",
        store,
        "--no-site",
    ]
    args += ["--set", f'defense.trouble/trouble.path="{fifo}"', "--set", 'defense.trouble/trouble.mode="hang"']
    command = [sys.executable, "-m", "sleeperbench", *map(str, args)]
    env = clean_env | {"PYTHONPATH": os.pathsep.join([str(trouble), clean_env.get("PYTHONPATH", "")])}
    process = nursery.start(command, env)
    with fifo.open() as f:
        child = os.pidfd_open(int(f.read()))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    ended, _, _ = select.select([child], [], [], 10)
    os.close(child)
    assert ended  # a defense must not go on when its run is over
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads((out / "run.json").read_text())["exit"] == 130
    assert len(steady(out)[0]) == len(steady(smoke.out)[0])
    fifo.unlink()
    fifo.write_text("")  # now the defense answers at once
    answer = sleeper(*args, path=(trouble,))
    assert answer.code == 0, answer.err
    assert "computed 2 tasks" in answer.err
