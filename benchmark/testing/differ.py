"""The first difference between two answers, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def differ(a: Any, b: Any, at: str = "") -> str:
    """Where `a` and `b` differ, or an empty string.

    Tensors are equal when type, shape and every bit of their values are; NaN equals NaN. A list equals a tuple, as
    JSON does not tell them apart. Networks are compared by tensors, modes, `requires_grad` and number of hooks. What
    is none of these (functions, open objects) is not compared.
    """
    where = at or "the answer"
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _tensors(a, b, where)
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        return differ(_of(a), _of(b), at)
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in dataclasses.fields(a)]
        return _first((_join(at, n), getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if set(a) != set(b):
            odd = sorted(map(repr, set(a) ^ set(b)))
            return f"{where} has {odd[0]} only once"
        return _first((_join(at, str(k)), a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where} has {len(a)} and {len(b)} entries"
        return _first((f"{at}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return ""
    if isinstance(a, str | int | float | bool | None) or isinstance(b, str | int | float | bool | None):
        return "" if type(a) is type(b) and a == b else f"{where} is {_short(a)} and {_short(b)}"
    return "" if type(a) is type(b) else f"{where} is a {type(a).__name__} and a {type(b).__name__}"


def _first(triples: Any) -> str:
    return next((d for at, a, b in triples if (d := differ(a, b, at))), "")


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tensors(a: Any, b: Any, where: str) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return f"{where} is a {type(a).__name__} and a {type(b).__name__}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{where} is {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    a, b = a.detach().cpu(), b.detach().cpu()
    other = (a != b) & ~(a.isnan() & b.isnan())
    if not bool(other.any()):
        return ""
    return f"{where} differs in {int(other.sum())} of {other.numel()} values"


def _of(net: nn.Module) -> dict[str, Any]:
    return {
        "tensors": net.state_dict(),
        "mode": {n: m.training for n, m in net.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in net.named_parameters()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in net.named_modules()},
    }
