"""What poisoning a training set costs in batches, against a loop over single images.

Each attack that poisons pixels by a rule, with no network, poisons CIFAR-10's training images where the data root has
them, else noise of that shape; the first line says which. The project does it through `stamp`, in batches of 100 that
are rounded to 8 bit; a loop makes a PIL image of each row, puts the same trigger on it with NumPy (single_images.py)
and makes a PIL image of the result, as data-set classes with a transform per image do. Of several triggers it is the
first one; of `belt:X` it is a cover by masking, since its dirty rows are X's. Preparing the trigger, and of the loop
what its rows draw, is left out. One thread; rounds run in turn; seconds are core-seconds, medians over the rounds. The
loop is timed on `--looped` rows and scaled up. Before that, both must agree on these rows: at most one pixel value in a
thousand may differ by more than one grey level.

Not timed: trojannn, lc, narcissus, ssba, iad and lira, whose trigger is made by a network that has to be trained first;
blind and hybrid, whose triggers are BadNets' kind and those of their members; beltpp, whose rows are those of belt.

    python speed/poisoning.py [--rows 50000] [--looped 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import torch
from PIL import Image
from single_images import Single, loop_over

from sleeperbench import Attack, Role
from sleeperbench.attacks.adaptive_blend import AdaptiveBlend
from sleeperbench.attacks.adaptive_patch import AdaptivePatch
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.belt import Belt
from sleeperbench.attacks.blended import Blended
from sleeperbench.attacks.bpp import BppAttack
from sleeperbench.attacks.cassock import Cassock
from sleeperbench.attacks.ctrl import CTRL
from sleeperbench.attacks.ftrojan import FTrojan
from sleeperbench.attacks.hcb import HCB
from sleeperbench.attacks.lf import LF
from sleeperbench.attacks.multi_trigger import MultiTrigger
from sleeperbench.attacks.refool import Refool
from sleeperbench.attacks.sig import SIG
from sleeperbench.attacks.sin_wave import SinWave
from sleeperbench.attacks.tact import TaCT
from sleeperbench.attacks.wanet import WaNet
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.data.errors import DataError
from sleeperbench.data.images import ImageSet
from sleeperbench.data.load import load
from sleeperbench.kit.poison import stamp

ATTACKS: dict[str, Attack] = {
    "badnets": BadNets(), "blended": Blended(), "sig": SIG(), "sin_wave": SinWave(), "lf": LF(), "ftrojan": FTrojan(),
    "ctrl": CTRL(), "bpp": BppAttack(), "bpp, dithering": BppAttack(dithering=True),
    "wanet": WaNet(), "refool": Refool(), "adaptive_blend": AdaptiveBlend(), "adaptive_patch": AdaptivePatch(),
    "tact": TaCT(), "multi_trigger": MultiTrigger(), "cassock": Cassock(), "hcb": HCB(),
}  # fmt: skip
WRAPPED: dict[str, Attack] = {"belt:badnets": BadNets(), "belt:blended": Blended()}
DITHERED = 100
"""Rows at most that the pixel loop of error diffusion is timed on."""


def rows_of(n: int) -> tuple[ImageSet, str]:
    """The first `n` training images of CIFAR-10, over again where it has fewer, or noise; and what they are."""
    try:
        data = load("cifar10", "train")
    except DataError:
        gen = torch.Generator().manual_seed(0)
        noise = ImageSet(
            images=torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=gen),
            labels=torch.randint(0, 10, (n,), generator=gen), ids=torch.arange(n),
            classes=tuple("0123456789"), name="noise", split="train", digest="",
        )  # fmt: skip
        return noise, "noise of 3x32x32, since the data root has no CIFAR-10"
    differs = "" if data.canonical else ", which differs from the canonical release"
    return replace(data.rows(torch.arange(n) % len(data)), ids=torch.arange(n)), f"CIFAR-10{differs}"


def one_by_one(data: ImageSet, single: Single) -> list[Image.Image]:
    """Every row through PIL, as a data set with a transform per image does it."""
    out = []
    for i, array in enumerate(data.images.permute(0, 2, 3, 1).numpy()):
        x = np.asarray(Image.fromarray(array), dtype=np.float32) / 255
        out.append(Image.fromarray(np.round(single(x, i) * 255).astype(np.uint8)))
    return out


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=50_000)
    ask.add_argument("--looped", type=int, default=1000, help="rows that the loop over single images is timed on")
    ask.add_argument("--rounds", type=int, default=3)
    args = ask.parse_args()
    if min(args.rows, args.looped, args.rounds) < 1:
        ask.error("give at least one row and one round")
    torch.set_num_threads(1)
    data, what = rows_of(args.rows)
    ctx = Ctx(seed=0, recipe=Recipe(), scratch=Path(), target=0)
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, {args.rows} rows of {what}")
    print(f"{'attack':20}{'batches, s':>12}{'PIL loop, s':>13}{'speed-up':>16}{'range':>18}")
    for name, attack in (ATTACKS | WRAPPED).items():
        inner = WRAPPED.get(name)
        role = Role.TRAIN if inner is None else Role.COVER
        made = attack.prepare(data, ctx) if inner is None else Belt().prepare(data, replace(ctx, inner=inner))
        trigger = made.triggers[0]
        rows = min(args.looped, args.rows, DITHERED if "dithering" in name else args.rows)
        few = data.rows(torch.arange(rows))
        gen = ctx.generator("trigger", trigger.name, role)  # what `stamp` gives the trigger
        batched, looped = [], []
        for round_ in range(args.rounds + 1):
            single = loop_over(trigger, few.ids, gen)
            start = time.process_time()
            stamped = stamp(data if round_ else few, trigger, role, ctx).images
            middle = time.process_time()
            singles = one_by_one(few, single)
            if round_:
                batched.append(middle - start)
                looped.append((time.process_time() - middle) * args.rows / rows)
                continue
            # The first round warms up and compares.
            apart = np.abs(stamped.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(singles).astype(int)) > 1
            if apart.mean() > 1e-3:
                raise SystemExit(f"{name}: batches and loop differ in {apart.mean():.1%} of the pixel values")
        ratios = sorted(b / a for a, b in zip(batched, looped, strict=True))
        print(
            f"{name:20}{statistics.median(batched):12.2f}{statistics.median(looped):13.1f}"
            f"{statistics.median(ratios):15.1f}x{f'{ratios[0]:.1f}-{ratios[-1]:.1f}':>18}",
            flush=True,
        )


if __name__ == "__main__":
    main()
