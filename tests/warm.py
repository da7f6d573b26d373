"""Processes that find torch imported: one imports the libraries and nothing of this project, the others fork from it.

A run starts four interpreters (command, preflight, worker, fork server), which spend far more time on importing torch
than on the small suites of tests. Here each of them is still a process of its own, child of the one that starts it,
with its own arguments, environment, folder, descriptors, session and limits, and imports all of sleeperbench anew; the
libraries alone are there already. What a new interpreter would show in /proc, hash seeds, and what is left when these
prepared processes are used up (a worker or a fork server that replaces a lost one is a new interpreter) is not so.

The processes of pytest-xdist fork from it as well: to start one costs more on imports than most files on their tests.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LIBRARIES = ("torch", "torch._dynamo", "numpy", "pandas", "pyarrow.parquet", "safetensors.torch", "PIL.Image")
LIBRARIES += ("matplotlib.figure", "sklearn.datasets", "scipy.stats")
SPARES = {"sleeperbench": 5, "sleeperbench.engine.worker": 1}
"""Prepared children by module: the command's preflight and workers, a worker's fork server."""
LIMITS = (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)
BYTES, WIDTH = 1 << 20, 10
"""Of a request at most, and of a process number."""


# ---- the caller's side -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


class Process:
    """A started process, as far as tests use `subprocess.Popen`; it is no child of the caller."""

    def __init__(self, number: int, status: int, files: tuple[IO[bytes], ...]) -> None:
        self.pid, self._status, self._files = number, status, files
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = int(os.read(self._status, 100))
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to standard output and error, if that was kept."""
        self.wait(timeout)
        said = []
        for file in self._files:
            file.seek(0)
            said.append(file.read().decode())
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Nursery:
    """The process that has imported the libraries; started with the first process that is asked for.

    Args:
        env: What it is started with.
        address: Of a nursery that another process has opened, which is asked instead.
    """

    def __init__(self, env: Mapping[str, str], address: str = "") -> None:
        self.env = {k: v for k, v in env.items() if k != "PYTHONPATH"}  # each process has its own
        self.address = address
        self.line: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def open(self, address: str) -> None:
        """Let other processes ask too, until this one closes it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.bind(address)
            door.listen()
            self.line = self._begin(door.fileno())

    def _begin(self, *doors: int) -> socket.socket:
        from sleeperbench.engine.sandbox import MALLOC

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *map(str, (theirs.fileno(), *doors))],
                env=self.env | MALLOC | {"PYTHONHASHSEED": "0"},
                pass_fds=[theirs.fileno(), *doors],
                start_new_session=True,  # Ctrl-C is for the tests
            )
        return ours

    def _fork(self, argv: Sequence[str], env: Mapping[str, str], stdio: Sequence[int]) -> tuple[int, int]:
        """Its number, and a descriptor on which its exit code will stand."""
        if self.line is None and self.address:
            self.line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.line.connect(self.address)
        elif self.line is None:
            self.line = self._begin()
        ours, status = os.pipe()
        _ask(self.line, {"argv": list(argv), "env": dict(env), "cwd": os.getcwd()}, [*stdio, status])
        os.close(status)
        number = os.read(ours, WIDTH)
        assert number, "the nursery ended"
        return int(number), ours

    def start(self, argv: Sequence[str], env: Mapping[str, str], *, stderr: int | None = None) -> Process:
        """Start `python -m MODULE ...`, or `python -c CODE`, in a session of its own.

        Args:
            argv: As for subprocess, the interpreter first.
            env: Its whole environment.
            stderr: A descriptor; default: it is kept for `communicate`, as standard output is.
        """
        out, err = (open(os.memfd_create(name), "w+b") for name in ("out", "err"))  # noqa: SIM115
        with open(os.devnull, "rb") as null:
            stdio = [null.fileno(), out.fileno(), err.fileno() if stderr is None else stderr]
            return Process(*self._fork(argv, env, stdio), (out, err))

    def stand_in(self, argv: Sequence[str]) -> int:
        """Have `python ARGV ...` run with this process's environment and descriptors; returns its exit code."""
        process = Process(*self._fork([sys.executable, *argv], os.environ, (0, 1, 2)), ())
        for number in (signal.SIGINT, signal.SIGTERM):  # it leads a session of its own, where Ctrl-C does not come
            signal.signal(number, lambda number, _: os.kill(process.pid, number))
        return process.wait()

    def run(self, argv: Sequence[str], env: Mapping[str, str]) -> Answer:
        """Start it and wait for its end."""
        process = self.start(argv, env)
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Answer(process.wait(), out, err)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        if self.process is not None:
            self.process.wait()


def _ask(line: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    socket.send_fds(line, [json.dumps(request).encode()], fds)


# ---- the nursery's side ----------------------------------------------------------------------------------------------
def serve(line: socket.socket, *doors: socket.socket) -> dict[str, Any]:
    """Fork one process per request, each below a keeper that waits for it; returns in that process.

    Args:
        line: Of the process that has started this one, which ends with it.
        doors: Where others come in.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    lines = [line, *doors]
    while True:
        for ready in select.select(lines, [], [])[0]:
            if ready in doors:
                lines.append(ready.accept()[0])
                continue
            data, fds, _, _ = socket.recv_fds(ready, BYTES, 4)
            if not data and ready is line:
                os._exit(0)
            if not data:
                lines.remove(ready)
                ready.close()
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in lines:
                    one.close()
                *stdio, status = fds
                child = os.fork()
                if child == 0:
                    os.setsid()  # before its number is known, so that its group can be killed from the start
                    os.write(status, f"{os.getpid():{WIDTH}}".encode())
                    os.close(status)
                    return json.loads(data) | {"fds": stdio}
                for fd in stdio:
                    os.close(fd)
                _, code = os.waitpid(child, 0)
                with contextlib.suppress(BrokenPipeError):  # who asked has ended
                    os.write(status, str(os.waitstatus_to_exitcode(code)).encode())
                os._exit(0)
            for fd in fds:
                os.close(fd)


class Spare:
    """A child that waits to be told what to become."""

    def __init__(self) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        self.line.close()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it goes with its parent, used or not
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        data, fds, _, _ = socket.recv_fds(theirs, BYTES, 3)
        if not data:
            os._exit(0)
        request = json.loads(data) | {"fds": fds}
        if request["session"]:
            os.setsid()
        theirs.send(b"x")  # only now may its group be killed
        theirs.close()
        finish(request)


def finish(request: dict[str, Any]) -> None:
    """Become what was asked for and end as an interpreter does, but for taking itself apart: that copies all memory."""
    code = 1
    with contextlib.suppress(BaseException):
        code = _outcome(request)
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        atexit._run_exitfuncs()
    os._exit(code)


def _outcome(request: dict[str, Any]) -> int:
    """Exit code of the module, whose traceback is printed as the interpreter would."""
    try:
        become(request)
        code: Any = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code if isinstance(code, int) else int(code is not None)


class Prepared(subprocess.Popen):  # type: ignore[type-arg]
    """Popen that uses a spare for `python -m MODULE`, and starts a new interpreter for all else."""

    spares: list[Spare] = []

    def _execute_child(self, args: Any, executable: Any, preexec: Any, *rest: Any) -> None:
        _, keep, cwd, env, _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_ = rest
        if shell or keep or list(args[:2]) != [sys.executable, "-m"] or not self.spares:
            super()._execute_child(args, executable, preexec, *rest)  # type: ignore[misc]
            return
        spare = self.spares.pop()  # `preexec` asks to die with the parent, as spares have asked already
        for limit in LIMITS:
            resource.prlimit(spare.pid, limit, resource.getrlimit(limit))
        fds = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        request = {"argv": list(args), "env": dict(os.environ if env is None else env)}
        _ask(spare.line, request | {"cwd": str(cwd or os.getcwd()), "session": bool(rest[-2])}, fds)
        spare.line.recv(1)
        spare.line.close()
        self.pid, self._child_created = spare.pid, True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def become(request: dict[str, Any]) -> None:
    """Take over arguments, environment, folder and descriptors, and run the module or the code."""
    for own, fd in enumerate(request["fds"]):
        os.dup2(fd, own)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # a library may have asked for it before; it follows TMPDIR
    _, how, what, *words = request["argv"]
    sys.argv = [what if how == "-m" else how, *words]
    own_path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path = [request["cwd"] if how == "-m" else "", *own_path, *BASE]
    importlib.invalidate_caches()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False, buffering=1 if os.isatty(1) else -1)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    if how == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(what, vars(main))
        return
    Prepared.spares = [Spare() for _ in range(SPARES.get(what, 0))]
    subprocess.Popen = Prepared  # type: ignore[misc]
    runpy.run_module(what, run_name="__main__", alter_sys=True)


BASE = [p for p in sys.path if p != str(Path(__file__).parent)]

if __name__ == "__main__":
    first, *more = sys.argv[1:]
    if not first.isdecimal():  # `warm.py ADDRESS -u -c CODE`, in place of an interpreter
        sys.exit(Nursery({}, first).stand_in(more[more.index("-c") :]))
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    finish(serve(*(socket.socket(fileno=int(fd)) for fd in (first, *more))))
