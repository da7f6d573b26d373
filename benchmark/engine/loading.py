"""What every worker does first: import a plugin by its entry-point value, make torch repeat itself."""

from __future__ import annotations

import importlib
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


def be_deterministic(device: str) -> None:
    """Ask torch for repeatable algorithms on an accelerator.

    One CPU thread repeats itself anyway, and asking costs over a second of imports in every process.
    """
    if device != "cpu":
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
