from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.attack import TrainHooks
from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.data.images import ImageSet
from sleeperbench.kit.classifier import Classifier, build, load
from sleeperbench.kit.pixels import to_float
from sleeperbench.kit.train import fit, learning_rate

PLAIN = Recipe(epochs=2, lr=0.05, batch=16, pad=0, flip=False)


def data(n: int = 50, size: int = 8) -> ImageSet:
    """Three classes told apart by which third of the rows is bright."""
    gen = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % 3
    x = torch.randint(0, 80, (n, 1, size, size), generator=gen)
    for k in range(3):
        x[labels == k, :, 3 * k : 3 * k + 2] += 150
    return ImageSet(
        images=x.to(torch.uint8), labels=labels, ids=torch.arange(n) + 100, classes=("a", "b", "c"), name="bars",
        split="train", digest="",
    )  # fmt: skip


def ctx(seed: int = 0, **changes: Any) -> Ctx:
    return Ctx(seed=seed, recipe=PLAIN, scratch=Path("unused"), **changes)


def tiny(seed: int = 0, dropout: float = 0.0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(144, 3)
        )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Recorder(TrainHooks):
    """Notes every call in order."""

    def __init__(self, stop_after: int = 10**9) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.ids: list[Tensor] = []
        self.x: list[Tensor] = []
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.marks: list[Tensor] = []
        self.stop_after = stop_after

    def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(f"batch{step}")
        self.ids.append(ids)
        self.x.append(x)
        return x, y, (ids % 2)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.calls.append("loss")
        self.marks.append(mark)
        return super().loss(net, x, y, mark)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.calls.append("step")
        assert net.training
        self.lrs.append(opt.param_groups[0]["lr"])
        loss = super().step(net, opt, x, y, mark)
        self.losses.append(float(loss))
        return loss

    def epoch_end(self, net: nn.Module, epoch: int) -> bool:
        self.calls.append(f"end{epoch}")
        net.eval()  # as a hook that looks at accuracy leaves it
        return epoch + 1 >= self.stop_after


def test_equals_a_plain_loop() -> None:
    """The same batches through torch's own loop, written out, give the same weights to the bit."""
    hooks, rows = Recorder(), data()
    trained = tiny()
    log = fit(trained, rows, PLAIN, ctx(), hooks=hooks)
    net = tiny().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    opt = torch.optim.SGD(net.parameters(), lr=PLAIN.lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step, ids in enumerate(hooks.ids):
        opt.param_groups[0]["lr"] = 0.5 * PLAIN.lr * (1 + math.cos(math.pi * step / 6))
        x = to_float(rows.images[ids - 100]).contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(net(x), rows.labels[ids - 100])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert same(trained, net)
    assert log.steps == 6
    assert log.losses == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-6)
    assert not any(m.training for m in trained.modules())


def test_learns() -> None:
    net, rows = tiny(), data(48)
    log = fit(net, rows, dataclasses.replace(PLAIN, epochs=15), ctx())
    assert not any(m.training for m in net.modules())
    assert (net(to_float(rows.images)).argmax(1) == rows.labels).all()
    assert log.losses[-1] < 0.1 < 0.5 < log.losses[0]


def test_an_epoch_has_each_row_at_most_once_and_drops_the_short_batch() -> None:
    hooks = Recorder()
    fit(tiny(), data(50), PLAIN, ctx(), hooks=hooks)
    assert [len(i) for i in hooks.ids] == [16] * 6
    first, second = torch.cat(hooks.ids[:3]), torch.cat(hooks.ids[3:])
    assert len(first.unique()) == len(second.unique()) == 48
    assert not torch.equal(first, second)
    hooks = Recorder()
    fit(tiny(), data(48), PLAIN, ctx(), hooks=hooks)
    assert torch.equal(torch.cat(hooks.ids[:3]).sort().values, data(48).ids)


def test_fewer_rows_than_a_batch_make_one_batch_of_all() -> None:
    hooks = Recorder()
    assert fit(tiny(), data(10), PLAIN, ctx(), hooks=hooks).steps == 2
    assert [len(i) for i in hooks.ids] == [10, 10]
    assert torch.equal(hooks.ids[0].sort().values, data(10).ids)


def test_images_labels_and_ids_stay_together_under_augmentation() -> None:
    class Together(Recorder):
        def batch(self, x: Tensor, y: Tensor, ids: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
            assert torch.equal(y, data().labels[ids - 100])
            assert x.dtype == torch.float32
            for image, i in zip(x, ids, strict=True):
                original = to_float(data().images[i - 100])
                views = [
                    torch.nn.functional.pad(original, (1, 1, 1, 1))[:, dy : dy + 8, dx : dx + 8]
                    for dy in range(3) for dx in range(3)
                ]  # fmt: skip
                assert any(torch.equal(image, v) or torch.equal(image, v.flip(-1)) for v in views)
            return super().batch(x, y, ids, step)

    hooks = Together()
    fit(tiny(), data(), dataclasses.replace(PLAIN, pad=1, flip=True), ctx(), hooks=hooks)
    assert len(hooks.ids) == 6


def test_views_differ_between_batches_and_epochs() -> None:
    hooks, rows = Recorder(), data(32)
    rows.images[:] = rows.images[0]  # so that what differs is the view
    fit(tiny(), rows, dataclasses.replace(PLAIN, pad=2), ctx(), hooks=hooks)
    assert len(hooks.x) == 4
    assert not any(torch.equal(hooks.x[i], hooks.x[j]) for i in range(4) for j in range(i))


def test_batches_are_channels_last() -> None:
    hooks, conv = Recorder(), nn.Conv2d(3, 4, 8)
    colour = dataclasses.replace(data(), images=data().images.repeat(1, 3, 1, 1))
    fit(nn.Sequential(conv, nn.Flatten()), colour, dataclasses.replace(PLAIN, pad=1), ctx(), hooks=hooks)
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in hooks.x)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_schedule() -> None:
    r = dataclasses.replace(PLAIN, lr=0.2)
    assert learning_rate(r, 0, 8) == 0.2
    assert learning_rate(r, 2, 8) == pytest.approx(0.2 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(r, 4, 8) == pytest.approx(0.1)
    assert learning_rate(r, 8, 8) == pytest.approx(0.0)
    assert learning_rate(dataclasses.replace(r, schedule="constant"), 7, 8) == 0.2
    hooks = Recorder()
    fit(tiny(), data(), PLAIN, ctx(), hooks=hooks)
    assert hooks.lrs == [learning_rate(PLAIN, i, 6) for i in range(6)]
    with pytest.raises(ValueError, match="use cosine or constant"):
        fit(tiny(), data(), dataclasses.replace(PLAIN, schedule="warmup"), ctx())


def test_steps_cycle_through_epochs() -> None:
    hooks = Recorder()
    log = fit(tiny(), data(), PLAIN, ctx(), hooks=hooks, steps=7)
    assert log.steps == 7
    assert log.losses == pytest.approx([sum(hooks.losses[:3]) / 3, sum(hooks.losses[3:6]) / 3, hooks.losses[6]])
    assert hooks.lrs == [learning_rate(PLAIN, i, 7) for i in range(7)]
    epochs = Recorder()
    fit(tiny(), data(), dataclasses.replace(PLAIN, epochs=3), ctx(), hooks=epochs)
    assert all(torch.equal(a, b) for a, b in zip(hooks.ids, epochs.ids, strict=False))


def test_hooks_are_called_in_order_and_marks_reach_the_loss() -> None:
    hooks, seen = Recorder(), []
    log = fit(tiny(), data(), PLAIN, ctx(progress=lambda *a: seen.append(a)), hooks=hooks)
    drawn = torch.cat(hooks.ids)
    assert log.dirty == float((drawn % 2 == 1).double().mean())
    assert fit(tiny(), data(), PLAIN, ctx()).dirty == 0
    expected = [[f"batch{i}", "step", "loss"] + ([f"end{i // 3}"] if i % 3 == 2 else []) for i in range(6)]
    assert hooks.calls == [call for calls in expected for call in calls]
    assert all(torch.equal(m, i % 2) for m, i in zip(hooks.marks, hooks.ids, strict=True))
    assert seen == [(1, 2, "train"), (2, 2, "train")]


def test_epoch_end_stops() -> None:
    hooks = Recorder(stop_after=1)
    log = fit(tiny(), data(), dataclasses.replace(PLAIN, epochs=5), ctx(), hooks=hooks)
    assert log.steps == 3
    assert hooks.calls[-1] == "end0"


def test_a_step_with_two_optimisers() -> None:
    """As in LIRA: a generator learns beside the classifier, on its own loss and with its own optimiser."""

    class Pair(TrainHooks):
        def __init__(self) -> None:
            super().__init__()
            self.aux["generator"] = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))
            )
            for p in self.aux["generator"].parameters():
                nn.init.zeros_(p)
            self.inner = torch.optim.SGD(self.aux["generator"].parameters(), lr=1.0)

        def triggered(self, x: Tensor) -> Tensor:
            return x + 0.5 * self.aux["generator"](x)

        def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
            wanted = torch.zeros_like(y)
            self.inner.zero_grad()
            self.loss(net, self.triggered(x), wanted, mark).backward()
            self.inner.step()
            opt.zero_grad()
            loss = self.loss(net, x, y, mark) + self.loss(net, self.triggered(x).detach(), wanted, mark)
            loss.backward()
            opt.step()
            return loss.detach()

    hooks, net, c, rows = Pair(), tiny(), ctx(), data(48)
    fit(net, rows, dataclasses.replace(PLAIN, epochs=20), c, hooks=hooks)
    x = to_float(rows.images)
    with torch.no_grad():
        assert (net(x).argmax(1) == rows.labels).double().mean() > 0.9
        assert (net(hooks.triggered(x)).argmax(1) == 0).double().mean() > 0.9
    assert c.cost.forwards == c.cost.backwards == 20 * 48 * 3


def test_same_seed_same_bits_another_seed_other_bits() -> None:
    recipe = dataclasses.replace(PLAIN, pad=2, flip=True)
    nets = [tiny(dropout=0.5) for _ in range(3)]
    for i, (net, seed) in enumerate(zip(nets, (1, 1, 2), strict=True)):
        torch.manual_seed(i)  # what others drew before must not matter
        fit(net, data(), recipe, ctx(seed))
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_dropout_depends_on_the_ctx_alone_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    fit(tiny(dropout=0.5), data(), PLAIN, ctx())
    assert torch.equal(torch.get_rng_state(), before)


def test_not_finite() -> None:
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) after epoch \d+: lower lr \(now 1e\+30\)"):
        fit(tiny(), data(), dataclasses.replace(PLAIN, lr=1e30, schedule="constant", epochs=5), ctx())

    class LastStepBreaks(TrainHooks):
        def epoch_end(self, net: nn.Module, epoch: int) -> bool:
            next(net.parameters()).data.fill_(math.inf)
            return True

    with pytest.raises(FloatingPointError, match="weights are not finite"):
        fit(tiny(), data(), PLAIN, ctx(), hooks=LastStepBreaks())


def test_cost_is_exact() -> None:
    c = ctx()
    fit(tiny(), data(50), PLAIN, c)
    assert (c.cost.forwards, c.cost.backwards) == (96, 96)

    class TwoPasses(TrainHooks):
        def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
            self.loss(net, x, y, mark).backward()
            with torch.no_grad():
                net(x[:5])
            return super().step(net, opt, x, y, mark)

        def epoch_end(self, net: nn.Module, epoch: int) -> bool:
            net(torch.zeros(9, 1, 8, 8))  # evaluation counts for itself (predict)
            return False

    c = ctx()
    fit(tiny(), data(50), PLAIN, c, hooks=TwoPasses())
    assert (c.cost.forwards, c.cost.backwards) == (6 * (32 + 5), 6 * 32)
    net = tiny()
    fit(net, data(), PLAIN, c)
    spent = c.cost.forwards
    net(torch.zeros(9, 1, 8, 8))
    assert c.cost.forwards == spent


class Types(TrainHooks):
    def __init__(self) -> None:
        super().__init__()
        self.inside: list[torch.dtype] = []
        self.outside: list[torch.dtype] = []

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        self.inside.append(net(x).dtype)
        return super().loss(net, x, y, mark)

    def step(self, net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, mark: Tensor) -> Tensor:
        with torch.no_grad():
            self.outside.append((x.flatten(1) @ x.flatten(1).T).dtype)
        loss = super().step(net, opt, x, y, mark)
        assert loss.dtype == torch.float32
        return loss


def test_bf16_covers_the_loss_alone() -> None:
    hooks, net = Types(), tiny()
    own = set(vars(hooks))
    fit(net, data(), dataclasses.replace(PLAIN, precision="bf16"), ctx(), hooks=hooks)
    assert set(hooks.inside) == {torch.bfloat16}
    assert set(hooks.outside) == {torch.float32}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert set(vars(hooks)) == own
    fp32 = Types()
    fit(tiny(), data(), PLAIN, ctx(), hooks=fp32)
    assert set(fp32.inside) == {torch.float32}
    with pytest.raises(ValueError, match="use fp32 or bf16"):
        fit(tiny(), data(), dataclasses.replace(PLAIN, precision="fp16"), ctx())


def test_frozen_parameters_stay() -> None:
    net = tiny()
    net[0].requires_grad_(False)
    fit(net, data(), PLAIN, ctx())
    assert torch.equal(net[0].weight, tiny()[0].weight)
    assert not torch.equal(net[5].weight, tiny()[5].weight)
    with pytest.raises(ValueError, match="no parameter to train"):
        fit(tiny().requires_grad_(False), data(), PLAIN, ctx())


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        fit(tiny(), data().rows(torch.arange(0)), PLAIN, ctx())
    with pytest.raises(ValueError, match="0 steps"):
        fit(tiny(), data(), dataclasses.replace(PLAIN, epochs=0), ctx())


def small() -> Classifier:
    return build(ModelSpec(arch="small_cnn", classes=3, shape=(1, 16, 16), norm=((0.5,), (0.5,))), seed=0)


def test_keeps_the_model_of_each_epoch() -> None:
    rows = data(32, size=16)
    log = fit(small(), rows, PLAIN, ctx(), keep_epochs=True)
    assert len(log.models) == 2
    once, net = small(), small()
    fit(net, rows, PLAIN, ctx())
    fit(once, rows, PLAIN, ctx(), hooks=Recorder(stop_after=1))
    assert same(load(log.models[0]), once)
    assert same(load(log.models[1]), net)
    with pytest.raises(ValueError, match="needs a Classifier"):
        fit(tiny(), data(), PLAIN, ctx(), keep_epochs=True)
