"""Whatever a user can get wrong ends with one message that says what, where and how to mend it, and code 2 or 3."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import plugins
import pytest

from sleeperbench.engine.rows import read_table

ROOT = Path(__file__).parents[2]

# What stands in the suite file, and words of the message.
FILES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "not toml": ({"tail": "[train\n"}, ("not valid TOML", "tiny.toml", "line")),
    "top-level key": ({"head": "schema = 1\nseed = 3\n"}, ("unknown key `seed`", "did you mean `secret`")),
    "key in matrix": ({"head": "schema = 1\n", "attack": ["x"]}, ("`attack` in [matrix]", "`attacks`")),
    "key in train": ({"tail": "[train]\nepoch = 3\n"}, ("`epoch` in [train]", "did you mean `epochs`")),
    "key in access": ({"tail": "[access]\nclen = 3\n"}, ("`clen` in [access]", "did you mean `clean`")),
    "key in budget": ({"tail": "[budget]\nthread = 1\n"}, ("`thread` in [budget]", "did you mean `threads`")),
    "key in gate": ({"tail": "[gate]\nimplant = 1\n"}, ("`implant` in [gate]", "implant_asr")),
    "key in dataset": ({"tail": "[dataset.digits]\ntrian = 5\n"}, ("`trian` in [dataset.digits]", "`train`")),
    "key in attack": ({"tail": "[attack.badnets]\nsise = 5\n"}, ("no parameter `sise`", "did you mean `size`")),
    "key in defense": ({"tail": "[defense.ft]\nstep = 5\n"}, ("no parameter `step`", "`steps`")),
    "table of unknown attack": ({"tail": "[attack.badnet]\nsize = 5\n"}, ("no attack `badnet`", "`badnets`")),
    "table of unknown model": ({"tail": "[model.small_cn]\nwidth = 5\n"}, ("no model `small_cn`", "`small_cnn`")),
    "table of unknown data": ({"tail": "[dataset.digit]\ntrain = 5\n"}, ("no dataset `digit`", "`digits`")),
    "schema": ({"head": "schema = 2\n"}, ("schema = 2", "reads schema = 1")),
    "schema of wrong type": ({"head": "schema = true\n"}, ("schema = true",)),
    "no schema": ({"head": 'name = "x"\n'}, ("schema = null", "reads schema = 1")),
    "name": ({"head": 'schema = 1\nname = "../x"\n'}, ("name =", "letters")),
    "name of wrong type": ({"head": "schema = 1\nname = 3\n"}, ("name = 3", "quotes")),
    "attack": ({"attacks": ["badnet"]}, ("no attack `badnet`", "did you mean `badnets`")),
    "defense": ({"defenses": ["ftt"]}, ("no defense `ftt`", "did you mean `ft`")),
    "evaluator": ({"evaluators": ["accurcy"]}, ("no evaluator `accurcy`", "did you mean `accuracy`")),
    "model": ({"archs": ["smal_cnn"]}, ("no model `smal_cnn`", "did you mean `small_cnn`")),
    "data set": ({"datasets": ["digitz"]}, ("no dataset `digitz`", "did you mean `digits`")),
    "no wrapper": ({"defenses": ["ft:none"]}, ("`ft` in `ft:none` is no wrapper",)),
    "rate 0": ({"rates": [0]}, ("rate 0 ", "clean models are attack `none`")),
    "rate 1.5": ({"rates": [1.5]}, ("rate 1.5",)),
    "rate of wrong type": ({"rates": ["x"]}, ('rates holds "x"', "float")),
    "rates with equal names": ({"rates": [0.1, 0.1000000001]}, ("rates names 0.1 twice",)),
    "seed -1": ({"seeds": [-1]}, ("seed -1 is negative",)),
    "seed of wrong type": ({"seeds": [0.5]}, ("seeds holds 0.5", "int")),
    "seed twice": ({"seeds": [1, 1]}, ("seeds names 1 twice",)),
    "epochs 0": ({"tail": "[train]\nepochs = 0\n"}, ("epochs = 0 is outside 1",)),
    "lr": ({"tail": '[train]\nlr = "x"\n'}, ('lr = "x" is not float',)),
    "lr nan": ({"tail": "[train]\nlr = nan\n"}, ("lr = nan is outside",)),
    "bool for int": ({"tail": "[train]\nepochs = true\n"}, ("epochs = true is not int",)),
    "int for bool": ({"tail": "[train]\nflip = 1\n"}, ("flip = 1 is not bool",)),
    "date": ({"tail": "[train]\nepochs = 1979-05-27\n"}, ("epochs =", "is not int")),
    "recipe": ({"tail": '[train]\nrecipe = "s4"\n'}, ('recipe = "s4"', "did you mean `s3`")),
    "schedule": ({"tail": '[train]\nschedule = "cosin"\n'}, ("did you mean `cosine`",)),
    "clean 1.0": ({"tail": "[access]\nclean = 1.0\n"}, ("clean = 1.0", "share between 0 and 1")),
    "threads 0": ({"tail": "[budget]\nthreads = 0\n"}, ("threads = 0 is outside 1",)),
    "rows 0": ({"tail": "[dataset.digits]\ntrain = 0\n"}, ("train = 0",)),
    "rows of wrong type": ({"tail": "[dataset.digits]\ntrain = true\n"}, ("train = true is not int",)),
    "too many rows": ({"tail": "[dataset.digits]\ntrain = 9999\n"}, ("train = 9999, but there are",)),
    "parameter of wrong type": ({"tail": '[attack.badnets]\nsize = "x"\n'}, ("`size` is 'x'", "int")),
    "bool for an int parameter": ({"tail": "[attack.badnets]\nsize = true\n"}, ("`size` is True", "int")),
    "unknown choice": ({"tail": '[attack.badnets]\ncorner = "left"\n'}, ("`corner` is 'left'", "upper_left")),
    "empty sweep": ({"tail": "[attack.badnets]\nsize = []\n"}, ("size = [] sweeps over nothing",)),
    "sweep with a double": ({"tail": "[attack.badnets]\nsize = [3, 3]\n"}, ("same parameters twice",)),
    "sweep of an evaluator": ({"tail": "[evaluator.accuracy]\nx = 1\n"}, ("no parameter `x`",)),
    "table that is none": ({"head": "schema = 1\ntrain = 3\n"}, ("`train` must be a table",)),
    "kind that is no table": ({"head": "schema = 1\nattack = 3\n"}, ("`attack` must hold tables",)),
    "plugin that is no table": ({"tail": "[defense]\nft = 3\n"}, ("`defense.ft` must be a table",)),
    "data set that is no table": ({"tail": "[dataset]\ndigits = 3\n"}, ("`dataset.digits` must be a table",)),
    "list that is none": ({"head": "schema = 1\n", "seeds": 3}, ("seeds = 3 is not list",)),
    **{f"empty {k}": ({k: []}, (f"[matrix] {k} is empty", "name at least one")) for k in ("attacks", "seeds", "rates")},
    "missing list": ({"attacks": None}, ("[matrix] attacks is missing",)),
}

# Flags of `run smoke`, and words of the message.
FLAGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "--attack": (["--attack", "badnet"], ("no attack `badnet`", "did you mean `badnets`")),
    "--defense": (["--defense", "ftt"], ("no defense `ftt`", "did you mean `ft`")),
    "--evaluator": (["--evaluator", "stealt"], ("no evaluator `stealt`", "did you mean `stealth`")),
    "--arch": (["--arch", "smal_cnn"], ("no model `smal_cnn`", "`small_cnn`")),
    "--dataset": (["--dataset", "digitz"], ("no dataset `digitz`", "`digits`")),
    "--rate": (["--rate", "1.5"], ("rate 1.5",)),
    "--rate nan": (["--rate", "nan"], ("rate nan",)),
    "--seeds": (["--seeds", "a"], ("--seeds a", "whole numbers")),
    "--seeds without one": (["--seeds", ","], ("--seeds ,", "whole numbers")),
    "--seeds -1": (["--seeds=-1"], ("seed -1 is negative",)),
    "--timeout": (["--timeout", "-3"], ("--timeout", "outside")),
    "--set without value": (["--set", "defense.ft.lr"], ("--set defense.ft.lr", "KIND.ID.KEY=VALUE")),
    "--set without key": (["--set", "defense.ft=3"], ("--set defense.ft=3", "KIND.ID.KEY=VALUE")),
    "--set below a value": (["--set", "name.x=1"], ("`name` is no table",)),
    "--set of an unknown parameter": (["--set", "defense.ft.stps=3"], ("no parameter `stps`", "`steps`")),
    "--set of a wrong type": (["--set", "attack.badnets.size=big"], ("`size` is 'big'",)),
    "--set of an unknown plugin": (["--set", "attack.badnet.size=3"], ("no attack `badnet`",)),
    "--set of an unknown table": (["--set", "trian.lr=3"], ("unknown key `trian`", "did you mean `train`")),
    "--only": (["--only", "*/nothing/*"], ("--only */nothing/*", "known")),
    "--jobs 0": (["--jobs", "0"], ("--jobs 0", "at least 1")),
    "--jobs": (["--jobs", "4096", "--device", "cpu"], ("--jobs 4096", "cores")),
    "--device": (["--device", "tpu"], ("--device tpu", "auto, cpu, cuda")),
}


def refused(answer: Any, *words: str, code: int = 2) -> str:
    """The one message of a refusal."""
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    (message,) = answer.err.splitlines()
    assert answer.out == ""
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("case", FILES)
def test_suite_file(case: str, cli: Any, suite_file: Any, tmp_path: Path) -> None:
    parts, words = FILES[case]
    refused(cli("run", suite_file(**parts), "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, cli: Any, tmp_path: Path) -> None:
    flags, words = FLAGS[case]
    refused(cli("run", "smoke", *flags, "--out", tmp_path / "out"), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:0,1"])
def test_no_gpu(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    import sleeperbench.cli.run as module

    monkeypatch.setattr(module, "_gpus", lambda: 0)
    refused(cli("run", "smoke", "--device", device, "--out", tmp_path / "o"), f"--device {device}", "--device cpu")
    monkeypatch.setattr(module, "_gpus", lambda: 2)
    assert module.devices("cuda:0,1", None, 1) == ["cuda:0", "cuda:1"]
    refused(cli("run", "smoke", "--device", "cuda:x", "--out", tmp_path / "o"), "no CUDA device x")
    refused(cli("run", "smoke", "--device", "cuda:2", "--out", tmp_path / "o"), "there are 0 to 1")


def test_unknown_suite_and_missing_file(cli: Any, tmp_path: Path) -> None:
    refused(cli("run", "smok"), "no suite `smok`", "did you mean `smoke`")
    refused(cli("run", tmp_path / "none.toml"), "cannot read the suite file", "none.toml")
    refused(cli("run", tmp_path.with_suffix(".toml") / "x.toml"), "cannot read the suite file")


def test_usage(cli: Any) -> None:
    for argv in ([], ["run"], ["nothing"], ["run", "smoke", "--nothing"], ["run", "smoke", "--only-stage", "x"]):
        answer = cli(*argv)
        assert (answer.code, answer.out) == (2, "")
        assert "usage: sleeperbench" in answer.err


def test_missing_data_name_the_command_that_gets_them(cli: Any, tmp_path: Path) -> None:
    answer = cli("run", "smoke", "--dataset", "cifar10", "--out", tmp_path / "out")
    refused(answer, "no data for `cifar10`", "sleeperbench data get cifar10")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_found_before_anything_is_trained(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", "smoke", "--dry-run").code == 0
    cache = tmp_path / "cache"
    shutil.copytree(os.environ["SLEEPERBENCH_CACHE"], cache)
    monkeypatch.setenv("SLEEPERBENCH_CACHE", str(cache))
    (file,) = cache.glob("digits-*/train.images.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    answer = cli("run", "smoke", "--out", tmp_path / "out")
    refused(answer, "train.images.npy is damaged", "sleeperbench data get digits --again")
    assert not (tmp_path / "out").exists()
    assert cli("data", "get", "digits", "--again").code == 0
    assert cli("run", "smoke", "--dry-run").code == 0


def test_folders_that_cannot_be_written(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "x"
    refused(cli("run", "smoke", "--out", below, "--store", tmp_path / "store"), "cannot write the run folder", "--out")
    refused(cli("run", "smoke", "--out", tmp_path / "out", "--store", below), "cannot write the store", "--store")
    refused(
        cli("run", "smoke", "--out", tmp_path / "file", "--store", tmp_path / "store"), "cannot write the run folder"
    )
    assert (tmp_path / "file").read_text() == "x"


def in_tmpfs(folder: Path, options: str) -> tuple[str, ...]:
    """A command prefix that mounts a file system of its own; skips where that is not permitted."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o {options} none {folder} && exec "$@"'
    before = ("unshare", "-rm", "sh", "-c", mount, "sh")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*before, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting is not permitted here")
    return before


def test_read_only_folders(cold: Any, smoke: Any, tmp_path: Path) -> None:
    before = in_tmpfs(tmp_path / "ro", "ro")
    answer = cold(*smoke.args, "--out", tmp_path / "ro" / "out", "--store", smoke.store, before=before)
    refused(answer, "cannot write the run folder", "Read-only file system", "--out")


def test_a_full_disk(cold: Any, smoke: Any, tmp_path: Path) -> None:
    before = in_tmpfs(tmp_path / "small", "size=24k")
    answer = cold(*smoke.args, "--out", tmp_path / "small" / "out", "--store", smoke.store, before=before)
    refused(answer, "cannot write the run folder", "No space left on device")


def test_a_full_store(cold: Any, smoke: Any, tmp_path: Path) -> None:
    """The worker that cannot write a model says so, and the run ends instead of calling its cells failed."""
    before = in_tmpfs(tmp_path / "small", "size=96k")
    args = (*smoke.args, "--set", "train.epochs=1", "--only", "*/none@0/none/*")
    answer = cold(*args, "--out", tmp_path / "out", "--store", tmp_path / "small" / "store", before=before)
    assert answer.code == 2, answer.err
    assert "cannot write the store" in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err


def test_a_locked_run_folder_names_its_holder(cli: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sleeperbench.engine.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        held = json.loads((out / ".lock").read_text())
        message = refused(cli("run", "smoke", "--out", out))
        assert f"locked by pid {holder.pid} on {held['host']} since {held['since']}" in message
        refused(cli("merge", out, "--out", out))
        holder.communicate()
    (out / ".lock").write_text("[]")  # whatever stands in it: a free lock is free
    from sleeperbench.engine.lock import locked

    with locked(out):
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()


def test_a_patch_larger_than_the_image_is_refused_before_training(sleeper: Any, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    answer = sleeper("run", "smoke", "--set", "attack.badnets.size=40", "--out", out, "--store", store)
    refused(answer, "attack `badnets`", "40 pixels", "16x16", "sizes 1 to 16 fit")
    assert not (out / "tasks.jsonl").exists()
    assert not list(store.rglob("manifest.json"))


def test_an_attack_that_fits_one_data_set_of_two_declines_on_the_other(sleeper: Any, tmp_path: Path) -> None:
    """CTRL needs colour: its cell on grey digits says so, and the suite runs on. So does that of a rate of no row."""
    rng = np.random.default_rng(0)
    colour = tmp_path / "data" / "cifar10"
    colour.mkdir(parents=True)
    for split, n in (("train", 400), ("test", 60)):
        images = rng.integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
        np.savez(colour / f"{split}.npz", images=images, labels=np.arange(n) % 10)
    file = tmp_path / "two.toml"
    file.write_text(
        'schema = 1\nname = "two"\n[matrix]\ndatasets = ["digits", "cifar10"]\narchs = ["small_cnn"]\n'
        'attacks = ["none", "ctrl"]\nrates = [0.05, 0.001]\ndefenses = ["none"]\nseeds = [0]\n'
        "[train]\nepochs = 1\n"
    )
    answer = sleeper(
        *("run", file, "--out", tmp_path / "out", "--store", tmp_path / "store", "--no-site"),
        SLEEPERBENCH_DATA=str(tmp_path / "data"),
    )
    assert answer.code == 0, answer.err
    cells = {c["cell"]: c for c in read_table(tmp_path / "out" / "cells.parquet")}
    grey, colours = (cells[f"{name}/small_cnn/ctrl@0.05/none/s0"] for name in ("digits", "cifar10"))
    assert grey["status"] == "not_applicable"
    assert "does_not_fit" in grey["reason"]
    assert "needs colour images" in grey["reason"]
    assert colours["status"] == "ok"
    faint = cells["cifar10/small_cnn/ctrl@0.001/none/s0"]
    assert (
        faint["status"] == "not_applicable" and "poison rate 0.001" in faint["reason"] and "no row" in faint["reason"]
    )
    refused(
        sleeper("run", file, "--dataset", "digits", "--out", tmp_path / "one", "--store", tmp_path / "store"),
        *("attack `ctrl`", "needs colour images"),
    )


BROKEN = {
    "raises": "raise RuntimeError('bad day')\n",
    "exits": "import sys\nsys.exit(0)\n",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_plugin_that_fails_to_import(sleeper: Any, smoke: Any, tmp_path: Path, how: str) -> None:
    source = plugins.GENTLE + BROKEN[how]
    entries = {"sleeperbench.defenses": {"gentle": "gentle:Gentle"}}
    path = (plugins.install(tmp_path, "gentle", "1.0", {"gentle.py": source}, entries),)
    args = (*smoke.args, "--store", shutil.copytree(smoke.store, tmp_path / "store"))
    answer = sleeper(*args, "--out", tmp_path / "out", "--defense", "gentle/gentle", path=path)
    refused(answer, "gentle/gentle", code=3)
    assert not (tmp_path / "out" / "tasks.jsonl").exists()
    unused = sleeper(*args, "--no-site", "--out", tmp_path / "unused", path=path)
    assert unused.code == 0, unused.err
    assert "computed 0 tasks" in unused.err


def test_tables_of_commands_that_read_runs(cli: Any, tmp_path: Path) -> None:
    refused(cli("show", "x/y/z@0/none/s0", "--results", tmp_path), "cannot read the table", str(tmp_path))
    refused(cli("merge", tmp_path, "--out", tmp_path / "all"), "no finished run folder", str(tmp_path))
    (tmp_path / "run.json").write_text('{"protocol": 1, "counts": {}}')
    refused(cli("merge", tmp_path, "--out", tmp_path / "all"), "plugins.json")
    assert not (tmp_path / "all").exists()


def test_run_benchmark_without_an_installation(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-I", str(ROOT / "run_benchmark.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install -e ." in done.stderr
