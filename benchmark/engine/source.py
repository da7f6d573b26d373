"""Python source found and read without running any of it."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path

from sleeperbench.errors import BrokenPlugin

CONTRACTS = ("Attack", "Defense", "Evaluator")
Object = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


def locate(module: str) -> ModuleSpec:
    """The spec of a module, found one package at a time by `sys.meta_path`; no `__init__` runs.

    Raises:
        BrokenPlugin: There is no such module.
    """
    path: list[str] | None = None
    name = ""
    spec: ModuleSpec | None = None
    for part in module.split("."):
        if spec is not None and path is None:
            raise BrokenPlugin(f"`{name}` is a module, so there is no `{module}`: correct the entry point")
        name = f"{name}.{part}".lstrip(".")
        spec = _find_spec(name, path)
        if spec is None:
            raise BrokenPlugin(f"there is no module `{name}`: correct the entry point, or install its package again")
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    assert spec is not None
    return spec


def _find_spec(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except KeyError:
            # A folder without __init__ inside a package: its path object looks for the parent in sys.modules.
            spec = ModuleSpec(name, None, is_package=True)
            child = name.rpartition(".")[2]
            spec.submodule_search_locations = [str(f) for p in path or () if (f := Path(p) / child).is_dir()]
        if spec is not None:
            return spec
    return None


@dataclass(frozen=True)
class Module:
    """A parsed module: its objects at top level, and what its imported names stand for (`np` -> `numpy`)."""

    name: str
    path: str
    objects: Mapping[str, Object]
    imports: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """An object of a module."""

    module: Module
    node: Object

    @property
    def path(self) -> str:
        """Source file."""
        return self.module.path


@dataclass
class Source:
    """Parsed modules, each read once."""

    modules: dict[str, Module] = field(default_factory=dict)

    def module(self, name: str) -> Module:
        """The parsed module.

        Raises:
            BrokenPlugin: It has no Python source.
            SyntaxError: It does not parse.
        """
        if name not in self.modules:
            spec = locate(name)
            text = getattr(spec.loader, "get_source", lambda _: None)(name)
            if text is None:
                raise BrokenPlugin(f"module `{name}` has no Python source to read: install it as source")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text, spec.origin or name)
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            self.modules[name] = Module(name, spec.origin or name, _objects(tree), _imports(tree, package))
        return self.modules[name]

    def find(self, module: str, name: str) -> Found:
        """The object `name` of a module, or of the module that it is imported from.

        Raises:
            BrokenPlugin: Neither has it at top level.
        """
        for _ in range(20):
            parsed = self.module(module)
            if name in parsed.objects:
                return Found(parsed, parsed.objects[name])
            if "." not in parsed.imports.get(name, ""):
                break
            module, _dot, name = parsed.imports[name].rpartition(".")
        raise BrokenPlugin(f"{parsed.path} has no `{name}` at its top level: name the module that defines it")


def _objects(tree: ast.Module) -> dict[str, Object]:
    objects: dict[str, Object] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            objects[node.name] = node
        elif isinstance(node, ast.Assign):
            objects |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            objects[node.target.id] = node
    return objects


def _imports(tree: ast.Module, package: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return names


def linearise(source: Source, found: Found) -> tuple[list[Found], str]:
    """A class and those it derives from, nearest first, and the contract at the root (`Attack`, ...).

    Raises:
        BrokenPlugin: A base cannot be found in source, or none of the contracts is among them.
    """
    chain: list[Found] = []
    roots: list[str] = []

    def visit(owner: Found) -> None:
        if owner in chain:
            return
        assert isinstance(owner.node, ast.ClassDef)
        chain.append(owner)
        for expr in owner.node.bases:
            dotted = ast.unparse(expr.value if isinstance(expr, ast.Subscript) else expr)
            if dotted in owner.module.objects:
                base = Found(owner.module, owner.module.objects[dotted])
            else:
                first, _, rest = dotted.partition(".")
                target = f"{owner.module.imports.get(first, first)}.{rest}".rstrip(".")
                module, _, name = target.rpartition(".")
                if module == "sleeperbench" or module.startswith("sleeperbench.contracts"):
                    roots.append(name)
                    continue
                if module.partition(".")[0] in sys.stdlib_module_names or (not module and name in ("object",)):
                    continue
                if not module:
                    raise BrokenPlugin(f"{owner.path}: base class `{dotted}` is not found: import it by its name")
                base = source.find(module, name)
            if not isinstance(base.node, ast.ClassDef):
                raise BrokenPlugin(f"{owner.path}: base `{dotted}` must be a class statement, not a computed class")
            visit(base)

    visit(found)
    known = [r for r in roots if r in CONTRACTS]
    if not known:
        raise BrokenPlugin(f"{found.path}: derive the class from one of sleeperbench's {', '.join(CONTRACTS)}")
    return chain, known[0]
