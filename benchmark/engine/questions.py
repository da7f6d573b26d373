"""Query-only models: a desk in the trusted process answers through a socket in the case's folder and counts the images.

The defense's process holds no weights: it can only send images. The count is the desk's, not the defense's own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sleeperbench.contracts.context import Cost
from sleeperbench.contracts.models import ModelSpec

SOCKET = "ask"
BATCH = 512
"""Images a desk answers at a time, whatever the defense sends."""
_COUNT = struct.Struct("<I")


def queried(access: Mapping[str, Any]) -> bool:
    """Whether a defense with this access may only ask the model."""
    return access["model"] in ("labels", "scores")


class Asked:
    """The model as a query-only defense has it.

    Args:
        path: The desk's socket.
        spec: Input shape and number of classes.
        labels: Whether answers are labels, or else softmax scores.
        cost: Where images are counted on this side, for the method's own reading.
    """

    def __init__(self, path: Path, spec: ModelSpec, labels: bool, cost: Cost) -> None:
        self._spec, self._labels, self._cost = spec, labels, cost
        self._desk = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._desk.connect(str(path))

    def __call__(self, x: Tensor) -> Tensor:
        """Labels int64 (N,) or scores float32 (N, K), on x's device.

        Args:
            x: float32 (N, C, H, W) in [0, 1].

        Raises:
            ValueError: other shapes, or pixels outside [0, 1].
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(self._spec.shape) or not x.is_floating_point():
            raise ValueError(f"a query is float (N, {', '.join(map(str, self._spec.shape))}), not {tuple(x.shape)}")
        if len(x) and not (float(x.min()) >= -1e-6 and float(x.max()) <= 1 + 1e-6):
            raise ValueError("the pixels of a query are outside [0, 1]: clamp them first")
        parts = [self._ask(part) for part in x.detach().float().cpu().contiguous().split(BATCH)]
        return torch.cat(parts).to(x.device)

    def _ask(self, x: Tensor) -> Tensor:
        n, k = len(x), self._spec.classes
        if not n:
            return torch.zeros(0, dtype=torch.int64) if self._labels else torch.zeros(0, k)
        self._desk.sendall(_COUNT.pack(n) + x.numpy().tobytes())
        self._cost.queries += n
        data = _receive(self._desk, 8 * n if self._labels else 4 * n * k)
        if data is None:
            raise ConnectionError("the model answers no more queries")
        if self._labels:
            return torch.frombuffer(data, dtype=torch.int64)
        return torch.frombuffer(data, dtype=torch.float32).view(n, k)


class Desk:
    """Answers queries about one model as long as it is open.

    Args:
        folder: Where the socket is put.
        net: The classifier, in eval mode.
        spec: Its shape and classes.
        labels: Whether to answer labels, or else softmax scores.
    """

    def __init__(self, folder: Path, net: torch.nn.Module, spec: ModelSpec, labels: bool) -> None:
        self.queries = 0
        self._net, self._spec, self._labels = net.eval(), spec, labels
        self._device = next(net.parameters()).device
        self._open: list[socket.socket] = []
        self._one = threading.Lock()
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(str(folder / SOCKET))
        os.chmod(folder / SOCKET, 0o600)
        self._door.listen(4)
        self._thread = threading.Thread(target=self._serve, name="desk", daemon=True)
        self._thread.start()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Answer nobody any more."""
        for s in (self._door, *self._open):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._door.accept()
            except OSError:  # closed
                return
            self._open.append(visitor)
            threading.Thread(target=self._attend, args=(visitor,), name="desk", daemon=True).start()

    def _attend(self, visitor: socket.socket) -> None:
        # What a defense sends is not to be trusted; one that breaks the form is not answered further.
        with visitor, contextlib.suppress(OSError, ValueError):
            while self._answer(visitor):
                pass

    def _answer(self, visitor: socket.socket) -> bool:
        head = _receive(visitor, _COUNT.size)
        if head is None:
            return False
        (n,) = _COUNT.unpack(head)
        if not 0 < n <= BATCH:
            raise ValueError(f"{n} images in one query")
        c, h, w = self._spec.shape
        data = _receive(visitor, 4 * n * c * h * w)
        if data is None:
            return False
        x = torch.frombuffer(data, dtype=torch.float32).view(n, c, h, w)
        with self._one, torch.no_grad():
            self.queries += n
            logits = self._net(x.nan_to_num(0.0).clamp(0, 1).to(self._device)).float()
        answer = logits.argmax(1) if self._labels else logits.softmax(1)
        visitor.sendall(answer.cpu().contiguous().numpy().tobytes())
        return True


def _receive(s: socket.socket, size: int) -> bytearray | None:
    """Exactly so many bytes; None at the end of the stream."""
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        n = s.recv_into(view[got:])
        if not n:
            return None
        got += n
    return data
