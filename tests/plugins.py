"""A foreign distribution on disk, as pip would leave it: put the folder on sys.path or PYTHONPATH."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    tmp_path: Path,
    dist: str,
    version: str,
    modules: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
) -> Path:
    """Write modules and metadata of a distribution below `tmp_path`; returns the folder that goes on the path.

    Args:
        tmp_path: Where to write.
        dist: Name of the distribution.
        version: Its version.
        modules: Source by path, such as `gentle.py` or `pkg/__init__.py`.
        entry_points: Group -> name -> value.
    """
    folder = tmp_path / f"{dist}-{version}"
    for name, source in modules.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    info = folder / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n", encoding="utf-8")
    groups = [
        f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items()) for group, names in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    files = [*modules, f"{info.name}/METADATA", f"{info.name}/entry_points.txt", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f"{f},,\n" for f in files), encoding="utf-8")
    return folder


GENTLE = '''from dataclasses import dataclass
from sleeperbench import Access, Defense, Outcome

@dataclass(frozen=True, kw_only=True)
class Gentle(Defense):
    """Fine-tune with a small step."""
    INFO = {"title": "Gentle", "version": 1, "api": 1, "kind": "repair", "paper": "", "micro": {"epochs": 1}}
    ACCESS = Access(clean=0.05)
    epochs: int = 5
    lr: float = 0.001
    def run(self, case):
        return Outcome()
'''
"""A defense that loads and declares everything; tests change one thing in it."""
