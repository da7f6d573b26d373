from __future__ import annotations

from dataclasses import replace

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import Mark, Role
from sleeperbench.attacks import trojannn
from sleeperbench.attacks.trojannn import TrojanNN
from sleeperbench.contracts import Ctx, Model, NotApplicable
from sleeperbench.kit import build, fit, load, pack, predict, render
from sleeperbench.kit.taps import PENULTIMATE, capture, taps

TRAIN = samples.random_images(200, (1, 16, 16))
ALL = torch.ones(200, dtype=torch.bool)
GEN = torch.Generator()


def ctx(seed: int = 0, target: int = 3, model: Model | None = None) -> Ctx:
    return replace(samples.ctx(seed, target), clean_models=(model or pack(samples.clean_net()),))


def loud(units: list[int]) -> Model:
    """The clean model with a head in which these units have the largest sums of |W|, though not the largest sums."""
    model = pack(samples.clean_net())
    name = taps(samples.clean_net()).head + ".weight"
    head = torch.full_like(model.state[name], 0.3)
    head[:, units] = torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0)[:, None]
    return replace(model, state={**model.state, name: head})


def activations(model: Model, pattern: Tensor) -> Tensor:
    with torch.no_grad():
        return capture(load(model), pattern[None], [PENULTIMATE])[PENULTIMATE][0]


@pytest.mark.parametrize(("size", "side", "first"), [(16, 5, 10), (32, 10, 20), (28, 9, 18), (64, 20, 40)])
def test_the_start_is_three_bands_in_a_square_on_black(size: int, side: int, first: int) -> None:
    mask, picture = trojannn._bands((3, size, size), samples.ctx(1))
    there = torch.zeros(size, size, dtype=torch.bool)
    there[first : first + side, first : first + side] = True
    assert torch.equal(mask[0] > 0, there)
    assert float(picture[:, ~there].abs().max()) == 0
    square = picture[:, first : first + side, first : first + side]
    assert torch.equal(square, square[:, :, :1].expand_as(square))
    assert len(torch.unique(square[:, :, 0], dim=1).T) == 3
    assert 0.6 <= float(square.min()) <= float(square.max()) <= 1
    assert not torch.equal(trojannn._bands((3, size, size), samples.ctx(2))[1], picture)


def test_the_pattern_is_that_of_a_loop_over_single_steps() -> None:
    chosen = [2, 5]
    model = loud(chosen)
    b = TrojanNN(steps=7, step=0.05).prepare(TRAIN, ctx(4, model=model))
    mask, first = trojannn._bands((1, 16, 16), samples.ctx(4))
    net, pixels = load(model), first.clone()
    for _ in range(7):
        x = pixels[None].clone().requires_grad_()
        h = capture(net, x, [PENULTIMATE])[PENULTIMATE][0]
        loss = sum((h[i] - 100) ** 2 for i in chosen)
        (down,) = torch.autograd.grad(loss, x)  # type: ignore[arg-type]
        moved = pixels - 0.05 * down[0].sign() * mask
        pixels = torch.minimum(torch.maximum(moved, first - 0.3), first + 0.3).clamp(0, 1)
    assert torch.allclose(b.tensors["pattern"], (pixels * 255).round() / 255, atol=1e-6)
    before, after = (activations(model, p)[chosen] for p in (first, b.tensors["pattern"]))
    assert float(((after - 100) ** 2).sum()) < float(((before - 100) ** 2).sum())


def test_the_published_optimisation_excites_the_chosen_units_and_stays_in_reach() -> None:
    model = loud([2, 5])
    b = TrojanNN(steps=200).prepare(TRAIN, ctx(4, model=model))
    mask, first = trojannn._bands((1, 16, 16), samples.ctx(4))
    pattern = b.tensors["pattern"]
    assert float((pattern - first).abs().max()) <= 0.3 + 0.5 / 255
    assert float((pattern * (1 - mask)).abs().max()) == 0
    assert torch.allclose(pattern * 255, (pattern * 255).round(), atol=1e-4), "on stored levels"
    other = TrojanNN(steps=200).prepare(TRAIN, ctx(4, model=loud([0, 1]))).tensors["pattern"]
    assert float(activations(model, pattern)[[2, 5]].sum()) > float(activations(model, other)[[2, 5]].sum())
    assert float(activations(model, pattern)[[2, 5]].sum()) > float(activations(model, first)[[2, 5]].sum())


def test_the_square_replaces_pixels_and_rows_get_the_wanted_label() -> None:
    c = ctx(3, 4)
    b = TrojanNN(steps=5).prepare(TRAIN, c)
    mask, pattern = b.triggers[0].static()  # type: ignore[misc]
    p = TrojanNN().poison(TRAIN, b, torch.arange(200) % 2 == 0, 0.1, c)
    dirty = p.mark == Mark.DIRTY
    assert int(dirty.sum()) == 20
    assert not bool(dirty[1::2].any())
    assert p.data.labels[dirty].tolist() == [4] * 20
    x = TRAIN.images[dirty].float() / 255
    assert torch.allclose(p.data.images[dirty].float() / 255, x * (1 - mask) + pattern * mask, atol=1e-6)
    assert 4 in p.true_labels[dirty] or 4 not in TRAIN.labels[::2]
    no_own = TrojanNN(include_target=False).poison(TRAIN, b, ALL, 0.5, c)
    assert 4 not in no_own.true_labels[no_own.mark == Mark.DIRTY]


def test_restore_is_exact_and_decoys_lie_elsewhere() -> None:
    attack = TrojanNN(steps=5, targets="all_to_all")
    b = attack.prepare(TRAIN, ctx(0, 6))
    again = TrojanNN.restore({k: v.clone() for k, v in b.tensors.items()}, dict(b.info))
    args = (TRAIN.images.float() / 255, TRAIN.labels, TRAIN.ids, Role.TEST, GEN)
    assert torch.equal(b.triggers[0].apply(*args), again.triggers[0].apply(*args))
    assert again.triggers[0].targets.target(torch.arange(10)).tolist() == [*range(1, 10), 0]
    places = set()
    for seed in range(20):
        mask = attack.decoy(TRAIN, b, ctx(seed, 1)).tensors["mask"]
        assert float(mask.sum()) == float(b.tensors["mask"].sum())
        places.add(divmod(int(mask[0].flatten().argmax()), 16))
    assert places == {(1, 1), (1, 10), (10, 1)}


def test_what_does_not_fit_is_refused() -> None:
    for bad in ({"units": 0}, {"steps": -1}, {"step": 0.0}, {"reach": 1.5}, {"colour": "red"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrojanNN.from_params(bad)
    with pytest.raises(ValueError, match="two classes"):
        TrojanNN().check((3, 32, 32), 1)
    with pytest.raises(ValueError, match="8x8 fits"):
        TrojanNN().check((3, 7, 7), 10)
    TrojanNN().check((1, 8, 8), 2)
    # 10 pixels from column 20 at height 32, 20 from 40 at 64.
    for height, least in ((32, 30), (64, 60)):
        TrojanNN().check((3, height, least), 10)
        with pytest.raises(ValueError, match=f"leaves a {height}x{least - 1} image"):
            TrojanNN().check((3, height, least - 1), 10)


def test_a_model_without_a_linear_head_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trojannn, "traits", lambda spec: frozenset({"bn", "conv"}))
    with pytest.raises(NotApplicable, match="needs_linear_head"):
        TrojanNN(steps=1).prepare(TRAIN, ctx())


def test_more_units_than_there_are_take_all() -> None:
    width = len(activations(pack(samples.clean_net()), torch.zeros(1, 16, 16)))
    every = [TrojanNN(steps=3, units=n).prepare(TRAIN, ctx()).tensors["pattern"] for n in (width, width + 5)]
    assert torch.equal(*every)


def test_the_clean_model_is_left_as_it_was_and_costs_are_counted() -> None:
    model = pack(samples.clean_net())
    before = {k: v.clone() for k, v in model.state.items()}
    c = ctx(model=model)
    TrojanNN(steps=9).prepare(TRAIN, c)
    assert all(torch.equal(before[k], v) for k, v in model.state.items())
    assert (c.cost.forwards, c.cost.backwards) == (9, 9)


def test_it_implants() -> None:
    rows, c = samples.digits(), ctx(5, 3)
    b = TrojanNN(steps=50).prepare(rows["train"], c)
    p = TrojanNN().poison(rows["train"], b, torch.ones(1000, dtype=torch.bool), 0.1, c)
    net: nn.Module = build(samples.SPEC, 2)
    fit(net, p.data, samples.RECIPE, samples.ctx(2))
    found = render(rows["test"], b, Role.TEST, c)
    assert found is not None
    asr, clean = (
        float((predict(n, found.data.images).argmax(1) == found.targets).float().mean())
        for n in (net, samples.clean_net())
    )
    assert asr > 0.9
    assert clean < 0.5
