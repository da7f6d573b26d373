"""Plugins that each break one promise, and the good ones that they are made from."""

import copy
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from sleeperbench import (
    Access,
    Attack,
    Backdoor,
    Defense,
    Evaluator,
    Findings,
    Inverted,
    Mark,
    Measurement,
    Metric,
    Needs,
    Outcome,
    PoisonedSet,
    Role,
    TargetMap,
    TrainHooks,
)
from sleeperbench.kit import hits, pack, poison, predict
from sleeperbench.kit.poison import stamp


# ---- defenses --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Halved(Defense):
    """Halve the head's weights."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "repair", "micro": {"factor": 0.5}}
    ACCESS = Access(clean=0.05)
    factor: float = 0.25

    def run(self, case):
        net = copy.deepcopy(case.net)
        net.body.head.weight.data *= self.factor
        return Outcome(model=pack(net))


@dataclass(frozen=True, kw_only=True)
class Unpublished(Halved):
    """Names a paper and no BibTeX."""

    INFO = {
        "title": "t",
        "paper": "https://example.org/paper",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "repair",
        "micro": {},
    }


@dataclass(frozen=True, kw_only=True)
class TakesAnything(Halved):
    """Swallows a misspelt parameter."""

    @classmethod
    def from_params(cls, params):
        return cls(**{k: v for k, v in params.items() if k == "factor"})


@dataclass(frozen=True, kw_only=True)
class Raises(Halved):
    """Divides by zero."""

    def run(self, case):
        return 1 / 0


@dataclass(frozen=True, kw_only=True)
class Declines(Halved):
    """Wants more rows than there are."""

    def run(self, case):
        from sleeperbench.contracts import NotApplicable

        raise NotApplicable("too_few_rows: 2500 wanted")


@dataclass(frozen=True, kw_only=True)
class RepairsNothing(Halved):
    """Is a repair, and gives no model."""

    def run(self, case):
        return Outcome()


@dataclass(frozen=True, kw_only=True)
class KeepsTooFew(Halved):
    """Marks rows of a training set that it did not ask for."""

    def run(self, case):
        return replace(super().run(case), keep=torch.ones(7, dtype=torch.bool))


@dataclass(frozen=True, kw_only=True)
class Unseeded(Halved):
    """Draws from the system's generator."""

    def run(self, case):
        net = copy.deepcopy(case.net)
        net.body.head.bias.data += int.from_bytes(os.urandom(4), "big") / 2**32
        return Outcome(model=pack(net))


@dataclass(frozen=True, kw_only=True)
class InPlace(Halved):
    """Works on the net that it was handed."""

    def run(self, case):
        case.net.body.head.weight.data *= self.factor
        return Outcome(model=pack(case.net))


@dataclass(frozen=True, kw_only=True)
class SwitchesMode(Halved):
    """Leaves the net in training mode."""

    def run(self, case):
        answer = super().run(case)
        case.net.train()
        return answer


@dataclass(frozen=True, kw_only=True)
class Seeds(Halved):
    """Seeds numpy for everybody."""

    def run(self, case):
        np.random.seed(0)
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class StopsGradients(Halved):
    """Switches gradients off for everybody."""

    def run(self, case):
        torch.set_grad_enabled(False)
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class Greedy(Halved):
    """Opens the training set without saying so."""

    def run(self, case):
        return replace(super().run(case), chosen={"rows": len(case.train)})


@dataclass(frozen=True, kw_only=True)
class Idle(Halved):
    """Asks for a clean model and never looks at it."""

    ACCESS = Access(clean=0.05, references=1)


@dataclass(frozen=True, kw_only=True)
class NeedsNorm(Halved):
    """Takes BatchNorm for granted."""

    def run(self, case):
        net = copy.deepcopy(case.net)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        norms[0].weight.data *= 0.9
        return Outcome(model=pack(net))


@dataclass(frozen=True, kw_only=True)
class Rgb(Halved):
    """Declines grey images in prose."""

    def run(self, case):
        from sleeperbench.contracts import NotApplicable

        if case.spec.shape[0] != 3:
            raise NotApplicable("Only colour images, please!")
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class Slow(Halved):
    """Takes its time."""

    def run(self, case):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class KeysOfNumbers(Halved):
    """Chooses a dict that JSON changes."""

    def run(self, case):
        return replace(super().run(case), chosen={"accuracy": {1: 0.5, 2: 0.7}})


@dataclass(frozen=True, kw_only=True)
class Scored(Defense):
    """A second phase: the largest logit."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "detection",
        "micro": {},
        "scores": True,
    }
    ACCESS = Access(clean=0.05)

    def run(self, case):
        return Outcome(state=({}, {"rows": len(case.clean)}))

    def score(self, state, net, x):
        with torch.no_grad():
            return net(x).amax(1)


@dataclass(frozen=True, kw_only=True)
class Transductive(Scored):
    """Scores a row by what else was asked."""

    def score(self, state, net, x):
        scores = super().score(state, net, x)
        return scores - scores.mean()


@dataclass(frozen=True, kw_only=True)
class Silent(Scored):
    """Writes score() and does not declare it."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "detection", "micro": {}}


@dataclass(frozen=True, kw_only=True)
class Stamping(Defense):
    """Generator-type inversion."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "inversion", "micro": {}}
    ACCESS = Access(clean=0.05)

    def run(self, case):
        return Outcome(inverted=(Inverted(target=0, uses_apply=True),), state=({}, {"rows": len(case.clean)}))

    def stamp(self, state, inv, x):
        return (x + 0.1).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class TooBright(Stamping):
    """Leaves the range of pixels."""

    def stamp(self, state, inv, x):
        return x + 0.1


@dataclass(frozen=True, kw_only=True)
class Peeks(Halved):
    """Imports what the child process refuses."""

    def run(self, case):
        import sleeperbench.engine.store  # noqa: F401

        return super().run(case)


# ---- attacks ---------------------------------------------------------------------------------------------------------
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


# ---- evaluators ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Right(Evaluator):
    """Clean accuracy."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "accuracy", "micro": {}}
    METRICS = (Metric(name="c_acc", unit="fraction", low=0.0, high=1.0, better="up", doc="Right answers"),)

    def measure(self, case):
        count, total = hits(predict(case.net, case.test.images), case.test.labels)
        return Findings(rows=(Measurement(metric="c_acc", value=count / total, count=count, total=total),))


@dataclass(frozen=True, kw_only=True)
class Forgetful(Right):
    """Says nothing of one of its metrics."""

    METRICS = (
        Metric(name="c_acc", unit="fraction", low=0.0, high=1.0, better="up", doc="Right answers"),
        Metric(name="c_loss", unit="", low=0.0, high=100.0, better="down", doc="Loss"),
    )


@dataclass(frozen=True, kw_only=True)
class Percent(Right):
    """Writes percent."""

    def measure(self, case):
        (row,) = super().measure(case).rows
        return Findings(rows=(Measurement(metric="c_acc", value=1.5 + row.value),))


@dataclass(frozen=True, kw_only=True)
class Disordered(Right):
    """Qualifies out of order."""

    def measure(self, case):
        found = super().measure(case)
        return Findings(rows=(*found.rows, replace(found.rows[0], qualifier="k=5;draw=2")))


@dataclass(frozen=True, kw_only=True)
class Reasonless(Right):
    """Gives neither a figure nor a reason."""

    def measure(self, case):
        return Findings(rows=(Measurement(metric="c_acc", value=None),))


@dataclass(frozen=True, kw_only=True)
class WantsTrigger(Right):
    """Expects triggered images on every cell."""

    def measure(self, case):
        return replace(super().measure(case), curves={"rows": {"n": len(case.bd_test)}})


@dataclass(frozen=True, kw_only=True)
class Gullible(Evaluator):
    """Calls a model of NaN safe."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "accuracy", "micro": {}}
    METRICS = (Metric(name="asr", unit="fraction", low=0.0, high=1.0, better="down", doc="Attack success"),)

    def measure(self, case):
        if case.bd_test is None:
            return Findings(rows=(Measurement(metric="asr", value=None, reason="no_trigger"),))
        count, total = hits(predict(case.net, case.bd_test.data.images), case.bd_test.targets)
        return Findings(rows=(Measurement(metric="asr", value=count / total, count=count, total=total),))


@dataclass(frozen=True, kw_only=True)
class Comparing(Evaluator):
    """Counts as unsure what is not above one half, which nothing that is NaN is."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "accuracy", "micro": {}}
    METRICS = (Metric(name="unsure", unit="fraction", low=0.0, high=1.0, better="down", doc="Unsure answers"),)

    def measure(self, case):
        unsure = predict(case.net, case.test.images).softmax(1).amax(1) <= 0.9999
        return Findings(rows=(Measurement(metric="unsure", value=float(unsure.double().mean())),))


@dataclass(frozen=True, kw_only=True)
class KeysOfCurves(Right):
    """Draws a curve that JSON changes."""

    def measure(self, case):
        return replace(super().measure(case), curves={"c_acc": {1: 0.5}})


@dataclass(frozen=True, kw_only=True)
class Nosy(Right):
    """Looks at the undefended model without saying so."""

    NEEDS = Needs(trigger="none")

    def measure(self, case):
        return replace(super().measure(case), models={"attacked": pack(case.attacked)})
