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
from sleeperbench.defenses.istr import IsTr
from sleeperbench.defenses.refine import Refine, begun
from sleeperbench.kit import slices
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


def test_pixels_that_a_claim_changes_become_fewer() -> None:
    c = case(corner(8, 0.9))
    found = Refine(by="pixels", epochs=30, success=0.9).run(c)
    (claim,) = found.inverted
    assert found.verdict == VERDICT
    assert claim.mask is None and claim.delta.shape == (1, 16, 16)
    changed = int((claim.delta != 0).any(0).sum())
    assert changed == found.chosen["norms"][0] < 40  # of the 64 pixels claimed
    assert bool((claim.delta[:, 8:, 8:] != 0).sum() == changed)  # nothing was added elsewhere
    others = c.clean.images[c.clean.labels != 0]
    after = c.net(apply(claim, to_float(others))).argmax(1) == 0
    assert float(after.float().mean()) > 0.8


def test_patterns_start_from_what_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = module.PixelBackdoor.invert

    def watched(self: Any, net: Any, images: Any, rows: Any, ctx: Any, **about: Any) -> Any:
        seen.update(about, rows=rows, method=self)
        return real(self, net, images, rows, ctx, **about)

    monkeypatch.setattr(module.PixelBackdoor, "invert", watched)
    mask, pattern = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    mask[:, 0, 0] = 1.0
    delta = torch.zeros(1, 16, 16)
    delta[:, 1, 1], delta[:, 2, 2] = 0.5, -0.25
    c = case(Inverted(target=7, delta=delta), Inverted(target=4, mask=mask, pattern=pattern))
    Refine(by="pixels", epochs=2, updates=4).run(c)
    assert seen["targets"].tolist() == [7, 4]
    assert (c.clean.labels[seen["rows"][0]] != 7).all() and (c.clean.labels[seen["rows"][1]] != 4).all()
    up, down = seen["start"]
    mean = float(c.clean.images[:, 0, 0, 0].float().mean()) / 255
    assert (float(up[0, 0, 1, 1]), float(down[0, 0, 2, 2])) == (0.5, 0.25)
    assert float(up[1, 0, 0, 0]) == pytest.approx(1 - mean) and float(up.sum() + down.sum()) == pytest.approx(
        1.75 - mean
    )
    assert seen["method"].batch == 30 and seen["method"].steps == 2
    assert c.ctx.cost.backwards <= 2 * 2 * 120
    Refine(by="pixels", epochs=1, updates=1, start="random").run(c)
    assert seen["start"] is None
    with pytest.raises(ValueError, match="by is 'hand'"):
        Refine(by="hand")  # type: ignore[arg-type]


def test_b3d_is_told_labels_and_place_and_asks_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = module.B3D.invert

    def watched(self: Any, net: Any, images: Any, targets: Any, ctx: Any, **about: Any) -> Any:
        seen.update(about, targets=targets, method=self, scores=net(to_float(images[:3])))
        ctx.cost.forwards = 0
        return real(self, net, images, targets, ctx, **about)

    monkeypatch.setattr(module.B3D, "invert", watched)
    c = case(corner(8, 0.9), Inverted(target=4, delta=0.1 * torch.ones(1, 16, 16)))
    c.net.train()
    found = Refine(by="b3d", epochs=2, updates=10).run(c)
    assert c.net.training
    c.net.eval()
    assert seen["targets"].tolist() == [0, 4]
    method = seen["method"]
    assert (method.steps, method.window, method.batch, method.samples, method.success) == (20, 10, 12, 50, 0.98)
    assert torch.allclose(seen["scores"], predict(c.net, c.clean.images[:3]).softmax(1), atol=1e-5)
    masks, patterns = seen["start"]
    assert torch.equal(masks, begun(c.inner.inverted, c.clean)[0]) and patterns.shape == (2, 1, 16, 16)
    assert (c.ctx.cost.forwards, c.ctx.cost.backwards) == (2 * 20 * 50 * 12, 0)
    assert found.chosen["norms"][1] is None and found.inverted[1] is c.inner.inverted[1]
    Refine(by="b3d", epochs=1, updates=1, start="random").run(c)
    assert seen["start"] is None


def test_b3d_shrinks_a_claim_where_it_lies() -> None:
    c = case(corner(8, 0.9))
    found = Refine(by="b3d", epochs=20, updates=10, weight=0.01, success=0.9).run(c)
    (claim,) = found.inverted
    assert found.verdict == VERDICT and claim.delta is None
    assert float(claim.mask.sum()) == pytest.approx(found.chosen["norms"][0], abs=1e-3)
    assert float(claim.mask.sum()) < float(begun(c.inner.inverted, c.clean)[0].sum()) / 2
    assert float(claim.mask[:, 8:, 8:].sum()) > 0.5 * float(claim.mask.sum())
    assert found.chosen["successes"][0] >= 0.9


@pytest.mark.parametrize("by", ["masks", "pixels"])
def test_after_istr_the_trigger_lies_on_the_patch(by: Any, isolated: Outcome) -> None:
    c = case()
    c.inner = isolated
    found = Refine(by=by, epochs=25, success=0.9).run(c)
    assert [inv.target for inv in found.inverted] == found.chosen["claimed"] == [0]
    assert found.verdict == isolated.verdict
    (claim,), (before,) = found.inverted, isolated.inverted
    others = c.clean.images[c.clean.labels != 0]
    after = c.net(apply(claim, to_float(others))).argmax(1) == 0
    assert float(after.float().mean()) > 0.8
    weight = (claim.mask if by == "masks" else claim.delta.abs())[0]
    assert float(weight[12:, 12:].sum()) > 0.5 * float(weight.sum())
    assert found.chosen["norms"][0] <= int((before.delta != 0).any(0).sum())


@pytest.fixture(scope="module")
def isolated() -> Outcome:
    """What IsTr says of the attacked model."""
    clean = samples.digits()["probe"]
    parts = {"clean": clean, "tune": clean.rows(torch.arange(200)), "val": clean.rows(torch.arange(200, 250))}
    c = SimpleNamespace(**{**vars(case()), **parts, "recipe": samples.RECIPE})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_MAPPED", 6)
        found = samples.judged(IsTr(labels=2, reference_steps=100), c)
    assert found.chosen["claimed"] == [0]
    return found


def test_without_a_claim_nothing_is_refined() -> None:
    c = case()
    found = Refine().run(c)
    assert (found.inverted, found.verdict, c.ctx.cost.forwards) == ((), VERDICT, 0)
    with pytest.raises(NotApplicable, match="needs_stamp"):
        Refine().run(case(Inverted(target=1, uses_apply=True)))
