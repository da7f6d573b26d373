"""One run of a method, and what it leaves behind."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch._dynamo

from sleeperbench.contracts.context import derive
from sleeperbench.contracts.defense import UndeclaredAccess
from sleeperbench.contracts.method import NotApplicable
from sleeperbench.testing import surroundings
from sleeperbench.testing.base import Failed, Skipped
from sleeperbench.testing.differ import differ
from sleeperbench.testing.stage import Variant


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a method.

    Args:
        answer: Made, Outcome or Findings; None if there is none.
        declined: The reason of NotApplicable, or a trait that REQUIRES and the architecture lacks.
        error: What was raised else, with file and line.
        greedy: The message of UndeclaredAccess.
        opened: Parts of the case that were opened.
        touched: What is no longer as it was among the inputs.
        moved: What is no longer as it was in the process.
        seconds: Processor seconds.
    """

    answer: Any = None
    declined: str = ""
    error: str = ""
    greedy: str = ""
    opened: frozenset[str] = frozenset()
    touched: str = ""
    moved: tuple[str, ...] = ()
    seconds: float = 0.0


def ask(method: Any, variant: Variant) -> None:
    """Let a method refuse, as the planner does before anything runs."""
    try:
        method.check(variant.shape, variant.classes)
    except ValueError as e:
        raise NotApplicable(f"refused_beforehand: {e}") from e


def observe(work: Callable[[], Any], turn: int) -> Run:
    """Run `work` and see what it leaves behind; the process is put back as it was."""
    before = surroundings.look()
    # Drawn from a global generator, an answer would differ between turns, as it does between workers.
    seed = derive(turn, "global") % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    entered, start = surroundings.look(), time.process_time()
    found: dict[str, Any] = {}
    try:
        found["answer"] = work()
    except NotApplicable as e:
        found["declined"] = str(e) or "NotApplicable without a reason"
    except UndeclaredAccess as e:
        found["greedy"] = str(e)
    except (Skipped, Failed):
        raise
    except (Exception, SystemExit) as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        found["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]} ({last.filename}, line {last.lineno})"
    found["seconds"] = time.process_time() - start
    found["moved"] = surroundings.moved(entered)
    surroundings.put_back(before)
    if not any(found.get(k) is not None for k in ("answer", "declined", "greedy", "error")):
        found["error"] = "it returned None"
    return Run(**found)


def after(run: Run, case: Any, fresh: Any) -> Run:
    """The run with what it opened of its case, and what of that is not as in a fresh case."""
    opened = frozenset(n for n in vars(case) if not n.startswith("_"))
    touched = next((d for n in sorted(opened - {"ctx"}) if (d := differ(getattr(case, n), getattr(fresh, n), n))), "")
    return replace(run, opened=opened, touched=touched)
