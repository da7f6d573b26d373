"""Digits of which a pruned network is known to lose some: how many rows may be lost before a defense refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import samples
import torch

from sleeperbench.data.images import ImageSet
from sleeperbench.kit.candidates import split
from sleeperbench.kit.classifier import Classifier, load
from sleeperbench.kit.select import accepts, right

CHANNEL = 0
"""A channel of the last layer of `samples.clean_net` without which it loses more than six of all digits."""


def rows(made: Classifier, lost: int, n: int = 500) -> ImageSet:
    """`n` digits that `samples.clean_net` gets right and `made` too, but for `lost` of them."""
    parts = [samples.digits()[name] for name in ("train", "pool", "probe", "test")]
    whole = samples.images(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    before, after = (right(net, whole, ctx=samples.ctx()) for net in (samples.clean_net(), made))
    bad, good = (before & ~after).nonzero()[:lost, 0], (before & after).nonzero()[: n - lost, 0]
    assert (len(bad), len(good)) == (lost, n - lost)
    some = torch.cat([bad, good])
    return whole.rows(some[torch.randperm(n, generator=torch.Generator().manual_seed(0))])


def five_of_500_and_no_sixth(method: Any, made: Classifier, nothing: dict[str, Any]) -> None:
    """The method, whose fits are made to remove what `made` lacks, accepts 5 rows of 500 lost, and refuses 6.

    Args:
        method: Chooses its setting.
        made: `samples.clean_net` without the channels that it shall remove.
        nothing: What `chosen` says where it refuses, beside the accuracies.
    """
    for lost in (5, 6):
        data = rows(made, lost)
        ctx = samples.ctx(next(seed for seed in range(9, 99) if lost_once(data, made, seed)))
        outcome = method.run(SimpleNamespace(net=samples.clean_net(), clean=data, ctx=ctx))
        assert (outcome.chosen["rows"], outcome.chosen["accuracy_before"]) == (500, 1.0)
        if lost == 5:
            assert outcome.model is not None and outcome.chosen["accuracy_after"] == 0.99
            assert int((~right(load(outcome.model), data, ctx=samples.ctx())).sum()) == 5
        else:
            assert outcome.model is None
            assert {k: outcome.chosen[k] for k in nothing} == nothing


def lost_once(data: ImageSet, made: Classifier, seed: int) -> bool:
    """Whether 150 rows held out once refuse `made`: one row lost among them is enough, as it is for most seeds."""
    parts = {"tune": data.rows(torch.arange(400)), "val": data.rows(torch.arange(400, 500))}
    case: Any = SimpleNamespace(clean=data, ctx=samples.ctx(seed), **parts)
    held = split(case)[1]
    assert len(held) == 150
    return not accepts(torch.ones(150, dtype=torch.bool), right(made, held, ctx=samples.ctx()))
