"""Entry points of all installed distributions, and what is wrong with them before any source is read."""

from __future__ import annotations

import configparser
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import get_args

import sleeperbench
from sleeperbench.engine.plugin import Kind, Plugin
from sleeperbench.engine.source import locate
from sleeperbench.errors import BrokenPlugin

GROUPS: Mapping[str, Kind] = {f"sleeperbench.{kind}s": kind for kind in get_args(Kind)}
OWN = "sleeperbench"
FOLDERS = {
    "sleeperbench.attacks": "attacks",
    "sleeperbench.defenses": "defenses",
    "sleeperbench.evaluators": "evaluators",
}


def normal(dist: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", dist.strip()).lower()


def installed() -> list[Plugin]:
    """Every plugin that some distribution registers, those with a double refused, and what a checkout has left out."""
    origins: dict[str, list[tuple[str, list[Plugin]]]] = defaultdict(list)
    for dist in metadata.distributions():
        plugins = [*_plugins(dist)]
        # One folder may be on the path twice, and a checkout holds its egg-info beside the installed metadata.
        if plugins and plugins not in [p for _, p in origins[plugins[0].dist]]:
            origins[plugins[0].dist].append((str(dist.locate_file("")), plugins))
    found = [p for name, known in origins.items() for p in _without_doubles(name, known)]
    return [*found, *_left_out(found)]


def _without_doubles(name: str, known: list[tuple[str, list[Plugin]]]) -> Iterator[Plugin]:
    folders = {plugin: folder for folder, plugins in known for plugin in plugins}
    versions = [f"{plugins[0].dist_version} in {folder}" for folder, plugins in known]
    for plugin in folders:
        same = [p for p in folders if (p.kind, p.id) == (plugin.kind, plugin.id)]
        if name != OWN and len(known) > 1:
            # Which of them an import finds depends on the order of the path, so none of their figures has an origin.
            reason = f"{name} is installed more than once: {' and '.join(versions)}: uninstall all but one"
            yield replace(plugin, refusal=reason)
        elif len(same) > 1:
            origins = " and ".join(f"`{p.value}` in {folders[p]}" for p in same)
            yield replace(plugin, refusal=f"registered more than once: {origins}: rename or remove all but one")
        else:
            yield plugin


def _plugins(dist: metadata.Distribution) -> Iterator[Plugin]:
    try:
        text = dist.read_text("entry_points.txt") or ""
    except (OSError, UnicodeDecodeError):
        return
    # Most distributions have no plugins, and reading a distribution's name is slow.
    if f"[{OWN}." not in text.replace(" ", ""):
        return
    try:
        name = normal(dist.metadata["Name"])
        version = sleeperbench.__version__ if name == OWN else dist.version
    except Exception:  # damaged METADATA raises differently in each version of Python
        name, version = "unnamed", "unknown"
    for group, key, value in _lines(text):
        refusal = ""
        ours = name == OWN and value.startswith(f"{OWN}.")
        if name == "unnamed":
            refusal = f"the METADATA in {dist.locate_file('')} cannot be read: install the distribution again"
        elif name == OWN and not ours:
            refusal = f"{dist.locate_file('')} holds a distribution that calls itself {OWN}: uninstall it or rename it"
        elif not value:
            refusal = f"its entry point has no value: write `{key} = package.module:Name`"
        elif not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", key):
            refusal = f"`{key}` is no name for a plugin: use letters, digits, `_`, `-` and `.` in the entry point"
        yield Plugin(GROUPS[group], key, name, version, value, builtin=ours, refusal=refusal)


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    # Not importlib.metadata's parser: one damaged line of one distribution would hide the plugins of all.
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            group = line.strip("[] ")
        elif line and line[0] not in "#;" and group in GROUPS:
            key, _, value = line.partition("=")
            yield group, key.strip(), value.strip()


def _left_out(found: list[Plugin]) -> Iterator[Plugin]:
    """Methods of a checkout that an editable install does not know yet."""
    try:
        package = locate("sleeperbench.attacks").origin
    except BrokenPlugin:
        return
    root = Path(package or "").parent.parent
    setup = configparser.ConfigParser()
    try:
        setup.read(root / "setup.cfg", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return
    if setup.get("metadata", "name", fallback="") != OWN:
        return
    version = next((p.dist_version for p in found if p.builtin), "unknown")
    known = {(p.kind, p.name) for p in found if p.builtin}
    modules = {p.value.partition(":")[0] for p in found if p.builtin}
    declared = setup["options.entry_points"] if setup.has_section("options.entry_points") else {}
    for group, kind in GROUPS.items():
        for _, key, value in _lines(f"[{group}]\n{declared.get(group, '')}"):
            modules.add(value.partition(":")[0])
            if (kind, key) not in known:
                reason = "declared in setup.cfg but not installed: run `pip install -e .`"
                yield Plugin(kind, key, OWN, version, value, builtin=True, refusal=reason)
    for group, folder in FOLDERS.items():
        for file in sorted((root / folder).glob("[!_]*.py")):
            if f"{group}.{file.stem}" not in modules:
                line = f"{file.stem} = {group}.{file.stem}:<class>"
                reason = (
                    f"{folder}/{file.name} has no line in setup.cfg: write `{line}` there and run `pip install -e .`"
                )
                yield Plugin(GROUPS[group], file.stem, OWN, version, "", builtin=True, refusal=reason)
