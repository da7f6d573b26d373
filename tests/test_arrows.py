"""Imports run one way, and the engine knows no method by name."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "data": ("data",),
    "benchmark/contracts": ("data", "contracts"),
    "benchmark/kit": ("data", "contracts", "kit", "errors"),
    "benchmark/engine": ("data", "contracts", "kit", "engine", "errors", "schema"),
    "benchmark/testing": ("data", "contracts", "kit", "engine", "errors", "schema", "testing"),
    "attacks": ("data", "contracts", "kit", "attacks"),
    "defenses": ("data", "contracts", "kit", "defenses"),
    "evaluators": ("data", "contracts", "kit", "evaluators"),
    "leaderboard": ("leaderboard", "schema", "errors"),
    "benchmark/published": ("published", "leaderboard", "errors"),  # judges tables, as the site does
}
EXCEPTIONS = {("benchmark/engine/finish.py", "leaderboard")}
"""The run ends by building the site."""


def imported(path: Path) -> set[str]:
    """First part below `sleeperbench` of everything that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sleeperbench" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    for path in sorted((ROOT / layer).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        wrong = {m for m in imported(path) - set(LAYERS[layer]) if (name, m) not in EXCEPTIONS}
        assert not wrong, f"{name} imports {sorted(wrong)}"


def test_kit_and_engine_know_no_method_by_name() -> None:
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    ids = {
        line.split("=")[0].strip()
        for group in ("attacks", "defenses", "evaluators")
        for line in cfg["options.entry_points"][f"sleeperbench.{group}"].strip().splitlines()
    }
    # The two controls that every matrix has, words that are metrics or evaluators' family names in the schema, and what
    # a manifest calls the images that a task counted.
    ids -= {"none", "clean_model", "accuracy", "cost"}
    for layer in ("benchmark/contracts", "benchmark/kit", "benchmark/engine", "benchmark/testing"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            strings = {
                n.value
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            # What INFO["kind"] may be is also what two evaluators are called, and a kind of wrap what one is.
            words = {"detection", "inversion"} if layer == "benchmark/testing" else set()
            named = ids & strings - (words | ({"noise"} if path.name == "wraps.py" else set()))
            assert not named or path.name == "rows.py", f"{path.relative_to(ROOT)} names {sorted(named)}"


def test_nothing_is_unpickled() -> None:
    for path in [p for layer in (*LAYERS, "benchmark/cli") for p in sorted((ROOT / layer).rglob("*.py"))]:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "allow_pickle=True" not in text, path
        if "import pickle" in text or "pickle." in text:
            assert path.relative_to(ROOT).as_posix() == "data/cifar.py", path
