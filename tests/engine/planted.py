"""Plants a secret in one place after another, each in a child of its own, and says in which it was found."""

import functools
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import snoop
import torch

from sleeperbench.engine.sandbox import drop_capabilities


def text() -> str:
    """Put together anew each time, so that no code holds it."""
    return "-".join(["planted", "secret", "9f3b"])


def tensor() -> torch.Tensor:
    return torch.arange(64, dtype=torch.float32) * 1.7


def plant(place: str, folder: Path) -> object:
    """Leave the secret where `place` looks; returns what must stay alive."""
    file = folder / "secret.txt"
    if place == "environment":
        os.environ["LEAK"] = text()
    elif place == "descriptors":
        file.write_text(text())
        return os.open(file, os.O_RDONLY)
    elif place == "shared_memory":
        shared = Path("/dev/shm") / f"planted-{os.getpid()}"
        shared.write_text(text())
        return shared
    elif place == "modules":
        json.LEAK = {"a": tensor()}
    elif place == "caches":
        cached = functools.lru_cache(lambda: tensor())
        cached()
        return cached
    elif place == "threads":
        local = threading.local()
        local.secret = tensor()
        return local
    elif place == "logs":
        fd = os.open(folder / "sleeperbench-1" / "case" / "task.log", os.O_RDWR | os.O_CREAT)
        os.write(fd, text().encode())
        os.dup2(fd, 2)
    elif place == "temporary_folders":
        other = folder / "sleeperbench-1" / "case-other"
        other.mkdir()
        (other / "case.json").write_text(json.dumps({"attack": text()}))
    elif place == "the run's temporary folder":
        (folder / "left.json").write_text(json.dumps({"attack": text()}))
    elif place == "the machine's temporary folder":
        left = Path("/tmp") / f"sleeperbench-planted-{os.getpid()}"
        left.mkdir()
        (left / "case.json").write_text(json.dumps({"attack": text()}))
        return left
    elif place == "arguments":
        sys.argv.append(text())
    elif place == "working_folder":
        given = folder / "sleeperbench-1" / "case" / "in"
        given.mkdir()
        (given / "marks.json").write_text(json.dumps(text()))
    elif place == "objects":
        return [tensor()]
    return None


LOOKED = dict.fromkeys(["the run's temporary folder", "the machine's temporary folder"], "temporary_folders")
"""Further places, and the probe that has to look there."""


def found(place: str, folder: Path) -> bool:
    scratch = folder / "sleeperbench-1" / "case" / "scratch"  # as the engine lays it out
    scratch.mkdir(parents=True)
    os.chdir(scratch)
    os.environ |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
    tempfile.tempdir = None
    held = plant(place, folder)
    secret = tensor() if place == "frames" else None
    probe = snoop.PLACES[LOOKED.get(place, place)]
    try:
        there = probe() & {snoop.digest(text().encode()), snoop.digest(tensor().numpy().tobytes())}
    finally:
        if isinstance(held, Path):
            shutil.rmtree(held) if held.is_dir() else held.unlink()
    del secret
    return bool(there)


def main() -> None:
    drop_capabilities()  # as the engine's child does: other runs' cases on this machine cannot be listed
    answers = {}
    for place in [*snoop.PLACES, *LOOKED]:
        with tempfile.TemporaryDirectory() as folder:
            pid = os.fork()
            if pid == 0:
                os._exit(0 if found(place, Path(folder)) else 1)
            answers[place] = os.waitpid(pid, 0)[1] == 0
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
