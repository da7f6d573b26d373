"""The cells on which evaluators are tried: undefended, repaired, without a trigger, with a ruined model, a zoo."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from sleeperbench.contracts.access import Needs
from sleeperbench.contracts.defense import Inverted, Outcome, Verdict
from sleeperbench.contracts.models import Model
from sleeperbench.engine import artifacts
from sleeperbench.engine.task import Task
from sleeperbench.testing.stage import NUMERICS, RECIPE, TARGET, Stage

if TYPE_CHECKING:
    from sleeperbench.testing.subject import Subject

CONTROLS = ("undefended", "clean_model", "undefended_no_trigger")
"""Situations of control cells, on which an evaluator reads no controls."""
_ZOO = 6


@functools.cache
def invented(at: Stage) -> Outcome:
    """An answer with every part, as no single defense gives it; its marks and triggers are random."""
    gen = torch.Generator().manual_seed(3)
    n, k = len(at.micro.train), at.variant.classes
    c, height, width = at.variant.shape
    mask = torch.zeros(1, height, width)
    mask[:, -4:, -4:] = 1
    patch = torch.rand(c, height, width, generator=gen)
    scores = torch.rand(k, generator=gen)
    tuned = repaired(at.model(at.attacked))
    drawn = {"title": "Scores of classes", "series": [{"label": "", "x": list(range(k)), "y": scores.tolist()}]}
    shown = {"title": "Overlays", "columns": [["overlay", "overlay"]]}
    return Outcome(
        model=tuned,
        keep=torch.rand(n, generator=gen) < 0.8,
        suspicion=torch.rand(n, generator=gen),
        verdict=Verdict(score=2.5, threshold=2.0, label_scores=scores, pairs=torch.tensor([[0, TARGET]])),
        inverted=(Inverted(target=TARGET, mask=mask, pattern=patch), Inverted(target=0, delta=0.1 * (patch - 0.5))),
        state=({"overlay": at.micro.pool.images[:4]}, {"weight": 0.5}),
        alarm=0.5,
        chosen={"threshold": 2.0, "curves": {"scores": drawn}, "pictures": {"overlays": shown}},
        path={"t=0.10": at.model(at.attacked), "t=0.20": tuned},
    )


def repaired(model: Model) -> Model:
    """The model with its head pulled a little towards zero: another model that still works."""
    state = {k: v * 0.9 if k.startswith("body.") and "head" in k else v.clone() for k, v in model.state.items()}
    return replace(model, state=state)


def _ruined(model: Model) -> Model:
    full = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in model.state.items()}
    return replace(model, state=full)


def _outcome(at: Stage, situation: str, attack: str) -> str:
    """Key of the defense's artifact in that situation."""

    def made() -> Outcome:
        if situation.startswith("undefended"):
            return Outcome()
        if situation == "clean_model":
            return Outcome(model=at.model(at.clean(100)))
        if situation == "nan_model":
            return replace(invented(at), model=_ruined(at.model(attack)))
        # What was marked in one training set says nothing of another.
        return invented(at) if attack == at.attacked else Outcome(model=repaired(at.model(attack)))

    return at.kept("outcome", {"attack": attack, "in": situation}, lambda f: artifacts.write_outcome(f, made()))


def evaluation_task(subject: Subject, at: Stage, situation: str) -> Task:
    """The task of an evaluator on a staged cell, with what its NEEDS name."""
    needs: Needs = subject.cls.NEEDS  # type: ignore[attr-defined]
    params: dict[str, Any] = {
        "method": subject.params,
        "needs": asdict(needs),
        "data": {},
        "recipe": asdict(RECIPE),
        "defended": not situation.startswith("undefended") and needs.scope != "attack",
    }
    if needs.evaluators:
        params["settings"] = {other: subject.other(other).params for other in needs.evaluators}
    if needs.lineage:
        params["descends"] = situation != "clean_model"
    inputs = {f"clean{i}": at.clean(i) for i in range(needs.clean_models)}
    if needs.scope == "zoo":
        params["cells"], zoo = _zoo(at, triggers=situation != "zoo_no_trigger")
        inputs |= zoo
    else:
        inputs |= _cell(subject, needs, at, situation)
    return Task(kind="evaluate", name=subject.id, version=1, params=params, seed=13, numerics=NUMERICS, inputs=inputs)


def _cell(subject: Subject, needs: Needs, at: Stage, situation: str) -> dict[str, str]:
    """Everything that an evaluator of one cell may read, as the planner gathers it."""
    attack = at.clean(0) if situation.endswith("no_trigger") else at.attacked
    inputs = {"attack": attack, "defense": _outcome(at, situation, attack)}
    if needs.twin and attack == at.attacked and situation == "undefended":
        inputs["twin"] = at.classifier(1, triggers=True)
    if needs.again and attack == at.attacked and not situation.startswith("undefended"):
        inputs["again"] = at.kept("again", {"attack": attack}, lambda f: artifacts.write_outcome(f, _second(at)))
    if needs.anew and situation not in CONTROLS:
        inputs["anew"] = _outcome(at, "repaired", attack)
    if needs.defended_clean:
        inputs["defended_clean"] = _outcome(at, "repaired", at.clean(0))
    quiet = attack != at.attacked
    for control in needs.controls if situation not in CONTROLS else ():
        cell = "clean_model" if control == "clean_model" else "undefended"
        inputs[f"control.{control}"] = subject.findings(at, "undefended_no_trigger" if quiet else cell)
    for other in needs.evaluators:
        reads = subject.other(other)
        inputs[f"evaluator.{other}"] = reads.findings(at, "no_trigger" if quiet else reads.situation)
    if "scores" in needs.outcome and attack == at.attacked:
        inputs["answer"] = at.kept("answer", {"attack": attack}, lambda f: _answer(at, f))
    if "cost" in needs.outcome or ("inverted" in needs.outcome and situation not in CONTROLS):
        inputs["wrapped"] = _outcome(at, "repaired", attack)
    for name in (*needs.peers, *subject.params.get("peers", ())):
        inputs[f"peer.{name}"] = _outcome(at, "repaired", attack)
    for name in (*needs.surrogates, *subject.params.get("surrogates", ())):
        inputs[f"surrogate.{name}"] = at.classifier(0, triggers=not quiet, arch="micro_nobn")
    return inputs


def _second(at: Stage) -> Outcome:
    """What the defense makes of the attacked model when it is run again: not quite what it made first."""
    return Outcome(model=repaired(repaired(at.model(at.attacked))))


def _answer(at: Stage, folder: Any) -> None:
    """A second phase's scores: triggered images tend to higher ones."""
    gen = torch.Generator().manual_seed(4)
    triggered = torch.arange(80) % 2 == 0
    scores = torch.randn(80, generator=gen, dtype=torch.float64) + triggered
    artifacts.write_tensors(folder / "scores.safetensors", {"scores": scores, "triggered": triggered})


def _zoo(at: Stage, *, triggers: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    cells, inputs = [], {}
    for i in range(_ZOO):
        bad = triggers and i % 2 == 1
        attack = at.attacked if bad else at.clean(0)
        verdict = Verdict(score=1.0 + bad + 0.3 * (i % 3), threshold=2.0)
        outcome = replace(invented(at), verdict=verdict)
        name = f"micro/{at.variant.arch}/{'planted' if bad else 'none'}@{0.1 * bad:g}/staged/s{i}"
        cells.append({"cell": name, "attack": "planted" if bad else "none", "seed": i, "backdoored": bad})
        about = {"attack": attack, "zoo": name}
        inputs[f"zoo.{i}"] = at.kept("zoo", about, lambda f, o=outcome: artifacts.write_outcome(f, o))  # type: ignore[misc]
    return cells, inputs
