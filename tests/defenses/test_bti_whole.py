"""BTI's inversion and the repairs on it as wholes, on digits of which some carry Blended's picture."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import nn
from torch.nn import functional as F

from sleeperbench import ImageSet, Outcome
from sleeperbench.attacks.blended import Blended
from sleeperbench.contracts import Rendered
from sleeperbench.defenses.bti import BTI
from sleeperbench.defenses.bti_sam import BTISAM
from sleeperbench.defenses.bti_u import BTIUnlearning
from sleeperbench.defenses.pam import PAM
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit import benign
from sleeperbench.kit.classifier import Classifier, build, load, pack
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.select import right
from sleeperbench.kit.train import fit

FEW = {"pretrain_steps": 60, "mask_steps": 40, "generator_steps": 100, "width": 4}
"""BTI's other settings are the published ones; PAM and BTI-DBF's sharpness-aware one have a round of 150 steps."""


def digits(part: str) -> ImageSet:
    return samples.sized(samples.digits()[part], 8)


@functools.cache
def nets() -> tuple[Classifier, Classifier, Rendered]:
    """The attacked net, a clean one of the same recipe, and the triggered test images.

    The digits' own mean and deviation normalise, since the generator's bound is in these units.
    """
    poisoned, triggered = samples.planted(Blended(), 1000, 0.1, 8)
    spec = replace(samples.wide(8, 8), norm=samples.DIGITS_NORM)
    found = []
    for data in (poisoned.data, digits("train")):
        net = build(spec, 2)
        fit(net, data, samples.RECIPE, samples.ctx(2))
        found.append(net.eval())
    return found[0], found[1], triggered


def case() -> Any:
    net = nets()[0]
    return SimpleNamespace(net=net, spec=net.spec, clean=digits("pool").rows(torch.arange(64)), ctx=samples.ctx(9))


@functools.cache
def inverted() -> Outcome:
    return BTI(**FEW).run(case())


@functools.cache
def reversed_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The generator's images of the test digits, and their true labels."""
    found, test = inverted(), digits("test")
    return BTI().stamp(found.state, found.inverted[0], to_float(test.images)), test.labels


class Again(benign.Inversion):
    """Takes over what `inverted` found: the first inversion of a repair has the same draws."""

    def pretrain(self) -> None:
        """`inverted` has done it."""

    def look(self, net: Classifier) -> None:
        """What `inverted` saw."""
        found = inverted()
        self.generator.load_state_dict(dict(found.state[0]))
        self.net, self.target, self.share = self._frozen(net), found.chosen["target"], found.chosen["share"]


class Same(nn.Module):
    """A generator that changes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Nothing(Again):
    """An inversion whose images are the clean ones."""

    def look(self, net: Classifier) -> None:
        super().look(net)
        self.generator = Same()


def answers(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


def test_the_generator_finds_the_backdoor_and_its_target() -> None:
    attacked, clean, triggered = nets()
    assert measure_asr(attacked, triggered, samples.ctx()).value > 0.9
    assert [i.target for i in inverted().inverted] == [0]
    x, y = reversed_digits()
    hits = [float((answers(net, x)[y != 0] == 0).float().mean()) for net in (attacked, clean)]
    assert hits[0] > hits[1] + 0.3, "what leads to the target is not in the images alone"


def test_the_path_back_keeps_the_reversed_images_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same tuning on the same reversed images without the shift."""
    monkeypatch.setattr(benign, "Inversion", Again)
    attacked, _, triggered = nets()
    x, y = reversed_digits()
    asr, error = [], []
    for rho in (0.5, 0.0):
        net = load(PAM(rho=rho, rounds=1, steps=150, **FEW).run(case()).model).eval()
        assert float(right(net, digits("test"), ctx=samples.ctx()).float().mean()) > 0.8
        asr.append(measure_asr(net, triggered, samples.ctx()).value)
        back = load(pack(net)).eval()
        with torch.no_grad():
            way = [a - p for a, p in zip(attacked.parameters(), back.parameters(), strict=True)]
            length = math.sqrt(sum(float(w.double().pow(2).sum()) for w in way))
            for p, w in zip(back.parameters(), way, strict=True):
                p.add_(0.5 / length * w)
            error.append(float(F.cross_entropy(back(x), y)))
    assert asr[0] < asr[1]
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize(
    "repair", [BTIUnlearning(rounds=1, **FEW), BTISAM(rounds=1, steps=150, **FEW)], ids=["unlearning", "sharpness"]
)
def test_tuning_on_the_reversed_images_takes_the_backdoor_away(repair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same tuning on the clean images alone; nets drawn from seeds 0 to 4: 12 to 46 against 97 to 100 %.

    Under the statistics of the tuning: estimated anew on the 64 clean images, they give back some of what the
    sharpness-aware steps took (31 to 70 %).
    """
    _, _, triggered = nets()
    asr = []
    for inversion in (Again, Nothing):
        monkeypatch.setattr(benign, "Inversion", inversion)
        out = repair.run(case())
        net = load(out.path.get(benign.RELEASED, out.model)).eval()
        assert float(right(net, digits("test"), ctx=samples.ctx()).float().mean()) > 0.8
        asr.append(measure_asr(net, triggered, samples.ctx()).value)
    assert asr[0] < 0.5 < 0.9 < asr[1]
