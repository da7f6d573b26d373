"""Triggers put on one image by NumPy, as a data set with a transform per image does it: the loops of poisoning.py.

Written out anew from what the attacks' docstrings say, for 3x32x32. What a row draws is drawn for all rows beforehand,
from the numbers that the project takes, so that both sides make the same images; the loop is spared that work. Networks
that make triggers are the project's, one image at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate1d
from torch import Generator, Tensor

from sleeperbench.attacks.adaptive_blend import Mosaic
from sleeperbench.attacks.adaptive_patch import Marks
from sleeperbench.attacks.badnets import Patch
from sleeperbench.attacks.blended import Overlay
from sleeperbench.attacks.bpp import Quantise
from sleeperbench.attacks.cassock import Varied
from sleeperbench.attacks.hcb import FeaturePatch
from sleeperbench.attacks.lc import Corners
from sleeperbench.attacks.lira import Noise
from sleeperbench.attacks.refool import Reflection
from sleeperbench.attacks.ssba import Hidden
from sleeperbench.attacks.wanet import Warp
from sleeperbench.contracts.attack import Trigger
from sleeperbench.contracts.context import derive
from sleeperbench.kit.additive import Additive
from sleeperbench.kit.drawn import Drawn
from sleeperbench.kit.fuzzy import Fuzzy
from sleeperbench.kit.rowwise import uniform

SIDE = 32
STREAKS, LENGTH = SIDE * SIDE // 60, SIDE // 5
Pixels = NDArray[np.float32]
Single = Callable[[Pixels, int], Pixels]
"""(image of 0..1 (H, W, C), its place among the rows) -> the image with the trigger."""


@functools.singledispatch
def loop_over(trigger: Trigger, ids: Tensor, gen: Generator) -> Single:
    """The trigger in the form of training, on one image.

    Args:
        trigger: A trigger that is made by a rule; of a `Fuzzy` one its cover by masking.
        ids: int64 (N,) of the rows.
        gen: What `stamp` gives the trigger.
    """
    raise TypeError(f"{type(trigger).__name__} has no loop over single images")


@loop_over.register(Patch)
def patch(trigger: Patch, ids: Tensor, gen: Generator) -> Single:
    """A pattern under a mask."""
    mask, pattern = _last(trigger.mask), _last(trigger.pattern)
    return lambda x, i: x * (1 - mask) + pattern * mask


@loop_over.register(Overlay)
def overlay(trigger: Overlay, ids: Tensor, gen: Generator) -> Single:
    """A picture over all."""
    picture, alpha = _last(trigger.picture), np.float32(trigger.alpha_train)
    return lambda x, i: x * (1 - alpha) + picture * alpha


@loop_over.register(Mosaic)
def mosaic(trigger: Mosaic, ids: Tensor, gen: Generator) -> Single:
    """A picture's blocks."""
    picture, alpha = _last(trigger.picture), np.float32(trigger.alpha_train)
    draws, side = uniform(gen, ids, trigger.pieces).numpy(), round(trigger.pieces**0.5)

    def single(x: Pixels, i: int) -> Pixels:
        keep = np.zeros(trigger.pieces, dtype=np.float32)
        keep[np.argsort(draws[i], kind="stable")[: trigger.kept]] = alpha
        share = keep.reshape(side, side).repeat(SIDE // side, 0).repeat(SIDE // side, 1)[..., None]
        return x + share * (picture - x)

    return single


@loop_over.register(Marks)
def marks(trigger: Marks, ids: Tensor, gen: Generator) -> Single:
    """One of several marks."""
    masks, patterns = [_last(m) for m in trigger.masks], [_last(p) for p in trigger.patterns]
    draws = uniform(gen, ids, 1)[:, 0].numpy()

    def single(x: Pixels, i: int) -> Pixels:
        which = int(draws[i] * len(masks))
        return x + masks[which] * (patterns[which] - x)

    return single


@loop_over.register(Additive)
def additive(trigger: Additive, ids: Tensor, gen: Generator) -> Single:
    """A fixed signal."""
    signal = _last(trigger.train * trigger.signal.expand(3, SIDE, SIDE))
    return lambda x, i: np.clip(x + signal, 0, 1)


@loop_over.register(Varied)
def varied(trigger: Varied, ids: Tensor, gen: Generator) -> Single:
    """A fixed signal at an opacity of the image's own."""
    signal = _last(trigger.train * trigger.signal.expand(3, SIDE, SIDE))
    edges, factors = ([np.float32(v) for v in part] for part in zip(*trigger.steps, strict=True))
    draws = uniform(gen, ids, 1)[:, 0].numpy()

    def single(x: Pixels, i: int) -> Pixels:
        factor = next(f for e, f in zip(edges, factors, strict=True) if draws[i] < e)
        return np.clip(x + factor * signal, 0, 1)

    return single


@loop_over.register(Quantise)
def quantise(trigger: Quantise, ids: Tensor, gen: Generator) -> Single:
    """Fewer levels, with or without error diffusion."""
    steps = trigger.levels - 1
    return (lambda x, i: _diffuse(x, steps)) if trigger.dithering else (lambda x, i: np.round(x * steps) / steps)


def _diffuse(x: Pixels, steps: int) -> Pixels:
    """Floyd and Steinberg's error diffusion, pixel by pixel."""
    room = np.pad(x, ((0, 1), (1, 1), (0, 0)))
    for i in range(SIDE):
        for j in range(1, SIDE + 1):
            old = room[i, j].copy()
            room[i, j] = np.round(old * steps) / steps
            error = old - room[i, j]
            room[i, j + 1] += error * np.float32(7 / 16)
            room[i + 1, j + 1] += error * np.float32(1 / 16)
            room[i + 1, j] += error * np.float32(5 / 16)
            room[i + 1, j - 1] += error * np.float32(3 / 16)
    return np.clip(room[:SIDE, 1 : SIDE + 1], 0, 1)


@loop_over.register(Warp)
def warp(trigger: Warp, ids: Tensor, gen: Generator) -> Single:
    """Bilinear sampling; the four pixels and weights of each place are the same for all images."""
    at = (trigger.grid.numpy() + 1) / 2 * (SIDE - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, SIDE - 1)
    rest = (at - low).astype(np.float32)
    (left, top), (right, bottom), (across, down) = (np.moveaxis(v, 2, 0) for v in (low, high, rest))
    across, down = across[..., None], down[..., None]

    def single(x: Pixels, i: int) -> Pixels:
        upper = x[top, left] * (1 - across) + x[top, right] * across
        lower = x[bottom, left] * (1 - across) + x[bottom, right] * across
        return upper * (1 - down) + lower * down

    return single


@loop_over.register(Reflection)
def reflection(trigger: Reflection, ids: Tensor, gen: Generator) -> Single:
    """Another picture, doubled or blurred, in linear light."""
    scenes = [_last(p / 255) for p in trigger.pictures]
    draws = uniform(gen, ids, 8).numpy()
    side = ((np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE * 6 - 3) ** 2
    vignette = np.exp(-(side[:, None] + side) / 4)[..., None]

    def single(x: Pixels, i: int) -> Pixels:
        u = draws[i]
        r, t = scenes[int(u[0] * len(scenes))] ** 2.2, x**2.2
        alpha = trigger.alpha or 0.55 + 0.4 * u[7]
        if u[1] < trigger.ghost_rate:
            down, right = 3 + int(u[2] * 6), 3 + int(u[3] * 6)
            share = 0.15 + 0.35 * u[5] if u[4] < 0.5 else 0.85 - 0.35 * u[5]
            seen = share * _resized(r[down:, right:]) + (1 - share) * _resized(r[:-down, :-right])
            seen *= 1 - alpha
        else:
            seen = _blurred(r, 1 + 4 * u[6])
            both = seen + t
            over = both > 1
            excess = np.where(over, both - 1, 0).sum((0, 1)) / np.maximum(over.sum((0, 1)), 1)
            seen = np.clip(seen - excess * (1.08 + 0.1 * u[5]), 0, 1) * vignette * (1 - alpha / 2)
        return np.clip(seen + alpha * t, 0, 1) ** (1 / 2.2)

    return single


def _resized(x: Pixels) -> Pixels:
    """Stretched to the image's size by PIL, a channel at a time: it has no colour images of floats."""
    planes = [Image.fromarray(np.ascontiguousarray(x[..., c])) for c in range(3)]
    return np.stack([np.asarray(p.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for p in planes], 2)


def _blurred(x: Pixels, sigma: float) -> Pixels:
    """A Gaussian that ends at two deviations."""
    reach = int(np.ceil(2 * sigma))
    line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    line /= line.sum()
    return correlate1d(correlate1d(x, line, 0, mode="mirror"), line, 1, mode="mirror")


@loop_over.register(FeaturePatch)
def rain(trigger: FeaturePatch, ids: Tensor, gen: Generator) -> Single:
    """A patch, on some images over rain, streak by streak."""
    mask, pattern = _last(trigger.mask), _last(trigger.pattern)
    wet = trigger.effective(ids).numpy()
    seed = Generator().manual_seed(derive(trigger.effective.seed, "weather"))
    draws = uniform(seed, ids, 3 * STREAKS + 1).numpy()
    side = np.exp(np.float32(-2))
    line, step = np.array([side, 1, side]) / (1 + 2 * side), np.arange(LENGTH, dtype=np.float32)

    def single(x: Pixels, i: int) -> Pixels:
        if wet[i]:
            angle = np.deg2rad(70 + 10 * draws[i, 0])
            drawn = np.zeros((SIDE, SIDE), dtype=np.float32)
            for top, left, bright in draws[i, 1:].reshape(3, STREAKS).T:
                rows = np.floor(top * (SIDE + LENGTH) - LENGTH + step * np.sin(angle)).astype(int)
                cols = np.floor(left * SIDE + step * np.cos(angle)).astype(int)
                inside = (rows >= 0) & (rows < SIDE) & (cols < SIDE)
                at = rows[inside], cols[inside]
                drawn[at] = np.maximum(drawn[at], 0.3 + 0.4 * bright)
            drawn = correlate1d(correlate1d(drawn, line, 0, mode="constant"), line, 1, mode="constant")
            x = np.clip(0.8 * x + drawn[..., None], 0, 1)
        return np.where(mask > 0, pattern, x)

    return single


@loop_over.register(Fuzzy)
def masked(trigger: Fuzzy, ids: Tensor, gen: Generator) -> Single:
    """Any trigger, taken back at a share of the pixels that it changes."""
    plain = loop_over(trigger.plain, ids, gen)
    draws = uniform(torch.Generator().manual_seed(derive(gen.initial_seed(), "fuzzy")), ids, SIDE * SIDE).numpy()

    def single(x: Pixels, i: int) -> Pixels:
        made = plain(x, i)
        changed = np.flatnonzero((np.round(made * 255) != np.round(x * 255)).any(2))
        rows = max(1, int(trigger.mask_rate * len(changed) + 1e-9))
        back = changed[np.argsort(draws[i, changed], kind="stable")[:rows]]
        made.reshape(-1, 3)[back] = x.reshape(-1, 3)[back]
        return made

    return single


@loop_over.register(Corners)
def corners(trigger: Corners, ids: Tensor, gen: Generator) -> Single:
    """The row's own perturbation, clipped, then signs in the corners."""
    signal = np.float32(trigger.amplitude) * _last(trigger.signal)
    place = {row: k for k, row in enumerate(trigger.ids.tolist())}
    own = [np.ascontiguousarray(trigger.delta[place[row]].permute(1, 2, 0).numpy()) for row in ids.tolist()]
    return lambda x, i: np.clip(np.clip(x + own[i].astype(np.float32) / 255, 0, 1) + signal, 0, 1)


@loop_over.register(Hidden)
def hidden(trigger: Hidden, ids: Tensor, gen: Generator) -> Single:
    """What the encoder makes of the image and the message."""
    encoder, message = trigger.encoder.eval(), trigger.code[None].float()
    return lambda x, i: np.clip(x + np.float32(trigger.strength) * _passed(x, lambda t: encoder(t, message)), 0, 1)


@loop_over.register(Drawn)
def drawn(trigger: Drawn, ids: Tensor, gen: Generator) -> Single:
    """A pattern and a mask of two networks."""
    pattern, mask = trigger.pattern.eval(), trigger.mask.eval()

    def single(x: Pixels, i: int) -> Pixels:
        share = np.tanh(20 * _passed(x, mask) - 10) / 2 + np.float32(0.5)
        return x + (_passed(x, pattern) - x) * share

    return single


@loop_over.register(Noise)
def generated(trigger: Noise, ids: Tensor, gen: Generator) -> Single:
    """A network's noise."""
    net = trigger.generator.eval()
    return lambda x, i: np.clip(x + np.float32(trigger.eps) * np.tanh(_passed(2 * x - 1, net)), 0, 1)


@torch.no_grad()
def _passed(x: Pixels, net: Callable[[Tensor], Tensor]) -> Pixels:
    """What a network makes of one image."""
    out: Pixels = net(torch.from_numpy(x).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    return out


def _last(t: Tensor) -> Pixels:
    """Channels first to channels last."""
    return np.ascontiguousarray(t.permute(1, 2, 0).numpy(), dtype=np.float32)
