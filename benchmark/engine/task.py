"""A task is pure data: JSON in, artifact out. Its key is the digest of everything that determines its result."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from sleeperbench import PROTOCOL
from sleeperbench.contracts.access import Access

PUBLIC_SECRET = "sleeperbench public suites 1"
"""Published secret of public suites: anyone can repeat them, and anyone can regenerate their triggers."""

PUBLIC_TARGETS = {0: 0, 1: 1, 2: 8}
"""Target class of seeds 0, 1, 2 in public suites; DESIGN 9."""


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return _ENCODER.encode(value)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def attack_seed(secret: str, attack: str, seed: int) -> int:
    """Root of an attack's randomness (rows, pattern, position, target): HMAC of the suite's secret."""
    mac = hmac.new(secret.encode(), f"{attack}\0{seed}".encode(), hashlib.sha256).digest()
    return int.from_bytes(mac[:8], "big") >> 1


def target_class(secret: str, attack: str, seed: int, classes: int) -> int:
    """The class that all-to-one triggers aim at: published for seeds 0 to 2 of public suites, else from the secret."""
    if secret == PUBLIC_SECRET and seed in PUBLIC_TARGETS and PUBLIC_TARGETS[seed] < classes:
        return PUBLIC_TARGETS[seed]
    return attack_seed(secret, f"{attack}/target", seed) % classes


_PLUGINS: Mapping[str, Literal["attack", "defense", "evaluator"]] = {
    "attack": "attack",
    "prepare": "defense",
    "defense": "defense",
    "answer": "defense",
    "evaluate": "evaluator",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One cached step.

    Args:
        kind: `attack`, `prepare` (what a defense does before it sees a model), `defense`, `answer` (a defense's second
            phase) or `evaluate`.
        name: Plugin id.
        version: The plugin's `version`.
        params: Everything else that determines the result and is not an input: the method's parameters, data, recipe.
        seed: Root of the task's randomness.
        numerics: precision, threads, deterministic.
        inputs: Role -> key of the artifact it reads.
        role: `trusted` runs in a long-lived worker, `view` in a child forked for this task alone.
        timeout: Seconds of wall time; not part of the key.
    """

    kind: Literal["attack", "prepare", "defense", "answer", "evaluate"]
    name: str
    version: int
    params: Any
    seed: int
    numerics: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    role: Literal["trusted", "view"] = "trusted"
    timeout: float = 600.0

    @cached_property
    def key(self) -> str:
        """sha256 over kind, name, version, params, seed, numerics, inputs and protocol."""
        names = ("kind", "name", "version", "params", "seed", "numerics")
        return digest({n: getattr(self, n) for n in names} | {"inputs": dict(self.inputs), "protocol": PROTOCOL})

    @property
    def of(self) -> Literal["attack", "defense", "evaluator"]:
        """The kind of plugin that it runs."""
        return _PLUGINS[self.kind]

    def preparation(self) -> Task:
        """Of a defense's task: that of its `prepare`, which is the same for every model."""
        access = asdict(Access(model="none", clean=self.params["access"]["clean"]))
        return replace(self, kind="prepare", params=self.params | {"access": access}, inputs={})

    def to_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        return asdict(self) | {"inputs": dict(self.inputs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The task of `to_json`."""
        return cls(**data)
