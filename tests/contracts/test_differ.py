"""What counts as a difference between two answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sleeperbench import Outcome, Verdict
from sleeperbench.testing.differ import differ

NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])),
        (NAN, NAN),
        ([1, (2, None)], (1, [2, None])),
        ({"a": torch.zeros(2), "b": "x"}, {"b": "x", "a": torch.zeros(2)}),
        (Outcome(verdict=Verdict(score=1.0, threshold=2.0)), Outcome(verdict=Verdict(score=1.0, threshold=2.0))),
        (len, max),
    ],
)
def test_equal(a: object, b: object) -> None:
    assert differ(a, b) == ""


@pytest.mark.parametrize(
    ("a", "b", "seen"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "differs in 1 of 2 values"),
        (torch.zeros(2), torch.zeros(3), "(2,)"),
        (torch.zeros(2), torch.zeros(2).double(), "torch.float64"),
        (torch.zeros(2), [0.0, 0.0], "a list"),
        ([1, 2], [1, 3], "[1] is 2 and 3"),
        ([1, 2], [1], "2 and 1 entries"),
        ({"a": 1}, {"b": 1}, "'a' only once"),
        (1, 1.0, "1 and 1.0"),
        (True, 1, "True and 1"),
        (None, Outcome(), "None and Outcome"),
        (Outcome(verdict=Verdict(score=1.0, threshold=2.0)), Outcome(), "verdict is Verdict"),
        (Outcome(suspicion=torch.ones(3)), Outcome(suspicion=torch.tensor([1.0, 1, 2])), "suspicion differs in 1 of 3"),
    ],
)
def test_different(a: object, b: object, seen: str) -> None:
    assert seen in differ(a, b)
    assert differ(b, a)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda net: net[1].running_mean.add_(1), "tensors.1.running_mean differs"),
        (lambda net: net[1].eval(), "mode.1 is True and False"),
        (lambda net: net[0].weight.requires_grad_(False), "requires_grad.0.weight"),
        (lambda net: net[0].register_forward_hook(lambda *a: None), "hooks.0 is 0 and 1"),
    ],
)
def test_networks(change, seen: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    other = copy.deepcopy(net)
    assert differ(net, other) == ""
    change(other)
    assert seen in differ(net, other)
