from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sleeperbench import Inverted, ModelSpec, Outcome, Role
from sleeperbench.contracts import NotApplicable
from sleeperbench.defenses import neural_cleanse as module
from sleeperbench.defenses.neural_cleanse import NeuralCleanse, smallest
from sleeperbench.defenses.unlearn import Unlearn, Unlearning
from sleeperbench.evaluators.accuracy import answers
from sleeperbench.evaluators.evidence import curve
from sleeperbench.evaluators.ra import measure_asr
from sleeperbench.kit.anomaly import anomaly_index
from sleeperbench.kit.classifier import build, load, pack
from sleeperbench.kit.masks import Masks


def case(**parts: Any) -> Any:
    net, clean = samples.badnets_net(), samples.digits()["pool"]
    return SimpleNamespace(**{"net": net, "spec": net.spec, "clean": clean, "ctx": samples.ctx(3)} | parts)


@functools.cache
def cleansed() -> Outcome:
    # Ten classes of digits have sizes so uneven that the index of a mask ten times smaller is only about 2.2.
    return NeuralCleanse(epochs=10, threshold=1.5).run(case(clean=samples.digits()["pool"].rows(torch.arange(120))))


def true_claim(target: int = 0) -> Inverted:
    patch = samples.badnets().triggers[0]
    return Inverted(target=target, mask=patch.mask, pattern=patch.pattern)


def test_it_finds_the_target_and_where_the_patch_lies() -> None:
    found = cleansed()
    norms = found.chosen["norms"]
    assert norms.index(min(norms)) == 0
    assert min(norms) < 0.25 * sorted(norms)[1]
    assert found.chosen["claimed"] == [0]
    assert found.verdict is not None
    assert found.verdict.score == pytest.approx(float(found.verdict.label_scores.max()))
    assert found.verdict.score > found.verdict.threshold == 1.5
    (claim,) = found.inverted
    assert claim.target == 0
    # The patch is the lower right 3x3 of 16x16 pixels: 4 % of the image, where a third of the mask lies.
    assert float(claim.mask[:, 13:, 13:].sum()) > 0.3 * float(claim.mask.sum())


def test_figures_of_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = [10.0, 52, 50, 49, 55, 51, 48, 53, 54, 47]
    seen: dict[str, Any] = {}

    def planted(net: nn.Module, images: Tensor, targets: Tensor, **args: Any) -> Masks:
        seen.update(args, targets=targets, images=images)
        k = len(targets)
        flat = torch.arange(k)[:, None, None, None] / k
        masks, patterns = flat.expand(k, 1, 16, 16), flat.expand(k, 1, 16, 16)
        return Masks(mask=masks, pattern=patterns, norm=torch.tensor(norms), success=torch.ones(k))

    monkeypatch.setattr(module, "optimise_masks", planted)
    c = case()
    found = NeuralCleanse().run(c)
    assert found.verdict.score == pytest.approx(10.93, abs=0.005)
    assert found.verdict.label_scores.tolist() == pytest.approx([(50.5 - n) / 3.7065 for n in norms], abs=1e-3)
    assert [i.target for i in found.inverted] == [0]
    assert NeuralCleanse().threshold == 2.0
    assert NeuralCleanse(threshold=11).run(c).inverted == ()

    # What BackdoorBench sets; its 2,500 rows in batches of 256 are ten updates per pass.
    assert seen.pop("ctx") is c.ctx
    assert seen.pop("images") is c.clean.images
    assert seen.pop("targets").tolist() == list(range(10))
    published = {"epochs": 80, "lr": 0.1, "weight": 1e-3, "factor": 2.0, "patience": 5, "success": 0.98}
    assert seen == published | {"stop_after": 25, "batch": 15, "at_once": 0}
    NeuralCleanse(batched=False).run(c)
    assert seen["at_once"] == 1

    # Only the target is reached: the others count with their last masks, 25.6 for each tenth of the class.
    norms[:] = [4.0] + [math.nan] * 9
    last = [4.0] + [25.6 * t for t in range(1, 10)]
    alone = NeuralCleanse().run(c)
    values = np.array(last)
    index = (np.median(values) - 4) / (1.4826 * np.median(np.abs(values - np.median(values))))
    assert alone.verdict.score == pytest.approx(index, rel=1e-5) and 1 < index < 2
    assert float(alone.verdict.label_scores[1:].max()) == 0
    assert alone.chosen["norms"] == pytest.approx(last, rel=1e-5)
    assert (alone.chosen["claimed"], alone.chosen["not_inverted"]) == ([], list(range(1, 10)))
    assert NeuralCleanse(threshold=1).run(c).chosen["claimed"] == [0]
    norms[0] = math.nan
    nothing = NeuralCleanse(threshold=0).run(c)
    assert (nothing.verdict.score, nothing.inverted, nothing.chosen["not_inverted"]) == (0, (), list(range(10)))


def test_few_classes_decline() -> None:
    spec = ModelSpec(arch="small_cnn", classes=5, shape=(1, 16, 16), norm=((0.5,), (0.5,)), args={"width": 8})
    with pytest.raises(NotApplicable, match="too_few_classes: 5"):
        NeuralCleanse().run(case(spec=spec, net=build(spec, 0)))


def test_micro_runs_on_three_channels() -> None:
    spec = ModelSpec(arch="small_cnn", classes=7, shape=(3, 16, 16), norm=((0.5,), (0.5,)), args={"width": 8})
    c = case(spec=spec, net=build(spec, 0).eval(), clean=samples.random_images(10, classes=7))
    found = NeuralCleanse(**NeuralCleanse.INFO["micro"]).run(c)
    assert found.verdict.label_scores.shape == (7,)
    # Four passes over ten rows for seven classes, and one more look at what was kept.
    assert (c.ctx.cost.backwards, c.ctx.cost.forwards) == (280, 350)


def test_unlearning_removes_the_backdoor_with_the_recovered_trigger() -> None:
    c = case(inner=cleansed(), ctx=samples.ctx(9))
    before = pack(c.net).state
    found = Unlearn(steps=60).run(c)
    assert found.chosen == {"triggers": [0]}
    repaired = load(found.model)
    test, bd_test = samples.digits()["test"], samples.badnets_rendered("test", Role.TEST)
    assert measure_asr(c.net, bd_test, c.ctx).value > 0.9
    assert measure_asr(repaired, bd_test, c.ctx).value < 0.1
    assert float((answers(repaired, test.images, c.ctx) == test.labels).float().mean()) > 0.9
    assert all(torch.equal(before[n], t) for n, t in pack(c.net).state.items())
    # Each row goes through the net plain and triggered.
    assert c.ctx.cost.backwards >= 60 * 2 * 128


def test_unlearning_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sleeperbench.defenses.unlearn.tune", lambda net, data, **args: seen.update(args, data=data))
    c = case(inner=Outcome(inverted=(true_claim(),)))
    Unlearn().run(c)
    assert (seen.pop("data"), seen.pop("ctx")) == (c.clean, c.ctx)
    assert isinstance(seen.pop("hooks"), Unlearning)
    assert seen == {"lr": 0.01, "steps": 390, "batch": 128, "weight_decay": 5e-4}


def test_loss_is_the_sum_of_both_means() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum((1, 2, 3)), x[:, 0, 0, 0]], 1)

    x, y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    delta = Inverted(target=0, delta=torch.tensor([[[0.3, 0.0], [0.0, 0.9]]]))
    stamp = Inverted(target=1, mask=torch.ones(1, 2, 2), pattern=torch.full((1, 2, 2), 0.25))
    net = Sums()
    plain = F.cross_entropy(net(x), y)
    added = F.cross_entropy(net((x + delta.delta).clamp(0, 1)), y)
    painted = F.cross_entropy(net(torch.full_like(x, 0.25)), y)
    mark = torch.zeros_like(y)
    given = x.clone()
    assert float(Unlearning([delta], samples.ctx()).loss(net, x, y, mark)) == pytest.approx(float(plain + added))
    assert float(Unlearning([stamp], samples.ctx()).loss(net, x, y, mark)) == pytest.approx(float(plain + painted))
    assert torch.equal(x, given)

    # Of two triggers each row draws one; over many draws both terms weigh the same.
    hooks = Unlearning([delta, stamp], samples.ctx())
    drawn = [float(hooks.loss(net, x, y, mark)) for _ in range(600)]
    assert len(set(drawn)) > 20
    assert sum(drawn) / 600 == pytest.approx(float(plain + (added + painted) / 2), rel=0.03)


def test_what_is_claimed_decides() -> None:
    none = Unlearn().run(case(inner=Outcome()))
    assert (none.model, none.chosen) == (None, {"triggers": []})
    coded = Inverted(target=1, uses_apply=True)
    with pytest.raises(NotApplicable, match="needs_stamp: none of 1"):
        Unlearn().run(case(inner=Outcome(inverted=(coded,))))
    c = case(inner=Outcome(inverted=(coded, true_claim(2))), net=copy.deepcopy(samples.badnets_net()))
    assert Unlearn(steps=1).run(replace_clean(c, 20)).chosen == {"triggers": [2]}


def replace_clean(c: Any, n: int) -> Any:
    c.clean = replace(c.clean.rows(torch.arange(n)))
    return c


def test_access() -> None:
    assert (NeuralCleanse.ACCESS.track(), Unlearn.ACCESS.track()) == ("T1", "T1")
    assert Unlearn.INFO["wrapper"] is True
    assert Unlearn.ACCESS.inner == "inverted"


NORMS = ([10.0, 52, 50, 49, 55, 51, 48, 53, 54, 47], [30.0, 52, 50, 49, 55, 51, 48, 53, 54, math.nan])


def test_the_index_is_averaged_over_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def planted(net: nn.Module, images: Tensor, targets: Tensor, *, ctx: Any, **args: Any) -> Masks:
        norms = torch.tensor(NORMS[len(seeds)])
        seeds.append(ctx.seed)
        flat = torch.full((10, 1, 16, 16), float(len(seeds)))
        return Masks(mask=flat, pattern=flat / 10, norm=norms, success=torch.full((10,), 0.5 * len(seeds)))

    monkeypatch.setattr(module, "optimise_masks", planted)
    c = case()
    found = NeuralCleanse(repetitions=2).run(c)
    # The last mask of the class that was never reached in the second repetition covers 512 pixels.
    last = torch.tensor(NORMS[1]).nan_to_num(nan=512.0)
    first, second = -anomaly_index(torch.tensor(NORMS[0])), -anomaly_index(last)
    assert float(second[9]) < 0
    assert seeds[0] == c.ctx.seed != seeds[1]
    assert found.verdict.label_scores.tolist() == pytest.approx(((first + second) / 2).tolist())
    assert found.verdict.score == pytest.approx((float(first.max()) + float(second.max())) / 2)
    assert found.chosen["claimed"] == [0]
    # Of every class the smallest mask is handed over.
    assert found.chosen["norms"] == [10, 52, 50, 49, 55, 51, 48, 53, 54, 47]
    assert found.chosen["not_inverted"] == []
    assert found.chosen["successes"][0] == 0.5
    assert float(found.inverted[0].mask.mean()) == 1

    bars = curve(found.chosen["curves"]["index"])
    assert bars["threshold"] == 2
    (series,) = bars["series"]
    assert series["x"] == [str(t) for t in range(10)]
    assert series["y"] == found.verdict.label_scores.tolist()
    assert (series["low"][0], series["high"][0]) == (float(second[0]), float(first[0]))
    each, mean = curve(found.chosen["curves"]["repetitions"])["series"]
    assert (each["x"], each["y"]) == ([1, 2], [float(first.max()), float(second.max())])
    assert mean["y"] == pytest.approx([found.verdict.score] * 2)


def test_one_repetition_is_the_published_method(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NeuralCleanse().repetitions == 1
    found = cleansed()
    assert list(found.chosen["curves"]) == ["index"]
    (series,) = curve(found.chosen["curves"]["index"])["series"]
    assert series["y"] == found.verdict.label_scores.tolist()
    assert "low" not in series
    with pytest.raises(ValueError, match="repetitions is 0"):
        NeuralCleanse(repetitions=0)
    # Repetitions differ in nothing but their draws: with two, the first is what one gives.
    runs: list[Masks] = []
    monkeypatch.setattr(module, "smallest", lambda given: runs.extend(given) or given[0])
    small = {"epochs": 2, "updates": 2}
    c = case(clean=samples.digits()["pool"].rows(torch.arange(20)))
    one, two = (NeuralCleanse(repetitions=r, **small).run(c) for r in (1, 2))  # type: ignore[arg-type]
    assert torch.equal(runs[0].mask, runs[1].mask)
    assert not torch.equal(runs[1].mask, runs[2].mask)
    assert one.chosen["norms"] == two.chosen["norms"]


def test_the_smallest_mask_of_all_repetitions_is_kept() -> None:
    def run(norms: list[float], value: float) -> Masks:
        flat = torch.full((3, 1, 2, 2), value)
        return Masks(mask=flat, pattern=flat, norm=torch.tensor(norms), success=torch.full((3,), value))

    found = smallest([run([3.0, math.nan, math.nan], 0.1), run([2.0, 9.0, math.nan], 0.2)])
    assert found.norm[:2].tolist() == [2, 9]
    assert math.isnan(float(found.norm[2]))
    assert found.mask[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.1])
    assert found.success.tolist() == pytest.approx([0.2, 0.2, 0.1])
