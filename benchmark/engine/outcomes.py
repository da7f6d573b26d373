"""What a defense's process answered, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sleeperbench.contracts.models import ModelSpec
from sleeperbench.engine import artifacts
from sleeperbench.kit.classifier import load


class Failed(Exception):
    """A defense's answer is unusable, or its process ended badly; carries the row's status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def checked(o: Any, spec: ModelSpec, access: Mapping[str, Any], folder: Path) -> Any:
    """The outcome, after checks that its tensors have the right shapes and are finite."""
    for name, model in [("the repaired model", o.model), *((f"candidate {n}", m) for n, m in o.path.items())]:
        if model is None:
            continue
        if (model.spec.classes, model.spec.shape) != (spec.classes, spec.shape):
            raise Failed("failed", f"wrong_shape: {name} is for {model.spec.classes} classes {model.spec.shape}")
        # Another's architecture would be imported here, where the store is within reach.
        if model.spec.arch != spec.arch and (":" in model.spec.arch or "/" in model.spec.arch):
            raise Failed("failed", f"wrong_shape: {name} is a {model.spec.arch}, neither built in nor {spec.arch}")
        bad = [k for k, v in model.state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if bad:
            raise Failed("failed", f"nan: {name}'s {bad[0]} is not finite")
        try:
            load(model)
        except Exception as e:
            raise Failed("failed", f"wrong_shape: {name} cannot be rebuilt: {e}") from e
    figures = [o.suspicion, *(getattr(i, n) for i in o.inverted for n in ("mask", "pattern", "delta"))]
    if o.verdict is not None:
        figures += [torch.tensor([o.verdict.score, o.verdict.threshold]), o.verdict.label_scores]
    if o.alarm is not None:
        figures.append(torch.tensor(o.alarm))
    if any(f is not None and f.is_floating_point() and not bool(f.isfinite().all()) for f in figures):
        raise Failed("failed", "nan: a figure of the answer is not finite")
    for name in ("keep", "relabel", "suspicion"):
        value = getattr(o, name)
        if value is None:
            continue
        n = len(artifacts.read_images(folder / "in" / "train.safetensors")) if access["train"] else 0
        if value.shape != (n,):
            raise Failed("failed", f"wrong_shape: {name} is {tuple(value.shape)}, the training set has {n} rows")
    return o
