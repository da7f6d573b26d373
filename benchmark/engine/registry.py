"""All plugins, the built-in ones and other people's: listed from metadata and source, imported only when used."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from sleeperbench.engine.blueprint import DECLARED, Blueprint
from sleeperbench.engine.entries import GROUPS, OWN, installed, normal
from sleeperbench.engine.plugin import Kind, Plugin
from sleeperbench.errors import BadInput, BrokenPlugin, nearest

__all__ = ["Kind", "Plugin", "Registry"]

TIMM = "timm:"


class Registry:
    """All plugins, in the order of kind and id."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        kinds = list(GROUPS.values())
        self._known: dict[str, dict[str, Plugin]] = {}
        self.plugins = sorted(plugins, key=lambda p: (kinds.index(p.kind), not p.builtin, p.id))
        for p in self.plugins:
            self._known.setdefault(p.kind, {})[p.id] = p

    @classmethod
    def discover(cls, plugins: str | None = None) -> Registry:
        """Every entry point that is installed.

        Args:
            plugins: `all`, `none` (built-in ones only) or distributions, comma-separated; default
                SLEEPERBENCH_PLUGINS, else `all`.

        Raises:
            BadInput: A distribution of the list has no plugins.
        """
        wanted = plugins or os.environ.get("SLEEPERBENCH_PLUGINS") or "all"
        found = installed()
        foreign = {p.dist for p in found if not p.builtin}
        if wanted != "all":
            names = set() if wanted == "none" else {normal(n) for n in wanted.split(",") if n.strip()}
            for name in sorted(names - foreign - {OWN}):
                raise BadInput(f"SLEEPERBENCH_PLUGINS: no plugins of distribution `{name}`: {nearest(name, foreign)}")
            found = [p for p in found if p.builtin or p.dist in names]
        return cls(found)

    def of(self, kind: Kind) -> list[Plugin]:
        """All plugins of a kind, whatever their status."""
        return [p for p in self.plugins if p.kind == kind]

    def get(self, kind: Kind, id: str) -> Plugin:
        """The plugin of that id, which is `ok`; a wrapper with or without its colon.

        Raises:
            BadInput: There is none.
            BrokenPlugin: It is broken or of another API.
        """
        if kind == "model" and id.startswith(TIMM) and id != TIMM:
            return Plugin(kind, id, "timm", metadata.version("timm"), "", builtin=True)
        known = self._known.get(kind, {})
        plugin = known.get(id.removesuffix(":"))
        if plugin is None:
            raise BadInput(f"no {kind} `{id}`: {nearest(id, known)} If it is a plugin: is the package installed?")
        if plugin.status != "ok":
            raise BrokenPlugin(f"{plugin}: {plugin.reason}")
        return plugin

    @staticmethod
    def split_wrapper(id: str) -> tuple[str | None, str]:
        """`unlearn:neural_cleanse` -> (`unlearn`, `neural_cleanse`); without a wrapper (None, id)."""
        wrapper, colon, inner = id.partition(":")
        return (wrapper, inner) if colon else (None, id)

    def chain(self, kind: Kind, id: str) -> list[Plugin]:
        """The plugins of an id, outermost first: the wrappers, then what they wrap.

        Raises:
            BadInput: One is unknown, is no wrapper but stands before a colon, or is a wrapper around nothing.
            BrokenPlugin: One is broken or of another API.
        """
        wrapper, inner = self.split_wrapper(id)
        if wrapper is None:
            plugin = self.get(kind, id)
            if plugin.wrapper:
                raise BadInput(f"{kind} `{id}` wraps another: write `{id}:<{kind}>`")
            return [plugin]
        outer = self.get(kind, wrapper)
        if not outer.wrapper:
            wrappers = ", ".join(f"`{p.id}:`" for p in self.of(kind) if p.wrapper) or "none"
            raise BadInput(f"{kind} `{wrapper}` in `{id}` is no wrapper; wrappers: {wrappers}")
        if not inner:
            raise BadInput(f"{kind} `{id}` wraps another: write its id behind the colon")
        return [outer, *self.chain(kind, inner)]

    def load(self, kind: Kind, id: str) -> Any:
        """Import the plugin: a class, or for data sets the object.

        A module that ends the process from C or by `os._exit` cannot be caught.

        Raises:
            BadInput: There is none, or it is a timm model, which `sleeperbench.kit` builds.
            BrokenPlugin: It cannot be imported, or is not what its source declares.
        """
        plugin = self.get(kind, id)
        if not plugin.value:
            raise BadInput(f"model `{id}` is built by timm and has no class to load")
        module, name = (part.strip() for part in plugin.value.partition("[")[0].split(":"))
        try:
            loaded = getattr(importlib.import_module(module), name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may call sys.exit, or raise a BaseException of its own
            what = (
                f"it calls sys.exit({error.code!r}) when imported: move that under `if __name__ == '__main__':`"
                if isinstance(error, SystemExit)
                else f"{type(error).__name__}: {error}: mend {module}, or install what it needs"
            )
            raise BrokenPlugin(f"{plugin} fails to import: {what}") from error
        if plugin.blueprint.base:
            wrong = _differs(loaded, plugin.blueprint)
            if wrong:
                raise BrokenPlugin(f"{plugin}: {wrong}")
        return loaded


def _differs(cls: Any, blueprint: Blueprint) -> str:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"{blueprint.path}: it does not define {', '.join(missing)}"
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    now = {
        "INFO": (blueprint.info, cls.INFO),
        "ACCESS": (blueprint.access, getattr(cls, "ACCESS", None)),
        "NEEDS": (blueprint.needs, getattr(cls, "NEEDS", None)),
        "SNAPSHOT": (blueprint.snapshot, getattr(cls, "SNAPSHOT", "exact")),
        "REQUIRES": (blueprint.requires, getattr(cls, "REQUIRES", frozenset())),
        "METRICS": (
            list(blueprint.metrics),
            [(m.name, m.unit, m.low, m.high, m.better, m.doc) for m in getattr(cls, "METRICS", ())],
        ),
    }
    assert set(now) == set(DECLARED)
    for name, (in_source, imported) in now.items():
        if in_source != imported:
            return f"{blueprint.path}: `{name}` is {imported!r} after import, but its source reads {in_source!r}"
    for name in {*fields, *blueprint.fields}:
        if name not in fields or name not in blueprint.fields or fields[name] != blueprint.fields[name].default:
            return f"{blueprint.path}: parameter `{name}` after import is not the one in its source"
    return ""
