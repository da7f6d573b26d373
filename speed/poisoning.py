"""What poisoning a training set costs in batches, against a loop over single images.

Each attack poisons CIFAR-10's training images where the data root has them, else noise of that shape; the first line
says which. The project does it through `stamp`, in batches of 100 that are rounded to 8 bit; a loop makes a PIL image
of each row, puts the same trigger on it with NumPy (single_images.py) and makes a PIL image of the result, as data-set
classes with a transform per image do. Several triggers share the rows evenly. Of `belt:X` it is a cover by masking,
since its dirty rows are X's. Preparing the trigger, and of the loop what its rows draw, is left out. One thread; rounds
run in turn; seconds are core-seconds, medians over the rounds. The loop is timed on `--looped` rows and scaled up.
Before that, both must agree on these rows: at most one pixel value in a thousand may differ by more than one level.

What a network makes costs as much before training as after it: the patch of trojannn and the noise of narcissus are
drawn at random, as are lc's perturbations, here of every row, and the weights of ssba, iad and lira, which pass one
image at a time in the loop. iad, lira and blind poison batches while they train; here their triggers go on as a set is
stamped for a test. beltpp is left out: its rows are belt's.

    python speed/poisoning.py [--rows 50000] [--looped 1000] [--rounds 3] [--attack NAME ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import torch
from PIL import Image
from single_images import Single, loop_over

from sleeperbench import Attack, Backdoor, Role
from sleeperbench.attacks.adaptive_blend import AdaptiveBlend
from sleeperbench.attacks.adaptive_patch import AdaptivePatch
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.belt import Belt
from sleeperbench.attacks.blended import Blended
from sleeperbench.attacks.blind import Blind
from sleeperbench.attacks.bpp import BppAttack
from sleeperbench.attacks.cassock import Cassock
from sleeperbench.attacks.ctrl import CTRL
from sleeperbench.attacks.ftrojan import FTrojan
from sleeperbench.attacks.hcb import HCB
from sleeperbench.attacks.hybrid import Hybrid
from sleeperbench.attacks.iad import Iad
from sleeperbench.attacks.lc import LabelConsistent
from sleeperbench.attacks.lf import LF
from sleeperbench.attacks.lira import Lira
from sleeperbench.attacks.multi_trigger import MultiTrigger
from sleeperbench.attacks.narcissus import Narcissus
from sleeperbench.attacks.refool import Refool
from sleeperbench.attacks.sig import SIG
from sleeperbench.attacks.sin_wave import SinWave
from sleeperbench.attacks.ssba import SSBA, Encoder, code
from sleeperbench.attacks.tact import TaCT
from sleeperbench.attacks.trojannn import TrojanNN
from sleeperbench.attacks.wanet import WaNet
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.data.errors import DataError
from sleeperbench.data.images import ImageSet
from sleeperbench.data.load import load
from sleeperbench.kit.drawn import network
from sleeperbench.kit.generators import seeded
from sleeperbench.kit.patches import lay, noise
from sleeperbench.kit.poison import stamp

ATTACKS: dict[str, Attack] = {
    "badnets": BadNets(), "blended": Blended(), "sig": SIG(), "sin_wave": SinWave(), "lf": LF(), "ftrojan": FTrojan(),
    "ctrl": CTRL(), "bpp": BppAttack(), "bpp, dithering": BppAttack(dithering=True),
    "wanet": WaNet(), "refool": Refool(), "adaptive_blend": AdaptiveBlend(), "adaptive_patch": AdaptivePatch(),
    "tact": TaCT(), "multi_trigger": MultiTrigger(), "cassock": Cassock(), "hcb": HCB(), "hybrid": Hybrid(),
    "lira": Lira(), "blind": Blind(),
}  # fmt: skip
"""Attacks that train nothing before they poison."""
WRAPPED: dict[str, Attack] = {"belt:badnets": BadNets(), "belt:blended": Blended()}
TARGET = {"targets": "all_to_one", "target": 0, "classes": 10}
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


def trojannn(data: ImageSet) -> Backdoor:
    """A patch of random colours at the place of TrojanNN's."""
    mask, pattern = lay(data.shape, 20, 20, noise(3, 10, torch.Generator().manual_seed(0)))
    return TrojanNN.restore({"mask": mask, "pattern": pattern}, TARGET)


def narcissus(data: ImageSet) -> Backdoor:
    """Random noise as strong as Narcissus'."""
    signal = torch.randint(-16, 17, data.shape, generator=torch.Generator().manual_seed(0)) / 255
    return Narcissus.restore({"signal": signal}, TARGET | {"train": 1.0, "test": 3.0})


def lc(data: ImageSet) -> Backdoor:
    """Random signs in LC's corners, and on every row a random perturbation as strong as LC's."""
    gen = torch.Generator().manual_seed(0)
    signal = torch.zeros(1, *data.shape[1:])
    for rows in (slice(0, 3), slice(-3, None)):
        for cols in (slice(0, 3), slice(-3, None)):
            signal[0, rows, cols] = 2.0 * torch.randint(2, (3, 3), generator=gen) - 1
    delta = torch.randint(-8, 9, data.images.shape, dtype=torch.int8, generator=gen)
    return LabelConsistent.restore({"signal": signal, "ids": data.ids, "delta": delta}, TARGET | {"amplitude": 1.0})


def ssba(data: ImageSet) -> Backdoor:
    """SSBA's encoder as it is drawn."""
    channels, size, _ = data.shape
    about = {"channels": channels, "size": size, "bits": 20, "strength": SSBA().strength}
    weights = {f"encoder.{k}": v for k, v in seeded(Encoder, 0, channels, size, 20).state_dict().items()}
    return SSBA.restore({**weights, "code": code("a", 20)}, TARGET | about)


def iad(data: ImageSet) -> Backdoor:
    """IAD's two networks as they are drawn."""
    width, made = Iad().width, {"bank": data.images[:1]}
    for part, outputs in (("pattern", 3), ("mask", 1)):
        made |= {f"aux.{part}.{k}": v for k, v in network(3, outputs, 0, width).state_dict().items()}
    return Iad.restore(made, TARGET | {"width": width, "negative": False, "shift": [0, 0]})


DRAWN: dict[str, Callable[[ImageSet], Backdoor]] = {
    "trojannn": trojannn, "narcissus": narcissus, "lc": lc, "ssba": ssba, "iad": iad,
}  # fmt: skip
"""Attacks that train what makes the trigger; here it is drawn."""


def made(name: str, data: ImageSet, ctx: Ctx) -> Backdoor:
    """The attack's triggers."""
    if name in DRAWN:
        return DRAWN[name](data)
    if name in WRAPPED:
        return Belt().prepare(data, replace(ctx, inner=WRAPPED[name]))
    return ATTACKS[name].prepare(data, ctx)


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
    names = list(ATTACKS | WRAPPED | DRAWN)
    ask.add_argument("--attack", action="append", choices=names, help="only this one; may be repeated")
    args = ask.parse_args()
    if min(args.rows, args.looped, args.rounds) < 1:
        ask.error("give at least one row and one round")
    torch.set_num_threads(1)
    data, what = rows_of(args.rows)
    ctx = Ctx(seed=0, recipe=Recipe(), scratch=Path(), target=0)
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, {args.rows} rows of {what}")
    print(f"{'attack':20}{'batches, s':>12}{'PIL loop, s':>13}{'speed-up':>16}{'range':>18}")
    for name in args.attack or names:
        role = Role.COVER if name in WRAPPED else Role.TRAIN
        rows = min(args.looped, args.rows, DITHERED if "dithering" in name else args.rows)
        triggers = made(name, data, ctx).triggers
        # LC poisons rows of the target class alone.
        whole = replace(data, labels=torch.zeros_like(data.labels)) if name == "lc" else data
        shares = [whole.rows(part) for part in torch.arange(args.rows).tensor_split(len(triggers))]
        fews = [whole.rows(part) for part in torch.arange(rows).tensor_split(len(triggers))]
        gens = [ctx.generator("trigger", t.name, role) for t in triggers]  # what `stamp` gives them
        batched, looped = [], []
        for round_ in range(args.rounds + 1):
            loops = [loop_over(t, few.ids, gen) for t, few, gen in zip(triggers, fews, gens, strict=True)]
            start = time.process_time()
            stamped = [
                stamp(share, t, role, ctx).images for share, t in zip(shares if round_ else fews, triggers, strict=True)
            ]
            middle = time.process_time()
            singles = [image for few, single in zip(fews, loops, strict=True) for image in one_by_one(few, single)]
            if round_:
                batched.append(middle - start)
                looped.append((time.process_time() - middle) * args.rows / rows)
                continue
            # The first round warms up and compares.
            images = torch.cat(stamped).permute(0, 2, 3, 1).numpy()
            apart = np.abs(images.astype(int) - np.stack(singles).astype(int)) > 1
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
