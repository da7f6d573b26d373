"""Refinement looks at claimed labels alone, starts where they were found, and keeps what it cannot better."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import Inverted, Outcome, Verdict
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import refine as module
from sleeperbench.defenses.refine import Refine, begun
from sleeperbench.kit.masks import apply, optimise_masks
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.predict import predict

VERDICT = Verdict(score=3.0, threshold=1.0)


def case(*claims: Inverted) -> Any:
    net = samples.badnets_net()
    clean = samples.digits()["probe"].rows(torch.arange(120))
    inner = Outcome(verdict=VERDICT, inverted=claims)
    return SimpleNamespace(net=net, spec=net.spec, clean=clean, inner=inner, ctx=samples.ctx(3))


def corner(size: int, strength: float) -> Inverted:
    """A claim of the true target: a square that holds the true patch and more."""
    delta = torch.zeros(1, 16, 16)
    delta[:, -size:, -size:] = strength
    return Inverted(target=0, delta=delta)


def test_a_claim_becomes_a_smaller_mask_at_the_same_place() -> None:
    c = case(corner(8, 0.9))
    found = Refine(epochs=40).run(c)
    (claim,) = found.inverted
    assert found.verdict == VERDICT
    assert claim.delta is None
    assert float(claim.mask.sum()) == pytest.approx(found.chosen["norms"][0], abs=1e-3)
    assert float(claim.mask.sum()) < 16  # of the 64 pixels claimed
    assert float(claim.mask[:, 8:, 8:].sum()) > 0.8 * float(claim.mask.sum())
    others = c.clean.images[c.clean.labels != 0]
    before = predict(c.net, others).argmax(1) == 0
    after = c.net(apply(claim, to_float(others))).argmax(1) == 0
    assert float(after.float().mean()) > 0.9 > 0.1 > float(before.float().mean())


def test_only_the_claimed_labels_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def watched(net: Any, images: Any, targets: Any, **about: Any) -> Any:
        seen.update(about, targets=targets)
        return optimise_masks(net, images, targets, **about)

    monkeypatch.setattr(module, "optimise_masks", watched)
    c = case(corner(8, 0.9), Inverted(target=4, delta=0.1 * torch.ones(1, 16, 16)))
    Refine(epochs=2, updates=4).run(c)
    assert seen["targets"].tolist() == [0, 4]
    assert c.ctx.cost.backwards == 2 * 2 * 120
    masks, patterns = seen["start"]
    assert masks.shape == patterns.shape == (2, 1, 16, 16)
    Refine(epochs=1, updates=1, start="random").run(c)
    assert seen["start"] is None


def test_the_start_is_the_claim() -> None:
    mean = torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)  # 0.2
    clean: Any = SimpleNamespace(images=mean)
    delta = torch.tensor([[[0.0, 0.4], [-0.1, 0.9]]])
    own = Inverted(target=1, mask=torch.tensor([[[0.0, 1.0], [0.5, 0.25]]]), pattern=torch.full((1, 2, 2), 0.7))
    masks, patterns = begun([Inverted(target=0, delta=delta), own], clean)
    assert torch.allclose(masks[0], torch.tensor([[[0.02, 0.4 / 0.9], [0.1 / 0.9, 0.98]]]))
    assert torch.allclose(patterns[0], torch.tensor([[[0.2, 0.6], [0.1, 0.98]]]))
    assert torch.allclose(masks[1], torch.tensor([[[0.02, 0.98], [0.5, 0.25]]]))
    assert torch.allclose(patterns[1], torch.tensor(0.7))
    # An optimisation that does not move returns what it was given.
    c = case()
    start = 0.1 + 0.8 * torch.rand(1, 1, 16, 16), 0.1 + 0.8 * torch.rand(1, 1, 16, 16)
    fixed = {"batch": 60, "weight": 0.0, "factor": 2.0, "patience": 5, "success": 0.0, "stop_after": 25}
    still = optimise_masks(c.net, c.clean.images, torch.tensor([3]), ctx=c.ctx, epochs=1, lr=0.0, start=start, **fixed)
    assert torch.allclose(still.mask, start[0], atol=1e-5)
    assert torch.allclose(still.pattern, start[1], atol=1e-5)


def test_a_claim_that_cannot_be_bettered_stays() -> None:
    claim = corner(8, 0.9)
    found = Refine(epochs=1, updates=1, success=1.1).run(case(claim))
    assert found.inverted == (claim,)
    assert found.chosen["norms"] == [None]


def test_without_a_claim_nothing_is_refined() -> None:
    c = case()
    found = Refine().run(c)
    assert (found.inverted, found.verdict, c.ctx.cost.forwards) == ((), VERDICT, 0)
    with pytest.raises(NotApplicable, match="needs_stamp"):
        Refine().run(case(Inverted(target=1, uses_apply=True)))
