"""Level `process`: a defense that looks in twelve places finds nothing that it was not given."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import planted
import plugins
import pytest
import snoop
from safetensors.torch import load_file
from warm import Nursery

from sleeperbench.engine.casefiles import make_cases, remove_cases, renew_cases

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Looked:
    found: dict[str, set[int]]
    """Place -> digests of what `Snoop` came upon."""
    oracle: dict[str, set[int]]
    words: dict[str, str]
    """What may not be found, as text: what it is -> word."""
    tensors: dict[str, set[int]]
    """Likewise, digests of tensors and of their rows."""


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory, cold: Callable) -> Looked:
    folder = tmp_path_factory.mktemp("leaks")
    dist = plugins.install(
        folder,
        "snoop",
        "1.0",
        {"snoop.py": (HERE / "snoop.py").read_text(encoding="utf-8")},
        {"sleeperbench.defenses": {"snoop": "snoop:Snoop", "oracle": "snoop:Oracle"}},
    )
    out, store = folder / "runofthisleak", folder / "storeofthisleak"
    temporary = tmp_path_factory.mktemp("temporary")  # of this run alone, so that all of it can be looked through
    (temporary / "markofthisleak").touch()
    answer = cold(
        # A seed and a pattern of this test's own: other runs on this machine may lie in the same places.
        *(
            "run",
            "smoke",
            "--seeds",
            73101,
            "--set",
            "attack.badnets.pattern='random'",
            "--set",
            "attack.badnets.size=5",
        ),
        *("--set", "train.epochs=1", "--attack", "badnets", "--jobs", 1, "--device", "cpu"),
        *("--defense", "snoop/snoop", "--defense", "snoop/oracle", "--evaluator", "accuracy"),
        *("--only", "*/badnets*/snoop/*", "--keep-unimplanted", "--no-site", "--out", out, "--store", store),
        path=(dist,),
        before=("env", f"TMPDIR={temporary}"),
    )
    assert answer.code == 0, answer.err
    tasks = {}
    for file in store.rglob("manifest.json"):
        manifest = json.loads(file.read_text())
        tasks[manifest["key"]] = manifest["task"] | {"folder": file.parent}
    attack_key, attack = next((k, t) for k, t in tasks.items() if t["name"] == "badnets")
    found = {}
    for key, task in tasks.items():
        if task["kind"] == "defense" and task["inputs"].get("attack") == attack_key and "snoop" in task["name"]:
            state = load_file(task["folder"] / "outcome.safetensors")
            found[task["name"]] = key, {n.removeprefix("state."): set(t.tolist()) for n, t in state.items()}
    key, places = found["snoop/snoop"]
    words = {
        "key of the attack": attack_key,
        "key of the task": key,
        "seed of the attack": str(attack["seed"]),
        "run folder": out.name,
        "store": store.name,
        "attack": "badnets",
    }
    trigger = load_file(attack["folder"] / "backdoor.safetensors")
    rows = load_file(attack["folder"] / "set.safetensors")
    shown = load_file(attack["folder"] / "bd_test.safetensors")["images"]
    tensors = {
        "trigger": {d for t in trigger.values() for d in snoop.of_value(t)},
        "poison marks": snoop.of_value(rows["mark"]) | snoop.of_value(rows["ids"]) | snoop.of_value(rows["images"]),
        "triggered test images": snoop.of_value(shown),
    }
    return Looked(places, found["snoop/oracle"][1], words, tensors)


@pytest.mark.parametrize("place", snoop.PLACES)
def test_nothing_is_found(looked: Looked, place: str) -> None:
    found = looked.found[place]
    words = [what for what, word in looked.words.items() if snoop.of_text(word) & found]
    if place in ("shared_memory", "temporary_folders") and "attack" in words:
        words.remove("attack")  # a word that another run's or another test's files may hold; keys and seeds are ours
    assert words == []
    assert [what for what, digests in looked.tensors.items() if digests & found] == []


def test_what_was_given_is_found(looked: Looked) -> None:
    """The probes look in the right process: they see their own case, and an oracle's trigger."""
    assert all(len(looked.found[p]) > 3 for p in ("objects", "frames", "modules", "arguments", "environment"))
    assert snoop.of_text("scratch") <= looked.found["working_folder"]
    assert snoop.of_text("markofthisleak") <= looked.found["temporary_folders"]
    for place in ("objects", "frames", "working_folder"):
        assert looked.tensors["trigger"] & looked.oracle[place], place


def test_every_probe_finds_what_is_planted(nursery: Nursery) -> None:
    done = nursery.run([sys.executable, "-m", "planted"], os.environ | {"PYTHONPATH": str(HERE)})
    assert done.code == 0, done.err
    assert json.loads(done.out) == dict.fromkeys([*snoop.PLACES, *planted.LOOKED], True)


def _job(case: Path, **more: object) -> bytes:
    job = {"folder": str(case), "seconds": 60, "memory": 0, "cuda": False, "share": 1.0}
    return json.dumps(job | {"file_bytes": 1 << 30, "command": None} | more).encode() + b"\n"


def test_a_folder_of_cases_that_was_tidied_away_comes_back(tmp_path: Path) -> None:
    base = make_cases()
    try:
        base.chmod(0o700)
        base.rmdir()
        renew_cases(base)
        assert stat.S_IMODE(base.stat().st_mode) == 0o300
        renew_cases(base)
    finally:
        remove_cases(base)
    base.symlink_to(tmp_path)
    try:
        with pytest.raises(PermissionError, match="taken by another user"):
            renew_cases(base)
    finally:
        base.unlink()


def test_another_case_cannot_be_come_upon() -> None:
    """The folder of all cases can be entered and not listed, also by root, which drops what lets it."""
    base = make_cases()
    code = (
        "import os, sys; from sleeperbench.engine.sandbox import drop_capabilities; b = sys.argv[1]\n"
        "def names():\n"
        "    try: return os.listdir(b)\n"
        "    except PermissionError: return None\n"
        "before = names(); drop_capabilities()\n"
        "print([before, names(), os.path.isfile(b + '/case-other/trigger')])"
    )
    try:
        (base / "case-other").mkdir()
        (base / "case-other" / "trigger").write_text("secret")
        done = subprocess.run([sys.executable, "-c", code, base], capture_output=True, text=True, check=True)
    finally:
        remove_cases(base)
    before, after, entered = json.loads(done.stdout.replace("None", "null").replace("'", '"').replace("True", "true"))
    assert (after, entered) == (None, True)
    assert before == (["case-other"] if os.geteuid() == 0 else None)
    assert not base.exists()
