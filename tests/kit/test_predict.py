from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sleeperbench.contracts.context import Ctx, Recipe
from sleeperbench.contracts.models import ModelSpec
from sleeperbench.kit.classifier import Classifier, build
from sleeperbench.kit.pixels import to_float, to_uint8
from sleeperbench.kit.predict import evaluating, hits, predict


@pytest.fixture
def net() -> Classifier:
    return build(ModelSpec(arch="small_cnn", classes=5, shape=(1, 16, 16), norm=((0.5,), (0.25,))), 0)


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_round_to_the_nearest_level_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels).dtype == torch.float32
    assert float(to_float(levels)[51]) == pytest.approx(0.2, abs=1e-7)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    x = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 99.4 / 255, 99.6 / 255, 254.6 / 255, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 99, 100, 255, 255, 255]
    assert to_uint8(x).dtype == torch.uint8
    kept = torch.tensor([0.3, 1.2])
    to_uint8(kept)
    assert kept.tolist() == pytest.approx([0.3, 1.2])


def test_logits_do_not_depend_on_the_batch(net: Classifier) -> None:
    x = images(37)
    whole = predict(net, x)
    assert whole.shape == (37, 5)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    for batch in (1, 8, 36, 37):
        torch.testing.assert_close(predict(net, x, batch=batch), whole, rtol=0, atol=1e-5)


def test_prediction_is_in_eval_mode_and_puts_modes_back(net: Classifier) -> None:
    net.train()
    net.body.stage2.eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = images(8)
    logits = predict(net, x)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(logits, net.eval()(to_float(x)))


def test_modes_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1))
    inside: list[bool] = []

    def fail() -> None:
        with evaluating(net):
            inside.append(net[0].training)
            net(torch.zeros(1, 2, 4, 4))

    with pytest.raises(RuntimeError):
        fail()
    assert inside == [False]
    assert net.training
    assert net[0].training


def test_no_images_give_no_logits(net: Classifier) -> None:
    assert predict(net, images(0)).shape == (0, 5)


def test_forward_passes_are_counted_in_images(net: Classifier, tmp_path: Path) -> None:
    ctx = Ctx(seed=0, recipe=Recipe(), scratch=tmp_path)
    predict(net, images(7), batch=3, ctx=ctx)
    predict(net, images(2), ctx=ctx)
    assert (ctx.cost.forwards, ctx.cost.backwards, ctx.cost.queries) == (9, 0, 0)


def test_hits_count_rows_whose_largest_logit_is_their_label() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 1.0, 5.0]])
    assert hits(logits, torch.tensor([1, 2, 0, 2])) == (3, 4)
    assert hits(logits, torch.tensor([0, 1, 1, 0])) == (0, 4)
