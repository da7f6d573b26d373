"""What a method is: the signatures that plugins implement and the values they exchange.

Names load when first used, so that reading a plugin's metadata needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleeperbench.contracts.access import Access, Needs
    from sleeperbench.contracts.attack import (
        Attack,
        Backdoor,
        Mark,
        PoisonedSet,
        Role,
        TargetMap,
        TrainHooks,
        Trigger,
    )
    from sleeperbench.contracts.context import Ctx, Recipe
    from sleeperbench.contracts.defense import Case, Defense, Inverted, Outcome, QueryNet, UndeclaredAccess, Verdict
    from sleeperbench.contracts.evaluator import EvalCase, Evaluator, Findings, Measurement, Metric, Peer, Rendered
    from sleeperbench.contracts.method import Method, NotApplicable
    from sleeperbench.contracts.models import Model, ModelSpec, Wrap

_HOME = {
    "access": "Access Needs",
    "attack": "Attack Backdoor Mark PoisonedSet Role TargetMap TrainHooks Trigger",
    "context": "Ctx Recipe",
    "defense": "Case Defense Inverted Outcome QueryNet UndeclaredAccess Verdict",
    "evaluator": "EvalCase Evaluator Findings Measurement Metric Peer Rendered",
    "method": "Method NotApplicable",
    "models": "Model ModelSpec Wrap",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Access",
    "Attack",
    "Backdoor",
    "Case",
    "Ctx",
    "Defense",
    "EvalCase",
    "Evaluator",
    "Findings",
    "Inverted",
    "Mark",
    "Measurement",
    "Method",
    "Metric",
    "Model",
    "ModelSpec",
    "Needs",
    "NotApplicable",
    "Outcome",
    "Peer",
    "PoisonedSet",
    "QueryNet",
    "Recipe",
    "Rendered",
    "Role",
    "TargetMap",
    "TrainHooks",
    "Trigger",
    "UndeclaredAccess",
    "Verdict",
    "Wrap",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
