"""Defenses: what they are handed, and what they may answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from sleeperbench.contracts.access import Access
from sleeperbench.contracts.attack import Backdoor
from sleeperbench.contracts.context import Cost, Ctx, Recipe
from sleeperbench.contracts.method import Method
from sleeperbench.contracts.models import Model, ModelSpec
from sleeperbench.data.images import ImageSet


class UndeclaredAccess(AttributeError):
    """A defense reached for something that its ACCESS does not declare."""


class QueryNet(Protocol):
    """A model that only answers, counting the images asked."""

    def __call__(self, x: Tensor) -> Tensor:
        """Labels (N,) or scores (N, K) for images [0, 1]."""
        ...


class Case(Protocol):
    """What a defense is handed; a property it did not declare raises `UndeclaredAccess`.

    `clean` is its clean rows; `tune` and `val` are one fixed split of them, 80 to 20. `train` is the shuffled training
    set. `inner` is the wrapped defense's outcome, for wrappers, and `spent` what its run cost. `marks` (N,) are the
    `Mark`s of the rows of `train`, for oracles that declare both. `prepared` is what `prepare` returned.
    """

    net: Any
    spec: ModelSpec
    clean: ImageSet
    tune: ImageSet
    val: ImageSet
    train: ImageSet
    references: Sequence[Model]
    oracle: Backdoor
    inner: Outcome
    spent: Cost
    marks: Tensor
    prepared: tuple[Mapping[str, Tensor], Any]
    recipe: Recipe
    ctx: Ctx


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Is this model backdoored: larger scores mean yes; flagged iff `score` > `threshold`.

    `label_scores` (K,) per class, `pairs` (P, 2) of suspected (source, target), both optional.
    """

    score: float
    threshold: float
    label_scores: Tensor | None = None
    pairs: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """A recovered trigger: mask (1, H, W) and pattern (C, H, W), or an additive delta (C, H, W), or `uses_apply`."""

    target: int
    source: int | None = None
    mask: Tensor | None = None
    pattern: Tensor | None = None
    delta: Tensor | None = None
    uses_apply: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a defense answers.

    Args:
        model: The repaired model; None leaves it unchanged.
        opaque: The model keeps private code and only predicts, in a worker of its own.
        keep: bool over `case.train` rows: which to train on.
        relabel: int64 over `case.train` rows: labels to train on.
        suspicion: float over `case.train` rows, larger is more suspicious.
        verdict: Is the model backdoored.
        inverted: Recovered triggers.
        state: (tensors, JSON) that the second phase reads.
        alarm: The method's own threshold for inputs: a second-phase score above it calls the input triggered.
        chosen: What was chosen on the defender's own data, as JSON; evaluator `evidence` shows it on the cell page. Of
            its names `curves` (as `Findings.curves`) and `pictures` (of tensors of `state`) are drawn, see
            docs/plugins.md, and `claimed` says that an inverter claims these labels, or none.
        path: Candidates by name (one per threshold, rho, epoch); `model` is the marked choice among them.
    """

    model: Model | None = None
    opaque: bool = False
    keep: Tensor | None = None
    relabel: Tensor | None = None
    suspicion: Tensor | None = None
    verdict: Verdict | None = None
    inverted: tuple[Inverted, ...] = ()
    state: tuple[Mapping[str, Tensor], Any] | None = None
    alarm: float | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    path: Mapping[str, Model] = field(default_factory=dict)


class Defense(Method):
    """A defense: repair, in-training, detection or inversion.

    `ACCESS` is what it receives. `REQUIRES` names what the architecture must have (`bn`, `conv`, `linear_head`);
    without it the cell is `not_applicable`. One that judges (INFO kinds `detection`, `inversion`, `cleansing`) says in
    INFO whether it `traverses` the classes, each as a possible target in turn, and what it `presumes` of the trigger.

    Work that needs no model, such as training shadow models, belongs into `prepare`: with `"prepares": True` in INFO it
    is done once for all models of a data set, architecture and seed.
    """

    ACCESS: ClassVar[Access] = Access()
    REQUIRES: ClassVar[frozenset[str]] = frozenset()

    def prepare(self, case: Case) -> tuple[Mapping[str, Tensor], Any]:
        """What `run` finds as `case.prepared`: tensors and JSON. This case has clean rows, spec, recipe and ctx alone.

        It has the seed of `run`, so what both draw under one name is the same.
        """
        raise NotImplementedError  # abstract

    @abstractmethod
    def run(self, case: Case) -> Outcome:
        """Repair or inspect the model of `case`."""

    def score(self, state: tuple[Mapping[str, Tensor], Any], net: Any, x: Tensor) -> Tensor:
        """Second phase: (N,) scores, larger is more suspicious. Row i may not depend on the other rows.

        Or (N, 1 + S): the score, and up to 8 statistics behind it, which count nowhere and can be drawn.
        """
        raise NotImplementedError  # abstract

    def stamp(self, state: tuple[Mapping[str, Tensor], Any], inv: Inverted, x: Tensor) -> Tensor:
        """Second phase of generator-type inversion: images with the recovered trigger."""
        raise NotImplementedError  # abstract

    def predict(self, state: tuple[Mapping[str, Tensor], Any], x: Tensor) -> Tensor:
        """Second phase of an opaque model: logits (N, K)."""
        raise NotImplementedError  # abstract
