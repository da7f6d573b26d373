"""What a method declares that it must be given. Pure values: the planner reads them from source without an import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a defense may see; it receives exactly this and nothing else.

    Args:
        model: `none`, or answers as `labels` or `scores` (queries are counted), or the `weights`.
        clean: Clean labelled rows. As a share (float), 0.05 is all that the suite grants (5 % of the training rows by
            default) and other shares are in proportion; as a count (int), so many, at most the suite's pool.
        train: The training set as the defender finds it: shuffled, poisoned, without marks.
        control: Trains its own model from `train`.
        references: Number of independent clean models.
        oracle: The true backdoor, its trigger and targets.
        inner: For a wrapper: what it takes from the defense it wraps (`keep`, `inverted`, or the `cost` of its run);
            the same access is added.
    """

    model: Literal["none", "labels", "scores", "weights"] = "weights"
    clean: float | int = 0.05
    train: bool = False
    control: bool = False
    references: int = 0
    oracle: bool = False
    inner: Literal["", "keep", "inverted", "cost"] = ""

    def track(self) -> str:
        """Access class: T0 weights at most, T1 + clean rows, T2 training set, T3 both, T4 oracle, Q queries only.

        With an R where independent clean models are supplied, which answer most of the question: T1R.
        """
        if self.oracle:
            return "T4"
        if self.train:
            found = "T3" if self.clean else "T2"
        elif self.model in ("labels", "scores"):
            found = "Q"
        else:
            found = "T1" if self.clean else "T0"
        return found + "R" * bool(self.references)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an evaluator must be given.

    A field `peers` or `surrogates` of the evaluator itself (set by the suite) is added to what stands here.

    Args:
        scope: `attack` (once per attacked model), `cell` (per defense) or `zoo` (over all cells of a suite).
        outcome: Parts of the defense's outcome it reads: `model`, `verdict`, `inverted` (and with it the outcome that a
            wrapper wraps), `keep`, `scores`, and `cost`, what its tasks spent. One that reads `scores` alone is not
            applicable to defenses without a second phase.
        white_box: Needs weights and activations, so an opaque model has no such figure.
        clean_models: Independent clean models (replicas 0, 1, ... of attack `none`).
        controls: Defenses on whose cells (same attack and seed) it reads its own findings: `none`, `clean_model`.
        calibration: Measured once per attack, on the suite's first seed, and shared by all seeds.
        defended_clean: The clean model after the same defense.
        undefended: The attacked model itself.
        twin: A second model trained anew under the same attack and seed, with other initial weights and order of rows:
            the same backdoor where the trigger is not trained together with the classifier. On undefended cells alone.
        again: The same defense run once more on the same attacked model with another seed. Where it fails there is no
            figure; the undefended model has none.
        anew: What a wrapper that repairs with recovered triggers wraps, run again on the repaired model; nothing where
            what it wraps needs the training set or the true trigger.
        lineage: Whether the defended model descends from the attacked one's weights.
        peers: Other defenses whose outcomes it reads, by id; the suite names them.
        surrogates: Architectures of attacked models it transfers from, by id, or as DEFENSE@ARCHITECTURE such a model
            after a defense; the suite names them.
        evaluators: Other evaluators whose findings on the same cell it reads, and whose parameters.
        draws_of: An evaluator whose randomness it has, so that what both draw under one name is the same.
        trigger: `none`, `rendered` (8-bit triggered images) or `live` (the trigger itself).
    """

    scope: Literal["attack", "cell", "zoo"] = "cell"
    outcome: tuple[str, ...] = ("model",)
    white_box: bool = False
    clean_models: int = 0
    controls: tuple[str, ...] = ()
    calibration: bool = False
    defended_clean: bool = False
    undefended: bool = False
    twin: bool = False
    again: bool = False
    anew: bool = False
    lineage: bool = False
    peers: tuple[str, ...] = ()
    surrogates: tuple[str, ...] = ()
    evaluators: tuple[str, ...] = ()
    draws_of: str = ""
    trigger: Literal["none", "rendered", "live"] = "rendered"
