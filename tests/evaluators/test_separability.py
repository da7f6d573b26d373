"""Features that lie apart are told from features that overlap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Role
from sleeperbench.evaluators.separability import Separability, silhouette


def slow(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rousseeuw's definition, row by row."""
    total = 0.0
    for own, other in ((a, b), (b, a)):
        for i, row in enumerate(own):
            near = (own - row).norm(dim=1).sum() / (len(own) - 1)
            far = (other - row).norm(dim=1).mean()
            total += float((far - near) / max(far, near))
            assert i < len(own)
    return total / (len(a) + len(b))


def test_the_coefficient_is_rousseeuws() -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=gen).double(), torch.randn(5, 3, generator=gen).double() + 1
    assert silhouette(a, b) == pytest.approx(slow(a, b))
    assert silhouette(a, a + 100) > 0.95
    assert silhouette(torch.cat([a, a]), torch.cat([a, a])) == pytest.approx(slow(torch.cat([a, a]), torch.cat([a, a])))


def test_a_planted_backdoor_stands_out_and_a_clean_model_does_not_know_it() -> None:
    def measure(net: Any) -> float:
        case: Any = SimpleNamespace(
            attacked=net,
            test=samples.digits()["test"],
            bd_test=samples.badnets_rendered("test", Role.TEST),
            ctx=samples.ctx(),
        )
        (row,) = Separability().measure(case).rows
        assert row.value is not None
        return row.value

    assert 0.05 < measure(samples.badnets_net()) < 1
    assert measure(samples.badnets_net()) != measure(samples.clean_net())


def test_without_a_trigger_there_is_nothing_to_tell_apart() -> None:
    case: Any = SimpleNamespace(bd_test=None)
    assert Separability().measure(case).rows[0].reason == "no_trigger"
