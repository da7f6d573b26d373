"""What poisoning a training set costs in batches, against a loop over single images.

Each attack that poisons pixels by a rule, with no network, poisons CIFAR-shaped noise: the project through `stamp`, in
batches of 100 that are rounded to 8 bit; a loop makes a PIL image of each row, puts the same trigger on it with NumPy
(what warps or draws anew per image, such as WaNet, Refool or HCB: as a batch of one) and makes a PIL image of the
result, as data-set classes with a transform per image do. Of several triggers it is the first one. Preparing the
trigger is left out on both sides. One thread; rounds run in turn; seconds are core-seconds, medians over the rounds.
The loop is timed on `--looped` rows and scaled up. Before that, both must agree within one grey level on these rows.

    python speed/poisoning.py [--rows 50000] [--looped 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sleeperbench import Attack, Role
from sleeperbench.attacks.adaptive_blend import AdaptiveBlend, Mosaic
from sleeperbench.attacks.adaptive_patch import AdaptivePatch
from sleeperbench.attacks.badnets import BadNets, Patch
from sleeperbench.attacks.blended import Blended, Overlay
from sleeperbench.attacks.bpp import BppAttack, Quantise
from sleeperbench.attacks.cassock import Cassock, Varied
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
from sleeperbench.contracts.attack import Trigger
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.additive import Additive
from sleeperbench.kit.poison import stamp

Pixels = NDArray[np.float32]
ATTACKS: dict[str, Attack] = {
    "badnets": BadNets(), "blended": Blended(), "sig": SIG(), "sin_wave": SinWave(), "lf": LF(), "ftrojan": FTrojan(),
    "ctrl": CTRL(), "bpp": BppAttack(), "bpp, dithering": BppAttack(dithering=True),
    "wanet": WaNet(), "refool": Refool(), "adaptive_blend": AdaptiveBlend(), "adaptive_patch": AdaptivePatch(),
    "tact": TaCT(), "multi_trigger": MultiTrigger(), "cassock": Cassock(), "hcb": HCB(),
}  # fmt: skip
DITHERED = 100
"""Rows at most that the pixel loop of error diffusion is timed on."""


def loop_over(trigger: Trigger) -> Callable[[Pixels], Pixels] | None:
    """The trigger on one image of 0..1, (H, W, C); None where the loop calls the trigger on a batch of one."""
    if isinstance(trigger, Mosaic | Varied):  # each image its own, as drawn by its id
        return None
    if isinstance(trigger, Patch):
        mask, pattern = (t.permute(1, 2, 0).numpy() for t in (trigger.mask, trigger.pattern))
        return lambda x: x * (1 - mask) + pattern * mask
    if isinstance(trigger, Overlay):
        picture, alpha = trigger.picture.permute(1, 2, 0).numpy(), np.float32(trigger.alpha_train)
        return lambda x: x * (1 - alpha) + picture * alpha
    if isinstance(trigger, Additive):
        signal = (trigger.train * trigger.signal.expand(3, 32, 32)).permute(1, 2, 0).numpy()
        return lambda x: np.clip(x + signal, 0, 1)
    if isinstance(trigger, Quantise):
        steps = trigger.levels - 1
        return (lambda x: diffuse(x, steps)) if trigger.dithering else (lambda x: np.round(x * steps) / steps)
    return None


def diffuse(x: Pixels, steps: int) -> Pixels:
    """Floyd and Steinberg's error diffusion, pixel by pixel."""
    room = np.pad(x, ((0, 1), (1, 1), (0, 0)))
    for i in range(32):
        for j in range(1, 33):
            old = room[i, j].copy()
            room[i, j] = np.round(old * steps) / steps
            error = old - room[i, j]
            room[i, j + 1] += error * np.float32(7 / 16)
            room[i + 1, j + 1] += error * np.float32(1 / 16)
            room[i + 1, j] += error * np.float32(5 / 16)
            room[i + 1, j - 1] += error * np.float32(3 / 16)
    return np.clip(room[:32, 1:33], 0, 1)


def one_by_one(data: ImageSet, trigger: Trigger, gen: torch.Generator) -> list[Image.Image]:
    """Every row through PIL, as a data set with a transform per image does it."""
    single, out = loop_over(trigger), []
    for i, array in enumerate(data.images.permute(0, 2, 3, 1).numpy()):
        x = np.asarray(Image.fromarray(array), dtype=np.float32) / 255
        if single is not None:
            made = single(x)
        else:
            row = torch.from_numpy(x).permute(2, 0, 1)[None]
            one = slice(i, i + 1)
            made = trigger.apply(row, data.labels[one], data.ids[one], Role.TRAIN, gen)[0].permute(1, 2, 0).numpy()
        out.append(Image.fromarray(np.round(made * 255).astype(np.uint8)))
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
    gen = torch.Generator().manual_seed(0)
    data = ImageSet(
        images=torch.randint(0, 256, (args.rows, 3, 32, 32), dtype=torch.uint8, generator=gen),
        labels=torch.randint(0, 10, (args.rows,), generator=gen), ids=torch.arange(args.rows),
        classes=tuple("0123456789"), name="noise", split="train", digest="",
    )  # fmt: skip
    ctx = Ctx(seed=0, recipe=Recipe(), scratch=Path(), target=0)
    print(
        f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, {args.rows} rows of 3x32x32"
    )
    print(f"{'attack':16}{'batches, s':>12}{'PIL loop, s':>13}{'speed-up':>16}{'range':>18}")
    for name, attack in ATTACKS.items():
        trigger = attack.prepare(data, ctx).triggers[0]
        rows = min(args.looped, args.rows, DITHERED if "dithering" in name else args.rows)
        few = data.rows(torch.arange(rows))
        gen = ctx.generator("trigger", trigger.name, Role.TRAIN)  # what `stamp` gives the trigger
        batched, looped = [], []
        for round_ in range(args.rounds + 1):
            start = time.process_time()
            stamped = stamp(data if round_ else few, trigger, Role.TRAIN, ctx).images
            middle = time.process_time()
            singles = one_by_one(few, trigger, gen)
            if round_:
                batched.append(middle - start)
                looped.append((time.process_time() - middle) * args.rows / rows)
                continue
            # The first round warms up and compares.
            apart = np.abs(stamped.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(singles).astype(int)) > 1
            if apart.mean() > 1e-3:
                raise SystemExit(f"{name}: batches and loop differ in {apart.mean():.1%} of the pixels")
        ratios = sorted(b / a for a, b in zip(batched, looped, strict=True))
        print(
            f"{name:16}{statistics.median(batched):12.2f}{statistics.median(looped):13.1f}"
            f"{statistics.median(ratios):15.1f}x{f'{ratios[0]:.1f}-{ratios[-1]:.1f}':>18}",
            flush=True,
        )


if __name__ == "__main__":
    main()
