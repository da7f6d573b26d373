"""What plugins say of themselves, asked again and again while a plan is made. Imports no plugin and no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from sleeperbench.contracts.access import Access, Needs
from sleeperbench.engine.blueprint import SNAPSHOTS
from sleeperbench.engine.registry import Kind, Registry
from sleeperbench.engine.suite import Variant
from sleeperbench.schema import JUDGES


class Remembers(Protocol):
    """Has room for answers."""

    memory: dict[Any, Any]


S = TypeVar("S", bound=Remembers)
P = ParamSpec("P")
R = TypeVar("R")


def once(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Answer a second call with equal arguments from memory; most of a graph is shared."""

    @functools.wraps(method)
    def remembered(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        call = (method.__name__, args, *kwargs.items())
        if call not in self.memory:
            self.memory[call] = method(self, *args, **kwargs)
        answer: R = self.memory[call]
        return answer

    return cast("Callable[Concatenate[S, P], R]", remembered)


class Known:
    """Answers from the blueprints of a registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.memory: dict[Any, Any] = {}

    @once
    def info(self, kind: Kind, plugin: str) -> dict[str, Any]:
        """INFO of a plugin; of the wrapped one for `version`s of both, see `version`."""
        return dict(self.registry.get(kind, plugin).blueprint.info)

    @once
    def version(self, kind: Kind, plugin: str) -> int:
        """A wrapper's result depends on its own version; the wrapped plugin's is in its own task."""
        wrapper, inner = Registry.split_wrapper(plugin)
        return int(self.info(kind, wrapper or inner)["version"])

    @once
    def inner(self, v: Variant) -> Variant:
        """What a wrapper wraps."""
        name = Registry.split_wrapper(v.id)[1]
        return Variant(id=name, label=name, params=v.params["inner"])

    @once
    def access(self, plugin: str) -> Access:
        """What a defense declares; a wrapper adds its own to the wrapped one's, which runs in a task of its own."""
        wrapper, inner = Registry.split_wrapper(plugin)
        access = self.registry.get("defense", wrapper or inner).blueprint.access
        assert isinstance(access, Access)
        return access

    @once
    def track(self, plugin: str) -> str:
        """Access class shown on the board: of a wrapper, the wider of its own and the wrapped one's."""
        wrapper, inner = Registry.split_wrapper(plugin)
        if plugin == "none":
            return "none"
        tracks = [self.access(plugin).track()] + ([self.track(inner)] if wrapper else [])
        if "T4" in tracks:
            return "T4"
        plain = {t.removesuffix("R") for t in tracks}
        widest = "T3" if {"T1", "T2"} <= plain else max(plain)
        return widest + "R" * any(t.endswith("R") for t in tracks)

    @once
    def snapshot(self, attack: str) -> str:
        """What the attack's training set is; of a wrapper and what it wraps, the less exact."""
        return max((p.blueprint.snapshot for p in self.registry.chain("attack", attack)), key=SNAPSHOTS.index)

    @once
    def needs(self, v: Variant) -> Needs:
        """What an evaluator declares."""
        needs = self.registry.get("evaluator", v.id).blueprint.needs
        assert isinstance(needs, Needs)
        return needs

    @once
    def descends(self, defense: str) -> bool:
        """Whether a defense's model is made from the attacked one's weights: it sees them and starts nothing anew."""
        if defense == "none":
            return True
        wrapper, inner = Registry.split_wrapper(defense)
        info = self.info("defense", wrapper or inner)
        access = self.access(defense)
        return access.model == "weights" and not access.control and bool(info.get("descends", True))

    @once
    def unlearns(self, defense: str) -> bool:
        """Whether a defense is a wrapper that repairs with triggers of methods that need a model and clean rows alone.

        These can be run on the repaired model, which has neither a training set nor a trigger of its own.
        """
        wrapper, inner = Registry.split_wrapper(defense)
        if not wrapper or self.info("defense", wrapper)["kind"] != "repair" or self.access(defense).inner != "inverted":
            return False
        while inner:
            access, (outer, rest) = self.access(inner), Registry.split_wrapper(inner)
            if access.train or access.oracle or self.info("defense", outer or rest)["kind"] == "repair":
                return False
            inner = rest if outer else ""
        return True

    @once
    def keeps_model(self, defense: str) -> bool:
        """Whether a defense only judges: what wakes a backdoor would find the undefended model again."""
        wrapper, inner = Registry.split_wrapper(defense)
        return self.info("defense", wrapper or inner)["kind"] in JUDGES

    @once
    def second_phase(self, plugin: str, what: str) -> bool:
        """Whether a defense has a second phase: its INFO says `"scores": True`, or `"stamps": True`."""
        return bool(self.info("defense", plugin).get(what)) if ":" not in plugin else False
