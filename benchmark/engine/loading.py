"""What every worker does first: import a plugin by its entry-point value, make torch repeat itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sleeperbench.errors import BrokenPlugin


def load_class(value: str) -> Any:
    """The object of `module:name`.

    Raises:
        BrokenPlugin: importing it raises, or calls sys.exit.
    """
    module, _, name = value.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as e:
        raise BrokenPlugin(
            f"plugin {value} cannot be imported: {type(e).__name__}: {e}; mend or uninstall its distribution"
        ) from e


@dataclass(frozen=True)
class Wrapped:
    """Reads the backdoor of an attack that wraps another.

    Args:
        outer: Class of the wrapper.
        inner: Class of what it wraps.
    """

    outer: Any
    inner: Any

    def restore(self, tensors: Any, info: Any) -> Any:
        """As `Attack.restore`."""
        return self.outer.restore(tensors, info, self.inner)


def load_attack(value: str) -> Any:
    """What restores an attack's backdoor: the class of `module:name`, or of two of them, a wrapper and the wrapped."""
    classes = [load_class(v) for v in value.split()]
    return classes[0] if len(classes) == 1 else Wrapped(*classes)


def make_attack(value: str, params: Mapping[str, Any]) -> tuple[Any, Any]:
    """The attack with its parameters, and the one that it wraps, or None."""
    classes = [load_class(v) for v in value.split()]
    if len(classes) == 1:
        return classes[0].from_params(params), None
    own = {k: v for k, v in params.items() if k != "inner"}
    return classes[0].from_params(own), classes[1].from_params(params["inner"])


def be_deterministic(device: str) -> None:
    """Ask torch for repeatable algorithms on an accelerator, and for float32 where float32 is said.

    Convolutions would else round their factors to 10 bits (TF32), in training as under CKA. One CPU thread repeats
    itself anyway, and asking costs over a second of imports in every process.
    """
    if device != "cpu":
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = False
