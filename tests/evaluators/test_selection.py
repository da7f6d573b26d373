"""Every candidate is measured, and the oracle's pick obeys its rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Findings
from sleeperbench.evaluators import selection as module
from sleeperbench.evaluators.accuracy import headline
from sleeperbench.evaluators.selection import Selection


class Shifted(nn.Module):
    """`ReadsPixel`, wrong by one class on images whose second pixel is at least `level`."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level, self.reads = level, samples.ReadsPixel()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.reads(x)
        wrong = (x[:, 0, 0, 1] * 255).round() >= self.level
        return torch.where(wrong[:, None], logits.roll(1, 1), logits)


def measure(monkeypatch: pytest.MonkeyPatch, candidates: dict[str, int], *, triggered: bool = True) -> Findings:
    monkeypatch.setattr(module, "load", lambda net, device: net)
    test = samples.answering([1] * 10, [1] * 10)
    test.images[:, 0, 0, 1] = torch.arange(10, dtype=torch.uint8)  # Shifted(k) is right on k of ten
    bd = samples.rendered([0] * 10, [1] * 10, [0] * 10)
    bd.data.images[:, 0, 0, 1] = torch.arange(10, dtype=torch.uint8)  # and k of ten go to the attacker
    case: Any = SimpleNamespace(
        outcome=SimpleNamespace(path={n: Shifted(k) for n, k in candidates.items()}),
        attacked=samples.ReadsPixel(),
        test=test,
        bd_test=bd if triggered else None,
        ctx=samples.ctx(),
    )
    return Selection().measure(case)


def test_candidates_carry_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(m.metric, m.qualifier): m.value for m in measure(monkeypatch, {"t=0.20": 3, "last": 10}).rows}
    assert found["c_acc_path", "t=0.20"] == found["asr_path", "t=0.20"] == 0.3
    assert found["c_acc_path", "candidate=last"] == found["asr_path", "candidate=last"] == 1.0


def test_the_oracle_takes_the_lowest_asr_that_keeps_nine_tenths_of_the_accuracy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = headline(measure(monkeypatch, {"a": 10, "b": 9, "c": 8, "d": 0}))
    assert (found["asr_oracle"], found["c_acc_oracle"]) == (0.9, 0.9)
    lost = measure(monkeypatch, {"c": 8, "d": 0})
    assert {m.reason for m in lost.rows if m.metric.endswith("oracle")} == {"no_candidate_keeps_accuracy"}


def test_without_a_trigger_there_is_accuracy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(monkeypatch, {"t=0.5": 7}, triggered=False)
    assert {m.metric: m.reason for m in found.rows if m.value is None} == dict.fromkeys(
        ("asr_path", "c_acc_oracle", "asr_oracle"), "no_trigger"
    )
    assert found.curves["candidates"]["series"][0]["x"] == [0.5]


def test_a_defense_without_candidates_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {m.reason for m in measure(monkeypatch, {}).rows} == {"no_candidates"}
