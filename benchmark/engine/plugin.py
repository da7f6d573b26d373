"""One plugin: where it comes from, what its source declares, and whether it can be used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import sleeperbench
from sleeperbench.engine.blueprint import Blueprint, read
from sleeperbench.errors import BadInput, BrokenPlugin

Kind = Literal["attack", "defense", "evaluator", "dataset", "model"]
Status = Literal["ok", "broken", "incompatible"]


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Args:
        kind: What it is.
        name: Name of the entry point.
        dist: Distribution, as in `pip install`, lower case with `-`.
        dist_version: Version of the distribution.
        value: `package.module:Name`; empty for timm's models.
        builtin: Part of SleeperBench itself.
        refusal: Why it is refused whatever its source says; empty if nothing is known against it.
    """

    kind: Kind
    name: str
    dist: str
    dist_version: str
    value: str
    builtin: bool
    refusal: str = ""

    @property
    def id(self) -> str:
        """Bare for built-in plugins, `dist/name` for others; without the colon of a wrapper."""
        return self.name if self.builtin else f"{self.dist}/{self.name}"

    def __str__(self) -> str:
        return f"{self.kind} `{self.id}` ({self.dist} {self.dist_version})"

    @cached_property
    def _read(self) -> tuple[Blueprint | None, Status, str]:
        if self.refusal:
            return None, "broken", self.refusal
        if not self.value:
            return None, "ok", ""
        method = self.kind not in ("dataset", "model")
        try:
            blueprint = read(self.value, method=method)
        except BrokenPlugin as error:
            return None, "broken", str(error)
        return blueprint, *(_judge(blueprint, self.kind) if method else ("ok", ""))

    @property
    def blueprint(self) -> Blueprint:
        """What its source declares.

        Raises:
            BrokenPlugin: It is not `ok`, or is a timm model, which has no source of ours.
        """
        blueprint, status, reason = self._read
        if blueprint is None or status != "ok":
            raise BrokenPlugin(f"{self}: {reason or 'it has no source of ours'}")
        return blueprint

    @property
    def declared(self) -> Blueprint | None:
        """What its source declares, even if it is refused; None where that could not be read."""
        return self._read[0]

    @property
    def status(self) -> Status:
        """`ok`, `broken`, or `incompatible` with this API."""
        return self._read[1]

    @property
    def reason(self) -> str:
        """Why it is not `ok`, and how to mend it."""
        return self._read[2]

    @property
    def wrapper(self) -> bool:
        """Named `<id>:<inner id>`, because it works on another plugin."""
        return self.declared is not None and self.declared.wrapper


def _judge(blueprint: Blueprint, kind: Kind) -> tuple[Status, str]:
    if blueprint.base.lower() != kind:
        return "broken", f"it derives from {blueprint.base}, but is registered under sleeperbench.{kind}s"
    info = blueprint.info
    api = info.get("api")
    if type(api) is int and api != sleeperbench.API_VERSION:
        who = "update sleeperbench or ask the plugin's author"
        return "incompatible", f"needs API {api}, this is {sleeperbench.API_VERSION}: {who}"
    for key, wanted in {"title": str, "version": int, "api": int, "kind": str}.items():
        if type(info.get(key)) is not wanted or info[key] == "":
            given = f"is {info[key]!r}" if key in info else "is missing"
            return "broken", f"{blueprint.path}: INFO[{key!r}] {given}: write it there as {wanted.__name__}"
    micro = info.get("micro", {})
    try:
        blueprint.resolve(micro if isinstance(micro, dict) else {"micro": micro})
    except BadInput as error:
        return "broken", f"{blueprint.path}: INFO['micro']: {error}"
    return "ok", ""
