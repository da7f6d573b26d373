"""How MNTD's shadow models train fastest on a CPU: one after another, or several stacked through torch.func.

The authors' network on noise of CIFAR's shape, Adam, batches of 100. One after another is what the project does
(`MNTD.shadow`, with the kit's trainer); stacked, `together` networks take each update in one call of vmap, on batches
of their own. One thread; core-seconds per shadow, the median of the rounds.

    python speed/shadows.py [--rows 1000] [--steps 20] [--together 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from sleeperbench import ImageSet, ModelSpec
from sleeperbench.contracts import Ctx, Recipe
from sleeperbench.defenses.mntd import MNTD, Shadow
from sleeperbench.kit.pixels import to_float

SHAPE = (3, 32, 32)


def looped(method: MNTD, case: Any, count: int) -> float:
    """Core-seconds per shadow, one after another."""
    start = time.process_time()
    for i in range(count):
        method.shadow(case, i, poisoned=False)
    return (time.process_time() - start) / count


def stacked(method: MNTD, case: Any, count: int) -> float:
    """Core-seconds per shadow, `count` of them in one call per update."""
    nets = [Shadow(SHAPE, 10).train() for _ in range(count)]
    x, y = to_float(case.clean.images), case.clean.labels
    start = time.process_time()
    params, _ = stack_module_state(nets)
    weights = {k: v.detach() for k, v in params.items()}

    def loss(own: dict[str, Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(nets[0], own, (rows,)), labels)

    slopes = vmap(grad(loss), randomness="different")
    adam = torch.optim.Adam(list(weights.values()), lr=method.lr, foreach=True)
    for _ in range(method.steps):
        rows = torch.randint(len(x), (count, method.batch))
        for k, g in slopes(weights, x[rows], y[rows]).items():
            weights[k].grad = g
        adam.step()
    return (time.process_time() - start) / count


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=1000)
    ask.add_argument("--steps", type=int, default=20)
    ask.add_argument("--together", type=int, default=4)
    ask.add_argument("--rounds", type=int, default=3)
    args = ask.parse_args()
    if min(args.steps, args.together, args.rounds) < 1 or args.rows < 100:
        ask.error("give at least one step, network and round, and 100 rows")
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    clean = ImageSet(
        images=torch.randint(256, (args.rows, *SHAPE), dtype=torch.uint8, generator=gen),
        labels=torch.randint(10, (args.rows,), generator=gen), ids=torch.arange(args.rows),
        classes=tuple("0123456789"), name="noise", split="train", digest="",
    )  # fmt: skip
    recipe = Recipe()
    spec = ModelSpec(arch="small_resnet", classes=10, shape=SHAPE, norm=((0.5,) * 3, (0.25,) * 3))
    case = SimpleNamespace(clean=clean, recipe=recipe, spec=spec, ctx=Ctx(seed=0, recipe=recipe, scratch=Path()))
    method = MNTD(steps=args.steps)
    took: dict[str, list[float]] = {"one after another": [], f"{args.together} stacked": []}
    for way in (looped, stacked):
        way(MNTD(steps=1), case, args.together)  # first calls allocate
    for _ in range(args.rounds):
        for name, way in zip(took, (looped, stacked), strict=True):
            took[name].append(way(method, case, args.together))
    loop, stack = (statistics.median(t) for t in took.values())
    for name, seconds in took.items():
        print(f"{name}: {statistics.median(seconds):.3f} core-seconds per shadow of {args.steps} updates")
    print(f"stacked takes {stack / loop:.2f} times as long")


if __name__ == "__main__":
    main()
