"""Features that lie apart are told from features that overlap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch

from sleeperbench import ImageSet, Measurement, Role
from sleeperbench.contracts import Rendered
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


def measured(net: Any, test: ImageSet, bd_test: Rendered, **args: int) -> list[Measurement]:
    case: Any = SimpleNamespace(attacked=net, test=test, bd_test=bd_test, ctx=samples.ctx())
    return list(Separability(**args).measure(case).rows)


def value(rows: list[Measurement]) -> float:
    (row,) = rows
    assert row.value is not None
    return row.value


def test_a_planted_backdoor_stands_out_and_images_of_the_class_itself_do_not() -> None:
    test, shown = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST)
    assert 0.05 < value(measured(samples.badnets_net(), test, shown)) < 1
    own = test.rows(test.labels == 0)
    half = own.rows(torch.arange(0, len(own), 2))
    same = Rendered(data=half, clean=half, targets=half.labels, trigger_id=torch.zeros_like(half.labels))
    # Halves of one class: 0, up to the chance of some 20 rows each.
    rest = test.rows(~torch.isin(test.ids, half.ids))
    assert abs(value(measured(samples.badnets_net(), rest, same))) < 0.05


def in_pixels(net: Any, images: torch.Tensor, *, ctx: Any) -> torch.Tensor:
    """Features that are the pixels themselves."""
    return images.flatten(1).float()


def points(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)


def triggered(values: tuple[int, ...], targets: list[int]) -> Rendered:
    data = samples.images(points(*values), [9] * len(values))
    return Rendered(data=data, clean=data, targets=torch.tensor(targets), trigger_id=torch.zeros(len(values)).long())


def test_several_targets_have_a_row_each_and_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.evaluators.separability.features", in_pixels)
    test = samples.images(points(0, 50, 2, 54, 200, 4, 58), [1, 3, 1, 3, 5, 1, 3])
    shown = triggered((100, 51, 104, 55, 108, 59), [1, 3, 1, 3, 1, 3])
    mean, first, second = measured(None, test, shown)
    assert [r.qualifier for r in (mean, first, second)] == ["", "label=1", "label=3"]
    of = [
        slow(torch.tensor(a)[:, None], torch.tensor(b)[:, None])
        for a, b in (([0.0, 2, 4], [100.0, 104, 108]), ([50.0, 54, 58], [51.0, 55, 59]))
    ]
    assert [first.value, second.value] == pytest.approx(of)
    assert mean.value == pytest.approx(sum(of) / 2)
    assert of[0] > 0.9 > 0.3 > of[1]


def test_a_group_of_one_row_is_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.evaluators.separability.features", in_pixels)
    test = samples.images(points(0, 2, 50), [1, 1, 3])
    (row,) = measured(None, test, triggered((100, 7, 8), [1, 3, 3]))
    assert (row.value, row.reason) == (None, "too_few_rows: two of each group are needed")
    (row,) = measured(None, test, triggered((100, 102, 7, 8), [1, 1, 3, 3]))
    assert row.value == pytest.approx(slow(torch.tensor([[0.0], [2]]), torch.tensor([[100.0], [102]])))
    assert row.qualifier == "", "the one class that has two of each"


def test_groups_are_of_one_size_and_no_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(net: Any, images: torch.Tensor, *, ctx: Any) -> torch.Tensor:
        sizes.append(len(images))
        return in_pixels(net, images, ctx=ctx)

    monkeypatch.setattr("sleeperbench.evaluators.separability.features", counted)
    test = samples.images(points(*range(8)), [1] * 8)
    for rows, n in ((500, 5), (3, 3)):
        measured(None, test, triggered((100, 110, 120, 130, 140), [1] * 5), rows=rows)
        assert sizes == [n, n]
        sizes.clear()


def test_without_a_trigger_there_is_nothing_to_tell_apart() -> None:
    case: Any = SimpleNamespace(bd_test=None)
    assert Separability().measure(case).rows[0].reason == "no_trigger"
