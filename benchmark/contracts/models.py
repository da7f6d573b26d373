"""Models as data: a spec and tensors that trusted code rebuilds; never code from an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Wrap:
    """One of the kit's rebuildable changes to an architecture.

    Args:
        kind: `gate` (per-channel factor at `site`), `insert` (a layer after `site`), `stamp` (a fixed input patch),
            `purify` (an image-to-image network before the model), `permute_logits`, `noise` (Gaussian input noise).
        site: Dotted module name, or empty for the model's input or output.
        args: JSON-able arguments; tensors live in the model's state under `wraps.<index>.`.
    """

    kind: str
    site: str = ""
    args: Any = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything but the tensors that rebuilds a classifier.

    Args:
        arch: Id in entry-point group `sleeperbench.models`, or `timm:<name>`.
        args: JSON-able constructor arguments.
        classes: Number of logits.
        shape: Input (C, H, W).
        norm: Per-channel mean and standard deviation, applied inside the model.
        wraps: Changes on top, in order.
    """

    arch: str
    classes: int
    shape: tuple[int, int, int]
    norm: tuple[tuple[float, ...], tuple[float, ...]]
    args: Mapping[str, Any] = field(default_factory=dict)
    wraps: tuple[Wrap, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        return asdict(self) | {"args": dict(self.args)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The spec of `to_json`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        d = dict(data)
        mean, std = d["norm"]
        d |= {"shape": tuple(d["shape"]), "norm": (tuple(mean), tuple(std))}
        d["wraps"] = tuple(Wrap(**w) for w in d.get("wraps", ()))
        return cls(**d)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A classifier as it is stored: spec and state dict (CPU tensors)."""

    spec: ModelSpec
    state: Mapping[str, Tensor]
