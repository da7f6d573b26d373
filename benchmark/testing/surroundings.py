"""What belongs to the whole process and to no method: read before a run, compared and put back after it."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

from sleeperbench.testing.differ import differ


def look() -> dict[str, Any]:
    """The state of the process, by name."""
    name, keys, *rest = np.random.get_state()
    version, words, *more = random.getstate()
    return {
        "torch's global generator": torch.get_rng_state(),
        "numpy's global generator": (str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "random's global generator": (version, torch.tensor(words, dtype=torch.int64), *more),
        "the default dtype": str(torch.get_default_dtype()),
        "the default device": str(torch.get_default_device()),
        "the grad mode": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
        "the flag for deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn's flags": tuple(getattr(torch.backends.cudnn, n) for n in ("enabled", "benchmark", "deterministic")),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "the working folder": os.getcwd(),
    }


def moved(before: dict[str, Any]) -> tuple[str, ...]:
    """Names of what is not as it was."""
    now = look()
    return tuple(name for name in before if differ(before[name], now[name]))


def put_back(before: dict[str, Any]) -> None:
    """Make everything as it was."""
    torch.set_rng_state(before["torch's global generator"])
    name, keys, *rest = before["numpy's global generator"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, *more = before["random's global generator"]
    random.setstate((version, tuple(words.tolist()), *more))
    torch.set_default_dtype(getattr(torch, before["the default dtype"].removeprefix("torch.")))
    if str(torch.get_default_device()) != before["the default device"]:
        torch.set_default_device(before["the default device"])
    torch.set_grad_enabled(before["the grad mode"])
    torch.set_num_threads(before["the number of threads"])
    torch.use_deterministic_algorithms(before["the flag for deterministic algorithms"])
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before["cudnn's flags"]
    torch.set_float32_matmul_precision(before["the precision of matrix products"])
    os.chdir(before["the working folder"])
