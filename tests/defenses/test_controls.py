from __future__ import annotations

from types import SimpleNamespace

import samples
import torch

from sleeperbench.defenses.bn_refresh import BNRefresh
from sleeperbench.defenses.clean_model import CleanModel
from sleeperbench.defenses.none import NoDefense
from sleeperbench.kit.classifier import pack


def test_none_changes_nothing_and_sees_nothing() -> None:
    outcome = NoDefense().run(SimpleNamespace())
    assert outcome.model is None
    assert (NoDefense.ACCESS.model, NoDefense.ACCESS.clean) == ("none", 0)


def test_clean_model_is_the_first_reference() -> None:
    reference = pack(samples.clean_net())
    assert CleanModel().run(SimpleNamespace(references=(reference,))).model is reference
    assert CleanModel.ACCESS.track() == "T4"


def test_bn_refresh_changes_running_statistics_and_no_weight() -> None:
    net = samples.badnets_net()
    before = pack(net).state
    case = SimpleNamespace(net=net, clean=samples.digits()["pool"], ctx=samples.ctx())
    after = BNRefresh().run(case).model.state
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    weights = {name for name, _ in net.named_parameters()}
    assert moved
    assert not moved & weights
    assert {name.rsplit(".", 1)[1] for name in moved} >= {"running_mean", "running_var"}
    assert all(torch.equal(before[n], t) for n, t in pack(net).state.items())
