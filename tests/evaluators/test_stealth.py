from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import samples
import torch
from torch import Tensor

from sleeperbench import Role
from sleeperbench.attacks.badnets import BadNets
from sleeperbench.attacks.blended import Blended
from sleeperbench.contracts import Rendered
from sleeperbench.evaluators.accuracy import headline
from sleeperbench.evaluators.stealth import Stealth, gallery, psnr, ssim
from sleeperbench.kit.poison import render


def slow_ssim(a: Tensor, b: Tensor, side: int) -> float:
    """Window by window, weighted moments written out."""
    half = side // 2
    weight = {
        (i, j): math.exp(-((i - half) ** 2 + (j - half) ** 2) / (2 * 1.5**2)) for i in range(side) for j in range(side)
    }
    total = sum(weight.values())
    values = []
    for channel in range(a.shape[0]):
        x, y = a[channel].tolist(), b[channel].tolist()
        for top in range(a.shape[1] - side + 1):
            for left in range(a.shape[2] - side + 1):
                at = [(w / total, x[top + i][left + j], y[top + i][left + j]) for (i, j), w in weight.items()]
                mx, my = sum(w * p for w, p, _ in at), sum(w * q for w, _, q in at)
                vx, vy = sum(w * (p - mx) ** 2 for w, p, _ in at), sum(w * (q - my) ** 2 for w, _, q in at)
                cov = sum(w * (p - mx) * (q - my) for w, p, q in at)
                c1, c2 = 6.5025, 58.5225
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return sum(values) / len(values)


@pytest.mark.parametrize(("shape", "side"), [((2, 14, 13), 11), ((1, 8, 9), 7)])
def test_ssim_equals_the_direct_loop(shape: tuple[int, int, int], side: int) -> None:
    gen = torch.Generator().manual_seed(0)
    a = torch.randint(256, (2, *shape), generator=gen, dtype=torch.uint8)
    b = (a.int() + torch.randint(-40, 40, a.shape, generator=gen)).clamp(0, 255).to(torch.uint8)
    for i, value in enumerate(ssim(a, b).tolist()):
        assert value == pytest.approx(slow_ssim(a[i], b[i], side), abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_psnr_of_constant_change() -> None:
    a = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 10
    found = psnr(a, b)
    assert float(found[0]) == pytest.approx(20 * math.log10(255 / 10))
    assert math.isinf(found[1])
    assert torch.equal(psnr(a, b), psnr(b, a))


def measured(attack: BadNets | Blended) -> tuple[dict[str, float | None], object]:
    data = samples.random_images(40, (3, 32, 32))
    bd_test = render(data, attack.prepare(data, samples.ctx()), Role.TEST, samples.ctx())
    findings = Stealth().measure(SimpleNamespace(bd_test=bd_test, bd_probe=None, bd_train=None))
    return headline(findings), findings


def test_figures_of_a_patch() -> None:
    data = samples.random_images(40, (3, 32, 32))
    bd_test = render(data, BadNets(pattern="white").prepare(data, samples.ctx()), Role.TEST, samples.ctx())
    assert bd_test is not None
    found = headline(Stealth().measure(SimpleNamespace(bd_test=bd_test, bd_probe=None, bd_train=None)))
    gap = 255 - bd_test.clean.images[:, :, 29:, 29:].double()
    assert found["linf"] == pytest.approx(float(gap.amax((1, 2, 3)).mean()) / 255)
    mse = gap.square().sum((1, 2, 3)) / (3 * 32 * 32)
    assert found["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / mse)).mean()))
    assert 0.9 < found["ssim"] < 1
    assert found["ssim"] > measured(Blended(alpha_test=0.5))[0]["ssim"]


def test_unchanged_rows_have_no_psnr() -> None:
    r = samples.rendered([5, 0], [1, 2], [0, 0])
    found = headline(Stealth().measure(SimpleNamespace(bd_test=r, bd_probe=None, bd_train=None)))
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 * 256 / 25))
    same = samples.rendered([0, 0], [1, 2], [0, 0])
    findings = Stealth().measure(SimpleNamespace(bd_test=same, bd_probe=None, bd_train=None))
    assert {m.metric: m.reason for m in findings.rows}["psnr"] == "unchanged"
    assert headline(findings)["ssim"] == pytest.approx(1)


def test_gallery_shows_clean_triggered_and_difference() -> None:
    clean = torch.full((2, 3, 4, 5), 50, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[1, 0, 2, 3] = 70
    triggered[1, 1, 2, 3] = 40
    sheet, factor = gallery(clean, triggered)
    assert factor == 127 // 20
    assert sheet.shape == (3, 2 * 6, 3 * 7)
    assert torch.equal(sheet[:, 7:11, 1:6], clean[1])
    assert torch.equal(sheet[:, 7:11, 8:13], triggered[1])
    assert sheet[:, 9, 18].tolist() == [128 + 6 * 20, 128 - 6 * 10, 128]
    assert bool((sheet[:, 0] == 255).all())


def test_no_trigger_no_figures_and_at_most_eight_rows_shown() -> None:
    findings = Stealth().measure(SimpleNamespace(bd_test=None))
    assert {(m.metric, m.value, m.reason) for m in findings.rows} == {
        (m.name, None, "no_trigger") for m in Stealth.METRICS
    }
    _, full = measured(Blended())
    assert full.pictures["gallery"].shape == (3, 8 * 34, 3 * 34)
    assert full.pictures["gallery"].dtype == torch.uint8


@pytest.mark.parametrize(("alpha", "apart"), [(0.1, True), (0.19, False), (0.2, False)])
def test_the_form_of_training_stands_beside_that_of_the_test_where_it_is_another(alpha: float, apart: bool) -> None:
    data = samples.random_images(40, (3, 32, 32))
    backdoor = Blended(alpha_train=alpha).prepare(data, samples.ctx())
    test, probe = (render(data, backdoor, role, samples.ctx()) for role in (Role.TEST, Role.TRAIN))
    found = Stealth().measure(SimpleNamespace(bd_test=test, bd_probe=probe, bd_train=None))
    values = {(m.metric, m.qualifier): m.value for m in found.rows}
    assert values["psnr", "form=training"] == pytest.approx(float(psnr(probe.clean.images, probe.data.images).mean()))
    # Half of the change are 6 dB.
    assert values["psnr", "form=training"] - values["psnr", ""] == pytest.approx(20 * math.log10(0.2 / alpha), abs=0.1)
    assert set(found.pictures) == set(found.curves) == {"gallery", *(["gallery_training"] if apart else [])}


def changed(n: int, change: Tensor) -> Rendered:
    """n images of one colour each with `change` (n, C, H, W) added, which stays within 0..255."""
    grey = torch.arange(100, 100 + n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, *change.shape[1:]).contiguous()
    clean = samples.images(grey, [0] * n)
    data = replace(clean, images=(grey.int() + change).to(torch.uint8))
    return Rendered(data=data, clean=clean, targets=torch.ones(n).long(), trigger_id=torch.zeros(n).long())


def test_rows_that_were_trained_on_come_before_probe_rows() -> None:
    patch = torch.zeros(20, 1, 16, 16, dtype=torch.int)
    patch[:, :, 12:, 12:] = 100
    test = changed(20, patch)
    probe = changed(12, patch[:12] // 2)
    trained = changed(16, patch[:16] // 4)
    found = Stealth().measure(SimpleNamespace(bd_test=test, bd_probe=probe, bd_train=trained))
    values = {(m.metric, m.qualifier): m.value for m in found.rows}
    assert values["linf", ""] == pytest.approx(100 / 255)
    assert values["linf", "form=training"] == pytest.approx(25 / 255)
    assert values["psnr", "form=training"] - values["psnr", ""] == pytest.approx(20 * math.log10(4))
    eight = torch.tensor([0, 2, 4, 6, 9, 11, 13, 15])
    shown, factor = gallery(trained.clean.images[eight], trained.data.images[eight])
    assert torch.equal(found.pictures["gallery_training"], shown)
    assert found.curves["gallery_training"] == {"residual_factor": factor} == {"residual_factor": 5}


@pytest.mark.parametrize(("level", "shown"), [(0, False), (8, True)])
def test_a_faint_change_of_single_images_under_a_bright_patch_is_shown(level: int, shown: bool) -> None:
    patch = torch.zeros(20, 3, 16, 16, dtype=torch.int)
    patch[:, :, 12:, 12:] = 150
    signs = 2 * torch.randint(2, patch.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int) - 1
    test, trained = changed(20, patch), changed(20, torch.where(patch > 0, patch, level * signs))
    found = Stealth().measure(SimpleNamespace(bd_test=test, bd_probe=test, bd_train=trained))
    values = {(m.metric, m.qualifier): m.value for m in found.rows}
    # The patch is 1/16 of the image: its mean square is 23 times that of the signs, so PSNR alone would not tell.
    assert 0 <= values["psnr", ""] - values["psnr", "form=training"] < 0.5
    assert ("gallery_training" in found.pictures) is shown


def test_ssim_hardly_sees_a_patch_in_the_corner() -> None:
    """The figures that docs/methods/stealth.md prints; a window that were padded would count corners as well."""
    board = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    for side, corner, middle in ((16, 0.983, 0.027), (32, 0.999, 0.819)):
        grey = torch.full((2, 1, side, side), 128, dtype=torch.uint8)
        shown = grey.clone()
        shown[0, :, -3:, -3:] = board
        at = (side - 3) // 2
        shown[1, :, at : at + 3, at : at + 3] = board
        assert ssim(grey, shown).tolist() == pytest.approx([corner, middle], abs=5e-4)
