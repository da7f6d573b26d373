"""What dear repairs compute at their published effort, and the efforts that fit ten core-minutes: presets `reduced`.

A case as suite `cpu` makes it of CIFAR-10 (10,000 rows, small_resnet, 5 % clean), but of noise, with random weights and
a quarter of the pixels: ratios of what is computed do not depend on them. The rule, in docs/presets.md, looks at no
accuracy, no ASR and no clock: floating-point operations are counted, of which ten core-minutes are those of 600 x 690
images forward and backward through small_resnet, the rate of docs/training.md. The cost is fixed + the sum of c_k e_k
over the efforts e_k that are scaled; of counts that multiply one is scaled. Each c_k is the difference of two short
runs. If the published efforts take more, all are multiplied by the one factor that makes it ten
core-minutes, and rounded down to two digits, at least 1.

    python speed/presets.py [METHOD ...]
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sleeperbench import ImageSet, ModelSpec
from sleeperbench.contracts import Ctx, Recipe
from sleeperbench.data.cut import cut
from sleeperbench.engine.registry import Registry
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float

SECONDS = 600
RATE = 690
"""Images forward and backward per core-second."""
ROWS = 10_000
SIDE = 16
SAMPLE = 512
"""Rows of the training set that are run; what goes by epochs is proportional to their number."""
BTI = {"pretrain_steps": (1, 2), "mask_steps": (1, 2), "generator_steps": (1, 2), "steps": (1, 2)}
LOOKS: dict[str, tuple[dict[str, int], dict[str, tuple[int, int]], dict[str, int]]] = {
    "anp": ({"folds": 2}, {"steps": (1, 2)}, {}),
    "rnp": ({}, {"unlearn_steps": (1, 2), "recover_steps": (1, 2)}, {}),
    "ft": ({}, {"steps": (1, 2)}, {}),
    "i_bau": ({"rounds": 1}, {"steps": (1, 2)}, {"steps": 5}),
    "npd": ({}, {"warm_steps": (1, 2), "steps": (1, 2)}, {}),
    "sau": ({}, {"steps": (1, 2)}, {}),
    "mcr": ({}, {"steps": (1, 2), "curve_steps": (1, 2)}, {}),
    "ft_sam": ({}, {"steps": (1, 2)}, {}),
    "seam": ({}, {"forget_steps": (1, 2), "recover_steps": (1, 2)}, {}),
    "distil_fresh": ({}, {"steps": (1, 2)}, {}),
    "moth": ({}, {"steps": (14, 20), "warm_inversion": (1, 2)}, {}),
    "abl": ({}, {"isolation_epochs": (1, 2), "tuning_epochs": (1, 2), "unlearning_epochs": (1, 2)}, {}),
    "d_br": ({}, {"epochs": (1, 2), "spread_epochs": (1, 2), "rounds": (1, 2)}, {}),
    "nab": ({}, {"isolation_epochs": (1, 2), "contrast_epochs": (1, 2), "epochs": (1, 2)}, {}),
    "d_st": (
        {},
        {"epochs": (1, 2), "spread_epochs": (1, 2), "contrast_epochs": (1, 2), "head_epochs": (1, 2)},
        {},
    ),
    "ct": ({}, {"pretrain_epochs": (1, 2), "later_epochs": (1, 2), "steps": (1, 3), "last_steps": (1, 3)}, {}),
    "dbd": (
        {},
        {"contrast_epochs": (1, 2), "head_epochs": (1, 2), "semi_epochs": (1, 2), "iterations": (1, 2)},
        {},
    ),
    "bti_u": ({"rounds": 1}, BTI, {"mask_steps": 5, "generator_steps": 5, "steps": 5}),
    "bti_sam": ({"rounds": 1}, BTI, {"mask_steps": 3, "generator_steps": 3, "steps": 3}),
    "pam": ({"rounds": 1}, BTI, {"mask_steps": 3, "generator_steps": 3, "steps": 3}),
}
"""Method -> what is held at less, effort -> its two values, and how often it then counts in the published run."""
INSIDE = {"semi_epochs": "iterations"}
"""A count that is scaled -> what each of it repeats, at its published number."""


def data(n: int, gen: torch.Generator) -> ImageSet:
    """Noise with labels."""
    return ImageSet(
        images=torch.randint(256, (n, 3, SIDE, SIDE), generator=gen, dtype=torch.uint8),
        labels=torch.arange(n) % 10,
        ids=torch.arange(n),
        classes=tuple(map(str, range(10))),
        name="noise",
        split="train",
        digest="",
    )


def case() -> Any:
    """The parts of a case that these defenses open."""
    torch.set_num_threads(1)
    whole = data(ROWS, torch.Generator().manual_seed(0))
    parts = cut(whole.labels, seed=0, clean=0.05, classes=10)
    spec = ModelSpec(arch="small_resnet", classes=10, shape=(3, SIDE, SIDE), norm=((0.5,) * 3, (0.25,) * 3), args={})
    clean = whole.rows(parts.pool)
    first = len(clean) * 4 // 5
    recipe = Recipe(epochs=20)
    return SimpleNamespace(
        net=build(spec, 0).eval(),
        spec=spec,
        clean=clean,
        tune=clean.rows(torch.arange(first)),
        val=clean.rows(torch.arange(first, len(clean))),
        train=whole.rows(parts.rest[:SAMPLE]),
        scale=len(parts.rest) / SAMPLE,
        recipe=recipe,
        ctx=Ctx(seed=0, recipe=recipe, scratch=Path("."), target=-1),
    )


def unit() -> float:
    """Operations of one image forward and backward."""
    made = case()
    with FlopCounterMode(display=False) as counted:
        F.cross_entropy(made.net(to_float(made.clean.images[:8])), made.clean.labels[:8]).backward()
    return counted.get_total_flops() / 8


def operations(cls: Any, given: dict[str, int]) -> float:
    """Floating-point operations of one run."""
    made, method = case(), cls.from_params(given)
    with FlopCounterMode(display=False) as counted:
        method.run(made)
    return float(counted.get_total_flops())


def rounded(value: float) -> int:
    """Down to two digits, at least 1."""
    if value < 1:
        return 1
    digit = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return int(value / digit + 1e-9) * digit


def look(name: str, registry: Registry, second: float) -> None:
    """Print what a method computes, in core-seconds of `second` operations, and its preset if it is dear."""
    cls = registry.load("defense", name)
    b = registry.get("defense", name).blueprint
    held, pairs, times = LOOKS[name]
    least = {k: low for k, (low, _) in pairs.items()}
    base = operations(cls, held | least) / second
    more = {k: operations(cls, held | least | {k: high}) / second for k, (_, high) in pairs.items()}
    each = {k: (more[k] - base) / (high - low) for k, (low, high) in pairs.items()}
    scale = case().scale if b.access is not None and b.access.train else 1.0
    published = {k: int(b.fields[k].default) for k in pairs}
    fixed = (base - sum(each[k] * least[k] for k in pairs)) * scale
    each = {k: v * (scale if k.endswith("epochs") or k == "rounds" else 1.0) for k, v in each.items()}
    for outer, inner in INSIDE.items():
        if outer in each:
            each[outer] += each.pop(inner) * (published.pop(inner) - scale)
    parts = {k: each[k] * times.get(k, 1) * published[k] for k in published}
    whole = fixed + sum(parts.values())
    told = ", ".join(f"{k} {v:.0f}" for k, v in parts.items())
    less = "".join(f", {k} {v}" for k, v in held.items() if k not in times and k != "rounds")
    print(f"{name}{less}: {whole:.0f} core-seconds as published (fixed {fixed:.1f}, {told})", flush=True)
    if whole > SECONDS:
        f = (SECONDS - fixed) / (whole - fixed)
        print(f"    times {f:.4f}: { ({k: rounded(f * v) for k, v in published.items()}) }", flush=True)


def main() -> None:
    """All methods, or those named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")
    registry, second = Registry.discover("none"), RATE * unit()
    print(f"a core-second is {second / 1e9:.1f}e9 operations", flush=True)
    for name in p.parse_args().methods or LOOKS:
        look(name, registry, second)


if __name__ == "__main__":
    main()
