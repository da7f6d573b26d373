"""What the black-box re-activation attack costs per 1,000 queries, against a loop that asks image by image.

A classifier with random weights, noise of CIFAR's shape, `images` per query. The project keeps the perturbed images
between queries, changes one window of them, and asks in batches; the loop adds the whole perturbation to each image and
asks for one image at a time, as a client of a prediction service would. Both make the same draws and must end with the
same perturbation. One thread; core-seconds, the loop's scaled up from `looped` queries.

    python speed/bba.py [--arch small_resnet] [--images 500] [--queries 20] [--looped 3]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
from torch import Tensor
from torch.nn import functional as F

from sleeperbench import ImageSet, ModelSpec
from sleeperbench.contracts import Ctx, Recipe
from sleeperbench.evaluators.bba import BlackBoxActivation, side, signs
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float


def one_by_one(net: Classifier, attack: BlackBoxActivation, data: ImageSet, targets: Tensor, ctx: Ctx) -> Tensor:
    """The perturbation after the last of the attack's queries, found image by image."""
    taken = torch.randperm(len(data), generator=ctx.generator("images"))
    x, wanted = to_float(data.images[taken]), targets[taken]
    c, height, width = x.shape[1:]
    gen = ctx.generator("search")

    @torch.no_grad()
    def loss(d: Tensor) -> float:
        asked = (net((image + d).clamp(0, 1)[None]) for image in x)
        return sum(float(F.cross_entropy(a, t[None])) for a, t in zip(asked, wanted, strict=True))

    d = (attack.rho * signs(gen, c, 1, width)).repeat(1, height, 1)
    best = loss(d)
    for i in range(attack.queries[-1] - 1):
        s = side(i, attack.horizon, attack.area, height, width)
        row, column = (int(torch.randint(n - s + 1, (1,), generator=gen)) for n in (height, width))
        new = d.clone()
        while torch.equal(new, d):
            new[:, row : row + s, column : column + s] = attack.rho * signs(gen, c, 1, 1)
        value = loss(new)
        if value < best:
            d, best = new, value
    return d


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--arch", default="small_resnet")
    ask.add_argument("--images", type=int, default=500)
    ask.add_argument("--queries", type=int, default=20)
    ask.add_argument("--looped", type=int, default=3)
    args = ask.parse_args()
    if args.images < 1 or not 2 <= args.looped <= args.queries:
        ask.error("give at least one image, two queries in the loop, and no fewer in batches")
    torch.set_num_threads(1)
    spec = ModelSpec(arch=args.arch, classes=10, shape=(3, 32, 32), norm=((0.5,) * 3, (0.25,) * 3))
    net = build(spec, 0).eval()
    gen = torch.Generator().manual_seed(0)
    data = ImageSet(
        images=torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=gen),
        labels=torch.zeros(args.images, dtype=torch.int64), ids=torch.arange(args.images),
        classes=tuple("0123456789"), name="noise", split="train", digest="",
    )  # fmt: skip
    # Targets of all classes, so that no perturbation reaches all of them and ends the search early.
    targets = torch.randint(10, (args.images,), generator=gen)
    seconds = {}
    for name, queries in (("warm", 2), ("loop", args.looped), ("compared", args.looped), ("batches", args.queries)):
        attack, ctx = BlackBoxActivation(queries=(queries,)), Ctx(seed=0, recipe=Recipe(), scratch=Path())
        start = time.process_time()
        if name == "loop":
            looped = one_by_one(net, attack, data, targets, ctx)
        else:
            found = attack.search(net, data, targets, ctx)[-1]
            if found.queries != queries or ctx.cost.queries != queries * args.images:
                raise SystemExit(f"{found.queries} queries were made instead of {queries}")
        seconds[name] = (time.process_time() - start) * 1000 / queries
        if name == "compared" and not torch.equal(found.d[0], looped):
            raise SystemExit("batches and loop found different perturbations")
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, {args.arch}")
    batches, loop = seconds["batches"], seconds["loop"]
    print(f"1,000 queries of {args.images} images: {batches:.1f} s in batches, {loop:.1f} s image by image,")
    print(f"{loop / batches:.1f} times as long")


if __name__ == "__main__":
    main()
