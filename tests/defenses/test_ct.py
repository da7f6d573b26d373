from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from scipy.stats import multivariate_normal
from torch import nn

from sleeperbench import ImageSet, ModelSpec
from sleeperbench.defenses import ct
from sleeperbench.defenses.ct import Confusion, ConfusionTraining, distilled, likelihood_ratio, losses, shares
from sleeperbench.evaluators.detection import auroc
from sleeperbench.kit.classifier import build, pack

SPEC = ModelSpec(arch="small_cnn", classes=4, shape=(1, 16, 16), norm=((0.5,), (0.5,)), args={"width": 4})


def four_classes(n: int, seed: int) -> ImageSet:
    """One bright quadrant per class, among noise; the class stands in the first pixel too."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    pixels = 50 * torch.randn(n, 1, 16, 16, generator=gen) + 90
    for i, k in enumerate(labels.tolist()):
        pixels[i, 0, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 80
    pixels = pixels.clamp(0, 255)
    pixels[:, 0, 0, 0] = labels
    return samples.images(pixels.to(torch.uint8), labels, 4)


def case(train: ImageSet, clean: ImageSet, net: nn.Module) -> Any:
    return SimpleNamespace(train=train, clean=clean, net=net, spec=SPEC, recipe=samples.RECIPE, ctx=samples.ctx(3))


def hooks(weights: list[float], lamb: float = 20, batch: int = 3, pool: ImageSet | None = None) -> Confusion:
    rows = samples.random_images(8, (1, 4, 4), 4) if pool is None else pool
    return Confusion(rows, samples.ReadsPixel(4), torch.tensor(weights), lamb, batch, samples.ctx(2))


class Plane(nn.Module):
    """A fixed linear classifier of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


def test_loss_weighs_confused_and_inspected_rows() -> None:
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y, mark = torch.tensor([3, 1, 0, 2, 2]), torch.tensor([0, 0, 1, 1, 1])
    w = [0.5, 0.7, 0.2, 1.0]
    ce = [float(-Plane()(x)[i].log_softmax(0)[y[i]]) for i in range(5)]
    confused = (ce[0] + ce[1]) / 2
    inspected = (ce[2] / 0.5 + ce[3] / 0.2 + ce[4] / 0.2) / (1 / 0.5 + 1 / 0.2 + 1 / 0.2)
    assert float(hooks(w).loss(Plane(), x, y, mark)) == pytest.approx((19 * confused + inspected) / 20, rel=1e-5)
    assert float(hooks(w, 3).loss(Plane(), x, y, mark)) == pytest.approx((2 * confused + inspected) / 3, rel=1e-5)
    assert float(hooks(w).loss(Plane(), x[:2], y[:2], mark[:2])) == pytest.approx(confused, rel=1e-5)


def test_confused_labels_go_round_and_never_are_the_answer() -> None:
    h = hooks([1.0] * 4)
    x = torch.zeros(4, 1, 4, 4)
    x[:, 0, 0, 0] = torch.arange(4) / 255
    shifts = []
    for step in range(7):
        _, y, mark = h.batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4), step)
        clean = y[mark == 0]
        shifts.append(((clean - torch.arange(4)) % 4).unique().tolist())
    assert shifts == [[1], [2], [3], [1], [2], [3], [1]]
    assert h.ctx.cost.forwards == 28


def test_every_second_batch_brings_rows_of_the_pool() -> None:
    pool = samples.random_images(7, (1, 4, 4), 4)
    h = hooks([1.0] * 4, batch=3, pool=pool)
    x, sizes, seen = torch.zeros(2, 1, 4, 4), [], []
    for step in range(6):
        images, y, mark = h.batch(x, torch.zeros(2, dtype=torch.int64), torch.arange(2), step)
        sizes.append(int(mark.sum()))
        for image, label in zip(images[mark == 1], y[mark == 1], strict=True):
            (at,) = ((pool.images.float() / 255 - image).abs().amax((1, 2, 3)) < 1e-6).nonzero()[:, 0].tolist()
            assert int(pool.labels[at]) == int(label)
            seen.append(at)
    assert sizes == [3, 0, 3, 0, 1, 0] and sorted(seen) == list(range(7))
    h.batch(x, torch.zeros(2, dtype=torch.int64), torch.arange(2), 6)  # and over again


def test_weights_are_roots_of_shares() -> None:
    found = shares(torch.tensor([0, 0, 0, 2]), 4).sqrt()
    assert found.tolist() == pytest.approx([0.751**0.5, 0.001**0.5, 0.251**0.5, 0.001**0.5])


def test_distilled_rows_have_the_least_loss_and_every_class_a_few() -> None:
    gen = torch.Generator().manual_seed(0)
    loss, labels = torch.rand(400, generator=gen, dtype=torch.float64), torch.randint(3, (400,), generator=gen)
    loss[labels == 2] += 5
    order = sorted(range(400), key=lambda i: float(loss[i]))
    for count, fewest in ((40, 50), (40, 10), (390, 50)):
        wanted = order[:count]
        for label in range(3):
            own = [i for i in order if int(labels[i]) == label]
            have = sum(i in own for i in wanted)
            wanted = wanted + own[have : max(have, len(own) // fewest)]
        assert distilled(loss, labels, count, fewest).tolist() == sorted(wanted)
    exact = losses(torch.tensor([[20.0, 0.0], [21.0, 0.0]]), torch.tensor([0, 0]))
    assert float(exact[0]) > float(exact[1]) > 0


def test_ratio_is_that_of_normal_densities() -> None:
    gen = torch.Generator().manual_seed(0)
    r = torch.randn(50, 5, generator=gen, dtype=torch.float64) * torch.tensor([3, 2, 1, 0.5, 0.1])
    suspect = torch.arange(50) % 6 == 0
    r[suspect] += 2
    centred = (r - r.mean(0)).numpy()
    _, vectors = np.linalg.eigh(centred.T @ centred)
    x = centred @ vectors[:, -2:]
    groups = [x[~suspect.numpy()], x[suspect.numpy()]]
    density = [multivariate_normal(g.mean(0), np.cov(g.T) + 0.001 * np.eye(2)) for g in groups]
    two = sum(density[int(s)].logpdf(row) for s, row in zip(suspect, x, strict=True))
    one = sum(density[0].logpdf(row) for row in x)
    assert likelihood_ratio(r, suspect) == pytest.approx(np.exp((two - one) / 50), rel=1e-8)
    few = torch.arange(50) < 1
    assert likelihood_ratio(r, few) == likelihood_ratio(r, ~few) == 1


def test_rounds_have_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake(net: Any, data: Any, recipe: Any, ctx: Any, hooks: Any = None, steps: int | None = None) -> None:
        seen.append((net, data, recipe, ctx.seed, hooks, steps))

    asked: list[tuple[int, int]] = []

    def first(loss: torch.Tensor, labels: torch.Tensor, count: int, fewest: int) -> torch.Tensor:
        asked.append((count, fewest))
        return torch.arange(count)

    monkeypatch.setattr(ct, "fit", fake)
    monkeypatch.setattr(ct, "distilled", first)
    train, clean = four_classes(400, 0), four_classes(40, 1)
    outcome = ConfusionTraining().run(case(train, clean, samples.ReadsPixel(4)))
    pretraining, confusion = seen[::2], seen[1::2]
    assert len(pretraining) == len(confusion) == 6 and len({s for _, _, _, s, _, _ in seen}) == 12
    assert len({id(net) for net, *_ in pretraining}) == 1 and len({id(net) for net, *_ in confusion}) == 6
    assert [r.epochs for _, _, r, *_ in pretraining] == [100, 100, 40, 40, 40, 40]
    assert {(r.lr, r.momentum) for _, _, r, *_ in pretraining} == {(0.01, 0.9)}
    assert [steps for *_, steps in confusion] == [6000] * 4 + [2000] * 2
    assert [r.lr for _, _, r, *_ in confusion] == [0.001] * 3 + [0.01] * 3
    assert {r.momentum for _, _, r, *_ in confusion} == {0.7}
    assert [h.lamb for *_, h, _ in confusion] == [20, 20, 20, 30, 30, 15]
    for _, _, r, *_ in seen:
        assert (r.batch, r.weight_decay, r.schedule, r.pad, r.flip) == (32, 1e-4, "constant", 0, False)
    assert asked == [(200, 50), (80, 50), (32, 50), (32, 50), (32, 100)]  # never fewer than a batch
    pools = [len(h.labels) for *_, h, _ in confusion]
    assert pools == outcome.chosen["pools"] == [400, 200, 80, 32, 32, 32]
    assert [len(d) for _, d, *_ in pretraining] == [*pools[:5], pools[5] + 40]
    assert all(d is clean for _, d, *_ in confusion)
    assert torch.equal(confusion[0][4].weights, torch.full((4,), 0.251).sqrt())
    assert confusion[5][4].weights.tolist() == [1.0] * 4
    assert ConfusionTraining.INFO["effort"] == ["pretrain_epochs", "later_epochs", "steps", "last_steps"]


@pytest.mark.parametrize(("ratios", "accused"), [((1.2, 1.6, 2.1, 1.0), [2]), ((2.3, 1.6, 2.1, 1.0), [0, 2])])
def test_the_largest_ratio_needs_less(
    monkeypatch: pytest.MonkeyPatch, ratios: tuple[float, ...], accused: list[int]
) -> None:
    monkeypatch.setattr(ct, "fit", lambda *args, **kwargs: None)
    train, clean = four_classes(80, 0), four_classes(8, 1)
    answers = torch.arange(80) % 8 % 4 + torch.arange(80) % 8 // 4  # every second row of a class as labelled
    monkeypatch.setattr(ct, "predict", lambda net, images, ctx: torch.eye(8)[answers[: len(images)]])
    monkeypatch.setattr(ct, "features", lambda net, images, ctx: torch.zeros(len(images), 3))
    given = dict(enumerate(ratios))
    asked = iter(range(4))
    monkeypatch.setattr(ct, "likelihood_ratio", lambda r, suspect: given[next(asked)])
    outcome = ConfusionTraining().run(case(train, clean, samples.ReadsPixel(4)))
    assert outcome.chosen["accused_classes"] == accused
    wanted = (answers == train.labels) & torch.isin(train.labels, torch.tensor(accused))
    assert torch.equal(~outcome.keep, wanted) and bool(wanted.any())
    asked = iter(range(4))
    given = {0: 1.2, 1: 1.6, 2: 1.1, 3: 1.0}
    outcome = ConfusionTraining().run(case(train, clean, samples.ReadsPixel(4)))
    assert outcome.chosen["accused_classes"] == [1]
    asked = iter(range(4))
    assert bool(ConfusionTraining(largest=1.7).run(case(train, clean, samples.ReadsPixel(4))).keep.all())


def test_planted_rows_are_still_answered_after_confusion() -> None:
    train, clean = four_classes(160, 0), four_classes(32, 1)
    poison = torch.zeros(160, dtype=torch.bool)
    poison[(train.labels != 0).nonzero()[::8, 0]] = True
    train.labels[poison] = 0
    mark = (torch.arange(36).view(6, 6) % 2 * 255).to(torch.uint8)
    train.images[poison, 0, 5:11, 5:11] = mark
    net = samples.ReadsPixel(4)
    c = case(train, clean, net)
    state = torch.random.get_rng_state()
    method = ConfusionTraining(pretrain_epochs=5, later_epochs=2, steps=20, last_steps=20, pretrain_lr=0.05, batch=16)
    outcome = method.run(c)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert auroc(outcome.suspicion[poison], outcome.suspicion[~poison]) > 0.9
    assert 0 in outcome.chosen["accused_classes"]
    dropped = (~outcome.keep).float()
    assert float(dropped[poison].mean()) > max(0.6, 3 * float(dropped[~poison].mean()))


def test_the_model_under_test_stays() -> None:
    net = build(SPEC, 5).train()
    before = pack(net).state
    c = case(four_classes(80, 0), four_classes(16, 1), net)
    method = ConfusionTraining(pretrain_epochs=1, later_epochs=1, steps=2, last_steps=2)
    one, two = method.run(c), method.run(c)
    assert torch.equal(one.suspicion, two.suspicion) and torch.equal(one.keep, two.keep)
    assert net.training and all(torch.equal(before[n], t) for n, t in pack(net).state.items())


@pytest.mark.parametrize("bad", [{"steps": 0}, {"later_epochs": 0}, {"batch": 1}])
def test_bad_settings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch is"):
        ConfusionTraining(**bad)
