"""Attacks that each break one promise, and the good ones that they are made from."""

from dataclasses import dataclass, replace

import torch

from sleeperbench import (
    Attack,
    Backdoor,
    Mark,
    PoisonedSet,
    Role,
    TargetMap,
    TrainHooks,
)
from sleeperbench.kit import poison
from sleeperbench.kit.poison import stamp


class Tint:
    """x' = 0.7 x + 0.3 colour."""

    name = "tint"

    def __init__(self, colour, target):
        self.colour, self.targets = colour, TargetMap.all_to_one(target)

    def apply(self, x, y, ids, role: Role, gen):
        return x * 0.7 + 0.3 * self.colour

    def range(self, x, ids):
        return (-0.3 * self.colour).expand_as(x), (0.3 * (1 - self.colour)).expand_as(x)

    def static(self):
        return torch.full_like(self.colour[:1], 0.3), self.colour


@dataclass(frozen=True, kw_only=True)
class Tinted(Attack):
    """A tint over the whole image."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "data_poisoning", "micro": {}}
    TRIGGER = Tint

    def prepare(self, train, ctx):
        colour = torch.rand(train.shape, generator=ctx.generator("colour"))
        return self.restore({"colour": colour}, {"target": ctx.target})

    def poison(self, train, b, eligible, rate, ctx):
        return poison(train, b, eligible, rate, ctx, include_target=False)

    @classmethod
    def restore(cls, tensors, info):
        return Backdoor(triggers=(cls.TRIGGER(tensors["colour"], info["target"]),), tensors=tensors, info=info)


class Bright(Tint):
    def apply(self, x, y, ids, role, gen):
        return x + 0.5

    def range(self, x, ids):
        return None

    def static(self):
        return None


@dataclass(frozen=True, kw_only=True)
class OutOfRange(Tinted):
    """Never clamps."""

    TRIGGER = Bright

    def decoy(self, train, b, ctx):
        return Tinted().prepare(train, ctx)


class Faint(Tint):
    def apply(self, x, y, ids, role, gen):
        return x * 0.999 + 0.001 * x.clamp(0, 1)

    range = Bright.range
    static = Bright.static


@dataclass(frozen=True, kw_only=True)
class Invisible(Tinted):
    """Is gone after rounding."""

    TRIGGER = Faint

    def decoy(self, train, b, ctx):
        return Tinted().prepare(train, ctx)


class Averaging(Tint):
    def apply(self, x, y, ids, role, gen):
        return x * 0.7 + 0.3 * (self.colour + x.mean(0)) / 2

    range = Bright.range
    static = Bright.static


@dataclass(frozen=True, kw_only=True)
class MixesRows(Tinted):
    """Adds the batch's mean image."""

    TRIGGER = Averaging


class Grain(Tint):
    def apply(self, x, y, ids, role, gen):
        return x * 0.7 + 0.3 * torch.rand(x.shape, generator=gen)

    range = Bright.range
    static = Bright.static


@dataclass(frozen=True, kw_only=True)
class DrawsPerBatch(Tinted):
    """Draws noise for the batch, so that an image's noise depends on its place."""

    TRIGGER = Grain

    def poison(self, train, b, eligible, rate, ctx):
        p = super().poison(train, b, eligible, rate, ctx)
        rows = p.mark == Mark.DIRTY
        images = p.data.images.clone()
        images[rows] = stamp(train.rows(rows), b.triggers[0], Role.TRAIN, ctx).images
        return replace(p, data=replace(p.data, images=images))

    def decoy(self, train, b, ctx):
        return Tinted().prepare(train, ctx)


class Own(Tint):
    def apply(self, x, y, ids, role, gen):
        alpha = (0.2 + 0.1 * (ids % 3))[:, None, None, None]
        return x * (1 - alpha) + alpha * self.colour

    range = Bright.range
    static = Bright.static


@dataclass(frozen=True, kw_only=True)
class PerImage(Tinted):
    """Another strength for every image: what may depend on a row's id."""

    TRIGGER = Own


class Inverse(Tint):
    def static(self):
        return torch.full_like(self.colour[:1], 0.7), self.colour


@dataclass(frozen=True, kw_only=True)
class WrongStatic(Tinted):
    """Gives the image's share for the pattern's."""

    TRIGGER = Inverse


class Free(Tint):
    def range(self, x, ids):
        return torch.full_like(x, -1), torch.full_like(x, 1)


@dataclass(frozen=True, kw_only=True)
class WideRange(Tinted):
    """Allows deltas that leave the image."""

    TRIGGER = Free


class Generous(Tint):
    def __init__(self, colour, target):
        super().__init__(colour, target)
        self.targets = replace(self.targets, counts=lambda y, ids: torch.ones_like(y, dtype=torch.bool))


@dataclass(frozen=True, kw_only=True)
class CountsAll(Tinted):
    """Counts images of the target class as successes."""

    TRIGGER = Generous


@dataclass(frozen=True, kw_only=True)
class MovesRows(Tinted):
    """Puts poisoned rows at the end without saying so."""

    def poison(self, train, b, eligible, rate, ctx):
        p = super().poison(train, b, eligible, rate, ctx)
        order = p.mark.argsort(stable=True)
        columns = {n: getattr(p, n)[order] for n in ("mark", "trigger_id", "true_labels", "appended")}
        return PoisonedSet(data=p.data.rows(order), **columns)


@dataclass(frozen=True, kw_only=True)
class TakesPool(Tinted):
    """Poisons rows that it may not touch."""

    def poison(self, train, b, eligible, rate, ctx):
        return super().poison(train, b, torch.ones_like(eligible), rate, ctx)


@dataclass(frozen=True, kw_only=True)
class Mislabels(Tinted):
    """Keeps the true label of dirty rows."""

    def poison(self, train, b, eligible, rate, ctx):
        p = super().poison(train, b, eligible, rate, ctx)
        return replace(p, data=replace(p.data, labels=p.true_labels.clone()))


@dataclass(frozen=True, kw_only=True)
class OtherPixels(Tinted):
    """Trains on another trigger than it says."""

    def poison(self, train, b, eligible, rate, ctx):
        p = super().poison(train, b, eligible, rate, ctx)
        images = p.data.images.clone()
        images[p.mark == Mark.DIRTY, :, :4, :4] = 255
        return replace(p, data=replace(p.data, images=images))


@dataclass(frozen=True, kw_only=True)
class Doubles(Tinted):
    """Poisons twice as many rows as asked for."""

    def poison(self, train, b, eligible, rate, ctx):
        return super().poison(train, b, eligible, 2 * rate, ctx)


@dataclass(frozen=True, kw_only=True)
class LeavesClean(Tinted):
    """Gives the clean set where the rate rounds to no row, and says nothing."""

    def poison(self, train, b, eligible, rate, ctx):
        return super().poison(train, b, eligible, round(rate * len(train)) / len(train), ctx)


@dataclass(frozen=True, kw_only=True)
class Overdraws(Tinted):
    """Takes for granted that there are as many rows as asked for."""

    def poison(self, train, b, eligible, rate, ctx):
        p = super().poison(train, b, eligible, rate, ctx)
        if rate:
            (p.mark == Mark.DIRTY).nonzero()[round(rate * len(train)) - 1]
        return p


class Relabels(TrainHooks):
    def batch(self, x, y, ids, step):
        return x, torch.ones_like(y), torch.ones_like(y)


@dataclass(frozen=True, kw_only=True)
class Undeclared(Tinted):
    """Poisons batches and calls its snapshot exact."""

    def hooks(self, train, b, eligible, rate, ctx):
        return Relabels()


class Doubling(TrainHooks):
    def batch(self, x, y, ids, step):
        return 2 * x, y, torch.ones_like(y)


class Fading(TrainHooks):
    def batch(self, x, y, ids, step):
        return ((255 * x).clamp(max=254) + 0.25) / 255, y, torch.ones_like(y)


@dataclass(frozen=True, kw_only=True)
class FaintBatches(Tinted):
    """Hooks give images between the levels of 8 bit."""

    SNAPSHOT = "declared"

    def hooks(self, train, b, eligible, rate, ctx):
        return Fading()


@dataclass(frozen=True, kw_only=True)
class BrightBatches(Tinted):
    """Hooks give images beyond white."""

    SNAPSHOT = "declared"

    def hooks(self, train, b, eligible, rate, ctx):
        return Doubling()


@dataclass(frozen=True, kw_only=True)
class Forgets(Tinted):
    """Keeps the colour out of what is stored."""

    def prepare(self, train, ctx):
        colour = torch.rand(train.shape, generator=ctx.generator("colour"))
        trigger = Tint(colour, ctx.target)
        return Backdoor(triggers=(trigger,), tensors={"colour": colour.mean((1, 2), keepdim=True)}, info={"target": 1})


@dataclass(frozen=True, kw_only=True)
class SameDecoy(Tinted):
    """Offers the true trigger as the placebo."""

    def decoy(self, train, b, ctx):
        return b


@dataclass(frozen=True, kw_only=True)
class ShortMarks(Tinted):
    """Gives marks as 32-bit numbers."""

    def poison(self, train, b, eligible, rate, ctx):
        p = super().poison(train, b, eligible, rate, ctx)
        return replace(p, mark=p.mark.int())
