"""Evaluators: what is measured on a cell, and with what."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from sleeperbench.contracts.access import Needs
from sleeperbench.contracts.attack import Backdoor
from sleeperbench.contracts.context import Cost, Ctx, Recipe
from sleeperbench.contracts.defense import Outcome
from sleeperbench.contracts.method import Method
from sleeperbench.contracts.models import Model, ModelSpec
from sleeperbench.data.images import ImageSet


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that an evaluator writes. `low` and `high` bound it; `better` says which way is good."""

    name: str
    unit: str
    low: float
    high: float
    better: Literal["up", "down", "none"]
    doc: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure, or the reason why there is none.

    Args:
        metric: A name from the evaluator's METRICS.
        value: The figure; None with a reason.
        qualifier: `k=v` pairs joined by `;` in key order, such as `draw=2;k=5`.
        count: For shares: successes.
        total: For shares: trials.
        reason: snake_case word, then optional `: detail`.
        stage: `attacked`, `defended` or `reactivated`; empty lets the engine say attacked or defended.
    """

    metric: str
    value: float | None
    qualifier: str = ""
    count: int | None = None
    total: int | None = None
    reason: str = ""
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluator found.

    Args:
        rows: The figures.
        curves: Name -> {"title", "x_label", "y_label", "threshold"?, "series": [{"label", "x", "y", "low"?, "high"?,
            "points"?}]}. Lines, or with `points` True unjoined marks; bars where `x` holds names. What has no `series`
            is shown as it is.
        pictures: Name -> uint8 (C, H, W).
        models: Name -> model that other evaluators may read, such as a retuned one.
    """

    rows: tuple[Measurement, ...]
    curves: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Triggered images, rendered once to 8 bit by the attack task.

    Args:
        data: Triggered images with their true labels and source ids; only rows that count, but for `bd_train`, which
            has all that were poisoned.
        clean: The same rows without trigger, in the same order.
        targets: int64 (N,), the label the attacker wants.
        trigger_id: int64 (N,).
    """

    data: ImageSet
    clean: ImageSet
    targets: Tensor
    trigger_id: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another cell's outcome, named by the suite."""

    name: str
    net: nn.Module
    outcome: Outcome


class EvalCase(Protocol):
    """What an evaluator is handed; a property that its NEEDS do not declare raises `UndeclaredAccess`.

    `net` is the defended model in eval mode; `attacked` the undefended one, `twin` one trained anew under the same
    attack (None but on undefended cells), `again` what the same defense makes of `attacked` under another seed (None on
    undefended cells), and `descends` says whether `net` was made from the weights of `attacked`. `anew` is what the
    inverter answers that a repair wraps when it is run on `net` (None where the defense is no such repair).
    `test` and `probe` are clean rows that no defense has seen. `bd_test` and `bd_probe` are the same rows triggered,
    None for attack `none`. `bd_train` are the training rows that the attack poisoned, covers aside, as its `poison`
    gave them: what was trained on, or where SNAPSHOT is `declared` what stands for it; None where no row is marked.
    `decoy_test` and `decoy_probe` carry the placebo trigger, None when no placebo stays below 10 % ASR on the attacked
    model.
    `leak_test` are triggered rows of classes that a source-specific backdoor spares, `cover_test` rows as the attack
    covers them, which both should keep their label; None where an attack has none. `oracle` is the live backdoor.
    `controls` are this evaluator's own findings on the control cells it names. `evaluators` are those of the others
    that it reads on the same cell, `settings` their parameters. `answers` (N,) are
    an input detector's second-phase scores, `beside` (N, S) the statistics that it gave with them (None without any),
    `asked` (N,) says which of those images were triggered; all are None where the defense has no second phase or the
    attack no trigger. `stamps` are uint8 images with recovered triggers that are
    the inverter's own code: `<i>.test` and `<i>.probe`, like `test` and `probe`, for `outcome.inverted[i]`. `inner` is
    what the defense answered that a wrapper wraps, None where nothing is wrapped; it comes with `inverted`. `spent` is
    what the defense's tasks counted: `run`, `prepare`, `wrapped` (`wrapped2`, ... where a wrapper wraps another),
    `wrapped_prepare` and `score`.
    """

    net: nn.Module
    spec: ModelSpec
    attacked: nn.Module
    twin: nn.Module | None
    again: nn.Module | None
    anew: Outcome | None
    descends: bool
    outcome: Outcome
    inner: Outcome | None
    test: ImageSet
    probe: ImageSet
    bd_test: Rendered | None
    bd_probe: Rendered | None
    bd_train: Rendered | None
    decoy_test: Rendered | None
    decoy_probe: Rendered | None
    leak_test: Rendered | None
    cover_test: Rendered | None
    oracle: Backdoor
    clean_models: Sequence[nn.Module]
    defended_clean: nn.Module | None
    controls: Mapping[str, Findings]
    peers: Sequence[Peer]
    surrogates: Sequence[Peer]
    evaluators: Mapping[str, Findings]
    settings: Mapping[str, Mapping[str, Any]]
    cells: Sequence[Mapping[str, Any]]
    answers: Tensor | None
    beside: Tensor | None
    asked: Tensor | None
    stamps: Mapping[str, Tensor]
    spent: Mapping[str, Cost]
    recipe: Recipe
    is_defended: bool
    ctx: Ctx


class Evaluator(Method):
    """Measures a family of metrics."""

    METRICS: ClassVar[tuple[Metric, ...]] = ()
    NEEDS: ClassVar[Needs] = Needs()

    @abstractmethod
    def measure(self, case: EvalCase) -> Findings:
        """The findings; every metric that has no figure gets a row with its reason."""
