from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn

from sleeperbench import ImageSet, Role
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses.strip import Strip
from sleeperbench.evaluators.detection import auroc
from sleeperbench.kit.pixels import to_float


def scores(net: nn.Module) -> Any:
    """The network as one that only answers."""

    def ask(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x).float().softmax(1)

    return ask


def case(clean: ImageSet | None = None) -> Any:
    clean = samples.digits()["pool"] if clean is None else clean
    return SimpleNamespace(net=scores(samples.badnets_net()), clean=clean, ctx=samples.ctx(9))


class Linear(nn.Module):
    """Three classes from the mean of each image's halves; far from even, so that no probability is negligible."""

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = x[:, :, :8].mean((1, 2, 3)), x[:, :, 8:].mean((1, 2, 3))
        return torch.stack([3 * top, 4 * bottom, 2 * top - bottom], dim=1)


def slow_entropy(net: nn.Module, x: Tensor, overlays: Tensor, keep: float, alpha: float) -> float:
    """Mean over overlays, one image, one pixel sum and one logarithm at a time."""
    total = 0.0
    for o in overlays:
        pairs = zip(x.ravel().tolist(), o.ravel().tolist(), strict=True)
        blended = torch.tensor([min(1.0, max(0.0, keep * a + alpha * b / 255)) for a, b in pairs]).view_as(x)
        logits = [float(v) for v in net(blended[None])[0]]
        norm = sum(math.exp(v) for v in logits)
        total -= sum(math.exp(v) / norm * math.log(math.exp(v) / norm) for v in logits)
    return total / len(overlays)


@pytest.mark.parametrize(("settings", "keep", "alpha"), [({}, 1, 1), ({"mode": "blend", "alpha": 0.3}, 0.7, 0.3)])
def test_score_is_minus_the_mean_entropy_in_nats(settings: dict[str, Any], keep: float, alpha: float) -> None:
    data = samples.random_images(9, (2, 16, 16))
    net, x, overlays = Linear(), to_float(data.images[:4]), data.images[4:]
    found = Strip(**settings).score(({"overlays": overlays}, None), scores(net), x)
    wanted = [-slow_entropy(net, row, overlays, keep, alpha) for row in x]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert float(found.min()) > -math.log(3)


def test_a_certain_answer_has_entropy_zero() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1000.0, 0.0, -1000.0]]).expand(len(x), -1)

    data = samples.random_images(3)
    assert Strip().score(({"overlays": data.images}, None), scores(Certain()), to_float(data.images)).tolist() == [
        0,
        0,
        0,
    ]


def test_a_score_depends_on_its_own_row_alone() -> None:
    c = case()
    method = Strip(overlays=16)
    state = method.run(c).state
    x = to_float(samples.digits()["test"].images[:130])
    whole = method.score(state, c.net, x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(method.score(state, c.net, x[order]), whole[order], atol=1e-5)
    alone = torch.cat([method.score(state, c.net, row[None]) for row in x[:5]])
    assert torch.allclose(alone, whole[:5], atol=1e-5)
    assert float(whole.std()) > 0.05


def test_triggered_inputs_keep_their_answer_and_clean_models_show_nothing() -> None:
    clean, triggered = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST).data
    some = torch.arange(0, 350, 2)
    method = Strip(overlays=32)
    outcome = method.run(case())
    ranks = {}
    for name, net in (("attacked", samples.badnets_net()), ("clean", samples.clean_net())):
        found = [method.score(outcome.state, scores(net), to_float(d.images[some])) for d in (triggered, clean)]
        ranks[name] = auroc(*found)
    assert ranks["attacked"] > 0.95
    assert 0.35 < ranks["clean"] < 0.7


def test_overlays_and_calibration_share_the_clean_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def entropies(self: Strip, net: nn.Module, x: Tensor, overlays: Tensor) -> Tensor:
        seen.update(x=(x * 255).round().to(torch.uint8), overlays=overlays)
        return torch.arange(len(x), 0, -1).double()  # 1, 2, ..., n in some order

    monkeypatch.setattr(Strip, "_entropies", entropies)
    for n, overlays, threshold in ((72, 36, 1), (250, 100, 2), (2500, 100, 25), (3, 1, 1)):
        data = samples.random_images(n)
        c = case(data)
        outcome = Strip().run(c)
        assert len(seen["overlays"]) == outcome.chosen["overlays"] == overlays
        assert len(seen["x"]) == outcome.chosen["calibration_rows"] == n - overlays
        # Of n entropies 1, 2, ... at most n / 100 are smaller than the threshold.
        assert outcome.chosen["threshold"] == -outcome.alarm == threshold
        assert outcome.chosen["clean_mean"] == pytest.approx((n - overlays + 1) / 2)
        rows = torch.cat([seen["overlays"], seen["x"]]).flatten(1).long()
        digest = (rows * torch.arange(1, rows.shape[1] + 1)).sum(1)
        whole = (data.images.flatten(1).long() * torch.arange(1, rows.shape[1] + 1)).sum(1)
        assert sorted(digest.tolist()) == sorted(whole.tolist())
        assert torch.equal(outcome.state[0]["overlays"], seen["overlays"])
    with pytest.raises(NotApplicable, match="too_few_clean_rows: 1"):
        Strip().run(case(samples.random_images(1)))


def test_the_false_alarm_rate_holds_on_the_calibration_rows() -> None:
    c = case()
    method = Strip(overlays=8, frr=0.1)
    outcome = method.run(c)
    order = torch.randperm(150, generator=c.ctx.generator("overlays"))
    entropy = -method.score(outcome.state, c.net, to_float(c.clean.images[order[8:]]))
    assert int((entropy < outcome.chosen["threshold"] - 1e-5).sum()) == 14  # a tenth of 142, rounded down
    assert outcome.alarm == -outcome.chosen["threshold"], "scores are minus the entropies"
    assert outcome.chosen["clean_std"] == pytest.approx(float(entropy.std(unbiased=False)), abs=1e-5)


def test_every_blended_image_is_asked_once_and_nothing_given_is_changed() -> None:
    c, asked = case(), []
    answer = c.net
    c.net = lambda x: (asked.append(len(x)), answer(x))[1]
    images, state = c.clean.images.clone(), torch.random.get_rng_state()
    first = Strip(overlays=4).run(c)
    assert sum(asked) == 4 * (len(images) - 4) and max(asked) <= 1000
    assert torch.equal(c.clean.images, images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(Strip(overlays=4).run(c).state[0]["overlays"], first.state[0]["overlays"])


@pytest.mark.parametrize(
    "bad",
    [{"mode": "mix"}, {"alpha": 0.0}, {"mode": "blend"}, {"overlays": 0}, {"frr": 1.0}, {"frr": -0.1}],
)
def test_senseless_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)) if bad != {"mode": "blend"} else "alpha is 1.0"):
        Strip(**bad)
