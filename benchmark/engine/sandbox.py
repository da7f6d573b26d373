"""What a defense's process can reach: the level `process`, and bubblewrap for code that one does not trust.

Imports nothing but the standard library: the fork server and the command line use it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

LEVELS = ("process", "bwrap")
KEPT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "LD_LIBRARY_PATH",
)
"""All that the fork server, and so every child, has of the user's environment."""
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}
"""glibc keeps what a training step frees for the next one, instead of having the kernel clear every page again.

Processor seconds of a step at batch 256 and 28 x 28 pixels, small_cnn: 0.20 before (a quarter of it in the kernel),
0.15 with it; at 32 x 32, small_resnet and batch 128: 0.44 and 0.42. The peak memory was -3 to +5 %.
"""
_INSIDE = Path("/case")
_CAPABILITY_VERSION = 0x20080522


# ---- level `process` -------------------------------------------------------------------------------------------------
def environment() -> dict[str, str]:
    """What a fork server is started with: nothing that names a run, a store or an attack."""
    env = {k: os.environ[k] for k in KEPT if k in os.environ}
    # One order of sets in every process, and packages of the user's own site without their home.
    return env | MALLOC | {"PYTHONHASHSEED": "0", "PYTHONUSERBASE": site.getuserbase(), "PYTHONUNBUFFERED": "1"}


def drop_capabilities() -> None:
    """Let root be an ordinary owner of files and processes.

    Without this, root lists folders that nobody may list and reads the environment and memory of every process. Where
    it would hide a folder that Python imports from (one of another user, mounted into a container), nothing is dropped.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None)
    folders = [p for p in sys.path if os.path.isdir(p)]
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(header, data):
        return
    had = data[0], data[3]
    data[0] = data[3] = 0
    libc.capset(header, data)
    if not all(os.access(p, os.R_OK | os.X_OK, effective_ids=True) for p in folders):
        data[0], data[3] = had
        libc.capset(header, data)


# ---- level `bwrap` ---------------------------------------------------------------------------------------------------
def problem() -> str:
    """Why defenses cannot run inside bubblewrap here, and what helps; empty when they can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed; install it (`apt-get install bubblewrap`), or use --sandbox process"
    tried = subprocess.run([*_namespaces(), "--", "/usr/bin/env", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return (
            f"bubblewrap cannot make its namespaces here ({tried.stderr.strip()}); allow user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; for a container, a "
            "seccomp profile that admits them), or use --sandbox process"
        )
    return ""


@functools.cache
def _bwrap() -> tuple[str, bool]:
    """Path of bubblewrap, and whether it can forbid further user namespaces (0.8 on)."""
    path = shutil.which("bwrap") or "bwrap"
    said = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
    return path, "--disable-userns" in said.stdout + said.stderr


def _namespaces() -> list[str]:
    """Bubblewrap with every namespace, the system's programs and nothing else."""
    path, newer = _bwrap()
    command = [path, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "case", "--cap-drop", "ALL"]
    command += ["--disable-userns"] if newer else []
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            command += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        command += ["--ro-bind-try", name, name]
    return command


def code_folders() -> list[Path]:
    """Where Python and every package that a defense may import lie, without the folders that are inside another."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent}
    # The first entry is the folder that the command was typed in.
    found |= {Path(p).absolute() for p in (*sys.path[1:], *site.getsitepackages()) if p}
    modules = {"sleeperbench", "sleeperbench.data"}
    for kind in ("attacks", "defenses", "models"):  # an attack's code reads the backdoor that an oracle is given
        modules |= {e.module for e in entry_points(group=f"sleeperbench.{kind}")}
    found |= {f for m in modules for f in _sources(m)}
    kept: list[Path] = []
    for folder in sorted(found):
        inside = any(folder.is_relative_to(k) for k in (*kept, Path("/usr")))
        if folder.exists() and folder != Path("/") and not inside:
            kept.append(folder)
    return kept


def _sources(module: str) -> Iterable[Path]:
    """Folder or file of a module's package; an editable installation keeps it anywhere.

    Only `sleeperbench` itself is imported: its parts may lie apart, a foreign package is found by its first name.
    """
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(".".join(parts[:2]) if parts[0] == "sleeperbench" else parts[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(p).absolute() for p in spec.submodule_search_locations]
    return [Path(spec.origin).absolute()] if spec.origin and os.path.isfile(spec.origin) else []


def command(folder: Path, *, code: Iterable[Path], hidden: Iterable[Path], cuda: bool, share: float) -> list[str]:
    """The command line that runs `child` on a case inside bubblewrap.

    Args:
        folder: The case; its `in` is read-only.
        code: Folders that Python imports from.
        hidden: Folders to cover, should one lie inside those: the store, the run folder.
        cuda: Whether the devices of NVIDIA are needed.
        share: Share of the device's memory.
    """
    code = list(code)
    args = _namespaces()
    for path in code:
        args += ["--ro-bind", str(path), str(path)]
    for path in hidden:
        if any(path.is_relative_to(c) for c in (*code, Path("/usr"))) and path.is_dir():
            args += ["--tmpfs", str(path)]
    if cuda:
        for device in sorted(Path("/dev").glob("nvidia*")):
            args += ["--dev-bind", str(device), str(device)]
        args += ["--ro-bind-try", "/sys", "/sys"]
    args += ["--bind", str(folder), str(_INSIDE), "--ro-bind", str(folder / "in"), str(_INSIDE / "in")]
    scratch = str(_INSIDE / "scratch")
    env = {k: os.environ[k] for k in KEPT if k in os.environ}
    env |= {"HOME": scratch, "TMPDIR": scratch, "USER": "nobody", "LOGNAME": "nobody", "PATH": "/usr/bin:/bin"}
    env |= MALLOC | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in sorted(env.items()):
        args += ["--setenv", name, value]
    args += ["--chdir", scratch, "--", sys.executable, "-P", "-m", "sleeperbench.engine.child"]
    return [*args, str(_INSIDE), repr(share)]
