"""A benchmark that asks of every defended model whether its backdoor is gone, or only asleep.

Importing this package imports no torch; the public names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "sleeperbench":
    raise ImportError("this folder is installed as `sleeperbench`: run `pip install -e .` and import that")

__version__ = "0.1.0"
API_VERSION = 1
PROTOCOL = 1
"""Version of the measuring protocol; part of every task key."""

if TYPE_CHECKING:
    from sleeperbench.contracts import (
        Access,
        Attack,
        Backdoor,
        Case,
        Defense,
        EvalCase,
        Evaluator,
        Findings,
        Inverted,
        Mark,
        Measurement,
        Metric,
        Model,
        ModelSpec,
        Needs,
        Outcome,
        PoisonedSet,
        Role,
        TargetMap,
        TrainHooks,
        Trigger,
        Verdict,
        Wrap,
    )
    from sleeperbench.data import ImageSet

_CONTRACTS = (
    "Access Attack Backdoor Case Defense EvalCase Evaluator Findings Inverted Mark Measurement Metric Model ModelSpec "
    "Needs Outcome PoisonedSet Role TargetMap TrainHooks Trigger Verdict Wrap"
)
_PUBLIC = dict.fromkeys(_CONTRACTS.split(), "sleeperbench.contracts") | {"ImageSet": "sleeperbench.data"}

__all__ = [
    "API_VERSION",
    "PROTOCOL",
    "Access",
    "Attack",
    "Backdoor",
    "Case",
    "Defense",
    "EvalCase",
    "Evaluator",
    "Findings",
    "ImageSet",
    "Inverted",
    "Mark",
    "Measurement",
    "Metric",
    "Model",
    "ModelSpec",
    "Needs",
    "Outcome",
    "PoisonedSet",
    "Role",
    "TargetMap",
    "TrainHooks",
    "Trigger",
    "Verdict",
    "Wrap",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sleeperbench' has no attribute {name!r}")
