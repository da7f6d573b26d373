"""What the trainer adds to forward, backward and update, and what the usual data loader loop adds.

All loops train `small_resnet` on CIFAR-shaped noise: batch 128, SGD, fp32, one thread. The unit is core-seconds of this
process and its children per image trained on. Loops run in turn, round after round; the table gives medians and, of
each loop, the ratio of its speed to the first. The bare loops repeat forward, backward and update on one batch.

    python speed/trainer.py [--rows 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: worker processes read it as well

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.train import fit

BATCH = 128
NORM = ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
SPEC = ModelSpec(arch="small_resnet", classes=10, shape=(3, 32, 32), norm=NORM)
RECIPE = Recipe(epochs=1, lr=0.01, batch=BATCH)
CPU = torch.device("cpu")


def optimiser(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=RECIPE.lr, momentum=0.9, weight_decay=RECIPE.weight_decay)


def update(net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
    return loss.detach()


def bare(layout: torch.memory_format) -> Callable[[Classifier, ImageSet], None]:
    """Forward, backward and update on one resident batch; no data are fed."""

    def run(net: Classifier, data: ImageSet) -> None:
        net.to(memory_format=layout)  # type: ignore[call-overload]
        net.train()
        opt = optimiser(net)
        x, y = to_float(data.images[:BATCH]).contiguous(memory_format=layout), data.labels[:BATCH]
        for _ in range(len(data) // BATCH):
            update(net, opt, x, y)

    return run


def kit(net: Classifier, data: ImageSet) -> None:
    """The project's trainer: shuffle, crop and flip included."""
    fit(net, data, RECIPE, Ctx(seed=0, recipe=RECIPE, scratch=Path()))


class Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images, as torchvision's own data sets hold them, with the usual transforms."""

    def __init__(self, data: ImageSet, *, train: bool) -> None:
        self.arrays, self.labels = data.images.permute(0, 2, 3, 1).numpy(), data.labels.tolist()
        random = [RandomCrop(32, 4), RandomHorizontalFlip()] if train else []
        self.transform = Compose([*random, ToTensor(), Normalize(*NORM)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(torchvision.transforms.functional.to_pil_image(self.arrays[i])), self.labels[i]


def loader_loop(workers: int) -> Callable[[Classifier, ImageSet], None]:
    """The usual loop: data loader, loss read in every step, as many test images evaluated after the epoch."""

    def run(net: Classifier, data: ImageSet) -> None:
        body = net.body  # the transforms normalise already
        opt = optimiser(body)
        body.train()
        train = DataLoader(
            Pictures(data, train=True), BATCH, shuffle=True, drop_last=True, num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        summed = 0.0
        for x, y in train:
            summed += update(body, opt, x, y).item()
        body.eval()
        with torch.no_grad():
            for x, y in DataLoader(Pictures(data, train=False), BATCH, num_workers=workers):
                (body(x).argmax(1) == y).sum().item()

    return run


def core_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=1024, help=f"rows per epoch, at least {BATCH}")
    ask.add_argument("--rounds", type=int, default=5)
    args = ask.parse_args()
    if args.rows < BATCH or args.rounds < 1:
        ask.error(f"give at least {BATCH} rows and one round")
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    n = args.rows // BATCH * BATCH
    data = ImageSet(
        images=torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=gen),
        labels=torch.randint(0, 10, (n,), generator=gen), ids=torch.arange(n), classes=tuple("0123456789"),
        name="noise", split="train", digest="",
    )  # fmt: skip
    loops = {
        "bare loop, channels last": bare(torch.channels_last),
        "bare loop, channels first": bare(torch.contiguous_format),
        "sleeperbench.kit.fit": kit,
        "data loader, 0 workers, with evaluation": loader_loop(0),
        "data loader, 2 workers, with evaluation": loader_loop(2),
    }
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(args.rounds + 1):
        for name, loop in loops.items():
            net = build(SPEC, seed=0)
            start = core_seconds()
            loop(net, data)
            if round_:  # the first warms up
                spent[name].append((core_seconds() - start) / n)
    base = next(iter(spent.values()))
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, {n} rows, batch {BATCH}")
    print(f"{'loop':42}{'images per core-second':>24}{'speed / bare':>14}{'range':>16}")
    for name, seconds in spent.items():
        ratios = sorted(b / s for b, s in zip(base, seconds, strict=True))
        print(
            f"{name:42}{1 / statistics.median(seconds):24,.0f}{statistics.median(ratios):14.2f}"
            f"{f'{ratios[0]:.2f}-{ratios[-1]:.2f}':>16}"
        )


if __name__ == "__main__":
    main()
