"""A defense that looks everywhere for what it was not given, and answers with digests of all that it found."""

import contextlib
import functools
import gc
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sleeperbench import Access, Defense, Outcome

TOKEN = re.compile(r"[A-Za-z0-9_@-]{4,}")
BIG = 8 << 20


def digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def of_text(text: str) -> set[int]:
    return {digest(t.encode()) for t in set(TOKEN.findall(text))}


def of_array(a: np.ndarray) -> set[int]:
    found = {digest(a.tobytes())}
    if a.ndim > 1 and len(a) <= 5000 and a[:1].nbytes >= 64:
        found |= {digest(row.tobytes()) for row in a}
    return found


def of_value(value: object) -> set[int]:
    kind = type(value)  # isinstance would ask lazy modules for their class
    if kind is str:
        return of_text(value[:BIG])
    if kind in (bytes, bytearray):
        return of_text(bytes(value[:BIG]).decode("latin-1"))
    if kind is int:
        return of_text(str(value)) if abs(value) > 10**6 else set()
    if kind in (torch.Tensor, torch.nn.Parameter) and value.dtype is not torch.bfloat16 and not value.is_meta:
        return of_array(value.detach().cpu().contiguous().numpy())
    if kind is np.ndarray and value.dtype != object:
        return of_array(np.ascontiguousarray(value))
    return set()


KINDS = (str, bytes, bytearray, int, torch.Tensor, torch.nn.Parameter, np.ndarray)


def of_all(values: list[object]) -> set[int]:
    """Digests of everything in a list, each text and each object once."""
    texts, others = set(), {}
    for v in values:
        kind = type(v)
        if kind is str:
            texts.add(v)
        elif kind in KINDS:
            others[id(v)] = v
    return of_text("\n".join(texts)).union(*map(of_value, others.values()))


def of_file(path: Path | str) -> set[int]:
    found = of_text(str(path))
    with contextlib.suppress(OSError, ValueError, struct.error):
        if os.path.isfile(path) and os.path.getsize(path) <= BIG:
            data = Path(path).read_bytes()
            found |= of_text(data.decode("latin-1"))
            if str(path).endswith(".safetensors"):
                (n,) = struct.unpack("<Q", data[:8])
                kinds = {"F32": "f4", "F64": "f8", "I64": "i8", "U8": "u1", "BOOL": "?", "I32": "i4"}
                for about in json.loads(data[8 : 8 + n]).values():
                    if about.get("dtype") in kinds:
                        lo, hi = about["data_offsets"]
                        a = np.frombuffer(data[8 + n + lo : 8 + n + hi], kinds[about["dtype"]])
                        found |= of_array(a.reshape(about["shape"]))
    return found


def of_tree(path: Path | str) -> set[int]:
    found = set()
    for root, folders, files in os.walk(path):
        for name in [*folders, *files]:
            found |= of_file(os.path.join(root, name))
    return found


def of_reached(values: list[object], depth: int) -> set[int]:
    """Values and what they refer to, so many steps away."""
    seen, layer, kept = set(), values, []
    for _ in range(depth):
        following = []
        for v in layer:
            if id(v) not in seen:
                seen.add(id(v))
                kept.append(v)
                if type(v) not in (type, type(sys), *KINDS) and v is not sys.modules:
                    following += gc.get_referents(v)
        layer = following
    return of_all(kept)


def in_objects() -> set[int]:
    everything = gc.get_objects()
    return of_all(everything + gc.get_referents(*everything))


def in_frames() -> set[int]:
    values, frame = [], sys._getframe()
    while frame is not None:
        values += [v for v in frame.f_locals.values() if v is not values]
        frame = frame.f_back
    return of_reached(values, 3)


def in_working_folder() -> set[int]:
    here = Path.cwd()
    found = of_text(str(here)) | of_tree(here.parent)
    for folder in here.parents:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                found |= of_text(name)
    return found


def in_environment() -> set[int]:
    found = of_text(repr(dict(os.environ)))
    for pid in ("self", os.getppid()):
        found |= of_file(f"/proc/{pid}/environ") | _read(f"/proc/{pid}/environ")
    return found


def in_descriptors() -> set[int]:
    found = set()
    for pid in ("self", os.getppid()):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    path = f"/proc/{pid}/fd/{fd}"
                    target = os.readlink(path)
                    found |= of_text(target)
                    found |= of_file(target) if target.startswith("/") else set()
    return found


def in_shared_memory() -> set[int]:
    return of_tree("/dev/shm")


def in_modules() -> set[int]:
    return of_reached([vars(m) for m in list(sys.modules.values()) if type(m) is type(sys)], 3)


def in_caches() -> set[int]:
    wrappers = [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]
    found = of_reached(gc.get_referents(*wrappers), 3)
    for name, value in os.environ.items():
        if name.startswith("SLEEPERBENCH"):
            found |= of_tree(value)
    return found | of_tree(Path("~/.cache").expanduser())


def in_threads() -> set[int]:
    found = of_all([v for f in sys._current_frames().values() for v in f.f_locals.values()])
    found |= of_reached([vars(t) for t in threading.enumerate()], 3)
    return found | of_reached([o.__dict__ for o in gc.get_objects() if type(o) is threading.local], 4)


def in_logs() -> set[int]:
    found = set()
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            found |= of_text(target)
            found |= of_file(target) if target.startswith("/") else set()
    here = Path.cwd()
    for folder in (here, *here.parents):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                found |= of_file(folder / name) if name.endswith(".log") else set()
    return found


def in_temporary_folders() -> set[int]:
    cases = Path.cwd().parent.parent  # where other cases would lie, below the run's own temporary folder
    found = of_tree(tempfile.gettempdir()) | of_tree(cases.parent)
    for folder in {"/tmp", "/var/tmp"}:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                # `sleeperbench check` works in folders of its own, of which other tests make many meanwhile.
                checks = name.startswith("sleeperbench-check-")
                if name.startswith(("case-", "sleeperbench-", "attack-", "evaluate-")) and not checks:
                    found |= of_tree(os.path.join(folder, name)) | of_text(name)
    return found


def in_arguments() -> set[int]:
    found = of_text(repr(sys.argv) + repr(sys.orig_argv))
    for pid in ("self", os.getppid()):
        found |= _read(f"/proc/{pid}/cmdline")
    for file in Path.cwd().parent.rglob("*.json"):
        found |= of_file(file)
    return found


def _read(path: str) -> set[int]:
    with contextlib.suppress(OSError):
        return of_text(Path(path).read_bytes().decode("latin-1"))
    return set()


PLACES = {
    "objects": in_objects,
    "frames": in_frames,
    "working_folder": in_working_folder,
    "environment": in_environment,
    "descriptors": in_descriptors,
    "shared_memory": in_shared_memory,
    "modules": in_modules,
    "caches": in_caches,
    "threads": in_threads,
    "logs": in_logs,
    "temporary_folders": in_temporary_folders,
    "arguments": in_arguments,
}


def look(*places: str) -> tuple[dict[str, torch.Tensor], None]:
    return {n: torch.tensor(sorted(PLACES[n]()), dtype=torch.int64) for n in places}, None


@dataclass(frozen=True, kw_only=True)
class Snoop(Defense):
    """Opens all that it was given, then looks around."""

    INFO = {"title": "Snoop", "version": 1, "api": 1, "kind": "repair", "paper": "", "micro": {}}
    ACCESS = Access(clean=0.05)

    def run(self, case):
        given = case.net, case.clean, case.tune, case.val
        found = look(*PLACES)
        return Outcome(state=found, chosen={"given": len(given)})


@dataclass(frozen=True, kw_only=True)
class Oracle(Defense):
    """Is given the backdoor, so it must find it."""

    INFO = {"title": "Oracle", "version": 1, "api": 1, "kind": "repair", "paper": "", "micro": {}}
    ACCESS = Access(clean=0, oracle=True)

    def run(self, case):
        held = case.oracle
        found = look("objects", "frames", "working_folder")
        return Outcome(state=found, chosen={"given": len(held.triggers)})
