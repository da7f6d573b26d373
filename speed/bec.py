"""What the backdoor existence coefficient costs per model, and what CKA in feature space saves.

PreActResNet18 on CIFAR-shaped noise, random weights: `rows` images for CKA and `pairs` for TAC, 10 % of the channels of
16 convolutions. Timed are TAC of the attacked model (once per attacked model, shared by nobody: each cell measures it),
the comparison of one model with it, and the same for each further random choice of channels.

Then CKA of n rows in d dimensions: `sleeperbench.kit.cka` against the form with n x n Gram matrices and a centring
matrix's work done by means, in the same run; both must agree to 1e-8. One thread, float64, medians over the rounds.

    python speed/bec.py [--rows 500] [--pairs 200] [--draws 2] [--rounds 1]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
from torch import Tensor

from sleeperbench import ModelSpec
from sleeperbench.contracts import Ctx, Recipe
from sleeperbench.evaluators.bec import strongest
from sleeperbench.kit.classifier import build
from sleeperbench.kit.similarity import cka, compare, sites, tac

SHAPES = ((500, 24), (500, 102), (500, 816), (500, 6144), (4000, 24), (4000, 102), (4000, 816))
"""Rows and dimensions: the last stage of a small CNN, a mid one, and BEC's own smallest and largest slice."""


def gram_form(x: Tensor, y: Tensor) -> float:
    """Linear CKA by Gram matrices of all pairs of rows, whatever the dimension."""

    def centred(v: Tensor) -> Tensor:
        k = v @ v.T
        return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()

    k, other = centred(x), centred(y)
    return float((k * other).sum() / (k.square().sum() * other.square().sum()).sqrt())


def median_of(rounds: int, work: Callable[[], object]) -> float:
    """Seconds of processor time, after one round that warms up."""
    spent = []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return statistics.median(spent[1:])


def per_model(rows: int, pairs: int, draws: int, rounds: int) -> None:
    spec = ModelSpec(arch="preact_resnet18", classes=10, shape=(3, 32, 32), norm=((0.5,) * 3, (0.25,) * 3))
    attacked, other = (build(spec, seed).eval() for seed in (0, 1))
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (max(rows, pairs), 3, 32, 32), dtype=torch.uint8, generator=gen)
    ctx = Ctx(seed=0, recipe=Recipe(), scratch=Path())
    names = sites(attacked, images[:1])["conv"]
    change = tac(attacked, images[:50], images.flip(3)[:50], names)
    top = {n: strongest(change[n], 0.1) for n in names}

    seconds = median_of(rounds, lambda: tac(attacked, images[:pairs], images.flip(3)[:pairs], names))
    print(f"TAC of {pairs} pairs, 16 layers: {seconds:.1f} s, {1000 * seconds / pairs:.1f} ms per pair")
    one = median_of(rounds, lambda: compare(attacked, {"a": other}, images[:rows], names, [top], ctx))
    two = median_of(rounds, lambda: compare(attacked, {"a": other, "b": other}, images[:rows], names, [top], ctx))
    print(f"comparison on {rows} images: {two - one:.2f} s per model, {2 * one - two:.2f} s for the attacked one")
    more = median_of(rounds, lambda: compare(attacked, {"a": other}, images[:rows], names, [top] * (1 + draws), ctx))
    print(f"each further choice of channels: {(more - one) / draws:.2f} s for one model and the attacked one")


def forms(rounds: int) -> None:
    gen = torch.Generator().manual_seed(0)
    print(f"{'n':>6}{'d':>7}{'gram form, ms':>16}{'kit.cka, ms':>14}{'ratio':>8}")
    for n, d in SHAPES:
        x = torch.randn(n, d, generator=gen, dtype=torch.float64)
        y = x + torch.randn(n, d, generator=gen, dtype=torch.float64)
        assert abs(gram_form(x, y) - cka(x, y)) < 1e-8
        slow, fast = (median_of(rounds, functools.partial(f, x, y)) for f in (gram_form, cka))
        print(f"{n:6}{d:7}{1000 * slow:16.1f}{1000 * fast:14.2f}{slow / fast:8.1f}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=500)
    ask.add_argument("--pairs", type=int, default=200)
    ask.add_argument("--draws", type=int, default=2)
    ask.add_argument("--rounds", type=int, default=1)
    args = ask.parse_args()
    if min(args.rows, args.pairs) < 50 or min(args.draws, args.rounds) < 1:
        ask.error("give at least 50 rows and pairs, one draw and one round")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}")
    forms(args.rounds)
    per_model(args.rows, args.pairs, args.draws, args.rounds)


if __name__ == "__main__":
    main()
