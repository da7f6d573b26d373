"""What BELT's search for exclusivity costs with all images at once, against one image after another.

A classifier with random weights, noise of CIFAR's shape, targets that are its own answers, and BELT's block of random
colours as the trigger, so that every image is searched. The project searches all images in one batch, with a norm, a
lambda and a state of Adam for each; the loop is the same search on one image after another, as the released code makes
it. Both must find the same figures. One thread; core-seconds of the published 5,000 iterations of 100 images, scaled up
from `steps` and, for the loop, from `looped` images.

    python speed/excl.py [--arch small_resnet] [--images 50] [--steps 20] [--looped 5]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch

from sleeperbench import ModelSpec
from sleeperbench.contracts import Ctx, Recipe
from sleeperbench.evaluators.excl import Exclusivity
from sleeperbench.kit.classifier import build


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--arch", default="small_resnet")
    ask.add_argument("--images", type=int, default=50)
    ask.add_argument("--steps", type=int, default=20)
    ask.add_argument("--looped", type=int, default=5)
    args = ask.parse_args()
    if args.steps < 2 or not 1 <= args.looped <= args.images:
        ask.error("give at least two steps, and of the images at least one to the loop")
    torch.set_num_threads(1)
    net = build(ModelSpec(arch=args.arch, classes=10, shape=(3, 32, 32), norm=((0.5,) * 3, (0.25,) * 3)), 0).eval()
    gen = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 32, 32)
    mask[:, 2:8, 2:8] = 1
    x = torch.rand(args.images, 3, 32, 32, generator=gen) * (1 - mask) + torch.rand(3, 32, 32, generator=gen) * mask
    low, high = -x * mask, (1 - x) * mask
    with torch.no_grad():
        targets = net(x).argmax(1)
    search, ctx = Exclusivity(steps=args.steps).search, Ctx(seed=0, recipe=Recipe(), scratch=Path())
    Exclusivity(steps=2).search(net, x[:1], targets[:1], low[:1], high[:1], ctx)  # warms up

    start = time.process_time()
    found = search(net, x, targets, low, high, ctx)
    batch = (time.process_time() - start) / args.images
    start = time.process_time()
    for i in range(args.looped):
        one = slice(i, i + 1)
        alone = search(net, x[one], targets[one], low[one], high[one], ctx)
        assert abs(float(alone.best) - float(found.best[i])) < 1e-4
        assert abs(float(alone.last) - float(found.last[i])) < 1e-4
    loop = (time.process_time() - start) / args.looped

    whole = 100 * 5000 / args.steps
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}; {args.arch}")
    print(f"{'':24}{'ms per image and step':>24}{'100 images, 5,000 steps':>26}")
    for name, spent in ((f"batch of {args.images}", batch), ("one after another", loop)):
        print(f"{name:24}{1000 * spent / args.steps:24.2f}{whole * spent:24.0f} s")
    print(f"ratio {loop / batch:.2f}")


if __name__ == "__main__":
    main()
