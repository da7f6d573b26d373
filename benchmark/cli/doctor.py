"""`sleeperbench doctor`: what this machine offers, and what is missing. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def add_parser(sub: Any) -> None:
    """Declare the command."""
    p = sub.add_parser(
        "doctor",
        help="what this machine offers, and what is missing",
        description="Checks the installation: versions, cores, devices, data sets found, broken plugins, left-overs.",
    )
    p.add_argument("--json", action="store_true", help="as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the findings; 3 when a plugin is broken."""
    from sleeperbench.engine.registry import Registry

    names = ("sleeperbench", "torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "scikit-learn", "ray")
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for n in names:
        try:
            found[n] = version(n)
        except PackageNotFoundError:
            found[n] = "not installed"
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["gpus"] = len(list(Path("/dev").glob("nvidia[0-9]*")))
    found["sandbox bwrap"] = shutil.which("bwrap") or "not installed"
    for name in ("SLEEPERBENCH_DATA", "SLEEPERBENCH_CACHE", "SLEEPERBENCH_STORE", "SLEEPERBENCH_PLUGINS"):
        found[name] = os.environ.get(name, "not set")
    broken = [f"{p.kind} {p.id}: {p.reason}" for p in Registry.discover().plugins if p.status != "ok"]
    found["broken plugins"] = broken
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:<22} {value if not isinstance(value, list) else '; '.join(value) or 'none'}")
    return 3 if broken else 0
