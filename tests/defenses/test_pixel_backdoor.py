from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch.nn import functional as F

from sleeperbench import ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.pixel_backdoor import Kept, PixelBackdoor, pixels, victims
from sleeperbench.kit.classifier import Classifier, build


def small(classes: int = 6) -> Classifier:
    spec = ModelSpec(arch="small_cnn", classes=classes, shape=(3, 8, 8), norm=((0.5,), (0.5,)), args={"width": 4})
    return build(spec, 0).eval()


def case(net: Classifier, **parts: Any) -> Any:
    clean = samples.random_images(24, (3, 8, 8), net.spec.classes)
    return SimpleNamespace(**{"net": net, "spec": net.spec, "clean": clean, "ctx": samples.ctx(3)} | parts)


def test_settings_are_published() -> None:
    m = PixelBackdoor()
    assert (m.steps, m.images, m.batch, m.lr) == (1000, 100, 32, 0.1)
    assert (m.weight, m.patience, m.success, m.threshold) == (1e-3, 10, 0.9, 2.0)
    assert PixelBackdoor.ACCESS.track() == "T1"


def test_smooth_count_takes_the_largest_channel_of_each_pixel() -> None:
    pattern = torch.randn(2, 3, 4, 5)
    for found, p in zip(pixels(pattern), pattern, strict=True):
        wanted = sum(
            max(math.tanh(float(p[c, i, j]) / 10) / 2 + 0.5 for c in range(3)) for i in range(4) for j in range(5)
        )
        assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_every_class_is_inverted_as_if_it_were_alone() -> None:
    """Class after class, with the schedule in plain numbers."""
    net, data = small(), samples.random_images(20, (3, 8, 8), 6)
    m = PixelBackdoor(steps=9, images=10, batch=4, lr=0.3, patience=2, success=0.5, weight=0.01)
    ctx = samples.ctx(3)
    rows = victims(data, 6, 10, ctx)
    delta, size, share = m.invert(net, data.images, rows, ctx)
    assert ctx.cost.backwards == 9 * 2 * 4 * 6
    gen, order = ctx.generator("patterns"), ctx.generator("order")
    starts = [torch.rand(6, 3, 8, 8, generator=gen) for _ in range(2)]
    orders = [torch.randperm(10, generator=order) for _ in range(9)]
    kept_any = 0
    for t in range(6):
        pos, neg = (s[t].clone().requires_grad_() for s in starts)
        adam = torch.optim.Adam([pos, neg], lr=0.3, betas=(0.5, 0.9))
        w, up, down, least, count, best = 0.01, 0, 0, math.inf, math.inf, torch.zeros(3, 8, 8)
        for perm in orders:
            hits, sizes = [], []
            for i in range(2):
                x = data.images[rows[t][perm][4 * i : 4 * i + 4]] / 255
                p, n = pos.clamp(0, 1), neg.clamp(0, 1)
                z = net((x + p - n).clamp(0, 1))
                r = sum((torch.tanh(v / 10) / 2 + 0.5).max(0).values.sum() for v in (pos, neg))
                adam.zero_grad()
                (F.cross_entropy(z, torch.full((4,), t)) + w * r).backward()
                p, n = p.detach().clone(), n.detach().clone()
                adam.step()
                hits.append(float((z.argmax(1) == t).float().mean()))
                sizes.append(float(r.detach()))
            s, r_mean = sum(hits) / 2, sum(sizes) / 2
            p[p < 1 / 255], n[n < 1 / 255] = 0, 0
            changed = int(((p - n).abs().sum(0) > 0).sum())
            if s >= 0.5 and r_mean < least and changed < count:
                least, count, best = r_mean, changed, p - n
                with torch.no_grad():
                    pos.copy_(p)
                    neg.copy_(n)
            elif math.isinf(count):
                best = p - n
            up, down = (up + 1, 0) if s >= 0.5 else (0, down + 1)
            if up >= 2:
                w, up = w * 1.5, 0
            elif down >= 2:
                w, down = w / 1.5**1.5, 0
        assert float(share[t]) == pytest.approx(s)
        if math.isinf(count):
            assert math.isnan(float(size[t]))
        else:
            kept_any += 1
            assert float(size[t]) == count
        assert torch.allclose(delta[t], best, atol=1e-4)
    assert 0 < kept_any < 6 or kept_any == 6


def test_some_classes_from_given_patterns_go_as_they_do_among_all() -> None:
    net, data = small(), samples.random_images(20, (3, 8, 8), 6)
    m = PixelBackdoor(steps=9, images=10, batch=4, lr=0.3, patience=2, success=0.5, weight=0.01)
    gen = torch.Generator().manual_seed(1)
    rows, start = victims(data, 6, 10, samples.ctx(3)), tuple(torch.rand(2, 6, 3, 8, 8, generator=gen))
    before = [v.clone() for v in start]
    whole = m.invert(net, data.images, rows, samples.ctx(3), start=start)
    kept = int((~whole[1].isnan()).nonzero()[0])
    some = torch.tensor([kept, (kept + 1) % 6] if kept else [1, 0])  # not where it stands among all
    own = (start[0][some], start[1][some])
    part = m.invert(net, data.images, rows[some], samples.ctx(3), targets=some, start=own)
    assert torch.allclose(part[0], whole[0][some], atol=1e-4) and bool(part[0].any())
    assert part[1].tolist() == pytest.approx(whole[1][some].tolist(), nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))


def test_the_kept_pattern_replaces_the_variables_and_weights_follow() -> None:
    kept = Kept(3, PixelBackdoor(patience=2), torch.Size((1, 1, 4)), torch.device("cpu"))
    up = torch.tensor([0.5, 0.001, 0.0, 0.0]).expand(3, 1, 1, 4).clone()
    down = torch.tensor([0.0, 0.0, 0.2, 0.003]).expand(3, 1, 1, 4).clone()
    pos, neg = torch.full((3, 1, 1, 4), 7.0), torch.full((3, 1, 1, 4), -7.0)
    share = torch.tensor([0.9, 0.89, 1.0])
    kept.after(share, torch.tensor([3.0, 3.0, 3.0]), up, down, pos, neg)
    assert kept.count.tolist() == [2, math.inf, 2]
    assert pos[0].flatten().tolist() == [0.5, 0, 0, 0]
    assert neg[2].flatten().tolist() == pytest.approx([0, 0, 0.2, 0])
    assert (pos[1] == 7).all() and (neg[1] == -7).all()
    # A smaller smooth size does not do without fewer pixels, nor the reverse.
    kept.after(share, torch.tensor([2.0, 2.0, 4.0]), up, down * torch.tensor([1, 1, 0, 0.0]), pos, neg)
    assert kept.count.tolist() == [1, math.inf, 2]
    assert kept.weight.tolist() == pytest.approx([1.5e-3, 1e-3 / 1.5**1.5, 1.5e-3])
    kept.after(share, torch.tensor([1.0, 2.0, 4.0]), up, up * 0, pos, neg)
    assert kept.size.tolist() == [2, math.inf, 3]
    assert kept.weight.tolist() == pytest.approx([1.5e-3, 1e-3 / 1.5**1.5, 1.5e-3])


def test_verdict_is_the_outlier_in_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small(10)
    size = torch.tensor([40.0, 52, 3, 49, 55, math.nan, 48, 53, 54, 47])
    delta = torch.rand(10, 3, 8, 8)
    delta[5] = 0
    delta[5, 1:, 0, :2] = 0.5  # two pixels, and it does not work
    monkeypatch.setattr(PixelBackdoor, "invert", lambda self, n, i, r, c: (delta, size, torch.ones(10)))
    found = PixelBackdoor().run(case(net))
    v = found.verdict
    assert v is not None
    assert found.chosen["claimed"] == [i.target for i in found.inverted] == [2]
    assert torch.equal(found.inverted[0].delta, delta[2])
    values = np.array([40.0, 52, 3, 49, 55, 2, 48, 53, 54, 47])
    deviation = 1.4826 * np.median(np.abs(values - 48.5))
    assert v.score == pytest.approx((48.5 - 3) / deviation)
    assert float(v.label_scores[5]) == 0
    assert (found.chosen["sizes"][4:6], found.chosen["not_inverted"]) == ([55, 2], [5])


def test_rows_are_of_other_classes() -> None:
    data = samples.random_images(40, (3, 8, 8), 7)
    rows = victims(data, 7, 100, samples.ctx())
    assert rows.shape == (7, 40 - int(data.labels.bincount().max()))
    for t in range(7):
        assert (data.labels[rows[t]] != t).all()
        assert len(rows[t].unique()) == len(rows[t])
    assert victims(data, 7, 5, samples.ctx()).shape == (7, 5)
    with pytest.raises(NotApplicable, match="one_class"):
        victims(data.rows(data.labels == 3), 7, 5, samples.ctx())


def test_it_is_deterministic_and_declines_few_classes() -> None:
    m = PixelBackdoor(steps=2, images=6, batch=3)
    one, two = (m.run(case(small())) for _ in range(2))
    assert torch.equal(one.verdict.label_scores, two.verdict.label_scores)
    assert one.chosen == two.chosen
    with pytest.raises(NotApplicable, match="too_few_classes: 5"):
        m.run(case(small(5)))
