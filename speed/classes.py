"""What inverting all labels at once saves AEVA and UNICORN, against one perturbation, or one label, after another.

A small network that is trained for a moment on ten smooth pictures with noise, in CIFAR's shape, and both methods at a
fraction of their effort; both ways make the same draws and must end in the same figures. One thread on a CPU, or
`--device cuda`. Seconds of the wall clock, the least of the rounds.

    python speed/classes.py [--device cpu] [--side 32] [--iterations 4] [--epochs 1] [--rounds 1]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import Defense, ImageSet, ModelSpec
from sleeperbench.contracts import Ctx, Recipe
from sleeperbench.defenses.aeva import AEVA
from sleeperbench.defenses.unicorn import Unicorn
from sleeperbench.kit.classifier import build
from sleeperbench.kit.train import fit

CLASSES = 10


def pictures(side: int, rows: int) -> ImageSet:
    """Rows of one smooth picture per class, with noise."""
    gen = torch.Generator().manual_seed(0)
    coarse = torch.rand(CLASSES, 3, 4, 4, generator=gen)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear") * 0.8 + 0.1
    labels = torch.arange(rows) % CLASSES
    noisy = smooth[labels] + 0.1 * torch.randn(rows, 3, side, side, generator=gen)
    return ImageSet(
        images=(noisy.clamp(0, 1) * 255).round().to(torch.uint8), labels=labels, ids=torch.arange(rows),
        classes=tuple("0123456789"), name="pictures", split="train", digest="",
    )  # fmt: skip


def timed(method: Defense, case: Any) -> tuple[float, Any]:
    """Seconds of one run, and what it tells."""
    start = time.perf_counter()
    found = method.run(case).chosen
    return time.perf_counter() - start, found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--side", type=int, default=32)
    ask.add_argument("--iterations", type=int, default=4)
    ask.add_argument("--epochs", type=int, default=1)
    ask.add_argument("--rounds", type=int, default=1)
    args = ask.parse_args()
    if min(args.iterations, args.epochs, args.rounds) < 1 or args.side < 16:
        ask.error("give at least one iteration, epoch and round, and 16 pixels")
    torch.set_num_threads(1)
    device, recipe = torch.device(args.device), Recipe(lr=0.05, pad=0, flip=False)
    clean, shape = pictures(args.side, 60), (3, args.side, args.side)
    spec = ModelSpec(arch="small_cnn", classes=CLASSES, shape=shape, norm=((0.5,) * 3, (0.25,) * 3))
    net = build(spec, 0)
    fit(net, clean, recipe, Ctx(seed=0, recipe=recipe, scratch=Path(), device=device), steps=60)
    net = net.to(device).eval()

    @torch.no_grad()
    def labels(x: Tensor) -> Tensor:
        return net(x.to(device)).argmax(1).to(x.device)

    about = {"samples": 1, "sources": 3, "iterations": args.iterations, "queries": 100}
    small = {"pretrain": 1, "epochs": args.epochs, "width": 8}
    pairs: dict[str, tuple[Any, Defense, Defense]] = {
        "AEVA": (labels, AEVA(**about), AEVA(**about, batched=False)),
        "UNICORN": (net, Unicorn(**small, together=CLASSES), Unicorn(**small, together=1)),
    }
    print(f"torch {torch.__version__}, {args.device}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, {shape}")
    for name, (model, *ways) in pairs.items():
        seconds, told = [], []
        for way in ways:
            case = SimpleNamespace(net=model, spec=spec, clean=clean)
            case.ctx = Ctx(seed=0, recipe=recipe, scratch=Path(), device=device)
            runs = [timed(way, case) for _ in range(args.rounds)]
            seconds.append(min(s for s, _ in runs))
            told.append(torch.tensor(runs[0][1].get("peaks") or runs[0][1]["success_and_ssim"]))
        if not torch.allclose(*told, atol=0.01):
            raise SystemExit(f"{name} found other figures: {told}")
        print(
            f"{name}: {seconds[0]:.1f} s at once, {seconds[1]:.1f} s one after another, {seconds[1] / seconds[0]:.2f}"
        )


if __name__ == "__main__":
    main()
