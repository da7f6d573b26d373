"""CKA against its published values, invariances and the definition by Gram matrices; TAC against a loop."""

from __future__ import annotations

import math

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import ModelSpec, Role
from sleeperbench.contracts import Ctx
from sleeperbench.kit import similarity as module
from sleeperbench.kit.classifier import build
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.similarity import activations, centred, cka, compare, sites, tac
from sleeperbench.kit.taps import capture

X = torch.tensor([[1, 0, 2], [0, 1, 1], [3, 1, 0], [1, 2, 2], [2, 0, 1], [0, 3, 1]], dtype=torch.float64)
Y = torch.tensor([[1, 1], [0, 2], [2, 1], [1, 0], [3, 1], [0, 1]], dtype=torch.float64)


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_biased(x: Tensor, y: Tensor) -> float:
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        return ((h @ k @ h) * (h @ other @ h)).sum()

    k, other = x @ x.T, y @ y.T
    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


def slow_debiased(x: Tensor, y: Tensor) -> float:
    """Nguyen et al., eq. 3, without centring."""
    n = len(x)
    one = torch.ones(n, dtype=torch.float64)

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        k, other = k - torch.diag(k.diag()), other - torch.diag(other.diag())
        first = torch.trace(k @ other)
        second = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        return (first + second - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))

    k, other = x @ x.T, y @ y.T
    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


def test_the_published_values() -> None:
    assert cka(X, Y) == pytest.approx(0.671220, abs=5e-7)
    assert cka(X, Y, debiased=True) == pytest.approx(0.786334, abs=5e-7)


@pytest.mark.parametrize(("d1", "d2"), [(3, 5), (3, 30), (30, 5), (30, 40), (12, 11)])
def test_it_is_the_definition_in_features_as_in_gram_matrices(d1: int, d2: int) -> None:
    x, y = noise(12, d1, 1) + 3, noise(12, d2, 2) @ noise(d2, d2, 3) - 1
    assert cka(x, y) == pytest.approx(slow_biased(x, y), rel=1e-10)
    assert cka(x, y, debiased=True) == pytest.approx(slow_debiased(x, y), rel=1e-8, abs=1e-12)
    assert cka(centred(x), centred(y)) == cka(x, y)
    assert cka(y, x) == pytest.approx(cka(x, y), rel=1e-12)


def test_no_matrix_of_rows_by_rows_where_features_are_fewer() -> None:
    side = centred(noise(500, 20))
    assert side.gram is None
    assert side.rows is not None
    assert side.rows.shape == (500, 20)
    wide = centred(noise(20, 500))
    assert wide.rows is None
    assert wide.gram is not None
    assert wide.gram.shape == (20, 20)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("d", [4, 30])
def test_orthogonal_maps_scales_and_shifts_change_nothing(debiased: bool, d: int) -> None:
    x = noise(20, d)
    q = torch.linalg.qr(noise(d, d, 5)).Q
    assert cka(x, -2.5 * x @ q + noise(1, d, 6), debiased=debiased) == pytest.approx(1, abs=1e-10)
    stretched = x @ torch.diag(torch.arange(1, d + 1, dtype=torch.float64))
    assert cka(x, stretched, debiased=debiased) < 0.999
    assert cka(x, x.clone(), debiased=debiased) == 1  # to the last bit: BEC of the attacked model hangs on it
    assert cka(x.float(), x.float(), debiased=debiased) == 1


@pytest.mark.parametrize(("d", "biased"), [(816, 0.62), (1600, 0.76)])
def test_independent_features_look_alike_but_for_the_debiased_form(d: int, biased: float) -> None:
    x, y = noise(500, d, 1), noise(500, d, 2)
    assert cka(x, y) == pytest.approx(biased, abs=0.01)
    assert cka(x, y, debiased=True) == pytest.approx(0, abs=0.005)


def test_float32_is_near_enough() -> None:
    for d in (30, 300):
        x = noise(100, d, 1) + 50
        y = x + noise(100, d, 2)
        assert cka(x.float(), y.float()) == pytest.approx(cka(x, y), abs=1e-5)
        assert cka(x.float(), y.float(), debiased=True) == pytest.approx(cka(x, y, debiased=True), abs=1e-5)


def test_what_is_constant_or_not_finite_has_no_figure() -> None:
    x = noise(10, 4)
    for other in (torch.full((10, 4), 0.1), torch.zeros(10, 4), x * torch.nan, x.clone().fill_(torch.inf)):
        assert math.isnan(cka(x, other))
        assert math.isnan(cka(other, x, debiased=True))
    with pytest.raises(ValueError, match="10 and 9 rows"):
        cka(x, x[:9])
    with pytest.raises(ValueError, match="at least 4"):
        cka(x[:3], x[:3], debiased=True)


def test_tac_is_the_mean_norm_of_the_change() -> None:
    net = build(samples.SPEC, 1).eval()
    bd = samples.badnets_rendered("test", Role.TEST)
    names = ["body.stage2.0", "body.stage4.1"]
    clean, triggered = bd.clean.images[:7], bd.data.images[:7]
    ctx = samples.ctx()
    found = tac(net, clean, triggered, names, batch=3, ctx=ctx)
    assert ctx.cost.forwards == 14
    for name in names:
        with torch.no_grad():
            before, after = (capture(net, to_float(v), [name])[name].double() for v in (clean, triggered))
        slow = [sum(float((before[i, k] - after[i, k]).square().sum()) ** 0.5 for i in range(7)) / 7 for k in range(3)]
        assert found[name][:3].tolist() == pytest.approx(slow, rel=1e-5)
        assert len(found[name]) == before.shape[1]
    still = tac(net, clean, clean, names)
    assert all(float(v.abs().max()) == 0 for v in still.values())
    with pytest.raises(ValueError, match="no pairs"):
        tac(net, clean, triggered[:6], names)


def net_of(arch: str, **args: int) -> ModelSpec:
    return ModelSpec(arch=arch, classes=4, shape=(3, 16, 16), norm=((0.5,), (0.5,)), args=args)


IMAGE = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)


def test_where_networks_are_compared() -> None:
    found = sites(build(net_of("small_cnn"), 0).eval(), IMAGE)
    assert found["conv"] == [f"body.stage{i}.0" for i in (2, 3, 4)]
    assert found["post_bn"] == [f"body.stage{i}.1" for i in (2, 3, 4)]
    found = sites(build(net_of("preact_resnet18"), 0).eval(), IMAGE)
    assert len(found["conv"]) == 16
    # A second convolution is added to the shortcut; the next block's first BatchNorm sees it, after the last none does.
    assert len(found["post_bn"]) == 15
    assert [n.rpartition(".")[2] for n in found["post_bn"]] == ["bn2", "bn1"] * 7 + ["bn2"]
    vit = build(net_of("timm:vit_tiny_patch16_224", patch_size=4, embed_dim=16, depth=2, num_heads=2), 0).eval()
    found = sites(vit, IMAGE)
    assert found == {"conv": [f"body.net.blocks.{i}.mlp" for i in (0, 1)], "post_bn": []}
    assert activations(vit, IMAGE, found["conv"])[found["conv"][0]].shape[:2] == (1, 16)  # tokens are places


def test_groups_of_layers_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = build(samples.SPEC, 1).eval(), build(samples.SPEC, 2).eval()
    images = samples.digits()["test"].images[:20]
    names = ["body.stage2.0", "body.stage3.0", "body.stage4.0"]
    cuts = [{n: torch.tensor([0, 2, 5]) for n in names}, {n: torch.tensor([1]) for n in names}]

    def found(ctx: Ctx) -> object:
        return compare(a, {"a": a, "b": b}, images, names, cuts, ctx)

    ctx = samples.ctx()
    whole = found(ctx)
    assert ctx.cost.forwards == 3 * 20
    monkeypatch.setattr(module, "HELD", 1)
    ctx = samples.ctx()
    assert found(ctx) == whole
    assert ctx.cost.forwards == 3 * 3 * 20
    biased, debiased = compare(a, {"a": a, "b": b}, images, names, cuts, samples.ctx())[0]
    assert biased["a"] == debiased["a"] == [1, 1, 1]
    with torch.no_grad():
        x, y = (capture(net, to_float(images), names)[names[1]][:, [0, 2, 5]] for net in (a, b))
    assert biased["b"][1] == pytest.approx(slow_biased(x.flatten(1).double(), y.flatten(1).double()), abs=1e-5)
    assert debiased["b"][1] == pytest.approx(slow_debiased(x.flatten(1).double(), y.flatten(1).double()), abs=1e-5)
