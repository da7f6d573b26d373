"""Defenses that each break one promise, and the good ones that they are made from."""

import copy
import os
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from sleeperbench import (
    Access,
    Defense,
    Inverted,
    Outcome,
    Verdict,
)
from sleeperbench.contracts import NotApplicable
from sleeperbench.kit import pack, predict, tune

BASE = ("small_cnn", 10, 3)  # a defense's file must not import sleeperbench.testing


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
class CountsInDoubles(Halved):
    """Makes everybody's new tensors float64."""

    def run(self, case):
        answer = super().run(case)
        torch.set_default_dtype(torch.float64)
        return answer


@dataclass(frozen=True, kw_only=True)
class SeeksKernels(Halved):
    """Lets cudnn try kernels, for everybody and ever after."""

    def run(self, case):
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class TakesThreads(Halved):
    """Takes one thread more than it was given."""

    def run(self, case):
        torch.set_num_threads(torch.get_num_threads() + 1)
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
class PreparesInVain(Halved):
    """Prepares what its run never opens."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "repair",
        "micro": {"factor": 0.5},
        "prepares": True,
    }

    def prepare(self, case):
        return {"mean": case.clean.images.float().mean(0)}, None


@dataclass(frozen=True, kw_only=True)
class PreparesTooMuch(PreparesInVain):
    """Looks at the model while it prepares."""

    def prepare(self, case):
        return dict(case.net.state_dict()), None


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
        "traverses": False,
        "presumes": "a trigger that raises the largest logit",
    }
    ACCESS = Access(clean=0.05)

    def run(self, case):
        return Outcome(state=({}, {"rows": len(case.clean)}))

    def score(self, state, net, x):
        with torch.no_grad():
            return net(x).amax(1)


@dataclass(frozen=True, kw_only=True)
class ScoresColours(Scored):
    """Takes three channels for granted, in the second phase alone."""

    def score(self, state, net, x):
        return super().score(state, net, x) + x[:, 2].mean((1, 2))


@dataclass(frozen=True, kw_only=True)
class AlarmsInVain(Halved):
    """Has a threshold for scores that it does not give."""

    def run(self, case):
        return replace(super().run(case), alarm=0.5)


@dataclass(frozen=True, kw_only=True)
class Transductive(Scored):
    """Scores a row by what else was asked."""

    def score(self, state, net, x):
        scores = super().score(state, net, x)
        return scores - scores.mean()


@dataclass(frozen=True, kw_only=True)
class Silent(Scored):
    """Writes score() and does not declare it."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "detection",
        "micro": {},
        "traverses": False,
        "presumes": "a trigger that raises the largest logit",
    }


@dataclass(frozen=True, kw_only=True)
class Unsaid(Scored):
    """Judges, and does not say what it presumes."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "detection",
        "micro": {},
        "scores": True,
        "traverses": False,
        "presumes": " ",
    }


@dataclass(frozen=True, kw_only=True)
class ShrinksBatch(Defense):
    """Has a preset that changes more than effort."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "repair",
        "micro": {},
        "effort": ["steps"],
        "presets": {"reduced": {"steps": 2, "batch": 8}},
    }
    steps: int = 4
    batch: int = 16

    def run(self, case):
        return Outcome(model=tune(case.net, case.clean, ctx=case.ctx, lr=0.01, steps=self.steps, batch=self.batch))


@dataclass(frozen=True, kw_only=True)
class LowersNothing(ShrinksBatch):
    """Has a preset at the default."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "repair",
        "micro": {},
        "effort": ["steps"],
        "presets": {"reduced": {"steps": 4}},
    }


@dataclass(frozen=True, kw_only=True)
class NamesNothing(ShrinksBatch):
    """Has a preset for a parameter that is not there."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "repair",
        "micro": {},
        "effort": ["steps"],
        "presets": {"reduced": {"stepps": 2}},
    }


@dataclass(frozen=True, kw_only=True)
class Perhaps(Scored):
    """Judges, and says in words where yes or no is asked."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "detection",
        "micro": {},
        "scores": True,
        "traverses": "no",
        "presumes": "a trigger that raises the largest logit",
    }


@dataclass(frozen=True, kw_only=True)
class Stamping(Defense):
    """Generator-type inversion."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "inversion",
        "stamps": True,
        "micro": {},
        "traverses": False,
        "presumes": "a trigger that brightens",
    }
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
class StampsColours(Stamping):
    """Takes three channels for granted, in the second phase alone."""

    def stamp(self, state, inv, x):
        out = x.clone()
        out[:, 2] = 1
        return out


@dataclass(frozen=True, kw_only=True)
class LeavesAlone(Halved):
    """Wants more rows to choose a factor than there are, and says so."""

    def run(self, case):
        return Outcome(chosen={"factor": None, "unchanged": f"{len(case.clean)} rows are too few"})


@dataclass(frozen=True, kw_only=True)
class GivesBack(Halved):
    """Multiplies by one."""

    INFO = {"title": "t", "paper": "", "bibtex": "", "version": 1, "api": 1, "kind": "repair", "micro": {"factor": 1.0}}


@dataclass(frozen=True, kw_only=True)
class KeepsAll(Defense):
    """Cleanses, and finds every row as clean as any other."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "cleansing",
        "micro": {},
        "traverses": False,
        "presumes": "a trigger that shows",
    }
    ACCESS = Access(clean=0, train=True)

    def run(self, case):
        n = len(case.train)
        return Outcome(keep=torch.ones(n, dtype=torch.bool), suspicion=torch.zeros(n))


@dataclass(frozen=True, kw_only=True)
class SuspectsAllAlike(Scored):
    """A second phase without an opinion."""

    def score(self, state, net, x):
        return torch.zeros(len(x))


@dataclass(frozen=True, kw_only=True)
class FindsNothing(Defense):
    """Inverts with so few updates that no class is ever reached."""

    INFO = {
        "title": "t",
        "paper": "",
        "bibtex": "",
        "version": 1,
        "api": 1,
        "kind": "inversion",
        "micro": {},
        "traverses": True,
        "presumes": "a trigger that is found at once",
    }
    ACCESS = Access(clean=0.05)

    def run(self, case):
        scores = torch.zeros(case.spec.classes)
        return Outcome(
            verdict=Verdict(score=float(scores.max()), threshold=0.5, label_scores=scores),
            chosen={"claimed": [], "rows": len(case.clean)},
        )


@dataclass(frozen=True, kw_only=True)
class AcquitsAll(FindsNothing):
    """Gives one number, the same for every model."""

    def run(self, case):
        return Outcome(verdict=Verdict(score=0.0, threshold=0.5), chosen={"rows": len(case.clean)})


@dataclass(frozen=True, kw_only=True)
class CountsClasses(FindsNothing):
    """Gives a number that says how many classes and weights a model has, and nothing of what it does."""

    def run(self, case):
        weights = sum(p.numel() for p in case.net.parameters())
        return Outcome(verdict=Verdict(score=weights / case.spec.classes, threshold=0.5), chosen={"n": len(case.clean)})


@dataclass(frozen=True, kw_only=True)
class AcquitsOne(AcquitsAll):
    """Gives one number for nets of the base case's kind, and declines all others."""

    def run(self, case):
        if (case.spec.arch, case.spec.classes, case.spec.shape[0]) != BASE:
            raise NotApplicable("other_kind: made for one kind of net alone")
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class TellsClean(FindsNothing):
    """Gives one number per model: the mean largest logit of clean rows."""

    def run(self, case):
        top = float(predict(case.net, case.clean.images).amax(1).mean())
        return Outcome(verdict=Verdict(score=top, threshold=0.5))


@dataclass(frozen=True, kw_only=True)
class ScoresTenLabels(FindsNothing):
    """Gives scores of ten labels, however many there are."""

    def run(self, case):
        return Outcome(verdict=Verdict(score=9.0, threshold=10.0, label_scores=torch.arange(10.0)))


@dataclass(frozen=True, kw_only=True)
class Rounds(Halved):
    """Takes the weights through half precision and back."""

    def run(self, case):
        return Outcome(model=pack(copy.deepcopy(case.net).half().float()))


@dataclass(frozen=True, kw_only=True)
class AlmostAllAlike(FindsNothing):
    """Gives label scores that differ by rounding alone."""

    def run(self, case):
        scores = 0.5 + 1e-6 * torch.arange(case.spec.classes)
        return Outcome(verdict=Verdict(score=0.5, threshold=0.6, label_scores=scores), chosen={"n": len(case.clean)})


@dataclass(frozen=True, kw_only=True)
class ScoresOnlyColours(Scored):
    """Declines grey images in the second phase."""

    def score(self, state, net, x):
        if x.shape[1] != 3:
            raise NotApplicable("needs_colour: three channels")
        return super().score(state, net, x)


@dataclass(frozen=True, kw_only=True)
class ScoresGrudgingly(Scored):
    """Declines grey images in the second phase, without a reason that can be tabulated."""

    def score(self, state, net, x):
        if x.shape[1] != 3:
            raise NotApplicable("Only colour images, please!")
        return super().score(state, net, x)


@dataclass(frozen=True, kw_only=True)
class StampsOnlyColours(Stamping):
    """Declines grey images in the second phase."""

    def stamp(self, state, inv, x):
        if x.shape[1] != 3:
            raise NotApplicable("needs_colour: three channels")
        return super().stamp(state, inv, x)


@dataclass(frozen=True, kw_only=True)
class Hangs(Halved):
    """Waits in a child process for what its parent alone has."""

    def run(self, case):
        while "sleeperbench.testing" not in sys.modules:
            time.sleep(0.1)
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class Hoards(Halved):
    """Sets aside three gigabytes that it never uses."""

    def run(self, case):
        room = torch.empty(3 << 30, dtype=torch.uint8)
        assert len(room)
        return super().run(case)


@dataclass(frozen=True, kw_only=True)
class Peeks(Halved):
    """Imports what the child process refuses."""

    def run(self, case):
        import sleeperbench.engine.store  # noqa: F401

        return super().run(case)
