from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from scipy.spatial.distance import cosine as cosine_distance
from scipy.spatial.distance import jensenshannon

from sleeperbench import ModelSpec
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.agpd import AGPD, gap, gradients, grow, jensen_shannon, steady
from sleeperbench.kit.classifier import build, pack
from sleeperbench.kit.taps import taps
from sleeperbench.testing.nets import register

NAN = float("nan")


def case(**parts: Any) -> Any:
    known = {"net": build(samples.SPEC, 0), "spec": samples.SPEC, "recipe": samples.RECIPE, "ctx": samples.ctx(9)}
    return SimpleNamespace(**known | parts)


def two_ways(n: int, bad: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (n, 6) around one direction, of which the first `bad` lie around another; and the clean mean."""
    gen = torch.Generator().manual_seed(seed)
    g = torch.randn(n, 6, generator=gen, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)[0]
    g[:bad] += 4 * torch.eye(6, dtype=torch.float64)[1] - 3 * torch.eye(6, dtype=torch.float64)[0]
    return g, g[bad:].mean(0)


@pytest.mark.parametrize("arch", ["small_cnn", "micro_nobn"])
def test_gradients_are_those_of_a_shift_of_the_layers_output(arch: str) -> None:
    register()
    spec = ModelSpec(arch=arch, classes=10, shape=(1, 16, 16), norm=((0.5,), (0.5,)))
    net, c = build(spec, 3), samples.ctx()
    layers = taps(net).spatial_convs
    images = samples.random_images(5, (1, 16, 16)).images
    before = pack(net).state
    found = gradients(net, images, 4, layers, c)
    assert net.training and (c.cost.forwards, c.cost.backwards) == (5, 5)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[n], t) for n, t in pack(net).state.items())
    net.eval()
    for name in layers:
        layer, places = net.get_submodule(name), []
        shift = torch.zeros(5, int(layer.out_channels), 1, 1, requires_grad=True)

        def hook(module: Any, inputs: Any, output: torch.Tensor, by: Any = shift, seen: Any = places) -> torch.Tensor:
            seen.append(output[0, 0].numel())
            return output + by

        handle = layer.register_forward_hook(hook)
        net(images.float() / 255)[:, 4].sum().backward()
        handle.remove()
        wanted = shift.grad[:, :, 0, 0] / places[0]  # a shift moves all places at once
        assert float(wanted.abs().max()) > 0
        assert torch.allclose(found[name].float(), wanted, rtol=1e-4, atol=1e-7)


def test_gap_is_the_spread_of_similarities_to_clean_and_to_the_seed() -> None:
    g, clean = two_ways(20, 4)
    alike = [1 - cosine_distance(row, clean) for row in g.numpy()]
    seed = int(np.argmin(alike))
    others = [alike[i] - (1 - cosine_distance(g[i].numpy(), g[seed].numpy())) for i in range(20) if i != seed]
    assert gap(g, clean) == pytest.approx(np.linalg.norm(others) / np.sqrt(20))
    assert gap(torch.cat([clean[None], clean[None]]), clean) == pytest.approx(0, abs=1e-9)


def slow_growth(g: np.ndarray, clean: np.ndarray, tau: float) -> tuple[list[int], list[float]]:
    """The filter row by row."""
    poison = [int(np.argmax([cosine_distance(row, clean) for row in g]))]
    joined, distances, bins = {poison[0]: 0}, [], np.linspace(0, 1, 100)

    def ratios() -> dict[int, float]:
        found = {}
        for i in range(len(g)):
            if i not in joined:
                p, c = cosine_distance(g[i], g[poison].mean(0)), cosine_distance(g[i], clean)
                found[i] = p / (p + c)
        return found

    last = list(ratios().values())
    while len(joined) < len(g):
        rates = ratios()
        low, high = min(rates.values()), max(rates.values())
        new = [i for i, r in rates.items() if high == low or (r - low) / (high - low) <= tau]
        rest = [r for i, r in rates.items() if i not in new]
        both = [np.histogram(v, bins=bins, density=True)[0] for v in (last, rest) if v]
        distances.append(float(jensenshannon(*both)) if rest else 1.0)
        last = rest
        poison += new
        joined |= dict.fromkeys(new, len(distances))
    return [joined[i] for i in range(len(g))], distances


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.4])
def test_poison_grows_as_in_the_slow_reference(tau: float) -> None:
    g, clean = two_ways(40, 9, 2)
    joined, distances = grow(g, clean, tau)
    wanted, slow = slow_growth(g.numpy(), clean.numpy(), tau)
    assert joined.tolist() == wanted
    assert distances == pytest.approx(slow, abs=1e-7)
    assert int(joined.max()) == len(distances)


def test_rows_that_are_alike_join_together() -> None:
    g = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    joined, distances = grow(g, torch.tensor([1.0, 0.0], dtype=torch.float64), 0.05)
    assert (joined.tolist(), distances) == ([0, 1, 1, 1], [1.0])
    assert jensen_shannon(torch.tensor([0.1, 0.2]), torch.tensor([0.8])) == pytest.approx(np.sqrt(np.log(2)))
    assert jensen_shannon(torch.tensor([0.1, 1.0]), torch.tensor([0.1, 1.0])) == 0


def test_the_window_is_the_smallest_and_steadiest() -> None:
    d = [0.9, 0.2, 0.8, 0.31, 0.3, 0.3, 0.1, 0.9]
    scores = [np.mean(d[i : i + 3]) + 5 * np.std(d[i : i + 3]) for i in range(6)]
    assert steady(d, 3) == int(np.argmin(scores)) == 3
    assert steady([0.1, 0.1, 0.1, 0.9], 3) == 1  # the seed alone
    assert steady([0.4, 0.1], 10) == 1


def test_targets_stand_out_in_one_layer_or_have_a_wide_gap_late() -> None:
    method = AGPD()
    gaps = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.1, 0.4], [0.6, 0.7, 0.1], [0.1, 0.1, 0.1], [0.9, 0.9, 0.9]])
    index = torch.tensor([[0.0, 7.3, 1.0], [9.0, NAN, 7.4], [8.9, 8.9, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert method.targets(gaps, index) == (1, [0, 2])
    # None stands out: of layers 1 to 3 the first with most wide gaps, never the last.
    assert method.targets(gaps, index * 0.5) == (1, [0, 2])
    assert AGPD(gap=0.45).targets(gaps, index * 0.5) == (2, [0, 1])
    assert AGPD(gap=0.8).targets(gaps, index * 0.5)[1] == []
    assert AGPD(gap=0.05).targets(gaps[:1], index[:1] * 0.5) == (0, [0, 1, 2])


def test_planted_rows_of_a_class_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(1)
    labels = (torch.arange(400) % 8)[torch.randperm(400, generator=gen)]
    planted = (labels == 3).nonzero()[:30, 0]  # more than the clean ones
    train = replace(samples.random_images(400, (1, 16, 16)), labels=labels)
    # Each image carries its number, from which the faked gradients are found again.
    train.images[:, 0, 0, 0], train.images[:, 0, 0, 1] = torch.arange(400) % 256, torch.arange(400) // 256
    clean = replace(samples.random_images(48, (1, 16, 16), seed=5), labels=torch.arange(48) % 8)
    clean.images[:, 0, 0, 1] = 255
    way = torch.randn(8, 12, generator=gen, dtype=torch.float64) * 3
    g = way[labels] + torch.randn(400, 12, generator=gen, dtype=torch.float64)
    g[planted] = -way[3] + torch.randn(30, 12, generator=gen, dtype=torch.float64) * 0.5

    def faked(net: Any, images: torch.Tensor, label: int, layers: Any, ctx: Any) -> Any:
        first = images[:, 0, 0].long()
        of = first[:, 0] + 256 * first[:, 1]
        rows = way[label].expand(len(of), -1) if int(first[0, 1]) == 255 else g[of]
        blank = torch.ones(len(of), 2, dtype=torch.float64) + 0.01 * rows[:, :2]
        return {n: rows if n == names[1] else blank for n in layers}

    c = case(train=train, clean=clean)
    names = taps(c.net).spatial_convs
    asked: list[int] = []

    def right(net: Any, data: Any, ctx: Any) -> torch.Tensor:
        asked.append(len(data))
        return data.labels != 6

    monkeypatch.setattr("sleeperbench.defenses.agpd.gradients", faked)
    monkeypatch.setattr("sleeperbench.defenses.agpd.right", right)
    outcome = AGPD(window=3).run(c)
    assert asked == [48]
    assert outcome.chosen["target_classes"] == [3] and outcome.chosen["layer"] == names[1]
    assert outcome.chosen["passed_over"] == [6]  # the model gets none of its clean rows right
    dropped = ~outcome.keep
    assert bool(dropped[planted].all())
    joined, distances = slow_growth(g[labels == 3].numpy(), way[3].numpy(), 0.05)
    assert dropped[labels == 3].tolist() == [r < steady(distances, 3) for r in joined]
    assert float(outcome.suspicion[dropped].min()) > float(outcome.suspicion[~dropped].max())
    assert float(outcome.suspicion[labels != 3].max()) == 0 and float(outcome.suspicion.max()) == 1


def test_settings_are_the_published_ones_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    method = AGPD()
    assert method.threshold == pytest.approx(np.exp(2))
    assert (method.gap, method.window, AGPD.ACCESS.clean) == (0.3, 10, 100)
    monkeypatch.setattr("sleeperbench.defenses.agpd.right", lambda net, data, ctx: torch.arange(len(data)) % 9 > 0)
    data = samples.digits()
    c = case(train=data["train"].rows(torch.arange(120)), clean=data["pool"])
    before = pack(c.net).state
    outcome, again = method.run(c), method.run(c)
    assert torch.equal(outcome.keep, again.keep) and torch.equal(outcome.suspicion, again.suspicion)
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    # At most 100 / K of each class, the first that the model gets right.
    layers = taps(c.net).spatial_convs
    means = method.references(c, layers)
    known = (torch.arange(150) % 9 > 0) & (data["pool"].labels == 4)
    first = data["pool"].images[known.nonzero()[:10, 0]]
    assert sorted(means) == list(range(10)) and int(known.sum()) > 10
    assert torch.equal(means[4][layers[0]], gradients(c.net, first, 4, layers, c.ctx)[layers[0]].mean(0))


def test_needs_convolutions_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeperbench.defenses.agpd.taps", lambda net: SimpleNamespace(spatial_convs=()))
    with pytest.raises(NotApplicable, match="needs_conv"):
        AGPD().run(case(train=samples.digits()["train"], clean=samples.digits()["pool"]))


@pytest.mark.parametrize("bad", [{"tau": 1.0}, {"window": 0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tau is"):
        AGPD(**bad)
