"""What an attack may change of the training rows, and that the engine looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Mark, PoisonedSet
from sleeperbench.attacks.none import NoAttack
from sleeperbench.engine import work
from sleeperbench.engine.outcomes import Failed
from sleeperbench.engine.work import Rows, Work
from sleeperbench.kit.covers import append

MIXED = torch.randperm(60, generator=torch.Generator().manual_seed(1))
TRAIN = replace(samples.random_images(60, (1, 8, 8)), ids=MIXED + 5)
ELIGIBLE = torch.arange(60) % 5 > 0


def poisoned() -> PoisonedSet:
    """Rows 1 to 4 are dirty, 6 to 9 covers; their pixels and the labels of the former are others."""
    p = PoisonedSet.clean(replace(TRAIN, images=TRAIN.images.clone(), labels=TRAIN.labels.clone()))
    p.mark[1:5], p.mark[6:10] = Mark.DIRTY, Mark.COVER
    p.data.images[1:5] = 255 - p.data.images[1:5]
    p.data.images[6:10] = 255 - p.data.images[6:10]
    p.data.labels[1:5] = (p.data.labels[1:5] + 1) % 10
    return p


def check(p: PoisonedSet, attacks: bool = True) -> None:
    rows = Rows(train=TRAIN, eligible=ELIGIBLE, pool=TRAIN, probe=TRAIN, test=TRAIN, source=TRAIN)
    instance: Any = SimpleNamespace()
    Work._check_poisoned(instance, p, rows, attacks=attacks)


@pytest.mark.parametrize("at_once", [1000, 7])
def test_poisoned_rows_may_differ_in_place_or_beside_their_clean_copies(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(work, "CHECK_ROWS", at_once)
    check(PoisonedSet.clean(TRAIN))
    check(poisoned())
    check(append(poisoned(), TRAIN))
    whole = poisoned()
    whole.mark[ELIGIBLE] = Mark.DIRTY
    check(whole)


@pytest.mark.parametrize("setting", [{}, {"stamped": 0.2}, {"noisy": 0.5}, {"stamped": 0.2, "noisy": 0.5}])
def test_a_clean_model_may_be_a_hard_negative(setting: dict[str, float]) -> None:
    attack = NoAttack(**setting)
    p = attack.poison(TRAIN, attack.prepare(TRAIN, samples.ctx()), ELIGIBLE, 0.0, samples.ctx())
    check(p, attacks=False)
    p.mark[40] = Mark.DIRTY
    with pytest.raises(Failed):
        check(p, attacks=False)


def brighter(p: PoisonedSet) -> None:
    p.data.images[41, 0, 3, 3] ^= 1


def relabelled(p: PoisonedSet) -> None:
    p.data.labels[41] += 1


def strange(p: PoisonedSet) -> None:
    p.data.ids[41] = 1000


def swapped(p: PoisonedSet) -> None:
    p.data.ids[[41, 42]] = p.data.ids[[42, 41]]


def untouchable(p: PoisonedSet) -> None:
    p.mark[40] = Mark.COVER


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (brighter, "changed images of rows that it marks as clean"),
        (relabelled, "changed labels of rows that it marks as clean"),
        (strange, "changed ids of rows that it marks as clean"),
        (swapped, "rows that it marks as clean"),
        (untouchable, "rows that it may not touch"),
    ],
)
@pytest.mark.parametrize("at_once", [1000, 7])
def test_anything_else_fails(
    monkeypatch: pytest.MonkeyPatch, at_once: int, change: Callable[[PoisonedSet], None], words: str
) -> None:
    monkeypatch.setattr(work, "CHECK_ROWS", at_once)
    p = poisoned()
    p = replace(p, data=replace(p.data, ids=p.data.ids.clone()))
    change(p)
    with pytest.raises(Failed) as e:
        check(p)
    assert words in str(e.value.args)
